"""The attestation of a kept model, appraised again: with recordings of real hardware, and with a made-up AMD that binds us."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from test_vectors import CASES, JUNE, Amd, pinned, read
from trust_material import fixed, page

from rapha_lab.client import attestation
from rapha_lab.client.attestation import Attestation, reappraise
from rapha_lab.protocol.builds import KIND, Build
from rapha_lab.protocol.checkpoint import Checkpoint, Inclusion, leaf_hash, sign_checkpoint
from rapha_lab.protocol.errors import EvidenceError
from rapha_lab.protocol.evidence import SNP, TDX, Binding, Endorsements, Evidence
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import Policy
from rapha_lab.protocol.release import Release

SITE = fixed(5)
ZEROS = "sha384:" + "00" * 48


def logged(measurement: str, key: PrivateKey = SITE) -> Inclusion:
    """A log of one entry: the build."""
    build = Build(version="1", measurements=[measurement])
    entry = msgspec.json.encode({"kind": KIND} | msgspec.to_builtins(build), order="sorted")
    note = sign_checkpoint(Checkpoint("log", 1, leaf_hash(entry)), key.parts[0])
    return Inclusion(0, entry, [], note)


def bound(measurement: str, policy: Policy, key: PrivateKey = SITE) -> tuple[Binding, Inclusion]:
    """What honest evidence of that build would be bound to."""
    build = logged(measurement, key)
    return Binding(
        nonce=bytes(range(32)),
        sealing_key=str(fixed_sealing().public),
        signing_key=str(key.public),
        policy_hash=policy.hash,
        checkpoint_hash=hashlib.sha256(build.checkpoint.encode()).digest(),
    ), build


def fixed_sealing() -> PrivateKey:
    """A sealing key for a test."""
    return PrivateKey.create("x25519")


@pytest.fixture
def policy() -> Policy:
    """A page that admits the measurement of zeros."""
    return Policy.parse(page())


@pytest.fixture
def training() -> Release:
    """A training whose receipt the site signed."""
    return Release(
        job="j", op="fit", dataset="flchain", split="train", site="s", epsilon=1.0, delta=1e-6,
        receipt={"index": 0, "checkpoint": logged(ZEROS).checkpoint},
    )  # fmt: skip


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> Amd:
    """A made-up AMD whose root is pinned for one test."""
    return pinned(Amd(), monkeypatch)


def real(
    amd: Amd, policy: Policy, measurement: str = ZEROS, *, days: int = 30, bits: int = 0x30000
) -> Attestation:
    """Evidence of a Turin that is bound to the page and the site's key, as a client appraised it in June."""
    binding, build = bound(measurement, policy)
    body = bytearray(amd.report(policy=bits)[:0x2A0])
    body[0x50:0x90] = binding.report_data()
    r, s = decode_dss_signature(amd.chip_key.sign(bytes(body), ec.ECDSA(hashes.SHA384())))
    payload = bytes(body) + b"".join(n.to_bytes(72, "little") for n in (r, s)) + bytes(368)
    endorsed = Endorsements(amd.vcek.public_bytes(Encoding.DER), amd.chain, (amd.crl(days=days),))
    return Attestation(Evidence(SNP, payload, binding, build, endorsed), JUNE.timestamp(), {"snp": 4})


class TestMadeUpHardware:
    def test_good_evidence_is_affirmed_then_and_now(
        self, amd: Amd, policy: Policy, training: Release
    ) -> None:
        """Out of the evidence alone: the file says no status, no measurement and no key."""
        told = reappraise(real(amd, policy), training, policy, now=JUNE + timedelta(days=9))
        assert (told["at training"]["status"], told["now"]["status"]) == ("affirming", "affirming")
        assert (told["tee"], told["simulated"], told["warning"]) == ("sev-snp", False, "")
        assert (told["measurement"], told["site key"]) == (ZEROS, str(SITE.public))
        assert told["nonce"] == bytes(range(32)).hex()

    def test_it_survives_the_file(self, amd: Amd, policy: Policy, training: Release) -> None:
        """As JSON, with endorsements and nonce."""
        kept = real(amd, policy)
        told = msgspec.json.decode(msgspec.json.encode({"attestation": kept}))
        assert Attestation.of(told) == kept

    def test_what_expired_since_is_said_and_newer_endorsements_mend_it(
        self, amd: Amd, policy: Policy, training: Release
    ) -> None:
        """It stays good as of then; a revocation since shows with the newer list."""
        kept, later = real(amd, policy, days=5), JUNE + timedelta(days=9)
        told = reappraise(kept, training, policy, now=later)
        assert told["at training"]["status"] == "affirming"
        assert told["now"]["status"] == "contraindicated"
        assert "list has expired" in told["now"]["reasons"][0]
        leaf = amd.vcek.public_bytes(Encoding.DER)
        newer = Endorsements(leaf, amd.chain, (amd.crl(),))
        mended = reappraise(kept, training, policy, now=later, endorsements=newer)
        assert mended["now"]["status"] == "affirming"
        revoked = Endorsements(leaf, amd.chain, (amd.crl(amd.vcek),))
        told = reappraise(kept, training, policy, now=later, endorsements=revoked)
        assert "is revoked" in told["now"]["reasons"][0]

    def test_firmware_that_is_too_old_by_now_is_said(
        self, amd: Amd, policy: Policy, training: Release
    ) -> None:
        """By the checker's minimum, not the researcher's."""
        told = reappraise(real(amd, policy), training, policy, now=JUNE, minimum_tcb={"snp": 5})
        assert told["at training"]["status"] == "affirming"
        assert "The TCB is too old: snp 4, 5 is needed." in told["now"]["reasons"]

    def test_each_fault_is_refused_by_name(self, amd: Amd, policy: Policy, training: Release) -> None:
        """Debugging, a build that the page does not admit, a time at which its certificates held not."""
        good = real(amd, policy)
        debug = real(amd, policy, bits=0x30000 | 1 << 19)
        other = real(amd, policy, "sha384:" + "ab" * 48)
        early = msgspec.structs.replace(good, at=(JUNE - timedelta(days=40)).timestamp())
        for kept, reason in (
            (debug, "debug mode"),
            (other, "no release that measures"),
            (early, "not yet valid"),
        ):
            with pytest.raises(EvidenceError, match=reason):
                reappraise(kept, training, policy, now=JUNE)
        narrow = Policy.parse(page().replace('"any simulated", ', "").replace("0" * 96, "cd" * 48))
        with pytest.raises(EvidenceError, match="No known release measures"):
            reappraise(real(amd, narrow), training, narrow, now=JUNE)

    def test_evidence_of_another_site_is_refused(self, amd: Amd, policy: Policy, training: Release) -> None:
        """Honest hardware of somebody else, whose log did not sign the receipt."""
        receipt = training.receipt | {"checkpoint": logged(ZEROS, fixed(9)).checkpoint}
        theirs = msgspec.structs.replace(training, receipt=receipt)
        with pytest.raises(EvidenceError, match="another key than the one that signed"):
            reappraise(real(amd, policy), theirs, policy, now=JUNE)
        for nothing in ({}, {"checkpoint": 7}, {"checkpoint": ""}):
            bare = msgspec.structs.replace(training, receipt=nothing)
            with pytest.raises(EvidenceError, match="another key"):
                reappraise(real(amd, policy), bare, policy, now=JUNE)

    def test_mutant_without_the_binding_another_sites_evidence_passes(
        self, amd: Amd, policy: Policy, training: Release, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The check is what refuses it."""
        receipt = training.receipt | {"checkpoint": logged(ZEROS, fixed(9)).checkpoint}
        theirs = msgspec.structs.replace(training, receipt=receipt)
        monkeypatch.setattr(attestation, "_belongs", lambda *_: None)
        assert reappraise(real(amd, policy), theirs, policy, now=JUNE)["simulated"] is False


@pytest.mark.parametrize("tee", ["snp", "tdx", "nitro"])
class TestRecordings:
    def kept(self, tee: str, policy: Policy, **parts: bytes) -> Attestation:
        """A recording put in the place of a model's evidence, with its real endorsements."""
        found = read(tee) | parts
        binding, build = bound(ZEROS, policy)
        endorsed = Endorsements(**{name: data for name, data in found.items() if name != "payload"})
        evidence = Evidence(CASES[tee][0], found["payload"], binding, build, endorsed)
        return Attestation(evidence, JUNE.timestamp())

    def test_genuine_evidence_of_somebody_elses_machine_is_refused(
        self, tee: str, policy: Policy, training: Release
    ) -> None:
        """Its signature holds, and it is not bound to this model's site."""
        with pytest.raises(EvidenceError, match="not those that the evidence is bound to"):
            reappraise(self.kept(tee, policy), training, policy, now=JUNE)

    def test_with_a_bit_changed_it_is_refused_as_altered(
        self, tee: str, policy: Policy, training: Release
    ) -> None:
        """Before its binding is looked at."""
        payload = bytearray(read(tee)["payload"])
        payload[0x90] ^= 1
        with pytest.raises(EvidenceError, match=r"altered|does not hold|malformed") as caught:
            reappraise(self.kept(tee, policy, payload=bytes(payload)), training, policy, now=JUNE)
        assert "bound to" not in str(caught.value)


def test_a_recording_is_judged_at_the_time_of_the_training(policy: Policy, training: Release) -> None:
    """Intel's collateral of June 2025 held then; a file that says 2026 is refused for it."""
    late = datetime(2026, 6, 1, tzinfo=UTC)
    kept = TestRecordings().kept("tdx", policy)
    assert kept.evidence.media_type == TDX
    with pytest.raises(EvidenceError, match="expired"):
        reappraise(msgspec.structs.replace(kept, at=late.timestamp()), training, policy, now=late)
