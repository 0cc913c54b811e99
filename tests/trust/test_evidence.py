"""The binding, the attesters, and the appraisal of a simulated enclave."""

from __future__ import annotations

import ast
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import venv
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest

import rapha_lab
from rapha_lab.client.appraisal import AppraisalPolicy, Verdict, Verifier, appraise
from rapha_lab.enclave import attester as attesters
from rapha_lab.enclave.attester import SimulatedAttester, TsmAttester, measure
from rapha_lab.protocol.builds import Build
from rapha_lab.protocol.errors import EvidenceError
from rapha_lab.protocol.evidence import (
    BANNER,
    NITRO,
    SIMULATED,
    SNP,
    TDX,
    Binding,
    Claims,
    Evidence,
    simulation_key,
)
from rapha_lab.protocol.keys import PrivateKey, PublicKey

MEASUREMENT = "sha256:" + "ab" * 32
BUILD = Build(version="1", measurements=[MEASUREMENT])
SIMULATED_OK = AppraisalPolicy(allow_simulated=True)


def replaced(value: Any, **fields: Any) -> Any:
    """A copy of a struct with other fields."""
    return msgspec.structs.replace(value, **fields)


def real(binding: Binding, **fields: Any) -> Claims:
    """Claims as a verifier of real hardware makes them when all is well."""
    good: dict[str, Any] = {
        "tee": "sev-snp",
        "measurements": {"launch": MEASUREMENT},
        "report_data": binding.report_data(),
        "tcb": {"snp": 8},
        "revocation": "checked",
    }
    return Claims(**{**good, **fields})


class TestBinding:
    def test_report_data_is_the_documented_hash(self, binding: Binding) -> None:
        """SHA-512 over length-prefixed fields, in the order of the documentation."""
        keys = [PublicKey.parse(text).raw for text in (binding.sealing_key, binding.signing_key)]
        parts = [binding.nonce, b"x-wing", b"".join(keys), bytes(32), b"p" * 32, b"c" * 32]
        framed = b"".join(struct.pack(">I", len(part)) + part for part in parts)
        assert binding.report_data() == hashlib.sha512(b"rapha-lab/attestation-binding/v1" + framed).digest()

    def test_every_field_counts(self, binding: Binding) -> None:
        """No two bindings that differ in one field have the same report data."""
        others = {
            "nonce": b"n" * 32,
            "policy_hash": b"q" * 32,
            "checkpoint_hash": b"d" * 32,
            "tls_key_hash": b"t" * 32,
            "sealing_key": str(PrivateKey.create("x-wing").public),
            "signing_key": str(PrivateKey.create().public),
        }
        assert set(others) == set(Binding.__struct_fields__)
        data = {replaced(binding, **{name: value}).report_data() for name, value in others.items()}
        assert len(data | {binding.report_data()}) == len(others) + 1

    @pytest.mark.parametrize(
        "wrong",
        [{"nonce": b"short"}, {"policy_hash": b""}, {"sealing_key": "x-wing:AAAA"}, {"signing_key": ""}],
    )
    def test_malformed_bindings_are_refused(self, binding: Binding, wrong: dict[str, Any]) -> None:
        """Short nonces and keys that are none."""
        with pytest.raises(EvidenceError):
            replaced(binding, **wrong).report_data()

    def test_keys_cannot_change_places(self, binding: Binding) -> None:
        """A signing key does not seal, and a sealing key does not sign."""
        with pytest.raises(EvidenceError):
            replaced(binding, sealing_key=binding.signing_key).report_data()
        with pytest.raises(EvidenceError):
            replaced(binding, signing_key=binding.sealing_key).report_data()

    def test_identity_outlives_nonce_and_log_but_not_keys_or_policy(self, binding: Binding) -> None:
        """What requests name: the same enclave under the same policy."""
        assert replaced(binding, nonce=b"n" * 32, checkpoint_hash=b"d" * 32).identity() == binding.identity()
        assert replaced(binding, policy_hash=b"q" * 32).identity() != binding.identity()
        other = str(PrivateKey.create().public)
        assert replaced(binding, signing_key=other).identity() != binding.identity()

    def test_evidence_survives_the_wire(self, binding: Binding) -> None:
        """As JSON, and nothing else is taken for evidence."""
        evidence = SimulatedAttester(MEASUREMENT).evidence(binding)
        assert Evidence.decode(evidence.encode()) == evidence
        for data in (b"", b"[]", b'{"media_type":1}', b"\xff", evidence.encode()[:-1], b"[" * 5000):
            with pytest.raises(EvidenceError):
                Evidence.decode(data)


class TestSimulated:
    def test_its_best_verdict_is_a_warning(self, binding: Binding) -> None:
        """With the banner as its first reason; never affirming, whatever is known of it."""
        known = AppraisalPolicy(frozenset({MEASUREMENT}), allow_simulated=True)
        verdict = self.judge(binding, known)
        assert verdict.status == "warning"
        assert verdict.reasons == (BANNER,)
        assert verdict.require() is verdict

    def test_without_consent_it_is_contraindicated(self, binding: Binding) -> None:
        """And the reason says how to consent."""
        verdict = self.judge(binding, AppraisalPolicy())
        assert verdict.status == "contraindicated"
        with pytest.raises(EvidenceError, match="allow_simulated"):
            verdict.require()

    def test_its_claims_say_what_it_is(self, binding: Binding) -> None:
        """Simulated, in debug mode, with the facts that were passed along."""
        evidence = SimulatedAttester(MEASUREMENT).evidence(binding, {"sandbox": "S2"})
        claims = Verifier().verify(evidence)
        assert (claims.tee, claims.simulated, claims.debug) == ("simulated", True, True)
        assert (claims.measurement, claims.extra) == (MEASUREMENT, {"sandbox": "S2"})

    def test_it_never_verifies_as_real(self, binding: Binding) -> None:
        """Under any other media type it is malformed."""
        evidence = SimulatedAttester(MEASUREMENT).evidence(binding)
        for media_type in (SNP, TDX, "application/json", ""):
            with pytest.raises(EvidenceError):
                Verifier().verify(replaced(evidence, media_type=media_type))

    def test_the_banner_cannot_be_left_out(self, binding: Binding) -> None:
        """Not even by someone who signs with the public simulation key."""
        evidence = SimulatedAttester(MEASUREMENT).evidence(binding)
        said = {**json.loads(evidence.payload[64:]), "banner": "genuine hardware"}
        text = json.dumps(said, separators=(",", ":")).encode()
        forged = simulation_key().sign(SIMULATED.encode() + b"\0" + text) + text
        with pytest.raises(EvidenceError, match="hides"):
            Verifier().verify(replaced(evidence, payload=forged))

    def test_every_flipped_bit_is_refused(self, binding: Binding) -> None:
        """All bits of the payload."""
        evidence = SimulatedAttester(MEASUREMENT).evidence(binding)
        for bit in range(len(evidence.payload) * 8):
            flipped = bytearray(evidence.payload)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(EvidenceError):
                Verifier().verify(replaced(evidence, payload=bytes(flipped)))

    def test_a_measurement_that_is_not_expected_is_refused(self, binding: Binding) -> None:
        """Where a client says which releases it knows, the simulation is held to it too."""
        other = AppraisalPolicy(frozenset({"sha256:" + "cd" * 32}), allow_simulated=True)
        assert self.judge(binding, other).status == "contraindicated"

    @staticmethod
    def judge(binding: Binding, policy: AppraisalPolicy) -> Verdict:
        """The verdict on a simulated enclave's evidence."""
        claims = Verifier().verify(SimulatedAttester(MEASUREMENT).evidence(binding))
        return appraise(claims, binding, policy, build=BUILD, nonce=binding.nonce)


class TestAppraisal:
    POLICY = AppraisalPolicy(frozenset({MEASUREMENT}), minimum_tcb={"snp": 8})

    def test_good_hardware_is_affirmed(self, binding: Binding) -> None:
        """Known measurement, current firmware, no debugging, revocation checked, bound to the offer."""
        bound = {"nonce": binding.nonce, "policy_hash": b"p" * 32}
        verdict = appraise(real(binding), binding, self.POLICY, build=BUILD, **bound)
        assert (verdict.status, verdict.reasons) == ("affirming", ())

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"debug": True}, "debug mode"),
            ({"measurements": {"launch": "sha384:00"}}, "log has no release that measures sha384:00"),
            ({"measurements": {}}, "log has no release"),
            ({"tcb": {"snp": 7}}, "TCB is too old: snp 7"),
            ({"tcb": {}}, "TCB is too old"),
            ({"tcb_status": "OutOfDate"}, "TCB is OutOfDate"),
            ({"tcb_status": "Revoked"}, "TCB is Revoked"),
            ({"revocation": "absent"}, "No revocation list"),
            ({"report_data": bytes(64)}, "keys offered"),
            ({"report_data": b""}, "keys offered"),
            ({"simulated": True}, "SIMULATED"),
        ],
    )
    def test_each_fault_is_contraindicated_with_its_reason(
        self, binding: Binding, fields: dict[str, Any], reason: str
    ) -> None:
        """One fault at a time, and the reason names that one alone."""
        verdict = appraise(real(binding, **fields), binding, self.POLICY, build=BUILD, nonce=binding.nonce)
        assert verdict.status == "contraindicated"
        (said,) = verdict.reasons
        assert reason in said

    def test_a_swapped_key_is_refused(self, binding: Binding) -> None:
        """A man in the middle offers his own sealing key beside honest evidence."""
        swapped = replaced(binding, sealing_key=str(PrivateKey.create("x-wing").public))
        verdict = appraise(real(binding), swapped, self.POLICY, build=BUILD, nonce=binding.nonce)
        assert verdict.reasons == ("The keys offered are not those that the evidence is bound to.",)

    def test_a_stale_nonce_is_refused(self, binding: Binding) -> None:
        """Yesterday's evidence, honestly bound to yesterday's nonce."""
        verdict = appraise(real(binding), binding, self.POLICY, build=BUILD, nonce=b"today" + bytes(27))
        assert verdict.status == "contraindicated"
        assert "stale" in verdict.reasons[0]

    def test_another_policy_than_the_one_read_is_refused(self, binding: Binding) -> None:
        """The researcher trusts what the custodians signed, not what the site says it is."""
        verdict = appraise(real(binding), binding, self.POLICY, build=BUILD, policy_hash=b"q" * 32)
        assert "another policy" in verdict.reasons[0]

    def test_a_patch_that_is_due_is_a_warning(self, binding: Binding) -> None:
        """Where the vendor says that software can make up for it."""
        claims = real(binding, tcb_status="SWHardeningNeeded", advisories=("INTEL-SA-00615",))
        verdict = appraise(claims, binding, self.POLICY, build=BUILD)
        assert verdict.status == "warning"
        assert "INTEL-SA-00615" in verdict.reasons[0]

    def test_a_measurement_that_is_not_in_the_log_is_refused(self, binding: Binding) -> None:
        """Even one that the client names: what others cannot see in the log may have been made for this one."""
        for build in (None, Build(version="1", measurements=["sha256:" + "cd" * 32])):
            verdict = appraise(real(binding), binding, self.POLICY, build=build)
            assert verdict.status == "contraindicated"
            assert "The site's log has no release that measures" in verdict.reasons[0]

    def test_a_pinned_release_key_makes_a_logged_build_known(self, binding: Binding) -> None:
        """A build that it signed; not one that nobody, or another key, signed, nor one that was changed after."""
        key, other = PrivateKey.create(), PrivateKey.create()
        policy = AppraisalPolicy(signers=frozenset({str(key.public)}), minimum_tcb={"snp": 8})
        good = Build.sign("1", [MEASUREMENT], key)
        for build, status in (
            (good, "affirming"),
            (BUILD, "contraindicated"),
            (Build.sign("1", [MEASUREMENT], other), "contraindicated"),
            (replaced(good, version="2"), "contraindicated"),
            (
                replaced(Build.sign("1", ["sha256:" + "cd" * 32], key), measurements=[MEASUREMENT]),
                "contraindicated",
            ),
            (replaced(Build.sign("1", [MEASUREMENT], other), signer=str(key.public)), "contraindicated"),
        ):
            assert appraise(real(binding), binding, policy, build=build).status == status

    def test_a_site_cannot_vouch_for_its_own_build(self, binding: Binding) -> None:
        """It may log what it likes, with its own signature: neither makes the client know it."""
        build = Build.sign("1", [MEASUREMENT], PrivateKey.create())
        verdict = appraise(real(binding), binding, AppraisalPolicy(minimum_tcb={"snp": 8}), build=build)
        assert "No known release" in verdict.reasons[0]

    def test_by_default_no_release_is_known(self, binding: Binding) -> None:
        """A client that says nothing trusts nothing."""
        assert appraise(real(binding), binding, build=BUILD).status == "contraindicated"

    def test_firmware_that_nobody_judged_is_a_warning(self, binding: Binding) -> None:
        """AMD does not say which is current, so a client without a minimum is told that nobody looked."""
        claims = real(binding, tcb_status="not stated")
        verdict = appraise(claims, binding, AppraisalPolicy(frozenset({MEASUREMENT})), build=BUILD)
        assert verdict.status == "warning"
        assert "set a minimum" in verdict.reasons[0]
        assert appraise(claims, binding, self.POLICY, build=BUILD).status == "affirming"

    def test_a_gpu_alone_is_refused(self, binding: Binding) -> None:
        """Anybody with such a GPU gets its signature over any nonce, so also over one bound to their own keys."""
        gpu = self.gpu(binding)
        verdict = appraise(gpu, binding, AppraisalPolicy(allow_simulated=True), build=BUILD)
        assert verdict.status == "contraindicated"
        assert "only beside that of its processor" in verdict.reasons[-1]
        beside = appraise(
            gpu, binding, AppraisalPolicy(), beside=verdict
        )  # one GPU does not vouch for another
        assert beside.status == "contraindicated"

    def test_a_gpu_is_bound_by_half_the_report_data_of_its_processor(self, binding: Binding) -> None:
        """Its nonce has 32 bytes, its measurements are not compared, and the verdict says so."""
        processor = appraise(real(binding), binding, self.POLICY, build=BUILD)
        verdict = appraise(self.gpu(binding), binding, self.POLICY, beside=processor)
        assert (verdict.status, verdict.reasons) == ("warning", ("Not compared.",))
        other = replaced(binding, nonce=b"o" * 32)
        stranger = appraise(real(other), other, self.POLICY, build=BUILD)
        assert appraise(self.gpu(binding), binding, self.POLICY, beside=stranger).status == "contraindicated"

    def test_a_gpu_is_no_better_than_its_processor(self, binding: Binding) -> None:
        """Beside a simulated or a debug processor it is judged like it."""
        for fields in ({"simulated": True}, {"debug": True}):
            processor = appraise(real(binding, **fields), binding, self.POLICY, build=BUILD)
            verdict = appraise(self.gpu(binding), binding, self.POLICY, beside=processor)
            assert verdict.status == "contraindicated"

    @staticmethod
    def gpu(binding: Binding) -> Claims:
        """Claims of a GPU as its verifier makes them."""
        told = {"tee": "nvidia", "report_data": binding.report_data()[:32], "revocation": "none"}
        return real(binding, **told, caveats=("Not compared.",), tcb={}, measurements={})

    def test_evidence_that_makes_a_verifier_stumble_is_refused(
        self, binding: Binding, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever a parser raises, the verdict is no."""
        from rapha_lab.client.verifiers import simulated

        def stumble(*args: Any) -> Claims:
            raise RecursionError

        monkeypatch.setattr(simulated, "verify", stumble)
        with pytest.raises(EvidenceError, match="malformed"):
            Verifier().verify(SimulatedAttester(MEASUREMENT).evidence(binding))


class TestAttesters:
    def test_tsm_writes_the_report_data_and_reads_the_report(self, binding: Binding, tmp_path: Path) -> None:
        """On a folder that behaves as configfs-tsm does."""
        for provider, media_type in (("sev_guest", SNP), ("tdx_guest", TDX)):
            evidence = TsmAttester(_Configfs(tmp_path, provider)).evidence(binding)  # type: ignore[arg-type]
            assert (evidence.media_type, evidence.payload) == (
                media_type,
                b"report over " + binding.report_data(),
            )

    def test_tsm_refuses_an_unknown_tee(self, binding: Binding, tmp_path: Path) -> None:
        """Rather than send what nobody can verify."""
        with pytest.raises(EvidenceError, match="arm_cca"):
            TsmAttester(_Configfs(tmp_path, "arm_cca")).evidence(binding)  # type: ignore[arg-type]

    def test_tsm_refuses_a_report_that_another_process_wrote_to(
        self, binding: Binding, tmp_path: Path
    ) -> None:
        """Its generation says so."""
        with pytest.raises(EvidenceError, match="generation is not 1"):
            TsmAttester(_Configfs(tmp_path, "sev_guest", "2")).evidence(binding)  # type: ignore[arg-type]

    def test_tsm_without_a_tee_behind_it_says_so(self, binding: Binding, tmp_path: Path) -> None:
        """The module is loaded and the kernel refuses an entry, as it does where no TEE registered."""
        with pytest.raises(EvidenceError, match="The hardware gave no evidence"):
            TsmAttester(tmp_path / "no" / "such").evidence(binding)

    def test_tsm_knows_its_own_measurement(self, tmp_path: Path) -> None:
        """As its clients will read it: the launch digest of a SEV-SNP report."""
        report = bytes(0x90) + b"m" * 48 + bytes(0x4A0 - 0xC0)
        root = _Configfs(tmp_path, "sev_guest", report=report)
        assert TsmAttester(root).measurement == f"sha384:{(b'm' * 48).hex()}"  # type: ignore[arg-type]
        with pytest.raises(EvidenceError, match="holds no measurement"):
            TsmAttester(_Configfs(tmp_path, "sev_guest", report=b"short")).measurement  # type: ignore[arg-type]  # noqa: B018

    def test_nitro_asks_the_module_for_a_document(
        self, binding: Binding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One ioctl with a request and room for an answer, as the driver's header lays them out."""
        cbor2 = pytest.importorskip("cbor2")
        document = cbor2.dumps([b"", {}, cbor2.dumps({"pcrs": {0: b"m" * 48}, "pad": bytes(600)}), b""])
        answers = [{"Attestation": {"document": document}}]
        asked = _nsm(monkeypatch, tmp_path, cbor2, answers)
        evidence = attesters.NitroAttester().evidence(binding)
        assert (evidence.media_type, evidence.payload) == (NITRO, document)
        assert asked == [
            {"Attestation": {"user_data": binding.report_data(), "nonce": None, "public_key": None}}
        ]
        assert attesters.NitroAttester().measurement == f"sha384:{(b'm' * 48).hex()}"
        answers[0] = {"Error": "InvalidOperation"}
        with pytest.raises(EvidenceError, match="gave no document"):
            attesters.NitroAttester().evidence(binding)

    def test_without_hardware_the_attester_is_simulated(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """And with it, it is not."""
        monkeypatch.setattr(attesters, "TSM", tmp_path / "none")
        monkeypatch.setattr(attesters, "NSM", tmp_path / "none")
        assert isinstance(attesters.attester(), SimulatedAttester)
        monkeypatch.setattr(attesters, "NSM", tmp_path)
        assert isinstance(attesters.attester(), attesters.NitroAttester)
        monkeypatch.setattr(attesters, "TSM", tmp_path)
        assert isinstance(attesters.attester(), TsmAttester)

    def test_measuring_again_gives_the_same(self, tmp_path: Path) -> None:
        """In another process, and for a copy in another folder written in another order."""
        root = Path(rapha_lab.__file__).parent
        for wing in reversed(attesters.WINGS):
            shutil.copytree(root / wing, tmp_path / wing, ignore=shutil.ignore_patterns("__pycache__"))
        code = "from rapha_lab.enclave.attester import measure; print(measure())"
        elsewhere = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root.parent
        )
        assert measure() == measure(tmp_path) == elsewhere.stdout.strip()

    def test_two_environments_in_two_folders_measure_the_same(self, tmp_path: Path) -> None:
        """Two virtual environments with the same pins, two copies of the sources, other names and times."""
        packages, code = (
            Path(rapha_lab.__file__).parent,
            "from rapha_lab.enclave.attester import measure; print(measure())",
        )
        pins = Path(msgspec.__file__).parents[1]
        found = set()
        for name in ("a", "a/longer name"):
            where = tmp_path / name
            venv.create(where / "env", with_pip=False)
            ignored = shutil.ignore_patterns("__pycache__", "labextension", "data")
            shutil.copytree(packages, where / "src" / "rapha_lab", ignore=ignored)
            for path in (where / "src").rglob("*.py"):
                os.utime(path, (0, 0))
            (site,) = (where / "env" / "lib").glob("python*/site-packages")
            (site / "paths.pth").write_text(f"{where / 'src'}\n{pins}\n")
            python = where / "env" / "bin" / "python"
            done = subprocess.run(
                [python, "-I", "-c", code], capture_output=True, text=True, check=True, cwd="/"
            )
            found.add(done.stdout.strip())
        assert found == {measure()}

    def test_every_package_that_the_wings_import_counts(self) -> None:
        """By its version: what is imported in them is in the list, under the name it is installed by."""
        distributions = metadata.packages_distributions()
        imported = set()
        for path in (
            p for wing in attesters.WINGS for p in (Path(rapha_lab.__file__).parent / wing).rglob("*.py")
        ):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                imported |= {name.partition(".")[0] for name in names}
        outside = imported - set(sys.stdlib_module_names) - {"rapha_lab"}
        pinned = {name.lower() for name in attesters.PINS}
        assert {
            name for name in outside if not {d.lower() for d in distributions.get(name, [name])} & pinned
        } == set()

    def test_every_source_counts(self, tmp_path: Path) -> None:
        """A changed byte, a new file, a renamed file: another measurement each."""
        for wing in attesters.WINGS:
            (tmp_path / wing).mkdir()
        source = tmp_path / "curator" / "desk.py"
        seen = {measure(tmp_path)}
        for change in (
            lambda: source.write_text("1"),
            lambda: source.write_text("2"),
            lambda: source.rename(source.with_name("dusk.py")),
            lambda: (tmp_path / "session" / "new.py").write_text(""),
        ):
            change()
            seen.add(measure(tmp_path))
        assert len(seen) == 5


def _nsm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cbor2: Any, answers: list[Any]) -> list[Any]:
    """A file in the module's place and an ioctl that answers as the driver does; gives what it is asked."""
    asked: list[Any] = []

    def ioctl(device: Any, number: int, message: Any) -> int:
        assert number == 0xC0200A00  # _IOWR(0x0A, 0, 32 bytes)
        request, size, room, limit = message
        asked.append(cbor2.loads(ctypes.string_at(request, size)))
        answer = cbor2.dumps(answers[0])
        assert len(answer) <= limit
        ctypes.memmove(room, answer, len(answer))
        message[3] = len(answer)
        return 0

    (tmp_path / "nsm").touch()
    monkeypatch.setattr(attesters, "NSM", tmp_path / "nsm")
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return asked


class _Configfs:
    """A folder whose entries answer as the kernel's do."""

    def __init__(self, path: Path, provider: str, generation: str = "1", report: bytes | None = None) -> None:
        self._path, self._told = path, {"provider": provider, "generation": generation}
        self._report = report

    def __truediv__(self, name: str) -> _Entry:
        return _Entry(self._path / name, self._told, self._report)


class _Entry:
    def __init__(self, path: Path, told: dict[str, str], report: bytes | None) -> None:
        self._path, self._told, self._report = path, told, report
        self._data = b""

    def mkdir(self) -> None:
        self._path.mkdir()

    def rmdir(self) -> None:
        self._path.rmdir()

    def __truediv__(self, name: str) -> _File:
        return _File(self, name)


class _File:
    def __init__(self, entry: _Entry, name: str) -> None:
        self._entry, self._name = entry, name

    def write_bytes(self, data: bytes) -> None:
        assert (self._name, len(data)) == ("inblob", 64)
        self._entry._data = data

    def read_bytes(self) -> bytes:
        assert self._name == "outblob"
        return self._entry._report if self._entry._report is not None else b"report over " + self._entry._data

    def read_text(self) -> str:
        return self._entry._told[self._name] + "\n"


def test_a_verifier_needs_no_clock_of_the_machine(binding: Binding) -> None:
    """The time is an argument, so that old evidence can be judged as of its day."""
    evidence = SimulatedAttester(MEASUREMENT).evidence(binding)
    assert Verifier().verify(evidence, now=datetime(2020, 1, 1, tzinfo=UTC)).simulated
