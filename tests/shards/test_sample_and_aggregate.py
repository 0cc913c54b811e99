"""The mechanism: one patient in one shard, one shard by so much at most, noise to cover it, failures unseen."""

import inspect
import io
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from bay import CANARY, SCHEMA, Here, asked, ward
from hypothesis import given, settings
from hypothesis import strategies as st

from rapha_lab.curator import cohort as cohorts
from rapha_lab.curator.accounting import Gaussian, epsilon_of
from rapha_lab.curator.mechanisms import shards
from rapha_lab.curator.mechanisms.question import GRID
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RequestError
from rapha_lab.session import shard

MEAN = "def mean(frame):\n    return frame['age'].mean()\n"
SEEDED = settings(derandomize=True, max_examples=40, deadline=None)
patients = st.sets(st.integers(0, 400), min_size=1, max_size=120)


def plan(ask, workers, delta=1e-5):
    """A plan with the few shards that a test has patients for."""
    return shards.plan(ask, SCHEMA, delta, workers, least=2, fewest=1)


def frames(jobs):
    """The records in each job."""
    found = [messages.read_frame(io.BytesIO(job)) for job in jobs]
    return [pl.read_ipc(io.BytesIO(frame[1])) for frame in found]


def in_process(job):
    """What a worker answers, b"" if the function fails."""
    try:
        return shard.work(*messages.read_frame(io.BytesIO(job))).tobytes()
    except Exception:
        return b""


def inputs(numbers, k):
    """What the workers are given for these patients."""
    here = Here(lambda job: b"")
    plan(asked(MEAN, k=k, columns=["age", "sex"]), here).run(ward(numbers).view("all"), lambda *_: None)
    return here.jobs


class TestOnePatient:
    @SEEDED
    @given(patients, st.integers(0, 400), st.integers(2, 30))
    def test_is_in_one_shards_input_and_no_other(self, numbers, number, k):
        """With and without a patient all inputs but one are the same bytes."""
        with_, without = inputs(numbers | {number}, k), inputs(numbers - {number}, k)
        assert sum(a != b for a, b in zip(with_, without, strict=True)) == 1

    def test_mutant_a_patient_counted_twice_would_be_seen(self, monkeypatch):
        """Were patients dealt by row, one more would move the others."""
        dealt = lambda self, k: [cohorts.View(self._cohort, self.split, self._rows[i::k]) for i in range(k)]  # noqa: E731
        monkeypatch.setattr(cohorts.View, "shards", dealt)
        changed = sum(
            a != b for a, b in zip(inputs(set(range(60)), 5), inputs(set(range(1, 60)), 5), strict=True)
        )
        assert changed > 1

    @SEEDED
    @given(patients, st.integers(2, 30))
    def test_is_in_exactly_one_shard(self, numbers, k):
        """The shards hold every patient once, in the order of the records."""
        parts = ward(numbers).view("all").shards(k)
        rows = [int(row) for part in parts for row in part._rows]
        assert len(parts) == k
        assert sorted(rows) == list(range(len(numbers)))

    @SEEDED
    @given(st.binary(max_size=40), st.binary(max_size=40), st.integers(1, 4))
    def test_moves_the_sum_by_no_more_than_the_sensitivity(self, one, other, size):
        """Whatever two answers a shard gives, with bounds of any kind."""
        low, high = np.linspace(-3, 0, size), np.linspace(1e-3, 1e6, size)
        told = [shards.entries(answer, low, high, (low + high) / 2) for answer in (one, other)]
        assert np.linalg.norm((told[0] - told[1]).astype(float)) <= 2 * GRID * math.sqrt(size)

    def test_mutant_without_the_clip_one_moves_it_by_more(self):
        """The same answers unclipped."""
        source = (
            inspect.getsource(shards.entries)
            .replace(".clip(low, high)", "")
            .replace(".clip(-GRID, GRID)", "")
        )
        scope = dict(vars(shards))
        exec(source, scope)
        ends = np.array([0.0]), np.array([1.0]), np.array([0.5])
        told = [scope["entries"](np.array([x]).tobytes(), *ends) for x in (-50.0, 50.0)]
        assert abs(int(told[0][0] - told[1][0])) > 2 * GRID


class TestTheAnswer:
    def test_costs_what_its_noise_says(self):
        """A Gaussian of the asked epsilon; the noise is that of entries counted in their bounds, over k."""
        found = plan(asked(MEAN, epsilon=0.7, k=50), Here(lambda job: b""))
        assert isinstance(found.loss, Gaussian)
        assert 0.69 < epsilon_of(found.loss, 1e-5) <= 0.7
        answer = found.run(ward(range(400)).view("all"), lambda *_: None).values
        assert answer["errors"] == pytest.approx([100 * found.loss.noise / 50])

    def test_is_the_average_of_the_shards(self):
        """With little noise: what a mean of means is."""
        ask = asked(MEAN, epsilon=1000.0, k=40)
        answer = plan(ask, Here(in_process)).run(ward(range(2000)).view("all"), lambda *_: None).values
        assert answer["estimates"][0] == pytest.approx(44.2, abs=1.5)

    def test_spreads_as_its_error_says(self):
        """Over 100 answers."""
        found = plan(asked(MEAN, k=5, epsilon=50.0, bounds=[(-1000.0, 1000.0)]), Here(lambda job: b""))
        view = ward(range(50)).view("all")
        answers = [found.run(view, lambda *_: None).values for _ in range(100)]
        values = np.array([answer["estimates"][0] for answer in answers])
        error = answers[0]["errors"][0]
        assert np.std(values) == pytest.approx(error, rel=0.3)
        assert abs(values.mean()) < 4 * error / 10

    def test_has_the_shape_asked_for(self):
        """Two by two, each entry with its own bounds and default."""
        pairs, ones = [(0.0, 1.0), (0.0, 10.0), (-1.0, 1.0), (5.0, 6.0)], [0.0, 1.0, 0.5, 5.5]
        ask = asked(MEAN, shape=[2, 2], bounds=pairs, default=ones, epsilon=1000.0, k=200)
        answer = plan(ask, Here(lambda job: b"")).run(ward(range(50)).view("all"), lambda *_: None).values
        assert answer["estimates"] == pytest.approx(ones, abs=0.05)
        assert answer["shape"] == [2, 2]

    def test_a_record_is_touched_only_after_the_ledger_knows(self):
        """Shards are cut after the first step was announced."""
        here, order = Here(lambda job: b""), []
        plan(asked(MEAN, k=3), here).run(ward(range(9)).view("all"), order.append)
        assert order == [1]
        assert here.order == ["started", "job", "job", "job"]

    def test_holds_nothing_but_numbers_of_public_size(self):
        """No failure, no print, no time: the same keys whatever the shards did."""
        view = ward(range(50)).view("all")
        fine, failed = (
            plan(asked(MEAN, k=10), Here(how)).run(view, lambda *_: None).values
            for how in (in_process, lambda job: b"")
        )
        assert (
            fine.keys()
            == failed.keys()
            == {"kind", "function", "shape", "estimates", "errors", "intervals", "shards"}
        )
        assert {**fine, "estimates": 0, "intervals": 0} == {**failed, "estimates": 0, "intervals": 0}


HOSTILE = {
    "nothing": b"",
    "a word too few": bytes(4),
    "a word too many": bytes(16),
    "no number": np.array([math.nan]).tobytes(),
    "infinite": np.array([math.inf]).tobytes(),
    "a pickle": b"\x80\x04K\x2a.",
    "a frame": b"RPH1" + bytes(12),
    "an absurd header": b"RPH1" + b"\xff" * 12,
}


class TestAFailedShard:
    @pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
    def test_counts_as_the_public_default(self, answer):
        """To the last bit: as if it had answered the default."""
        ends = np.array([0.0]), np.array([4.0]), np.array([1.0])
        assert shards.entries(answer, *ends) == shards.entries(np.array([1.0]).tobytes(), *ends)

    def test_is_not_told_from_one_that_answers_the_default(self):
        """The released noise is the same draw: nothing but the sum decides."""
        view = ward(range(50)).view("all")
        for how in (lambda job: b"", lambda job: np.array([50.0]).tobytes()):
            answer = plan(asked(MEAN, k=200, epsilon=1000.0), Here(how)).run(view, lambda *_: None).values
            assert answer["estimates"] == pytest.approx([50.0], abs=1.0)


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("field", "terms"),
        [
            ("k", {"k": 1}),
            ("k", {"k": 9000}),
            ("bounds", {"bounds": [(1.0, 1.0)]}),
            ("bounds", {"bounds": [(2.0, 1.0)]}),
            ("bounds", {"bounds": [(0.0, math.inf)]}),
            ("bounds", {"bounds": [(0.0, math.nan)]}),
            ("bounds", {"bounds": [(0.0, 1.0)] * 2}),
            ("default", {"default": [101.0]}),
            ("default", {"default": [math.nan]}),
            ("default", {"default": []}),
            ("shape", {"shape": [100, 100]}),
            ("height", {"columns": ["height"]}),
            ("epsilon", {"epsilon": 1e-9}),
        ],
    )
    def test_names_the_field(self, field, terms):
        """Before anything is touched."""
        with pytest.raises(RequestError) as refused:
            plan(asked(MEAN, **terms), Here(lambda job: b""))
        assert refused.value.field == field

    def test_too_few_patients_for_the_noise(self):
        """A test split of 1,600 has no 200 shards of 20."""
        with pytest.raises(RequestError, match="too few patients"):
            shards.plan(asked(MEAN, k=None, split="test"), SCHEMA, 1e-5, Here(lambda job: b""))

    def test_fewer_shards_than_the_noise_needs(self):
        """200 at least, unless this file's constant is changed."""
        assert shards.LEAST == 200
        with pytest.raises(RequestError, match="k is 100"):
            shards.plan(asked(MEAN, k=100), SCHEMA, 1e-5, Here(lambda job: b""))


class TestHowManyShards:
    def test_as_many_as_make_the_noise_small(self):
        """sd = noise * sqrt(entries) / k of the bounds is AIM, between 200 and what the patients allow."""
        assert shards.choose(6.0, 1, 200, 10_000) == 300
        assert shards.choose(1.0, 1, 200, 10_000) == 200
        assert shards.choose(6.0, 4, 200, 250) == 250
        assert shards.choose(600.0, 4, 200, 10_000) == 1000


class TestTheFrame:
    def test_holds_the_columns_asked_for_and_no_identifier(self):
        """As the mock has them: numbers, whole numbers, truths, words, null where not known."""
        frame = ward(range(9)).view("all").frame(["sex", "age", "visits", "dead"])
        assert dict(frame.schema) == {
            "sex": pl.String,
            "age": pl.Float64,
            "visits": pl.Int64,
            "dead": pl.Boolean,
        }
        assert frame["sex"].to_list() == ["f", "m", None] * 3
        assert frame["age"][7] == CANARY
        assert frame["visits"].to_list() == list(range(9))

    def test_an_empty_shard_is_a_frame_too(self):
        """Of the same columns; how many shards are empty shows nowhere."""
        given = frames(inputs({3}, 20))
        assert sorted(len(frame) for frame in given) == [0] * 19 + [1]
        assert len({str(frame.schema) for frame in given}) == 1


def test_the_curator_runs_no_function_and_reads_no_pickle():
    """What a worker writes is taken as float64 and nothing else; a function's source is never compiled here."""
    for module in ("mechanisms/shards.py", "workers.py"):
        text = (Path(cohorts.__file__).parent / module).read_text()
        assert not any(word in text for word in ("pickle", "exec(", "compile(", "eval(", "np.load"))
