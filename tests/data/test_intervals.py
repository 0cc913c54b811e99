"""Intervals of aggregates hold what they speak of in about 95 of 100: the cohort's own figure, or the population's."""

import os

import numpy as np
import polars as pl
import pytest
from wards import SALT, repeatable, ward

from rapha_lab.client.mock import mock
from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.mechanisms import aggregate, moments
from rapha_lab.curator.mechanisms.question import Keys
from rapha_lab.protocol import messages

DEEP = bool(os.environ.get("RAPHA_LAB_DEEP"))
DRAWS = 10_000 if DEEP else 400
BASE = {"dataset": "ward", "epsilon": 0.5}
LEAST, MOST = (0.93, 1.0) if DEEP else (0.91, 1.0)


def figures(ask, view, schema, draws, rng=None):
    """The released figures of many answers to one question about the same patients."""
    rng = rng or np.random.default_rng(17)
    asked = aggregate.question(ask, schema)
    sd = aggregate.price(ask, schema, 1e-5)[1].noise * asked.sensitivity
    exact, add_noise = asked.exact(view), repeatable("normal", sd, rng)
    for _ in range(draws):
        yield asked.read(add_noise(exact), sd)


def held(answers, truths):
    """The share of answers whose intervals hold the truth, by figure."""
    hits = np.zeros(len(truths))
    for answer in answers:
        ends = [figure["interval"] for figure in answer.get("figures") or [answer]]
        hits += [low - 1e-9 <= truth <= high + 1e-9 for (low, high), truth in zip(ends, truths, strict=True)]
    return hits


class TestCohorts:
    """These speak of the very patients in the cohort: only the noise is between the answer and the truth."""

    @pytest.fixture(scope="class")
    def patients(self):
        frame = mock(ward(), 1500, seed=5)
        schema = ward(patients=1500)
        return schema, frame, Cohort(schema, frame, SALT).view("all")

    def truths(self, ask, frame):
        """What polars says."""
        age = frame["age"].drop_nulls()
        if isinstance(ask, messages.Count):
            return [(frame["sex"] == sex).sum() for sex in ("F", "M")] + [frame["sex"].null_count()]
        if isinstance(ask, messages.Mean):
            groups = [frame.filter(pl.col("sex") == sex) for sex in ("F", "M")] + [
                frame.filter(pl.col("sex").is_null())
            ]
            return [group["age"].mean() for group in groups]
        if isinstance(ask, messages.Sum):
            return [age.sum()]
        if isinstance(ask, messages.Variance):
            return [age.mean(), age.std(ddof=0), age.var(ddof=0)]
        if isinstance(ask, messages.Quantiles):
            return [age.quantile(q, "lower") for q in ask.at]
        if isinstance(ask, messages.Missing):
            return [100 * frame[name].null_count() / len(frame) for name in ask.columns]
        if isinstance(ask, messages.Correlation):
            both = frame.drop_nulls(["age", "visits"])
            return [both.select(pl.corr("age", "visits")).item()]
        shares = [100 * (frame["sex"] == sex).sum() / len(frame) for sex in ("F", "M")]
        lacking = [100 * frame[name].null_count() / len(frame) for name in ("age", "sex")]
        return [len(frame), age.mean(), age.std(ddof=0), lacking[0], *shares, lacking[1]]

    @pytest.mark.parametrize(
        "ask",
        [
            messages.Count(by=["sex"], **BASE),
            messages.Mean(column="age", by=["sex"], **BASE),
            messages.Sum(column="age", **BASE),
            messages.Variance(column="age", **BASE),
            messages.Quantiles(column="age", at=(0.05, 0.5, 0.9), bins=50, **BASE),
            messages.Missing(columns=["age", "sex"], **BASE),
            messages.Correlation(columns=["age", "visits"], **BASE),
            messages.Describe(columns=["age", "sex"], **BASE),
        ],
        ids=lambda ask: type(ask).__name__,
    )
    def test_they_hold_the_cohorts_own_figures(self, patients, ask):
        """Sums, spreads, quantiles (whose bins widen them), shares and correlations."""
        schema, frame, view = patients
        hits = held(figures(ask, view, schema, DRAWS), self.truths(ask, frame)) / DRAWS
        assert (hits >= LEAST).all(), hits
        if not isinstance(ask, messages.Quantiles):
            assert (hits <= 0.985).all(), hits

    @pytest.mark.parametrize("number", [0, 3, 30])
    def test_with_hardly_a_patient_they_widen_to_all_that_is_possible(self, number):
        """A spread or a correlation of nobody is not answered with confidence."""
        schema, frame = ward(), mock(ward(), number)
        view = Cohort(schema, frame, SALT).view("all")
        ask = messages.Variance(column="age", dataset="ward", epsilon=0.1)
        for answer in figures(ask, view, schema, 20):
            low, high = answer["figures"][1]["interval"]
            assert (low, high) == (0.0, 50.0)
        ask = messages.Correlation(columns=["age", "crp"], dataset="ward", epsilon=0.1)
        for answer in figures(ask, view, schema, 20):
            assert answer["figures"][0]["interval"] == [-1.0, 1.0]

    def test_stated_errors_are_those_that_occur(self, patients):
        """The standard error beside a figure is the spread of its values over many answers."""
        schema, _, view = patients
        for ask in (
            messages.Variance(column="age", **BASE),
            messages.Describe(columns=["age", "sex"], **BASE),
        ):
            found = list(figures(ask, view, schema, DRAWS))
            for index in range(len(found[0]["figures"])):
                values = [answer["figures"][index]["value"] for answer in found]
                stated = np.mean([answer["figures"][index]["error"] for answer in found])
                assert np.std(values) == pytest.approx(stated, rel=0.2)

    def test_expected_errors_are_those_that_are_stated(self, patients):
        """A quote's error is what the release says, on values like those it assumes."""
        schema, _, _ = patients
        n = 4000
        frame = mock(schema, n).with_columns(
            age=pl.Series(np.linspace(0, 100, n)), visits=pl.Series(np.arange(n) % 10), sex=pl.lit("F")
        )
        schema = ward(patients=n)
        view = Cohort(schema, frame, SALT).view("all")
        for ask, index in (
            (messages.Variance(column="age", **BASE), 1),
            (messages.Sum(column="age", **BASE), None),
            (messages.Missing(columns=["age", "sex"], **BASE), 0),
            (messages.Correlation(columns=["age", "visits"], **BASE), 0),
        ):
            told = list(figures(ask, view, schema, 60))
            stated = np.mean([t["error"] if index is None else t["figures"][index]["error"] for t in told])
            noise = aggregate.price(ask, schema, 1e-5)[1].noise
            assert aggregate.expect(ask, schema, noise)["error"] == pytest.approx(stated, rel=0.15)

    def test_a_mutant_that_understates_the_noise_does_not_cover(self, patients, mutant):
        """The tests of coverage have teeth."""
        broken = mutant(
            moments,
            "* noise_n) ** 2) / n\n",
            "* noise_n) ** 2) / n / 2\n",
        )
        schema, frame, view = patients
        asked = broken.variance(schema.column("age"), Keys([]))
        sd = 4.0 * asked.sensitivity
        exact, add_noise = asked.exact(view), repeatable("normal", sd, np.random.default_rng(17))
        answers = (asked.read(add_noise(exact), sd) for _ in range(200))
        hits = held(answers, self.truths(messages.Variance(column="age", **BASE), frame)) / 200
        assert hits[2] < 0.85


class TestSurvival:
    @pytest.mark.parametrize("n", [1500, 5000])
    def test_they_hold_the_populations_curve(self, n):
        """Sampling of patients and noise together, at each point that is shown."""
        schema = ward(patients=n)
        rng = np.random.default_rng(7)
        rounds = 400 if DEEP else 60
        hits, seen = {}, {}
        for _ in range(rounds):
            event, censored = rng.exponential(60, n), rng.uniform(0, 130, n)
            time = np.minimum(np.minimum(event, censored), 100)
            frame = mock(schema, n).with_columns(
                age=pl.Series(time), died=pl.Series((event <= censored) & (event < 100))
            )
            view = Cohort(schema, frame, SALT).view("all")
            ask = messages.Survival(time="age", event="died", bins=20, dataset="ward", epsilon=1.0)
            (answer,) = figures(ask, view, schema, 1, rng)
            curve = answer["curves"][0]
            for at, (low, high) in zip(curve["at"][1:], curve["intervals"][1:], strict=True):
                seen[at] = seen.get(at, 0) + 1
                hits[at] = hits.get(at, 0) + (low <= np.exp(-at / 60) <= high)
        shares = [hits[at] / seen[at] for at in seen if seen[at] > rounds / 2]
        assert len(shares) >= 12
        assert np.mean(shares) >= (0.93 if DEEP else 0.92), shares
        assert min(shares) >= 0.88, shares

    def test_a_curve_falls_from_one_and_ends_where_few_are_at_risk(self):
        """However much noise there is: within 0 and 1, never rising, its interval about it."""
        schema, frame = ward(), mock(ward(), 200)
        view = Cohort(schema, frame, SALT).view("all")
        for epsilon in (0.01, 0.3, 100.0):
            ask = messages.Survival(time="age", event="died", by=["sex"], dataset="ward", epsilon=epsilon)
            for answer in figures(ask, view, schema, 10):
                for curve in answer["curves"]:
                    assert curve["survival"][0] == 1.0
                    assert (np.diff(curve["survival"]) <= 0).all()
                    for value, (low, high) in zip(curve["survival"], curve["intervals"], strict=True):
                        assert 0 <= low <= value <= high <= 1
                if epsilon == 0.01:
                    assert all(len(curve["at"]) == 1 for curve in answer["curves"])
