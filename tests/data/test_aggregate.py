"""One patient moves the exact integers by no more than is stated, the noise has the stated law."""

import math
import os
from dataclasses import replace

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from wards import NASTY, SALT, cohort_of, hospital, rows, ward

from rapha_lab.client.mock import mock, mock_tables
from rapha_lab.curator.accounting import Gaussian, epsilon_of
from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.mechanisms import aggregate, counts, describe, moments, question
from rapha_lab.curator.mechanisms import rows as table_rows
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Count, Histogram, Mean
from rapha_lab.protocol.schema import Column

ROWS = dict.fromkeys([column.name for column in ward().columns])
DELTA = 1e-5


NUMBERS = ["age", "crp", "visits"]
KEYS = [[], ["sex"], ["site", "visits", "smoker"]]


def asks(epsilon=1.0, split="all"):
    """Every question that can be asked of the ward."""
    base = {"dataset": "ward", "epsilon": epsilon, "split": split}
    names = [column.name for column in ward().columns]
    for by in KEYS:
        yield Count(by=by, **base)
        for name in (*NUMBERS, "smoker"):
            yield Mean(column=name, by=by, **base)
            yield messages.Sum(column=name, by=by, **base)
            if name in NUMBERS:
                yield messages.Variance(column=name, by=by, **base)
    for name in names:
        yield from (Histogram(column=name, bins=bins, **base) for bins in (1, 4, 50))
    for name in NUMBERS:
        yield messages.Quantiles(column=name, at=(0.1, 0.5), bins=9, **base)
    yield messages.Correlation(columns=[*NUMBERS, "died"], **base)
    for by in ([], ["sex"]):
        yield messages.Survival(time="age", event="died", by=by, bins=7, **base)
    yield messages.Missing(columns=names, **base)
    yield messages.Describe(columns=names, **base)


def row_asks(epsilon=1.0):
    """Every question about the hospital's samples."""
    base = {"dataset": "ward", "epsilon": epsilon, "table": "labs"}
    urgent = messages.decode(
        b'{"op":"rows","dataset":"w","epsilon":1,"table":"labs","rows":{"is":"col","name":"urgent"}}'
    )
    for cap in (None, 1, 3):
        for by in (None, "code", "urgent"):
            for of in ("count", "patients"):
                yield messages.Rows(of=of, by=by, cap=cap, **base)
            for of in ("sum", "mean"):
                yield messages.Rows(of=of, column="value", by=by, cap=cap, rows=urgent.rows, **base)


def questions(module=aggregate):
    """The same, as integers with a sensitivity."""
    return [module.question(ask, ward()) for ask in asks()]


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


ASKED = questions()


class TestSensitivity:
    @given(rows(), st.data())
    @settings(max_examples=30)
    def test_one_patient_moves_no_question_further_than_stated(self, patients, data):
        """Neighbours differ in one patient; whatever is recorded, the bound holds on the very integers."""
        patients.append(data.draw(st.sampled_from(EXTREME)))
        without = data.draw(st.integers(0, len(patients) - 1))
        views = neighbours(patients, without)
        for asked in ASKED:
            assert moved(asked, views) <= asked.sensitivity

    def test_the_stated_sensitivities_are_reached(self):
        """No more noise than needed: a patient at a bound moves means, spreads and a whole table 1 by all of it."""
        views = neighbours(EXTREME, 1)
        base = {"dataset": "ward", "epsilon": 1.0}
        for ask in (
            Mean(column="age", **base),
            messages.Sum(column="age", **base),
            messages.Variance(column="age", **base),
            messages.Correlation(columns=["age", "crp"], **base),
            messages.Describe(columns=["age", "sex", "died"], **base),
        ):
            asked = aggregate.question(ask, ward())
            assert moved(asked, views) == pytest.approx(asked.sensitivity, rel=1e-5)

    def test_values_that_escaped_the_cohorts_clamp_are_still_held(self):
        """The fixed-point grid clamps once more."""
        held = question.fixed(np.array([1e30, -1e30, np.nan, np.inf]), 0.0, 100.0)
        assert held.tolist() == [question.GRID, -question.GRID, 0, question.GRID]

    @pytest.mark.parametrize("rows_of_one", [0, 1, 40])
    def test_a_patient_of_forty_rows_moves_no_question_about_rows_further(self, rows_of_one):
        """With and without one patient, however many rows they have and whatever is in them."""
        schema = hospital()
        frame, labs = mock(schema, 30), mock_tables(schema, 30)["labs"]
        mine = labs.filter(pl.col("pid") != "mock-000007")
        many = pl.DataFrame(
            {
                "pid": ["mock-000007"] * rows_of_one,
                "taken": [labs["taken"][0]] * rows_of_one,
                "value": [10.0] * rows_of_one,
                "code": ["a"] * rows_of_one,
                "urgent": [True] * rows_of_one,
            },
            schema=labs.schema,
        )
        notes = mock_tables(schema, 30)["notes"]
        with_one = {"labs": pl.concat([mine, many]), "notes": notes}
        without = frame.filter(pl.col("id") != "mock-000007")
        views = [
            Cohort(schema, f, SALT, tables=t).view("all")
            for f, t in ((frame, with_one), (without, with_one | {"labs": mine}))
        ]
        for ask in row_asks():
            asked = table_rows.question(ask, schema)
            assert moved(asked, views) <= asked.sensitivity
            if rows_of_one == 40 and ask.of == "count" and ask.by == "code" and ask.cap is None:
                assert moved(asked, views) == 4  # the most of the table

    @pytest.mark.parametrize(
        ("module", "old", "new", "kind"),
        [
            (moments, "root(float(WEIGHT) ** 2, float(GRID) ** 2)", "root(float(GRID) ** 2) / 2", "mean"),
            (moments, "root(float(WEIGHT) ** 2, float(GRID) ** 2)", "float(GRID)", "mean"),
            (
                moments,
                "WEIGHT * by.per_cell(view, of=known), by",
                "2 * WEIGHT * by.per_cell(view, of=known), by",
                "mean",
            ),
            (moments, "GRID) ** 2, float(GRID) ** 2)", "GRID) ** 2)", "variance"),
            (moments, "2 * (steps * steps) // GRID - GRID", "3 * (steps * steps) // GRID - GRID", "variance"),
            (moments, "(2 * size + len(pairs))", "size", "correlation"),
            (counts, "root(len(columns) + 1.0)", "1.0", "missing"),
            (describe, "[float(SHARE) ** 2] if", "[0.0] if", "describe"),
            (counts, "[known.numpy()], minlength", "[known.numpy()].repeat(2), minlength", "histogram"),
        ],
    )
    def test_mutants_of_the_arithmetic_are_caught(self, mutant, module, old, new, kind):
        """A sensitivity that forgets a part, a patient counted twice: each breaks a bound."""
        broken = mutant(module, old, new)
        keys, columns = question.Keys([]), [ward().column(name) for name in ("age", "crp", "sex", "died")]
        made = {
            "mean": lambda m: m.mean(columns[0], keys),
            "variance": lambda m: m.variance(columns[0], keys),
            "correlation": lambda m: m.correlation(columns[:2]),
            "missing": lambda m: m.missing(columns[:1] + columns[2:3]),
            "describe": lambda m: m.table(columns),
            "histogram": lambda m: m.histogram(columns[3], 1),
        }[kind]
        nobody = [ROWS | {"age": None, "sex": None, "crp": None, "died": None}]
        pairs = [neighbours(EXTREME + nobody, n) for n in range(len(EXTREME) + 1)]
        assert all(moved(made(module), pair) <= made(module).sensitivity for pair in pairs)
        assert any(moved(made(broken), pair) > made(broken).sensitivity for pair in pairs)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"count": float(cap) ** 2', '"count": float(cap)'),
            ("float(min(size, cap))", "1.0"),
            ("<= cap\n", "<= cap + 1\n"),
            ("(float(WEIGHT) ** 2 + float(GRID) ** 2)", "float(WEIGHT) ** 2"),
        ],
    )
    def test_mutants_of_the_arithmetic_of_rows_are_caught(self, mutant, old, new):
        """A cap that is not held, or held but not paid for."""
        broken = mutant(table_rows, old, new)
        schema = hospital()
        codes = [["a", "a", "a", "a"], ["a", "b", "c", "a"]]
        for kind in codes:
            labs = pl.DataFrame({"pid": ["p0"] * 4, "value": [10.0] * 4, "code": kind, "urgent": [True] * 4})
            labs = labs.with_columns(taken=pl.lit("2020-01-01"))
            notes = mock_tables(schema, 0)["notes"]
            frame = mock(schema, 1).with_columns(id=pl.lit("p0"))
            one = Cohort(schema, frame, SALT, tables={"labs": labs, "notes": notes}).view("all")
            none = Cohort(schema, frame[:0], SALT, tables={"labs": labs, "notes": notes}).view("all")
            for ask in row_asks():
                honest, other = (m.question(ask, schema) for m in (table_rows, broken))
                assert moved(honest, (one, none)) <= honest.sensitivity
                if moved(other, (one, none)) > other.sensitivity:
                    return
        raise AssertionError("not caught")


class TestNoise:
    @pytest.mark.parametrize("sd", [0.4, 2.0, 17.0])
    def test_gaussian_noise_has_the_discrete_gaussian_law(self, sd):
        """Draws (100,000 in the deep run) against the mass function exp(-k²/2σ²)."""
        assert law(question.gaussian(sd), lambda k: np.exp(-(k**2) / (2 * sd**2)), 6 * sd) > 1e-6

    @pytest.mark.parametrize("scale", [0.3, 2.0, 15.0])
    def test_laplace_noise_has_the_discrete_laplace_law(self, scale):
        """Draws (100,000 in the deep run) against the mass function exp(-|k|/b)."""
        assert law(question.laplace(scale), lambda k: np.exp(-np.abs(k) / scale), 20 * scale) > 1e-6

    def test_the_law_test_sees_a_fifth_less_noise(self):
        """The test has teeth."""
        assert law(question.gaussian(2.0), lambda k: np.exp(-(k**2) / (2 * 2.5**2)), 15) < 1e-6

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
            ("sd = loss.noise * asked.sensitivity", "sd = loss.noise", True),
            ("gaussian(sd)", "(lambda exact: exact.tolist())", True),
            ("gaussian(sd)", "gaussian(sd / 1.3)", True),
        ],
    )
    def test_the_noise_added_is_the_noise_paid_for(self, monkeypatch, mutant, old, new, caught):
        """The spread of 300 noisy sums is that of the planned loss; a mutant with less is seen."""
        module = mutant(aggregate, old, new) if old else aggregate
        ask = Mean(dataset="ward", column="age", epsilon=1.0)
        honest, seen = aggregate.question(ask, ward()), []
        spying = replace(honest, read=lambda noisy, sd: seen.append(noisy) or {})
        monkeypatch.setattr(module, "question", lambda ask, schema: spying)
        plan = module.plan(ask, ward(), DELTA)
        view = cohort_of([]).view("all")
        for _ in range(300):
            plan.run(view, lambda *_: None)
        wanted = plan.loss.noise * honest.sensitivity
        p = stats.chi2.sf((np.array(seen, dtype=float) ** 2).sum() / wanted**2, 600)
        assert (min(p, 1 - p) < 1e-6) == caught


def law(noise, mass, reach):
    """The p-value of draws of noise under a law, by chi-square over its likely values."""
    size = 100_000 if os.environ.get("RAPHA_LAB_DEEP") else 40_000
    draws = np.array(noise(np.zeros(size, dtype=np.int64)))
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
            asked = counts.histogram(ward().column(name), bins)
            values = [v for v in [*NASTY, 3.0, 9.0] if name != "visits" or v != 5e-324]
            lacking = 2 if name != "age" else 0
            found = asked.exact(cohort_of([ROWS | {name: v} for v in values]).view("all"))
            assert found.sum() == len(values) - lacking

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


def test_a_text_is_refused_in_a_description_before_anything_is_spent():
    """It has no figures, as its type says without a look at anybody."""
    letter = Column(
        name="letter", type="text", tokens=5, vocabulary=64, meaning="Made up.", public="Made up."
    )
    with pytest.raises(RequestError, match="letter"):
        describe.table([letter])
