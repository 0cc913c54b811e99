"""Remembers the last checkpoint of every log it met, and refuses a log that does not extend it.

So each client is a witness: a site that drops, rewrites or forks its log shows it to the next one who connects.
"""

from __future__ import annotations

import hashlib
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from rapha_lab.client.channel import Channel
from rapha_lab.client.home import home, read, write
from rapha_lab.protocol.checkpoint import Checkpoint, open_checkpoint, verify_consistency
from rapha_lab.protocol.errors import LogError

__all__ = ["witness"]


def witness(channel: Channel) -> Checkpoint:
    """Check that the site's log extends what was seen of it before, and remember it as it is now.

    Raises:
        LogError: it does not; the checkpoint that was seen before is kept as evidence.
    """
    key = Ed25519PublicKey.from_public_bytes(channel.site_key.raw)
    told = channel.call("extends", {"start": 0})[0]
    now = open_checkpoint(told["checkpoint"], key)
    name = hashlib.sha256(f"{now.origin}\n{channel.site_key}".encode()).hexdigest()[:32]
    path = home() / "checkpoints" / f"{name}.json"
    before = read(path).get("checkpoint")
    if before is not None:
        now, told = _extended(channel, open_checkpoint(before, key, now.origin), key)
    write(path, {"checkpoint": told["checkpoint"], "site": str(channel.site_key)})
    return now


def _extended(channel: Channel, seen: Checkpoint, key: Ed25519PublicKey) -> tuple[Checkpoint, dict[str, Any]]:
    told = channel.call("extends", {"start": seen.size})[0]
    now = open_checkpoint(told["checkpoint"], key, seen.origin)
    try:
        proof = [bytes.fromhex(part) for part in told["proof"]]
    except (ValueError, TypeError):
        raise LogError("The log's proof is malformed.", "", "Tell the site's custodians.") from None
    verify_consistency(seen.size, now.size, seen.root, now.root, proof)
    return now, told
