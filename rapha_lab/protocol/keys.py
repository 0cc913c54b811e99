"""Keys of researchers, custodians and sites: made, kept under a passphrase, and written as one line of text.

Signing keys are Ed25519 (RFC 8032). Sealing keys are X-Wing, the hybrid of ML-KEM-768 and X25519 that keeps
HPKE safe from a quantum computer, or plain X25519 (RFC 9180) where a draft is not accepted.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ed25519, mlkem, x25519

from rapha_lab.protocol.errors import RequestError, TrustError

__all__ = ["PrivateKey", "PublicKey", "long_enough", "signing_key"]

_ED, _X, _ML = ed25519.Ed25519PrivateKey, x25519.X25519PrivateKey, mlkem.MLKEM768PrivateKey
_PARTS: dict[str, tuple[Any, ...]] = {"ed25519": (_ED,), "x25519": (_X,), "x-wing": (_ML, _X)}
_SIZES = {"ed25519": 32, "x25519": 32, "x-wing": 1184 + 32}
_BLOCK = re.compile(r"-----BEGIN [^-]+-----[^-]+-----END [^-]+-----\n")


@dataclass(frozen=True)
class PublicKey:
    """A public key; `str()` of it is its text form, "ed25519:" and base64."""

    algorithm: str
    raw: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """The key in `text`; only the one canonical spelling of a key is accepted.

        Raises:
            RequestError: if it is none.
        """
        algorithm, _, code = text.partition(":")
        try:
            key = cls(algorithm, base64.b64decode(code, validate=True))
        except ValueError:
            key = cls(algorithm, b"")
        if len(key.raw) != _SIZES.get(algorithm) or str(key) != text:
            raise RequestError(f"{text[:60]!r} is no public key.", "Expected ed25519: and its base64.")
        return key

    def __str__(self) -> str:
        return f"{self.algorithm}:{base64.b64encode(self.raw).decode()}"

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` is this Ed25519 key's over `message`."""
        try:
            ed25519.Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return self.algorithm == "ed25519"

    def native(self) -> Any:
        """The key as cryptography's HPKE takes it."""
        x = x25519.X25519PublicKey.from_public_bytes(self.raw[-32:])
        if self.algorithm == "x25519":
            return x
        return hpke.MLKEM768X25519PublicKey(mlkem.MLKEM768PublicKey.from_public_bytes(self.raw[:-32]), x)


def signing_key(text: str) -> ed25519.Ed25519PublicKey:
    """The Ed25519 key in its text form, as cryptography takes it; RequestError if it is none."""
    key = PublicKey.parse(text)
    if key.algorithm != "ed25519":
        raise RequestError(f"{text[:60]!r} is no key that signs.", "Expected ed25519: and its base64.")
    return ed25519.Ed25519PublicKey.from_public_bytes(key.raw)


@dataclass(frozen=True, repr=False)
class PrivateKey:
    """A private key, as the one or two keys that make it up; its `repr` shows the public half."""

    algorithm: str
    parts: tuple[Any, ...]

    @classmethod
    def create(cls, algorithm: str = "ed25519") -> PrivateKey:
        """A fresh key: "ed25519" signs, "x-wing" and "x25519" open what was sealed."""
        return cls(algorithm, tuple(part.generate() for part in _PARTS[algorithm]))

    @property
    def public(self) -> PublicKey:
        """Its public half."""
        raw = b"".join(part.public_key().public_bytes_raw() for part in self.parts)
        return PublicKey(self.algorithm, raw)

    def __repr__(self) -> str:
        return f"PrivateKey of {str(self.public)[:40]}"

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature over `message`."""
        return self.parts[0].sign(message)

    def native(self) -> Any:
        """The key as cryptography's HPKE takes it."""
        return self.parts[0] if len(self.parts) == 1 else hpke.MLKEM768X25519PrivateKey(*self.parts)

    def save(self, path: str | Path, passphrase: str) -> None:
        """Write it under a passphrase (PKCS8, scrypt) for its owner's eyes only; never over another file.

        Raises:
            TrustError: if the file exists or the passphrase is shorter than 10 characters.
        """
        long_enough(passphrase)
        salt = os.urandom(16)
        lock = pem.BestAvailableEncryption(_stretch(passphrase, salt))
        blocks = [part.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, lock) for part in self.parts]
        text = f"{self.public}\nscrypt-salt:{salt.hex()}\n".encode() + b"".join(blocks)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            _refuse(f"{path} exists.", "A key is never written over another.", "Give another name.")
        with os.fdopen(handle, "wb") as file:
            file.write(text)

    @classmethod
    def load(cls, path: str | Path, passphrase: str) -> PrivateKey:
        """The key that `save` wrote.

        Raises:
            TrustError: if it is not there, others may read it, it is damaged, or the passphrase is wrong.
        """
        try:
            shared = os.stat(path).st_mode & 0o077
            public, salt, blocks = Path(path).read_text().split("\n", 2)
            secret = _stretch(passphrase, bytes.fromhex(salt.removeprefix("scrypt-salt:")))
            found = _BLOCK.findall(blocks)
            parts = tuple(pem.load_pem_private_key(block.encode(), secret) for block in found)
            (algorithm,) = (name for name, kinds in _PARTS.items() if _are(parts, kinds))
            key = cls(algorithm, parts)
            intact = str(key.public) == public
        except OSError as error:
            _refuse(
                f"There is no key at {path}.", f"{error.strerror}.", 'Make one with "rapha-lab keys new".'
            )
        except (ValueError, TypeError):
            intact = False
        if shared:
            _refuse(f"Others may read {path}.", "A key is its owner's alone.", f"chmod 600 {path}")
        if not intact:
            _refuse(f"{path} did not open.", "The passphrase is wrong or the file is damaged.", "Try again.")
        return key


def _are(parts: tuple[Any, ...], kinds: tuple[Any, ...]) -> bool:
    return len(parts) == len(kinds) and all(map(isinstance, parts, kinds))


def _stretch(passphrase: str, salt: bytes) -> bytes:
    """PKCS8's own 2,048 rounds are soon guessed through; scrypt costs 32 MB and 0.1 s a guess."""
    return hashlib.scrypt(passphrase.encode(), salt=salt, n=2**15, r=8, p=1, maxmem=2**26).hex().encode()


def long_enough(passphrase: str) -> str:
    """The passphrase; TrustError if it is shorter than 10 characters."""
    if len(passphrase) < 10:
        why = "A stolen file is guessed at for ever."
        _refuse("The passphrase is too short.", why, "Use 10 characters or more.")
    return passphrase


def _refuse(what: str, why: str, instead: str) -> NoReturn:
    raise TrustError(what, why, instead) from None
