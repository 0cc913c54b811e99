"""Remembers the last checkpoint of every log it met, cosigned, and refuses a log that does not extend it.

So each client is a witness: a site that drops, rewrites or forks its log shows it to the next one who connects,
and what each has signed is evidence in anybody's hands. Cosignatures are C2SP's (c2sp.org/tlog-cosignature, Ed25519).
"""

from __future__ import annotations

import base64
import hashlib
import struct
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from rapha_lab.client.channel import Channel
from rapha_lab.client.home import home, read, write
from rapha_lab.protocol.checkpoint import Checkpoint, from_base64, open_checkpoint, verify_consistency
from rapha_lab.protocol.errors import LogError
from rapha_lab.protocol.keys import PrivateKey, PublicKey, signing_key

__all__ = ["cosign", "cosigned_at", "last_seen", "remember", "verifier_key", "witness", "witness_name"]

_ED25519 = b"\x04"


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
    """Cosign a checkpoint that was found to extend all that was seen, and keep it; gives the cosigned note."""
    origin = note.split("\n", 1)[0]
    note = cosign(note, name or witness_name(key.public), key)
    write(_path(origin, site), {"checkpoint": note, "site": site})
    return note


def witness_name(key: PublicKey) -> str:
    """What a witness is called that has no better name."""
    return f"rapha-lab.witness/{hashlib.sha256(key.raw).hexdigest()[:16]}"


def verifier_key(name: str, key: PublicKey) -> str:
    """The witness's public key as others are configured with it: name, key id and key (c2sp.org/signed-note)."""
    told = base64.b64encode(_ED25519 + key.raw).decode()
    return f"{name}+{_key_id(name, key).hex()}+{told}"


def cosign(note: str, name: str, key: PrivateKey, now: float | None = None) -> str:
    """`note` with a further line: this witness saw no other history of the log up to now.

    Raises:
        LogError: if the name has a space or a plus sign.
    """
    if "+" in name or name.split() != [name]:
        raise LogError(f"A witness cannot be named {name!r}.", "A name has no space and no plus sign.")
    when, text = int(time.time() if now is None else now), note.rpartition("\n\n")[0] + "\n"
    signature = _key_id(name, key.public) + struct.pack(">Q", when) + key.sign(_message(when, text))
    return f"{note}— {name} {base64.b64encode(signature).decode()}\n"


def cosigned_at(note: str, witness: str) -> int:
    """When the witness with the verifier key `witness` cosigned `note`, in Unix seconds.

    Raises:
        LogError: it did not, or its signature does not hold.
    """
    name, key = _parse(witness)
    text, _, lines = note.rpartition("\n\n")
    for line in lines.splitlines():
        dash, _, rest = line.partition(" ")
        signer, _, code = rest.partition(" ")
        signature = from_base64(code)
        if (dash, signer, signature[:4]) != ("—", name, _key_id(name, key)) or len(signature) != 76:
            continue
        (when,) = struct.unpack(">Q", signature[4:12])
        if key.verifies(signature[12:], _message(when, text + "\n")):
            return int(when)
        raise LogError(f"The cosignature of {name} does not hold.", "", "Keep it, and ask the witness.")
    raise LogError(f"The checkpoint is not cosigned by {name}.", "", "Ask the witness for it.")


def _parse(witness: str) -> tuple[str, PublicKey]:
    name, _, rest = witness.partition("+")
    raw = from_base64(rest.partition("+")[2])
    key = PublicKey("ed25519", raw[1:] if len(raw) == 33 else bytes(32))
    if raw[:1] != _ED25519 or verifier_key(name, key) != witness:
        raise LogError(f"{witness[:60]!r} is no witness's key.", "It reads name+id+key, for Ed25519.")
    return name, key


def _message(when: int, text: str) -> bytes:
    return f"cosignature/v1\ntime {when}\n{text}".encode()


def _key_id(name: str, key: PublicKey) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + key.raw).digest()[:4]
