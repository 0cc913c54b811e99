"""What an enclave shows of itself (RFC 9334's evidence), and what a verifier reads out of it (claims).

The processor signs 64 bytes of the enclave's choice with its measurement. `Binding.report_data` puts in them
all that the researcher is about to rely on, so that none of it can be swapped: fresh nonce, sealing and
signing keys, TLS key, policy, log checkpoint.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from rapha_lab.protocol.checkpoint import Inclusion
from rapha_lab.protocol.errors import EvidenceError, RequestError
from rapha_lab.protocol.keys import PrivateKey, PublicKey

__all__ = [
    "BANNER",
    "NITRO",
    "NVIDIA",
    "SGX",
    "SIMULATED",
    "SNP",
    "TDX",
    "Binding",
    "Claims",
    "Endorsements",
    "Evidence",
    "key_hash",
    "simulation_key",
]

SNP = "application/vnd.rapha.evidence.sev-snp"
TDX = "application/vnd.rapha.evidence.tdx"
SGX = "application/vnd.rapha.evidence.sgx"
NITRO = "application/vnd.rapha.evidence.nitro+cbor"
NVIDIA = "application/vnd.rapha.evidence.nvidia-spdm"
SIMULATED = "application/vnd.rapha.evidence.simulated+json"

BANNER = "SIMULATED ENCLAVE: no hardware protects this site; whoever owns the machine can read everything."


class Binding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the evidence is bound to.

    Attributes:
        nonce: the client's 32 fresh random bytes.
        sealing_key: requests are sealed to it; text form, its algorithm is the suite.
        signing_key: replies are signed by it; text form, Ed25519.
        tls_key_hash: SHA-256 of the TLS key's SPKI, or zeros where a proxy ends TLS; security rests on the
            seal.
        policy_hash: SHA-256 of the signed policy in force.
        checkpoint_hash: SHA-256 of the log's latest checkpoint.
    """

    nonce: bytes
    sealing_key: str
    signing_key: str
    policy_hash: bytes
    checkpoint_hash: bytes
    tls_key_hash: bytes = bytes(32)

    @property
    def suite(self) -> str:
        """The sealing suite: "x-wing" or "x25519"."""
        return PublicKey.parse(self.sealing_key).algorithm

    def report_data(self) -> bytes:
        """The 64 bytes to have signed by the hardware.

        Raises:
            EvidenceError: if a field has the wrong size or is no key.
        """
        hashes = self.policy_hash, self.checkpoint_hash
        try:
            keys = PublicKey.parse(self.sealing_key).raw + PublicKey.parse(self.signing_key).raw
            if self.suite == "ed25519" or not self.signing_key.startswith("ed25519:"):
                raise RequestError("A key of the wrong kind.")
        except RequestError as error:
            raise EvidenceError("The evidence binds no usable keys.", str(error), "Connect again.") from None
        if any(len(part) != 32 for part in (self.nonce, self.tls_key_hash, *hashes)):
            raise EvidenceError("The evidence's binding is malformed.", "A nonce or hash is not 32 bytes.")
        return hashlib.sha512(
            b"rapha-lab/attestation-binding/v1"
            + _framed(self.nonce, self.suite.encode(), keys, self.tls_key_hash, *hashes)
        ).digest()

    def identity(self) -> bytes:
        """SHA-256 of what stays the same between two nonces of one enclave: its keys and its policy.

        Requests name it: one sealed before a restart or under another policy is refused.
        """
        parts = _framed(self.sealing_key.encode(), self.signing_key.encode(), self.policy_hash)
        return hashlib.sha256(b"rapha-lab/enclave-identity/v1" + parts).digest()


class Endorsements(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the vendor signed about the hardware, as mirrored by the custodians; fields go by TEE.

    Attributes:
        leaf: DER certificate of the key that signs reports (AMD's VCEK or VLEK).
        chain: PEM certificates from its issuer to the vendor's root.
        crls: DER revocation lists.
        collateral: Intel's collateral as JSON.
    """

    leaf: bytes = b""
    chain: bytes = b""
    crls: tuple[bytes, ...] = ()
    collateral: bytes = b""

    @classmethod
    def load(cls, folder: str | Path) -> Endorsements:
        """Those in a folder: leaf.der, chain.pem, *.crl, collateral.json, as far as they are there."""

        def read(pattern: str) -> list[bytes]:
            return [path.read_bytes() for path in sorted(Path(folder).glob(pattern))]

        leaf, chain, crls, collateral = map(read, ("leaf.der", "chain.pem", "*.crl", "collateral.json"))
        return cls(b"".join(leaf), b"".join(chain), tuple(crls), b"".join(collateral))


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Signed evidence of one kind of TEE, with the binding it is said to carry; nothing is believed yet.

    Attributes:
        media_type: the kind of TEE.
        payload: what the hardware signed.
        binding: what the payload is said to be bound to.
        build: proof that the running build is in the log whose checkpoint is bound.
        endorsements: what the site mirrors of its vendor's.
    """

    media_type: str
    payload: bytes
    binding: Binding
    build: Inclusion | None = None
    endorsements: Endorsements = Endorsements()

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Evidence:
        """The evidence in `data`, or EvidenceError."""
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EvidenceError(
                "The evidence is malformed.", str(error), "Is this a Rapha Lab site?"
            ) from None


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """What verified evidence says; each field is the hardware's word, except those of a simulated TEE.

    Attributes:
        tee: "sev-snp", "tdx", "sgx", "nitro", "nvidia" or "simulated".
        measurements: digests by name as "sha384:..." hex; "launch" is the one a release is known by.
        report_data: the 64 bytes that were bound.
        tcb_status: "up to date", the vendor's word for what is behind, or "not stated" where it has none.
        revocation: "checked", "absent" where no list was given, "none" where the vendor has none.
        exposed: ways that its own settings leave its host into it, besides debugging.
        caveats: what this evidence does not show.
    """

    tee: str
    measurements: dict[str, str]
    report_data: bytes
    simulated: bool = False
    debug: bool = False
    tcb: dict[str, int] = {}
    tcb_status: str = "up to date"
    advisories: tuple[str, ...] = ()
    revocation: str = "absent"
    root: str = ""
    hardware: str = ""
    issued_at: float | None = None
    exposed: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    extra: dict[str, Any] = {}

    @property
    def measurement(self) -> str:
        """The launch measurement, by which releases are known."""
        return self.measurements.get("launch", "")


def key_hash(certificate: bytes) -> bytes:
    """SHA-256 of the public key (SPKI) in a DER certificate, for `tls_key_hash`."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def simulation_key() -> PrivateKey:
    """The one key that signs simulated evidence: derived from this sentence, so that everybody holds it."""
    seed = hashlib.sha256(b"rapha-lab simulated enclave: this key is public and proves nothing").digest()
    return PrivateKey("ed25519", (Ed25519PrivateKey.from_private_bytes(seed),))


def _framed(*parts: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)
