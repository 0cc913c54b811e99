"""The site's append-only log, in the ledger's database so that an entry commits with what it records.

Entries are canonical JSON of labels, hashes and whole numbers, never a patient's data. The hash of every
complete subtree is stored, so that appending and proving cost a logarithm of the log's size.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.curator.disk import readable, unusable
from rapha_lab.protocol.checkpoint import Checkpoint, Inclusion, leaf_hash, node_hash, sign_checkpoint
from rapha_lab.protocol.errors import LogError, RequestError

__all__ = ["SCHEMA", "Kind", "Log"]

Kind = Literal[
    "release-of-enclave", "policy", "statement", "cell", "account", "reserve", "charge", "abandon", "recover",
    "elsewhere", "airlock", "decision", "shown", "opt-outs", "records",
]  # fmt: skip

SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (number INTEGER PRIMARY KEY, body BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS subtree (
    level INTEGER, number INTEGER, hash BLOB NOT NULL, PRIMARY KEY (level, number)
) STRICT, WITHOUT ROWID;
""" + "".join(
    f"CREATE TRIGGER IF NOT EXISTS {table}_{act} BEFORE {act} ON {table}"
    " BEGIN SELECT RAISE(ABORT, 'append only'); END;\n"
    for table in ("entry", "subtree")
    for act in ("update", "delete")
)


class Log:
    """Reads and extends the log in `connection`.

    Args:
        connection: the ledger's database.
        lock: held while the database is used.
        key: signs checkpoints.
        origin: the log's name in its checkpoints, the same for its whole life.
    """

    def __init__(
        self, connection: sqlite3.Connection, lock: threading.RLock, key: Ed25519PrivateKey, origin: str
    ) -> None:
        self._connection, self._lock, self._key, self._origin = connection, lock, key, origin
        self.checkpoint()  # a name that cannot be signed for is refused now

    def append(self, connection: sqlite3.Connection, kind: Kind, fields: Mapping[str, object]) -> int:
        """Append {kind, ...fields} within the transaction that `connection` is in; its index.

        Raises:
            RequestError: if a field is no label, hash or whole number.
        """
        number = self.size()
        body = _canonical(kind, fields)
        connection.execute("INSERT INTO entry VALUES (?, ?)", (number, body))
        level, node, found = 0, number, leaf_hash(body)
        connection.execute("INSERT INTO subtree VALUES (0, ?, ?)", (number, found))
        while node & 1:
            found = node_hash(self._stored(level, node - 1), found)
            level, node = level + 1, node >> 1
            connection.execute("INSERT INTO subtree VALUES (?, ?, ?)", (level, node, found))
        return number

    def size(self) -> int:
        """How many entries there are."""
        with self._lock, readable():
            row = self._connection.execute("SELECT coalesce(max(number) + 1, 0) FROM entry").fetchone()
        return int(row[0])

    def entries(self, start: int = 0) -> list[bytes]:
        """The entries from index `start` on, as they were hashed."""
        with self._lock, readable():
            rows = self._connection.execute(
                "SELECT body FROM entry WHERE number >= ? ORDER BY number", (start,)
            )
            return [bytes(body) for (body,) in rows]

    def entry(self, index: int) -> bytes:
        """One entry as it was hashed; SiteError if the file no longer has it so."""
        with self._lock, readable():
            row = self._connection.execute("SELECT body FROM entry WHERE number = ?", (index,)).fetchone()
            if row is None or leaf_hash(bytes(row[0])) != self._stored(0, index):
                raise unusable(f"entry {index} of the log is damaged")
            return bytes(row[0])

    def checkpoint(self) -> str:
        """The head of the log as a C2SP checkpoint, signed."""
        with self._lock:
            return self._note(self.size())

    def _note(self, size: int) -> str:
        with readable():
            root = self._root(0, size) if size else hashlib.sha256().digest()
        return sign_checkpoint(Checkpoint(self._origin, size, root), self._key)

    def signed(self, start: int, limit: int) -> list[tuple[bytes, str]]:
        """At most `limit` entries from `start` on, each with the log's signature over all up to and including it.

        With them the first entry that somebody changed, moved or dropped on the way can be named.
        """
        with self._lock, readable():
            rows = self._connection.execute(
                "SELECT number, body FROM entry WHERE number >= ? ORDER BY number LIMIT ?", (start, limit)
            ).fetchall()
            return [(bytes(body), self._note(number + 1).rsplit(" ", 1)[1].strip()) for number, body in rows]

    def proved(self, index: int) -> Inclusion:
        """Entry `index` with the proof that it is in the log as it is now."""
        with self._lock:
            size = self.size()
            proof = self.inclusion(index, size)
            row = self._connection.execute("SELECT body FROM entry WHERE number = ?", (index,)).fetchone()
            return Inclusion(index, bytes(row[0]), proof, self._note(size))

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """The proof that entry `index` is in the tree of the first `size` entries (RFC 9162 section 2.1.3.1).

        Raises:
            LogError: if the log has no such tree or the tree no such entry.
        """
        with self._lock, readable():
            self._check(0 <= index < size <= self.size())
            return self._path(index, 0, size)

    def consistency(self, old: int, new: int) -> list[bytes]:
        """The proof that the first `new` entries begin with the first `old` (RFC 9162 section 2.1.4.1).

        Raises:
            LogError: if the log has no such trees.
        """
        with self._lock, readable():
            self._check(0 <= old <= new <= self.size())
            return self._subproof(old, 0, new, True) if 0 < old < new else []

    def _path(self, index: int, low: int, high: int) -> list[bytes]:
        if high - low == 1:
            return []
        middle = _split(low, high)
        if index < middle:
            return [*self._path(index, low, middle), self._root(middle, high)]
        return [*self._path(index, middle, high), self._root(low, middle)]

    def _subproof(self, old: int, low: int, high: int, whole: bool) -> list[bytes]:
        if old == high:
            return [] if whole else [self._root(low, high)]
        middle = _split(low, high)
        if old <= middle:
            return [*self._subproof(old, low, middle, whole), self._root(middle, high)]
        return [*self._subproof(old, middle, high, False), self._root(low, middle)]

    def _root(self, low: int, high: int) -> bytes:
        """The root hash over entries `low` to `high`, one of the ranges that RFC 9162 splits a tree into."""
        size = high - low
        if size & (size - 1) == 0:
            level = size.bit_length() - 1
            return self._stored(level, low >> level)
        middle = _split(low, high)
        return node_hash(self._root(low, middle), self._root(middle, high))

    def _stored(self, level: int, number: int) -> bytes:
        row = self._connection.execute(
            "SELECT hash FROM subtree WHERE level = ? AND number = ?", (level, number)
        ).fetchone()
        if row is None:
            raise unusable("a hash of the log is missing")
        return bytes(row[0])

    def _check(self, holds: bool) -> None:
        if not holds:
            raise LogError(
                "The log has no such entry.", "It is not as long as that.", "Ask for its checkpoint first."
            )


def _split(low: int, high: int) -> int:
    """Where RFC 9162 splits a range: after the largest power of two smaller than its length."""
    return low + (1 << ((high - low - 1).bit_length() - 1))


def _canonical(kind: Kind, fields: Mapping[str, object]) -> bytes:
    if kind not in get_args(Kind) or "kind" in fields or not all(map(_label, fields.values())):
        raise RequestError(
            "This is no entry of the log.",
            f"An entry of kind {kind!r} holds labels, hashes and whole numbers only.",
            f"The kinds are {', '.join(get_args(Kind))}.",
        )
    return msgspec.json.encode({"kind": kind, **fields}, order="sorted")


def _label(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_label, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return all(map(_label, value))
    return value is None or isinstance(value, int) or (isinstance(value, str) and len(value) <= 256)
