"""The policy in force at this site, read anew for every request, and what of it must never be forgotten.

A new page is taken only if the custodians of the page before it agree; that page is kept in the ledger's
database, and so is every veto and revocation once it was seen: a line that vanishes from the file of statements
opens nothing again.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

import msgspec

from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.watched import Watched
from rapha_lab.protocol.errors import PolicyError
from rapha_lab.protocol.policy import Policy, Signed, Statement

__all__ = ["InForce"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS page (number INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS closing (statement BLOB PRIMARY KEY) STRICT, WITHOUT ROWID;
"""


class InForce:
    """Call it for the policy as it stands; PolicyError if there is none in force.

    Args:
        path: the page; its statements are beside it, `path` + ".signatures".
        ledger: remembers the page in force and what closed one.
        admits: raises PolicyError if a page does not let this enclave serve what it serves.
    """

    def __init__(
        self, path: str | Path, ledger: Ledger, admits: Callable[[Policy], None] = lambda policy: None
    ) -> None:
        self._admits = admits
        self._path, self._ledger, self._lock = Path(path), ledger, threading.Lock()
        self._found = Watched(lambda: Signed.load(path), path, f"{path}.signatures")
        with ledger.transaction() as db:
            for line in SCHEMA.strip().splitlines():
                db.execute(line)
            row = db.execute("SELECT text FROM page ORDER BY number DESC LIMIT 1").fetchone()
            said = db.execute("SELECT statement FROM closing").fetchall()
        self._before = Policy.parse(row[0]) if row else None
        self._closings = {Statement.decode(bytes(line)) for (line,) in said}
        self._recorded: bytes | None = None
        self._last: tuple[Signed, date, Policy] | None = None

    def __call__(self) -> Policy:
        """The policy in force now; verified once a day for the very same bytes, since a loop asks a thousand times."""
        with self._lock:
            found, today = self._found(), datetime.now(UTC).date()
            if self._last is not None and self._last[:2] == (found, today):
                return self._last[2]
            self._last = None
            self._remember(found)
            signed = Signed(found.text, tuple({*found.statements, *self._closings}))
            policy = signed.check(after=self._before)
            if policy.hash != self._recorded:
                self._succeed(policy)
            self._admits(
                policy
            )  # a page that closes this enclave is in force all the same: none before it is
            self._last = found, today, policy
            return policy

    def state(self, statement: Statement) -> None:
        """Take a custodian's veto or revocation that came over the network.

        Raises:
            PolicyError: it is no custodian's, or not of the page in force.
        """
        policy = self()
        ours = statement.policy == policy.hash.hex() and statement.act in ("veto", "revoke")
        if not ours or not self._closes(statement, policy):
            raise PolicyError(
                "This statement closes nothing here.",
                "It is no custodian's veto or revocation of the policy in force.",
                "Make it with rapha-lab review veto.",
            )
        with self._lock, Path(f"{self._path}.signatures").open("ab") as file:
            file.write(msgspec.json.encode(statement) + b"\n")
        with self._lock:
            self._last = None
            self._remember(self._found())

    def _closes(self, statement: Statement, *judges: Policy | None) -> bool:
        keys = {c.key for policy in judges if policy is not None for c in policy.custodians}
        return statement.act != "sign" and statement.key in keys and statement.holds()

    def _remember(self, found: Signed) -> None:
        """Keep the closings that are new; done before anything is checked, since a veto ends the check."""
        fresh = [s for s in found.statements if s.act != "sign" and s not in self._closings]
        if not fresh:
            return
        judges = self._before, Policy.parse(found.text)
        for statement in fresh:
            if self._closes(statement, *judges):
                self._keep(statement)
                self._closings.add(statement)

    def _keep(self, statement: Statement) -> None:
        told = {"act": statement.act, "policy": statement.policy, "key": statement.key}
        with self._ledger.transaction() as db:
            db.execute("INSERT OR IGNORE INTO closing VALUES (?)", (msgspec.json.encode(statement),))
            self._ledger.log.append(db, "statement", told | {"subject": statement.subject})

    def _succeed(self, policy: Policy) -> None:
        with self._ledger.transaction() as db:
            if self._before is None or self._before.hash != policy.hash:
                self._insert(db, policy)
            told = {"hash": policy.hash.hex(), "version": policy.head.version, "quorum": policy.head.quorum}
            self._ledger.log.append(db, "policy", told)
        self._before, self._recorded = policy, policy.hash

    @staticmethod
    def _insert(db: sqlite3.Connection, policy: Policy) -> None:
        db.execute("INSERT INTO page VALUES (NULL, ?)", (policy.text,))
