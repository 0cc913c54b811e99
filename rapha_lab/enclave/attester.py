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

__all__ = [
    "Attester",
    "NitroAttester",
    "SimulatedAttester",
    "TsmAttester",
    "attester",
    "launch_measurement",
    "measure",
]

WINGS = ("protocol", "curator", "enclave", "session")
PINS = (
    "PyJWT",
    "anyio",
    "cbor2",
    "cryptography",
    "duckdb",
    "ipython",
    "landlockpy",
    "matplotlib",
    "msgspec",
    "numpy",
    "opacus",
    "opendp",
    "pillow",
    "polars",
    "pydicom",
    "pyseccomp",
    "rfc8785",
    "safetensors",
    "scipy",
    "starlette",
    "torch",
    "uvicorn",
)
"""Every package that the wings import; one that is not installed measures as absent."""

TSM = Path("/sys/kernel/config/tsm/report")
NSM = Path("/dev/nsm")
_PROVIDERS = {"sev_guest": SNP, "tdx_guest": TDX}


class Attester(Protocol):
    """Produces evidence bound to 64 bytes."""

    @property
    def measurement(self) -> str:
        """What this enclave measures to, as "sha256:" or "sha384:" hex."""
        ...

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
        self.measurement = measurement

    def evidence(self, binding: Binding, claims: dict[str, Any] | None = None) -> Evidence:
        """Claims signed by the simulation key; `claims` are further facts, such as the sandbox's tier."""
        said = {
            "banner": BANNER,
            "measurement": self.measurement,
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

    @property
    def measurement(self) -> str:
        """As the hardware's own report says it."""
        return launch_measurement(*self._report(bytes(64)))

    def evidence(self, binding: Binding, claims: dict[str, Any] | None = None) -> Evidence:
        """The hardware's report or quote."""
        return Evidence(*self._report(binding.report_data()), binding)

    def _report(self, data: bytes) -> tuple[str, bytes]:
        entry = self._root / f"rapha-{os.getpid()}-{os.urandom(8).hex()}"
        try:
            entry.mkdir()
            try:
                (entry / "inblob").write_bytes(data)
                report = (entry / "outblob").read_bytes()
                provider, generation = _text(entry / "provider"), _text(entry / "generation")
            finally:
                entry.rmdir()
        except OSError as error:
            raise EvidenceError(
                "The hardware gave no evidence.", f"configfs-tsm says: {error.strerror}.", "Try again."
            ) from None
        if provider not in _PROVIDERS:
            raise EvidenceError(
                "This machine's TEE is unknown.", f"configfs-tsm names it {provider!r}.", "See docs/trust.md."
            )
        if generation != "1":
            raise EvidenceError(
                "Another process wrote to the report.", "Its generation is not 1.", "Try again."
            )
        return _PROVIDERS[provider], report


class NitroAttester:
    """AWS Nitro Enclaves through /dev/nsm (aws-nitro-enclaves-nsm-api, one ioctl with CBOR both ways)."""

    _IOCTL = 0xC0200A00  # _IOWR(0x0A, 0, struct nsm_message), 32 bytes
    _LIMIT = 0x3000

    @property
    def measurement(self) -> str:
        """As the module's own document says it."""
        return launch_measurement(NITRO, self._document(bytes(64)))

    def evidence(self, binding: Binding, claims: dict[str, Any] | None = None) -> Evidence:
        """The COSE_Sign1 document with the binding as its user_data."""
        return Evidence(NITRO, self._document(binding.report_data()), binding)

    def _document(self, data: bytes) -> bytes:
        import fcntl

        import cbor2

        asked = cbor2.dumps({"Attestation": {"user_data": data, "nonce": None, "public_key": None}})
        request, answer = (
            ctypes.create_string_buffer(asked, len(asked)),
            ctypes.create_string_buffer(self._LIMIT),
        )
        message = (ctypes.c_uint64 * 4)(
            ctypes.addressof(request), len(asked), ctypes.addressof(answer), self._LIMIT
        )
        try:
            with NSM.open("rb+", buffering=0) as device:
                fcntl.ioctl(device, self._IOCTL, message)
            reply = cbor2.loads(answer.raw[: message[3]])
            return bytes(reply["Attestation"]["document"])
        except (OSError, cbor2.CBORError, LookupError, TypeError) as error:
            why = f"{type(error).__name__}: {str(error)[:100]}"
            raise EvidenceError("The Nitro module gave no document.", why, "Check the enclave.") from None


def launch_measurement(media_type: str, payload: bytes) -> str:
    """The measurement that clients will read in this machine's evidence; nothing is verified here.

    Raises:
        EvidenceError: if the evidence is too short to hold one.
    """
    if media_type == NITRO:
        found = _pcr0(payload)
    elif media_type == SNP:
        found = payload[0x90:0xC0]
    else:  # a TDX quote: MRTD and the first three run-time registers
        found = hashlib.sha384(payload[184:232] + payload[376:520]).digest()
    if len(found) != 48 or len(payload) < 520:
        raise EvidenceError("The hardware's evidence holds no measurement.", "", "See docs/trust.md.")
    return f"sha384:{found.hex()}"


def _pcr0(document: bytes) -> bytes:
    import cbor2

    try:
        return bytes(cbor2.loads(cbor2.loads(document)[2])["pcrs"][0])
    except (cbor2.CBORError, LookupError, TypeError, ValueError, RecursionError, OverflowError):
        return b""


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
        digest.update(f"{package}=={_version(package)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package).partition("+")[0]  # "+cpu" names a build of the same release
    except metadata.PackageNotFoundError:
        return "absent"


def _text(path: Path) -> str:
    return path.read_text().strip()
