"""Private selection: the best of a hidden number of runs leaves, and nothing tells how many that was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars
import pytest
import torch
from house import House, numbers
from scipy.stats import chisquare, poisson
from torch import Tensor, nn

from rapha_lab.curator.accounting import Selected, epsilon_of, runs_for
from rapha_lab.curator.desk import Caller, Cancelled
from rapha_lab.curator.funds import fund
from rapha_lab.curator.lift import Lifted
from rapha_lab.curator.mechanisms import select, train
from rapha_lab.curator.noise import SeededNoise
from rapha_lab.curator.quotes import quotes
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import PolicyError, RaphaError, RefusedError, RequestError, WaitingError
from rapha_lab.protocol.messages import Candidate, Selection
from rapha_lab.protocol.policy import Lane
from rapha_lab.protocol.quote import Inquiries, Inquiry

N, DELTA = 1200, 1e-5
MEAN, RUNS, STEPS = 2.0, 9, 9
CANDIDATES = [{"lr": 0.1}, {"lr": 1.0}, {"lr": 2.0, "clip": 0.5}]
CELL: dict[str, Any] = {
    "inputs": ["x0"],
    "target": "y",
    "epsilon": 1.0,
    "batch": 100,
    "epochs": 1,
    "runs": MEAN,
}
ALONE = {name: value for name, value in CELL.items() if name != "runs"}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Patients with one input, which is what decides."""
    x = np.random.default_rng(0).uniform(-1, 1, N)
    frame = polars.DataFrame({"pid": [f"p{n}" for n in range(N)], "x0": x, "y": x > 0})
    metrics = ["auroc", "brier", "logloss"]
    found = House(tmp_path, numbers("choice", 1, N), frame, noise=SeededNoise(1), metrics=metrics)
    yield found
    found.ledger.close()


def fit(house: House, **changes: Any) -> tuple[dict[str, Any], nn.Module]:
    """What a release says of its selection, and the model."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    house.patients.train.fit(model, **(CELL | {"candidates": CANDIDATES} | changes))
    return house.releases[-1].values["selection"], model


def scoring(patch: pytest.MonkeyPatch, scores: list[float]) -> list[dict[str, Tensor]]:
    """Let runs have these scores, one after another; gives the weights that were scored."""
    seen: list[dict[str, Tensor]] = []

    def scored(lifted: Any, weights: dict[str, Tensor], *more: Any) -> float:
        seen.append({name: t.clone() for name, t in weights.items()})
        return scores[len(seen) - 1]

    patch.setattr(select, "scored", scored)
    return seen


def test_the_best_that_counts_leaves(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own weights, settings and score; a better one among the others stays."""
    scores = [0.9, 0.5, 0.3, 0.7, *[0.0] * 5]
    seen = scoring(monkeypatch, scores)
    monkeypatch.setattr(select, "counted", lambda loss, noise: 4)
    told, model = fit(house)
    assert told["score"]["value"] == 0.3
    assert told["settings"] == CANDIDATES[told["chosen"]]
    for name, t in model.named_parameters():
        assert torch.equal(t, seen[2][name])
    assert house.releases[-1].values["clip"] == told["settings"].get("clip", 2.0)


def test_each_run_is_clipped_as_its_candidate_says(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """To its own clip in every step, which the release of the best one states; the program is lifted once for all."""
    candidates, clips, lifted = [{"clip": 0.25}, {"clip": 0.5}, {"clip": 1.0}], [], []
    original, lift = train.clipped_sum, train.lift
    monkeypatch.setattr(train, "clipped_sum", lambda *args: (clips.append(args[5]), original(*args))[1])
    monkeypatch.setattr(train, "lift", lambda *args: (lifted.append(args), lift(*args))[1])
    monkeypatch.setattr(select, "counted", lambda loss, noise: loss.runs)
    scoring(monkeypatch, [*[0.9] * (RUNS - 1), 0.1])
    told, _ = fit(house, candidates=candidates)
    runs = [clips[start : start + STEPS] for start in range(0, len(clips), STEPS)]
    assert len(runs) == RUNS
    assert all(len({*run}) == 1 for run in runs)
    assert {run[0] for run in runs} == {each["clip"] for each in candidates}
    assert house.releases[-1].values["clip"] == told["settings"]["clip"] == runs[-1][0]
    assert len(lifted) == 1


def test_a_run_that_does_not_count_would_be_seen_to_win(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teeth: if all counted, the check above fails."""
    original = pytest.MonkeyPatch.setattr

    def all_count(patch: Any, target: Any, name: str, value: Any) -> None:
        original(patch, target, name, (lambda loss, noise: loss.runs) if name == "counted" else value)

    monkeypatch.setattr(pytest.MonkeyPatch, "setattr", all_count)
    with pytest.raises(AssertionError):
        test_the_best_that_counts_leaves(house, monkeypatch)


@pytest.mark.parametrize("scores", [None, [math.nan] * RUNS])
def test_if_none_counts_the_starting_weights_leave(
    house: House, monkeypatch: pytest.MonkeyPatch, scores: list[float] | None
) -> None:
    """And the release says so; it is charged like any."""
    if scores:
        scoring(monkeypatch, scores)
    monkeypatch.setattr(select, "counted", lambda loss, noise: 0 if scores is None else RUNS)
    told, model = fit(house)
    torch.manual_seed(0)
    start = nn.Linear(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    assert (told["chosen"], told["score"], told["settings"]) == (None, None, {})
    assert "none of which counted" in house.releases[-1].title
    assert "runs that count, on average" in repr(house.releases[-1])
    assert house.spent() == pytest.approx(1.0, abs=1e-3)


def test_nothing_tells_how_many_counted(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Announcements, draws of noise, steps of training and scores are the same, whether none counts or all do."""
    shapes = []
    for counts in (0, 1, RUNS):
        calls: list[str] = []
        noise = SeededNoise(2)
        words = noise._words
        monkeypatch.setattr(
            noise, "_words", lambda n, words=words, calls=calls: (calls.append(f"noise {n}"), words(n))[1]
        )
        house.desk._noise = noise
        for module, name in ((select, "scored"), (train, "clipped_sum"), (torch, "where")):
            original: Callable[..., Any] = getattr(module, name)

            def noted(
                *args: Any, original: Any = original, name: str = name, calls: list[str] = calls
            ) -> Any:
                calls.append(name)
                return original(*args)

            monkeypatch.setattr(module, name, noted)
        monkeypatch.setattr(select, "counted", lambda loss, noise, counts=counts: counts)
        house.steps.clear()
        told, _ = fit(house, epsilon=1.0 + counts / 1000)  # else it was asked before
        monkeypatch.undo()
        shapes.append((calls, list(house.steps), set(told)))
    assert shapes[0] == shapes[1] == shapes[2]
    assert sum(shapes[0][1]) == RUNS * (STEPS + 1)
    assert shapes[0][0].count("scored") == RUNS


def test_a_run_that_diverges_ends_nothing_and_never_wins(house: House) -> None:
    """Its weights are no numbers, its score is the worst, and the others go on."""
    told, model = fit(
        house, candidates=[{"lr": 1e6, "weight_decay": 1e6}, {"lr": 0.5, "weight_decay": 1e-6}], runs=8
    )
    assert told["chosen"] == 1
    assert all(bool(t.isfinite().all()) for t in model.parameters())
    both = [{"lr": lr, "weight_decay": 1e6} for lr in (1e5, 1e6)]
    assert fit(house, candidates=both)[0]["chosen"] is None


def test_as_much_is_looked_at_of_a_run_that_diverges(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the time between a run's score and the next run's first step would tell of runs that don't count."""
    looks: list[int] = []
    for lr in (1e6, 0.5):
        looks.append(0)
        original = Tensor.isfinite

        def noted(t: Tensor, original: Any = original) -> Tensor:
            looks[-1] += 1
            return original(t)

        monkeypatch.setattr(Tensor, "isfinite", noted)
        fit(house, candidates=[{"lr": lr, "weight_decay": lr}, {"lr": lr / 2, "weight_decay": lr}])
        monkeypatch.undo()
    assert looks[0] == looks[1] > RUNS


def test_a_machine_that_mixes_patients_in_scores_chooses_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients may be computed each alone and losses not: a patient would move a score by more than is paid for."""
    original = Lifted.scores

    def mixed(self: Lifted, parameters: Any, constants: Any, inputs: dict[str, Tensor]) -> Tensor:
        return original(self, parameters, constants, inputs) + inputs["x"].sum() * 1e-6

    monkeypatch.setattr(Lifted, "scores", mixed)
    with pytest.raises(RefusedError, match="reproducibly"):
        fit(house)
    assert not house.steps


def test_a_machine_that_mixes_patients_in_gradients_chooses_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found out before any step, as for a single fit."""
    original = Lifted.clipped_sum

    def mixed(self: Lifted, parameters: Any, constants: Any, inputs: dict[str, Tensor], *more: Any) -> Any:
        totals = original(self, parameters, constants, inputs, *more)
        totals.flat.add_(inputs["x"].sum() * 1e-6)
        return totals

    monkeypatch.setattr(Lifted, "clipped_sum", mixed)
    with pytest.raises(RefusedError, match="reproducibly"):
        fit(house)
    assert not house.steps


def test_the_machine_is_tested_once_for_all_runs(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs begin at the same weights and have the same shapes, so that each would try the very same."""
    tests, original = [], Lifted._reproducible

    def noted(self: Lifted, compute: Any) -> float:
        tests.append(list(house.steps))
        return original(self, compute)

    monkeypatch.setattr(Lifted, "_reproducible", noted)
    fit(house)
    assert tests == [[], []]  # gradients and scores, before the first step
    assert sum(house.steps) == RUNS * (STEPS + 1)


def test_the_number_that_counts_is_poisson_cut_at_the_runs() -> None:
    """Five thousand draws by chi-square, at the published mean."""
    loss = Selected(train.SampledGaussian(0.2, 10.0, 10), 3.0, runs_for(3.0))
    noise = SeededNoise(0)
    seen = np.bincount([select.counted(loss, noise) for _ in range(5000)], minlength=loss.runs + 1)
    chances = poisson.pmf(np.arange(loss.runs + 1), 3.0)
    expected = 5000 * chances / chances.sum()
    together = expected < 5
    observed = np.append(seen[~together], seen[together].sum())
    assert chisquare(observed, np.append(expected[~together], expected[together].sum())).pvalue > 0.001


def judged(house: House, bound: float | None) -> Callable[..., tuple[float, float]]:
    """What gives a linear model's score on the validation patients, and the noise's deviation in it."""
    captured: list[Any] = []
    original = select.scored

    def noted(*args: Any) -> float:
        captured.append(args)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "scored", noted)
        loss = None if bound is None else nn.functional.binary_cross_entropy_with_logits
        fit(house, loss=loss, bound=bound, runs=1)
    lifted, weights, constants, judges, ask, expected, deviation, _ = captured[0]

    def score(noise: SeededNoise, weight: float = 3.0) -> tuple[float, float]:
        model = {name: torch.full_like(t, weight if "weight" in name else 0.0) for name, t in weights.items()}
        found = original(lifted, model, constants, judges, ask, expected, deviation, noise)
        return found, deviation * (bound or 1.0) / 2 / expected

    return score


class Silent(SeededNoise):
    """No noise."""

    def gaussian(self, n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.float64)


@pytest.mark.parametrize("weight", [3.0, -30.0])
@pytest.mark.parametrize("bound", [None, 0.7])
def test_a_score_is_the_mean_of_the_validation_patients(
    house: House, bound: float | None, weight: float
) -> None:
    """Their Brier score, or their loss cut at the bound, over the declared number of them; of a bad model too."""
    found, _ = judged(house, bound)(Silent(0), weight)
    view = house.cohort.view("validation")
    p = (weight * view.tensor(["x0"])[:, 0].double()).sigmoid()
    right = torch.where(view.numbers("y") > 0, p, 1 - p)
    each = (1 - right) ** 2 if bound is None else (-right.log()).clamp(max=bound)
    half = (bound or 1.0) / 2
    expected = house.schema.expected("validation")
    assert expected is not None
    assert found == pytest.approx(half + float((each - half).sum()) / expected, abs=1e-5)


@pytest.mark.parametrize("bound", [None, 0.7])
def test_a_patient_moves_a_score_by_half_the_bound_at_most(house: House, bound: float | None) -> None:
    """Whatever the weights: all validation patients together are at most that far from the middle, each."""
    score, half = judged(house, bound), (bound or 1.0) / 2
    most = half * len(house.cohort.view("validation")) / (house.schema.expected("validation") or 0.0)
    for weight in (1e30, math.nan, -1e30):
        assert abs(score(Silent(0), weight)[0] - half) <= most + 1e-9
    assert score(Silent(0), math.nan)[0] == pytest.approx(half + most)


def test_a_score_has_the_noise_that_is_charged(house: House) -> None:
    """Its standard deviation over many draws is what the ledger's loss says of one patient's half bound."""
    captured: list[Any] = []
    original = select.noisy

    def noted(values: Tensor, deviation: float, noise: Any) -> Tensor:
        captured.append((values.clone(), deviation))
        return original(values, deviation, noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "noisy", noted)
        fit(house)
    job = house.ledger._db.execute("SELECT loss FROM job").fetchone()[0]
    charged = msgspec.json.decode(job, type=Selected).score.noise
    assert len(captured) == RUNS
    assert {deviation for _, deviation in captured} == {charged}
    released = house.releases[-1].values["selection"]["score"]
    if released is not None:
        expected = house.schema.expected("validation") or 0.0
        assert released["error"] == pytest.approx(charged / 2 / expected)


def test_scores_without_noise_would_be_seen(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teeth: two scores of the same weights differ by their noise, about as much as is stated; without it they don't."""

    score = judged(house, None)

    def spread() -> float:
        return float(np.std([score(SeededNoise(seed))[0] for seed in range(60)]))

    stated = score(SeededNoise(0))[1]
    assert 0.7 * stated < spread() < 1.3 * stated
    monkeypatch.setattr(select, "noisy", lambda values, deviation, noise: values)
    assert spread() < 1e-12


def test_the_whole_selection_is_charged_at_the_asked_epsilon(house: House) -> None:
    """To train and validation patients alike, and to nobody else; a score's loss is no more than a training's."""
    fit(house)
    loss = msgspec.json.decode(house.ledger._db.execute("SELECT loss FROM job").fetchone()[0], type=Selected)
    assert (loss.mean, loss.runs) == (MEAN, RUNS)
    assert 0.999 < epsilon_of(loss, DELTA) <= 1.0
    assert house.spent("train") == house.spent("validation") == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(PolicyError):
        house.spent("test")
    told = house.releases[-1].values
    assert told["noise"] == loss.noise > told["selection"]["noise_alone"]


def test_nothing_comes_back_of_what_is_cancelled(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """How far it was is no function of how many counted, but the proof is of the best of all of them."""
    answer = house.desk.answer

    def cancelled(caller: Caller, request: bytes, tensors: bytes, on_step: Any, idle: Any) -> Any:
        def told(done: int, planned: int, epsilon: float, doing: str = "") -> None:
            assert planned == RUNS * (STEPS + 1)
            if done >= 30:
                raise Cancelled("cancelled")

        return answer(caller, request, tensors, told, idle)

    monkeypatch.setattr(house.desk, "answer", cancelled)
    with pytest.raises(Cancelled):
        fit(house)
    assert house.spent("train") == house.spent("validation") == pytest.approx(1.0, abs=1e-3)


def test_who_opts_out_meanwhile_is_in_no_later_score(house: House) -> None:
    """A validation patient who left adds nothing, wherever that patient's loss is."""
    score, view = judged(house, None), house.cohort.view("validation")
    everybody, _ = score(Silent(0))
    house.cohort.present = house.cohort.present.index_fill(0, view._rows, value=False)
    assert score(Silent(0))[0] == 0.5 != everybody


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"candidates": [{"lr": 1.0}]}, "candidates"),
        ({"candidates": [0.1, 1.0]}, "candidates"),
        ({"candidates": "lr"}, "candidates"),
        ({"candidates": 5}, "candidates"),
        ({"candidates": {"lr": [0.1, 1.0]}}, "candidates"),
        ({"candidates": []}, "runs"),
        ({"candidates": [], "runs": None, "bound": 2.0}, "bound"),
        ({"candidates": [{"lr": 1.0}, {"batch": 7}]}, "candidates[1]"),
        ({"candidates": [{"lr": 1.0}, {"lr": -1.0}]}, "candidates[1].lr"),
        ({"candidates": [{"lr": 1.0, "momentum": 0.0}, {"lr": 1.0}]}, "candidates[1].momentum"),
        ({"candidates": [{"weight_decay": 0.1}, {"lr": 1.0}]}, "candidates[1].weight_decay"),
        ({"candidates": [{"lr": 1.0}, {"average": 0.9}]}, "candidates[1].average"),
        ({"runs": 0.5}, "runs"),
        ({"runs": 50}, "runs"),
        ({"epochs": 100_000}, "runs"),
        ({"loss": nn.functional.mse_loss}, "bound"),
        ({"bound": -1.0}, "bound"),
        ({"bands": 20}, "bands"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(house: House, changes: dict[str, Any], field: str) -> None:
    """Naming the candidate and the number, before anything is touched."""
    with pytest.raises(RequestError) as caught:
        fit(house, **changes)
    assert caught.value.field == field
    assert caught.value.instead
    assert "Expected" not in caught.value.what or caught.value.what.startswith(field)
    assert not house.steps


@pytest.mark.parametrize("split", ["all", "validation", "test"])
def test_only_the_train_split_is_trained_on(house: House, split: str) -> None:
    """Who scores must not be who is trained on."""
    part = house.patients if split == "all" else getattr(house.patients, split)
    with pytest.raises(RequestError) as caught:
        part.fit(nn.Linear(1, 1), **CELL, candidates=CANDIDATES)
    assert caught.value.field == "split"
    assert not house.steps


def test_a_forged_selection_is_refused(house: House) -> None:
    """By the wire's own bounds and by the curator, whatever a session left unchecked."""
    with pytest.raises(RaphaError):
        messages.decode(b'{"op": "fit", "selection": {"candidates": [], "runs": 5}}')
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"candidates": [{}, {"steps": 3}]}', type=Selection)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"candidates": [{}, {}], "runs": 1e9}', type=Selection)
    assert msgspec.json.encode(Candidate(lr=0.5)) == b'{"lr":0.5}'


def test_a_validation_split_below_the_smallest_cohort_is_refused(house: House) -> None:
    """It is looked at too, so the policy's word on it holds."""
    (project,) = house.policy.projects
    house.policy = replace(house.policy, projects=(msgspec.structs.replace(project, smallest_cohort=400),))
    house.patients.train.fit(nn.Linear(1, 1), **ALONE)
    with pytest.raises(PolicyError, match="validation"):
        fit(house)


def test_the_policy_s_word_on_evaluations_holds_for_scores(house: House) -> None:
    """A score is a metric of validation patients: it leaves as one would, in a project that may only train not at all."""
    (project,) = house.policy.projects
    lanes = {name: lane for name, lane in project.lanes.items() if name != "evaluate"}
    barred = [
        ({"lanes": lanes}, {}),
        ({"metrics": ["auroc", "logloss"]}, {}),
        ({"metrics": ["auroc", "brier"]}, {"bound": 1.0}),
    ]
    for changes, asked in barred:
        house.policy = replace(house.policy, projects=(msgspec.structs.replace(project, **changes),))
        with pytest.raises(PolicyError, match=r"evaluate|brier|logloss"):
            fit(house, **asked)
    assert not house.steps
    house.policy = replace(house.policy, projects=(msgspec.structs.replace(project, lanes=lanes),))
    for runs in (None, MEAN):
        asked = Inquiry(kind="fit", split="train", epsilon=1.0, steps=STEPS, batch=100, runs=runs)
        about = Inquiries(dataset=house.schema.name, project="p", asks=[asked])
        caller = Caller(house.key, "p", "quote")
        with pytest.raises(PolicyError, match="evaluate") if runs else nullcontext():
            fund(house.ledger, house.policy, "p", house.schema.name, ("train", "validation"))
            quotes(about, house.policy, caller, {house.schema.name: house.schema}, house.ledger)
    looked = lanes | {"evaluate": Lane(release="one custodian")}
    house.policy = replace(house.policy, projects=(msgspec.structs.replace(project, lanes=looked),))
    with pytest.raises(WaitingError):
        fit(house)
    house.patients.train.fit(nn.Linear(1, 1), **ALONE)  # weights alone are of the lane train
    assert "selection" not in house.releases[-1].values


def test_a_dataset_without_validation_patients_has_nobody_to_choose(tmp_path: Path) -> None:
    """Refused before anything is charged."""
    frame = polars.DataFrame({"pid": ["a", "b"] * 50, "x0": [0.0] * 100, "y": [True] * 100}).with_row_index(
        "n"
    )
    frame = frame.with_columns(pid=polars.col("n").cast(polars.String)).drop("n")
    schema = numbers("none", 1, 100) | {"splits": {"train": 0.9, "validation": 0.0, "test": 0.1}}
    alone = House(tmp_path, schema, frame)
    (project,) = alone.policy.projects
    alone.policy = replace(alone.policy, projects=(msgspec.structs.replace(project, smallest_cohort=0),))
    with pytest.raises(RequestError) as caught:
        fit(alone, batch=10)
    assert caught.value.field == "candidates"
    assert not alone.steps
    alone.ledger.close()
