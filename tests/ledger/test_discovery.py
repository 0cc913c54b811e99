"""The δ that discovered keys spend: a second sum in each account, which no crash, cancel or policy loses."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
from fractions import Fraction
from pathlib import Path

import pytest
from test_crashes import KEY, World, in_child

from rapha_lab.curator import books
from rapha_lab.curator.accounting import DELTA_UNIT, Gaussian, Thresholded, delta_budget, delta_price
from rapha_lab.curator.ledger import ALL, Ledger
from rapha_lab.protocol.errors import BudgetError, PolicyError, RequestError

WHERE = ("risk", "flchain")
TENTH = 10**11  # of δ = 1e-6
LOSS = Thresholded(40.0, TENTH)
POINTS = 400  # more than the story has
STRIDE = 1 if os.environ.get("RAPHA_LAB_DEEP") else 5


@pytest.fixture
def funded(ledger: Ledger) -> Ledger:
    """The account of train with δ = 1e-6 for discovered keys."""
    ledger.open_account(*WHERE, "train", 1.0, 1e-6, 1e-6)
    return ledger


def discover(ledger: Ledger, job: str, loss: Thresholded = LOSS) -> None:
    """Reserve, run, settle."""
    ledger.reserve(job, *WHERE, ["train"], loss, bytes(32))
    ledger.touch(job, 1)
    ledger.settle(job, job.encode())


def spent(ledger: Ledger) -> int:
    """Of δ, by the account of train, in units."""
    account = ledger._find(*WHERE, "train")
    assert account is not None
    return account.delta_spent


class TestCounting:
    def test_a_tenth_is_spent_ten_times_and_no_more(self, funded):
        """Then the next is refused, by name of the field, and costs nothing."""
        for number in range(10):
            discover(funded, f"job-{number}")
        before = funded.statement(*WHERE, "train")
        assert before.discovered == before.discovery == 1e-6
        with pytest.raises(BudgetError, match="discovery_delta") as error:
            discover(funded, "job-10")
        assert error.value.field == "delta"
        assert funded.statement(*WHERE, "train") == before

    def test_other_answers_spend_none_of_it(self, funded):
        """And fit when it is all spent."""
        discover(funded, "all", Thresholded(40.0, 10 * TENTH))
        funded.reserve("count", *WHERE, ["train"], Gaussian(40.0), bytes(32))
        assert spent(funded) == 10 * TENTH

    def test_an_account_without_it_refuses(self, ledger):
        """The default is none, whatever is asked for."""
        with pytest.raises(BudgetError, match="discovery_delta"):
            discover(ledger, "first", Thresholded(1000.0, 1))

    def test_the_untouched_is_refunded_and_the_touched_is_not(self, funded):
        """Whether it is cancelled, fails, or is settled."""
        for job in ("idle", "touched"):
            funded.reserve(job, *WHERE, ["train"], LOSS, bytes(32))
        assert spent(funded) == 2 * TENTH
        funded.touch("touched", 1)
        funded.abandon("idle", "cancelled")
        funded.abandon("touched", "cancelled")
        assert spent(funded) == TENTH

    def test_a_running_job_counts_in_full(self, funded):
        """Two that fit alone do not fit together."""
        funded.reserve("one", *WHERE, ["train"], Thresholded(40.0, 6 * TENTH), bytes(32))
        with pytest.raises(BudgetError, match="discovery_delta"):
            funded.reserve("two", *WHERE, ["train"], Thresholded(40.0, 6 * TENTH), bytes(32))

    @pytest.mark.parametrize("delta", [1e-6, 3e-7, 0.0999, 1.1e-15, 1 / 3e5])
    def test_prices_are_rounded_up_and_budgets_down(self, delta):
        """Of the number as it is written."""
        exact = Fraction(repr(delta)) * DELTA_UNIT
        assert delta_budget(delta) <= exact <= delta_price(delta) <= delta_budget(delta) + 1

    def test_the_quote_is_the_statement_afterwards(self, funded):
        """Where it fits; where δ is lacking, no ε would do."""
        quote = funded.quote(*WHERE, "train", LOSS)
        discover(funded, "first")
        after = funded.statement(*WHERE, "train")
        assert quote.fits
        assert quote.discovery == pytest.approx(after.discovery - after.discovered, rel=1e-12)
        refused = funded.quote(*WHERE, "train", Thresholded(40.0, 10 * TENTH))
        assert (refused.fits, refused.largest) == (False, 0.0)

    def test_less_than_is_spent_cannot_be_signed(self, funded):
        """More can."""
        discover(funded, "first", Thresholded(40.0, 5 * TENTH))
        with pytest.raises(PolicyError):
            funded.open_account(*WHERE, "train", 1.0, 1e-6, 4e-7)
        funded.open_account(*WHERE, "train", 1.0, 1e-6, 5e-7)
        with pytest.raises(BudgetError, match="discovery_delta"):
            discover(funded, "second")
        funded.open_account(*WHERE, "train", 1.0, 1e-6, 2e-6)
        discover(funded, "third")

    @pytest.mark.parametrize("delta", [0, -1, DELTA_UNIT])
    def test_no_loss_has_a_delta_out_of_range(self, delta):
        """Nothing is discovered for nothing."""
        with pytest.raises(RequestError):
            Thresholded(10.0, delta)


class TestCaps:
    def test_a_cap_counts_what_all_projects_discover(self, funded):
        """And refuses where the project alone would not."""
        funded.open_account("care", "flchain", "train", 1.0, 1e-6, 1e-6)
        funded.open_account(ALL, "flchain", "train", 1.0, 1e-6, 1e-6)
        discover(funded, "first", Thresholded(40.0, 6 * TENTH))
        with pytest.raises(BudgetError, match="all projects together"):
            funded.reserve("other", "care", "flchain", ["train"], Thresholded(40.0, 6 * TENTH), bytes(32))

    def test_a_cap_signed_later_is_charged_what_was_discovered(self, funded):
        """The running jobs in full, and it is refused if that is more than it has."""
        discover(funded, "first")
        funded.reserve("runs", *WHERE, ["train"], LOSS, bytes(32))
        with pytest.raises(PolicyError):
            funded.open_account(ALL, "flchain", "train", 1.0, 1e-6, 1e-7)
        funded.open_account(ALL, "flchain", "train", 1.0, 1e-6, 1e-6)
        assert funded._find(ALL, "flchain", "train").delta_spent == 2 * TENTH
        funded.abandon("runs", "cancelled")
        assert funded._find(ALL, "flchain", "train").delta_spent == TENTH


class TestDisk:
    def test_a_ledger_of_before_gets_the_columns_and_keeps_its_charges(self, path, key, monkeypatch):
        """Opened by this version, it discovers nothing until a policy signs for it."""
        with monkeypatch.context() as old:
            old.setattr(books, "COLUMNS", ())
            old.setattr(books, "TRIGGERS", "")
            books.connect(path).close()
        db = sqlite3.connect(path)
        db.execute("INSERT INTO account VALUES (1, 'risk', 'flchain', 'train', 1.0, 1e-6, 22, 536000000, 0)")
        db.execute("INSERT INTO job VALUES ('old', 'settled', x'00', x'', '{}', 1, x'00', x'', 0)")
        db.execute("INSERT INTO charge VALUES (1, 'old', 77)")
        db.commit()
        db.close()
        with contextlib.closing(Ledger(path, key)) as ledger:
            account = ledger._find(*WHERE, "train")
            assert (account.spent, account.delta_budget, account.delta_spent) == (77, 0, 0)

    @pytest.mark.parametrize(
        "wrong",
        ["UPDATE charge SET delta = delta + 1 WHERE job = 'runs'", "UPDATE account SET delta_spent = 0"],
    )
    def test_the_database_itself_holds_the_sum(self, funded, path, key, wrong):
        """What raises a charge is refused; a sum that is none is found when the ledger opens."""
        discover(funded, "first")
        funded.reserve("runs", *WHERE, ["train"], LOSS, bytes(32))
        with contextlib.suppress(sqlite3.IntegrityError):
            funded._db.execute(wrong)
            with pytest.raises(Exception, match="sum of its charges"):
                books.check(funded._db)
            return
        books.check(funded._db)


def story(ledger, witness) -> None:
    """One that is settled, one cancelled before and one after it ran, one that does not fit."""
    ledger.open_account(*WHERE, "train", 1.0, 1e-6, 3e-7)
    for job, ends in (("settled", "settle"), ("idle", "idle"), ("touched", "abandon"), ("last", "settle")):
        with contextlib.suppress(RequestError):  # it was there before a death
            ledger.reserve(job, *WHERE, ["train"], LOSS, bytes(32))
            if ends != "idle":
                witness.note("asks", job, 1)
                ledger.touch(job, 1)
                witness.note("ran", job, 1)
            if ends == "settle":
                ledger.settle(job, job.encode())
                witness.note("released", job)
            else:
                ledger.abandon(job, "cancelled")
    with contextlib.suppress(BudgetError):
        ledger.reserve("over", *WHERE, ["train"], LOSS, bytes(32))
        witness.note("fits", "over")


def faults(kind: type[Ledger], path: Path, notes: str) -> list[str]:
    """What of the promise about δ does not hold after what is noted."""
    with contextlib.closing(kind(path, KEY)) as ledger:
        account = ledger._find(*WHERE, "train")
        charges = dict(ledger._db.execute("SELECT job, delta FROM charge").fetchall())
    bad = ["it fits beyond the budget"] if '"fits"' in notes else []
    for job in ("settled", "idle", "touched", "last"):
        charged = charges.get(job, 0)
        if f'["ran", "{job}", 1]' in notes and charged != TENTH:
            bad.append(f"{job} ran, and {charged} is charged")
        if f'["asks", "{job}", 1]' not in notes and charged:
            bad.append(f"{job} did not run, and {charged} is charged")
    if account and not account.delta_spent == sum(charges.values()) <= account.delta_budget:
        bad.append("the sum is not that of the charges, or over the budget")
    return bad


class TestKills:
    def test_no_point_of_death_loses_or_doubles_delta(self, memory):
        """Each fifth point of the story, or all of them."""
        code, points = World(memory / "whole", play=story).live()
        assert (code, faults(Ledger, memory / "whole/ledger.db", (memory / "whole/notes").read_text())) == (
            0,
            [],
        )
        assert points < POINTS
        for point in range(points % STRIDE, points, STRIDE):
            world = World(memory / str(point), play=story)
            assert world.live(point)[0] == -signal.SIGKILL
            assert faults(Ledger, world.path, world.notes.read_text()) == [], f"killed at point {point}"


class Forgets(Ledger):
    """Charges the curve alone."""

    def _charge(self, job, loss):
        super()._charge(job, Gaussian(loss.noise) if isinstance(loss, Thresholded) else loss)


class RefundsTheLost(Ledger):
    """Gives back on recovery what ran."""

    def _recover(self):
        with self._transaction() as db:
            db.execute(
                "UPDATE charge SET delta = 0 WHERE job IN (SELECT name FROM job WHERE state = 'reserved')"
            )
            db.execute("UPDATE job SET touched = 0 WHERE state = 'reserved'")
        super()._recover()


class KeepsTheIdle(Ledger):
    """Gives nothing back."""

    def _charge(self, job, loss):
        for account, *_ in self._charges(job):
            keys = (0, account.number, job)
            self._db.execute("UPDATE charge SET units = ? WHERE account = ? AND job = ?", keys)


@pytest.mark.parametrize("kind", [Forgets, RefundsTheLost, KeepsTheIdle])
def test_a_ledger_that_counts_delta_wrongly_is_caught(memory, kind):
    """By the checks that the honest one passes, at some point of death."""
    for point in [None, *random.Random(3).sample(range(POINTS), POINTS)]:
        world = World(memory / str(point), kind, story)
        world.live(point)
        code, found = in_child(lambda world=world: faults(world.kind, world.path, world.notes.read_text()))
        if code != 0 or found:
            return
    pytest.fail("it was not caught")
