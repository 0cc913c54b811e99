"""One patient moves the exact integers by no more than is stated, the noise has the stated law."""

import math

import msgspec
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from wards import NASTY, SALT, cohort_of, rows, ward

from rapha_lab.client.mock import mock
from rapha_lab.curator.accounting import Gaussian, epsilon_of
from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.mechanisms import aggregate
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Count, Histogram, Mean

ROWS = dict.fromkeys([column.name for column in ward().columns])
DELTA = 1e-5


def asks(epsilon=1.0, split="all"):
    """Every question that can be asked of the ward."""
    base = {"dataset": "ward", "epsilon": epsilon, "split": split}
    yield Count(**base)
    for column in ward().columns:
        yield Histogram(column=column.name, bins=4, **base)
        if column.type != "category":
            yield Mean(column=column.name, **base)


def questions(module=aggregate):
    """The same, as integers with a sensitivity."""
    yield module.count()
    for column in ward().columns:
        yield from (module.histogram(column, bins) for bins in (1, 4, 50))
        if column.type != "category":
            yield module.mean(column)


def neighbours(patients, without):
    """Views of two data sets that differ in one patient."""
    return [
        cohort_of(group).view("all") for group in (patients, patients[:without] + patients[without + 1 :])
    ]


def moved(question, views):
    """By how much a question's integers differ between two data sets, in L2."""
    exact = [question.exact(view).astype(object) for view in views]
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(*exact, strict=True)))


EXTREME = [ROWS | {"age": age, "crp": 1000.0, "died": True, "sex": "F"} for age in (0.0, 100.0, None)]


class TestSensitivity:
    @given(rows(), st.data())
    @settings(max_examples=40)
    def test_one_patient_moves_no_question_further_than_stated(self, patients, data):
        """Neighbours differ in one patient; whatever is recorded, the bound holds on the very integers."""
        patients.append(data.draw(st.sampled_from(EXTREME)))
        without = data.draw(st.integers(0, len(patients) - 1))
        views = neighbours(patients, without)
        for question in questions():
            assert moved(question, views) <= question.sensitivity

    def test_the_stated_sensitivity_of_a_mean_is_reached(self):
        """No more noise than needed: a patient at a bound moves it by all of it."""
        question = aggregate.mean(ward().column("age"))
        assert moved(question, neighbours(EXTREME, 1)) == pytest.approx(question.sensitivity)

    def test_values_that_escaped_the_cohorts_clamp_are_still_held(self):
        """The fixed-point grid clamps once more."""

        class Raw:
            def known(self, name):
                return torch.tensor([True])

            def numbers(self, name):
                return torch.tensor([1e30], dtype=torch.float64)

        question = aggregate.mean(ward().column("age"))
        assert math.hypot(*question.exact(Raw())) <= question.sensitivity

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("math.hypot(weight, GRID)", "math.hypot(weight, GRID) / 2"),
            ("math.hypot(weight, GRID)", "float(GRID)"),
            ("(values - middle) / half", "(values - low) / half"),
            ("np.searchsorted(edges[1:-1]", "2 + 0 * np.searchsorted(edges[1:-1]"),
            ("weight * len(steps)", "weight * 2 * len(steps)"),
            ("[known.numpy()], minlength", "[known.numpy()].repeat(2), minlength"),
        ],
    )
    def test_mutants_of_the_arithmetic_are_caught(self, mutant, old, new):
        """Halved sensitivity, an uncentred sum, a patient counted twice: each breaks a bound or a count."""
        broken = mutant(aggregate, old, new)
        honest = list(questions())
        caught = False
        view, pairs = cohort_of(EXTREME).view("all"), [neighbours(EXTREME, n) for n in range(len(EXTREME))]
        for question, reference in zip(questions(broken), honest, strict=True):
            caught |= any(moved(question, pair) > question.sensitivity for pair in pairs)
            caught |= question.exact(view).tolist() != reference.exact(view).tolist()
        assert caught


class TestNoise:
    @pytest.mark.parametrize("sd", [0.4, 2.0, 17.0])
    def test_gaussian_noise_has_the_discrete_gaussian_law(self, sd):
        """40,000 draws against the mass function exp(-k²/2σ²)."""
        assert law(aggregate.gaussian(sd), lambda k: np.exp(-(k**2) / (2 * sd**2)), 6 * sd) > 1e-6

    @pytest.mark.parametrize("scale", [0.3, 2.0, 15.0])
    def test_laplace_noise_has_the_discrete_laplace_law(self, scale):
        """40,000 draws against the mass function exp(-|k|/b)."""
        assert law(aggregate.laplace(scale), lambda k: np.exp(-np.abs(k) / scale), 20 * scale) > 1e-6

    def test_the_law_test_sees_a_fifth_less_noise(self):
        """The test has teeth."""
        assert law(aggregate.gaussian(2.0), lambda k: np.exp(-(k**2) / (2 * 2.5**2)), 15) < 1e-6

    def test_a_plan_spends_what_was_asked_and_states_its_noise(self):
        """ε of the planned loss is the request's, and the noise is scaled by the sensitivity."""
        for ask in asks(epsilon=0.5):
            plan = aggregate.plan(ask, ward(), DELTA)
            assert isinstance(plan.loss, Gaussian)
            assert 0.4999 < epsilon_of(plan.loss, DELTA) <= 0.5
            assert (plan.steps, plan.touches) == (1, ("train", "validation", "test"))

    @pytest.mark.parametrize(
        ("old", "new", "caught"),
        [
            ("", "", False),
            ("sd = loss.noise * question.sensitivity", "sd = loss.noise", True),
            (
                '_adding(dp.m.make_gaussian(_VECTOR, dp.l2_distance(T="f64"), scale=sd))',
                "_adding(list)",
                True,
            ),
            ("scale=sd))", "scale=sd / 1.3))", True),
        ],
    )
    def test_the_noise_added_is_the_noise_paid_for(self, monkeypatch, mutant, old, new, caught):
        """The spread of 300 noisy sums is that of the planned loss; a mutant with less is seen."""
        module = mutant(aggregate, old, new) if old else aggregate
        ask = Mean(dataset="ward", column="age", epsilon=1.0)
        plan = module.plan(ask, ward(), DELTA)
        seen = []
        original = module.mean

        def spying(column):
            question = original(column)
            return module.Question(
                question.exact, question.sensitivity, lambda noisy, sd: seen.append(noisy) or {}
            )

        monkeypatch.setattr(module, "mean", spying)
        plan = module.plan(ask, ward(), DELTA)
        view = cohort_of([]).view("all")
        for _ in range(300):
            plan.run(view, lambda steps: None)
        wanted = plan.loss.noise * original(ward().column("age")).sensitivity
        p = stats.chi2.sf((np.array(seen, dtype=float) ** 2).sum() / wanted**2, 600)
        assert (min(p, 1 - p) < 1e-6) == caught


def law(noise, mass, reach):
    """The p-value of 40,000 draws of noise under a law, by chi-square over its likely values."""
    draws = np.array(noise(np.zeros(40_000, dtype=np.int64)))
    k = np.arange(-math.ceil(reach), math.ceil(reach) + 1)
    expected = mass(k) / mass(k).sum() * len(draws)
    often = expected >= 10
    observed = np.array([(draws == value).sum() for value in k[often]] + [0])
    observed[-1] = len(draws) - observed.sum()
    expected = np.append(expected[often], max(expected[~often].sum(), 1e-3))
    if expected[-1] < 5:
        observed, expected = (
            np.append(observed[:-2], observed[-2:].sum()),
            np.append(expected[:-2], expected[-2:].sum()),
        )
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


class TestAnswers:
    def test_with_little_noise_the_answers_are_the_truth(self):
        """Count, mean and histogram of what is known, in the column's unit."""
        frame = mock(ward(), 500)
        cohort = Cohort(ward(), frame, SALT)
        answer = lambda ask: aggregate.plan(ask, ward(), DELTA).run(cohort.view("all"), lambda k: None).values  # noqa: E731
        base = {"dataset": "ward", "epsilon": 1e5}
        assert answer(Count(**base))["value"] == 500
        mean = answer(Mean(column="age", **base))
        assert mean["value"] == pytest.approx(frame["age"].mean(), abs=1e-3)
        assert mean["patients"]["value"] == frame["age"].count()
        assert mean["unit"] == "years"
        site = answer(Histogram(column="site", **base))
        assert dict(zip(site["categories"], site["counts"], strict=True)) == {
            name: (frame["site"] == name).sum() for name in ("North", "East", "South")
        }
        assert site["missing"]["value"] == frame["site"].null_count()
        visits = answer(Histogram(column="visits", bins=10, **base))
        assert visits["counts"] == [(frame["visits"] == n).sum() for n in range(10)]
        assert visits["edges"] == [n - 0.5 for n in range(11)]

    @pytest.mark.parametrize("bins", [1, 3, 4, 7, 1000])
    def test_every_known_value_falls_in_a_public_bin(self, bins):
        """Linear, logarithmic or whole numbers: the bins cover the bounds and add up."""
        for name in ("age", "crp", "visits"):
            question = aggregate.histogram(ward().column(name), bins)
            values = [v for v in [*NASTY, 3.0, 9.0] if name != "visits" or v != 5e-324]
            lacking = 2 if name != "age" else 0
            counts = question.exact(cohort_of([ROWS | {name: v} for v in values]).view("all"))
            assert counts.sum() == len(values) - lacking

    @given(rows(), st.sampled_from(["all", "train", "validation", "test"]))
    @settings(max_examples=15)
    def test_no_record_makes_an_answer_raise_or_leave_its_shape(self, patients, split):
        """Empty splits, NaN, infinities: same keys, finite numbers, plain JSON."""
        cohort, empty = cohort_of(patients), cohort_of([])
        for ask in asks(epsilon=0.05, split=split):
            plan = aggregate.plan(ask, ward(), DELTA)
            a, b = (plan.run(c.view(split), lambda k: None).values for c in (cohort, empty))
            assert shape(a) == shape(b)
            assert "null" not in msgspec.json.encode({k: v for k, v in a.items() if k != "missing"}).decode()

    def test_a_mean_outside_its_bounds_is_never_answered(self):
        """Noise alone can give any ratio; the bounds are public."""
        plan = aggregate.plan(Mean(dataset="ward", column="age", epsilon=0.05), ward(), DELTA)
        for _ in range(50):
            values = plan.run(cohort_of([]).view("all"), lambda k: None).values
            low, high = values["interval"]
            assert 0 <= low <= values["value"] <= high <= 100

    def test_intervals_cover_the_cohorts_truth(self):
        """95 % intervals of a mean and a count hold the exact value in 92 to 98.5 of 100."""
        frame = mock(ward(), 150)
        view = Cohort(ward(), frame, SALT).view("all")
        for ask, truth in [
            (Count(dataset="ward", epsilon=0.5), 150),
            (Mean(dataset="ward", column="age", epsilon=0.5), frame["age"].mean()),
            (Mean(dataset="ward", column="crp", epsilon=2), frame["crp"].mean()),
        ]:
            plan = aggregate.plan(ask, ward(), DELTA)
            ends = [plan.run(view, lambda k: None).values["interval"] for _ in range(600)]
            assert 0.92 <= np.mean([low <= truth <= high for low, high in ends]) <= 0.985

    def test_a_category_has_no_mean(self):
        """The error says what to ask instead."""
        with pytest.raises(RequestError, match=r"patients\.histogram\(\"site\"\)"):
            aggregate.plan(Mean(dataset="ward", column="site", epsilon=1.0), ward(), DELTA)

    def test_no_value_of_a_record_is_in_an_answer(self):
        """A canary in every text of every record is in no byte."""
        frame = mock(ward(), 60).with_columns(
            id="CANARY" + pl.int_range(60).cast(pl.String), sex=pl.lit("CANARY"), site=pl.lit("CANARY")
        )
        view = Cohort(ward(), frame, SALT).view("all")
        for ask in asks():
            answer = aggregate.plan(ask, ward(), DELTA).run(view, lambda k: None)
            assert b"CANARY" not in msgspec.json.encode(answer.values) + answer.tensors

    def test_progress_is_announced_before_a_record_is_touched(self):
        """Whoever stops it there has spent nothing."""

        class Untouchable:
            def __getattr__(self, name):
                raise AssertionError("touched")

        class StopError(Exception):
            pass

        def stop(steps):
            raise StopError

        for ask in asks():
            with pytest.raises(StopError):
                aggregate.plan(ask, ward(), DELTA).run(Untouchable(), stop)


def shape(value):
    """Keys and lengths, without numbers."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value) is str
