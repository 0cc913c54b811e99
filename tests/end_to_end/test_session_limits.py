"""Sessions at a site: how many, how long, how they end, and that none of it is another researcher's trouble."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import hospital
import msgspec
import pytest
import ward
from jupyter_client.manager import start_new_kernel

from rapha_lab.enclave import cells
from rapha_lab.protocol.errors import CellError, RequestError, SiteError
from rapha_lab.protocol.keys import PrivateKey

BOMBS = """
import os, threading, time
forks = 0
until = time.monotonic() + 4
while time.monotonic() < until:
    try:
        os.fork()
        forks += 1
    except OSError:
        pass
print("forks", forks)
held = []
while True:
    held.append(bytearray(1 << 28))
"""

TRAIN = """
from torch import nn
model = nn.Linear(1, 1)
patients.train.fit(model, nn.BCEWithLogitsLoss(), inputs=["age"], target="died", epochs=2, batch=50, epsilon=1)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A site of its own whose sessions idle for four seconds at most, and two researchers' connections."""
    other = PrivateKey.create()
    frame = ward.frame()
    folder = tmp_path_factory.mktemp("limits")
    config, key = hospital.prepare(folder, ward.SCHEMA, frame, "ward", others=[other], epsilon=100.0)
    config.idle = 4.0
    with hospital.running(config) as (site, url):
        yield site, hospital.connected(url, key), hospital.connected(url, other)


@pytest.fixture(autouse=True)
def _fresh(place):
    """No test finds another's sessions."""
    yield
    for connection in place[1:]:
        connection.end_sessions()


def text(job):
    """What a cell showed."""
    return "\n".join(str(output["data"].get("text/plain", "")) for output in job.outputs)


def test_a_researcher_has_a_few_sessions_and_no_more(place):
    """The limit is per researcher: another one opens theirs."""
    _, mine, theirs = place
    for number in range(cells.MAX_SESSIONS):
        mine.run("import time; time.sleep(20)", "ward", session=f"s{number}")
    with pytest.raises(SiteError, match="sessions open"):
        mine.run("1", "ward", session="one more")
    theirs.run("1", "ward").wait()


def test_the_session_idle_for_longest_makes_room(place, monkeypatch):
    """Of one's own, and never one that works; whoever comes back to it is told why it is empty."""
    site, mine, theirs = place
    monkeypatch.setattr(site.cells, "idle", 60.0)
    other = theirs.run("kept = 1", "ward").wait()
    busy = mine.run("import time; time.sleep(3); print('worked')", "ward", session="s0")
    for number in range(1, cells.MAX_SESSIONS):
        mine.run("kept = 1", "ward", session=f"s{number}").wait()
    mine.run("kept = 1", "ward", session="s1").wait()
    mine.run("1", "ward", session="one more").wait()
    assert len([key for key, s in site.cells._sessions.items() if not s.over]) == 1 + cells.MAX_SESSIONS
    back = mine.run("print('kept' in dir())", "ward", session="s2").wait()
    assert "another notebook of yours needed room" in text(back)
    assert "models included that no -o brought back" in text(back)
    assert "False" in text(back)
    still = mine.run("print(kept)", "ward", session="s1").wait()
    assert text(still) == "1"
    assert "worked" in text(busy.wait())
    assert text(theirs.run("print(kept)", "ward").wait()) == "1"
    assert other.state == "done"


def test_nobody_makes_another_miss_why_their_session_is_empty(place):
    """However many sessions somebody opens, whose ends are to be told as well."""
    site, mine, theirs = place
    names = [str(each._channel.key.public) for each in (theirs, mine)]
    for who, number in [(names[0], 0), *((names[1], n) for n in range(cells.MAX_CELLS + 9))]:
        site.cells._note(SimpleNamespace(key=(who, f"ended-{number}")), cells._CROWDED)
    assert len(site.cells._ended) == cells.MAX_CELLS + 1
    assert "needed room" in text(theirs.run("1", "ward", session="ended-0").wait())
    site.cells._ended.clear()


def test_a_session_that_is_left_ends_once_its_jobs_are_done(place):
    """At once if it has none; else with the last, whose values are kept for whoever asks."""
    site, mine, _ = place
    mine.run("1", "ward", session="idle").wait()
    busy = mine.run("import time; time.sleep(1); found = 7", "ward", session="busy", outputs=["found"])
    mine.run("print(found)", "ward", session="busy")
    for session in ("idle", "busy"):
        site.cells.end(str(mine._channel.key.public), session, idle=True)
    assert busy.bring() == {"found": 7}
    _no_worker(site)
    assert "idle" not in text(mine.run("print(1)", "ward", session="idle").wait())


def test_a_kernel_that_ends_takes_its_session_with_it(place, tmp_path, monkeypatch):
    """When it is shut down or restarted, as its exit tells the site; not the one of another notebook."""
    site, mine, _ = place
    monkeypatch.setattr(site.cells, "idle", 60.0)
    key = tmp_path / "me.key"
    mine._channel.key.save(key, "a passphrase")
    home = {"RAPHA_LAB_HOME": str(tmp_path), "RAPHA_LAB_PASSPHRASE": "a passphrase"}
    manager, client = start_new_kernel(env={**os.environ, **home})
    told = []
    try:
        for code in (
            "import rapha_lab as rapha\n%load_ext rapha_lab",
            f"rapha.connect({mine.url!r}, key={str(key)!r}, allow_simulated=True)",
            "%%enclave ward\nkept = 1",
        ):
            told.append(client.execute_interactive(code, timeout=120)["content"]["status"])
        assert told == ["ok"] * 3
        mine.run("kept = 1", "ward", session="another").wait()
        assert len(site._zygote._workers) == 2
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    until = time.monotonic() + 20
    while len(site._zygote._workers) > 1 and time.monotonic() < until:
        time.sleep(0.1)
    assert text(mine.run("print(kept)", "ward", session="another").wait()) == "1"
    assert len(site._zygote._workers) == 1


def test_a_session_takes_a_few_cells_and_no_more(place):
    """Those beyond are refused, not lost."""
    _, mine, _ = place
    mine.run("import time; time.sleep(30)", "ward")
    waiting = [mine.run("1", "ward") for _ in range(cells.MAX_QUEUE - 1)]
    assert len({job.id for job in waiting}) == cells.MAX_QUEUE - 1
    with pytest.raises(SiteError, match="Too many cells wait"):
        _ = [mine.run("1", "ward") for _ in range(3)]


def test_a_researcher_who_holds_too_much_loses_their_own_oldest_cells(place, monkeypatch):
    """Never another's, whose results are paid for; and what is still to run is refused, not kept."""
    _, mine, theirs = place
    monkeypatch.setattr(cells, "MAX_HELD", 3 << 20)
    kept = theirs.run("print('kept')", "ward").wait()
    loud = [mine.run("print('x' * 1_000_000)", "ward").wait() for _ in range(5)]
    assert "kept" in text(theirs.attach(kept.id).wait())
    assert "x" in text(mine.attach(loud[-1].id).wait())
    with pytest.raises(RequestError, match="no such job"):
        mine.attach(loud[0].id).wait()
    monkeypatch.setattr(cells, "MAX_CELLS", 2)
    monkeypatch.setattr(cells, "MAX_HELD", 1 << 30)
    few = [mine.run("1", "ward").wait() for _ in range(3)]
    assert {told["id"] for told in mine.jobs()} == {few[1].id, few[2].id}
    assert kept.id in {told["id"] for told in theirs.jobs()}
    monkeypatch.setattr(cells, "MAX_HELD", 1 << 10)
    with pytest.raises(SiteError, match="hold too much"):
        mine.run("len(big)", "ward", inputs=({}, bytes(5000)))


def test_what_is_brought_back_or_shown_in_small_pieces_counts_too(place, monkeypatch):
    """As much as it takes: numbers and lists in JSON as well as tensors, and each print's signature."""
    _, mine, _ = place
    monkeypatch.setattr(cells, "MAX_HELD", 1 << 20)
    brought = [mine.run("found = 'x' * 500_000", "ward", outputs=["found"]) for _ in range(4)]
    assert [len(job.bring()["found"]) for job in brought[-1:]] == [500_000]
    said = [mine.run(f"'{'y' * 300_000}'[0]", "ward").wait() for _ in range(4)]
    for job in (brought[0], said[0]):
        with pytest.raises(RequestError, match="no such job"):
            mine.attach(job.id).wait()
    monkeypatch.setattr(cells, "MAX_OUTPUT", 1 << 20)
    many = mine.run(
        "import sys\nfor n in range(2000): sys.stdout.write('z'); sys.stdout.flush()", "ward"
    ).wait()
    assert len(many.outputs) <= (1 << 20) // cells.OVERHEAD


def test_no_order_is_kept_in_more_than_its_bytes(place):
    """A list of empty lists is 20 times as large once it is Python's: the site, which never reads it, keeps the text."""
    order = msgspec.json.decode(
        b'{"session": "s", "dataset": "ward", "source": "1", "inputs": {"a": [[], []]}}', type=cells.Order
    )
    assert bytes(order.inputs) == b'{"a": [[], []]}'
    for much in ({"outputs": ["a"] * 1001}, {"origin": {str(n): "" for n in range(17)}}):
        with pytest.raises(RequestError, match="length"):
            place[1]._channel.call("run", {"session": "s", "dataset": "ward", "source": "1"} | much)


def test_an_idle_session_ends_and_the_next_cell_says_so(place):
    """Its process is gone; what it had defined too."""
    site, mine, _ = place
    mine.run("kept = 1", "ward").wait()
    _no_worker(site)
    job = mine.run("print('kept' in dir())", "ward").wait()
    assert "idle for long" in text(job)
    assert "False" in text(job)
    assert "idle" not in text(mine.run("print(1)", "ward").wait())


def test_a_session_that_works_is_not_idle(place):
    """However long its cell takes."""
    _, mine, _ = place
    job = mine.run("import time; time.sleep(6); print('worked')", "ward").wait()
    assert "worked" in text(job)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import os; os._exit(3)", "Its process ended."),
        ("import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)", "It tried what the sandbox does not allow."),
    ],
)
def test_a_session_that_ends_says_that_and_nothing_else(place, source, why):
    """And the site goes on with a new one."""
    _, mine, _ = place
    with pytest.raises(SiteError) as ended:
        mine.run(source, "ward").wait()
    assert (ended.value.what, ended.value.why) == ("The session at the site ended.", why)
    assert "4" in text(mine.run("2 + 2", "ward").wait())


def test_bombs_in_one_session_leave_anothers_training_running(place):
    """Forks that fail, memory to the limit: the other's job is done, and nothing was forked."""
    _, mine, theirs = place
    bomb = mine.run(BOMBS, "ward")
    job = theirs.run(TRAIN, "ward").wait()
    assert job.state == "done"
    with pytest.raises((SiteError, CellError)) as ended:
        bomb.wait()
    assert "forks 0" in text(bomb)
    assert "emory" in str(ended.value)


def test_a_dead_zygote_is_started_again(place):
    """Its sessions are lost; the next cell runs."""
    site, mine, _ = place
    job, tier = mine.run("import time; time.sleep(60)", "ward"), site.tier
    os.killpg(site._zygote._process.pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while (site._zygote.alive or site._zygote._workers) and time.monotonic() < until:
        time.sleep(0.05)
    with pytest.raises(SiteError, match="session at the site ended"):
        job.wait()
    assert "4" in text(mine.run("2 + 2", "ward").wait())
    assert site.tier == tier


def test_many_sessions_opened_and_closed_leave_nothing(place):
    """No worker, no thread, no descriptor more than before."""
    site, mine, _ = place
    mine.run("1", "ward").wait()
    mine.end_sessions()
    before = _held()
    for number in range(12):
        mine.run("1", "ward", session=f"n{number}").wait()
        mine.end_sessions()
    until = time.monotonic() + 20
    while (site._zygote._workers or _held() > before) and time.monotonic() < until:
        time.sleep(0.1)
    assert not site._zygote._workers
    assert _held() <= before


def _no_worker(site):
    """Wait until no session has a process."""
    until = time.monotonic() + 30
    while site._zygote._workers and time.monotonic() < until:
        time.sleep(0.1)
    assert not site._zygote._workers


def _held():
    return len(os.listdir("/proc/self/fd")) + threading.active_count()


def test_many_sessions_begun_at_once_keep_nobody_from_beginning_one(place, monkeypatch):
    """One researcher's start one after another, so that the next to start may be somebody else's."""
    site, mine, theirs = place
    spawn, at_once, most = site._zygote.spawn, [], []

    def counted(*asked):
        at_once.append(1)
        most.append(len(at_once))
        try:
            return spawn(*asked)
        finally:
            at_once.pop()

    monkeypatch.setattr(site._zygote, "spawn", counted)
    with ThreadPoolExecutor(12) as pool:
        crowd = [pool.submit(mine.run, "1", "ward", session=f"n{number}") for number in range(12)]
        while len(most) < 2:
            time.sleep(0.01)
        theirs.run("1", "ward").wait()
        for each in crowd:
            each.exception()  # more than four of one's own that work are refused, or make room for each other
    assert max(most) <= 2
