"""What the ledger charges, refunds, refuses and remembers."""

import os
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from rapha_lab.curator.accounting import Gaussian, Loss, Pure, SampledGaussian, noise_for, order_for, units
from rapha_lab.curator.ledger import Ledger, Statement
from rapha_lab.protocol.checkpoint import verify_receipt
from rapha_lab.protocol.errors import BudgetError, PolicyError, RequestError, SiteError

DIGEST = bytes(32)
TRAINING = SampledGaussian(1.0, 60.0, 10)
ORDER = order_for(1.0, 1e-6)


def answer(epsilon: float) -> Gaussian:
    """One answer of this guarantee."""
    return Gaussian(noise_for(Gaussian, epsilon, 1e-6))


def reserve(ledger: Ledger, job: str, loss: Loss, *splits: str) -> None:
    """Reserve for the one account that most tests use."""
    ledger.reserve(job, "risk", "flchain", splits or ("train",), loss, DIGEST)


def spent(ledger: Ledger, split: str = "train") -> int:
    """The one integer."""
    row = ledger._db.execute("SELECT spent FROM account WHERE split = ?", (split,)).fetchone()
    return int(row[0])


def statement(ledger: Ledger, split: str = "train") -> Statement:
    """What the researcher is told of it."""
    return ledger.statement("risk", "flchain", split)


class TestCharging:
    def test_reservation_counts_in_full_for_every_split_it_touches(self, ledger):
        """Concurrent jobs can't both count on the same budget."""
        reserve(ledger, "job", TRAINING, "train", "test")
        assert spent(ledger) == spent(ledger, "test") == units(TRAINING, ORDER.alpha)

    def test_settling_charges_exactly_the_steps_that_were_journalled(self, ledger):
        """The rest comes back to the last billionth."""
        reserve(ledger, "job", TRAINING)
        ledger.touch("job", 3)
        ledger.settle("job", b"weights")
        assert spent(ledger) == units(TRAINING.part(3), ORDER.alpha)

    def test_a_ledger_of_before_the_tally_says_the_same(self, tmp_path, key):
        """Statements of settled, stopped and running jobs, once it is opened again."""
        ledger = Ledger(tmp_path / "old", key)
        ledger.open_account("risk", "flchain", "train", 1.0, 1e-6)
        for job in ("settled", "stopped", "void"):
            reserve(ledger, job, answer(0.05) if job == "settled" else TRAINING.part(3))
            if job != "void":
                ledger.touch(job, 1)
            ledger.settle(job, b"x") if job == "settled" else ledger.abandon(job, "cancelled")
        told = statement(ledger)
        for kind, name in (("TRIGGER", "tallied"), ("TRIGGER", "tallied_ended"), ("TABLE", "tally")):
            ledger._db.execute(f"DROP {kind} {name}")
        ledger.close()
        ledger = Ledger(tmp_path / "old", key)
        assert statement(ledger) == told
        assert told.jobs == 2
        ledger.close()

    def test_abandoning_before_the_first_step_refunds_everything(self, ledger):
        """Nothing was looked at."""
        reserve(ledger, "job", TRAINING)
        ledger.abandon("job", "cancelled")
        assert spent(ledger) == 0
        assert statement(ledger).jobs == 0

    def test_abandoning_after_a_step_charges_for_it(self, ledger):
        """That it failed is itself an answer."""
        reserve(ledger, "job", TRAINING)
        ledger.touch("job", 4)
        ledger.abandon("job", "cancelled")
        assert spent(ledger) == units(TRAINING.part(4), ORDER.alpha)
        assert ledger.release_of("job") is None

    def test_untouched_splits_pay_nothing(self, ledger):
        """Disjoint patients compose in parallel."""
        reserve(ledger, "job", TRAINING, "train")
        assert spent(ledger, "test") == 0

    @given(st.lists(st.tuples(st.integers(1, 12), st.floats(5, 500)), max_size=8), st.data())
    @settings(max_examples=25, deadline=None)
    def test_books_add_up_whatever_is_run(self, tmp_path_factory, plans, data):
        """Never overspent, and every refund exact."""
        ledger = Ledger(tmp_path_factory.mktemp("books") / "ledger.db", Ed25519PrivateKey.generate())
        ledger.open_account("risk", "flchain", "train", 1.0, 1e-6)
        expected = 0
        for i, (steps, noise) in enumerate(plans):
            loss = SampledGaussian(1.0, noise, steps)
            try:
                reserve(ledger, str(i), loss)
            except BudgetError:
                assert expected + units(loss, ORDER.alpha) > ORDER.units
                continue
            ran = data.draw(st.integers(0, steps))
            for _ in range(ran):
                ledger.touch(str(i), 1)
            ledger.settle(str(i), b"") if ran else ledger.abandon(str(i), "cancelled")
            expected += units(loss.part(ran), ORDER.alpha)
            assert spent(ledger) == expected <= ORDER.units
        ledger.close()


class TestRefusing:
    def test_an_overdraft_is_refused_before_anything_is_written(self, ledger):
        """It says what is left, and what the same request fits with; that price holds."""
        reserve(ledger, "first", answer(0.8))
        before, entries = spent(ledger), ledger.log.size()
        with pytest.raises(BudgetError) as refusal:
            reserve(ledger, "second", answer(0.9))
        assert refusal.value.field == "epsilon"
        assert (spent(ledger), ledger.log.size()) == (before, entries)
        fits = float(refusal.value.instead.rsplit("=", 1)[1].rstrip("."))
        reserve(ledger, "second", answer(fits))

    def test_one_poor_split_refuses_the_whole_job(self, ledger):
        """All accounts are charged, or none."""
        reserve(ledger, "first", answer(0.9), "test")
        with pytest.raises(BudgetError, match="split test"):
            reserve(ledger, "second", answer(0.9), "train", "test")
        assert spent(ledger) == 0

    def test_a_job_runs_once(self, ledger):
        """To look again costs again, under another name."""
        reserve(ledger, "job", TRAINING)
        ledger.touch("job", 10)
        ledger.settle("job", b"weights")
        with pytest.raises(RequestError, match="already") as refusal:
            reserve(ledger, "job", TRAINING)
        assert refusal.value.field == "job"

    @pytest.mark.parametrize("ended", ["settle", "abandon"])
    def test_an_ended_job_takes_no_further_step(self, ledger, ended):
        """Nor a second release."""
        reserve(ledger, "job", TRAINING)
        ledger.touch("job", 1)
        ledger.settle("job", b"a") if ended == "settle" else ledger.abandon("job", "cancelled")
        for act in (
            lambda: ledger.touch("job", 1),
            lambda: ledger.settle("job", b"b"),
            lambda: ledger.abandon("job", "cancelled"),
        ):
            with pytest.raises(RequestError, match="not open"):
                act()

    def test_more_steps_than_reserved_are_refused(self, ledger):
        """In one block or in several."""
        reserve(ledger, "job", TRAINING)
        ledger.touch("job", 8)
        with pytest.raises(BudgetError, match="more steps"):
            ledger.touch("job", 3)
        ledger.touch("job", 2)

    @pytest.mark.parametrize("steps", [0, -1, 1.0, True, None])
    def test_blocks_that_are_no_number_of_steps_are_refused(self, ledger, steps):
        """A negative block would earn a refund."""
        reserve(ledger, "job", TRAINING)
        with pytest.raises(RequestError):
            ledger.touch("job", steps)

    def test_a_job_that_announced_no_step_cannot_release(self, ledger):
        """A mechanism that forgets to announce itself gets no free answer."""
        reserve(ledger, "job", TRAINING)
        with pytest.raises(RequestError, match="no step"):
            ledger.settle("job", b"free")
        assert ledger.release_of("job") is None

    def test_a_job_needs_an_account_a_split_and_a_digest(self, ledger):
        """Each missing part is named."""
        with pytest.raises(PolicyError):
            ledger.reserve("job", "other", "flchain", ["train"], TRAINING, DIGEST)
        with pytest.raises(RequestError):
            ledger.reserve("job", "risk", "flchain", [], TRAINING, DIGEST)
        with pytest.raises(RequestError):
            ledger.reserve("job", "risk", "flchain", ["train"], TRAINING, b"short")
        assert spent(ledger) == 0

    def test_a_loss_without_a_price_is_refused(self, ledger):
        """Infinite at the account's order."""
        with pytest.raises(RequestError):
            reserve(ledger, "job", Gaussian(1e-6))


class TestAccounts:
    def test_opening_twice_changes_nothing(self, ledger):
        """The desk opens before every request."""
        entries = ledger.log.size()
        ledger.open_account("risk", "flchain", "train", 1.0, 1e-6)
        assert ledger.log.size() == entries

    def test_a_larger_budget_keeps_the_order_and_what_is_spent(self, ledger):
        """Loss at one order can't be restated at another afterwards."""
        reserve(ledger, "job", answer(0.9))
        before = spent(ledger)
        ledger.open_account("risk", "flchain", "train", 2.0, 1e-6)
        row = ledger._db.execute("SELECT alpha, spent FROM account WHERE split = 'train'").fetchone()
        assert row == (ORDER.alpha, before)
        reserve(ledger, "more", answer(0.9))

    def test_a_budget_below_what_is_spent_is_refused(self, ledger):
        """What was released can't be taken back."""
        reserve(ledger, "job", answer(0.9))
        with pytest.raises(PolicyError):
            ledger.open_account("risk", "flchain", "train", 0.5, 1e-6)
        assert statement(ledger).epsilon == 1.0

    def test_an_unused_account_takes_the_new_budgets_own_order(self, ledger):
        """It has no history to keep."""
        ledger.open_account("risk", "flchain", "train", 3.0, 1e-6)
        assert ledger._db.execute("SELECT alpha FROM account WHERE split = 'train'").fetchone() == (9,)

    @pytest.mark.parametrize(
        "budget", [(0.0, 1e-6), (-1.0, 1e-6), (float("nan"), 1e-6), (1.0, 0.0), (1.0, 2.0)]
    )
    def test_budgets_that_are_none_are_refused(self, ledger, budget):
        """Before they are written."""
        with pytest.raises(RequestError):
            ledger.open_account("risk", "flchain", "validation", *budget)


class TestStatements:
    def test_a_new_account_has_room_for_its_whole_budget(self, ledger):
        """And has spent nothing."""
        assert statement(ledger) == Statement(1.0, 1e-6, 0.0, 1.0, 1.0, 0)

    def test_one_answer_spends_its_own_epsilon(self, ledger):
        """The composed figure of one job is that job's."""
        reserve(ledger, "job", answer(0.3))
        assert statement(ledger).spent == pytest.approx(0.3, abs=1e-6)
        assert statement(ledger).left == pytest.approx(0.7, abs=1e-6)

    def test_small_answers_compose_to_less_than_their_sum(self, ledger):
        """Nine of 0.3 fit in 1."""
        for i in range(9):
            reserve(ledger, str(i), answer(0.3))
        assert 0.9 < statement(ledger).spent <= 1.0
        assert statement(ledger).jobs == 9

    def test_the_room_stated_is_admitted(self, ledger):
        """And leaves none."""
        reserve(ledger, "first", Pure(0.4))
        reserve(ledger, "second", answer(statement(ledger).room))
        assert statement(ledger).room < 0.1

    def test_statements_are_read_while_others_write(self, ledger):
        """Each sees whole transactions only."""
        seen, done = [], threading.Event()

        def read() -> None:
            while not done.is_set():
                seen.append(statement(ledger).spent)

        reader = threading.Thread(target=read)
        reader.start()
        for i in range(20):
            reserve(ledger, str(i), answer(0.1))
        done.set()
        reader.join()
        assert seen == sorted(seen)

    def test_racing_jobs_share_a_budget_that_only_some_fit_in(self, ledger):
        """Exactly as many are admitted as when they come one by one."""
        price, admitted = units(answer(0.3), ORDER.alpha), []

        def run(name: str) -> None:
            try:
                reserve(ledger, name, answer(0.3), "train", "test")
            except BudgetError:
                return
            ledger.touch(name, 1)
            ledger.settle(name, name.encode())
            admitted.append(name)

        threads = [threading.Thread(target=run, args=(str(i),)) for i in range(16)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(admitted) == ORDER.units // price
        assert spent(ledger) == spent(ledger, "test") == price * len(admitted)


class TestReopening:
    def test_everything_settled_is_still_there(self, ledger, path, key):
        """Release, receipt and charge."""
        reserve(ledger, "job", answer(0.5))
        ledger.touch("job", 1)
        ledger.settle("job", b"table")
        before = statement(ledger)
        ledger.close()
        again = Ledger(path, key)
        assert again.release_of("job") == b"table"
        assert statement(again) == before
        verify_receipt(again.receipt_of("job"), key.public_key(), b"table")
        again.close()

    def test_what_was_open_is_ended(self, ledger, path, key):
        """Untouched refunded, touched charged and lost; neither can go on."""
        reserve(ledger, "idle", TRAINING)
        reserve(ledger, "busy", TRAINING)
        ledger.touch("busy", 7)
        ledger.close()
        again = Ledger(path, key)
        assert spent(again) == units(TRAINING.part(7), ORDER.alpha)
        states = dict(again._db.execute("SELECT name, state FROM job").fetchall())
        assert states == {"idle": "void", "busy": "lost"}
        again.close()

    def test_a_second_curator_is_refused(self, ledger, path, key):
        """In this process or in another."""
        with pytest.raises(SiteError, match="another process"):
            Ledger(path, key)
        child = os.fork()
        if child == 0:
            try:
                Ledger(path, key)
            except SiteError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    def test_a_file_that_is_no_ledger_is_refused(self, path, key):
        """And the lock on it is given back."""
        path.write_bytes(b"not a database" * 500)
        for _ in range(2):
            with pytest.raises(SiteError, match="cannot be read"):
                Ledger(path, key)

    def test_a_place_that_cannot_be_written_is_refused(self, key):
        """No curator without a ledger."""
        with pytest.raises(SiteError):
            Ledger(Path("/proc/ledger.db"), key)


class TestFailingDisk:
    def test_a_full_disk_refuses_and_loses_nothing(self, ledger):
        """No release without its charge; once there is space, the job settles."""
        reserve(ledger, "job", TRAINING)
        ledger.touch("job", 2)
        pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
        ledger._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(SiteError, match="nothing was released"):
            ledger.settle("job", bytes(1 << 20))
        assert ledger.release_of("job") is None
        assert spent(ledger) == units(TRAINING, ORDER.alpha)
        ledger._db.execute("PRAGMA max_page_count = 100000")
        ledger.settle("job", bytes(1 << 20))
        assert spent(ledger) == units(TRAINING.part(2), ORDER.alpha)

    def test_a_read_only_disk_refuses_every_step(self, ledger):
        """A step that can't be journalled doesn't run."""
        reserve(ledger, "job", TRAINING)
        ledger._db.execute("PRAGMA query_only = ON")
        for act in (
            lambda: ledger.touch("job", 1),
            lambda: reserve(ledger, "other", TRAINING),
            lambda: ledger.abandon("job", "cancelled"),
        ):
            with pytest.raises(SiteError):
                act()
        ledger._db.execute("PRAGMA query_only = OFF")
        ledger.touch("job", 1)
