"""The gateway's side of the curator's pipe: every caller gets its own answers, whoever reads, and is told when they are lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from pipe import requests
from test_running_cells import until
from ward import Ward

from rapha_lab.enclave import cores
from rapha_lab.enclave.curator import Curator, CuratorLost
from rapha_lab.protocol import messages


def link(end: Path) -> str:
    """Where a descriptor leads; nowhere once it is closed, as those of other threads are at any time."""
    try:
        return os.readlink(end)
    except FileNotFoundError:
        return ""


@pytest.fixture
def curator(serving: Ward, tmp_path: Path) -> Iterator[Curator]:
    """A curator like the running site's, with a ledger of its own."""
    mine = Curator(serving.site._shards.connect)
    mine.open(serving.site._curator._config | {"ledger": str(tmp_path / "ledger.sqlite")})
    yield mine
    mine.close()


class Training:
    """A fit of many steps, asked in a thread of its own; `begun` once it told of a step."""

    def __init__(self, curator: Curator, serving: Ward, number: int, steps: int) -> None:
        fit, tensors = requests(serving)["fit"]
        asked = json.dumps(fit | {"steps": steps, "epsilon": 1.0 + number / 100}).encode()
        self.begun, self.outcome = threading.Event(), list[Any]()

        def ask() -> None:
            who = f"job-{number}", str(serving.key.public), "p"
            try:
                self.outcome.append(curator.ask(*who, asked, tensors, lambda *_: self.begun.set())[0])
            except Exception as error:
                self.outcome.append(error)

        self.thread = threading.Thread(target=ask)
        self.thread.start()

    def ended(self) -> Any:
        """Its release or what was raised."""
        self.thread.join(60)
        assert not self.thread.is_alive(), "it waits for ever"
        return self.outcome[0]


def test_callers_get_their_own_answers_while_others_come_and_go(curator: Curator, serving: Ward) -> None:
    trainings = [Training(curator, serving, number, 300) for number in range(3)]
    for training in trainings:
        assert training.begun.wait(60)
    first = curator.look_up("log", start=0)["entries"][0]  # more come as trainings end

    def asked(number: int) -> bool:
        if number % 2:
            return curator.look_up("log", start=0)["entries"][0] == first
        return [told["name"] for told in curator.look_up("catalog")] == ["ward"]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(asked, range(200)))
    releases = [training.ended() for training in trainings]
    assert [release["job"] for release in releases] == ["job-0", "job-1", "job-2"]
    assert [release["epsilon"] for release in releases] == [1.0, 1.01, 1.02]


@pytest.mark.parametrize("asks_again", [False, True])
def test_whoever_waits_for_a_curator_that_died_is_told(
    curator: Curator, serving: Ward, asks_again: bool
) -> None:
    """One of them reads; the others, and one that comes right afterwards and starts a new one, leave nobody waiting."""
    trainings = [Training(curator, serving, number, 10**6) for number in range(2)]  # more wait for these
    for training in trainings:
        assert training.begun.wait(60)
    os.kill(curator.pid, signal.SIGKILL)
    if asks_again:
        until(lambda: curator._process.poll() is not None)
        assert [told["name"] for told in curator.look_up("catalog")] == ["ward"]
    assert all(isinstance(training.ended(), CuratorLost) for training in trainings)
    assert [told["name"] for told in curator.look_up("catalog")] == ["ward"]


def test_a_curator_that_has_half_a_request_is_ended(
    curator: Curator, serving: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the next header for the request, and then a session's own bytes for a header, which names who asks."""
    write, process = messages.write_frame, curator._process

    def short(stream: Any, header: bytes, *more: Any, **how: Any) -> None:
        if header == b"too large":
            raise MemoryError
        write(stream, header, *more, **how)

    monkeypatch.setattr(messages, "write_frame", short)
    with pytest.raises(MemoryError):
        curator.ask("job-1", str(serving.key.public), "p", b"too large", b"", lambda *_: None)
    until(lambda: process.poll() is not None)
    assert [told["name"] for told in curator.look_up("catalog")] == ["ward"]


def test_a_curator_that_cannot_be_understood_is_ended_and_nobody_waits_for_ever(
    curator: Curator, serving: Ward
) -> None:
    """It lives on and would never end of itself: what it said was too large, or a part of it was lost on this side."""
    trainings = [Training(curator, serving, number, 10**6) for number in range(2)]
    for training in trainings:
        assert training.begun.wait(60)
    theirs = os.readlink(f"/proc/self/fd/{curator._process.stdout.fileno()}")
    folder = Path(f"/proc/{curator.pid}/fd")
    ends = [end for end in folder.iterdir() if link(end) == theirs]
    with ends[0].open("wb", buffering=0) as pipe:
        pipe.write(b"no frame of this protocol " * 4000)
    assert all(isinstance(training.ended(), CuratorLost) for training in trainings)
    assert [told["name"] for told in curator.look_up("catalog")] == ["ward"]


def test_what_waits_for_its_researchers_other_questions_can_be_cancelled(
    curator: Curator, serving: Ward
) -> None:
    """It is told at once, and what it brought is not kept: with it somebody could fill the curator's memory."""
    trainings = [Training(curator, serving, number, 10**6) for number in range(2)]
    for training in trainings:
        assert training.begun.wait(60)
    for number in range(2, 6):
        waits = Training(curator, serving, number, 10**6)
        time.sleep(0.3)
        curator.cancel(f"job-{number}")
        waits.thread.join(20)
        assert waits.outcome, "it waits until another is done"
        assert "was cancelled" in str(waits.outcome[0])
        assert not waits.begun.is_set()
    curator.cancel("job-6")  # overtakes the question
    early = Training(curator, serving, 6, 10**6)
    early.thread.join(20)
    assert "was cancelled" in str(early.outcome)
    for number, training in enumerate(trainings):
        assert training.thread.is_alive()
        curator.cancel(f"job-{number}")
        assert "was cancelled" in str(training.ended())


def test_a_session_runs_on_no_core_of_the_curators(serving: Ward) -> None:
    """It could time how busy that is, and each would empty the other's caches."""
    if len(cores.ALL) < 2:
        pytest.skip("one core")
    for thread in psutil.Process(serving.site._curator.pid).threads():
        assert os.sched_getaffinity(thread.id) == {*cores.CURATOR}
    site = serving.connect()
    told = site.run("import os\nprint(sorted(os.sched_getaffinity(0)))", "ward", session="cores").wait()
    site.end_sessions("cores")
    assert told.outputs[0]["data"]["text/plain"] == str([*cores.SESSIONS])
