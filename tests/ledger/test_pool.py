"""The curator's threads: no more than stated, in the order of coming, and none is lost."""

from __future__ import annotations

import io
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import msgspec
import pytest
import torch

from rapha_lab.curator.pool import Pool
from rapha_lab.curator.server import SHORT, _long
from rapha_lab.protocol import messages, policy
from rapha_lab.protocol.errors import RequestError


def test_the_thread_that_worked_last_works_next() -> None:
    pool, seen = Pool(3, "test"), []
    gate = threading.Barrier(4)
    for owner in "abc":
        pool.submit(owner, lambda: (gate.wait(), None)[1])
    gate.wait()  # three threads there are now
    for _ in range(6):
        done = threading.Event()
        pool.submit("a", lambda done=done: seen.append(threading.get_ident()) or done.set())
        assert done.wait(5)
        time.sleep(0.02)
    pool.close()
    assert len(set(seen[1:])) == 1


def test_no_more_run_at_once_than_stated_and_all_run_in_their_order() -> None:
    pool, order, running, most = Pool(2, "test"), [], [0], [0]
    lock = threading.Lock()

    def job(number: int) -> None:
        with lock:
            order.append(number)
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.005)
        with lock:
            running[0] -= 1

    for number in range(20):
        pool.submit("a" if number % 2 else "b", job, number)
    while len(order) < 20:
        time.sleep(0.005)
    pool.close()
    assert most[0] == 2
    assert all(abs(a - b) <= 1 for a, b in zip(order, sorted(order), strict=True))


def test_a_job_that_raises_ends_no_thread(capsys: pytest.CaptureFixture[str]) -> None:
    """Its name alone is told, for what it says could be of a record."""
    pool, done = Pool(1, "test"), threading.Event()

    def bad() -> None:
        raise ValueError("age 97")

    pool.submit("a", bad)
    pool.submit("a", done.set)
    assert done.wait(5)
    pool.close()
    told = capsys.readouterr().err
    assert "ValueError" in told
    assert "97" not in told


def test_a_thread_works_ahead_while_nobody_needs_it() -> None:
    """It begins once its job is done, and the next job, which the same thread gets, ends it; one that raises ends no thread."""
    pool, seen, begun = Pool(3, "test"), list[object](), queue.SimpleQueue()

    def ahead(wanted: Callable[[], bool]) -> None:
        begun.put(threading.get_ident())
        while not wanted():
            time.sleep(0.001)
        seen.append("ahead ended")
        raise ValueError

    def job(number: int) -> Callable[[Callable[[], bool]], None]:
        seen.append((number, threading.get_ident()))
        return ahead

    threads = []
    for number in range(3):
        pool.submit("a", job, number)
        threads.append(begun.get(timeout=5))
    pool.close()
    mine = threads[0]
    assert threads == [mine] * 3
    assert seen == [(0, mine), "ahead ended", (1, mine), "ahead ended", (2, mine), "ahead ended"]


def test_an_idle_thread_keeps_nothing_of_what_it_did_ahead() -> None:
    """A loop that its session left holds columns of all patients, and no more is asked of that thread for hours."""

    class Loop:
        def work_ahead(self, wanted: Callable[[], bool]) -> None:
            done.set()

    pool, done, loop = Pool(2, "test"), threading.Event(), Loop()
    gone = weakref.ref(loop)
    pool.submit("a", lambda loop: loop.work_ahead, loop)
    assert done.wait(5)
    del loop
    for _ in range(100):
        if gone() is not None:
            time.sleep(0.01)
    kept = gone() is not None
    pool.close()
    assert not kept


def test_nothing_is_done_ahead_while_a_job_waits() -> None:
    """The thread takes the next job at once."""
    pool, go, seen, done = Pool(1, "test"), threading.Event(), list[str](), threading.Event()
    pool.submit("a", lambda: go.wait(5) and (lambda wanted: seen.append("ahead")))
    pool.submit("a", lambda: seen.append("job"))
    pool.submit("a", done.set)
    go.set()
    assert done.wait(5)
    pool.close()
    assert seen == ["job"]


def test_one_owner_never_takes_the_last_thread() -> None:
    """However many long jobs they bring, another's is run at once; theirs go on as theirs end, in their order."""
    pool, go, ran = Pool(3, "test"), threading.Semaphore(0), queue.SimpleQueue()
    for number in range(5):
        pool.submit("many", lambda number=number: ran.put(number) or (go.acquire() and None))
    assert {ran.get(timeout=5), ran.get(timeout=5)} == {0, 1}
    for _ in range(3):
        pool.submit("other", ran.put, "other")
        assert ran.get(timeout=5) == "other"
    for number in (2, 3, 4):
        go.release()
        assert ran.get(timeout=5) == number
    assert ran.empty()
    go.release(2)
    pool.close()


def test_long_jobs_of_all_together_leave_a_thread_to_short_ones_and_one_to_another_owners_long_one() -> None:
    """The short ones of whoever trains too."""
    pool, go, ran = Pool(4, "test"), threading.Semaphore(0), queue.SimpleQueue()
    for number in range(4):
        for owner in "abc":
            pool.submit(owner, lambda job=(owner, number): ran.put(job) or (go.acquire() and None), long=True)
    begun = [ran.get(timeout=5) for _ in range(3)]
    assert {begun[0][0], begun[1][0], begun[2][0]} == {"a", "b", "c"}
    for owner in "abcd":
        pool.submit(owner, ran.put, owner)
        assert ran.get(timeout=5) == owner
    assert ran.empty()
    go.release(20)
    assert len([ran.get(timeout=5) for _ in range(9)]) == 9
    for number in range(3):
        pool.submit("a", lambda number=number: ran.put(number) or (go.acquire(timeout=5) and None), long=True)
    pool.close()


def test_one_owners_long_jobs_leave_a_thread_to_another_owners() -> None:
    """Else one who trains three times would keep all others from training."""
    pool, go, ran = Pool(4, "test"), threading.Semaphore(0), queue.SimpleQueue()
    for owner in "aaab":
        pool.submit(owner, lambda owner=owner: ran.put(owner) or (go.acquire() and None), long=True)
    assert sorted(ran.get(timeout=5) for _ in range(3)) == ["a", "a", "b"]
    assert ran.empty()
    go.release(4)
    assert ran.get(timeout=5) == "a"
    pool.close()


def test_what_an_end_makes_room_for_begins_at_once() -> None:
    """Its owner's next, and another owner's long one, which waited each for another reason."""
    pool, go, ran = Pool(2, "test"), threading.Event(), queue.SimpleQueue()
    both = threading.Barrier(2)
    pool.submit("a", lambda: go.wait(5) and None, long=True)
    pool.submit("a", lambda: (both.wait(5), ran.put("a"))[1])
    pool.submit("b", lambda: (both.wait(5), ran.put("b"))[1], long=True)
    go.set()
    assert {ran.get(timeout=6), ran.get(timeout=6)} == {"a", "b"}
    pool.close()


def test_a_job_is_long_by_what_it_asks() -> None:
    """And by its length, which nobody reads before its turn; what does not read is refused at once."""
    step = messages.Gradient(loop="l", inputs={"x": "x0"}, digest="")
    shards = messages.Shards(
        dataset="d", split="train", epsilon=1.0, source="s", name="f", columns=["x"], bounds=[(0, 1)]
    )
    assert not _long(messages.encode(step))
    assert not _long(messages.encode(messages.Close(loop="l")))
    assert not _long(b"{")
    assert _long(bytes(SHORT + 1))
    assert _long(messages.encode(shards))


def test_no_thread_is_lost_where_the_machine_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job waits for a thread that there is, and the next one tries again; without any thread it is said."""
    pool, go, ran = Pool(2, "test"), threading.Event(), queue.SimpleQueue()

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        with pytest.raises(RuntimeError):
            pool.submit("a", ran.put, "before")
    pool.submit("a", lambda: go.wait(5) and None)
    assert ran.get(timeout=5) == "before"
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        pool.submit("b", ran.put, "kept")
    pool.submit("c", ran.put, "next")
    assert [ran.get(timeout=5) for _ in range(2)] == ["kept", "next"]
    go.set()
    pool.close()


def test_a_job_that_raises_where_nothing_can_be_told_ends_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its standard error is closed."""
    pool, done = Pool(1, "test"), threading.Event()
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    pool.submit("a", lambda: 1 / 0)
    pool.submit("a", done.set)
    assert done.wait(5)
    pool.close()


def test_closing_waits_for_what_runs_and_drops_what_waits() -> None:
    pool, ran = Pool(1, "test"), []
    started, go = threading.Event(), threading.Event()
    pool.submit("a", lambda: started.set() or (go.wait(5) and ran.append("running")))
    assert started.wait(5)
    pool.submit("a", lambda: ran.append("waiting"))
    closer = threading.Thread(target=pool.close)
    closer.start()
    go.set()
    closer.join(5)
    assert not closer.is_alive()
    assert ran == ["running"]


def test_the_curators_threads_take_no_longer_for_denormal_numbers() -> None:
    """They are zero in each thread that the curator's main one starts."""
    code = """
import io, sys, torch
from rapha_lab.curator import __main__ as curator
from rapha_lab.curator.pool import Pool
curator.messages.read_frame = lambda stream: None  # no configuration comes: it ends there, set up
curator.main()
found = []
pool = Pool(1, "test")
pool.submit("a", lambda: found.append(float((torch.full((64,), 1e-40) * 2).sum())))
pool.close()
sys.exit(0 if found == [0.0] else 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, timeout=120
    )
    assert done.returncode == 0
    assert float((torch.full((64,), 1e-40) * 2).sum()) > 0, "else the test shows nothing"


@pytest.mark.parametrize("number", ["0", "0.0", "-0.0", "5e-324", "1e-310", "-1e-310"])
@pytest.mark.parametrize("flush", [True, False])
def test_no_number_that_has_to_be_positive_is_zero_where_denormal_numbers_are(
    number: str, flush: bool
) -> None:
    """Where they are, "greater than 0.0" is kept by comparing with one of them, and holds of zero."""
    request = f'{{"op": "count", "dataset": "ward", "epsilon": {number}}}'.encode()
    torch.set_flush_denormal(flush)
    try:
        with pytest.raises(RequestError, match="malformed"):
            messages.decode(request)
        for kind in (messages.Positive, messages.Share, policy.Epsilon, policy.Delta):
            with pytest.raises(msgspec.ValidationError):
                msgspec.json.decode(number.encode(), type=kind)
    finally:
        torch.set_flush_denormal(False)
