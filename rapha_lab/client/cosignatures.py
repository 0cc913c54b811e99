"""What a witness signs of a log's head, for others to check: C2SP's cosignatures (c2sp.org/tlog-cosignature).

Each witness signs twice: with Ed25519, as cosignature/v1, which every verifier reads; and with ML-DSA-44 (FIPS 204), as
subtree/v1, which a quantum computer does not forge and which covers the witness's name. The second key is derived from
the first's seed, which is not to be had from its public half: a witness keeps one file.
"""

from __future__ import annotations

import base64
import hashlib
import struct
import time

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey, MLDSA44PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from rapha_lab.protocol.checkpoint import from_base64
from rapha_lab.protocol.errors import LogError
from rapha_lab.protocol.keys import PrivateKey, PublicKey

__all__ = ["cosign", "cosigned_at", "verifier_keys", "witness_name"]

_ED25519, _MLDSA44 = b"\x04", b"\x06"
_KEYS = {_ED25519: 32, _MLDSA44: 1312}
_SIGNATURES = {_ED25519: 64, _MLDSA44: 2420}


def witness_name(key: PublicKey) -> str:
    """What a witness is called that has no better name."""
    return f"rapha-lab.witness/{hashlib.sha256(key.raw).hexdigest()[:16]}"


def verifier_keys(name: str, key: PrivateKey) -> tuple[str, str]:
    """The witness's public keys, of Ed25519 and of ML-DSA-44, as others are configured with one of them: name, key id and key."""
    return _verifier_key(name, _ED25519, key.public.raw), _verifier_key(
        name, _MLDSA44, _quantum(key).public_key().public_bytes_raw()
    )


def cosign(note: str, name: str, key: PrivateKey, now: float | None = None) -> str:
    """`note` with two further lines: this witness saw no other history of the log up to now.

    Raises:
        LogError: if the name has a space or a plus sign, or is too long.
    """
    if "+" in name or name.split() != [name] or len(name.encode()) > 255:
        raise LogError(f"A witness cannot be named {name[:60]!r}.", "A name has no space and no plus sign.")
    when, text = int(time.time() if now is None else now), note.rpartition("\n\n")[0] + "\n"
    second = _quantum(key)
    signed = {
        _ED25519: (key.public.raw, key.sign(_message(_ED25519, name, when, text))),
        _MLDSA44: (
            second.public_key().public_bytes_raw(),
            second.sign(_message(_MLDSA44, name, when, text)),
        ),
    }
    for kind, (public, signature) in signed.items():
        told = _key_id(name, kind, public) + struct.pack(">Q", when) + signature
        note += f"— {name} {base64.b64encode(told).decode()}\n"
    return note


def cosigned_at(note: str, witness: str) -> int:
    """When the witness with the verifier key `witness`, of either kind, cosigned `note`, in Unix seconds.

    Raises:
        LogError: it did not, or its signature does not hold.
    """
    name, kind, key = _parse(witness)
    text, _, lines = note.rpartition("\n\n")
    for line in lines.splitlines():
        dash, _, rest = line.partition(" ")
        signer, _, code = rest.partition(" ")
        told = from_base64(code)
        if (dash, signer, told[:4]) != ("—", name, _key_id(name, kind, key)) or len(told) != 12 + _SIGNATURES[
            kind
        ]:
            continue
        (when,) = struct.unpack(">Q", told[4:12])
        if 0 < when < 1 << 63 and _verifies(kind, key, told[12:], _message(kind, name, when, text + "\n")):
            return int(when)
        raise LogError(f"The cosignature of {name} does not hold.", "", "Keep it, and ask the witness.")
    raise LogError(f"The checkpoint is not cosigned by {name}.", "", "Ask the witness for it.")


def _message(kind: bytes, name: str, when: int, text: str) -> bytes:
    if kind == _ED25519:
        return f"cosignature/v1\ntime {when}\n{text}".encode()
    lines = text.split("\n")
    try:
        origin, size, root = lines[0].encode(), int(lines[1]), from_base64(lines[2])
        end = struct.pack(">QQ", 0, size) if str(size) == lines[1] else b""
    except (IndexError, ValueError, struct.error):
        origin, end, root = b"", b"", b""
    if len(root) != 32 or not end or not 0 < len(origin) < 256:
        raise LogError("The checkpoint is malformed.", "It has not three lines that can be cosigned.")
    signer = name.encode()
    return b"".join(
        [
            *(b"subtree/v1\n\0", bytes([len(signer)]), signer, struct.pack(">Q", when)),
            *(bytes([len(origin)]), origin, end, root),
        ]
    )


def _verifies(kind: bytes, key: bytes, signature: bytes, message: bytes) -> bool:
    if kind == _ED25519:
        return PublicKey("ed25519", key).verifies(signature, message)
    try:
        MLDSA44PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _quantum(key: PrivateKey) -> MLDSA44PrivateKey:
    seed = HKDF(hashes.SHA256(), 32, None, b"rapha-lab/witness/ml-dsa-44/v1").derive(
        key.parts[0].private_bytes_raw()
    )
    return MLDSA44PrivateKey.from_seed_bytes(seed)


def _parse(witness: str) -> tuple[str, bytes, bytes]:
    name, _, rest = witness.partition("+")
    told = from_base64(rest.partition("+")[2])
    kind, key = told[:1], told[1:]
    if len(key) != _KEYS.get(kind) or _verifier_key(name, kind, key) != witness:
        raise LogError(
            f"{witness[:60]!r} is no witness's key.", "It reads name+id+key, for Ed25519 or ML-DSA-44."
        )
    return name, kind, key


def _verifier_key(name: str, kind: bytes, key: bytes) -> str:
    return f"{name}+{_key_id(name, kind, key).hex()}+{base64.b64encode(kind + key).decode()}"


def _key_id(name: str, kind: bytes, key: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + kind + key).digest()[:4]
