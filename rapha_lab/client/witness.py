"""Remembers the last checkpoint of every log it met, cosigned, and refuses a log that does not extend it.

So each client is a witness: a site that drops, rewrites or forks its log shows it to the next one who connects,
and what each has signed is evidence in anybody's hands.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

from rapha_lab.client.channel import Channel
from rapha_lab.client.cosignatures import cosign, witness_name
from rapha_lab.client.home import home, read, write
from rapha_lab.protocol.checkpoint import Checkpoint, open_checkpoint, verify_consistency
from rapha_lab.protocol.errors import LogError
from rapha_lab.protocol.keys import PrivateKey, signing_key

__all__ = ["last_seen", "remember", "same_key", "witness"]


def witness(channel: Channel, name: str = "") -> Checkpoint:
    """Check that the site's log extends what was seen of it, and what its evidence binds; remember it as it is now.

    Raises:
        LogError: it does not; the checkpoint that was seen before is kept as evidence.
    """
    key, attested = signing_key(str(channel.site_key)), channel.attested
    if not attested.verdict.claims.simulated:
        _same_log(attested.head.origin, str(channel.site_key))
    seen, before = [attested.head], last_seen(attested.head.origin, str(channel.site_key))
    if before is not None:
        seen.append(open_checkpoint(before, key, attested.head.origin))
    seen.sort(key=lambda checkpoint: checkpoint.size)
    told = channel.call("extends", {"start": seen[-1].size})[0]
    now = open_checkpoint(str(told["checkpoint"]), key, attested.head.origin)
    for old, new in pairwise(seen):
        _extends(old, new, channel.call("extends", {"start": old.size, "end": new.size})[0])
    _extends(seen[-1], now, told)
    remember(str(told["checkpoint"]), str(channel.site_key), channel.key, name)
    return now


def _same_log(origin: str, site: str) -> None:
    """A site has one log for its whole life: under a new name nothing would be remembered of it."""
    path = _path("", site)
    before = read(path).setdefault("origin", origin)
    if before != origin:
        why = f"It was {before}, and is {origin}: entries of the first would be out of sight."
        raise LogError(
            "The site shows a log of another name.", why, "Ask its custodians what became of the other."
        )
    write(path, {"origin": origin})


def same_key(origin: str, site: str) -> None:
    """One key signs the log of a name: what a witness cosigns is the name and not the key, which another could use.

    Raises:
        LogError: the name was first met under another key.
    """
    first = _first_key(origin, site)
    if first != site:
        why = (
            f"You met it first under {first}: what you cosigned under this one would count for that one too."
        )
        raise LogError(f"The log {origin} is signed by another key than before.", why, _WHICH)


_WHICH = (
    "Ask both sites' custodians. If the first was the wrong one, begin with a new folder: RAPHA_LAB_HOME."
)


def _first_key(origin: str, site: str) -> str:
    path = _path(origin, "")
    told = read(path)
    if "site" not in told:
        write(path, told := {"site": site})
    return str(told["site"])


def _extends(old: Checkpoint, new: Checkpoint, told: dict[str, Any]) -> None:
    try:
        proof = [bytes.fromhex(part) for part in told["proof"]]
    except (ValueError, TypeError, KeyError):
        raise LogError("The log's proof is malformed.", "", "Tell the site's custodians.") from None
    verify_consistency(old.size, new.size, old.root, new.root, proof)


def _path(origin: str, site: str) -> Path:
    name = hashlib.sha256(f"{origin}\n{site}".encode()).hexdigest()[:32]
    return home() / "checkpoints" / f"{name}.json"


def last_seen(origin: str, site: str) -> str | None:
    """The last checkpoint remembered of the log `origin` of the site with this key, as a note."""
    found = read(_path(origin, site)).get("checkpoint")
    return None if found is None else str(found)


def remember(note: str, site: str, key: PrivateKey, name: str = "") -> str:
    """Keep a checkpoint that was found to extend all that was seen; gives its note, cosigned unless `same_key` refuses."""
    origin = note.split("\n", 1)[0]
    if _first_key(origin, site) == site:
        note = cosign(note, name or witness_name(key.public), key)
    write(_path(origin, site), {"checkpoint": note, "site": site})
    return note
