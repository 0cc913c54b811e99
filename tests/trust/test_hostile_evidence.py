"""Evidence as an attacker would make it who has a vendor's genuine hardware, or a pen: each refused for its own reason.

What needs a signature of a vendor's is signed by a made-up one, whose root is pinned for the test.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from test_vectors import JUNE, NOBODY, PSS, Amd, pinned, read, verify

from rapha_lab.client.appraisal import AppraisalPolicy, Endorsements, Verifier, appraise
from rapha_lab.client.verifiers import certificates, intel, nitro, nvidia, sev_snp
from rapha_lab.enclave.attester import SimulatedAttester
from rapha_lab.protocol.errors import EvidenceError
from rapha_lab.protocol.evidence import (
    NITRO,
    SIMULATED,
    SNP,
    Binding,
    Claims,
    Evidence,
    simulation_key,
)

SECOND = timedelta(seconds=1)
ISSUED = JUNE.replace(hour=12)


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> Amd:
    """A made-up AMD whose root is pinned for one test."""
    return pinned(Amd(), monkeypatch)


def snp(
    amd: Amd, report: bytes, *crls: bytes, leaf: Any = None, chain: bytes = b"", now: datetime = JUNE
) -> Claims:
    """The claims of a report of the made-up AMD."""
    endorsed = Endorsements((leaf or amd.vcek).public_bytes(Encoding.DER), chain or amd.chain, crls)
    return Verifier().verify(Evidence(SNP, report, NOBODY), endorsed, now)


class TestSevSnp:
    @pytest.mark.parametrize(
        ("bits", "reason"),
        [(1 << 19, "debug mode"), (1 << 18, "migration agent"), (1 << 18 | 1 << 19, "debug")],
    )
    def test_what_the_host_lets_itself_do_is_contraindicated(
        self, amd: Amd, binding: Binding, bits: int, reason: str
    ) -> None:
        """The launch digest does not cover the guest's policy: the host chooses it."""
        claims = snp(amd, amd.report(policy=0x30000 | bits), amd.crl())
        verdict = appraise(claims, binding)
        assert verdict.vector["configuration"] == 96
        assert any(reason in each for each in verdict.reasons)
        assert appraise(snp(amd, amd.report(), amd.crl()), binding).vector["configuration"] == 2

    def test_threads_of_a_core_may_be_shared(self, amd: Amd, binding: Binding) -> None:
        """Simultaneous multithreading is no fault by itself; the policy is told among the claims."""
        claims = snp(amd, amd.report(policy=0x20000 | 1 << 16), amd.crl())
        assert appraise(claims, binding).vector["configuration"] == 2
        assert claims.extra["policy"] & 1 << 16

    def test_each_reason_of_a_revocation_list_is_its_own(self, amd: Amd) -> None:
        """From the future, expired, without an end, of somebody else's, with bytes behind it."""
        future = amd.crl(days=400)
        early = JUNE - timedelta(days=61)  # it is of 60 days before
        with pytest.raises(EvidenceError, match="expired or is not yet valid"):
            snp(amd, amd.report(), future, now=early)
        with pytest.raises(EvidenceError, match="from the future"):
            sev_snp._revocation([future], [amd.vcek], amd.root, early)
        builder = x509.CertificateRevocationListBuilder().issuer_name(amd.root.subject)
        builder = builder.last_update(JUNE - timedelta(days=1)).next_update(JUNE + timedelta(days=1))
        other = builder.sign(amd.mid_key, hashes.SHA384(), rsa_padding=PSS).public_bytes(Encoding.DER)
        for crl, reason in (
            (amd.crl(days=-1), "has expired"),
            (other, "not AMD's"),
            (amd.crl() + b"\0", "not AMD's"),
            (Amd().crl(), "not AMD's"),
        ):
            with pytest.raises(EvidenceError, match=reason):
                snp(amd, amd.report(), crl)

    def test_a_bad_list_beside_a_good_one_is_not_passed_over(self, amd: Amd) -> None:
        """Nor does a good one behind it mend it."""
        for crls in ((amd.crl(), amd.crl(amd.vcek)), (amd.crl(amd.mid), amd.crl())):
            with pytest.raises(EvidenceError, match="is revoked"):
                snp(amd, amd.report(), *crls)

    def test_time_counts_to_the_second(self, amd: Amd) -> None:
        """At both edges of certificates and lists."""
        first, last = amd.vcek.not_valid_before_utc, amd.vcek.not_valid_after_utc
        for now in (first, last):
            assert snp(amd, amd.report(), now=now).tee == "sev-snp"
        for now in (first - SECOND, last + SECOND):
            with pytest.raises(EvidenceError, match="not yet valid"):
                snp(amd, amd.report(), now=now)
        due = JUNE + timedelta(days=7)
        assert snp(amd, amd.report(), amd.crl(days=7), now=due).revocation == "checked"
        with pytest.raises(EvidenceError, match="list has expired"):
            snp(amd, amd.report(), amd.crl(days=7), now=due + SECOND)

    def test_a_chain_of_the_right_root_must_be_for_this_purpose(self, amd: Amd) -> None:
        """An issuer signs no report, and a list of certificates in another order or number is no chain."""
        r, s = decode_dss_signature(amd.chip_key.sign(b"", ec.ECDSA(hashes.SHA384())))
        assert r != s
        with pytest.raises(EvidenceError, match="not one that signs evidence"):
            snp(amd, amd.report(), leaf=amd.mid)
        mid, root = (each.public_bytes(Encoding.PEM) for each in (amd.mid, amd.root))
        for chain in (root + mid, mid + mid + root, mid, root, mid + root + root):
            with pytest.raises(EvidenceError, match=r"known vendor|not AMD's chain"):
                snp(amd, amd.report(), chain=chain)

    def test_two_reports_are_none(self, amd: Amd) -> None:
        """Nor one with a byte more or less, nor of a version that is not known."""
        report = amd.report()
        for changed in (report * 2, report + b"\0", report[:-1], b"\x06" + report[1:], b""):
            with pytest.raises(EvidenceError, match="malformed"):
                snp(amd, changed)


class Issuer:
    """Certificates with any purpose, one issued by the other."""

    def __init__(self) -> None:
        self.keys: dict[str, ec.EllipticCurvePrivateKey] = {}

    def __call__(
        self,
        name: str,
        by: str,
        *,
        ca: bool | None = None,
        length: int | None = None,
        usage: tuple[bool, bool] | None = None,
    ) -> x509.Certificate:
        for each in (by, name):
            self.keys.setdefault(each, ec.generate_private_key(ec.SECP384R1()))
        names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, each)]) for each in (by, name)]
        builder = x509.CertificateBuilder(*names, self.keys[name].public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(JUNE - timedelta(days=30)).not_valid_after(
            JUNE + timedelta(days=30)
        )
        if ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca, length), True)
        if usage is not None:
            signs, issues = usage
            more = (False,) * 3
            builder = builder.add_extension(
                x509.KeyUsage(signs, *more, False, issues, False, False, False), True
            )
        return builder.sign(self.keys[by], hashes.SHA384())


def judged(*chain: x509.Certificate) -> str:
    """The root that a chain leads to."""
    roots = {chain[-1].fingerprint(hashes.SHA256()).hex(): "root"}
    return certificates.chain(chain, roots, JUNE)


class TestChains:
    def test_an_honest_chain_leads_to_its_root(self) -> None:
        """Whether or not its certificates say what they are for."""
        made = Issuer()
        root = made("root", "root", ca=True)
        mid = made("mid", "root", ca=True, length=0, usage=(False, True))
        assert judged(made("leaf", "mid", usage=(True, False)), mid, root) == "root"
        assert judged(made("leaf", "mid"), mid, root) == "root"
        assert judged(made("leaf", "mid", ca=False), mid, root) == "root"

    def test_a_leaf_for_another_purpose_is_refused(self) -> None:
        """An authority, or a key that may not sign."""
        made = Issuer()
        root = made("root", "root", ca=True)
        for leaf in (
            made("leaf", "root", ca=True, usage=(True, True)),
            made("leaf", "root", usage=(False, False)),
            made("leaf", "root", ca=False, usage=(False, True)),
        ):
            with pytest.raises(EvidenceError, match="not one that signs evidence"):
                judged(leaf, root)
        with pytest.raises(EvidenceError, match="not one that signs evidence"):
            judged(root)

    def test_an_issuer_must_be_let_issue(self) -> None:
        """It must be an authority, for certificates, and not have more of them below it than it may."""
        made = Issuer()
        root = made("root", "root", ca=True)
        leaf = made("leaf", "mid")
        for mid in (made("mid", "root"), made("mid", "root", ca=True, usage=(True, False))):
            with pytest.raises(EvidenceError, match="may not issue"):
                judged(leaf, mid, root)
        outer = made("outer", "root", ca=True, length=0)
        with pytest.raises(EvidenceError, match="may not issue"):
            judged(leaf, made("mid", "outer", ca=True), outer, root)
        short = made("root", "root", ca=True, length=0)
        with pytest.raises(EvidenceError, match="may not issue"):
            judged(leaf, made("mid", "root", ca=True), short)

    def test_an_empty_chain_leads_nowhere(self) -> None:
        """And is no traceback."""
        with pytest.raises(EvidenceError, match="no known vendor"):
            certificates.chain([], {}, JUNE)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """Nitro documents of a made-up AWS, with any fields and framing."""
    cbor2 = pytest.importorskip("cbor2")
    made = Issuer()
    root, leaf = made("root", "root", ca=True), made("leaf", "root", ca=False)
    monkeypatch.setattr(nitro, "ROOTS", {root.fingerprint(hashes.SHA256()).hex(): "aws"})
    der = [each.public_bytes(Encoding.DER) for each in (leaf, root)]

    def document(frame: Callable[[list[Any]], bytes] = cbor2.dumps, **fields: Any) -> bytes:
        said = {
            "module_id": "i-0", "digest": "SHA384", "timestamp": int(ISSUED.timestamp() * 1000),
            "pcrs": {n: bytes([n + 1]) * 48 for n in range(3)}, "certificate": der[0], "cabundle": [der[1]],
            "public_key": None, "user_data": bytes(64), "nonce": None,
        } | fields  # fmt: skip
        body, protected = cbor2.dumps(said), b"\xa1\x01\x38\x22"
        signed = cbor2.dumps(["Signature1", protected, b"", body])
        r, s = decode_dss_signature(made.keys["leaf"].sign(signed, ec.ECDSA(hashes.SHA384())))
        return frame([protected, {}, body, r.to_bytes(48, "big") + s.to_bytes(48, "big")])

    return document


def document(payload: bytes, now: datetime = ISSUED) -> Claims:
    """The claims of a Nitro document."""
    return Verifier().verify(Evidence(NITRO, payload, NOBODY), None, now)


class TestNitro:
    def test_an_honest_one_verifies(self, aws: Callable[..., bytes]) -> None:
        """Of the made-up AWS too, with its tag or without."""
        assert document(aws()).tee == "nitro"
        assert document(b"\xd2" + aws()).tee == "nitro"

    def test_no_other_framing_of_it_is_accepted(self, aws: Callable[..., bytes]) -> None:
        """Indefinite lengths, long forms, another tag, a key given twice, unprotected headers, trailing bytes."""
        import cbor2

        def indefinite(parts: list[Any]) -> bytes:
            return b"\x9f" + b"".join(map(cbor2.dumps, parts)) + b"\xff"

        def long_form(parts: list[Any]) -> bytes:
            return b"\x98\x04" + b"".join(map(cbor2.dumps, parts))

        def twice(parts: list[Any]) -> bytes:
            return (
                b"\x84"
                + cbor2.dumps(parts[0])
                + b"\xa2\x01\x02\x01\x03"
                + b"".join(map(cbor2.dumps, parts[2:]))
            )

        def headed(parts: list[Any]) -> bytes:
            return cbor2.dumps([parts[0], {4: b"key"}, *parts[2:]])

        def tagged(parts: list[Any]) -> bytes:
            return b"\xd1" + cbor2.dumps(parts)

        def doubly(parts: list[Any]) -> bytes:
            return b"\xd2\xd2" + cbor2.dumps(parts)

        for frame in (indefinite, long_form, twice, headed, tagged, doubly):
            with pytest.raises(EvidenceError, match="malformed"):
                document(aws(frame))
        for changed in (aws() + b"\0", aws() * 2, b"\x81" * 5000, b"\xbf" * 5000, b"\x1b" + b"\xff" * 8):
            with pytest.raises(EvidenceError, match="malformed"):
                document(changed)

    def test_fields_of_another_kind_are_refused(self, aws: Callable[..., bytes]) -> None:
        """Even if AWS signed them."""
        for wrong in (
            {"timestamp": "now"}, {"timestamp": 2**63}, {"timestamp": -(2**70)}, {"pcrs": {}}, {"pcrs": {0: b"", 1: "x", 2: b""}},
            {"cabundle": [7]}, {"certificate": b""}, {"user_data": 7}, {"module_id": None}, {"digest": "SHA256"},
        ):  # fmt: skip
            with pytest.raises(EvidenceError) as caught:
                document(aws(**wrong))
            assert caught.value.what

    def test_debug_pcrs_and_the_future_are_seen(self, aws: Callable[..., bytes]) -> None:
        """Zeros mean debug mode; five minutes ahead are a clock, six are not."""
        assert document(aws(pcrs={n: bytes(48) for n in range(3)})).debug
        assert document(aws(), now=ISSUED - timedelta(minutes=5)).tee == "nitro"
        with pytest.raises(EvidenceError, match="from the future"):
            document(aws(), now=ISSUED - timedelta(minutes=6))


class TestIntel:
    @pytest.mark.parametrize(
        ("attributes", "reason"),
        [
            (0, "SEPT_VE_DISABLE is off"),
            (1 << 28 | 1 << 29, "migration domain"),
            (1 << 28 | 1 << 63, "does not know"),
            (1 << 28 | 1 << 8, "does not know"),
        ],
    )
    def test_attributes_that_let_the_host_in_are_contraindicated(
        self, binding: Binding, attributes: int, reason: str
    ) -> None:
        """Which a measurement does not cover."""
        (way,) = intel._exposed(attributes)
        assert reason in way
        claims = Claims(tee="tdx", measurements={}, report_data=b"", exposed=(way,))
        assert appraise(claims, binding).vector["configuration"] == 96

    def test_those_of_a_guests_own_use_are_none_of_them(self) -> None:
        """Protection keys, key locker, linear address separation."""
        for bit in (27, 30, 31):
            assert intel._exposed(1 << 28 | 1 << bit) == ()

    def test_the_recorded_quote_leaves_nothing_open(self) -> None:
        """As its attributes say."""
        assert verify("tdx", read("tdx")).exposed == ()

    def test_two_quotes_and_padding_with_content_are_refused(self) -> None:
        """Zeros may follow, as the driver leaves them; nothing else."""
        parts = read("tdx")
        quote = parts["payload"].rstrip(b"\0")
        for tail in (quote, b"\0\0\1", quote[:100]):
            with pytest.raises(EvidenceError, match="malformed"):
                verify("tdx", {**parts, "payload": parts["payload"] + tail})

    def test_collateral_is_of_one_form(self) -> None:
        """Names that nobody knows, deep nesting, huge numbers, upper case, a signature cut off."""
        parts = read("tdx")
        told = json.loads(parts["collateral"])
        for changed in (
            {**told, "more": "x"}, {**told, "tcb_info": 7}, {**told, "tcb_info_signature": told["tcb_info_signature"].upper()},
            {**told, "tcb_info_signature": told["tcb_info_signature"][:-2]}, {**told, "tcb_info": "[" * 5000},
            {**told, "tcb_info": told["tcb_info"] + " "}, {**told, "tcb_info": "9" * 10_000}, {**told, "pck_crl": ""},
        ):  # fmt: skip
            with pytest.raises(EvidenceError) as caught:
                verify("tdx", {**parts, "collateral": json.dumps(changed).encode()})
            assert "Intel" in caught.value.what

    def test_collateral_of_another_platform_is_refused(self) -> None:
        """Genuine, of SGX instead of TDX."""
        with pytest.raises(EvidenceError, match="does not hold|expired"):  # noqa: RUF043
            verify("tdx", {**read("tdx"), "collateral": read("sgx")["collateral"]})


class TestNvidia:
    def test_another_device_under_the_same_root_is_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """NVIDIA's root vouches for more than Hoppers: here for what is made to look like a switch."""
        made = Issuer()
        root = made("NVIDIA Device Identity CA", "NVIDIA Device Identity CA", ca=True)
        switch = made("LS10 A01 FSP", "NVIDIA Device Identity CA")
        monkeypatch.setattr(nvidia, "ROOTS", {root.fingerprint(hashes.SHA256()).hex(): "root"})
        gpus = json.loads(read("nvidia")["payload"])
        import base64

        text = b"".join(each.public_bytes(Encoding.PEM) for each in (switch, root))
        gpus[0]["certificate"] = base64.b64encode(text).decode()
        with pytest.raises(EvidenceError, match="another device's"):
            verify("nvidia", {"payload": json.dumps(gpus).encode()})


class TestSimulated:
    def made(self, binding: Binding, change: Callable[[bytes], bytes]) -> Claims:
        """Evidence whose text was changed and signed anew: everybody has the key."""
        evidence = SimulatedAttester("sha256:" + "ab" * 32).evidence(binding, {"tier": "S3"})
        text = change(evidence.payload[64:])
        payload = simulation_key().sign(SIMULATED.encode() + b"\0" + text) + text
        return Verifier().verify(msgspec.structs.replace(evidence, payload=payload))

    def test_there_is_one_form_of_it(self, binding: Binding) -> None:
        """A name given twice, spaces, trailing bytes, huge numbers, deep nesting, other names, no text at all."""
        assert self.made(binding, lambda text: text).simulated
        banner = b'{"banner":'
        for change in (
            lambda t: t.replace(banner, b'{"measurement":"sha256:00","banner":'),
            lambda t: t.replace(banner, b'{ "banner":'),
            lambda t: t + b" ",
            lambda t: t + t,
            lambda t: t.replace(b'"S3"', b"1" + b"0" * 400 + b".5"),
            lambda t: t.replace(b'"S3"', b"[" * 3000 + b"]" * 3000),
            lambda t: t.replace(b'"S3"', b"1e400"),
            lambda t: t.replace(b'"tier"', b'"tier":"S1","tier"'),
            lambda t: t.replace(banner, b'{"real":true,"banner":'),
            lambda t: b"",
            lambda t: b"\xff" * 10,
        ):
            with pytest.raises(EvidenceError, match="malformed"):
                self.made(binding, change)

    def test_whatever_it_says_it_stays_simulated(self, binding: Binding) -> None:
        """Its best verdict is a warning, in capitals."""
        claims = self.made(binding, lambda text: text.replace(b'"S3"', b'"sev-snp"'))
        verdict = appraise(claims, binding, AppraisalPolicy(allow_simulated=True))
        assert "SIMULATED" in verdict.reasons[0]
        assert verdict.status != "affirming"
        assert claims.issued_at is not None
        assert claims.issued_at <= time.time()


def test_evidence_is_one_document(binding: Binding) -> None:
    """Two behind each other, names that nobody knows, numbers without end and nesting without end are none."""
    honest = SimulatedAttester("sha256:" + "ab" * 32).evidence(binding).encode()
    for data in (
        honest * 2,
        honest + b"x",
        honest.replace(b'{"media_type"', b'{"tee":"sev-snp","media_type"', 1),
        honest.replace(b'"build":null', b'"build":' + b"[" * 4000 + b"]" * 4000),
        honest.replace(b'"build":null', b'"build":{"index":1e400,"entry":"","proof":[],"checkpoint":""}'),
    ):
        with pytest.raises(EvidenceError, match="malformed"):
            Evidence.decode(data)
    assert datetime.now(UTC) > JUNE
