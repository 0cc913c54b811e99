"""The ledger against a short model of it, over random lives: concurrent jobs of two projects under one cap, cancels,
crashes, restarts, jumps of the clock, spends made elsewhere, questions asked again.

`RAPHA_LAB_DEEP=1` takes a hundred thousand steps.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rapha_lab.curator.accounting import Gaussian, Pure, SampledGaussian, order_for, units
from rapha_lab.curator.ledger import ALL, Ledger
from rapha_lab.protocol.checkpoint import open_checkpoint, verify_consistency, verify_receipt
from rapha_lab.protocol.errors import LogError, RaphaError

SPLITS, PROJECTS = ("test", "train", "validation"), ("risk", "care")
BUDGETS = {"risk": (1.0, 1e-6), "care": (1.0, 1e-6), ALL: (1.1, 1e-6)}
ORDERS = {project: order_for(*budget) for project, budget in BUDGETS.items()}
PATIENCE = 100.0
NAMES, QUESTIONS = "abcdefgh", "xyz"
names, questions, numbers = st.sampled_from(NAMES), st.sampled_from(QUESTIONS), st.integers(0, 9)
some_splits = st.sets(st.sampled_from(SPLITS), min_size=1)
losses = st.one_of(
    st.builds(Gaussian, st.floats(5, 60)),
    st.builds(Pure, st.floats(0.01, 0.4)),
    st.builds(SampledGaussian, st.just(1.0), st.floats(8, 80), st.integers(2, 6)),
)
spends, small = st.sampled_from("uv"), st.builds(Gaussian, st.floats(40, 90))
DEEP = bool(os.environ.get("RAPHA_LAB_DEEP"))


class Model:
    """What the ledger has to say after each call."""

    def __init__(self) -> None:
        self.jobs: dict = {}
        self.now = 0.0

    def charged(self, project, split) -> list:
        return [
            job
            for job in self.jobs.values()
            if split in job["splits"] and (project == ALL or job["project"] == project)
        ]

    def spent(self, project, split) -> int:
        return sum(units(job["paid"], ORDERS[project].alpha) for job in self.charged(project, split))

    def fits(self, project, split, loss) -> bool:
        return all(
            self.spent(whose, split) + units(loss, ORDERS[whose].alpha) <= ORDERS[whose].units
            for whose in {project, ALL}
        )

    def new(self, project, splits, loss, **fields) -> dict:
        job = {"project": project, "splits": splits, "loss": loss, "paid": loss, "ran": 0, "moved": self.now}
        return job | {"open": True, "release": None, "request": None} | fields

    def reserve(self, name, project, splits, loss, request) -> bool:
        self.expire()
        if name in self.jobs or not all(self.fits(project, split, loss) for split in splits):
            return False
        self.jobs[name] = self.new(project, splits, loss, request=request)
        return True

    def touch(self, name, steps) -> bool:
        job = self.jobs.get(name)
        if not job or not job["open"] or steps < 1 or job["ran"] + steps > job["loss"].steps:
            return False
        job["ran"] += steps
        job["moved"] = self.now
        return True

    def end(self, name, release) -> bool:
        job = self.jobs.get(name)
        if not job or not job["open"] or (release is not None and not job["ran"]):
            return False
        job |= {"open": False, "paid": job["loss"].part(job["ran"]), "release": release}
        return True

    def expire(self) -> None:
        for name, job in self.jobs.items():
            if job["ran"] < job["loss"].steps and self.now - job["moved"] > PATIENCE:
                self.end(name, None)


class Lives(RuleBasedStateMachine):
    kind = Ledger

    @initialize()
    def found(self) -> None:
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.key = Ed25519PrivateKey.generate()
        self.model, self.seen = Model(), None
        self.read, self.heads = 0, {}
        self.open()
        for project, budget in BUDGETS.items():
            for split in SPLITS:
                self.ledger.open_account(project, "flchain", split, *budget)

    def open(self) -> None:
        path = Path(self.folder.name) / "ledger.db"
        self.ledger = self.kind(path, self.key, patience=PATIENCE, clock=lambda: self.model.now)

    def agree(self, expected: bool, call, *args) -> None:
        try:
            call(*args)
        except RaphaError:
            assert not expected
        else:
            assert expected

    @rule(name=names, project=st.sampled_from(PROJECTS), splits=some_splits, loss=losses, question=questions)
    def reserve(self, name, project, splits, loss, question):
        request = question.encode() * 32
        where = project, "flchain", list(splits)
        admitted = self.model.reserve(name, project, splits, loss, request)
        self.agree(admitted, self.ledger.reserve, name, *where, loss, request, request)

    def some(self, number: int) -> str:
        """A running job mostly, so that lives get on; else any."""
        running = [name for name, job in self.model.jobs.items() if job["open"]]
        return running[number % len(running)] if running and number < 8 else NAMES[number % 8]

    @rule(number=numbers, steps=st.sampled_from([1, 1, 1, 2, 3, 0, -1]))
    def touch(self, number, steps):
        name = self.some(number)
        self.agree(self.model.touch(name, steps), self.ledger.touch, name, steps)

    @rule(number=numbers, release=st.binary(max_size=4))
    def settle(self, number, release):
        name = self.some(number)
        self.agree(self.model.end(name, release), self.ledger.settle, name, release)

    @rule(number=numbers)
    def abandon(self, number):
        name = self.some(number)
        self.agree(self.model.end(name, None), self.ledger.abandon, name, "cancelled")

    @rule(
        name=spends,
        project=st.sampled_from((*PROJECTS, ALL)),
        splits=some_splits,
        loss=st.one_of(small, losses),
    )
    def add(self, name, project, splits, loss):
        """Once a name, whatever the budget; of no project, it is charged to all of them together."""
        known = f"elsewhere-{name}"
        if known not in self.model.jobs:
            ran = {"ran": loss.steps, "open": False}
            self.model.jobs[known] = self.model.new(project, splits, loss, **ran)
        self.ledger.add(name, project, "flchain", list(splits), loss, bytes(32))

    @rule(question=questions)
    def ask_again(self, question):
        """A settled question has its first answer; no other has one."""
        request = question.encode() * 32
        of = {n: j["release"] for n, j in self.model.jobs.items() if j["request"] == request}
        told = self.ledger.settled(request, request)
        released = {name: release for name, release in of.items() if release is not None}
        assert (told is None) == (not released)
        if told:
            assert released[told[2].job] == told[0]

    @rule(split=st.sampled_from(SPLITS), project=st.sampled_from(PROJECTS), loss=losses)
    def quote(self, split, project, loss):
        """What is quoted to fit is admitted, and nothing else."""
        self.model.expire()
        told = self.ledger.quote(project, "flchain", split, loss)
        assert told.fits == self.model.fits(project, split, loss)

    @rule(seconds=st.one_of(st.floats(0, 80), st.floats(-1e6, 1e6)))
    def jump(self, seconds):
        """The clock goes forward or back; what has announced nothing for too long ends with the next look."""
        self.model.now += seconds
        self.model.expire()
        self.ledger.statement("risk", "flchain", "train")

    @rule(epsilon=st.floats(0.2, 1.0, exclude_max=True))
    def shrink(self, epsilon):
        """Refused when overspent; otherwise taken back, since the model's budget is fixed."""
        try:
            self.ledger.open_account("risk", "flchain", "train", epsilon, 1e-6)
        except RaphaError:
            assert self.model.spent("risk", "train") > 0
            return
        if self.model.spent("risk", "train") <= ORDERS["risk"].units:
            self.ledger.open_account("risk", "flchain", "train", 1.0, 1e-6)

    @rule()
    def crash(self):
        """The process ends without closing; another opens."""
        self.ledger._held.close()
        self.ledger._db.close()
        for name in self.model.jobs:
            self.model.end(name, None)
        self.open()

    @invariant()
    def books_agree(self):
        rows = self.ledger._db.execute("SELECT project, split, spent FROM account").fetchall()
        assert len(rows) == 9
        assert all(spent == self.model.spent(project, split) for project, split, spent in rows)

    @invariant()
    def the_tally_of_statements_is_that_of_the_charges(self):
        ran = "CASE state WHEN 'reserved' THEN -1 ELSE touched END AS ran"
        counted = f"SELECT account, loss, {ran}, count(*) FROM charge JOIN job ON name = job"
        counted += " WHERE state <> 'void' GROUP BY account, loss, ran"
        found = self.ledger._db.execute(counted).fetchall()
        assert sorted(found) == sorted(self.ledger._db.execute("SELECT * FROM tally").fetchall())

    @invariant()
    def what_was_asked_here_is_within_every_budget(self):
        for project, order in ORDERS.items():
            for split in SPLITS:
                here = [j["paid"] for j in self.model.charged(project, split) if j["request"] is not None]
                assert sum(units(loss, order.alpha) for loss in here) <= order.units

    @invariant()
    def releases_are_kept_and_provable(self):
        for name, job in self.model.jobs.items():
            assert self.ledger.release_of(name) == job["release"]
            receipt = self.ledger.receipt_of(name)
            assert (receipt is None) == (job["release"] is None)
            if receipt:
                verify_receipt(receipt, self.key.public_key(), job["release"])

    @rule()
    def statements_stay_within_the_budget(self):
        self.model.expire()
        for split in SPLITS:
            statement = self.ledger.statement("risk", "flchain", split)
            assert 0.0 <= statement.spent <= 1.0
            assert (statement.jobs == 0) == (self.model.spent("risk", split) == 0)

    @rule()
    def the_room_is_what_is_admitted(self):
        """The largest that is said to fit fits under the cap too; no account has room once it is overspent."""
        self.model.expire()
        room = self.ledger.statement("care", "flchain", "test").room
        over = any(self.model.spent(project, "test") >= ORDERS[project].units for project in ("care", ALL))
        assert room == 0.0 if over else room >= 0.0

    @invariant()
    def the_log_only_grows(self):
        head = open_checkpoint(self.ledger.log.checkpoint(), self.key.public_key())
        if self.seen:
            proof = self.ledger.log.consistency(self.seen.size, head.size)
            verify_consistency(self.seen.size, head.size, self.seen.root, head.root, proof)
        self.seen = head

    @invariant()
    def the_log_has_every_account_as_it_is(self):
        for entry in map(json.loads, self.ledger.log.entries(self.read)):
            if entry["kind"] == "account":
                self.heads[entry["account"]] = entry["spent"]
            self.heads |= {label: told["spent"] for label, told in entry.get("accounts", {}).items()}
        self.read = self.ledger.log.size()
        assert self.heads == {
            f"{project}/flchain/{split}": self.model.spent(project, split)
            for project in ORDERS
            for split in SPLITS
        }

    def teardown(self) -> None:
        self.ledger.close()
        self.folder.cleanup()


TestLives = pytest.mark.timeout(3600 if DEEP else 300)(Lives.TestCase)
TestLives.settings = settings(
    max_examples=2000 if DEEP else 40,
    stateful_step_count=50 if DEEP else 30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class ChargesNoCap(Ledger):
    def _charged_to(self, project, dataset, splits):
        return [
            account for account in super()._charged_to(project, dataset, splits) if account.project == project
        ]


class ChargesOneCap(Ledger):
    def _charged_to(self, project, dataset, splits):
        accounts = super()._charged_to(project, dataset, splits)
        return accounts[: len(set(splits)) + 1]


class PricesAtTheProjectsOrder(Ledger):
    def _insert(self, *job):
        *job, accounts = job
        one = [account.__class__(**{**_fields(account), "alpha": accounts[0].alpha}) for account in accounts]
        super()._insert(*job, one)


class KeepsReservationsForEver(Ledger):
    def _expire(self):
        pass


class RefundsWhatTimedOut(Ledger):
    def _expire(self):
        with self._transaction() as db:
            for job in [j for j, moved in self._moved.items() if self._clock() - moved > self._patience]:
                db.execute("UPDATE job SET touched = 0 WHERE name = ?", (job,))
        super()._expire()


class ForgetsThatAJobMoved(Ledger):
    def touch(self, job, steps):
        moved = self._moved.get(job)
        super().touch(job, steps)
        if moved is not None and job in self._moved:
            self._moved[job] = moved


class AddsASpendTwice(Ledger):
    def has(self, name):
        return False

    def add(self, name, *rest):
        taken = self._db.execute("SELECT count(*) FROM job").fetchone()[0]
        super().add(f"{name}-{taken}" if super().has(name) else name, *rest)


class AddsWhatFitsOnly(Ledger):
    def add(self, name, project, dataset, splits, loss, proof):
        accounts = self._charged_to(project, dataset, splits)
        if all(units(loss, account.alpha) <= account.left for account in accounts):
            super().add(name, project, dataset, splits, loss, proof)


class AnswersAnyQuestionAgain(Ledger):
    def settled(self, request, basis, job=""):
        row = self._db.execute("SELECT request FROM job WHERE state = 'settled'").fetchone()
        return super().settled(row[0], row[0]) if row else None


class QuotesWithoutTheCap(Ledger):
    def quote(self, project, dataset, split, loss):
        honest, self._find = self._find, lambda whose, *rest: None if whose == ALL else honest(whose, *rest)
        try:
            return super().quote(project, dataset, split, loss)
        finally:
            del self._find


class LosesAChargeInACrash(Ledger):
    def _recover(self):
        with self._transaction() as db:
            db.execute("UPDATE job SET touched = max(touched - 1, 0) WHERE state = 'reserved'")
        super()._recover()


class LogsNoSpend(Ledger):
    def _record(self, kind, job, **fields):
        return 0 if kind == "elsewhere" else super()._record(kind, job, **fields)


def _fields(account):
    return {name: getattr(account, name) for name in account.__struct_fields__}


STEPS = SampledGaussian(1.0, 40.0, 6)
LIFE = [
    ("reserve", "a", "risk", {"train", "test"}, STEPS, "x"),
    ("touch", 0, 1),
    ("jump", 60.0),
    ("touch", 0, 1),
    ("jump", 60.0),  # it announced a step meanwhile
    ("reserve", "b", "care", {"train"}, STEPS, "y"),
    ("jump", 80.0),  # now it has announced nothing for too long, and the other goes on
    ("touch", 0, 2),
    ("ask_again", "y"),
    ("settle", 0, b"told"),
    ("ask_again", "y"),
    ("ask_again", "x"),
    ("reserve", "c", "risk", {"validation"}, STEPS, "x"),
    ("touch", 0, 3),
    ("crash",),
    ("add", "u", "risk", {"test"}, Gaussian(60.0)),
    ("add", "u", "risk", {"test"}, Gaussian(60.0)),
    ("add", "v", ALL, {"train"}, Gaussian(5.0)),  # nearly all that the cap allows
    ("quote", "train", "care", Gaussian(6.5)),
    ("reserve", "d", "care", {"test", "train"}, Gaussian(6.5), "z"),
    ("add", "w", "risk", {"test"}, Pure(3.0)),  # more than there is
    ("the_room_is_what_is_admitted",),
    ("statements_stay_within_the_budget",),
]


def live(kind: type[Ledger]) -> None:
    """One life with an occasion for every mistake, step by step, held to what every life is held to."""
    life = type("Life", (Lives,), {"kind": kind})()
    life.found()
    try:
        for act, *how in LIFE:
            getattr(life, act)(*how)
            life.books_agree()
            life.what_was_asked_here_is_within_every_budget()
            life.releases_are_kept_and_provable()
            life.the_log_only_grows()
            life.the_log_has_every_account_as_it_is()
    finally:
        life.teardown()


MISTAKES = [
    ChargesNoCap,
    ChargesOneCap,
    PricesAtTheProjectsOrder,
    KeepsReservationsForEver,
    RefundsWhatTimedOut,
    ForgetsThatAJobMoved,
    AddsASpendTwice,
    AddsWhatFitsOnly,
    AnswersAnyQuestionAgain,
    QuotesWithoutTheCap,
    LosesAChargeInACrash,
    LogsNoSpend,
]


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_ledger_with_this_mistake_does_not_live_through_it(kind):
    """What every random life is held to catches it in a life with an occasion for it; the honest one lives on."""
    live(Ledger)
    with pytest.raises((AssertionError, LogError)):
        live(kind)
