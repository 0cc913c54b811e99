"""One entry of a log with its proof as a file of its own: C2SP's tlog-proof (c2sp.org/tlog-proof).

The entry and its proof verify anywhere against the log's key, with no site, no database and no bundle.
"""

from __future__ import annotations

import base64

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from rapha_lab.protocol.checkpoint import Checkpoint, Inclusion, Receipt, from_base64, verify_included
from rapha_lab.protocol.errors import LogError

__all__ = ["open_proof", "write_proof"]

_FIRST = "c2sp.org/tlog-proof@v1"


def write_proof(proved: Inclusion | Receipt) -> str:
    """The proof of `proved.entry` as text, for a file beside it that ends in .tlog-proof."""
    hashes = [base64.b64encode(part).decode() for part in proved.proof]
    return "\n".join([_FIRST, f"index {proved.index}", *hashes, "", proved.checkpoint])


def open_proof(text: str, entry: bytes, key: Ed25519PublicKey, origin: str | None = None) -> Checkpoint:
    """The checkpoint that the proof in `text` leads `entry` to.

    Args:
        text: the proof.
        entry: the very bytes of the entry.
        key: the log's public key.
        origin: the log's name, if known.

    Raises:
        LogError: it is no proof, or not of this entry in this log.
    """
    lines, _, checkpoint = text.partition("\n\n")
    first, *rest = lines.split("\n")
    if rest and rest[0].startswith("extra "):
        rest = rest[1:]  # nobody signs it, and we write none
    try:
        word, index = rest[0].split(" ")
        number, proof = int(index), [from_base64(line) for line in rest[1:]]
        exact = (first, word, str(number)) == (_FIRST, "index", index) and len(rest) < 70
    except (LookupError, ValueError):
        exact = False
    if not exact or any(len(part) != 32 for part in proof):
        raise LogError("The proof is malformed.", f"It is not of the form {_FIRST}.", "Ask for it again.")
    return verify_included(Inclusion(number, entry, proof, checkpoint), key, origin)
