"""SIGKILL at every statement the ledger makes and between them: what ran is charged, what did not is not.

A child process runs a story of jobs and writes down, in a file that survives it, what it asked for, what it
ran and what it released. It is killed at its n-th point: each SQL statement and each step of the story is
one. Another child recovers, is killed on the way too, and the ledger is then held against the notes.
The same checks must catch every deliberate mistake in `MISTAKES`, or they prove nothing.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.curator import ledger as ledger_module
from rapha_lab.curator.accounting import UNIT, Gaussian, Nothing, SampledGaussian, order_for
from rapha_lab.curator.ledger import Ledger
from rapha_lab.protocol.checkpoint import open_checkpoint, root_of, verify_receipt
from rapha_lab.protocol.errors import BudgetError, RaphaError, RequestError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ACCOUNT = ("risk", "flchain")
SPLITS = ("train", "test")
NOISE, STEPS = 37.0, 6
LOSS = SampledGaussian(1.0, NOISE, STEPS)
HUGE = Gaussian(4.6)
ORDER = order_for(1.0, 1e-6)
POINTS = 640  # more than a story with a mistake has
STRIDE = 1 if os.environ.get("RAPHA_LAB_DEEP") else 6


class Witness:
    """What really happened, on disk before the next thing happens."""

    def __init__(self, path: Path, killed_at: int | None) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._left = killed_at
        self.points = 0

    def point(self, *_: object) -> None:
        self.points += 1
        if self._left is not None and self.points > self._left:
            os.kill(os.getpid(), signal.SIGKILL)

    def note(self, what: str, job: str, steps: int = 0) -> None:
        os.write(self._file, json.dumps([what, job, steps]).encode() + b"\n")
        self.point()


def run_steps(ledger: Ledger, witness: Witness, job: str, blocks: tuple[int, ...]) -> None:
    """Journal each block, then look at the records."""
    for steps in blocks:
        witness.note("asks", job, steps)
        ledger.touch(job, steps)
        witness.point()
        witness.note("ran", job, steps)


def train(ledger: Ledger, witness: Witness, job: str, blocks: tuple[int, ...] = (2, 1, 2)) -> None:
    """What the desk does with a job, in the desk's order."""
    ledger.reserve(job, *ACCOUNT, SPLITS, LOSS, bytes(32))
    witness.point()
    run_steps(ledger, witness, job, blocks)
    ledger.settle(job, job.encode())
    witness.note("released", job)


def story(ledger: Ledger, witness: Witness, train: Callable = train) -> None:
    """Jobs that end in every way there is, one of them overlapping with others."""
    for split in SPLITS:
        ledger.open_account(*ACCOUNT, split, 1.0, 1e-6)
    ledger.reserve("slow", *ACCOUNT, SPLITS, LOSS, bytes(32))
    with contextlib.suppress(BudgetError):
        train_huge(ledger, witness)
    for _ in range(2):
        with contextlib.suppress(BudgetError, RequestError):
            train(ledger, witness, "whole")
    ledger.reserve("idle", *ACCOUNT, SPLITS, LOSS, bytes(32))
    run_steps(ledger, witness, "slow", (3,))
    ledger.abandon("idle", "cancelled")
    ledger.abandon("slow", "cancelled")
    train(ledger, witness, "again", (1,))


def train_huge(ledger: Ledger, witness: Witness) -> None:
    """Fits in an empty account, but not beside a reserved job."""
    ledger.reserve("huge", *ACCOUNT, SPLITS, HUGE, bytes(32))
    run_steps(ledger, witness, "huge", (1,))
    ledger.settle("huge", b"huge")


def in_child(act: Callable[[], object]) -> tuple[int, object]:
    """The exit code (negative for a signal) and JSON result of `act` in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(act()).encode())
            os._exit(0)
        except RaphaError as error:
            os.write(writer, json.dumps(repr(error)).encode())
            os._exit(1)
        finally:
            os._exit(2)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, json.loads(said) if said else None


def opened(kind: type[Ledger], path: Path, witness: Witness) -> Ledger:
    """A ledger each of whose SQL statements is a point."""
    honest = ledger_module._open

    def traced(path: Path):
        db = honest(path)
        db.set_trace_callback(witness.point)
        return db

    ledger_module._open = traced
    return kind(path, KEY)


class World:
    """One ledger, killed and recovered."""

    def __init__(self, folder: Path, kind: type[Ledger] = Ledger, play: Callable = story) -> None:
        folder.mkdir()
        self.path, self.notes, self.kind, self.play = folder / "ledger.db", folder / "notes", kind, play
        self.notes.touch()

    def live(self, killed_at: int | None = None) -> tuple[int, object]:
        def act() -> int:
            witness = Witness(self.notes, killed_at)
            self.play(opened(self.kind, self.path, witness), witness)
            return witness.points

        return in_child(act)

    def recover(self, killed_at: int | None = None) -> tuple[int, object]:
        def act() -> int:
            witness = Witness(self.notes, killed_at)
            opened(self.kind, self.path, witness).close()
            return witness.points

        return in_child(act)

    def faults(self) -> list[str]:
        """What of the promise doesn't hold now."""
        code, found = in_child(lambda: faults(self.kind(self.path, KEY), self.notes.read_text()))
        return found if code == 0 else [f"the ledger does not open: {found}"]


def price(steps: int) -> Fraction:
    """The exact price of `steps` steps, in billionths."""
    return Fraction(ORDER.alpha * steps) / (2 * Fraction(NOISE) ** 2) * UNIT


def faults(ledger: Ledger, notes: str) -> list[str]:
    """What of the promise does not hold of this ledger after what is noted to have happened."""
    happened = [json.loads(line) for line in notes.splitlines()]
    total = lambda what, job: sum(n for w, j, n in happened if (w, j) == (what, job))  # noqa: E731
    accounts = dict(ledger._db.execute("SELECT split, number FROM account").fetchall())
    bad = []
    for job in ("slow", "whole", "idle", "again"):
        for split in SPLITS:
            row = ledger._db.execute(
                "SELECT units FROM charge WHERE account = ? AND job = ?", (accounts.get(split), job)
            ).fetchone()
            charged = row[0] if row else 0
            if charged < price(total("ran", job)):
                bad.append(f"{job}, {split}: ran {total('ran', job)} steps, charged {charged}")
            if charged > price(total("asks", job)) + 1:
                bad.append(f"{job}, {split}: asked for {total('asks', job)} steps, charged {charged}")
    for job in {job for what, job, _ in happened if what == "released"}:
        receipt = ledger.receipt_of(job)
        if ledger.release_of(job) != job.encode() or receipt is None:
            bad.append(f"{job}: released, but not on the books")
        else:
            verify_receipt(receipt, KEY.public_key(), job.encode())
    if ledger._db.execute("SELECT 1 FROM job WHERE state = 'reserved'").fetchone():
        bad.append("a job is still open")
    return bad + sums_and_heads(ledger)


def sums_and_heads(ledger: Ledger) -> list[str]:
    """The state is the sum of the charges, within the budget, and what the log says it is."""
    entries = ledger.log.entries()
    heads: dict[str, int] = {}
    for entry in map(json.loads, entries):
        if isinstance(entry.get("accounts"), dict):
            heads |= {label: head["spent"] for label, head in entry["accounts"].items()}
    bad = []
    if open_checkpoint(ledger.log.checkpoint(), KEY.public_key()).root != root_of(entries):
        bad.append("the log's root is not that of its entries")
    rows = ledger._db.execute(
        "SELECT split, spent, (SELECT coalesce(sum(units), 0) FROM charge WHERE account = number)"
        " FROM account"
    ).fetchall()
    for split, spent, charges in rows:
        if not spent == charges == heads.get(f"risk/flchain/{split}", 0):
            bad.append(f"{split}: spent {spent}, charges {charges}, head in the log {heads}")
        if spent > ORDER.units:
            bad.append(f"{split}: overspent")
    return bad


class TestKills:
    def test_no_point_of_death_loses_or_doubles_a_charge(self, memory):
        """A sixth of the story's points, or all of them; every fourth followed by a death in the midst of recovery."""
        code, points = World(memory / "whole").live()
        assert code == 0
        assert points >= 200
        kills, tried = 0, range(points % STRIDE, points, STRIDE)
        for number, point in enumerate(tried):
            world = World(memory / str(point))
            code, said = world.live(point)
            assert code == -signal.SIGKILL, said
            kills += 1
            if number % 4 == 0:
                kills += world.recover(number % 41)[0] == -signal.SIGKILL
            with contextlib.closing(Ledger(world.path, KEY)) as ledger:
                assert faults(ledger, world.notes.read_text()) == [], f"killed at point {point}"
        assert kills > len(tried) * 1.05

    def test_a_life_without_death_has_no_faults_either(self, memory):
        """The checks themselves accept an honest ledger, before and after reopening."""
        world = World(memory / "world")
        assert world.live()[0] == 0
        assert world.faults() == world.faults() == []

    def test_the_same_life_goes_on_after_many_deaths(self, memory):
        """Killed again and again on one ledger, it is never over budget and its books add up."""
        path = memory / "ledger.db"

        def some_jobs(name: str, killed_at: int) -> Callable[[], None]:
            def act() -> None:
                witness = Witness(memory / "notes", killed_at)
                ledger = opened(Ledger, path, witness)
                for split in SPLITS:
                    ledger.open_account(*ACCOUNT, split, 1.0, 1e-6)
                for i in range(3):
                    with contextlib.suppress(BudgetError):
                        train(ledger, witness, f"{name}-{i}")

            return act

        codes = [in_child(some_jobs(str(n), 20 + 13 * (n % 9)))[0] for n in range(40)]
        assert codes.count(-signal.SIGKILL) >= 15
        with contextlib.closing(Ledger(path, KEY)) as ledger:
            assert sums_and_heads(ledger) == []


def late_journal(ledger, witness, job, blocks=(2, 1, 2)):
    """Runs a block, then journals it."""
    ledger.reserve(job, *ACCOUNT, SPLITS, LOSS, bytes(32))
    for steps in blocks:
        witness.note("asks", job, steps)
        witness.note("ran", job, steps)
        ledger.touch(job, steps)
    ledger.settle(job, job.encode())
    witness.note("released", job)


def late_reserve(ledger, witness, job, blocks=(2, 1, 2)):
    """Runs a job, then reserves it."""
    witness.note("asks", job, sum(blocks))
    witness.note("ran", job, sum(blocks))
    ledger.reserve(job, *ACCOUNT, SPLITS, LOSS, bytes(32))
    ledger.touch(job, sum(blocks))
    ledger.settle(job, job.encode())
    witness.note("released", job)


def early_release(ledger, witness, job, blocks=(2, 1, 2)):
    """Releases, then settles."""
    ledger.reserve(job, *ACCOUNT, SPLITS, LOSS, bytes(32))
    run_steps(ledger, witness, job, blocks)
    witness.note("released", job)
    ledger.settle(job, job.encode())


SETTLED = "UPDATE job SET state = 'settled', release = ?, entry = ? WHERE name = ?"


class ChargeApartFromRelease(Ledger):
    def settle(self, job, release):
        loss, touched = self._open_job(job)
        digest = hashlib.sha256(release).hexdigest()
        with self._transaction() as db:
            self._charge(job, Nothing())
            entry = self._record("charge", job, release=digest)
            db.execute(SETTLED, (release, entry, job))
        with self._transaction():
            self._charge(job, loss.part(touched))
            self._record("charge", job, release=digest)
        return self.receipt_of(job)


class LogApartFromCharge(Ledger):
    def settle(self, job, release):
        loss, touched = self._open_job(job)
        with self._transaction() as db:
            self._charge(job, loss.part(touched))
            db.execute(SETTLED, (release, self.log.size(), job))
        with self._transaction():
            self._record("charge", job, release=hashlib.sha256(release).hexdigest())
        return self.receipt_of(job)


class RefundOnRecovery(Ledger):
    def _recover(self):
        with self._transaction() as db:
            db.execute("UPDATE job SET touched = 0 WHERE state = 'reserved'")
        super()._recover()


class NoRecovery(Ledger):
    def _recover(self):
        pass


class RefundOnAbandon(Ledger):
    def abandon(self, job, why):
        with self._transaction() as db:
            db.execute("UPDATE job SET touched = 0 WHERE name = ?", (job,))
        super().abandon(job, why)


class NoRefund(Ledger):
    def settle(self, job, release):
        with self._transaction() as db:
            db.execute("UPDATE job SET touched = ? WHERE name = ?", (STEPS, job))
        return super().settle(job, release)


class JournalInMemory(Ledger):
    def touch(self, job, steps):
        self.__dict__.setdefault("waiting", []).append((job, steps))

    def _open_job(self, job):
        waiting, self.waiting = self.__dict__.get("waiting", []), []
        for name, steps in waiting:
            self._db.execute("UPDATE job SET touched = touched + ? WHERE name = ?", (steps, name))
        return super()._open_job(job)


class ReserveInMemory(Ledger):
    def reserve(self, *job):
        self.__dict__.setdefault("waiting", {})[job[0]] = [job, 0]

    def touch(self, job, steps):
        self.waiting[job][1] += steps

    def settle(self, job, release):
        reserved, steps = self.waiting.pop(job)
        super().reserve(*reserved)
        super().touch(job, steps)
        return super().settle(job, release)

    def abandon(self, job, why):
        super().reserve(*self.waiting.pop(job)[0])
        super().abandon(job, why)


class FreeRerun(Ledger):
    def reserve(self, job, *rest):
        if self.release_of(job) is None:
            super().reserve(job, *rest)

    def touch(self, job, steps):
        if self.release_of(job) is None:
            super().touch(job, steps)

    def settle(self, job, release):
        return super().settle(job, release) if self.release_of(job) is None else self.receipt_of(job)


class MissingSplit(Ledger):
    def reserve(self, job, project, dataset, splits, *rest):
        super().reserve(job, project, dataset, splits[:1], *rest)


class RoundedDown(Ledger):
    def _charge(self, job, loss):
        honest = ledger_module.units
        ledger_module.units = lambda loss, alpha: max(0, honest(loss, alpha) - 1)
        super()._charge(job, loss)
        ledger_module.units = honest


class RunningJobsNotCounted(Ledger):
    def reserve(self, job, *rest):
        super().reserve(job, *rest)
        with self._transaction() as db:
            db.execute("UPDATE account SET spent = spent - (SELECT units FROM charge WHERE job = ?)", (job,))

    def settle(self, job, release):
        with self._transaction() as db:
            db.execute("UPDATE account SET spent = spent + (SELECT units FROM charge WHERE job = ?)", (job,))
        return super().settle(job, release)


class OneSplitRefunded(Ledger):
    def _end(self, job, *rest):
        super()._end(job, *rest)
        self._db.execute("UPDATE account SET spent = spent - 1 WHERE split = 'test' AND spent > 0")


def with_desk(train: Callable) -> Callable:
    """The story with another order of the desk's."""
    return lambda ledger, witness: story(ledger, witness, train)


MISTAKES = {
    "journals a block after it ran": (Ledger, with_desk(late_journal)),
    "reserves after it ran": (Ledger, with_desk(late_reserve)),
    "releases before it settles": (Ledger, with_desk(early_release)),
    "charges apart from the release": (ChargeApartFromRelease, story),
    "logs apart from the charge": (LogApartFromCharge, story),
    "refunds on recovery": (RefundOnRecovery, story),
    "does not recover": (NoRecovery, story),
    "refunds what a cancelled job ran": (RefundOnAbandon, story),
    "keeps what did not run": (NoRefund, story),
    "journals in memory": (JournalInMemory, story),
    "reserves in memory": (ReserveInMemory, story),
    "runs a job again for free": (FreeRerun, story),
    "forgets a split": (MissingSplit, story),
    "rounds down": (RoundedDown, story),
    "does not count running jobs": (RunningJobsNotCounted, story),
    "refunds one split too much": (OneSplitRefunded, story),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_ledger_with_this_mistake_is_caught(memory, mistake):
    """By the very checks that the honest one passes, at some point of death."""
    kind, play = MISTAKES[mistake]
    for point in [None, *random.Random(3).sample(range(POINTS), POINTS)]:
        world = World(memory / str(point), kind, play)
        world.live(point)
        if world.faults():
            return
    pytest.fail("it was not caught")
