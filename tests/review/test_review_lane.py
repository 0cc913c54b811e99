"""Any Python on the records, by the custodians' leave: approved by hash, run behind the walls, looked at before it leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import clinic
import pytest
import torch
from clinic import Clinic, newest, until
from safetensors.torch import load, save

from rapha_lab.cli import main
from rapha_lab.client.custodian import changes, described, in_words
from rapha_lab.protocol.decision import subject_of
from rapha_lab.protocol.errors import CellError, PolicyError, RaphaError, RefusedError, TrustError
from rapha_lab.session import parcels

MEDIANS = """
def medians(frame, digits):
    import polars
    table = frame.group_by("sex").agg(polars.col("age").median().round(digits).alias("age_median"))
    return {"table": table.drop_nulls().sort("sex"), "columns": len(frame.columns)}

told = patients.review(medians, columns=["age", "sex"], inputs={"digits": 0})
"""
LEAK = """
def leak(frame):
    return frame.head(3)

rows = patients.review(leak, columns=["age", "potassium", "sex"])
"""
WEIGHED = """
import torch

def weighed(frame, w, n):
    return float(w.sum()) + int(n)

given = {"w": torch.arange(12.0).reshape(3, 4), "n": torch.tensor(7)}
import polars as pl
patients.where(pl.col("age") > 40).review(weighed, columns=["age"], inputs=given)
"""
FORGED = """
from rapha_lab.protocol import messages

source = "def other(frame, k): return None\\ndef kind(frame, k): return type(k).__name__"
k = {"values": {"k": {"kind": "plain", "value": 1.0}}}
patients._ask(messages.Review(dataset="ward", split="all", source=source, name="kind", columns=["age"], inputs=k), b"")
"""
FAILS = """
def fails(frame):
    raise ValueError("the first patient is %r" % frame.row(0)[0])

patients.review(fails, columns=["age"], seconds=5)
"""
REACHES = """
def reaches(frame):
    import os, socket
    found = []
    for attempt in (lambda: socket.socket(), lambda: open("/etc/passwd"), lambda: os.fork()):
        try:
            attempt()
            found.append(1.5)
        except OSError:
            found.append(0.5)
    return found

found = patients.review(reaches, columns=["age"], seconds=5)
"""


@pytest.fixture
def session(shared: Clinic) -> Iterator[str]:
    """A session of its own."""
    if shared.site.tier != "S3":
        pytest.skip(f"reviewed functions need the sandbox's tier S3; this machine reaches {shared.site.tier}")
    yield "reviewed"
    shared.connect().end_sessions("reviewed")


def approved(shared: Clinic, source: str, session: str, *names: str) -> tuple[Any, dict[str, Any]]:
    """The cell after its function was approved and ran, and what then waits."""
    job = until(shared.connect().run(source, "ward", session=session, outputs=names), "waiting")
    guardian = shared.custodian()
    told = newest(guardian, job=job)
    if told["kind"] == "function":
        guardian.approve(told["subject"])
    return job, guardian.show(newest(guardian, "answer", job)["subject"])


def test_a_function_runs_once_approved_and_its_answer_leaves_once_released(
    shared: Clinic, session: str
) -> None:
    """Two looks: at the source with its inputs, and at the result; no budget is charged, the log names it."""
    job = until(shared.connect().run(MEDIANS, "ward", session=session, outputs=["told"]), "waiting")
    guardian = shared.custodian()
    proposed = guardian.show(newest(guardian, job=job)["subject"])
    words = in_words(proposed)
    for part in ("def medians", "age, sex", "costs no epsilon", "digits", "No function of this project"):
        assert part in words
    spent = clinic.hospital.spent(shared.folder)
    assert (
        json.loads(proposed["document"])["site"] == "clinic"
    )  # a site of the same page needs approvals of its own
    guardian.approve(proposed["subject"])
    answer = guardian.show(newest(guardian, "answer", job)["subject"])
    assert "NO differential privacy" in in_words(answer)
    guardian.approve(answer["subject"])
    until(job, "done")
    told = parcels.unpack(job.values, job.blob)["told"]
    assert told["columns"] == 2
    assert set(told["table"].columns) == {"sex", "age_median"}
    assert told["table"]["sex"].to_list() == ["F", "M"]
    assert "no ε" in job.outputs[0]["data"]["text/plain"]
    assert clinic.hospital.spent(shared.folder) == spent


def test_the_same_function_needs_no_second_approval_and_any_change_does(shared: Clinic, session: str) -> None:
    """Another input, another letter, another time: another subject; what changed is shown."""
    for source, shown in (
        (MEDIANS.replace('"digits": 0', '"digits": 1'), "inputs: was"),
        (MEDIANS.replace("median()", "max()"), "+    table = frame"),
        (MEDIANS.replace("inputs=", "seconds=9, inputs="), "seconds: was 10, is 9"),
    ):
        job = until(shared.connect().run(source, "ward", session=session), "waiting")
        guardian = shared.custodian()
        told = guardian.show(newest(guardian, job=job)["subject"])
        assert told["kind"] == "function"
        assert shown in in_words(told)
        guardian.refuse(told["subject"], "Once is enough.")
        with pytest.raises(RefusedError, match=r"refused the function.*Once is enough"):
            until(job, "failed").raise_error()
    before = shared.connect().airlock()
    assert until(shared.connect().run(MEDIANS, "ward", session=session), "done").releases
    assert shared.connect().airlock() == before


def test_the_tensors_it_is_given_are_shown_and_are_those_of_the_hash(
    shared: Clinic, session: str, tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Name, shape, kind, range and first values; all of them in a file; other ones than those named are refused."""
    job = until(shared.connect().run(WEIGHED, "ward", session=session), "waiting")
    guardian = shared.custodian()
    told = guardian.show(newest(guardian, job=job)["subject"])
    words = in_words(told)
    assert "w (tensor 0): 3x4 float32, 0 to 11; begins 0, 1, 2, 3, 4, 5, 6, 7 ..." in words
    assert "n (tensor 1): one int64, 7 to 7; begins 7" in words
    assert json.loads(told["document"])["asks"]["tensors"] in words
    assert "of the patients where" in words  # the selection is part of what is approved
    with pytest.raises(RaphaError, match="Only custodians"):
        shared.connect()._channel.call("inputs", {"text": told["subject"]})

    monkeypatch.setenv("RAPHA_LAB_PASSPHRASE", "a long passphrase")
    monkeypatch.setenv("RAPHA_LAB_HOME", str(tmp_path))
    shared.custodians[0].save(tmp_path / "guardian", "a long passphrase")
    how = ["--allow-simulated", "--key", str(tmp_path / "guardian")]
    command = ["review", "inputs", shared.url, told["subject"][:12], str(tmp_path / "w"), *how]
    assert main(command) == 0
    assert load((tmp_path / "w").read_bytes())["0"].tolist()[2] == [8.0, 9.0, 10.0, 11.0]
    assert main(command) == 1
    assert "exists" in capsys.readouterr().err

    honest = guardian.site._channel.call

    def other(kind: str, fields: Any, *rest: Any) -> Any:
        found, blob = honest(kind, fields, *rest)
        return (found, blob[:-1] + b"\0") if kind == "inputs" else (found, blob)

    monkeypatch.setattr(guardian.site._channel, "call", other)
    with pytest.raises(TrustError, match="other inputs than those that wait"):
        guardian.show(told["subject"])
    shared.custodian(1).refuse(told["subject"], "Enough.")
    until(job, "failed")


@pytest.mark.parametrize("blob", [b"", b"x", b"\xff" * 64, save({"a": torch.tensor([float("nan"), 1.0])})])
def test_whatever_was_sent_as_tensors_can_be_described(blob: bytes) -> None:
    """A line or none, and no error."""
    assert all(
        isinstance(line, str) for line in described(blob, {"asks": {"inputs": {"a": [{"tensor": "a"}]}}})
    )


def test_a_function_is_given_what_custodians_read(shared: Clinic, session: str) -> None:
    """A session that asks with 1.0 where they are shown 1 has it run with 1; which function runs is said."""
    job = until(shared.connect().run(FORGED, "ward", session=session), "waiting")
    guardian = shared.custodian()
    proposed = guardian.show(newest(guardian, job=job)["subject"])
    assert '"value": 1}' in in_words(proposed)
    assert "runs kind of the source below" in in_words(proposed)
    guardian.approve(proposed["subject"])
    answer = guardian.show(newest(guardian, "answer", job)["subject"])
    assert json.loads(answer["document"])["release"]["values"]["parcel"]["values"]["result"]["value"] == "int"
    guardian.refuse(answer["subject"], "Seen.")
    until(job, "failed")


def test_nothing_that_is_shown_writes_lines_of_its_own() -> None:
    """A tensor's name is its researcher's to choose, a reason another custodian's."""
    about = ("subject", "project", "dataset", "lane", "researcher", "mode", "missing")
    release = {"op": "fit", "split": "train", "epsilon": 1, "delta": 1e-5, "values": {}}
    told = dict.fromkeys(about, "x") | {"kind": "answer", "state": "waiting"}
    told |= {"document": json.dumps({"release": release}), "findings": ["\x1b[2J\nAutomatic checks:\u202e"]}
    told |= {"decisions": [{"act": "refuse", "key": "k", "reason": "a\nb"}]}
    words = in_words(told)
    assert "  \\x1b[2J\\nAutomatic checks:\\u202e\nrefuse by k: a\\nb" in words


def test_what_is_shown_before_signing_is_of_the_document() -> None:
    """The file comes from a page: what it says beside the document is not signed."""
    about = ("subject", "project", "dataset", "lane", "researcher", "mode", "missing")
    release = {"op": "fit", "split": "train", "epsilon": 1, "delta": 1e-5, "values": {}}
    document = json.dumps(
        {"kind": "answer", "project": "p", "dataset": "ward", "lane": "train", "release": release}
    )
    told = dict.fromkeys(about, "pleasant") | {"kind": "answer", "state": "waiting", "document": document}
    words = in_words(told | {"findings": [], "decisions": []})
    assert "project p, dataset ward, lane train" in words
    assert f"answer {subject_of(document.encode())}" in words


def test_truths_are_not_numbers_where_changes_are_shown() -> None:
    """Though to Python they are the same, and to a function they are not."""
    asks = {"source": "pass", "inputs": {"a": True}}
    told = changes({"asks": asks}, {"asks": asks | {"inputs": {"a": 1}}})
    assert '  inputs: was {"a": 1}, is {"a": true}' in told


def test_rows_that_leave_are_pointed_out(shared: Clinic, session: str) -> None:
    """Values that are a patient's own, digits, and so on; the researcher never sees the findings."""
    job, told = approved(shared, LEAK, session)
    findings = "\n".join(told["findings"])
    assert "Equal to the age of fewer than 10 patients" in findings
    assert "More than 4 digits" in findings
    assert "findings" not in json.dumps(shared.connect().airlock())
    shared.custodian().refuse(told["subject"], "These are patients.")
    with pytest.raises(RefusedError, match="These are patients"):
        until(job, "failed").raise_error()


def test_what_a_function_raises_is_a_kind_and_a_line_and_waits_like_any_answer(
    shared: Clinic, session: str
) -> None:
    """Its message holds a record; it is nowhere."""
    job, told = approved(shared, FAILS, session)
    release = json.loads(told["document"])["release"]
    assert release["values"]["failed"] == "ValueError in line 2"
    shared.custodian().approve(told["subject"])
    with pytest.raises(CellError, match=r"no result.*ValueError in line 2"):
        until(job, "failed").raise_error()


def test_a_function_reaches_nothing(shared: Clinic, session: str) -> None:
    """No socket, no file, no process."""
    job, told = approved(shared, REACHES, session, "found")
    shared.custodian().approve(told["subject"])
    until(job, "done")
    assert parcels.unpack(job.values, job.blob)["found"] == [0.5, 0.5, 0.5]


def test_the_command_line_lists_shows_and_decides(
    shared: Clinic, session: str, tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """With the custodian's key file; a researcher's decides nothing."""
    monkeypatch.setenv("RAPHA_LAB_PASSPHRASE", "a long passphrase")
    monkeypatch.setenv("RAPHA_LAB_HOME", str(tmp_path))
    shared.custodians[0].save(tmp_path / "guardian", "a long passphrase")
    shared.researcher.save(tmp_path / "me", "a long passphrase")
    until(shared.connect().run(LEAK.replace("3", "4"), "ward", session=session), "waiting")
    how = ["--allow-simulated", "--key", str(tmp_path / "guardian")]
    assert main(["review", "list", shared.url, *how]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "function of p on ward, lane review" in line
    subject = line.split()[0]
    assert main(["review", "show", shared.url, subject, *how]) == 0
    assert "def leak" in capsys.readouterr().out
    assert main(["review", "approve", shared.url, subject, *how[:2], str(tmp_path / "me")]) == 1
    assert "Only custodians" in capsys.readouterr().err
    assert main(["review", "refuse", shared.url, subject, *how, "--reason", "No rows."]) == 0
    assert "is refused" in capsys.readouterr().out


def test_no_policy_lets_the_lane_be_automatic(shared: Clinic) -> None:
    """And where it does not open the lane, nothing is even proposed."""
    with pytest.raises(RaphaError, match="has nobody look at the lane review"):
        clinic.page(shared.researcher, shared.custodians, review="auto")
    policy = clinic.page(shared.researcher, shared.custodians).text.replace("lanes.review", "# lanes.review")
    with pytest.raises(PolicyError, match="may not review"):
        clinic.Policy.parse(policy).allows(str(shared.researcher.public), "p", "ward", "review")
