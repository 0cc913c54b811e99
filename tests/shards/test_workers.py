"""The workers a curator gets: fresh, alone, on a public clock, and whatever they say is bytes or nothing."""

import os
import signal
import socket
import threading
import time

import numpy as np
import polars as pl
import pytest
from bay import CANARY, Here, asked, ward

from rapha_lab.curator import workers as curators
from rapha_lab.curator.mechanisms import shards
from rapha_lab.curator.workers import converse
from rapha_lab.enclave.cores import ALL
from rapha_lab.enclave.sandbox import Limits
from rapha_lab.enclave.shards import ShardWorkers
from rapha_lab.protocol.errors import RaphaError, SiteError

SECONDS = 0.5

HOSTILE = {
    "sleeps": "import time\n    time.sleep(60)",
    "spins": "while True: pass",
    "raises": "raise ValueError(str(frame))",
    "exits at once": "import os\n    os._exit(3)",
    "answers by hand and stays": "import os, time\n    os.write(4, bytes(8))\n    time.sleep(60)",
    "answers twice": "import os\n    os.write(4, bytes(8))\n    return 1.0",
    "floods": "import os\n    while True: os.write(4, bytes(65536))",
    "returns another shape": "return [1.0, 2.0]",
    "returns words": "return 'age'",
    "answers with a frame": "import os\n    os.write(4, b'RPH1' + b'\\xff' * 12)\n    os._exit(0)",
    "takes all memory": "held = []\n    while True: held.append(bytearray(1 << 26))",
    "is no Python": "return (",
    "breaks a rule": "import ctypes\n    ctypes.CDLL(None).ptrace(0, 0, 0, 0)\n    return 1.0",
    "starts threads": "import threading\n    while True: threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()",
}


def jobs(*bodies, shape=()):
    """Jobs whose functions have these bodies, on three patients."""
    view = ward([1, 2, 7]).view("all")
    return [shards.job(asked(f"def f(frame):\n    {body}\n", shape=list(shape)), view) for body in bodies]


def told(workers, *bodies, size=8, seconds=SECONDS, started=lambda: None):
    """What these functions answer."""
    return workers.answers(iter(jobs(*bodies)), len(bodies), size, seconds, started, lambda: None)


class TestAnAnswer:
    def test_is_what_the_function_returns_on_its_shard(self, workers):
        """Of its own patients, columns by name."""
        found = told(workers, "return frame['age'].max()", "return len(frame)", "print(frame)\n    return -1")
        assert [np.frombuffer(answer)[0] for answer in found] == [CANARY, 3, -1]

    def test_comes_from_the_libraries_that_are_promised(self, workers):
        """numpy, scipy, polars, scikit-learn, torch."""
        body = "import numpy, scipy.stats, polars, sklearn.linear_model, torch\n    return 1.0"
        assert told(workers, body, seconds=2.0) == [np.float64(1.0).tobytes()]

    @pytest.mark.parametrize("half", [0, 1])
    def test_of_a_hostile_shard_is_none_and_its_neighbours_is_there(self, workers, half):
        """Hostile and honest in turn, in the same waves."""
        names = list(HOSTILE)[half::2]
        bodies = [body for name in names for body in (HOSTILE[name], "return 5.0")]
        found = told(workers, *bodies)
        assert dict(zip(names, found[::2], strict=True)) == dict.fromkeys(names, b"")
        assert found[1::2].count(np.float64(5.0).tobytes()) >= len(names) - 1

    def test_too_late_is_never_taken_for_the_next_ones(self, workers):
        """A wave's worker that is still there belongs to nobody."""
        late = "import time, os\n    time.sleep(0.8)\n    os.write(4, bytes(8))"
        assert np.float64(0.0).tobytes() not in told(workers, *[late] * len(ALL), *["return 2.0"] * len(ALL))


class TestAWorker:
    def test_serves_one_shard_and_no_second(self, workers):
        """A process each."""
        found = told(workers, *["import os\n    return os.getpid()"] * 6)
        assert len(set(found)) == 6

    def test_has_one_core_that_no_other_has(self, workers):
        """However many threads it starts, its neighbour's processor stays its neighbour's."""
        ask = "import os\n    (core,) = os.sched_getaffinity(0)\n    return core"
        found = told(workers, *[ask] * len(ALL))
        assert sorted(np.frombuffer(answer)[0] for answer in found) == list(ALL)

    def test_carries_nothing_over(self, workers):
        """What one leaves in a module is not there for the next."""
        leave = "import polars\n    n = getattr(polars, 'left', 0.0)\n    polars.left = 1.0\n    return n"
        assert set(told(workers, *[leave] * 4)) == {np.float64(0.0).tobytes()}


class TestTheClock:
    def test_the_answer_never_comes_before_its_time(self, workers):
        """Two waves that are done at once take two waves' time."""
        begun = list[float]()
        told(workers, *["return 1.0"] * 2 * len(ALL), started=lambda: begun.append(time.monotonic()))
        assert time.monotonic() - begun[0] >= 2 * SECONDS

    def test_mutant_an_early_release_would_be_seen(self, workers, monkeypatch):
        """Without the wait it comes at once."""
        begun = list[float]()
        monkeypatch.setattr(curators.time, "sleep", lambda seconds: None)
        told(workers, "return 1.0", seconds=30.0, started=lambda: begun.append(time.monotonic()))
        assert time.monotonic() - begun[0] < 30.0

    def test_is_set_before_a_record_is_touched(self, workers, monkeypatch):
        """The pace is tried first, with workers that are given nothing."""
        order, pace = list[str](), workers._pace
        monkeypatch.setattr(workers, "_pace", lambda: order.append("pace") or pace())
        told(workers, "return 1.0", started=lambda: order.append("touched"))
        assert order == ["pace", "touched"]

    def test_a_site_without_workers_says_so_before_a_record_is_touched(self, monkeypatch):
        """Else every shard would count as the default, and nobody would be told."""
        monkeypatch.setattr(curators, "MOST", 0.2)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.send(b'{"open": true}')
        touched = []
        with pytest.raises(SiteError, match="too busy"):
            told(curators.EnclaveWorkers(theirs.detach(), 1), "return 1.0", started=lambda: touched.append(1))
        ours.close()
        assert touched == []

    def test_beats_once_a_wave_and_ends_where_that_raises(self, workers):
        """So a cancelled job ends at a time that no shard moves, and the next one is answered."""
        beats = list[int]()

        def beat():
            beats.append(1)
            if len(beats) == 2:
                raise SiteError("cancelled")

        with pytest.raises(SiteError, match="cancelled"):
            workers.answers(iter(jobs(*["return 1.0"] * 9)), 9, 8, 0.1, lambda: None, beat)
        assert told(workers, "return 1.0") == [np.float64(1.0).tobytes()]


def noted_meanwhile(sessions, workers, monkeypatch):
    """The moments a counting session noted from the first shard to the last, and whether it noted any before."""
    say, clock = workers._say, dict[str, float]()

    def timed(message):
        clock.setdefault(message["do"], time.monotonic())
        say(message)

    with sessions.spawn(Limits()) as session:
        session.writer.write(b"!")
        session.writer.flush()
        first = float(session.reader.readline())
        with monkeypatch.context() as patch:
            patch.setattr(workers, "_say", timed)
            told(workers, "return 1.0", started=lambda: clock.__setitem__("started", time.monotonic()))
        stamps = [first]
        while stamps[-1] <= clock["close"]:
            stamps.append(float(session.reader.readline()))
    assert first < clock["started"]
    return [stamp for stamp in stamps if clock["started"] < stamp < clock["close"]]


class TestSessions:
    def test_stand_still_while_shards_run(self, sessions, workers, monkeypatch):
        """Not one moment of a session lies between the first shard and the last."""
        assert noted_meanwhile(sessions, workers, monkeypatch) == []

    def test_mutant_sessions_that_run_on_would_be_seen(self, sessions, workers, monkeypatch):
        """Were they not stopped, a session would note hundreds of moments."""
        monkeypatch.setattr(type(sessions), "_say", _deaf(type(sessions)._say))
        monkeypatch.setattr(sessions._still, "wait", lambda seconds: True)
        assert noted_meanwhile(sessions, workers, monkeypatch)

    def test_none_starts_meanwhile(self, sessions, workers):
        """It is told to come again."""
        with sessions.standing_still(), pytest.raises(SiteError, match="No session can start"):
            sessions.spawn()

    def test_go_on_when_the_curator_dies_in_the_middle(self, enclave, sessions):
        """The channel's end frees them."""
        channel = enclave.connect()
        channel.send(b'{"do": "open"}')
        assert b"true" in channel.recv(100)
        assert sessions._gate.locked()
        channel.close()
        assert sessions._gate.acquire(timeout=10)
        sessions._gate.release()

    def test_may_be_killed_while_they_stand(self, sessions):
        """A stopped worker ends as any other."""
        with sessions.spawn() as session, sessions.standing_still():
            session.kill()
            assert session.wait(10) == "killed"


def _deaf(say):
    return lambda self, message, fds=(): message["do"] in ("stop", "go on") or say(self, message, fds)


class TestAZygoteThatDied:
    def test_is_started_again_at_its_tier(self, sessions):
        """The next session starts as if nothing had been."""
        tier = sessions.tier
        os.kill(sessions._process.pid, signal.SIGKILL)
        sessions._process.wait()
        with sessions.spawn() as session:
            assert session.tier == sessions.tier == tier

    def test_weaker_shards_than_sessions_are_refused(self, sessions):
        """Records are opened at the tier that was attested, or not at all."""
        if sessions.tier == "S1":
            pytest.skip("nothing is weaker")
        weak = ShardWorkers(lambda: sessions, "S1")
        weak._zygote = _Weak()
        channel = weak.connect()
        workers = curators.EnclaveWorkers(channel.detach(), 1)
        with pytest.raises(RaphaError, match="weaker"):
            told(workers, "return 1.0")
        workers._channel.close()


class _Weak:
    tier = "S1"

    def revive(self):
        """Nothing to do."""

    def close(self):
        """Nothing to do."""


def test_an_answer_is_collected_however_it_is_cut():
    """Byte by byte over pipes, a job larger than a pipe, and an end: exactly `size` bytes count."""
    ours, theirs = socket.socketpair()
    (job_out, job_in), (told_out, told_in) = os.pipe(), os.pipe()

    def slow():
        left = 3 << 20
        while left:
            left -= len(os.read(job_out, left))
        for byte in b"12345678":
            os.write(told_in, bytes([byte]))
        os.close(told_in)

    thread = threading.Thread(target=slow)
    thread.start()
    theirs.send(b".")
    found = converse(
        [bytes(3 << 20)], ours.fileno(), lambda: ours.recv(1) and (told_out, job_in), 8, time.monotonic() + 20
    )
    os.close(job_out)
    thread.join()
    for sock in (ours, theirs):
        sock.close()
    assert found == [b"12345678"]


def test_the_records_reach_a_worker_and_nobody_else(workers, capfd):
    """A shard that prints its records everywhere it can: they occur in no byte the site writes."""
    loud = "import sys\n    print(frame, file=sys.stderr)\n    print(frame['age'].to_list())\n    raise ValueError(frame)"
    assert told(workers, loud) == [b""]
    out, err = capfd.readouterr()
    assert str(CANARY)[:6] not in out + err
    assert pl.__name__ not in err


def test_pretended_workers_have_the_same_face(workers):
    """The ones these tests use beside the real ones."""
    assert {name for name in dir(Here) if name[0] != "_"} <= {*dir(workers)}
