"""The airlock: what may leave, or run, only once custodians have approved the very document that describes it.

Two kinds of things wait here. An *answer* was computed, charged and logged, and waits in the same transaction.
A *function* of the review lane waits before it has touched anything. Each is known by its subject, the SHA-256
of a document that binds all there is to it: any change is another subject and needs new approvals.

One custodian's refusal closes a subject for good. Everything survives a restart, for it is in the ledger's database.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from rapha_lab.curator.ledger import Ledger
from rapha_lab.protocol.decision import Decision, subject_of
from rapha_lab.protocol.errors import PolicyError, RefusedError, RequestError, WaitingError
from rapha_lab.protocol.policy import Policy, Release

__all__ = ["Airlock", "Held"]

SCHEMA = (
    """
CREATE TABLE IF NOT EXISTS airlock (
    number INTEGER PRIMARY KEY, subject TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, job TEXT NOT NULL,
    researcher TEXT NOT NULL, project TEXT NOT NULL, dataset TEXT NOT NULL, lane TEXT NOT NULL,
    mode TEXT NOT NULL, document BLOB NOT NULL, findings BLOB NOT NULL, time INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'approved', 'refused'))
) STRICT""",
    """
CREATE TABLE IF NOT EXISTS decision (
    subject TEXT NOT NULL, key TEXT NOT NULL, act TEXT NOT NULL, policy TEXT NOT NULL, decision BLOB NOT NULL,
    PRIMARY KEY (subject, key, act, policy)
) STRICT, WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS airlock_inputs (subject TEXT PRIMARY KEY, tensors BLOB NOT NULL) STRICT",
    "CREATE INDEX IF NOT EXISTS airlock_job ON airlock (job)",
    """
CREATE TRIGGER IF NOT EXISTS airlock_refused BEFORE UPDATE ON airlock WHEN old.state = 'refused'
    BEGIN SELECT RAISE(ABORT, 'what was refused stays refused'); END""",
)
MOST_WAITING = 20
"""Things of one researcher that may wait at once: more, and custodians would sign without reading."""

NEEDED: dict[Release, int] = {"auto": 0, "one custodian": 1, "two custodians": 2}
_NAMES = "subject kind job researcher project dataset lane mode document findings time state".split()
_COLUMNS = ", ".join(_NAMES)


class Held(msgspec.Struct, frozen=True):
    """One thing in the airlock; `findings` are those of the automatic checks, for custodians alone."""

    subject: str
    kind: Literal["answer", "function"]
    job: str
    researcher: str
    project: str
    dataset: str
    lane: str
    mode: Release
    document: bytes
    findings: list[str]
    time: int
    state: Literal["waiting", "approved", "refused"] = "waiting"

    def summary(self) -> dict[str, Any]:
        """What its researcher, too, may see of it."""
        told = msgspec.to_builtins(self)
        return {name: told[name] for name in told if name not in ("document", "findings")}


class Airlock:
    """Keeps what waits for custodians, and takes their decisions.

    Args:
        ledger: its database and log are used.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        with ledger.transaction() as db:
            for line in SCHEMA:
                db.execute(line)

    def hold(
        self, db: sqlite3.Connection, kind: Literal["answer", "function"], document: bytes, **about: Any
    ) -> None:
        """Let a document wait, within the transaction of `db`.

        Args:
            db: the ledger's database, in a transaction.
            kind: whether it already has an answer.
            document: what will be decided on, in canonical JSON.
            about: the remaining fields of `Held`.
        """
        held = Held(subject_of(document), kind, document=document, time=int(time.time()), **about)
        row = [getattr(held, name) for name in _NAMES]
        row[_NAMES.index("findings")] = msgspec.json.encode(held.findings)
        places = ", ".join("?" * len(row))
        db.execute(f"INSERT INTO airlock ({_COLUMNS}) VALUES ({places})", row)  # noqa: S608
        labels = {
            name: getattr(held, name) for name in ("job", "subject", "lane", "mode", "project", "dataset")
        }
        self._ledger.log.append(db, "airlock", {"what": kind, "researcher": held.researcher, **labels})

    def propose(self, document: bytes, tensors: bytes, **about: Any) -> None:
        """Let a function wait with its inputs, if this very one does not already.

        Raises:
            RequestError: too much of this researcher's waits already.
        """
        with self._ledger.transaction() as db:
            if self._find(db, "subject = ?", subject_of(document)) == []:
                self._hold_few(db, about["researcher"])
                self.hold(db, "function", document, **about)
                if tensors:
                    db.execute("INSERT INTO airlock_inputs VALUES (?, ?)", (subject_of(document), tensors))

    def room(self, researcher: str) -> None:
        """Raise RequestError if no further answer of this researcher's may come to wait."""
        with self._ledger.reading() as db:
            self._hold_few(db, researcher)

    def _hold_few(self, db: sqlite3.Connection, researcher: str) -> None:
        row = "SELECT count(*) FROM airlock WHERE state = 'waiting' AND researcher = ?", (researcher,)
        if db.execute(*row).fetchone()[0] >= MOST_WAITING:
            raise RequestError(
                "Too much of yours waits for the custodians.",
                f"{MOST_WAITING} things of one researcher may, so that each is read.",
                "Wait until they have decided on some; site.airlock() shows what waits.",
                field="op",
            )

    def pass_answer(self, job: str) -> None:
        """Return if the answer of `job` may leave: it was approved, or never had to wait.

        Raises:
            WaitingError, RefusedError: it may not, or not yet.
        """
        for held in self._rows("kind = 'answer' AND job = ?", job):
            self._pass(held)

    def pass_function(self, document: bytes) -> None:
        """Return if this very function was approved; otherwise as `pass_answer`, also if it is not known."""
        for held in self._rows("kind = 'function' AND subject = ?", subject_of(document)):
            return self._pass(held)
        raise PolicyError("The function was never proposed to the custodians.")

    def _pass(self, held: Held) -> None:
        what = "answer" if held.kind == "answer" else "function"
        if held.state == "waiting":
            many = "two custodians" if self._missing(held) == 2 else "a custodian"
            raise WaitingError(
                f"The {what} waits for {many}.",
                f"The policy has answers of the lane {held.lane} released by {held.mode}.",
                "The cell goes on by itself once they decided; site.airlock() shows what waits.",
                field=held.subject,
            )
        if held.state == "refused":
            reasons = [d.reason for d in self._decisions(held.subject) if d.act == "refuse" and d.reason]
            raise RefusedError(
                f"A custodian refused the {what}.",
                " ".join(reasons) or "They gave no reason.",
                "Ask the custodians, or change it.",
            )

    def answer(self, researcher: str, subject: str) -> Held:
        """The answer of that subject, which must be this researcher's.

        Raises:
            RequestError: they have none of it here.
        """
        found = self._rows("kind = 'answer' AND subject = ? AND researcher = ?", subject, researcher)
        if not found:
            raise RequestError(
                "You have no such answer in the airlock.", "", "See site.airlock().", field="subject"
            )
        return found[0]

    def listed(self, key: str, policy: Policy) -> list[dict[str, Any]]:
        """What the holder of `key` may know of: all for a custodian, else their own; newest last."""
        where, values = ("1", ()) if _custodian(policy, key) else ("researcher = ?", (key,))
        return [
            held.summary() | {"missing": self._missing(held) if held.state == "waiting" else 0}
            for held in self._rows(where, *values)
        ]

    def show(self, key: str, subject: str, policy: Policy) -> dict[str, Any]:
        """All of one thing, for a custodian, and that it was shown in the log.

        Raises:
            PolicyError: the key is no custodian's. RequestError: there is no such thing.
        """
        _only_custodians(policy, key)
        held = self._known(subject)
        with self._ledger.transaction() as db:
            self._ledger.log.append(db, "shown", {"subject": subject, "key": key})
        decided = [
            {"act": d.act, "key": d.key, "time": d.time, "reason": d.reason} for d in self._decisions(subject)
        ]
        told = {"document": held.document.decode(), "findings": held.findings, "decisions": decided}
        return held.summary() | told | {"missing": self._missing(held), "policy": policy.hash.hex()}

    def inputs(self, key: str, subject: str, policy: Policy) -> bytes:
        """The tensors that a function was proposed with, safetensors, for a custodian: its researcher sent them.

        Raises:
            PolicyError: the key is no custodian's.
        """
        _only_custodians(policy, key)
        with self._ledger.reading() as db:
            row = db.execute("SELECT tensors FROM airlock_inputs WHERE subject = ?", (subject,)).fetchone()
        return bytes(row[0]) if row else b""

    def approved_before(self, subject: str) -> bytes | None:
        """The document of the function last approved in that project, to compare a new one with."""
        held = self._known(subject)
        where = "kind = 'function' AND state = 'approved' AND project = ? AND dataset = ? AND subject <> ?"
        found = self._rows(where, held.project, held.dataset, held.subject)
        when = {
            each.subject: max((d.time for d in self._decisions(each.subject)), default=0) for each in found
        }
        return max(found, key=lambda each: when[each.subject]).document if found else None

    def decide(self, decision: Decision, policy: Policy) -> dict[str, Any]:
        """Take a custodian's decision; with it logged, the thing may be approved or refused.

        Raises:
            PolicyError: it is no custodian's of the policy in force, its signature does not hold, or it comes too late.
            RequestError: there is no such thing.
        """
        _only_custodians(policy, decision.key)
        if decision.policy != policy.hash.hex() or not decision.holds():
            raise PolicyError(
                "The decision does not hold.",
                "It was made under another policy, or its signature is of other bytes.",
                "Look at what waits again, and decide again.",
            )
        with self._ledger.transaction() as db:
            held = self._known(decision.subject)
            if held.state == "refused" or (held.state == "approved" and held.kind == "answer"):
                raise PolicyError(f"It was {held.state} already.", "What has left cannot be called back.")
            row = decision.subject, decision.key, decision.act, decision.policy, msgspec.json.encode(decision)
            fresh = db.execute("INSERT OR IGNORE INTO decision VALUES (?, ?, ?, ?, ?)", row).rowcount
            if fresh:
                self._ledger.log.append(db, "decision", decision.logged())
            state = "refused" if decision.act == "refuse" else held.state
            if state == "waiting" and self._missing(held, policy) == 0:
                state = "approved"
            db.execute("UPDATE airlock SET state = ? WHERE subject = ?", (state, held.subject))
        return self._known(decision.subject).summary()

    def _missing(self, held: Held, policy: Policy | None = None) -> int:
        """How many custodians have still to approve; under `policy`, only its own and only what they said of it."""
        said = {(d.key, d.policy) for d in self._decisions(held.subject) if d.act == "approve"}
        needed = NEEDED[held.mode]
        if policy is not None:
            mode = policy.allows(held.researcher, held.project, held.dataset, held.lane)
            keys = {c.key for c in policy.custodians}
            needed = max(needed, NEEDED[mode])
            said = {(key, of) for key, of in said if key in keys and of == policy.hash.hex()}
        return max(0, needed - len({key for key, _ in said}))

    def _decisions(self, subject: str) -> list[Decision]:
        with self._ledger.reading() as db:
            rows = db.execute("SELECT decision FROM decision WHERE subject = ?", (subject,)).fetchall()
        return sorted((Decision.decode(bytes(row[0])) for row in rows), key=lambda d: d.time)

    def _known(self, subject: str) -> Held:
        found = self._rows("subject = ?", subject)
        if not found:
            raise RequestError(
                "There is no such thing in the airlock.", "", "See what is listed.", field="subject"
            )
        return found[0]

    def _rows(self, where: str, *values: str) -> list[Held]:
        with self._ledger.reading() as db:
            return self._find(db, where, *values)

    @staticmethod
    def _find(db: sqlite3.Connection, where: str, *values: str) -> list[Held]:
        rows = db.execute(f"SELECT {_COLUMNS} FROM airlock WHERE {where} ORDER BY number", values)  # noqa: S608
        return [_held(row) for row in rows.fetchall()]


def _held(row: Sequence[Any]) -> Held:
    named = dict(zip(_NAMES, row, strict=True))
    return Held(**named | {"document": bytes(row[8]), "findings": msgspec.json.decode(row[9])})


def _custodian(policy: Policy, key: str) -> bool:
    return any(c.key == key for c in policy.custodians)


def _only_custodians(policy: Policy, key: str) -> None:
    if not _custodian(policy, key):
        raise PolicyError("Only custodians decide here.", f"The policy in force does not name {key}.")
