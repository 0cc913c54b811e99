"""Evidence recorded on real hardware: each verifies, and no copy with one bit changed does.

The recordings are others' and lie beside this repository, if at all; where they do not, these tests say so
and are skipped.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from trust_material import DEEP, vector

from rapha_lab.client.appraisal import AppraisalPolicy, Endorsements, Verifier, appraise
from rapha_lab.client.verifiers import sev_snp
from rapha_lab.enclave.attester import launch_measurement
from rapha_lab.protocol.builds import Build
from rapha_lab.protocol.errors import EvidenceError
from rapha_lab.protocol.evidence import NITRO, NVIDIA, SGX, SNP, TDX, Binding, Claims, Evidence
from rapha_lab.protocol.keys import PrivateKey

JUNE = datetime(2025, 6, 21, tzinfo=UTC)
FLIPS = 1000 if DEEP else 250
NOBODY = Binding(nonce=b"", sealing_key="", signing_key="", policy_hash=b"", checkpoint_hash=b"")

CASES: dict[str, tuple[str, str, dict[str, str]]] = {
    "snp": (SNP, "snp-milan-report.hex", {"leaf": "snp-milan-vcek.der", "chain": "snp-milan-chain.pem"}),
    "tdx": (TDX, "tdx-quote.bin", {"collateral": "tdx-collateral.json"}),
    "sgx": (SGX, "sgx-quote.bin", {"collateral": "sgx-collateral.json"}),
    "nitro": (NITRO, "nitro-document.bin", {}),
    "nvidia": (NVIDIA, "nvidia-h100-evidence.json", {}),
}
NEEDS = {"tdx": "dcap_qvl", "sgx": "dcap_qvl", "nitro": "cbor2"}
PARTS = [(tee, part) for tee, case in CASES.items() for part in ("payload", *case[2])]


def read(tee: str) -> dict[str, bytes]:
    """The recording's parts: its payload and its endorsements."""
    _, payload, endorsements = CASES[tee]
    if tee in NEEDS:
        pytest.importorskip(NEEDS[tee])
    return {"payload": vector(payload), **{name: vector(file) for name, file in endorsements.items()}}


def verify(tee: str, parts: dict[str, bytes], now: datetime = JUNE) -> Claims:
    """The claims of a recording, with no network and the clock set."""
    endorsements: dict[str, Any] = {name: data for name, data in parts.items() if name != "payload"}
    return Verifier().verify(
        Evidence(CASES[tee][0], parts["payload"], NOBODY), Endorsements(**endorsements), now
    )


def verify_one(tee: str) -> Claims:
    """The claims of an unchanged recording."""
    return verify(tee, read(tee))


def test_the_snp_report_of_milan_verifies() -> None:
    """Of a chip whose firmware the certificate confirms, not in debug mode."""
    claims = verify_one("snp")
    assert (claims.tee, claims.root, claims.debug) == ("sev-snp", "ARK-Milan", False)
    assert claims.tcb == {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115}
    assert claims.measurement.startswith("sha384:7a1e5c266c0108db")


def test_the_tdx_quote_verifies() -> None:
    """Up to date at the time of its collateral."""
    claims = verify_one("tdx")
    assert (claims.tee, claims.tcb_status, claims.debug) == ("tdx", "up to date", False)
    assert claims.measurements["mr_seam"].startswith("sha384:5b38e33a6487958b")


def test_the_sgx_quote_verifies_with_what_intel_says_of_it() -> None:
    """Behind on two advisories, which an appraisal does not accept."""
    claims = verify_one("sgx")
    assert claims.tcb_status == "ConfigurationAndSWHardeningNeeded"
    assert claims.advisories == ("INTEL-SA-00289", "INTEL-SA-00615")


def test_the_nitro_document_verifies() -> None:
    """At its own signed time, years after its leaf certificate expired."""
    claims = verify_one("nitro")
    assert (claims.tee, claims.root, claims.debug) == ("nitro", "aws.nitro-enclaves", False)
    assert claims.measurement.startswith("sha384:f4d48b81a460c991")


def test_the_two_h100_verify_and_say_what_was_not_checked() -> None:
    """Chain and signature hold; the reference measurements were not compared."""
    claims = verify_one("nvidia")
    assert claims.extra == {"driver": "590.12", "vbios": "96.00.A5.00.01", "gpus": 2}
    assert "were not compared" in claims.caveats[0]
    assert len(claims.measurements) == 128


@pytest.mark.parametrize("tee", ["snp", "tdx", "nitro"])
def test_a_site_knows_itself_by_what_its_clients_will_read(tee: str) -> None:
    """The enclave's own reading of its evidence gives the verified measurement."""
    assert launch_measurement(CASES[tee][0], read(tee)["payload"]) == verify_one(tee).measurement


def test_endorsements_may_come_with_the_evidence() -> None:
    """A site mirrors them; its vendor signed them, so who carries them does not matter."""
    parts = read("snp")
    endorsements = Endorsements(parts["leaf"], parts["chain"])
    evidence = Evidence(SNP, parts["payload"], NOBODY, endorsements=endorsements)
    assert Verifier().verify(evidence, now=JUNE).root == "ARK-Milan"


def test_expired_collateral_is_refused_and_said() -> None:
    """Of TDX and SGX, a year later."""
    for tee in ("tdx", "sgx"):
        with pytest.raises(EvidenceError, match="expired"):
            verify(tee, read(tee), JUNE + timedelta(days=365))


def test_none_of_them_is_bound_to_us(binding: Binding) -> None:
    """Genuine evidence of somebody else's enclave is refused for its binding."""
    for tee in CASES:
        verdict = appraise(verify_one(tee), binding, AppraisalPolicy())
        assert verdict.status == "contraindicated"
        assert "The keys offered are not those that the evidence is bound to." in verdict.reasons


@pytest.mark.parametrize(("tee", "part"), PARTS, ids=[f"{tee}-{part}" for tee, part in PARTS])
def test_no_flipped_bit_verifies(tee: str, part: str) -> None:
    """Random bits of the evidence and of each endorsement, one at a time; a thousand each in a deep run."""
    parts, chance = read(tee), random.Random(tee + part)
    for _ in range(FLIPS):
        bit = chance.randrange(len(parts[part]) * 8)
        flipped = bytearray(parts[part])
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EvidenceError):
            verify(tee, {**parts, part: bytes(flipped)})


@pytest.mark.parametrize("tee", CASES)
def test_nothing_may_be_cut_or_added(tee: str) -> None:
    """At either end."""
    parts = read(tee)
    payload = parts["payload"]
    for changed in (
        b"",
        payload.rstrip(b"\0")[:-1],
        payload[1:],
        payload + b"\x01",
        payload[: len(payload) // 2],
        payload * 2,
    ):
        with pytest.raises(EvidenceError):
            verify(tee, {**parts, "payload": changed})


@pytest.mark.parametrize("tee", ["snp", "tdx", "sgx"])
def test_without_endorsements_nothing_verifies(tee: str) -> None:
    """They are asked for, not guessed or fetched."""
    with pytest.raises(EvidenceError):
        verify(tee, {"payload": read(tee)["payload"]})


# A made-up AMD: the same forms, a root of our own, so that reports can be signed with any content.

NAME = "1.3.6.1.4.1.3704.1."
SVN = {
    "bootloader": ("3.1", 1),
    "tee": ("3.2", 2),
    "snp": ("3.3", 3),
    "microcode": ("3.8", 7),
    "fmc": ("3.9", 0),
}
PSS = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
CHIP = bytes(range(8)).ljust(64, b"\0")
TCB = bytes([1, 2, 3, 4, 0, 0, 0, 9])


class Amd:
    """Issues chains like AMD's for Turin, and signs reports and revocation lists."""

    def __init__(self, authority: bool = True) -> None:
        self.root_key, self.mid_key = (rsa.generate_private_key(65537, 2048) for _ in range(2))
        self.chip_key = ec.generate_private_key(ec.SECP384R1())
        self.root = self._certificate("ARK-Turin", "ARK-Turin", self.root_key.public_key(), self.root_key)
        self.mid = self._certificate(
            "SEV-Turin", "ARK-Turin", self.mid_key.public_key(), self.root_key, None if authority else []
        )
        svn = [(NAME + oid, bytes([2, 1, TCB[at]])) for oid, at in SVN.values()]
        self.vcek = self._leaf([*svn, (NAME + "4", CHIP[:8])])
        self.vlek = self._leaf([*svn, (NAME + "5", b"\x16\x05cloud")])
        self.chain = b"".join(c.public_bytes(Encoding.PEM) for c in (self.mid, self.root))

    def _leaf(self, extensions: list[tuple[str, bytes]]) -> x509.Certificate:
        return self._certificate(
            "SEV-VCEK", "SEV-Turin", self.chip_key.public_key(), self.mid_key, extensions
        )

    def _certificate(
        self,
        subject: str,
        issuer: str,
        public: Any,
        key: Any,
        extensions: list[tuple[str, bytes]] | None = None,
    ) -> x509.Certificate:
        names = [
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in (subject, issuer)
        ]
        builder = (
            x509.CertificateBuilder(names[1], names[0], public, x509.random_serial_number())
            .not_valid_before(JUNE - timedelta(days=30))
            .not_valid_after(JUNE + timedelta(days=30))
        )
        if extensions is None:
            builder = builder.add_extension(x509.BasicConstraints(True, None), True)
        for oid, value in extensions or ():
            builder = builder.add_extension(
                x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), False
            )
        return builder.sign(key, hashes.SHA384(), rsa_padding=PSS)

    def crl(self, *revoked: x509.Certificate, key: Any = None, days: int = 30) -> bytes:
        """A revocation list of the root that is due for renewal after `days` days."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.root.subject)
        builder = builder.last_update(JUNE - timedelta(days=60)).next_update(JUNE + timedelta(days=days))
        for certificate in revoked:
            entry = x509.RevokedCertificateBuilder(
                certificate.serial_number, JUNE - timedelta(days=50)
            ).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(key or self.root_key, hashes.SHA384(), rsa_padding=PSS).public_bytes(Encoding.DER)

    def report(
        self, *, policy: int = 0x30000, vmpl: int = 0, tcb: bytes = TCB, chip: bytes = CHIP, kind: int = 0
    ) -> bytes:
        """A signed report of version 5."""
        body = bytearray(0x2A0)
        body[0:4], body[8:16], body[0x30:0x34], body[0x34] = (
            b"\5\0\0\0",
            policy.to_bytes(8, "little"),
            bytes([vmpl] * 4),
            1,
        )
        body[0x48], body[0x180:0x188], body[0x1A0:0x1E0] = kind << 2, tcb, chip
        r, s = decode_dss_signature(self.chip_key.sign(bytes(body), ec.ECDSA(hashes.SHA384())))
        return bytes(body) + b"".join(n.to_bytes(72, "little") for n in (r, s)) + bytes(368)


def pinned(made: Amd, monkeypatch: pytest.MonkeyPatch) -> Amd:
    """The made-up AMD, its root the only one that is known, for one test."""
    monkeypatch.setattr(sev_snp, "ROOTS", {made.root.fingerprint(hashes.SHA256()).hex(): "ARK-Turin"})
    return made


@pytest.fixture(scope="module")
def amd() -> Amd:
    """A made-up AMD."""
    return Amd()


@pytest.fixture
def judge(amd: Amd, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Claims]:
    """Verifies reports of the made-up AMD, whose root is pinned for one test."""
    pinned(amd, monkeypatch)

    def judge(
        report: bytes,
        *,
        leaf: x509.Certificate = amd.vcek,
        crls: tuple[bytes, ...] = (),
        now: datetime = JUNE,
    ) -> Claims:
        endorsements = Endorsements(leaf.public_bytes(Encoding.DER), amd.chain, crls)
        return Verifier().verify(Evidence(SNP, report, NOBODY), endorsements, now)

    return judge


class TestMadeUpAmd:
    def test_turin_verifies_by_its_own_layout(self, amd: Amd, judge: Callable[..., Claims]) -> None:
        """Firmware versions stand in other places, with one more of them; the chip has a short name."""
        claims = judge(amd.report(), crls=(amd.crl(),))
        assert claims.tcb == {"fmc": 1, "bootloader": 2, "tee": 3, "snp": 4, "microcode": 9}
        assert (claims.root, claims.revocation) == ("ARK-Turin", "checked")

    def test_a_cloud_may_sign_with_its_own_key(self, amd: Amd, judge: Callable[..., Claims]) -> None:
        """A VLEK names no chip; each kind of certificate serves only for its kind of report."""
        assert judge(amd.report(kind=1), leaf=amd.vlek).tee == "sev-snp"
        for report, leaf in (
            (amd.report(kind=0), amd.vlek),
            (amd.report(kind=1), amd.vcek),
            (amd.report(kind=2), amd.vcek),
        ):
            with pytest.raises(EvidenceError, match="not of this chip"):
                judge(report, leaf=leaf)

    def test_debugging_is_seen(self, amd: Amd, judge: Callable[..., Claims], binding: Binding) -> None:
        """And contraindicated."""
        claims = judge(amd.report(policy=0x30000 | 1 << 19), crls=(amd.crl(),))
        assert claims.debug
        assert any("debug" in reason for reason in appraise(claims, binding).reasons)

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"tcb": bytes([1, 2, 3, 5, 0, 0, 0, 9])}, "not of this firmware"),
            ({"chip": bytes(64)}, "not of this chip"),
            ({"chip": CHIP[:63] + b"\1"}, "not of this chip"),
            ({"vmpl": 255}, "The host asked"),
        ],
    )
    def test_reports_of_another_making_are_refused(
        self, amd: Amd, judge: Callable[..., Claims], fields: dict[str, Any], reason: str
    ) -> None:
        """Other firmware, a hidden or another chip, a report that the host asked for."""
        with pytest.raises(EvidenceError, match=reason):
            judge(amd.report(**fields))

    def test_reserved_bytes_count(self, amd: Amd, judge: Callable[..., Claims]) -> None:
        """What no signature covers must be zero."""
        for at in (0x2A0 + 48, 0x2A0 + 72 + 60, 0x2A0 + 144, 0x49F):
            report = bytearray(amd.report())
            report[at] = 1
            with pytest.raises(EvidenceError, match="altered"):
                judge(bytes(report))

    def test_revocation(self, amd: Amd, judge: Callable[..., Claims]) -> None:
        """A revoked issuer or chip, an expired list, a list of somebody else's: each its own reason."""
        report = amd.report()
        for crl, reason in (
            (amd.crl(amd.mid), "is revoked"),
            (amd.crl(amd.vcek), "is revoked"),
            (amd.crl(days=-1), "has expired"),
            (amd.crl(key=amd.mid_key), "not AMD's"),
            (b"no list", "not AMD's"),
        ):
            with pytest.raises(EvidenceError, match=reason):
                judge(report, crls=(crl,))
        assert judge(report).revocation == "absent"

    def test_expired_certificates_are_refused(self, amd: Amd, judge: Callable[..., Claims]) -> None:
        """And those not yet valid."""
        for days in (31, -31):
            with pytest.raises(EvidenceError, match="expired or is not yet valid"):
                judge(amd.report(), now=JUNE + timedelta(days=days))

    def test_a_chip_cannot_issue_certificates(
        self, judge: Callable[..., Claims], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An issuer that does not say it is an authority is none, whatever its own issuer."""
        lame = pinned(Amd(authority=False), monkeypatch)
        endorsements = Endorsements(lame.vcek.public_bytes(Encoding.DER), lame.chain)
        with pytest.raises(EvidenceError, match="may not issue"):
            Verifier().verify(Evidence(SNP, lame.report(), NOBODY), endorsements, JUNE)

    def test_a_root_that_is_not_pinned_is_refused(self, amd: Amd) -> None:
        """A perfect chain to a root of one's own making."""
        endorsements = Endorsements(amd.vcek.public_bytes(Encoding.DER), amd.chain)
        with pytest.raises(EvidenceError, match="no known vendor"):
            Verifier().verify(Evidence(SNP, amd.report(), NOBODY), endorsements, JUNE)

    def test_all_is_affirmed_when_all_is_well(self, amd: Amd, judge: Callable[..., Claims]) -> None:
        """The whole path: report, chain, list, binding, measurement, to affirming."""
        binding = Binding(
            nonce=bytes(32),
            sealing_key=str(PrivateKey.create("x25519").public),
            signing_key=str(PrivateKey.create().public),
            policy_hash=bytes(32),
            checkpoint_hash=bytes(32),
        )
        body = bytearray(amd.report()[:0x2A0])
        body[0x50:0x90] = binding.report_data()
        r, s = decode_dss_signature(amd.chip_key.sign(bytes(body), ec.ECDSA(hashes.SHA384())))
        report = bytes(body) + b"".join(n.to_bytes(72, "little") for n in (r, s)) + bytes(368)
        claims = judge(report, crls=(amd.crl(),))
        policy = AppraisalPolicy(frozenset({claims.measurement}), minimum_tcb={"snp": 4})
        build = Build(version="1", measurements=[claims.measurement])
        assert appraise(claims, binding, policy, build=build, nonce=bytes(32)).status == "affirming"
        without = judge(report)
        verdict = appraise(without, binding, policy, build=build, nonce=bytes(32))
        assert verdict.status == "contraindicated"
        assert verdict.reasons == ("No revocation list was given, so the chip's certificate may be revoked.",)


def test_mutant_without_the_signature_check_a_flip_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is what refuses a changed measurement."""
    parts = read("snp")
    changed = bytearray(parts["payload"])
    changed[0x90] ^= 1
    monkeypatch.setattr(sev_snp, "signed", lambda certificate, signature, message: True)
    assert verify("snp", {**parts, "payload": bytes(changed)}).measurement.startswith("sha384:7b")
