"""A question asked twice, through a real site: the first answer again, at no price, and only where that is sound."""

import json
import tomllib

import hospital
import pytest
import ward
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.curator import desk as desk_module
from rapha_lab.curator.cohort import Cohort, mark_of
from rapha_lab.curator.desk import Caller, Desk
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.noise import SystemNoise
from rapha_lab.protocol import messages
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import Policy
from rapha_lab.protocol.schema import Schema

MEAN = messages.encode(messages.Mean(dataset="ward", column="age", split="train", epsilon=0.5))


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Asks desks on one ledger, by researcher, reading of the records, who opted out since, page and day."""
    alice, bob, custodian = (PrivateKey.create() for _ in range(3))
    schema = Schema.from_dict(tomllib.loads(ward.SCHEMA))
    ledger = Ledger(tmp_path / "ledger", Ed25519PrivateKey.generate())
    cohorts = {reading: Cohort(schema, ward.frame(), bytes(16)) for reading in (0, 1)}

    def ask(who="alice", *, job, request=MEAN, tensors=b"", reading=0, left=(), version=1, day="2026-01-01"):
        text = hospital.policy([alice, bob], [custodian], ["ward"]).text
        policy = Policy.parse(text.replace("version = 1", f"version = {version}"))
        cohorts[reading].leave_out(frozenset(mark_of(patient, bytes(16)) for patient in left))
        monkeypatch.setattr(desk_module, "_today", lambda: day)
        desk = Desk(lambda: policy, ledger, {"ward": cohorts[reading]}, SystemNoise(), "test", simulated=True)
        researcher = {"alice": alice, "bob": bob}[who].public
        return desk.answer(Caller(str(researcher), "p", job), request, tensors, lambda *_: None)[0]

    def spent():
        return ledger._db.execute("SELECT sum(spent) FROM account").fetchone()[0]

    yield ask, spent, ledger
    ledger.close()


class TestAtTheDesk:
    def test_the_same_question_costs_nothing_and_is_the_same_answer(self, house):
        """Under another job's number; its receipt is the first one's, and it says that it is a repetition."""
        ask, spent, _ = house
        first = ask(job="one")
        before = spent()
        again = ask(job="two")
        assert spent() == before > 0
        assert again.values == first.values
        assert (first.repeated, again.repeated) == (False, True)
        assert again.job == again.receipt["job"] == "one"

    @pytest.mark.parametrize(
        "other",
        [
            {"who": "bob"},
            {"reading": 1},
            {"day": "2026-01-02"},
            {"version": 2},
            {"request": MEAN.replace(b"0.5", b"0.4")},
            {"request": MEAN + b" "},
            {"tensors": b"x"},
        ],
        ids=lambda other: next(iter(other)),
    )
    def test_any_difference_makes_it_another_question(self, house, other):
        """Of the asker, the reading of the records, the day, the page, or a byte of it: computed and paid anew."""
        ask, spent, _ = house
        first = ask(job="one")
        before = spent()
        again = ask(job="two", **other)
        assert spent() > before
        assert again.values != first.values
        assert not again.repeated

    def test_a_repetition_does_not_tell_that_somebody_opted_out(self, house):
        """It stays free and the same that day, as if nobody had; new answers are without them at once."""
        ask, spent, _ = house
        first = ask(job="one")
        before = spent()
        everybody = [f"w{n:05d}" for n in range(ward.PATIENTS - 20)]
        assert ask(job="two", left=everybody).values == first.values
        assert spent() == before
        count = messages.encode(messages.Count(dataset="ward", split="all", epsilon=2.0))
        assert ask(job="three", request=count, left=everybody).value < 100

    def test_who_opted_out_is_out_of_repetitions_from_the_next_day(self, house):
        """And is asked for anew, then."""
        ask, _, _ = house
        count = messages.encode(messages.Count(dataset="ward", split="all", epsilon=2.0))
        everybody = [f"w{n:05d}" for n in range(ward.PATIENTS - 20)]
        assert ask(job="one", request=count).value > 1000
        assert ask(job="two", request=count, left=everybody).value > 1000
        assert ask(job="three", request=count, left=everybody, day="2026-01-02").value < 100

    def test_a_lost_reply_is_given_whatever_the_day(self, house):
        """It is paid for: by the job's own number, the site started again or not."""
        ask, spent, _ = house
        first = ask(job="one")
        before = spent()
        assert ask(job="one", reading=1, day="2026-01-02").values == first.values
        assert spent() == before

    def test_loops_are_no_answers(self, house):
        """Opened twice, a loop is reserved twice."""
        ask, spent, _ = house
        opened = messages.encode(
            messages.Open(dataset="ward", split="train", epsilon=0.5, steps=3, batch=50, clip=1.0)
        )
        ask(job="one", request=opened)
        before = spent()
        ask(job="two", request=opened)
        assert spent() == 2 * before

    @pytest.mark.parametrize("other", [{"who": "bob"}, {"version": 2}, {"reading": 1}])
    def test_a_desk_that_forgets_part_of_the_question_would_be_caught(self, house, monkeypatch, other):
        """The differences above are told apart by the digest and the basis, and by nothing else."""
        ask, _, _ = house
        honest = desk_module._question
        monkeypatch.setattr(desk_module, "_question", lambda caller, *rest: honest(Caller("", "", ""), *rest))
        monkeypatch.setattr(desk_module, "_basis", lambda *_: b"")
        assert ask(job="one").values == ask(job="two", **other).values

    def test_the_log_names_the_question_and_nothing_of_the_records(self, house):
        """Another reading of the records gives the same digest of it."""
        ask, _, ledger = house
        ask(job="one")
        ask(job="two", reading=1)
        entries = [json.loads(entry) for entry in ledger.log.entries()]
        first, second = (entry["request"] for entry in entries if entry["kind"] == "reserve")
        assert first == second


class TestThroughASite:
    def test_a_cell_that_is_run_again_costs_nothing(self, tmp_path):
        """The card says so, and the cell's own count of what it spent."""
        config, key = hospital.prepare(tmp_path, ward.SCHEMA, ward.frame(), "ward")
        with hospital.running(config) as (_, url):
            site = hospital.connected(url, key)
            first = site.run("patients.mean('age', epsilon=0.2)", "ward").wait()
            before = hospital.spent(tmp_path)
            again = site.run("patients.mean('age', epsilon=0.2)", "ward").wait()
            assert hospital.spent(tmp_path) == before
        assert again.releases[0].values == first.releases[0].values
        assert "asked before, so free" in repr(again.releases[0])
        assert (first.told["spent"], again.told["spent"]) == (0.2, 0.0)
