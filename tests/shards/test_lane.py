"""The lane from a session's call to the desk's release: what travels, what is refused, what the author sees."""

import contextlib

import msgspec
import numpy as np
import pytest
from bay import SCHEMA, Here, asked, ward
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.client.rehearsal import Rehearsal
from rapha_lab.curator import clock as clock_module
from rapha_lab.curator import server
from rapha_lab.curator.desk import Caller, Cancelled, Desk
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.mechanisms import shards
from rapha_lab.curator.noise import SystemNoise
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import CellError, PolicyError, RaphaError, RequestError
from rapha_lab.protocol.policy import Dataset
from rapha_lab.protocol.release import Release
from rapha_lab.session.patients import Patients
from rapha_lab.session.shard import source_of

OUTSIDE = 3


def plain(frame):
    import numpy

    return numpy.mean(frame["age"].to_numpy())


def leaning(frame):
    return OUTSIDE * len(frame)


def nested(frame):
    def inner(x):
        return np.log(x)

    return inner(len(frame))


class TestWhatTravels:
    def test_is_the_functions_source_and_public_terms(self):
        """No pickle, no value from around it."""
        sent = []

        def ask(request, tensors):
            sent.append((request, tensors))
            raise RequestError("far enough")

        with pytest.raises(RequestError, match="far enough"):
            Patients(SCHEMA, ask).shards(plain, bounds=(0, 100), columns="age", k=200, epsilon=1)
        ((request, tensors),) = sent
        assert tensors == b""
        assert request.source.startswith("def plain(frame):")
        assert (request.columns, request.bounds, request.shape, request.k) == (
            ["age"],
            [(0.0, 100.0)],
            [],
            200,
        )

    @pytest.mark.parametrize(("function", "name"), [(leaning, "OUTSIDE"), (nested, "np")])
    def test_stands_alone(self, function, name):
        """A name from outside is named, here and not at the site."""
        with pytest.raises(RequestError, match=f"uses {name} from outside"):
            source_of(function)

    @pytest.mark.parametrize("function", [lambda frame: 1.0, len, print])
    def test_has_a_source(self, function):
        """A lambda or a builtin has none of its own."""
        with pytest.raises(RequestError, match="no function with a source"):
            source_of(function)


class TestARehearsal:
    CELL = "def f(frame):\n    {}\nx = patients.shards(f, columns=['age'], bounds=(0, 100), epsilon=1{})\n"

    def run(self, body, terms=""):
        """What a cell with this function shows."""
        shown = []
        cell = self.CELL.format(body, terms)
        Rehearsal().run(cell, SCHEMA, epsilon=None, show=shown.append)
        return "".join(output.get("text", "") for output in shown)

    def test_shows_its_author_what_the_function_prints(self):
        """On three made-up shards."""
        assert self.run("print('of', len(frame)); return frame['age'].mean()").count("of ") == 3

    def test_shows_its_author_how_it_fails(self):
        """With the line."""
        with pytest.raises(CellError) as failed:
            self.run("return frame['hight'].mean()")
        assert any("hight" in line for line in failed.value.traceback)

    def test_says_that_a_function_is_too_slow(self):
        """Where nobody would be told at the site."""
        with pytest.raises(RequestError) as refused:
            self.run("import time; time.sleep(0.02); return 1.0", ", seconds=0.01")
        assert refused.value.field == "seconds"

    def test_says_what_the_site_will_refuse(self):
        """Too few patients for 5,000 shards."""
        with pytest.raises(RequestError) as refused:
            self.run("return 1.0", ", k=5000")
        assert refused.value.field == "k"


class _Policy:
    """Allows the lanes it is given."""

    def __init__(self, *lanes):
        self.lanes, self.epsilon, self.delta, self.name, self.smallest_cohort = lanes, 8.0, 1e-5, "p", 1

    hash, discovery_delta = bytes(32), 0.0

    def project(self, name):
        return self

    def dataset(self, name):
        return Dataset(name=name, measurements=["any simulated"], delta=1e-5)

    def allows(self, researcher, project, dataset, lane, metrics=()):
        if lane not in self.lanes:
            raise PolicyError(f"may not {lane}")
        return "auto"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A desk over forty patients whose workers answer 60, with as few shards as they allow."""
    monkeypatch.setattr(shards.plan, "__kwdefaults__", {"least": 2, "fewest": 1})
    ledger = Ledger(tmp_path / "ledger.sqlite", Ed25519PrivateKey.generate(), origin="test")
    here = Here(lambda job: np.float64(60.0).tobytes())
    made = lambda *lanes: Desk(  # noqa: E731
        lambda: _Policy(*lanes),
        ledger,
        {"ward": ward(range(40))},
        SystemNoise(),
        "test",
        here,
        simulated=True,
    )
    yield made, ledger
    ledger.close()


class TestAtTheDesk:
    ASK = messages.encode(asked("def f(frame):\n    return 60.0\n", k=8, epsilon=2.0))

    def test_it_is_priced_charged_logged_and_released(self, desk):
        """As any other question."""
        made, ledger = desk
        release, blob = made("shards").answer(Caller("r", "p", "j"), self.ASK, b"", lambda *_: None)
        assert (release.op, release.epsilon, blob) == ("shards", 2.0, b"")
        assert release.rows[0].name == "f"
        assert release.receipt
        assert msgspec.to_builtins(ledger.statement("p", "ward", "train"))["spent"] > 0

    def test_a_policy_that_does_not_name_the_lane_keeps_it_shut(self, desk):
        """Nothing was touched, nothing spent."""
        made, _ = desk
        with pytest.raises(PolicyError, match="may not shards"):
            made("aggregate", "train").answer(Caller("r", "p", "j"), self.ASK, b"", lambda *_: None)

    def test_cancelled_in_the_middle_it_stays_charged(self, desk, monkeypatch):
        """What was touched is spent."""
        made, ledger = desk
        monkeypatch.setattr(Here, "answers", _beaten)

        def on_step(done, planned, spent, doing):
            if done:
                raise Cancelled("cancelled")

        with pytest.raises(Cancelled):
            made("shards").answer(Caller("r", "p", "j"), self.ASK, b"", on_step)
        assert msgspec.to_builtins(ledger.statement("p", "ward", "test"))["spent"] > 0


def _beaten(self, jobs, k, size, seconds, started, beat):
    started()
    beat()
    return [b""] * k


class TestWhenAnAnswerLeaves:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock that only sleeping moves, and a server that notes when it speaks."""
        now, said = [100.0], []
        monkeypatch.setattr(clock_module.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(clock_module.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
        monkeypatch.setattr(
            server.Server, "_say", lambda self, header, blob=b"": said.append((now[0], header))
        )
        return now, said

    @pytest.mark.parametrize(("took", "quanta"), [(0.0001, 1), (0.0499, 1), (0.051, 2), (0.31, 7)])
    @pytest.mark.parametrize("how", ["released", "refused", "failed"])
    def test_is_a_whole_quantum_after_its_request(self, clock, took, quanta, how):
        """Answers, refusals and failures alike."""
        now, said = clock

        class _Desk:
            def answer(self, *_):
                now[0] += took
                if how == "refused":
                    raise RaphaError("no")
                if how == "failed":
                    raise ZeroDivisionError
                return Release(
                    job="j", op="count", dataset="d", split="all", site="s", epsilon=1.0, delta=0.1
                ), b""

        served = server.Server(_Desk(), {}, None, None, None)
        served._answer(server.Call("ask", "j"), b"", b"", 100.0)
        assert said[0][0] == pytest.approx(100.0 + quanta * clock_module.QUANTUM, abs=1e-9)

    @pytest.mark.parametrize(("took", "quanta"), [(0.0001, 1), (0.0499, 1), (0.051, 2), (0.31, 7)])
    @pytest.mark.parametrize("how", ["settle", "abandon"])
    def test_is_logged_at_a_whole_quantum_too(self, clock, desk, monkeypatch, took, quanta, how):
        """Else two jobs side by side would tell by their order in the log which was done first, to any precision."""
        (now, _), (made, ledger), noted = clock, desk, []

        def answers(self, jobs, k, size, seconds, started, beat):
            started()
            now[0] += took
            return [bytes(8)] * k if how == "settle" else 1 / 0

        monkeypatch.setattr(Here, "answers", answers)
        honest = getattr(ledger, how)
        monkeypatch.setattr(ledger, how, lambda *a, **b: noted.append(now[0]) or honest(*a, **b))
        with contextlib.suppress(RaphaError):
            made("shards").answer(Caller("r", "p", "j"), TestAtTheDesk.ASK, b"", lambda *_: None)
        assert noted == [pytest.approx(100.0 + quanta * clock_module.QUANTUM, abs=1e-9)]
