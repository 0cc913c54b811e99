"""Quotes at the curator: made of schema, policy and ledger alone, with the errors that answers will state."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.curator import quotes
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.mechanisms import evaluate, metrics, moments
from rapha_lab.curator.mechanisms.question import GRID, Keys, laplace
from rapha_lab.protocol.errors import PolicyError, RequestError
from rapha_lab.protocol.policy import Project
from rapha_lab.protocol.quote import Inquiry, Quote
from rapha_lab.protocol.schema import Column, Schema

PROJECT = Project(
    name="p",
    researchers=[],
    datasets=["ward"],
    epsilon=4.0,
    delta=1e-6,
    largest_model=1000,
    smallest_cohort=10,
)
WORDS = {"meaning": "m", "public": "p"}
SCHEMA = Schema(
    name="ward",
    title="t",
    citation="c",
    licence="l",
    patient="pid",
    patients=5000,
    source="ward.parquet",
    columns=(
        Column(name="age", type="number", bounds=(0, 100), unit="years", **WORDS),
        Column(name="sex", type="category", categories=("F", "M"), **WORDS),
        Column(name="weight", type="number", bounds=(30, 200), unit="kg", **WORDS),
        Column(name="died", type="boolean", **WORDS),
    ),
)
UNDECLARED = msgspec.structs.replace(SCHEMA, patients=None)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """The accounts of a project; there are no records anywhere."""
    ledger = Ledger(tmp_path_factory.mktemp("quotes") / "ledger.db", Ed25519PrivateKey.generate())
    for split in ("train", "validation", "test"):
        ledger.open_account("p", "ward", split, 4.0, 1e-6)
    yield ledger
    ledger.close()


def asked(ledger: Ledger, schema: Schema = SCHEMA, **fields: object) -> Quote:
    """A quote for an inquiry of these fields."""
    return quotes.quote(msgspec.convert(fields, Inquiry), PROJECT, schema, ledger)


class TestNoRecord:
    def test_quotes_know_no_cohort(self):
        """The module imports nothing that could open a record, and is given none."""
        tree = ast.parse(inspect.getsource(quotes))
        names = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "rapha_lab.curator.cohort" not in modules
        assert not names & {"Cohort", "View", "plan_of", "polars"}


class TestErrors:
    @pytest.mark.parametrize("split", ["all", "test"])
    def test_the_error_of_a_count_and_of_a_bin_is_the_noise(self, ledger, split):
        """One patient moves them by one."""
        count = asked(ledger, kind="count", epsilon=0.5, split=split)
        bins = asked(ledger, kind="histogram", column="sex", epsilon=0.5, split=split)
        assert count.error == count.noise == bins.error
        assert bins.unit == "patients per bin"

    @pytest.mark.parametrize(("value", "which"), [(50.0, 0), (100.0, 1), (0.0, 1)])
    def test_the_errors_of_a_mean_are_those_its_release_states(self, value, which):
        """In the middle of the bounds and at them, for as many patients as are expected."""
        asked, noise, patients = moments.mean(SCHEMA.column("age"), Keys([])), 3.0, 4000
        exact = [moments.WEIGHT * patients, round((value - 50) / 50 * GRID) * patients]
        told = asked.read(exact, noise * asked.sensitivity)["error"]
        figures = asked.expect(noise * asked.sensitivity, patients)["figures"]
        assert list(figures.values())[which] == pytest.approx(told, rel=1e-6)

    @pytest.mark.parametrize(
        ("patients", "epsilon", "auroc"), [(20_000, 1.0, 0.8), (3000, 2.0, 0.7), (50_000, 0.3, 0.9)]
    )
    def test_the_error_of_an_auroc_is_what_releases_state_on_average(self, ledger, patients, epsilon, auroc):
        """On made-up patients whose scores have that AUROC and who are a fifth positive."""
        quote = asked(ledger, kind="evaluate", split="test", epsilon=epsilon, auroc=auroc, patients=patients)
        rng = np.random.default_rng(0)
        n, d = (
            round(SCHEMA.splits.test * patients),
            math.sqrt(2) * {0.7: 0.5244, 0.8: 0.8416, 0.9: 1.2816}[auroc],
        )
        scale = evaluate.price(epsilon, n)[2]
        stated = []
        for _ in range(15):
            labels = (rng.random(n) < 0.2).astype(int)
            scores = np.log(0.25) + d * (labels - 0.5) * d + d * rng.standard_normal(n)
            edges = evaluate.edges_between(*np.quantile(scores, [0.3, 0.7]))
            noisy = laplace(scale)(evaluate.cells(scores, labels, edges).ravel())
            judged = metrics.judge(np.array(noisy).reshape(2, -1), edges, scale, ["auroc"])
            stated.append(judged["metrics"]["auroc"]["error"])
        assert quote.error == pytest.approx(np.mean(stated), rel=0.2)

    def test_more_patients_or_more_epsilon_mean_less_error(self, ledger):
        """For a mean and for an AUROC."""
        for fields in ({"kind": "mean", "column": "age"}, {"kind": "evaluate", "split": "test"}):
            few, many = (asked(ledger, epsilon=0.3, patients=n, **fields) for n in (2000, 50_000))
            assert many.error < few.error
            assert asked(ledger, epsilon=3, patients=2000, **fields).error < few.error


class TestTargets:
    @pytest.mark.parametrize(
        ("fields", "error"),
        [
            ({"kind": "count"}, 12.0),
            ({"kind": "histogram", "column": "age"}, 3.0),
            ({"kind": "mean", "column": "age"}, 0.5),
            ({"kind": "mean", "column": "age", "fields": {"by": ["sex"]}}, 0.5),
            ({"kind": "sum", "column": "age"}, 2000.0),
            ({"kind": "variance", "column": "age"}, 0.5),
            ({"kind": "quantiles", "column": "age"}, 0.02),
            ({"kind": "correlation", "fields": {"columns": ["age", "weight"]}}, 0.05),
            ({"kind": "survival", "fields": {"time": "age", "event": "died"}}, 0.03),
            ({"kind": "missing", "fields": {"columns": ["age", "sex"]}}, 0.5),
            ({"kind": "describe", "fields": {"columns": ["age", "sex"]}}, 0.5),
            ({"kind": "mean", "column": "age", "split": "test"}, 40.0),
            ({"kind": "evaluate", "split": "test"}, 0.05),
        ],
    )
    def test_the_epsilon_for_an_error_gives_at_most_that_error(self, ledger, fields, error):
        """And no much smaller one does, unless it is the least there is."""
        quote = asked(ledger, error=error, **fields)
        assert quote.error <= error
        if quote.epsilon > 0.02:
            assert asked(ledger, epsilon=quote.epsilon * 0.8, **fields).error > error

    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ({"kind": "mean", "column": "age", "error": 1e-9}, "error"),
            ({"kind": "evaluate", "split": "test", "error": 1e-3}, "error"),
            ({"kind": "evaluate", "metrics": ["calibration"], "error": 0.1}, "error"),
            ({"kind": "fit", "steps": 10, "batch": 10, "error": 0.1}, "error"),
            ({"kind": "count", "error": 1.0, "epsilon": 1.0}, "epsilon"),
            ({"kind": "count"}, "epsilon"),
        ],
    )
    def test_an_error_that_no_epsilon_gives_is_refused_by_name(self, ledger, fields, field):
        """What no noise can do, or what has no error."""
        with pytest.raises(RequestError) as refusal:
            asked(ledger, **fields)
        assert refusal.value.field == field


class TestUndeclared:
    def test_what_needs_no_number_of_patients_is_quoted_without_one(self, ledger):
        """A count has its error; a mean and an AUROC have a price and say what is missing."""
        assert asked(ledger, UNDECLARED, kind="count", epsilon=1).error is not None
        for fields in ({"kind": "mean", "column": "age"}, {"kind": "evaluate", "split": "test"}):
            quote = asked(ledger, UNDECLARED, epsilon=1, **fields)
            assert quote.error is None
            assert quote.fits
            assert "does not declare" in quote.notes[0]

    @pytest.mark.parametrize(
        "fields",
        [
            {"kind": "fit", "steps": 10, "batch": 10, "epsilon": 1},
            {"kind": "mean", "column": "age", "error": 1},
            {"kind": "evaluate", "error": 0.1},
        ],
    )
    def test_what_needs_one_says_so(self, ledger, fields):
        """By the field that the custodian may declare; a supposed number serves for planning."""
        with pytest.raises(RequestError, match="number of patients") as refusal:
            asked(ledger, UNDECLARED, **fields)
        assert refusal.value.field == "patients"
        assert asked(ledger, UNDECLARED, **fields, patients=5000).hypothetical


class TestPolicy:
    def test_a_model_too_large_for_the_policy_has_no_quote(self, ledger):
        """It would be refused after all."""
        fit = {"kind": "fit", "steps": 10, "batch": 500, "epsilon": 1, "split": "train"}
        assert asked(ledger, **fit, size=1000).fits
        with pytest.raises(PolicyError, match="1,001"):
            asked(ledger, **fit, size=1001)
