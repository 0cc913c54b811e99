"""What anyone can check of a site's log without the site: proofs, signed checkpoints and receipts.

Trees hash as in RFC 9162 section 2.1. A checkpoint is a C2SP signed note (c2sp.org/tlog-checkpoint,
c2sp.org/signed-note): origin, size and root hash of the log, signed with Ed25519.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from rapha_lab.protocol.errors import LogError

__all__ = [
    "Checkpoint",
    "Inclusion",
    "Receipt",
    "checkpoint_text",
    "from_base64",
    "leaf_hash",
    "node_hash",
    "open_checkpoint",
    "root_of",
    "sign_checkpoint",
    "verify_consistency",
    "verify_included",
    "verify_inclusion",
    "verify_receipt",
]

_LARGEST = 1 << 62


class Checkpoint(msgspec.Struct, frozen=True):
    """The head of a log: its name, how many entries it has, and the root hash over them."""

    origin: str
    size: int
    root: bytes


class Inclusion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Proof that `entry` is entry `index` of the log that `checkpoint` signs for."""

    index: int
    entry: bytes
    proof: list[bytes]
    checkpoint: str


class Receipt(msgspec.Struct, frozen=True):
    """Proof that a job's charge is entry `index` of the log that `checkpoint` signs for."""

    job: str
    index: int
    entry: bytes
    proof: list[bytes]
    checkpoint: str


def leaf_hash(entry: bytes) -> bytes:
    """The hash of an entry (RFC 9162 section 2.1.1)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of two subtrees (RFC 9162 section 2.1.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_of(entries: Sequence[bytes]) -> bytes:
    """The root hash over `entries`."""
    if not entries:
        return hashlib.sha256().digest()
    hashes = [leaf_hash(entry) for entry in entries]
    while len(hashes) > 1:
        paired = [node_hash(*hashes[i : i + 2]) for i in range(0, len(hashes) - 1, 2)]
        hashes = paired + hashes[len(hashes) & ~1 :]
    return hashes[0]


def verify_inclusion(index: int, size: int, leaf: bytes, proof: Sequence[bytes], root: bytes) -> None:
    """Check that `leaf` is the hash of entry `index` of the tree of `size` entries under `root`.

    RFC 9162 section 2.1.3.2.

    Raises:
        LogError: if it is not.
    """
    if not 0 <= index < size:
        raise _not_included(f"Entry {index} is beyond the log's {size} entries.")
    node, last, found = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise _not_included("The proof is longer than the tree is high.")
        if node & 1 or node == last:
            found = node_hash(sibling, found)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        node, last = node >> 1, last >> 1
    if last != 0:
        raise _not_included("The proof is shorter than the tree is high.")
    if found != root:
        raise _not_included("The proof leads to another root hash.")


def verify_consistency(old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Check that the tree of `new` entries begins with the tree of `old` entries.

    RFC 9162 section 2.1.4.2.

    Raises:
        LogError: if entries were dropped or changed, or the proof does not show that they were not.
    """
    if old > new or old < 0:
        raise _not_extended(f"It had {old} entries and now has {new}.")
    if old in (0, new):
        if proof or (old and old_root != new_root):
            raise _not_extended("Two logs of one size have different root hashes.")
        return
    path = ([old_root] if old & (old - 1) == 0 else []) + list(proof)
    if not path:
        raise _not_extended("The proof is empty.")
    node, last = old - 1, new - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    older = newer = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise _not_extended("The proof is too long.")
        if node & 1 or node == last:
            older, newer = node_hash(sibling, older), node_hash(sibling, newer)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            newer = node_hash(newer, sibling)
        node, last = node >> 1, last >> 1
    if (last, older, newer) != (0, old_root, new_root):
        raise _not_extended("The proof does not lead to both root hashes.")


def checkpoint_text(checkpoint: Checkpoint) -> str:
    """What is signed of a checkpoint: the three lines of the note's body."""
    return f"{checkpoint.origin}\n{checkpoint.size}\n{_base64(checkpoint.root)}\n"


def sign_checkpoint(checkpoint: Checkpoint, key: Ed25519PrivateKey) -> str:
    """The checkpoint as a note signed by the log whose name is its origin.

    Raises:
        LogError: if the name is empty or has a space or a plus sign, which no note can carry.
    """
    if "+" in checkpoint.origin or checkpoint.origin.split() != [checkpoint.origin]:
        raise LogError(
            f"A log cannot be named {checkpoint.origin!r}.",
            "The name in a signed note has no space and no plus sign.",
            "Name the site like a host, such as demo or rapha.hospital.example.",
        )
    text = checkpoint_text(checkpoint)
    signature = _key_id(checkpoint.origin, key.public_key()) + key.sign(text.encode())
    return f"{text}\n— {checkpoint.origin} {_base64(signature)}\n"


def open_checkpoint(note: str, key: Ed25519PublicKey, origin: str | None = None) -> Checkpoint:
    """The checkpoint in a signed note, once its signature holds.

    Args:
        note: the note; signatures by others, such as witnesses, are passed over.
        key: the log's public key.
        origin: the log's name, if known; otherwise any.

    Raises:
        LogError: if it is no checkpoint, is of another log, or its signature does not hold.
    """
    text, found, signatures = note.rpartition("\n\n")
    lines = text.split("\n")
    if not found or len(lines) < 3 or not all(lines):
        raise _no_checkpoint("It has not the three lines of a checkpoint and a signature.")
    if origin is not None and lines[0] != origin:
        raise _no_checkpoint(f"It is of the log {lines[0]!r}, not of {origin!r}.")
    _check_signature(f"{text}\n".encode(), lines[0], signatures, key)
    size = int(lines[1]) if lines[1].isascii() and lines[1].isdigit() and len(lines[1]) < 20 else -1
    if str(size) != lines[1] or size > _LARGEST:
        raise _no_checkpoint("Its size is no number.")
    root = from_base64(lines[2])
    if len(root) != 32:
        raise _no_checkpoint("Its root hash has not 32 bytes.")
    return Checkpoint(lines[0], size, root)


def _check_signature(text: bytes, name: str, signatures: str, key: Ed25519PublicKey) -> None:
    identifier = _key_id(name, key)
    for line in signatures.splitlines():
        dash, _, rest = line.partition(" ")
        signer, _, encoded = rest.partition(" ")
        signature = from_base64(encoded)
        if dash != "—" or signer != name or signature[:4] != identifier:
            continue
        try:
            return key.verify(signature[4:], text)
        except InvalidSignature:
            raise _no_checkpoint("Its signature does not hold.") from None
    raise _no_checkpoint("It is not signed by this key.")


def verify_included(
    proved: Inclusion | Receipt, key: Ed25519PublicKey, origin: str | None = None
) -> Checkpoint:
    """The checkpoint that `proved` leads to, once its signature and its proof hold.

    Raises:
        LogError: saying what does not hold.
    """
    checkpoint = open_checkpoint(proved.checkpoint, key, origin)
    verify_inclusion(proved.index, checkpoint.size, leaf_hash(proved.entry), proved.proof, checkpoint.root)
    return checkpoint


def verify_receipt(
    receipt: Receipt, key: Ed25519PublicKey, release: bytes | None = None, origin: str | None = None
) -> Checkpoint:
    """Check that a receipt's charge, and `release` if given, is in the log that its checkpoint signs for.

    Returns:
        The checkpoint, for its holder to keep and to demand consistency with.

    Raises:
        LogError: saying what does not hold.
    """
    checkpoint = verify_included(receipt, key, origin)
    try:
        entry = msgspec.json.decode(receipt.entry, type=dict)
    except msgspec.DecodeError:
        raise _bad_receipt("Its entry is no JSON object.") from None
    if entry.get("kind") != "charge" or entry.get("job") != receipt.job:
        raise _bad_receipt(f"Its entry is not the charge of job {receipt.job!r}.")
    if release is not None and entry.get("release") != hashlib.sha256(release).hexdigest():
        raise _bad_receipt("The log has the charge for other bytes than those released.")
    return checkpoint


def _key_id(name: str, key: Ed25519PublicKey) -> bytes:
    """The first four bytes of a key's hash, the 1 standing for Ed25519 (c2sp.org/signed-note)."""
    return hashlib.sha256(name.encode() + b"\n\x01" + key.public_bytes_raw()).digest()[:4]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def from_base64(text: str) -> bytes:
    """The bytes, if `text` is their one canonical spelling; else none."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
    return data if _base64(data) == text else b""


def _not_included(why: str) -> LogError:
    return LogError("The entry is not in the log.", why, _REPORT)


def _not_extended(why: str) -> LogError:
    return LogError("The log does not extend what was seen of it before.", why, _REPORT)


def _no_checkpoint(why: str) -> LogError:
    return LogError("The checkpoint does not hold.", why, _REPORT)


def _bad_receipt(why: str) -> LogError:
    return LogError("The receipt does not hold.", why, _REPORT)


_REPORT = "Keep both copies and show them to the custodians."
