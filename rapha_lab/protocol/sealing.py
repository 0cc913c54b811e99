"""Sealed envelopes between a researcher and an attested site, and the signed messages inside them.

An envelope is HPKE (RFC 9180, base mode) around a fresh file key, then the padded plaintext in 1 MiB chunks:

    "RPS1" | suite | wrapped key | chunk 0 | chunk 1 | ... | last chunk

A chunk's nonce is its number and a flag on the last one (STREAM; Hoang, Reyhanitabar, Rogaway, Vizár 2015),
its associated data the hash of the header: cut, reordered, swapped, flipped or extended, nothing opens.
HPKE's `info` binds suite and context. Lengths are padded by Padmé (Nikitin et al. 2019, section 4) and to
whole blocks of 4 KiB, so that a number's digits do not show: at most 12 % or a block longer.

Requests are signed *inside* the envelope, and not by HTTP message signatures (RFC 9421), because
- a signature outside names the researcher to whoever carries the message; inside, only the enclave learns it;
- whoever strips an outer signature can put his own over the same ciphertext and claim the request;
- TLS ends at a hospital's proxy, which rewrites paths and headers, the very things RFC 9421 covers;
- one check beside the decryption in the trusted base replaces a second parser of HTTP fields before it.
What is signed names the recipient's key and the evidence seen, so a recipient cannot pass it on as its own.
HPKE's base mode authenticates no sender, so replies too are signed inside, by the key bound in the evidence.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from rapha_lab.protocol.errors import RequestError, SealError
from rapha_lab.protocol.keys import PrivateKey, PublicKey

__all__ = [
    "Replay",
    "Reply",
    "Request",
    "open_reply",
    "open_request",
    "open_sealed",
    "padded",
    "seal",
    "seal_reply",
    "seal_request",
]

WINDOW = 300.0  # seconds that a request may be dated before or after the site's clock
_KEMS = {"x-wing": (1, KEM.MLKEM768_X25519), "x25519": (2, KEM.X25519)}
_BLOCK = 4096
_CHUNK, _TAG, _KEY = 1 << 20, 16, 32


def seal(plaintext: bytes, to: PublicKey, context: bytes) -> bytes:
    """`plaintext`, for the holder of `to` alone and for `context` alone."""
    start, suite = _suite(to.algorithm)
    key = AESGCM.generate_key(256)
    header = start + suite.encrypt(key, to.native(), info=_info(start, context))
    cipher, bound, out = AESGCM(key), hashlib.sha256(header).digest(), io.BytesIO()
    out.write(header)
    length = len(plaintext)
    size, whole = padded(length + 8), length // _CHUNK * _CHUNK
    tail = memoryview(plaintext[whole:] + bytes(size - 8 - length) + struct.pack(">Q", length))
    body, scratch = memoryview(plaintext), memoryview(bytearray(_CHUNK + _TAG))
    for at in range(0, size, _CHUNK):
        part = body[at : at + _CHUNK] if at < whole else tail[at - whole : at - whole + _CHUNK]
        into = scratch[: len(part) + _TAG]
        cipher.encrypt_into(_nonce(at // _CHUNK, at + _CHUNK >= size), part, bound, into)
        out.write(into)
    return out.getvalue()


def open_sealed(envelope: bytes, key: PrivateKey, context: bytes) -> bytes:
    """The plaintext that was sealed to `key` for `context`.

    Raises:
        SealError: if a bit was changed, cut or added, or it was meant for another key or context.
    """
    start, suite = _suite(key.algorithm)
    size = _header(key.algorithm)
    header, body = bytes(envelope[:size]), memoryview(envelope)[size:]
    try:
        if not header.startswith(start) or not body:
            raise ValueError
        cipher = AESGCM(suite.decrypt(header[len(start) :], key.native(), info=_info(start, context)))
        bound, out, scratch = hashlib.sha256(header).digest(), io.BytesIO(), memoryview(bytearray(_CHUNK))
        for at in range(0, len(body), _CHUNK + _TAG):
            part = body[at : at + _CHUNK + _TAG]
            into = scratch[: len(part) - _TAG]
            last = at + _CHUNK + _TAG >= len(body)
            cipher.decrypt_into(_nonce(at // (_CHUNK + _TAG), last), part, bound, into)
            out.write(into)
        inner = out.tell()
        (length,) = struct.unpack(">Q", out.getbuffer()[-8:])
        if padded(length + 8) != inner:
            raise ValueError
    except (InvalidTag, ValueError, struct.error):
        _refuse("The sealed message could not be opened.", "It was altered, cut, or sealed for another use.")
    out.truncate(length)
    return out.getvalue()


def padded(length: int) -> int:
    """Padmé: `length` rounded up until its mantissa has no more bits than its exponent; to whole blocks at least."""
    length = max(length, _BLOCK)
    exponent = length.bit_length() - 1
    mask = max(1 << (exponent - exponent.bit_length()), _BLOCK) - 1
    return (length + mask) & ~mask


class Request(msgspec.Struct, frozen=True):
    """An opened request: what is asked, by whom, and where the answer goes.

    `nonce` is 32 random bytes that name it for ever; `bound` is the hash of its envelope's header.
    """

    kind: str
    body: bytes
    researcher: PublicKey
    reply_to: PublicKey
    nonce: bytes
    time: float
    bound: bytes


class Reply(msgspec.Struct, frozen=True):
    """An opened reply: `kind` says how to read `body`."""

    kind: str
    body: bytes


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is signed of a message; `bound` is a request's evidence, or a reply's request."""

    kind: str
    bound: bytes
    signer: str
    to: str
    body: bytes
    nonce: bytes
    reply_to: str = ""
    time: float = 0.0


def seal_request(
    kind: str,
    body: bytes,
    *,
    to: PublicKey,
    evidence_hash: bytes,
    researcher: PrivateKey,
    reply_to: PublicKey,
    now: float | None = None,
) -> bytes:
    """A request signed by `researcher`, sealed to the site's key `to`; keep it to open the reply.

    Args:
        kind: what is asked, a short word.
        body: the request itself; `kind` says how to read it.
        to: the sealing key bound in the evidence.
        evidence_hash: `Binding.identity()` of the evidence that was appraised.
        researcher: the researcher's Ed25519 key.
        reply_to: the answer is sealed to it.
        now: Unix time in seconds; the clock's, if None.
    """
    head = {"bound": evidence_hash, "reply_to": str(reply_to), "to": str(to), "nonce": os.urandom(32)}
    when = time.time() if now is None else now
    return seal(_signed(b"request", body, researcher, kind=kind, time=when, **head), to, b"request")


def open_request(
    envelope: bytes,
    *,
    key: PrivateKey,
    evidence_hash: bytes,
    replay: Replay,
    known: Callable[[PublicKey], bool] = lambda key: True,
    now: float | None = None,
) -> Request:
    """The request in `envelope`, once: signed by a researcher who is `known`, fresh, and for this very site.

    Raises:
        SealError: if altered, stale, a replay, for another key or evidence, or of an unknown researcher.
    """
    head, body = _checked(b"request", open_sealed(envelope, key, b"request"), key.public)
    now = time.time() if now is None else now
    if head.bound != evidence_hash:
        _refuse(
            "The request was sealed for other evidence.",
            "The site restarted or its policy changed since you connected.",
            "Connect again: the new evidence is appraised first.",
        )
    if not abs(head.time - now) <= WINDOW:
        late = f"It is dated {head.time - now:+.0f} s from the site's clock."
        _refuse("The request is stale.", late, "Set your clock and send it again.")
    signer, reply_to = PublicKey.parse(head.signer), _key(head.reply_to)
    if not known(signer):
        _refuse("The site does not know this researcher's key.", "", "Ask the custodians to add it.")
    replay.admit(head.signer, head.nonce, now)
    return Request(head.kind, body, signer, reply_to, head.nonce, head.time, _name(envelope, key.algorithm))


def seal_reply(kind: str, body: bytes, *, request: Request, site: PrivateKey) -> bytes:
    """The answer to `request`, signed by the site's attested key, sealed to the researcher's."""
    head = {"kind": kind, "bound": request.bound, "nonce": request.nonce, "to": str(request.reply_to)}
    return seal(_signed(b"reply", body, site, **head), request.reply_to, b"reply" + request.bound)


def open_reply(envelope: bytes, *, request: bytes, to: PublicKey, key: PrivateKey, site: PublicKey) -> Reply:
    """The answer to the sealed `request`.

    Args:
        envelope: the sealed reply.
        request: what `seal_request` returned.
        to: the sealing key that it was sealed to.
        key: the private half of its `reply_to`.
        site: the site's Ed25519 key, from the evidence that was appraised.

    Raises:
        SealError: if it is altered, answers another request, or was not signed by the attested key.
    """
    bound = _name(request, to.algorithm)
    head, body = _checked(b"reply", open_sealed(envelope, key, b"reply" + bound), key.public)
    if head.signer != str(site) or head.bound != bound:
        _refuse("The reply does not come from the attested site.", "Another key signed it.", "Connect again.")
    return Reply(head.kind, body)


class Replay:
    """Remembers the nonces of fresh requests, so that none is answered twice; threads may share it.

    It holds at most `per_key` live nonces of one researcher and `total` in all, and then refuses rather than
    forgets. A restart forgets, but has new sealing keys, which no old request opens under.
    """

    def __init__(self, per_key: int = 16_384, total: int = 131_072) -> None:
        self._per_key, self._total, self._lock = per_key, total, threading.Lock()
        self._until: dict[bytes, tuple[float, str]] = {}
        self._counts: dict[str, int] = {}

    def admit(self, signer: str, nonce: bytes, now: float) -> None:
        """Accept `nonce`, or raise SealError if it was seen or `signer` sends too many."""
        with self._lock:
            self._forget(now)
            if nonce in self._until:
                _refuse("The request is a replay.", "The site has taken it before.")
            if self._counts.get(signer, 0) >= self._per_key or len(self._until) >= self._total:
                _refuse("Too many requests.", "The site remembers each for ten minutes.", "Wait a minute.")
            self._until[nonce] = now + 2 * WINDOW, signer
            self._counts[signer] = self._counts.get(signer, 0) + 1

    def _forget(self, now: float) -> None:
        while self._until and (oldest := next(iter(self._until.items())))[1][0] < now:
            nonce, (_, signer) = oldest
            del self._until[nonce]
            self._counts[signer] -= 1
            if not self._counts[signer]:
                del self._counts[signer]


def _signed(domain: bytes, body: bytes, key: PrivateKey, **head: Any) -> bytes:
    """`body` after its signed head; the domain keeps a reply from being taken for a request."""
    text = msgspec.json.encode(_Head(signer=str(key.public), body=hashlib.sha256(body).digest(), **head))
    return b"".join([struct.pack(">I", len(text)), text, key.sign(_domain(domain) + text), body])


def _checked(domain: bytes, inner: bytes, recipient: PublicKey) -> tuple[_Head, bytes]:
    try:
        (size,) = struct.unpack_from(">I", inner)
        text, signature, body = inner[4 : 4 + size], inner[4 + size : 68 + size], inner[68 + size :]
        head = msgspec.json.decode(text, type=_Head)
    except (struct.error, msgspec.DecodeError, UnicodeDecodeError):
        _refuse("The message inside the envelope is malformed.", "Its head does not read.")
    held = _key(head.signer).verifies(signature, _domain(domain) + text)
    same = hashlib.sha256(body).digest() == head.body
    if not held or not same or head.to != str(recipient) or len(head.nonce) != 32:
        _refuse("The signature inside the envelope does not hold.", "It is of another message or recipient.")
    return head, body


def _key(text: str) -> PublicKey:
    try:
        return PublicKey.parse(text)
    except RequestError as error:
        _refuse("The message inside the envelope is malformed.", str(error))


def _suite(algorithm: str) -> tuple[bytes, Suite]:
    """The first five bytes of an envelope, and HPKE's algorithms."""
    if algorithm not in _KEMS:
        _refuse("This key does not seal.", f"{algorithm} is no suite of this version.", "Use an x-wing key.")
    number, kem = _KEMS[algorithm]
    return b"RPS1" + bytes([number]), Suite(kem, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _header(algorithm: str) -> int:
    return 5 + _KEMS[algorithm][1].enc_length() + _KEY + _TAG


def _name(envelope: bytes, algorithm: str) -> bytes:
    """What names an envelope: the hash of its header, on whose fresh file key all the rest hangs."""
    return hashlib.sha256(envelope[: _header(algorithm)]).digest()


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


def _info(start: bytes, context: bytes) -> bytes:
    return hashlib.sha256(b"rapha-lab/seal/v1\0" + start + context).digest()


def _domain(kind: bytes) -> bytes:
    return b"rapha-lab/" + kind + b"/v1\0"


def _refuse(what: str, why: str, instead: str = "Send it again; if that fails, connect again.") -> NoReturn:
    raise SealError(what, why, instead)
