"""Answers that wait for custodians: computed, charged and logged at once, released by their signatures only."""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import clinic
import hospital
import msgspec
import pytest
import torch
import ward
from clinic import Clinic, newest, until
from safetensors.torch import load

from rapha_lab.client.releases import verify_release
from rapha_lab.curator.airlock import MOST_WAITING, Airlock
from rapha_lab.curator.desk import _blinded
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.mechanisms import Answer
from rapha_lab.protocol.decision import Decision, decide, subject_of
from rapha_lab.protocol.errors import (
    LogError,
    PolicyError,
    RaphaError,
    RefusedError,
    RequestError,
    WaitingError,
)
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.release import Release, canonical, statement

_ASKED = itertools.count(500)
FIT = f"""
import torch
model = torch.nn.Linear({len(ward.FEATURES)}, 1)
patients.train.fit(model, inputs={ward.FEATURES}, target="died", epochs=1, epsilon=2)
"""


def log(clinic: Clinic, kind: str) -> list[dict[str, object]]:
    """The log's entries of one kind."""
    told = clinic.connect()._channel.call("log", {"start": 0})[0]["entries"]
    return [entry for entry in map(json.loads, told) if entry["kind"] == kind]


def mean() -> str:
    """A question that nobody asked before, since one that was asked is answered as before."""
    return f'patients.mean("age", epsilon={next(_ASKED) / 1000})'


class TestOneCustodian:
    def test_the_answer_waits_and_goes_on_in_its_cell_once_released(self, shared: Clinic) -> None:
        """Charged before; nothing of it is shown while it waits; the custodian saw the very values."""
        job = until(shared.connect().run(mean(), "ward"), "waiting")
        assert job.outputs == []
        assert "waits for a custodian" in job.told["waits"]["what"]
        assert "waits for a custodian" in job._repr_mimebundle_()["text/plain"]
        guardian = shared.custodian()
        told = guardian.show(newest(guardian)["subject"])
        seen = json.loads(told["document"])["release"]
        assert log(shared, "charge")[-1]["job"] == seen["job"]
        assert guardian.approve(told["subject"])["state"] == "approved"
        release = until(job, "done").releases[0]
        assert release.values == seen["values"]
        verify_release(release, shared.connect().key)
        for told in ({"epsilon": release.epsilon / 2}, {"delta": 0.0}, {"split": "test"}, {"op": "fit"}):
            with pytest.raises(LogError, match="other bytes"):  # than of this price and question
                verify_release(msgspec.structs.replace(release, **told), shared.connect().key)

    def test_a_refusal_reaches_the_researcher_with_its_reason(self, shared: Clinic) -> None:
        """And stays: neither custodian can take it back, and asking again is refused again, for nothing."""
        question = mean()
        job = until(shared.connect().run(question, "ward"), "waiting")
        guardian, officer = shared.custodian(0), shared.custodian(1)
        subject = newest(guardian)["subject"]
        guardian.refuse(subject, "Ask on a larger split.")
        until(job, "failed")
        with pytest.raises(RefusedError, match=r"refused the answer.*Ask on a larger split"):
            job.raise_error()
        for custodian in (guardian, officer):
            with pytest.raises(PolicyError, match="refused already"):
                custodian.approve(subject)
        with pytest.raises(RefusedError, match="larger split"):
            shared.connect().collect(subject)
        charged = len(log(shared, "charge"))
        with pytest.raises(RefusedError, match="larger split"):
            shared.connect().run(question, "ward").wait()
        assert len(log(shared, "charge")) == charged

    def test_a_lane_that_is_auto_does_not_wait(self, shared: Clinic) -> None:
        """And its charge says so, as the other's says who released."""
        source = FIT.split("patients")[0] + (
            f'patients.test.evaluate(model, ["auroc"], epsilon=1, inputs={ward.FEATURES}, target="died")'
        )
        assert shared.connect().run(source, "ward").wait().releases
        assert log(shared, "charge")[-1]["mode"] == "auto"


class TestTwoCustodians:
    def test_one_custodian_is_not_two_however_often(self, shared: Clinic) -> None:
        """The second must be another; a model's weights come after both."""
        job = until(shared.connect().run(FIT, "ward", outputs=["model"]), "waiting")
        guardian, officer = shared.custodian(0), shared.custodian(1)
        subject = newest(guardian)["subject"]
        assert any("weight" in line for line in guardian.show(subject)["findings"])
        for _ in range(2):
            assert guardian.approve(subject)["state"] == "waiting"
        assert job.state == "waiting"
        assert officer.approve(subject)["state"] == "approved"
        until(job, "done")
        assert job.values["values"]["model"]["kind"] == "module"

    def test_a_loop_of_ones_own_cannot_wait_and_is_refused(self, shared: Clinic) -> None:
        """Each step's gradient would leave by itself."""
        job = shared.connect().run("for batch in patients.train.batches(epsilon=1): pass", "ward")
        with pytest.raises(PolicyError, match="gradient at every step"):
            job.wait()


class TestForgery:
    @pytest.fixture
    def held(self, shared: Clinic) -> Iterator[dict[str, object]]:
        until(shared.connect().run(mean(), "ward", session="held"), "waiting")
        guardian = shared.custodian()
        yield guardian.show(newest(guardian)["subject"])
        shared.connect().end_sessions("held")

    def send(self, shared: Clinic, decision: Decision, key: PrivateKey) -> None:
        text = msgspec.json.encode(decision).decode()
        shared.connect(key)._channel.call("decide", {"text": text})

    def test_nobody_but_a_custodian_decides(self, shared: Clinic, held: dict[str, str]) -> None:
        """Not the researcher, and not for a custodian."""
        document = held["document"].encode()
        mine = decide("approve", document, held["policy"], shared.researcher)
        forged = msgspec.structs.replace(mine, key=str(shared.custodians[0].public))
        moved = msgspec.structs.replace(
            decide("refuse", document, held["policy"], shared.custodians[0]), act="approve"
        )
        stale = decide("approve", document, "0" * 64, shared.custodians[0])
        for decision in (mine, forged, moved, stale):
            with pytest.raises(PolicyError):
                self.send(shared, decision, shared.researcher)
        with pytest.raises(WaitingError):
            shared.connect().collect(held["subject"])

    def test_a_decision_on_another_answer_is_none_on_this(self, shared: Clinic, held: dict[str, str]) -> None:
        """One letter of the document is another subject."""
        changed = held["document"].replace("age", "agf")
        with pytest.raises(RaphaError, match="no such thing"):
            self.send(
                shared,
                decide("approve", changed.encode(), held["policy"], shared.custodians[0]),
                shared.custodians[0],
            )

    def test_a_researcher_sees_that_it_waits_and_not_what(self, shared: Clinic, held: dict[str, str]) -> None:
        """Neither in the list nor by asking for it."""
        site = shared.connect()
        assert any(told["subject"] == held["subject"] for told in site.airlock())
        assert not any("document" in told or "findings" in told for told in site.airlock())
        with pytest.raises(PolicyError, match="Only custodians"):
            site._channel.call("item", {"text": held["subject"]})

    def test_every_decision_is_in_the_log_and_its_signature_can_be_checked(
        self, shared: Clinic, held: dict[str, str]
    ) -> None:
        """By anybody, who does not read the reason."""
        shared.custodian().refuse(held["subject"], "A reason in confidence.")
        entry = log(shared, "decision")[-1]
        assert "confidence" not in json.dumps(entry)
        told = {name: entry[name] for name in ("act", "subject", "policy", "key", "time", "reason")}
        signed = b"rapha-lab/decision/v1\0" + msgspec.json.encode(told, order="sorted")
        key = shared.custodians[0].public
        assert entry["key"] == str(key)
        assert key.verifies(bytes.fromhex(str(entry["signature"])), signed)


class TestSurvival:
    def test_what_waits_survives_a_restart_and_is_collected(self, tmp_path: Path) -> None:
        """Session and cell are gone; the answer, its price and its decisions are not."""
        config, researcher, custodians = clinic.prepare(tmp_path)
        with hospital.running(config) as (_, url):
            job = until(hospital.connected(url, researcher).run(FIT, "ward"), "waiting")
            first = clinic.Custodian(hospital.connected(url, custodians[0]), custodians[0])
            subject = newest(first)["subject"]
            assert first.approve(subject)["state"] == "waiting"
            spent = hospital.spent(tmp_path)
        with hospital.running(config) as (_, url):
            site = hospital.connected(url, researcher)
            assert [(t["subject"], t["state"], t["missing"]) for t in site.airlock()] == [
                (subject, "waiting", 1)
            ]
            assert [(t["id"], t["state"]) for t in site.jobs()] == [(job.id, "waiting")]
            with pytest.raises(WaitingError):
                site.collect(subject)
            clinic.Custodian(hospital.connected(url, custodians[2]), custodians[2]).approve(subject)
            release, blob = site.collect(subject)
            assert isinstance(release, Release)
            assert {n: t.shape for n, t in load(blob).items()}["weight"] == torch.Size(
                [1, len(ward.FEATURES)]
            )
            verify_release(release, site.key)
            assert hospital.spent(tmp_path) == spent
            assert site.jobs() == []

    def test_what_was_refused_cannot_be_rewritten_in_the_database(self, tmp_path: Path) -> None:
        """By a slip of ours, that is."""
        config, researcher, custodians = clinic.prepare(tmp_path)
        with hospital.running(config) as (_, url):
            until(hospital.connected(url, researcher).run(mean(), "ward"), "waiting")
            guardian = clinic.Custodian(hospital.connected(url, custodians[0]), custodians[0])
            guardian.refuse(newest(guardian)["subject"], "No.")
        with (
            sqlite3.connect(tmp_path / "state" / "ledger.sqlite") as db,
            pytest.raises(sqlite3.IntegrityError),
        ):
            db.execute("UPDATE airlock SET state = 'approved'")

    def test_a_cancelled_cell_leaves_its_answer_in_the_airlock(self, shared: Clinic) -> None:
        """And the session goes on."""
        site = shared.connect()
        job = until(site.run("n = 7\n" + mean(), "ward", session="other"), "waiting")
        subject = newest(shared.custodian())["subject"]
        job.cancel()
        until(job, "cancelled")
        assert site.run("n", "ward", session="other").wait().outputs[0]["data"]["text/plain"] == "7"
        shared.custodian().approve(subject)
        assert site.collect(subject)[0].values["column"] == "age"


def test_the_log_does_not_tell_an_answer_that_waits(shared: Clinic) -> None:
    """An exact guess of it, put through the same hash, is nowhere in the log: neither as charge nor as subject."""
    job = until(shared.connect().run(mean(), "ward", session="guess"), "waiting")
    guardian = shared.custodian()
    told = guardian.show(newest(guardian)["subject"])
    seen = json.loads(told["document"])
    release = seen["release"]
    entries = {
        json.loads(e).get("release")
        for e in shared.connect()._channel.call("log", {"start": 0})[0]["entries"]
    }
    subjects = {newest(guardian)["subject"]}
    assert hashlib.sha256(statement(release)).hexdigest() in entries
    del release["values"]["nonce"]
    assert hashlib.sha256(statement(release)).hexdigest() not in entries
    assert subject_of(canonical(seen)) not in subjects
    job.cancel()
    shared.connect().end_sessions("guess")


def test_two_answers_alike_have_nonces_of_their_own() -> None:
    """Long enough that none is guessed."""
    told = [_blinded(Answer({"kind": "count", "value": 7})).values for _ in range(50)]
    assert len({each["nonce"] for each in told}) == 50
    assert all(len(each["nonce"]) == 32 for each in told)


class TestFlood:
    def test_more_than_custodians_can_read_does_not_come_in(self, tmp_path: Path) -> None:
        """Functions and answers together, by researcher; what they have decided on makes room; nothing is reserved."""
        ledger = Ledger(tmp_path / "ledger.sqlite", PrivateKey.create().parts[0])
        airlock = Airlock(ledger)
        about = {"project": "p", "dataset": "ward", "lane": "review", "mode": "one custodian", "job": "1-1"}

        def propose(number: int, who: str = "ann") -> None:
            airlock.propose(b"%d" % number, b"", researcher=who, findings=[], **about)

        for number in range(MOST_WAITING):
            airlock.room("ann")
            propose(number)
        propose(0)  # the same again is no more
        for more in (lambda: propose(99), lambda: airlock.room("ann")):
            with pytest.raises(RequestError, match="Too much of yours waits"):
                more()
        airlock.room("bob")
        propose(100, "bob")
        with ledger.transaction() as db:
            db.execute("UPDATE airlock SET state = 'refused' WHERE subject = ?", (subject_of(b"3"),))
        propose(99)
        ledger.close()
