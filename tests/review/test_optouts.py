"""Patients who opted out: left out of everything from the next step on, and nobody can tell when or how many."""

from __future__ import annotations

import io
import json
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import clinic
import polars
import pytest
import torch
import ward
from clinic import Clinic
from house import House, numbers
from test_policies import CUSTODIANS, FIRST, STRANGERS, fixed

from rapha_lab.cli import main
from rapha_lab.curator.cohort import Cohort, mark_of
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.mechanisms import train
from rapha_lab.curator.noise import SystemNoise
from rapha_lab.curator.optouts import OptOuts, Version, add, label, versions
from rapha_lab.custodian.optouts import kept, mend
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import PolicyError, RaphaError
from rapha_lab.protocol.schema import Schema
from rapha_lab.session import tracing

SALT = bytes(range(32))
KEYS = {str(key.public) for key in CUSTODIANS}
SCHEMA = Schema.from_dict(tomllib.loads(ward.SCHEMA))


@pytest.fixture
def cohort() -> Cohort:
    return Cohort(SCHEMA, ward.frame(), SALT)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite", fixed(7).parts[0])
    yield opened
    opened.close()


def lists(tmp_path: Path, ledger: Ledger) -> OptOuts:
    return OptOuts(tmp_path / "opt-outs", ledger, lambda: FIRST, SALT)


FAULTS = ("stranger", "edited", "between", "dropped", "unreadable")


def spoil(path: Path, fault: str) -> None:
    """Three patients opt out, and then a line of the list is not as a custodian signed it."""
    for patient in ("w00001", "w00002", "w00003"):
        add(path, "ward", CUSTODIANS[0], SALT, [patient])
    told = path.read_bytes().splitlines()
    if fault == "stranger":
        add(path, "ward", STRANGERS[0], SALT, ["w00004"])
    elif fault == "edited":
        told[1] = told[1].replace(b'"added":["', b'"added":["' + b"0" * 32 + b'","')
    elif fault == "between":
        told[1], told[2] = told[2], told[1]
    elif fault == "dropped":
        del told[1]
    else:
        told[2] = told[2][:-9]
    if fault != "stranger":
        path.write_bytes(b"\n".join(told) + b"\n")


class TestLists:
    def test_who_opts_out_is_in_no_view_until_they_return(
        self, tmp_path: Path, ledger: Ledger, cohort: Cohort
    ) -> None:
        """In any split; an identifier that is nobody's changes nothing."""
        path, found = tmp_path / "opt-outs", lists(tmp_path, ledger)
        found.apply(cohort)
        assert len(cohort.view("all")) == ward.PATIENTS
        add(path, "ward", CUSTODIANS[0], SALT, ["w00003", "w00007", "nobody"])
        found.apply(cohort)
        assert len(cohort.view("all")) == ward.PATIENTS - 2
        assert sum(len(cohort.view(s)) for s in ("train", "validation", "test")) == ward.PATIENTS - 2
        assert b"w00003" not in path.read_bytes()
        add(path, "ward", CUSTODIANS[1], SALT, [], ["w00003"])
        found.apply(cohort)
        assert len(cohort.view("all")) == ward.PATIENTS - 1

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_version_that_does_not_hold_closes_the_dataset(
        self, tmp_path: Path, ledger: Ledger, cohort: Cohort, fault: str
    ) -> None:
        """Whoever wrote it: nothing is answered until the custodians looked."""
        path = tmp_path / "opt-outs"
        spoil(path, fault)
        for _ in range(2):
            with pytest.raises(RaphaError):
                lists(tmp_path, ledger).apply(cohort)

    def test_what_was_taken_outlives_its_line(self, tmp_path: Path, ledger: Ledger, cohort: Cohort) -> None:
        """An operator who empties the file brings nobody back."""
        add(tmp_path / "opt-outs", "ward", CUSTODIANS[0], SALT, ["w00003"])
        lists(tmp_path, ledger).apply(cohort)
        (tmp_path / "opt-outs").unlink()
        again = Cohort(SCHEMA, ward.frame(), SALT)
        lists(tmp_path, ledger).apply(again)
        assert len(again.view("all")) == ward.PATIENTS - 1

    def test_a_version_that_would_be_overlooked_closes_the_dataset(
        self, tmp_path: Path, ledger: Ledger, cohort: Cohort
    ) -> None:
        """The file was lost and begun anew, with a number that was taken: passed over, somebody would not be left out."""
        path = tmp_path / "opt-outs"
        add(path, "ward", CUSTODIANS[0], SALT, ["w00003"])
        found = lists(tmp_path, ledger)
        found.apply(cohort)
        path.unlink()
        add(path, "ward", CUSTODIANS[0], SALT, ["w00004"])
        with pytest.raises(PolicyError, match="does not follow"):
            found.apply(cohort)
        mend(path, CUSTODIANS[1], KEYS, kept(tmp_path / "ledger.sqlite"))
        found.apply(cohort)
        assert len(cohort.view("all")) == ward.PATIENTS - 2

    def test_a_new_version_follows_what_was_taken_though_the_file_is_lost(
        self, tmp_path: Path, ledger: Ledger, cohort: Cohort
    ) -> None:
        """As the command writes it: it asks the ledger's database, too, which the site may have open."""
        path, found = tmp_path / "opt-outs", lists(tmp_path, ledger)
        add(path, "ward", CUSTODIANS[0], SALT, ["w00003"])
        found.apply(cohort)
        path.unlink()
        version = add(path, "ward", CUSTODIANS[0], SALT, ["w00004"], taken=kept(tmp_path / "ledger.sqlite"))
        assert version.number == 2
        found.apply(cohort)
        assert len(cohort.view("all")) == ward.PATIENTS - 2

    def test_two_custodians_at_once_write_two_versions(self, tmp_path: Path) -> None:
        """Else both had the same number, and the second closed the dataset."""
        path = tmp_path / "opt-outs"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: add(path, "ward", CUSTODIANS[n % 2], SALT, [f"w{n}"]), range(32)))
        assert [v.number for v in versions(path)] == list(range(1, 33))

    def test_a_last_line_without_its_end_stays_a_version(self, tmp_path: Path) -> None:
        """An editor took it; what is added next is a line of its own, or neither would leave anybody out."""
        path = tmp_path / "opt-outs"
        add(path, "ward", CUSTODIANS[0], SALT, ["w00003"])
        path.write_bytes(path.read_bytes().rstrip())
        add(path, "ward", CUSTODIANS[0], SALT, ["w00004"])
        assert [v.number for v in versions(path)] == [1, 2]

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_custodian_mends_it_and_nobody_comes_back_in(
        self, tmp_path: Path, ledger: Ledger, cohort: Cohort, fault: str
    ) -> None:
        """What a custodian had signed is signed again; what none had signed leaves nobody out; what is lost is said."""
        path = tmp_path / "opt-outs"
        spoil(path, fault)
        found = lists(tmp_path, ledger)
        with pytest.raises(RaphaError, match="optout mend"):
            found.apply(cohort)
        said = mend(path, CUSTODIANS[1], KEYS, kept(tmp_path / "ledger.sqlite"))
        found.apply(cohort)
        out = {"stranger": 3, "edited": 2, "between": 3, "dropped": 2, "unreadable": 2}[fault]
        assert len(cohort.view("all")) == ward.PATIENTS - out
        words = {"stranger": "No custodian signed", "unreadable": "has to be added again"}
        assert words.get(fault, "does not follow") in "\n".join(said)
        assert list(tmp_path.glob("opt-outs.aside-*"))
        assert mend(path, CUSTODIANS[1], KEYS, kept(tmp_path / "ledger.sqlite")) == []
        add(path, "ward", CUSTODIANS[0], SALT, ["w00009"])  # and it goes on
        found.apply(cohort)
        assert len(cohort.view("all")) == ward.PATIENTS - out - 1

    def test_receipts_and_log_tell_no_moment_and_no_number(
        self, tmp_path: Path, ledger: Ledger, cohort: Cohort
    ) -> None:
        """Every job names another hash; the log commits once a day, changed or not; the key tells which it was."""
        path, found = tmp_path / "opt-outs", lists(tmp_path, ledger)
        found.apply(cohort)
        before = [found.label("ward", f"job-{n}") for n in range(3)]
        add(path, "ward", CUSTODIANS[0], SALT, ["w00003"])
        found.apply(cohort)
        after = [found.label("ward", f"job-{n}") for n in range(3)]
        assert len({*before, *after}) == 6
        assert after[1] == label(SALT, "ward", 1, "job-1")
        entries = [json.loads(entry) for entry in ledger.log.entries()]
        assert [e["kind"] for e in entries] == ["opt-outs"]
        assert set(entries[0]) == {"kind", "dataset", "day", "list"}
        lists(tmp_path, ledger).apply(cohort)
        assert ledger.log.size() == 1

    def test_without_the_signature_anybody_opts_anybody_out(
        self, tmp_path: Path, ledger: Ledger, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The mutant that does not check: the test above has teeth."""
        version = add(tmp_path / "opt-outs", "ward", STRANGERS[0], SALT, ["w00004"])
        assert isinstance(version, Version)
        with pytest.raises(PolicyError):
            lists(tmp_path, ledger).apply(cohort)
        monkeypatch.setattr(OptOuts, "_check", lambda *_: None)
        lists(tmp_path, ledger).apply(cohort)
        assert len(cohort.view("all")) == ward.PATIENTS - 1


def test_a_running_training_leaves_them_out_from_its_next_step(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their slots hold the row of zeros, in a shape that is the same."""
    model, example = torch.nn.Linear(1, 1), {"x": torch.zeros(1)}
    traced = tracing.loss_program(model, torch.nn.BCEWithLogitsLoss(), example, torch.zeros(()))
    sgd = messages.Optimizer(name="sgd", settings={"lr": 0.1})
    ask = messages.Fit(
        dataset="ward", split="all", epsilon=900.0, program=traced.program, clip=1.0, steps=3, optimizer=sgd,
        inputs={"x": ["age"], "target": "died"}, batch=ward.PATIENTS,
    )  # fmt: skip
    drawn, honest = [], train.clipped_sum

    def watched(*args: Any) -> Any:
        drawn.append(args[4])
        return honest(*args)

    monkeypatch.setattr(train, "clipped_sum", watched)
    monkeypatch.setattr(train, "block", lambda steps: 1)
    marks = frozenset([mark_of("w00005", SALT)])
    calls = []

    def progress(steps: int, doing: str = "") -> None:
        calls.extend([] if doing else [steps])
        if len(calls) == 2:
            cohort.leave_out(marks)

    plan = train.plan(ask, traced.blob, SCHEMA, 1e-5, SystemNoise())
    plan.run(cohort.view("all"), progress)
    assert [5 in step.tolist() for step in drawn] == [True, False, False]
    assert len({len(step) for step in drawn}) == 1
    assert all(6 in step.tolist() for step in drawn)


@pytest.mark.parametrize("kept", [True, False])
def test_a_running_loop_leaves_them_out_from_its_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """Nobody else asks anything meanwhile; a list that does not hold ends the loop."""
    rows = polars.DataFrame({"pid": [f"w{n:05}" for n in range(200)], "x0": 0.5})
    house = House(tmp_path, numbers("ward", 1, 200, outcome=False), rows, epsilon=1000.0)
    path, salt, drawn, honest = tmp_path / "opt-outs", bytes(range(16)), list[Any](), train.clipped_sum
    house.desk._opt_outs = OptOuts(path, house.ledger, lambda: FIRST, salt)

    def watched(*args: Any) -> Any:
        drawn.append({*args[4].tolist()})
        return honest(*args)

    monkeypatch.setattr(train, "clipped_sum", watched)
    model = torch.nn.Linear(1, 1)

    def loop() -> None:
        for batch in house.patients.batches(200, epochs=3, epsilon=900.0):
            model(batch[["x0"]]).sum().backward()
            if len(drawn) == 1:
                who = CUSTODIANS[0] if kept else STRANGERS[0]
                add(path, "ward", who, salt, ["w00005"])

    if kept:
        loop()
        assert [5 in step for step in drawn] == [True, False, False]
        assert all(6 in step for step in drawn)
    else:
        with pytest.raises(PolicyError, match="does not hold"):
            loop()
        assert len(drawn) == 1


def test_a_site_applies_a_list_at_once_and_names_it_in_the_receipt(
    shared: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the custodian's command; `which` opens what the receipt names."""
    monkeypatch.setenv("RAPHA_LAB_PASSPHRASE", "a long passphrase")
    shared.custodians[1].save(tmp_path / "officer", "a long passphrase")
    config = shared.folder / "site.toml"
    config.write_text(
        'name = "clinic"\nstate = "state"\npolicy = "policy.toml"\ndatasets = [{schema = "ward.toml"}]\n'
    )
    ask = "patients.test.count(epsilon=1)"
    job = shared.connect().run(ask, "ward", session="opt-outs")
    clinic.until(job, "waiting")
    monkeypatch.setattr("sys.stdin", io.StringIO("w00011\nw00012\n"))
    shared.researcher.save(tmp_path / "researcher", "a long passphrase")
    for dataset, who, told in (
        ("wrad", "officer", "no dataset 'wrad'"),
        ("ward", "researcher", "none of the policy's custodians"),
    ):
        assert main(["optout", "add", str(config), dataset, "w00011", "--key", str(tmp_path / who)]) == 1
        assert told in capsys.readouterr().err
    assert versions(shared.folder / "state" / "opt-outs") == []
    assert main(["optout", "add", str(config), "ward", "--key", str(tmp_path / "officer")]) == 0
    said = capsys.readouterr().out
    assert "2 patient(s) added" in said
    assert "Spelled" not in said
    again = ask.replace("1)", "2)")  # another question: the same one would have the same answer today
    other = clinic.until(shared.connect().run(again, "ward", session="opt-outs 2"), "waiting")
    entries = [json.loads(e) for e in shared.connect()._channel.call("log", {"start": 0})[0]["entries"]]
    charges = {e["job"].partition("-")[0]: e for e in entries if e["kind"] == "charge"}
    for each, number in ((job, 0), (other, 1)):
        entry = charges[each.id]
        assert main(["optout", "which", str(config), "ward", entry["job"], entry["opt-outs"]]) == 0
        assert f"Version {number} of ward." in capsys.readouterr().out
    assert main(["optout", "list", str(config)]) == 0
    assert "ward 1: 2 added, 0 returned" in capsys.readouterr().out
    assert len(versions(shared.folder / "state" / "opt-outs")) == 1
    assert main(["optout", "return", str(config), "ward", "11", "--key", str(tmp_path / "officer")]) == 0
    assert "1 of them are no patients of the records as they are: 11" in capsys.readouterr().out
    assert main(["optout", "mend", str(config), "--key", str(tmp_path / "researcher")]) == 1
    assert main(["optout", "mend", str(config), "--key", str(tmp_path / "officer")]) == 0
    assert "Every version holds" in capsys.readouterr().out
    for each in (job, other):
        each.cancel()
    shared.connect().end_sessions("opt-outs")
    shared.connect().end_sessions("opt-outs 2")
