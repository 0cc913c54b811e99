"""Certificate chains as TEE vendors use them: short, in one order, ending in a root pinned by digest."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning

from rapha_lab.client.verifiers import refuse

__all__ = ["chain", "der", "pem", "signed"]


def der(data: bytes) -> x509.Certificate:
    """The one certificate in `data`, in DER to the last byte."""
    return _load(data, Encoding.DER)[0]


def pem(text: bytes) -> list[x509.Certificate]:
    """The certificates in `text`, of which every byte counts: no other spelling of them is accepted."""
    return _load(text.removesuffix(b"\0").rstrip(b"\n") + b"\n", Encoding.PEM)


def _load(data: bytes, form: Encoding) -> list[x509.Certificate]:
    load: Any = x509.load_pem_x509_certificates if form is Encoding.PEM else x509.load_der_x509_certificate
    with warnings.catch_warnings():
        # AMD gives every VCEK the serial number 0, which RFC 5280 disallows
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        try:
            found = load(data) if form is Encoding.PEM else [load(data)]
        except ValueError as error:
            refuse("A certificate of the evidence is malformed.", str(error)[:100])
        exact = b"".join(c.public_bytes(form) for c in found) == data
    if not exact:
        refuse("A certificate of the evidence is malformed.", "It is not in the one form it should have.")
    return found


def chain(
    certificates: Sequence[x509.Certificate], roots: dict[str, str], now: datetime, *, lists: bool = False
) -> str:
    """The name of the pinned root that `certificates` end in; each is issued by the next, valid at `now`, and for its purpose.

    Args:
        certificates: from leaf to root.
        roots: names by SHA-256 of the root's DER.
        now: when they must be valid.
        lists: whether the first is an authority, of revocation lists, and not one that signs evidence.

    Raises:
        EvidenceError: naming the certificate at fault.
    """
    root = roots.get(certificates[-1].fingerprint(hashes.SHA256()).hex()) if certificates else None
    if root is None:
        refuse("The evidence leads to no known vendor.", "Its root certificate is not a pinned one.")
    purpose = "crl_sign" if lists else "digital_signature"
    if _is_authority(certificates[0]) != lists or not _may(certificates[0], purpose):
        name = certificates[0].subject.rfc4514_string()[:60]
        refuse(
            f"The certificate {name} is not one that signs {'lists' if lists else 'evidence'}.",
            "It is for another purpose.",
        )
    for depth, (certificate, issuer) in enumerate(
        zip(certificates, [*certificates[1:], certificates[-1]], strict=True)
    ):
        name = certificate.subject.rfc4514_string()[:60]
        try:
            certificate.verify_directly_issued_by(issuer)
        except (InvalidSignature, ValueError, TypeError):
            refuse(f"The certificate {name} is not genuine.", "The next in the chain did not issue it.")
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            refuse(
                f"The certificate {name} has expired or is not yet valid.", f"It is judged at {now:%Y-%m-%d}."
            )
        below = min(depth, len(certificates) - 2)  # authorities between this issuer and the leaf
        if not _is_authority(issuer, below) or not _may(issuer, "key_cert_sign"):
            refuse(f"The certificate {name} is not genuine.", "Its issuer may not issue certificates.")
    return root


def signed(certificate: x509.Certificate, signature: bytes, message: bytes) -> bool:
    """Whether `signature`, r and s big-endian, is of `message` with SHA-384 and `certificate`'s P-384 key."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        return False
    r, s = int.from_bytes(signature[:48], "big"), int.from_bytes(signature[48:], "big")
    try:
        key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return len(signature) == 96


def _is_authority(certificate: x509.Certificate, below: int = 0) -> bool:
    try:
        said = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, ValueError):
        return False
    return said.ca and (said.path_length is None or said.path_length >= below)


def _may(certificate: x509.Certificate, what: str) -> bool:
    """Whether its key may be used so; AMD's and some of NVIDIA's certificates do not say."""
    try:
        return bool(getattr(certificate.extensions.get_extension_for_class(x509.KeyUsage).value, what))
    except x509.ExtensionNotFound:
        return True
    except ValueError:
        return False
