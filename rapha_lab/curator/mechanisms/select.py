"""Of several settings the best: private selection (Papernot and Steinke 2022, section 3, with a Poisson number of runs).

1. Draw K from the Poisson distribution of mean μ, given that it is at most m.
2. m times: draw a candidate at random, train with it on the train split, and score it on the validation patients:
   their mean loss, each one's cut to [0, bound], or Brier score, with Gaussian noise.
3. Release the best of the first K, and its score; the starting weights if none counts.

The price holds only while K stays hidden. So all m runs are computed and announced alike, whichever count, and
candidates differ in numbers that move no run's work. A run that diverges has the worst score; it ends nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors.torch import save
from torch import Tensor

from rapha_lab.curator.accounting import Selected, noise_for, runs_for
from rapha_lab.curator.cohort import View
from rapha_lab.curator.lift import Lifted
from rapha_lab.curator.mechanisms import Answer, Plan, Progress
from rapha_lab.curator.mechanisms.adaptive import Clip
from rapha_lab.curator.mechanisms.evaluate import outputs
from rapha_lab.curator.mechanisms.train import (
    Weights,
    checked,
    microbatches,
    prepare,
    price,
    recipe,
    train,
    unpriced,
    updates,
    with_target,
)
from rapha_lab.curator.noise import Noise, noisy
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import JUDGES, Candidate, Fit, Open, Optimizer, Selection
from rapha_lab.protocol.schema import Schema

__all__ = ["judged_by", "loss_of", "plan"]

GRID = 1 << 20
"""Parts of half the bound in which losses are counted."""

LONGEST = 1_000_000
"""Steps of all runs together."""


class _Best(NamedTuple):
    """The best run that counts so far, or none: its score, which candidate's, trained how and with which clip."""

    score: float
    chosen: int | None
    ask: Fit
    clip: Clip


def plan(ask: Fit, tensors: bytes, schema: Schema, delta: float, noise: Noise) -> Plan:
    """How the best of several trainings will be found at the asked epsilon; checks everything, touches no record.

    Raises:
        ProgramError: if the loss cannot be computed patient by patient, or is too large.
        RequestError: naming the field that is out of range.
    """
    selection = ask.selection
    assert selection is not None
    asks = [tried(ask, candidate) for candidate in selection.candidates]
    _alike(asks)
    # bands want the momentum of each to be checked; nothing else of them differs
    for each in asks if ask.bands > 1 else asks[:1]:
        lifted, parameters, constants = checked(each, tensors, schema)
    loss = loss_of(ask, selection.runs, schema, delta)
    for number, each in enumerate(asks):
        try:
            updates(each, [t.clone() for t in parameters.values()], loss.noise)
            Clip(each, loss.noise)
        except RequestError as error:
            error.field = f"candidates[{number}]"
            raise
    expected = schema.expected(JUDGES)
    if not expected:
        why = "Candidates are scored on the validation patients, and the schema's splits give them no share."
        raise RequestError("Nobody can choose between candidates here.", why, field="candidates")
    alone, rate, sigma = price(ask, schema, delta).noise, loss.train.rate, loss.noise
    half = (selection.bound or 1.0) / 2

    def run(view: View, progress: Progress) -> Answer:
        counts = counted(loss, noise)
        drawn = noise.uniform(loss.runs).mul_(len(asks)).long().tolist()
        those, judges = (each.of(with_target(each, ask.inputs)) for each in (view, view.other(JUDGES)))
        rows = those.rows(ask.inputs)
        weights, best = parameters, _Best(math.inf, None, ask, Clip(ask, sigma))
        parts = microbatches(lifted, ask, rate)
        # of no run: those that follow must refuse nothing
        prepare(lifted, Weights(parameters), constants, loss.steps * parts, progress)
        lifted.selftest_scores(parameters, constants)
        for number, which in enumerate(drawn):
            clip = Clip(asks[which], sigma)
            data = rows, asks[which], rate, clip, noise, progress, those.present
            found = train(lifted, parameters, constants, *data, finite=lambda *_: None, prepared=True)
            progress(1)
            score = scored(lifted, found, constants, judges, ask, expected, loss.score.noise, noise)
            # all of them are looked at, wherever the first is that is no number: the time is seen
            finite = [bool(t.isfinite().all()) for t in found.values()]
            better = all(finite) and number < counts and score < best.score
            best = _Best(score, which, asks[which], clip) if better else best
            # copied whether or not they are better
            weights = {n: torch.where(torch.tensor(better), found[n], t) for n, t in weights.items()}
        told = _told(loss, selection, alone, best, half * loss.score.noise / expected)
        trained = recipe(best.ask, rate, sigma, best.clip)
        return Answer({"kind": "fit", **trained, **told, "engine": lifted.note}, save(weights))

    return Plan(loss, loss.steps, (ask.split, JUDGES), run)


def loss_of(ask: Fit | Open, mean: float, schema: Schema, delta: float) -> Selected:
    """The privacy loss of selecting from `mean` trainings on average, their noise solved from the asked (epsilon, delta).

    Raises:
        RequestError: naming the field that is out of range.
    """
    if ask.split != "train":
        raise RequestError(
            f"The split is {ask.split}.",
            "Candidates are trained on the train split and scored on the validation patients, who must be others.",
            "Say patients.train.fit(...).",
            field="split",
        )
    one = Selected(unpriced(ask, schema), mean, runs_for(mean))
    if one.steps > LONGEST:
        raise RequestError(
            f"The selection takes {one.runs} runs of {ask.steps:,} steps.",
            f"All together may take {LONGEST:,}; all are computed, since nobody may see how many count.",
            "Take fewer runs or epochs.",
            field="runs",
        )
    return one.with_noise(noise_for(one.with_noise, ask.epsilon, delta))


def judged_by(selection: Selection) -> str:
    """The metric, by its name in a policy, that a selection's score is an answer of."""
    return "brier" if selection.bound is None else "logloss"


def tried(ask: Fit, candidate: Candidate) -> Fit:
    """The fit with a candidate's numbers in place of its own."""
    given = msgspec.to_builtins(candidate)
    own = {name: given.pop(name) for name in ("clip", "average") if name in given}
    rule = Optimizer(name=ask.optimizer.name, settings=ask.optimizer.settings | given)
    return msgspec.structs.replace(ask, optimizer=rule, **own)


def _alike(asks: list[Fit]) -> None:
    """Refuse candidates whose runs would differ in work, which is seen: those of which one lacks what others have."""
    for number, each in enumerate(asks[1:], 1):
        one, other = (fit.optimizer.settings | {"average": fit.average} for fit in (asks[0], each))
        for name in sorted({*one} | {*other}):
            if bool(one.get(name)) != bool(other.get(name)):
                raise RequestError(
                    f"{name} is 0 in some candidates and not in others.",
                    "Their runs would take different times, by which it would be seen which are computed.",
                    f"Give each candidate {name} above 0, however small, or none.",
                    field=f"candidates[{number}].{name}",
                )


def counted(loss: Selected, noise: Noise) -> int:
    """How many runs count: a Poisson number of that mean, given that it is at most the number of runs."""
    chances = torch.distributions.Poisson(torch.tensor(loss.mean, dtype=torch.float64))
    below = chances.log_prob(torch.arange(loss.runs + 1, dtype=torch.float64)).exp().cumsum(0)
    return int((below[:-1] <= noise.uniform(1) * below[-1]).sum())


def scored(
    lifted: Lifted, weights: dict[str, Tensor], constants: dict[str, Tensor], judges: View, ask: Fit,
    expected: float, deviation: float, noise: Noise,
) -> float:  # fmt: skip
    """The mean loss of the judges, each one's cut to [0, bound], or their Brier score, with noise; the less, the better.

    Losses are counted from the middle, from which a patient is at most bound/2 away, and added as whole numbers: no
    rounding of a sum knows who is there. One that is no number is `bound`.
    """
    assert ask.selection is not None
    half = (ask.selection.bound or 1.0) / 2
    losses = outputs(lifted, weights, constants, judges, ask.inputs, expected).double()
    if ask.selection.bound is None:
        losses = losses.neg().exp().clamp(max=1).sub(1).square()  # (1 - p)² of -log p
    parts = losses.nan_to_num(2 * half, 2 * half, 0.0).div(half).sub(1).clamp(-1, 1).mul(GRID).round()
    total = (parts.long() * judges.present(torch.arange(len(parts)))).sum().double().div(GRID).reshape(1)
    return half + half * float(noisy(total, deviation, noise)) / expected


def _told(loss: Selected, selection: Selection, alone: float, best: _Best, error: float) -> dict[str, Any]:
    """What a release says of the selection: nothing of the runs but the best."""
    settings, score = {}, None
    if best.chosen is not None:
        settings = msgspec.to_builtins(selection.candidates[best.chosen])
        score = {"value": best.score, "error": error}
    about: dict[str, Any] = {"candidates": len(selection.candidates), "mean": loss.mean, "runs": loss.runs}
    about |= {"bound": selection.bound, "noise_alone": alone}
    return {"selection": about | {"chosen": best.chosen, "settings": settings, "score": score}}
