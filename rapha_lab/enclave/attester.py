"""Gets evidence of this machine's enclave, from hardware where there is some, and measures what runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import msgspec

import rapha_lab
from rapha_lab.protocol.errors import EvidenceError
from rapha_lab.protocol.evidence import BANNER, NITRO, SIMULATED, SNP, TDX, Binding, Evidence, simulation_key

__all__ = ["Attester", "NitroAttester", "SimulatedAttester", "TsmAttester", "attester", "measure"]

WINGS = ("protocol", "curator", "enclave", "session")
PINS = (
    "cryptography",
    "msgspec",
    "numpy",
    "opacus",
    "opendp",
    "polars",
    "safetensors",
    "starlette",
    "torch",
    "uvicorn",
)

TSM = Path("/sys/kernel/config/tsm/report")
NSM = Path("/dev/nsm")
_PROVIDERS = {"sev_guest": SNP, "tdx_guest": TDX}


class Attester(Protocol):
    """Produces evidence bound to 64 bytes."""

    def evidence(self, binding: Binding, claims: dict[str, Any] | None = None) -> Evidence:
        """Fresh evidence over `binding.report_data()`."""
        ...


def attester() -> Attester:
    """The attester of this machine: SEV-SNP or TDX, else Nitro, else the simulated one."""
    if TSM.is_dir():
        return TsmAttester()
    return NitroAttester() if NSM.exists() else SimulatedAttester(measure())


class SimulatedAttester:
    """Evidence without hardware, for demonstrations and tests: it says so, and its key is everybody's."""

    def __init__(self, measurement: str) -> None:
        self._measurement = measurement

    def evidence(self, binding: Binding, claims: dict[str, Any] | None = None) -> Evidence:
        """Claims signed by the simulation key; `claims` are further facts, such as the sandbox's tier."""
        said = {
            "banner": BANNER,
            "measurement": self._measurement,
            "report_data": binding.report_data(),
            "issued_at": time.time(),
            "extra": claims or {},
        }
        text = msgspec.json.encode(said)
        signature = simulation_key().sign(SIMULATED.encode() + b"\0" + text)
        return Evidence(SIMULATED, signature + text, binding)


class TsmAttester:
    """SEV-SNP and TDX through configfs-tsm (Linux 6.7, Documentation/ABI/testing/configfs-tsm-report)."""

    def __init__(self, root: Path = TSM) -> None:
        self._root = root

    def evidence(self, binding: Binding, claims: dict[str, Any] | None = None) -> Evidence:
        """The hardware's report or quote."""
        entry = self._root / f"rapha-{os.getpid()}-{os.urandom(8).hex()}"
        entry.mkdir()
        try:
            (entry / "inblob").write_bytes(binding.report_data())
            report = (entry / "outblob").read_bytes()
            provider, generation = _text(entry / "provider"), _text(entry / "generation")
        finally:
            entry.rmdir()
        if provider not in _PROVIDERS:
            raise EvidenceError(
                "This machine's TEE is unknown.", f"configfs-tsm names it {provider!r}.", "See docs."
            )
        if generation != "1":
            raise EvidenceError(
                "Another process wrote to the report.", "Its generation is not 1.", "Try again."
            )
        return Evidence(_PROVIDERS[provider], report, binding)


class NitroAttester:
    """AWS Nitro Enclaves through /dev/nsm (aws-nitro-enclaves-nsm-api, one ioctl with CBOR both ways)."""

    _IOCTL = 0xC0200A00  # _IOWR(0x0A, 0, struct nsm_message), 32 bytes
    _LIMIT = 0x3000

    def evidence(self, binding: Binding, claims: dict[str, Any] | None = None) -> Evidence:
        """The COSE_Sign1 document with the binding as its user_data."""
        import fcntl

        import cbor2

        asked = cbor2.dumps(
            {"Attestation": {"user_data": binding.report_data(), "nonce": None, "public_key": None}}
        )
        request, answer = (
            ctypes.create_string_buffer(asked, len(asked)),
            ctypes.create_string_buffer(self._LIMIT),
        )
        message = (ctypes.c_uint64 * 4)(
            ctypes.addressof(request), len(asked), ctypes.addressof(answer), self._LIMIT
        )
        with NSM.open("rb+", buffering=0) as device:
            fcntl.ioctl(device, self._IOCTL, message)
        reply = cbor2.loads(answer.raw[: message[3]])
        if "Attestation" not in reply:
            raise EvidenceError("The Nitro module gave no document.", str(reply)[:100], "Check the enclave.")
        return Evidence(NITRO, reply["Attestation"]["document"], binding)


def measure(root: Path | None = None) -> str:
    """What a simulated enclave of this release measures to, as "sha256:..." hex.

    SHA-256 over the sources of the wings that run in it, by path, and the versions of the packages they stand
    on: the same sources and pins give the same value anywhere. Real TEEs measure the whole image, see
    deploy/.
    """
    root = root or Path(rapha_lab.__file__).parent
    digest = hashlib.sha256(b"rapha-lab/measurement/v1\n")
    for path in sorted(p.relative_to(root).as_posix() for wing in WINGS for p in (root / wing).rglob("*.py")):
        digest.update(f"{path} {hashlib.sha256((root / path).read_bytes()).hexdigest()}\n".encode())
    for package in PINS:
        version = metadata.version(package).partition("+")[0]  # "+cpu" names a build of the same release
        digest.update(f"{package}=={version}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _text(path: Path) -> str:
    return path.read_text().strip()
