"""The privacy budget: reserved before a record is touched, charged with the release, never lost in a crash.

- An account is (project, dataset, split). Its state is one integer: the Rényi loss spent, in billionths, at
  one order, fixed with the account's first job. A reserved job counts in full. See docs/accounting.md.
- What discoveries of keys spend of δ is a second integer, moved in the same transactions by the same rules.
- An account of the project `ALL` caps what all projects of a dataset spend together: every job is charged to both.
- A job goes reserve → touch, touch, ... → settle or abandon, each one durable transaction (SQLite, WAL,
  synchronous=FULL). `touch` commits before the steps run, so a step that ran is always on the books.
- Opening the ledger ends what a crash left open, and any use of it what was given nothing to do for too long:
  the untouched is refunded, the touched stays spent.
- One process at a time holds a ledger, by a lock on a file beside it.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.curator import accounting
from rapha_lab.curator.accounting import (
    DELTA_UNIT,
    Gaussian,
    Loss,
    decode_loss,
    delta_budget,
    encode_loss,
    units,
)
from rapha_lab.curator.books import ALL, ENDS, Account, Statement, check, shrunk, undiscovered
from rapha_lab.curator.books import connect as _open
from rapha_lab.curator.disk import hold, readable
from rapha_lab.curator.log import Kind, Log
from rapha_lab.protocol.checkpoint import Receipt, open_checkpoint
from rapha_lab.protocol.errors import BudgetError, PolicyError, RequestError
from rapha_lab.protocol.quote import Standing

__all__ = ["ALL", "Ledger", "Statement"]

PATIENCE = 3600.0
"""Seconds for which a job may hold steps that it does not announce."""


class Ledger:
    """Opens the ledger at `path`, creating it if there is none, and ends what a crash left open.

    Args:
        path: the database file; its directory must exist.
        key: signs the log's checkpoints.
        origin: the log's name.
        about: labels that every charge carries, such as the sandbox's tier.
        patience: seconds for which a job may hold steps that it does not announce.
        clock: gives seconds; no jump of it loses or doubles a charge.

    Raises:
        SiteError: if another process has it open, or it cannot be read or written.
    """

    def __init__(
        self,
        path: Path,
        key: Ed25519PrivateKey,
        origin: str = "rapha-lab",
        about: Mapping[str, str] | None = None,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._about, self._patience, self._clock = dict(about or {}), patience, clock
        self._moved: dict[str, float] = {}  # jobs that hold steps, and when they last announced one
        self._lock = threading.RLock()
        self._key = key
        self._held = hold(path)
        try:
            self._db = _open(path)
            with readable():
                check(self._db)
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

    def open_account(
        self, project: str, dataset: str, split: str, epsilon: float, delta: float, discovery: float = 0.0
    ) -> None:
        """Make sure that the account has the budget (epsilon, delta), and a δ of `discovery` for discovered keys.

        A budget may change later; its order may not, once anything is spent. An account of `ALL` that is opened
        later than its projects' is charged what they have spent.

        Raises:
            PolicyError: if more is spent or reserved already than the new budget has.
            RequestError: naming `epsilon` or `delta`, if they allow no answer.
        """
        order = accounting.order_for(epsilon, delta)
        self._expire()
        with self._transaction() as db:
            old = self._find(project, dataset, split)
            further = delta_budget(discovery)
            if old and (old.epsilon, old.delta, old.delta_budget) == (epsilon, delta, further):
                return
            if old and self._used(old):
                order = accounting.Order(old.alpha, accounting.budget_at(old.alpha, epsilon, delta))
            db.execute(
                "INSERT INTO account VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, 0, ?, 0)"
                " ON CONFLICT (project, dataset, split) DO UPDATE SET epsilon = excluded.epsilon,"
                " delta = excluded.delta, alpha = excluded.alpha, budget = excluded.budget,"
                " delta_budget = excluded.delta_budget",
                (project, dataset, split, epsilon, delta, order.alpha, order.units, further),
            )
            account = self._account(project, dataset, split)
            running = self._catch_up(account) if project == ALL and not old else {}
            of_delta = {job: delta for job, (_, delta) in running.items() if delta}
            account = self._account(project, dataset, split)
            if account.left < 0 or account.delta_left < 0:
                raise shrunk(account, epsilon, delta)
            told = {
                "account": account.label,
                "alpha": order.alpha,
                "budget": order.units,
                "spent": account.spent,
                "delta_budget": account.delta_budget,
                "delta_spent": account.delta_spent,
            }
            self.log.append(
                db,
                "account",
                {
                    **told,
                    "epsilon": repr(epsilon),
                    "delta": repr(delta),
                    "running": {job: price for job, (price, _) in running.items()},
                    **({"delta_running": of_delta} if of_delta else {}),
                },
            )

    def _used(self, account: Account) -> bool:
        row = self._db.execute("SELECT 1 FROM charge WHERE account = ? AND units > 0", (account.number,))
        return row.fetchone() is not None

    def _catch_up(self, account: Account) -> dict[str, tuple[int, int]]:
        """Charge a new account of `ALL` what its projects have spent; gives the charges of the jobs that still run."""
        running = {}
        for job, state, text, touched in self._db.execute(
            "SELECT DISTINCT name, state, loss, touched FROM job JOIN charge ON job = name"
            " JOIN account ON number = account WHERE dataset = ? AND split = ? AND state <> 'void'",
            (account.dataset, account.split),
        ).fetchall():
            loss = decode_loss(text)
            loss = loss if state == "reserved" else loss.part(touched)
            price, delta = units(loss, account.alpha), loss.delta_units
            if state == "reserved":
                running[job] = price, delta
                now = self._numbered(account.number)
                if price > now.left or delta > now.delta_left:
                    raise shrunk(account, account.epsilon, account.delta)
            self._db.execute("INSERT INTO charge VALUES (?, ?, ?, ?)", (account.number, job, price, delta))
        return running

    def reserve(
        self,
        job: str,
        project: str,
        dataset: str,
        splits: Sequence[str],
        loss: Loss,
        request: bytes,
        basis: bytes = b"",
    ) -> None:
        """Charge all of `loss` to the accounts of all `splits`, the project's and those of `ALL`, or to none.

        Args:
            job: the job's name, which no other job ever had.
            project: whose account.
            dataset: of which dataset.
            splits: the splits whose patients will be looked at.
            loss: the worst case.
            request: the SHA-256 digest of the request.
            basis: a digest of what else makes another job's question the same one; never logged.

        Raises:
            BudgetError: if an account would be overdrawn; it says what is left and what would fit.
            RequestError: if the job exists, or the loss has no price.
            PolicyError: if an account does not exist.
        """
        self._expire()
        with self._transaction() as db:
            self._check_new(job)
            if len(request) != 32:
                raise RequestError("The request is not given by its SHA-256 digest.", field="request")
            accounts = self._charged_to(project, dataset, splits)
            for account in accounts:
                if units(loss, account.alpha) > account.left:
                    raise self._overdrawn(account, accounts, loss)
                if loss.delta_units > account.delta_left:
                    raise undiscovered(account)
            self._insert(db, job, "reserved", request, basis, loss, accounts)
            self._record("reserve", job, request=request.hex())
        self._moved[job] = self._clock()

    def add(
        self, name: str, project: str, dataset: str, splits: Sequence[str], loss: Loss, proof: bytes
    ) -> None:
        """Charge what was spent elsewhere, even beyond the budget, which closes the account; once a `name`.

        Args:
            name: of the spend; a second one of that name does nothing.
            project: whose spend, or `ALL` for none of the projects'.
            dataset: of which dataset.
            splits: whose patients were looked at.
            loss: what was lost.
            proof: the SHA-256 digest of the custodian's statement.

        Raises:
            PolicyError: if an account does not exist. RequestError: if the loss has no price.
        """
        job = f"elsewhere-{name}"
        with self._transaction() as db:
            if self.has(name):
                return
            self._insert(db, job, "elsewhere", proof, b"", loss, self._charged_to(project, dataset, splits))
            self._record("elsewhere", job, proof=proof.hex())

    def has(self, name: str) -> bool:
        """Whether a spend elsewhere of that name is charged already."""
        return self._of("name", f"elsewhere-{name}") is not None

    def _insert(
        self,
        db: sqlite3.Connection,
        job: str,
        state: str,
        request: bytes,
        basis: bytes,
        loss: Loss,
        accounts: list[Account],
    ) -> None:
        touched = loss.steps if state == "elsewhere" else 0
        row = job, state, request, basis, encode_loss(loss), touched
        db.execute("INSERT INTO job VALUES (?, ?, ?, ?, ?, ?, NULL, NULL, NULL)", row)
        for account in accounts:
            price = units(loss, account.alpha)
            db.execute(
                "INSERT INTO charge VALUES (?, ?, ?, ?)", (account.number, job, price, loss.delta_units)
            )

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
        if touched + steps < loss.steps:
            self._moved[job] = self._clock()
        else:
            self._moved.pop(job, None)

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
        self._moved.pop(job, None)
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
        self._moved.pop(job, None)

    def is_open(self, job: str) -> bool:
        """Whether the job was reserved and has not ended, by its own doing or for having waited too long."""
        self._expire()
        return self._of("state", job) == "reserved"

    def release_of(self, job: str) -> bytes | None:
        """What the job released, or None if it is unknown, open or released nothing."""
        release = self._of("release", job)
        return None if release is None else bytes(release)

    def settled(self, request: bytes, basis: bytes, job: str = "") -> tuple[bytes, bytes, Receipt] | None:
        """Release, tensors and receipt of the first job that was settled for this request, on this basis or as `job`.

        To give them again, to whoever had them, tells nothing new of a patient: neither a lost reply nor a
        question asked twice costs anything.
        """
        with self.reading() as db:
            row = db.execute(
                "SELECT name, release, tensors FROM job WHERE request = ? AND state = 'settled'"
                " AND (basis = ? OR name = ?) ORDER BY rowid LIMIT 1",
                (request, basis, job),
            ).fetchone()
            receipt = self.receipt_of(row[0]) if row else None
        return None if row is None or receipt is None else (bytes(row[1]), bytes(row[2]), receipt)

    def kept(self, job: str) -> tuple[bytes, Receipt] | None:
        """Tensors and receipt of a job that was settled."""
        with self.reading():
            tensors, receipt = self._of("tensors", job), self.receipt_of(job)
        return None if tensors is None or receipt is None else (bytes(tensors), receipt)

    def receipt_of(self, job: str) -> Receipt | None:
        """Proof that the job's charge is in the log as it is now, or None if it released nothing."""
        with self.reading() as db:
            row = db.execute("SELECT entry FROM job WHERE name = ? AND state = 'settled'", (job,)).fetchone()
            if row is None:
                return None
            note = self.log.checkpoint()
            size = open_checkpoint(note, self._key.public_key()).size
            return Receipt(job, row[0], self.log.entry(row[0]), self.log.inclusion(row[0], size), note)

    def statement(self, project: str, dataset: str, split: str) -> Statement:
        """What the account has spent and has left; its `room` is also that of the account of `ALL`.

        Raises:
            PolicyError: if there is no such account.
        """
        self._expire()
        with self.reading():
            accounts = self._charged_to(project, dataset, [split])
            spent, jobs = self._spent(accounts[0])
        account = accounts[0]
        room, left = _largest(Gaussian, accounts), account.epsilon - spent
        discovery = account.delta_budget / DELTA_UNIT, account.delta_spent / DELTA_UNIT
        return Statement(account.epsilon, account.delta, spent, left, room, jobs, *discovery)

    def quote(self, project: str, dataset: str, split: str, loss: Loss) -> Standing:
        """What `statement` would say after a job of this loss; reserves nothing and logs nothing.

        Binding as long as no other job is reserved meanwhile, since `reserve` compares the same numbers.

        Raises:
            PolicyError: if there is no such account.
            RequestError: if the loss has no price.
        """
        self._expire()
        with self.reading():
            accounts = self._charged_to(project, dataset, [split])
            prices = [units(loss, account.alpha) for account in accounts]
            before = self._spent(accounts[0])[0]
            found = all(loss.delta_units <= account.delta_left for account in accounts)
            fits = found and all(
                price <= account.left for price, account in zip(prices, accounts, strict=True)
            )
            discovery = min(account.delta_left for account in accounts) - loss.delta_units * fits
            spent = self._spent(accounts[0], loss)[0] if fits else before
        return Standing(
            epsilon=accounts[0].epsilon,
            before=before,
            fits=fits,
            spent=spent,
            left=accounts[0].epsilon - spent,
            room=_largest(Gaussian, accounts, prices if fits else None),
            largest=None if fits else _largest(loss.with_noise, accounts) if found else 0.0,
            discovery=discovery / DELTA_UNIT,
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
        with self._lock, readable():
            yield self._db

    def _recover(self) -> None:
        with self._transaction() as db:
            for (job,) in db.execute(
                "SELECT name FROM job WHERE state = 'reserved' ORDER BY rowid"
            ).fetchall():
                self._end(job, "recover", "lost", "the curator ended before the job did")

    def _expire(self) -> None:
        """End the jobs that have announced nothing for too long, whatever became of them."""
        with self._lock:
            now = self._clock()
            for job in [job for job, moved in self._moved.items() if now - moved > self._patience]:
                self.abandon(job, "timed out")

    def _end(self, job: str, kind: Kind, state: str, why: str) -> None:
        loss, touched = self._open_job(job)
        self._charge(job, loss.part(touched))
        entry = self._record(kind, job, why=why, steps=touched)
        self._db.execute(
            "UPDATE job SET state = ?, entry = ? WHERE name = ?", (state if touched else "void", entry, job)
        )

    def _charge(self, job: str, loss: Loss) -> None:
        """Replace what was reserved for the job by the price of `loss`."""
        for account, *_ in self._charges(job):
            keys = (units(loss, account.alpha), loss.delta_units, account.number, job)
            self._db.execute("UPDATE charge SET units = ?, delta = ? WHERE account = ? AND job = ?", keys)

    def _record(self, kind: Kind, job: str, **fields: object) -> int:
        """Log an event of a job with what each of its accounts was charged, and its head after it."""
        heads = {
            a.label: {"alpha": a.alpha, "charged": paid, "spent": a.spent}
            | ({"delta_charged": delta, "delta_spent": a.delta_spent} if a.delta_budget else {})
            for a, paid, delta in self._charges(job)
        }
        (loss,) = self._db.execute("SELECT loss FROM job WHERE name = ?", (job,)).fetchone()
        return self.log.append(self._db, kind, {"job": job, "accounts": heads, "loss": loss, **fields})

    def _charges(self, job: str) -> list[tuple[Account, int, int]]:
        rows = self._db.execute(
            "SELECT account, units, delta FROM charge WHERE job = ? ORDER BY account", (job,)
        ).fetchall()
        return [(self._numbered(number), price, delta) for number, price, delta in rows]

    def _spent(self, account: Account, further: Loss | None = None) -> tuple[float, int]:
        """The account's composed guarantee as an ε, with a `further` loss if given, and how many jobs it paid for."""
        rows = self._db.execute("SELECT loss, ran, times FROM tally WHERE account = ?", (account.number,))
        paid = [(decode_loss(text), ran, times) for text, ran, times in rows.fetchall()]
        losses = [(loss if ran < 0 else loss.part(ran), times) for loss, ran, times in paid]
        if further is not None:
            losses.append((further, 1))
        if not losses:
            return 0.0, 0
        epsilon = accounting.epsilon_of(accounting.Sum(losses), account.delta)
        return min(account.epsilon, epsilon), sum(times for _, times in losses)

    def _of(self, column: str, job: str) -> Any:
        """One of a job's columns, None if there is no such job."""
        with self.reading() as db:
            row = db.execute(f"SELECT {column} FROM job WHERE name = ?", (job,)).fetchone()  # noqa: S608
        return row[0] if row else None

    def _open_job(self, job: str) -> tuple[Loss, int]:
        row = self._db.execute("SELECT state, loss, touched FROM job WHERE name = ?", (job,)).fetchone()
        if row is None or row[0] != "reserved":
            state = "unknown" if row is None else row[0]
            raise RequestError(
                f"The job {job} is not open.",
                ENDS.get(state, "There is none."),
                "Start a new job.",
                field="job",
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

    def _charged_to(self, project: str, dataset: str, splits: Sequence[str]) -> list[Account]:
        """The accounts that a job is charged to: the project's, then those of all projects where there are any."""
        if not splits:
            raise RequestError("The job names no split.", "Nothing would be charged for it.", field="split")
        mine = [self._account(project, dataset, split) for split in sorted(set(splits))]
        caps = [self._find(ALL, dataset, account.split) for account in mine if project != ALL]
        return mine + [cap for cap in caps if cap is not None]

    def _account(self, project: str, dataset: str, split: str) -> Account:
        account = self._find(project, dataset, split)
        if account is None:
            raise PolicyError(
                f"The project {project} has no budget for {dataset}, split {split}.",
                "The custodians' policy gives it none.",
                "Ask the custodians.",
            )
        return account

    def _overdrawn(self, account: Account, accounts: list[Account], loss: Loss) -> BudgetError:
        fits = _largest(loss.with_noise, accounts)
        whose = " of all projects together" if account.project == ALL else ""
        spent = self._spent(account)[0]
        return BudgetError(
            f"This would overdraw the privacy budget{whose} of {account.dataset}, split {account.split}.",
            f"Of epsilon={account.epsilon:g} (delta={account.delta:g}) {account.epsilon - spent:.3g} is left; "
            "what answers cost together is no plain sum of epsilons.",
            f"The same request fits with epsilon={fits!r}." if fits else "Nothing more of this kind fits.",
            field="epsilon",
        )

    def _find(self, project: str, dataset: str, split: str) -> Account | None:
        return self._row("project = ? AND dataset = ? AND split = ?", project, dataset, split)

    def _numbered(self, number: int) -> Account:
        account = self._row("number = ?", number)
        assert account is not None
        return account

    def _row(self, where: str, *values: object) -> Account | None:
        row = self._db.execute(f"SELECT * FROM account WHERE {where}", values).fetchone()  # noqa: S608
        return None if row is None else Account(*row)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and durable once left; one at a time."""
        with self._lock, readable():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


def _largest(make: Callable[[float], Loss], accounts: list[Account], taken: list[int] | None = None) -> float:
    """The largest ε, at the first account's δ, with which one job more fits all `accounts` less what is `taken`."""
    lefts = [
        account.left - less for account, less in zip(accounts, taken or [0] * len(accounts), strict=True)
    ]
    delta = accounts[0].delta
    return min(
        accounting.largest_epsilon(make, account.alpha, left, delta)
        for account, left in zip(accounts, lefts, strict=True)
    )
