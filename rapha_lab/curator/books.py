"""The ledger's tables, and what the database itself holds true of them.

An account's `spent` is the sum of its charges, and `delta_spent` that of their δ, kept so by triggers alone. Charges
of a running job fit the budget when they are made and only ever fall; ended jobs and their charges stay for ever.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec

from rapha_lab.curator.accounting import DELTA_UNIT
from rapha_lab.curator.disk import readable, unusable
from rapha_lab.curator.log import SCHEMA as LOG_SCHEMA
from rapha_lab.protocol.errors import BudgetError, PolicyError

__all__ = ["ALL", "ENDS", "Account", "Statement", "check", "connect", "shrunk", "undiscovered"]

ALL = "*"
"""Stands for all projects of a dataset together, in the accounts that cap them; no project can have this name."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS account (
    number INTEGER PRIMARY KEY, project TEXT NOT NULL, dataset TEXT NOT NULL, split TEXT NOT NULL,
    epsilon REAL NOT NULL, delta REAL NOT NULL, alpha INTEGER NOT NULL, budget INTEGER NOT NULL,
    spent INTEGER NOT NULL CHECK (0 <= spent),
    UNIQUE (project, dataset, split)
) STRICT;
CREATE TABLE IF NOT EXISTS job (
    name TEXT PRIMARY KEY, state TEXT NOT NULL, request BLOB NOT NULL, basis BLOB NOT NULL, loss TEXT NOT NULL,
    touched INTEGER NOT NULL, release BLOB, tensors BLOB, entry INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS charge (
    account INTEGER NOT NULL REFERENCES account, job TEXT NOT NULL REFERENCES job,
    units INTEGER NOT NULL CHECK (0 <= units),
    PRIMARY KEY (account, job)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS charge_of_job ON charge (job);
CREATE INDEX IF NOT EXISTS open_job ON job (state) WHERE state = 'reserved';
CREATE INDEX IF NOT EXISTS settled_job ON job (request) WHERE state = 'settled';
CREATE TRIGGER IF NOT EXISTS job_stays BEFORE DELETE ON job BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS job_ended BEFORE UPDATE ON job WHEN old.state <> 'reserved'
    BEGIN SELECT RAISE(ABORT, 'ended jobs do not change'); END;
CREATE TRIGGER IF NOT EXISTS charge_stays BEFORE DELETE ON charge BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS charge_falls BEFORE UPDATE ON charge WHEN new.units > old.units
    BEGIN SELECT RAISE(ABORT, 'a charge only falls'); END;
CREATE TRIGGER IF NOT EXISTS charge_fits BEFORE INSERT ON charge
    WHEN (SELECT state FROM job WHERE name = new.job) = 'reserved'
     AND (SELECT spent + new.units > budget FROM account WHERE number = new.account)
    BEGIN SELECT RAISE(ABORT, 'over the budget'); END;
CREATE TRIGGER IF NOT EXISTS charge_made AFTER INSERT ON charge
    BEGIN UPDATE account SET spent = spent + new.units WHERE number = new.account; END;
CREATE TRIGGER IF NOT EXISTS charge_fell AFTER UPDATE ON charge
    BEGIN UPDATE account SET spent = spent + new.units - old.units WHERE number = new.account; END;
"""

TALLY = """
CREATE TABLE tally (
    account INTEGER NOT NULL, loss TEXT NOT NULL, ran INTEGER NOT NULL, times INTEGER NOT NULL,
    PRIMARY KEY (account, loss, ran)
) STRICT, WITHOUT ROWID;
INSERT INTO tally SELECT account, loss, CASE state WHEN 'reserved' THEN -1 ELSE touched END AS ran, count(*)
    FROM charge JOIN job ON name = job WHERE state <> 'void' GROUP BY account, loss, ran;
CREATE TRIGGER tallied AFTER INSERT ON charge BEGIN
    INSERT INTO tally SELECT new.account, loss, CASE state WHEN 'reserved' THEN -1 ELSE touched END, 1
        FROM job WHERE name = new.job AND state <> 'void' ON CONFLICT DO UPDATE SET times = times + 1;
END;
CREATE TRIGGER tallied_ended AFTER UPDATE OF state ON job WHEN old.state = 'reserved' AND new.state <> 'reserved' BEGIN
    UPDATE tally SET times = times - 1 WHERE loss = old.loss AND ran = -1
        AND account IN (SELECT account FROM charge WHERE job = new.name);
    DELETE FROM tally WHERE loss = old.loss AND ran = -1 AND times = 0
        AND account IN (SELECT account FROM charge WHERE job = new.name);
    INSERT INTO tally SELECT account, new.loss, new.touched, 1 FROM charge WHERE job = new.name AND new.state <> 'void'
        ON CONFLICT DO UPDATE SET times = times + 1;
END;
"""
"""How often an account paid for each loss and number of steps, -1 while they run: for statements, not for the filter."""

COLUMNS = (("account", "delta_budget"), ("account", "delta_spent"), ("charge", "delta"))
"""The δ of discovered keys, in units of 10^-18; a ledger of before there was one gets them when it is opened."""

TRIGGERS = """
CREATE TRIGGER IF NOT EXISTS delta_falls BEFORE UPDATE ON charge WHEN new.delta > old.delta
    BEGIN SELECT RAISE(ABORT, 'a charge only falls'); END;
CREATE TRIGGER IF NOT EXISTS delta_fits BEFORE INSERT ON charge
    WHEN (SELECT state FROM job WHERE name = new.job) = 'reserved'
     AND (SELECT delta_spent + new.delta > delta_budget FROM account WHERE number = new.account)
    BEGIN SELECT RAISE(ABORT, 'over the discovery delta'); END;
CREATE TRIGGER IF NOT EXISTS delta_made AFTER INSERT ON charge WHEN new.delta > 0
    BEGIN UPDATE account SET delta_spent = delta_spent + new.delta WHERE number = new.account; END;
CREATE TRIGGER IF NOT EXISTS delta_fell AFTER UPDATE ON charge WHEN new.delta < old.delta
    BEGIN UPDATE account SET delta_spent = delta_spent + new.delta - old.delta WHERE number = new.account; END;
"""


class Account(msgspec.Struct, frozen=True):
    """One row of the accounts."""

    number: int
    project: str
    dataset: str
    split: str
    epsilon: float
    delta: float
    alpha: int
    budget: int
    spent: int
    delta_budget: int
    delta_spent: int

    @property
    def label(self) -> str:
        """Its name in the log."""
        return f"{self.project}/{self.dataset}/{self.split}"

    @property
    def left(self) -> int:
        """In billionths; below zero if more was spent elsewhere than there was."""
        return self.budget - self.spent

    @property
    def delta_left(self) -> int:
        """What discoveries may still spend, in units of 10^-18."""
        return self.delta_budget - self.delta_spent


class Statement(msgspec.Struct, frozen=True):
    """What an account has spent and has left; epsilons all at the policy's `delta`, per patient.

    Attributes:
        epsilon: the budget.
        delta: the policy's δ.
        spent: guarantee of everything charged or reserved so far, composed; at most `epsilon`.
        left: `epsilon` - `spent`.
        room: the largest epsilon with which one further Gaussian answer is admitted; composition makes it
            larger than `left` after many small answers.
        jobs: how many jobs are charged or running.
        discovery: the δ that discoveries of keys may spend, beside `delta`.
        discovered: what of it is spent or reserved.
    """

    epsilon: float
    delta: float
    spent: float
    left: float
    room: float
    jobs: int
    discovery: float = 0.0
    discovered: float = 0.0


def connect(path: Path) -> sqlite3.Connection:
    """The database at `path`, created if there is none; every commit is on disk before it returns."""
    with readable():
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.executescript(f"BEGIN IMMEDIATE; {LOG_SCHEMA} {SCHEMA} COMMIT;")
        for table, column in COLUMNS:
            if not db.execute(
                "SELECT 1 FROM pragma_table_info(?) WHERE name = ?", (table, column)
            ).fetchone():
                db.execute(
                    f"ALTER TABLE {table} ADD COLUMN {column} INTEGER NOT NULL DEFAULT 0 CHECK (0 <= {column})"
                )
        db.executescript(f"BEGIN IMMEDIATE; {TRIGGERS} COMMIT;")
        if not db.execute("SELECT 1 FROM pragma_table_list WHERE name = 'tally'").fetchone():
            db.executescript(f"BEGIN IMMEDIATE; {TALLY} COMMIT;")
        return db


def check(db: sqlite3.Connection) -> None:
    """Raise SiteError unless every account's state is the sum of its charges."""
    wrong = db.execute(
        "SELECT 1 FROM account WHERE spent <>"
        " (SELECT coalesce(sum(units), 0) FROM charge WHERE account = number)"
        " OR delta_spent <> (SELECT coalesce(sum(delta), 0) FROM charge WHERE account = number)"
    ).fetchone()
    if wrong:
        raise unusable("an account is not the sum of its charges")


def shrunk(account: Account, epsilon: float, delta: float) -> PolicyError:
    """A policy signs less than the account has spent."""
    return PolicyError(
        f"The budget of {account.label} cannot become epsilon={epsilon:g} at delta={delta:g}.",
        "More than that is spent, which cannot be taken back, or held by a training that runs, which ends at its next step.",
        "Ask again in a moment; if it stays, sign a policy with a larger budget, or close the dataset.",
        field="epsilon",
    )


def undiscovered(account: Account) -> BudgetError:
    """A discovery of keys would spend more δ than the account has left."""
    whose = " of all projects together" if account.project == ALL else ""
    return BudgetError(
        f"This would overdraw the discovery_delta{whose} of {account.dataset}, split {account.split}.",
        f"Of {account.delta_budget / DELTA_UNIT:g}, {account.delta_left / DELTA_UNIT:g} is left.",
        "Ask with a smaller delta, group by public values, or ask the custodians for a larger discovery_delta.",
        field="delta",
    )


ENDS = {
    "void": "It ended before it touched a record, and cost nothing.",
    "stopped": "It was ended on the way; the steps that had run stay charged.",
    "lost": "The curator ended before it did; the steps that had run stay charged.",
    "settled": "It is settled.",
    "elsewhere": "It ran elsewhere.",
}
"""By a job's state, what to tell whoever takes it for open."""
