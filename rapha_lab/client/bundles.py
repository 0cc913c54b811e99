"""A site's log in one file, for whoever wants to verify it elsewhere.

A bundle is a file of JSON lines: first the signed checkpoint with the site's key, then every entry in order, each
with the log's signature over all up to and including it. So the first entry that was changed, moved, dropped or
put in can be named, whatever was done to the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rapha_lab.protocol.checkpoint import (
    Checkpoint,
    Inclusion,
    from_base64,
    leaf_hash,
    node_hash,
    open_checkpoint,
)
from rapha_lab.protocol.errors import LogError, RequestError
from rapha_lab.protocol.keys import signing_key

__all__ = ["REPORT", "Bundle", "first_bad", "prove", "read", "roots"]

REPORT = "Keep this file and compare it with what others hold; show both to the custodians."


@dataclass(frozen=True)
class Bundle:
    """A bundle as read; nothing of it is believed yet but that `note` is signed by `key`."""

    note: str
    key: str
    checkpoint: Checkpoint
    entries: Sequence[tuple[bytes, str]]


def read(path: str | Path) -> Bundle:
    """The bundle at `path`, whose head's signature holds.

    Raises:
        LogError: it is none, or its head does not hold.
    """
    try:
        lines = Path(path).read_bytes().decode().splitlines()
        head = json.loads(lines[0])
        note, key = head["checkpoint"], head["key"]
        if lines[0] != json.dumps({"checkpoint": note, "key": key}):
            raise ValueError
        native = signing_key(key)
    except OSError as error:
        raise LogError(f"There is no bundle at {path}.", str(error.strerror)) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, RequestError):
        raise LogError("The bundle's first line is malformed.", "", "Fetch it again.") from None
    entries = [_entry(line, number) for number, line in enumerate(lines[1:])]
    return Bundle(note, key, open_checkpoint(note, native), entries)


def prove(path: str | Path, index: int) -> Inclusion:
    """The proof that entry `index` is in the log of the bundle at `path`, which is to be verified first.

    Raises:
        LogError: the bundle has no such entry.
    """
    bundle = read(path)
    if not 0 <= index < len(bundle.entries):
        raise LogError(f"The bundle has no entry {index}.", f"It has {len(bundle.entries)}.")
    leaves, proof = [leaf_hash(body) for body, _ in bundle.entries], list[bytes]()
    level, at = leaves, index
    while len(level) > 1:
        if at ^ 1 < len(level):
            proof.append(level[at ^ 1])
        paired = [node_hash(*level[i : i + 2]) for i in range(0, len(level) - 1, 2)]
        level, at = paired + level[len(level) & ~1 :], at // 2
    return Inclusion(index, bundle.entries[index][0], proof, bundle.note)


def roots(bundle: Bundle) -> Iterator[bytes]:
    """The root hash over the first 1, 2, 3, ... entries, by the complete subtrees at the right edge."""
    edge: list[bytes] = []
    for number, (body, _) in enumerate(bundle.entries):
        node = leaf_hash(body)
        for _ in range((~number & (number + 1)).bit_length() - 1):
            node = node_hash(edge.pop(), node)
        edge.append(node)
        for left in reversed(edge[:-1]):
            node = node_hash(left, node)
        yield node


def _entry(line: str, number: int) -> tuple[bytes, str]:
    try:
        entry, code = json.loads(line)
        body = entry.encode()
        if line != json.dumps([entry, code]) or not from_base64(code):
            raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise first_bad(number, "It is no line of a bundle.") from None
    return body, code


def first_bad(number: int, why: str) -> LogError:
    """The error that names the first entry at fault."""
    return LogError(f"Entry {number} is the first that does not hold.", why, REPORT)
