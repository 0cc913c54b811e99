"""The privacy budget: reserved before a record is touched, charged with the release, never lost in a crash.

- An account is (project, dataset, split). Its state is one integer: the Rényi loss spent, in billionths, at
  one order, fixed with the account's first job. A reserved job counts in full. See docs/accounting.md.
- A job goes reserve → touch, touch, ... → settle or abandon, each one durable transaction (SQLite, WAL,
  synchronous=FULL). `touch` commits before the steps run, so a step that ran is always on the books.
- Opening the ledger ends what a crash left open: the untouched is refunded, the touched stays spent.
- One process at a time holds a ledger, by a lock on a file beside it.
"""

from __future__ import annotations

import fcntl
import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.curator import accounting
from rapha_lab.curator.accounting import Gaussian, Loss, decode_loss, encode_loss, units
from rapha_lab.curator.log import SCHEMA as LOG_SCHEMA
from rapha_lab.curator.log import Kind, Log
from rapha_lab.protocol.checkpoint import Receipt, open_checkpoint
from rapha_lab.protocol.errors import BudgetError, PolicyError, RequestError, SiteError
from rapha_lab.protocol.quote import Standing

__all__ = ["Ledger", "Statement"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS account (
    number INTEGER PRIMARY KEY, project TEXT NOT NULL, dataset TEXT NOT NULL, split TEXT NOT NULL,
    epsilon REAL NOT NULL, delta REAL NOT NULL, alpha INTEGER NOT NULL, budget INTEGER NOT NULL,
    spent INTEGER NOT NULL CHECK (0 <= spent AND spent <= budget),
    UNIQUE (project, dataset, split)
) STRICT;
CREATE TABLE IF NOT EXISTS job (
    name TEXT PRIMARY KEY, state TEXT NOT NULL, request BLOB NOT NULL, loss TEXT NOT NULL,
    touched INTEGER NOT NULL, release BLOB, tensors BLOB, entry INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS charge (
    account INTEGER NOT NULL REFERENCES account, job TEXT NOT NULL REFERENCES job,
    units INTEGER NOT NULL CHECK (0 <= units),
    PRIMARY KEY (account, job)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS open_job ON job (state) WHERE state = 'reserved';
CREATE TRIGGER IF NOT EXISTS job_stays BEFORE DELETE ON job BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS job_ended BEFORE UPDATE ON job WHEN old.state <> 'reserved'
    BEGIN SELECT RAISE(ABORT, 'ended jobs do not change'); END;
"""


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
    """

    epsilon: float
    delta: float
    spent: float
    left: float
    room: float
    jobs: int


class _Account(msgspec.Struct, frozen=True):
    number: int
    project: str
    dataset: str
    split: str
    epsilon: float
    delta: float
    alpha: int
    budget: int
    spent: int

    @property
    def label(self) -> str:
        return f"{self.project}/{self.dataset}/{self.split}"


class _Sum:
    """The Rényi curve of several losses one after another, each so many times."""

    def __init__(self, losses: list[tuple[Loss, int]]) -> None:
        self._losses = losses

    def rdp(self, alpha: int) -> float:
        return sum(times * loss.rdp(alpha) for loss, times in self._losses)


class Ledger:
    """Opens the ledger at `path`, creating it if there is none, and ends what a crash left open.

    Args:
        path: the database file; its directory must exist.
        key: signs the log's checkpoints.
        origin: the log's name.
        about: labels that every charge carries, such as the sandbox's tier.

    Raises:
        SiteError: if another process has it open, or it cannot be read or written.
    """

    def __init__(
        self,
        path: Path,
        key: Ed25519PrivateKey,
        origin: str = "rapha-lab",
        about: Mapping[str, str] | None = None,
    ) -> None:
        self._about = dict(about or {})
        self._lock = threading.RLock()
        self._key = key
        self._held = _hold(path)
        try:
            self._db = _open(path)
            self.log = Log(self._db, self._lock, key, origin)
            self._recover()
        except BaseException:
            self._held.close()
            raise

    def close(self) -> None:
        """Give the ledger up for another process to open."""
        with self._lock:
            self._db.close()
            self._held.close()

    def open_account(self, project: str, dataset: str, split: str, epsilon: float, delta: float) -> None:
        """Make sure that the account has the budget (epsilon, delta).

        A budget may change later; its order may not, once anything is spent.

        Raises:
            PolicyError: if more is spent already than the new budget has.
            RequestError: naming `epsilon` or `delta`, if they allow no answer.
        """
        order = accounting.order_for(epsilon, delta)
        with self._transaction() as db:
            old = self._find(project, dataset, split)
            if old and (old.epsilon, old.delta) == (epsilon, delta):
                return
            if (
                old
                and db.execute(
                    "SELECT 1 FROM charge WHERE account = ? AND units > 0", (old.number,)
                ).fetchone()
            ):
                budget = accounting.budget_at(old.alpha, epsilon, delta)
                if budget < old.spent:
                    raise _shrunk(old, epsilon, delta)
                order = accounting.Order(old.alpha, budget)
            db.execute(
                "INSERT INTO account VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, 0)"
                " ON CONFLICT (project, dataset, split) DO UPDATE SET epsilon = excluded.epsilon,"
                " delta = excluded.delta, alpha = excluded.alpha, budget = excluded.budget",
                (project, dataset, split, epsilon, delta, order.alpha, order.units),
            )
            account = {"account": f"{project}/{dataset}/{split}", "alpha": order.alpha, "budget": order.units}
            self.log.append(db, "account", {**account, "epsilon": repr(epsilon), "delta": repr(delta)})

    def reserve(
        self, job: str, project: str, dataset: str, splits: Sequence[str], loss: Loss, request: bytes
    ) -> None:
        """Charge all of `loss` to the accounts of all `splits`, or to none.

        Args:
            job: the job's name, which no other job ever had.
            project: whose account.
            dataset: of which dataset.
            splits: the splits whose patients will be looked at.
            loss: the worst case.
            request: the SHA-256 digest of the request.

        Raises:
            BudgetError: if an account would be overdrawn; it says what is left and what would fit.
            RequestError: if the job exists, or the loss has no price.
            PolicyError: if an account does not exist.
        """
        with self._transaction() as db:
            self._check_new(job)
            if len(request) != 32:
                raise RequestError("The request is not given by its SHA-256 digest.", field="request")
            accounts = [self._account(project, dataset, split) for split in sorted(set(splits))]
            if not accounts:
                raise RequestError(
                    "The job names no split.", "Nothing would be charged for it.", field="split"
                )
            prices = [units(loss, account.alpha) for account in accounts]
            for account, price in zip(accounts, prices, strict=True):
                if account.spent + price > account.budget:
                    raise _overdrawn(account, loss, self._spent(account)[0])
            db.execute(
                "INSERT INTO job VALUES (?, 'reserved', ?, ?, 0, NULL, NULL, NULL)",
                (job, request, encode_loss(loss)),
            )
            for account, price in zip(accounts, prices, strict=True):
                db.execute("INSERT INTO charge VALUES (?, ?, ?)", (account.number, job, price))
                db.execute("UPDATE account SET spent = spent + ? WHERE number = ?", (price, account.number))
            self._record("reserve", job, request=request.hex())

    def touch(self, job: str, steps: int) -> None:
        """Journal, durably, that `steps` further steps are about to run; run them only once this returned.

        Raises:
            BudgetError: if that were more steps than were reserved.
            RequestError: if the job is not open, or `steps` is no positive whole number.
        """
        with self._transaction() as db:
            loss, touched = self._open_job(job)
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
                raise RequestError(
                    f"{steps!r} is no number of steps.", "A block has at least one.", field="steps"
                )
            if touched + steps > loss.steps:
                raise BudgetError(
                    "The job would run more steps than were reserved.",
                    f"It reserved {loss.steps} and would run {touched + steps}.",
                    "Reserve the steps to be run.",
                    field="steps",
                )
            db.execute("UPDATE job SET touched = touched + ? WHERE name = ?", (steps, job))

    def settle(
        self,
        job: str,
        release: bytes,
        tensors: bytes = b"",
        about: Mapping[str, str] | None = None,
        also: Callable[[sqlite3.Connection], object] = lambda db: None,
    ) -> Receipt:
        """Charge what was touched, refund the rest, keep the release and log it, all at once.

        Args:
            job: the job.
            release: what was answered, whose hash goes into the log; it names the hash of `tensors`.
            tensors: what was answered beside it.
            about: labels that this charge carries besides the site's own.
            also: what has to be true with the charge or not at all, in the same transaction.

        Raises:
            RequestError: if the job is not open, or touched nothing and so cannot have an answer.
        """
        with self._transaction() as db:
            loss, touched = self._open_job(job)
            if not touched:
                raise RequestError(
                    "A job that announced no step has nothing to release.",
                    "Its answer would be free whatever it looked at.",
                    "Announce each step before it runs.",
                )
            self._charge(job, loss.part(touched))
            digest = hashlib.sha256(release).hexdigest()
            labels = {**self._about, **(about or {})}
            entry = self._record("charge", job, release=digest, steps=touched, **labels)
            db.execute(
                "UPDATE job SET state = 'settled', release = ?, tensors = ?, entry = ? WHERE name = ?",
                (release, tensors, entry, job),
            )
            also(db)
        receipt = self.receipt_of(job)
        assert receipt is not None
        return receipt

    def abandon(self, job: str, why: str) -> None:
        """End a job without a release: refunded if nothing was touched, else charged for what was.

        Args:
            job: the job.
            why: a label for the log, such as "cancelled"; nothing read from a record.

        Raises:
            RequestError: if the job is not open.
        """
        with self._transaction():
            self._end(job, "abandon", "stopped", why)

    def release_of(self, job: str) -> bytes | None:
        """What the job released, or None if it is unknown, open or released nothing."""
        with self._lock:
            row = self._db.execute("SELECT release FROM job WHERE name = ?", (job,)).fetchone()
        return None if row is None or row[0] is None else bytes(row[0])

    def settled(self, job: str, request: bytes) -> tuple[bytes, bytes, Receipt] | None:
        """Release, tensors and receipt of a job that was settled for this very request, so that a lost reply is not lost."""
        with self._lock:
            row = self._db.execute(
                "SELECT release, tensors FROM job WHERE name = ? AND request = ? AND state = 'settled'",
                (job, request),
            ).fetchone()
            receipt = self.receipt_of(job) if row else None
        return None if row is None or receipt is None else (bytes(row[0]), bytes(row[1]), receipt)

    def kept(self, job: str) -> tuple[bytes, Receipt] | None:
        """Tensors and receipt of a job that was settled."""
        with self._lock:
            row = self._db.execute("SELECT tensors FROM job WHERE name = ?", (job,)).fetchone()
            receipt = self.receipt_of(job)
        return None if row is None or receipt is None else (bytes(row[0]), receipt)

    def receipt_of(self, job: str) -> Receipt | None:
        """Proof that the job's charge is in the log as it is now, or None if it released nothing."""
        with self._lock:
            row = self._db.execute(
                "SELECT entry FROM job WHERE name = ? AND state = 'settled'", (job,)
            ).fetchone()
            if row is None:
                return None
            note = self.log.checkpoint()
            size = open_checkpoint(note, self._key.public_key()).size
            body = self._db.execute("SELECT body FROM entry WHERE number = ?", row).fetchone()[0]
            return Receipt(job, row[0], bytes(body), self.log.inclusion(row[0], size), note)

    def statement(self, project: str, dataset: str, split: str) -> Statement:
        """What the account has spent and has left.

        Raises:
            PolicyError: if there is no such account.
        """
        with self._lock:
            account = self._account(project, dataset, split)
            spent, jobs = self._spent(account)
        left = account.budget - account.spent
        room = accounting.largest_epsilon(Gaussian, account.alpha, left, account.delta)
        return Statement(account.epsilon, account.delta, spent, account.epsilon - spent, room, jobs)

    def quote(self, project: str, dataset: str, split: str, loss: Loss) -> Standing:
        """What `statement` would say after a job of this loss; reserves nothing and logs nothing.

        Binding as long as no other job is reserved meanwhile, since `reserve` compares the same numbers.

        Raises:
            PolicyError: if there is no such account.
            RequestError: if the loss has no price.
        """
        with self._lock:
            account = self._account(project, dataset, split)
            price = units(loss, account.alpha)
            before = self._spent(account)[0]
            fits = account.spent + price <= account.budget
            spent = self._spent(account, loss)[0] if fits else before
        left = account.budget - account.spent

        def largest(make: Callable[[float], Loss], left: int) -> float:
            return accounting.largest_epsilon(make, account.alpha, left, account.delta)

        return Standing(
            epsilon=account.epsilon,
            before=before,
            fits=fits,
            spent=spent,
            left=account.epsilon - spent,
            room=largest(Gaussian, left - price if fits else left),
            largest=None if fits else largest(loss.with_noise, left),
        )

    def record(self, kind: Kind, **fields: object) -> int:
        """Log what is no charge, such as a policy or a cell's hash; its index in the log."""
        with self._transaction() as db:
            return self.log.append(db, kind, fields)

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """The ledger's database, for what is kept beside the accounts: all or nothing, and durable once left."""
        return self._transaction()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The ledger's database, to read from while nobody writes."""
        with self._lock, _readable():
            yield self._db

    def _recover(self) -> None:
        with self._transaction() as db:
            for (job,) in db.execute(
                "SELECT name FROM job WHERE state = 'reserved' ORDER BY rowid"
            ).fetchall():
                self._end(job, "recover", "lost", "the curator ended before the job did")

    def _end(self, job: str, kind: Kind, state: str, why: str) -> None:
        loss, touched = self._open_job(job)
        self._charge(job, loss.part(touched))
        entry = self._record(kind, job, why=why, steps=touched)
        self._db.execute(
            "UPDATE job SET state = ?, entry = ? WHERE name = ?", (state if touched else "void", entry, job)
        )

    def _charge(self, job: str, loss: Loss) -> None:
        """Replace what was reserved for the job by the price of `loss`."""
        for account, reserved in self._charges(job):
            price = units(loss, account.alpha)
            keys = (account.number, job)
            self._db.execute("UPDATE charge SET units = ? WHERE account = ? AND job = ?", (price, *keys))
            self._db.execute(
                "UPDATE account SET spent = spent + ? WHERE number = ?", (price - reserved, account.number)
            )

    def _record(self, kind: Kind, job: str, **fields: object) -> int:
        """Log an event of a job with what each of its accounts was charged, and its head after it."""
        heads = {
            a.label: {"alpha": a.alpha, "charged": paid, "spent": a.spent} for a, paid in self._charges(job)
        }
        (loss,) = self._db.execute("SELECT loss FROM job WHERE name = ?", (job,)).fetchone()
        return self.log.append(self._db, kind, {"job": job, "accounts": heads, "loss": loss, **fields})

    def _charges(self, job: str) -> list[tuple[_Account, int]]:
        rows = self._db.execute(
            "SELECT account, units FROM charge WHERE job = ? ORDER BY account", (job,)
        ).fetchall()
        return [(self._numbered(number), price) for number, price in rows]

    def _spent(self, account: _Account, further: Loss | None = None) -> tuple[float, int]:
        """The account's composed guarantee as an ε, with a `further` loss if given, and how many jobs it paid for."""
        rows = self._db.execute(
            "SELECT loss, CASE state WHEN 'reserved' THEN NULL ELSE touched END AS ran, count(*) FROM charge"
            " JOIN job ON name = job WHERE account = ? AND state <> 'void' GROUP BY loss, ran",
            (account.number,),
        ).fetchall()
        losses = [(decode_loss(loss), ran, times) for loss, ran, times in rows]
        if further is not None:
            losses.append((further, None, 1))
        if not losses:
            return 0.0, 0
        total = _Sum([(loss if ran is None else loss.part(ran), times) for loss, ran, times in losses])
        epsilon = accounting.epsilon_of(total, account.delta)
        return min(account.epsilon, epsilon), sum(times for *_, times in losses)

    def _open_job(self, job: str) -> tuple[Loss, int]:
        row = self._db.execute("SELECT state, loss, touched FROM job WHERE name = ?", (job,)).fetchone()
        if row is None or row[0] != "reserved":
            state = "unknown" if row is None else row[0]
            raise RequestError(
                f"The job {job} is not open.", f"It is {state}.", "Start a new job.", field="job"
            )
        return decode_loss(row[1]), row[2]

    def _check_new(self, job: str) -> None:
        if self._db.execute("SELECT 1 FROM job WHERE name = ?", (job,)).fetchone():
            raise RequestError(
                f"There is a job {job} already.",
                "A job runs once: to look again is a new job with its own charge.",
                "Ask for that job's release, or start a new one.",
                field="job",
            )

    def _account(self, project: str, dataset: str, split: str) -> _Account:
        account = self._find(project, dataset, split)
        if account is None:
            raise PolicyError(
                f"The project {project} has no budget for {dataset}, split {split}.",
                "The custodians' policy gives it none.",
                "Ask the custodians.",
            )
        return account

    def _find(self, project: str, dataset: str, split: str) -> _Account | None:
        return self._row("project = ? AND dataset = ? AND split = ?", project, dataset, split)

    def _numbered(self, number: int) -> _Account:
        account = self._row("number = ?", number)
        assert account is not None
        return account

    def _row(self, where: str, *values: object) -> _Account | None:
        row = self._db.execute(f"SELECT * FROM account WHERE {where}", values).fetchone()  # noqa: S608
        return None if row is None else _Account(*row)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and durable once left; one at a time."""
        with self._lock, _readable():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


def _hold(path: Path) -> IO[bytes]:
    """An exclusive lock for this process; the kernel gives it back however the process ends."""
    try:
        held = Path(f"{path}.lock").open("ab")  # noqa: SIM115
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise SiteError(
            "The ledger is open in another process.",
            "Two curators on one ledger could spend the same budget twice.",
            "Stop the other curator first.",
        ) from None
    except OSError as error:
        raise _unusable(error) from None
    return held


def _open(path: Path) -> sqlite3.Connection:
    with _readable():
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.executescript(f"BEGIN IMMEDIATE; {LOG_SCHEMA} {SCHEMA} COMMIT;")
        return db


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> SiteError:
    return SiteError(
        "The ledger cannot be read or written, so nothing was released.",
        f"The system says: {error}.",
        "The site's operator has to look at its disk; what was reserved stays spent until then.",
    )


def _shrunk(account: _Account, epsilon: float, delta: float) -> PolicyError:
    return PolicyError(
        f"The budget of {account.label} cannot become epsilon={epsilon:g} at delta={delta:g}.",
        "More than that is spent already, and what was released cannot be taken back.",
        "Sign a policy with a larger budget, or close the dataset.",
        field="epsilon",
    )


def _overdrawn(account: _Account, loss: Loss, spent: float) -> BudgetError:
    left = account.budget - account.spent
    fits = accounting.largest_epsilon(loss.with_noise, account.alpha, left, account.delta)
    return BudgetError(
        f"This would overdraw the privacy budget of {account.dataset}, split {account.split}.",
        f"Of epsilon={account.epsilon:g} (delta={account.delta:g}) {account.epsilon - spent:.3g} is left.",
        f"The same request fits with epsilon={fits!r}." if fits else "Nothing more of this kind fits.",
        field="epsilon",
    )
