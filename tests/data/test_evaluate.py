"""Evaluation spends what is asked, one patient is in one cell, and nothing of a record comes back."""

import math
import os

import msgspec
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from wards import SALT, cohort_of, repeatable, rows, ward

from rapha_lab.client.mock import mock
from rapha_lab.curator.accounting import Pure
from rapha_lab.curator.cohort import Cohort, View
from rapha_lab.curator.lift import Lifted
from rapha_lab.curator.mechanisms import concordance, evaluate, metrics
from rapha_lab.protocol.errors import ProgramError, RefusedError, RequestError
from rapha_lab.protocol.messages import Evaluate
from rapha_lab.protocol.program import Node, Program, Ref, TensorSpec

METRICS = ["auroc", "auprc", "accuracy", "sensitivity", "specificity", "brier", "logloss", "calibration"]
TENSORS = save({"w": torch.tensor([2.0])})


def ask(operation="aten.mul.Tensor", column="age", **changes):
    """Evaluate a one-node model of one column: w times it, or another operation of both."""
    program = Program(
        inputs=[TensorSpec("x", "float32", [1])],
        parameters=[TensorSpec("w", "float32", [1])],
        constants=[],
        nodes=[Node("y", operation, [Ref("x"), Ref("w")])],
        output="y",
    )
    fields = {
        "dataset": "ward",
        "epsilon": 1.0,
        "split": "test",
        "program": program,
        "inputs": {"x": [column]},
    }
    return Evaluate(**(fields | {"target": "died", "metrics": METRICS} | changes))


class TestPrivacy:
    @given(
        st.lists(st.tuples(st.floats(), st.booleans()), min_size=1, max_size=30),
        st.floats(-6, 6),
        st.floats(-6, 6),
    )
    def test_one_patient_moves_utilities_and_cells_by_no_more_than_stated(self, patients, low, high):
        """Any scores at all: utilities by REACH in the largest, cells by one in total."""
        scores = evaluate.bounded(torch.tensor([score for score, _ in patients], dtype=torch.float64))
        labels = np.array([int(label) for _, label in patients])
        for a, b in zip(evaluate.utilities(scores), evaluate.utilities(scores[1:]), strict=True):
            assert np.abs(a - b).max() <= evaluate.REACH
        edges = evaluate.edges_between(low, high)
        cells = evaluate.cells(scores, labels, edges)
        assert cells.shape == (2, evaluate.BINS)
        assert np.abs(cells - evaluate.cells(scores[1:], labels[1:], edges)).sum() == 1

    @pytest.mark.parametrize("patients", [None, 100, 10**6])
    @pytest.mark.parametrize("epsilon", [0.01, 0.3, 1.0, 20.0])
    def test_the_three_parts_add_up_to_the_asked_epsilon(self, monkeypatch, patients, epsilon):
        """Two noisy maxima and one histogram, by the scales that OpenDP is given."""
        assert spent(monkeypatch, evaluate, ward(patients=patients), epsilon) <= epsilon
        assert spent(monkeypatch, evaluate, ward(patients=patients), epsilon) > 0.99 * epsilon

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("UP / ((1 - 2 * placing) * epsilon)", "UP / epsilon"),
            ("UP / ((1 - 2 * placing) * epsilon)", "UP / ((1 - placing) * epsilon)"),
            ("scale=UP * 2 * REACH / epsilon", "scale=UP * REACH / epsilon"),
            ("Pure(epsilon), placing * epsilon", "Pure(epsilon), 2 * placing * epsilon"),
        ],
    )
    def test_mutants_that_overspend_are_caught(self, monkeypatch, mutant, old, new):
        """Each saves noise and is seen in the sum."""
        assert spent(monkeypatch, mutant(evaluate, old, new), ward(), 1.0) > 1.0

    def test_a_mutant_with_a_smaller_reach_is_caught(self):
        """Utilities really move by REACH: it is not stated too large either."""
        a, b = (evaluate.utilities(np.array(scores)) for scores in ([0.0, -6.0], [0.0]))
        assert max(np.abs(x - y).max() for x, y in zip(a, b, strict=True)) == evaluate.REACH

    @pytest.mark.parametrize("patients", [None, 400])
    def test_a_patients_score_does_not_depend_on_the_others(self, patients):
        """The same patient in another company has bitwise the same score, of a program that is made of last digits too."""
        frame, schema = mock(ward(), 400), ward(patients=patients)
        for request, tensors in ((ask(split="all"), TENSORS), last_digits()):
            score = evaluate.logits(request, tensors, schema)
            everybody = score(Cohort(ward(), frame, SALT).view("all"))
            assert len(everybody.unique()) > 50
            assert torch.equal(everybody[1:], score(Cohort(ward(), frame[1:], SALT).view("all")))
            assert len(score(Cohort(ward(), frame[:0], SALT).view("all"))) == 0

    def test_in_a_slot_by_order_it_would(self, monkeypatch):
        """Who comes after a patient has another slot without them, in which the kernel rounds otherwise."""
        monkeypatch.setattr(View, "slots", lambda view, width: np.arange(len(view)) % width)
        frame = mock(ward(), 400)
        score = evaluate.logits(*last_digits(), ward(patients=400))
        everybody, others = (score(Cohort(ward(), each, SALT).view("all")) for each in (frame, frame[1:]))
        if not torch.equal(*rolled_product()):  # on this machine's kernels
            assert (everybody[1:] != others).sum() > 1

    def test_turns_put_nobody_on_anothers_place(self):
        """Patients of one slot come one after the other."""
        assert evaluate.turns_of(np.array([2, 0, 2, 2, 0, 1])).tolist() == [0, 0, 1, 2, 1, 0]

    def test_nor_on_a_machine_that_mixes_rows(self, monkeypatch):
        """An evaluation does not start where a made-up patient's score moves with the others'."""
        original = Lifted.scores

        def leaky(self, parameters, constants, inputs):
            return original(self, parameters, constants, inputs) + 1e-3 * inputs["x"].nan_to_num().sum()

        view, score = (
            Cohort(ward(), mock(ward(), 50), SALT).view("all"),
            evaluate.logits(ask(), TENSORS, ward()),
        )
        score(view)
        monkeypatch.setattr(Lifted, "scores", leaky)
        with pytest.raises(RefusedError, match="reproducibly"):
            score(view)


def last_digits():
    """A request whose score is the last digits of a product, and its tensors."""
    torch.manual_seed(0)
    shapes = {"u": [257, 1], "w": [3, 257]}
    nodes = [
        Node("h", "aten.linear.default", [Ref("x"), Ref("u")]),
        Node("p", "aten.linear.default", [Ref("h"), Ref("w")]),
        Node("q", "aten.select.int", [Ref("p"), 1, 0]),
        Node("r", "aten.mul.Scalar", [Ref("q"), 1e8]),
        Node("s", "aten.sin.default", [Ref("r")]),
        Node("y", "aten.mul.Scalar", [Ref("s"), 100.0]),
    ]
    program = Program(
        inputs=[TensorSpec("x", "float32", [1])],
        parameters=[TensorSpec(name, "float32", shape) for name, shape in shapes.items()],
        constants=[],
        nodes=nodes,
        output="y",
    )
    return ask(program=program, split="all"), save({n: torch.randn(shape) for n, shape in shapes.items()})


def rolled_product():
    """A product, and the same of rows in other places."""
    torch.manual_seed(0)
    x, w = torch.randn(416, 257), torch.randn(3, 257)
    return torch.nn.functional.linear(x, w).roll(1, 0), torch.nn.functional.linear(x.roll(1, 0), w)


def spent(monkeypatch, module, schema, epsilon):
    """The ε of all noise that a plan prepares, by OpenDP's own privacy maps."""
    total = []
    make_noisy_max, make_laplace = module.dp.m.make_noisy_max, module.dp.m.make_laplace

    def noisy_max(*args, **kwargs):
        measurement = make_noisy_max(*args, **kwargs)
        total.extend(2 * [measurement.map(evaluate.REACH)])
        return measurement

    def laplace(*args, **kwargs):
        measurement = make_laplace(*args, **kwargs)
        total.append(measurement.map(1))
        return measurement

    with monkeypatch.context() as patch:
        patch.setattr(module.dp.m, "make_noisy_max", noisy_max)
        patch.setattr(module.dp.m, "make_laplace", laplace)
        plan = module.plan(ask(epsilon=epsilon), TENSORS, schema, 1e-5)
    assert plan.loss == Pure(epsilon)
    assert len(total) == 3
    return math.fsum(total)


class TestAnswers:
    @given(rows(), st.sampled_from(["aten.mul.Tensor", "aten.div.Tensor", "aten.pow.Tensor_Tensor"]))
    @settings(max_examples=15)
    def test_no_record_makes_it_raise(self, patients, operation):
        """Empty, one class, NaN and infinite scores: the same keys, finite numbers, ordered ends."""
        plan = evaluate.plan(ask(operation, split="all"), save({"w": torch.tensor([0.0])}), ward(), 1e-5)
        answer = plan.run(cohort_of(patients).view("all"), lambda *_: None).values
        assert set(answer["metrics"]) == set(METRICS) - {"calibration"}
        assert b"null" not in msgspec.json.encode(answer)

    def test_a_good_model_is_seen_to_be_good(self):
        """An outcome that follows a column is ranked by it."""
        frame = mock(ward(), 4000).with_columns(died=pl.col("crp") > 10)
        view = Cohort(ward(), frame, SALT).view("all")
        plan = evaluate.plan(ask(column="crp", split="all", epsilon=5.0), TENSORS, ward(patients=4000), 1e-5)
        values = plan.run(view, lambda *_: None).values
        assert values["metrics"]["auroc"]["value"] > 0.97
        assert plan.touches == ("train", "validation", "test")

    def test_patients_without_an_outcome_are_left_out(self):
        """A missing target is neither a yes nor a no."""
        frame = mock(ward(), 300).with_columns(smoker=pl.Series([True] * 50 + [False] * 50 + [None] * 200))
        view = Cohort(ward(), frame, SALT).view("all")
        plan = evaluate.plan(ask(target="smoker", epsilon=1000.0), TENSORS, ward(), 1e-5)
        patients = plan.run(view, lambda *_: None).values["patients"]
        assert [patients[name]["value"] for name in ("negative", "positive")] == [50, 50]

    def test_no_value_of_a_record_is_in_the_answer(self):
        """A canary in every text of every record is in no byte."""
        frame = mock(ward(), 60).with_columns(
            sex=pl.lit("CANARY"), id="CANARY" + pl.int_range(60).cast(pl.String)
        )
        plan = evaluate.plan(ask(), TENSORS, ward(), 1e-5)
        answer = plan.run(Cohort(ward(), frame, SALT).view("test"), lambda *_: None)
        assert b"CANARY" not in msgspec.json.encode(answer.values) + answer.tensors


class TestGroups:
    def test_each_group_is_judged_and_its_gap_told(self):
        """A model that ranks one site and not the other is seen to, at the price of one histogram."""
        rng = np.random.default_rng(0)
        frame = mock(ward(), 6000).with_columns(
            site=pl.Series(rng.choice(["North", "East"], 6000)), died=pl.Series(rng.random(6000) < 0.4)
        )
        frame = frame.with_columns(
            died=pl.when(pl.col("site") == "North").then(pl.col("crp") > 10).otherwise("died")
        )
        schema = ward(patients=6000)
        view = Cohort(schema, frame, SALT).view("all")
        request = ask(column="crp", split="all", epsilon=4.0, by=["site"], metrics=["auroc", "confusion"])
        plan = evaluate.plan(request, TENSORS, schema, 1e-5)
        assert plan.loss == Pure(4.0)
        found = plan.run(view, lambda *_: None).values
        assert found["metrics"]["auroc, North"]["value"] > 0.95
        assert abs(found["metrics"]["auroc, East"]["value"] - 0.5) < 0.05
        gap = found["metrics"]["auroc, East minus North"]
        assert gap["interval"][0] <= gap["value"] <= gap["interval"][1] < -0.3
        north = frame.filter(pl.col("site") == "North")
        positives = sum(
            found["metrics"][f"{name}, North"]["value"] for name in ("true positives", "false negatives")
        )
        assert positives == pytest.approx(north["died"].sum(), abs=30)

    @given(st.lists(st.tuples(st.floats(), st.booleans(), st.integers(0, 4)), min_size=1, max_size=30))
    def test_one_patient_is_in_one_cell_of_one_group(self, patients):
        """However many groups there are; one of no group is in none."""
        scores = evaluate.bounded(torch.tensor([score for score, *_ in patients], dtype=torch.float64))
        labels = np.array([2 * group + int(label) for _, label, group in patients])
        edges = evaluate.edges_between(-1.0, 1.0, 0.3)
        moved = np.abs(
            evaluate.cells(scores, labels, edges, 8) - evaluate.cells(scores[1:], labels[1:], edges, 8)
        ).sum()
        assert moved == (labels[0] < 8)

    def test_a_threshold_divides_the_bins(self):
        """Sensitivity and specificity are those at the probability asked for."""
        rng = np.random.default_rng(1)
        frame = mock(ward(), 8000).with_columns(died=pl.Series(rng.random(8000) < 0.4))
        schema = ward(patients=8000)
        cohort = Cohort(schema, frame, SALT)
        asked = ask(split="all", epsilon=1e3, metrics=["sensitivity", "confusion"], threshold=0.6)
        found = evaluate.plan(asked, TENSORS, schema, 1e-5).run(cohort.view("all"), lambda *_: None).values
        scores = 2 * cohort.view("all").tensor("age")
        yes = (torch.sigmoid(scores) >= 0.6).numpy()
        wanted = yes[frame["died"].to_numpy()].mean()
        assert found["metrics"]["sensitivity"]["value"] == pytest.approx(wanted, abs=0.01)
        assert found["metrics"]["false positives"]["value"] == pytest.approx(
            (yes & ~frame["died"].to_numpy()).sum(), abs=2
        )


def harrell(times, events, scores):
    """The concordance over all pairs, by its definition."""
    first = (times[:, None] < times[None, :]) & events[:, None]
    wins = (scores[:, None] > scores[None, :]) + 0.5 * (scores[:, None] == scores[None, :])
    return (first * wins).sum() / first.sum()


class TestConcordance:
    def test_one_patient_moves_the_histogram_by_one(self):
        """Whose time and event are known; of the others none."""
        request = ask(column="crp", split="all", metrics=["concordance"], time="age", target="smoker")
        assert concordance.plan(request, TENSORS, ward()).loss == Pure(1.0)
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                concordance, "laplace", lambda scale: lambda exact: seen.append(exact) or exact.tolist()
            )
            patch.setattr(evaluate, "finder", lambda epsilon: lambda utility: 100)
            patients = [
                {"age": a, "crp": 5.0, "visits": 1.0, "smoker": s, "died": True, "sex": "F", "site": "East"}
                for a, s in ((10.0, True), (99.0, False), (50.0, None), (None, True))
            ]
            plan = concordance.plan(request, TENSORS, ward())
            for without in (None, 0, 1, 2, 3):
                group = [p for number, p in enumerate(patients) if number != without]
                plan.run(cohort_of(group).view("all"), lambda *_: None)
        moved = [int(np.abs(seen[0] - other).sum()) for other in seen[1:]]
        assert moved == [1, 1, 0, 0]

    def test_its_interval_holds_the_populations(self):
        """Sampling and noise together: 95 % intervals hold it in 91 or more of 100 here."""
        rng = np.random.default_rng(2)
        rounds, hits, errors = (1000 if os.environ.get("RAPHA_LAB_DEEP") else 120), 0, []
        edges, scale = evaluate.edges_between(-0.6, 0.6), 1.2
        times = np.linspace(0, 100, concordance.TIMES + 1)

        def draw(n):
            score = rng.normal(0, 1, n)
            event, censored = rng.exponential(60 * np.exp(-score)), rng.uniform(0, 150, n)
            return np.minimum(np.minimum(event, censored), 100), (event <= censored) & (event < 100), score

        t, e, s = draw(6000)
        when = np.searchsorted(times[1:-1], t)
        truth = harrell(when, e, np.searchsorted(edges, s))
        assert truth == pytest.approx(harrell(t, e, s), abs=0.02)
        for _ in range(rounds):
            t, e, s = draw(1500)
            when = np.searchsorted(times[1:-1], t)
            exact = evaluate.cells(s, e * concordance.TIMES + when, edges, 2 * concordance.TIMES)
            noisy = np.array(repeatable("laplace", scale, rng)(exact.ravel()), dtype=float).reshape(
                2, concordance.TIMES, -1
            )
            told = concordance.judge(noisy, metrics.spread(scale))
            hits += told["interval"][0] - 0.002 <= truth <= told["interval"][1] + 0.002
            errors.append(told["value"] - truth)
        assert 0.91 * rounds <= hits
        assert np.std(errors) == pytest.approx(told["error"], rel=0.3)

    def test_of_hardly_an_event_nothing_is_said(self):
        """The interval is all that is possible."""
        noisy = np.zeros((2, concordance.TIMES, evaluate.BINS))
        assert concordance.judge(noisy, 2.0) == {"value": 0.5, "error": 0.5, "interval": [0.0, 1.0]}

    @pytest.mark.parametrize(
        "changes", [{"metrics": ["concordance", "auroc"]}, {"time": None}, {"by": ["sex"]}, {"time": "sex"}]
    )
    def test_it_is_asked_for_alone_and_with_a_time(self, changes):
        """Other metrics would be worse from its histogram."""
        fields = {"metrics": ["concordance"], "time": "age"} | changes
        with pytest.raises(RequestError):
            concordance.plan(ask(**fields), TENSORS, ward())


class TestErrors:
    @pytest.mark.parametrize("target", ["age", "site"])
    def test_the_target_has_to_be_boolean(self, target):
        """The error names the field and the type."""
        with pytest.raises(RequestError, match="no boolean") as error:
            evaluate.plan(ask(target=target), TENSORS, ward(), 1e-5)
        assert error.value.field == "target"

    def test_a_model_with_two_outputs_is_refused(self):
        """One patient, one logit."""
        with pytest.raises(ProgramError):
            evaluate.plan(ask(inputs={"x": ["age", "crp"]}), TENSORS, ward(), 1e-5)

    def test_an_unknown_column_is_named(self):
        """Before any record is touched."""
        with pytest.raises(RequestError, match="Did you mean died"):
            evaluate.plan(ask(target="die"), TENSORS, ward(), 1e-5)
