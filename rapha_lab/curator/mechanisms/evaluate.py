"""Judging a model on held-out patients: every metric from one noisy histogram of scores per class.

1. Two quantiles of the scores, by noisy maximum over public candidates (McSherry and Talwar 2007; OpenDP's
   noisy max), place the bins: a histogram on fixed bins would miss a model with narrow scores.
2. One histogram of scores per class with discrete Laplace noise; a patient is in one cell of it.
3. All metrics, curves and intervals are computed from that histogram (after Boyd, Lantz and Page 2015).

The three answers together are (ε, 0)-private. For one patient in one cell Laplace noise is smaller than
Gaussian noise of the same stand-alone (ε, δ).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import opendp.prelude as dp
import torch
from torch import Tensor

from rapha_lab.curator.accounting import Pure
from rapha_lab.curator.cohort import View
from rapha_lab.curator.lift import Lifted, lift
from rapha_lab.curator.mapped import taken
from rapha_lab.curator.mechanisms import Answer, Plan, Progress, metrics
from rapha_lab.curator.mechanisms.question import Keys, laplace, touched
from rapha_lab.curator.mechanisms.train import fits
from rapha_lab.protocol.errors import ProgramError, RequestError
from rapha_lab.protocol.messages import Columns, Evaluate
from rapha_lab.protocol.schema import Schema

__all__ = [
    "bounded",
    "cells",
    "edges_between",
    "finder",
    "logits",
    "outputs",
    "plan",
    "price",
    "share_for_placing",
    "utilities",
]

LARGEST = 8.0
"""Scores are clamped to this many logits; beyond, a probability is within 0.0004 of 0 or 1."""

CANDIDATES = np.linspace(-6.0, 6.0, 241)
TENTHS = 3
"""Bins are placed by the quantiles at this many tenths from either end."""

REACH = 10 - TENTHS
"""By how much one patient moves a candidate's utility."""

PLACING = 0.15
"""Largest share of ε for each of the two quantiles; less where patients are many."""

UP = 1 + 1e-9
"""More than the rounding of the three parts of ε together."""

BINS = 13
"""Bins of a class: ten equal ones, two tails, and one more where the cut divides one."""

GROUPS = 20
"""Groups at most, since each adds noise of its own to its metrics."""


def plan(ask: Evaluate, tensors: bytes, schema: Schema, delta: float) -> Plan:
    """How a model will be judged at the asked epsilon.

    Args:
        ask: its `program` gives one patient's logit.
        tensors: the program's parameters and constants, as safetensors.
        schema: what is public about the dataset.
        delta: not used: the answer is (epsilon, 0)-private.

    Raises:
        RequestError: for a target that is not boolean, or an unknown column.
        ProgramError: if the program is not one patient's logit in allowed operations.
    """
    target = schema.column(ask.target)
    keys = Keys([schema.column(name) for name in ask.by])
    if keys.size > GROUPS:
        raise RequestError(f"There are {keys.size} groups.", f"{GROUPS} are the most.", field="by")
    if target.type != "boolean":
        raise RequestError(
            f"The target {target.name} is no boolean column.",
            f"It is a {target.type}; these metrics are about a yes or no.",
            "Name a boolean column as target.",
            field="target",
        )
    score = logits(ask, tensors, schema)
    loss, placing, scale = price(ask.epsilon, schema.expected(ask.split))
    cut = math.log(ask.threshold / (1 - ask.threshold))
    find = finder(placing)
    add_noise = laplace(scale)

    def run(view: View, progress: Progress) -> Answer:
        progress(1)
        known = view.known(target.name)
        labels, scores = view.codes(target.name)[known].numpy(), bounded(score(view)[known])
        low, high = (float(CANDIDATES[find(part)]) for part in utilities(scores))
        edges = edges_between(low, high, cut)
        groups = keys.cells(view)[known.numpy()]
        exact = cells(scores, groups * 2 + labels, edges, 2 * keys.size)
        noisy = np.array(add_noise(exact.ravel())).reshape(keys.size, 2, -1)
        told = {"kind": "evaluation", "target": target.name, "threshold": ask.threshold, **keys.told()}
        judged = _judged(noisy, edges, scale, ask.metrics, cut, keys)
        patients = _totals(noisy.sum(0), metrics.spread(scale) * math.sqrt(keys.size))
        return Answer({**told, "patients": patients, **judged})

    return Plan(loss, 1, touched(ask.split), run)


def _judged(
    noisy: np.ndarray, edges: np.ndarray, scale: float, names: list[Any], cut: float, keys: Keys
) -> dict[str, Any]:
    """All metrics; by group, if there are groups, with each one's gap to the first."""
    parts = [metrics.judge(counts, edges, scale, names, cut) for counts in noisy]
    if not keys.columns:
        return parts[0]
    found: dict[str, Any] = {"metrics": {}, "groups": {}}
    for cell, part in enumerate(parts):
        label = keys.label(cell)
        found["groups"][label] = {name: value for name, value in part.items() if name != "metrics"}
        for name, told in part["metrics"].items():
            found["metrics"][f"{name}, {label}"] = told
    for cell, part in enumerate(parts[1:], 1):
        for name in sorted({*part["metrics"]} & {*metrics.METRICS, *metrics.RATES}):
            label = f"{name}, {keys.label(cell)} minus {keys.label(0)}"
            found["metrics"][label] = metrics.gap(part["metrics"][name], parts[0]["metrics"][name])
    return found


def price(epsilon: float, expected: float | None) -> tuple[Pure, float, float]:
    """The privacy loss at `epsilon`; the part of it that each of the two quantiles takes; the histogram's noise scale."""
    placing = share_for_placing(expected, epsilon)
    return Pure(epsilon), placing * epsilon, UP / ((1 - 2 * placing) * epsilon)


def share_for_placing(expected: float | None, epsilon: float) -> float:
    """What a quantile takes of ε: 100 / patients places it well enough, by simulation."""
    return PLACING if expected is None else min(PLACING, max(0.02, 100 / max(expected * epsilon, 1)))


def bounded(scores: Tensor) -> np.ndarray:
    """Scores as logits within public limits; one that is no number counts as undecided, 0."""
    return scores.double().nan_to_num(0.0, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST).numpy()


def utilities(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How well each candidate fits as the lower and as the upper quantile; one patient moves each by REACH.

    For the quantile a/10: -|(10 - a) * patients below - a * patients above|.
    """
    ordered = np.sort(scores)
    below = np.searchsorted(ordered, CANDIDATES, side="left")
    above = len(scores) - np.searchsorted(ordered, CANDIDATES, side="right")
    low = -np.abs((10 - TENTHS) * below - TENTHS * above)
    high = -np.abs(TENTHS * below - (10 - TENTHS) * above)
    return low.astype(np.int64), high.astype(np.int64)


def edges_between(low: float, high: float, cut: float = 0.0) -> np.ndarray:
    """The inner edges of the bins: an equally spaced grid about two quantiles, and the cut."""
    low, high = min(low, high), max(low, high)
    width = max(high - low, 0.05)
    edges = np.linspace(low - 2 * width, high + 2 * width, BINS - 2)
    return np.sort(np.append(edges, cut))


def cells(scores: np.ndarray, labels: np.ndarray, edges: np.ndarray, classes: int = 2) -> np.ndarray:
    """Patients by class and bin, (classes, len(edges) + 1); each is in one, or in none if of no such class."""
    size = len(edges) + 1
    where = labels * size + np.searchsorted(edges, scores, side="right")
    return np.bincount(where[labels < classes], minlength=classes * size).reshape(classes, size)


def finder(epsilon: float) -> Callable[[np.ndarray], int]:
    """The index of about the largest utility, (epsilon, 0)-private."""
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.linf_distance(T="i64")
    noisy_max = dp.m.make_noisy_max(*space, dp.max_divergence(), scale=UP * 2 * REACH / epsilon)
    return lambda utility: noisy_max(utility.tolist())


def _totals(noisy: np.ndarray, sd: float) -> dict[str, Any]:
    error = sd * math.sqrt(noisy.shape[1])
    names = ("negative", "positive")
    return {
        name: {"value": max(0, int(row.sum())), "error": error}
        for name, row in zip(names, noisy, strict=True)
    }


def logits(ask: Evaluate, tensors: bytes, schema: Schema) -> Callable[[View], Tensor]:
    """The program as a function from a view to its patients' scores, (n,).

    A kernel may round a row by its slot in a microbatch, and a program can make any score of a last digit. So a
    patient has one slot by keyed hash, whoever else is there: in a slot given by order, one patient more moved all
    the later scores.

    The function raises RefusedError if this machine's arithmetic moves a made-up patient's score with the others'.

    Raises:
        ProgramError: if it is not one patient's logit in allowed operations.
    """
    lifted = lift(ask.program, loss=False)
    if math.prod(lifted.output) != 1:
        why = f"For one patient its output has the shape {list(lifted.output)}."
        raise ProgramError(
            "The model gives no single score.", why, "Let it end in one logit.", field="program"
        )
    parameters, constants = lifted.tensors(tensors)
    fits(ask.program, ask.inputs, schema)
    expected = schema.expected(ask.split) or 0.0
    if expected:
        lifted.for_batches_of(math.ceil(expected))

    def score(view: View) -> Tensor:
        lifted.selftest_scores(parameters, constants)
        return outputs(lifted, parameters, constants, view, ask.inputs, expected)

    return score


def outputs(
    lifted: Lifted,
    parameters: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    view: View,
    columns: dict[str, Columns],
    expected: float,
) -> Tensor:
    """The program's one number for each patient of the view, (n,), each in a slot of their own."""
    width = lifted.microbatch
    inputs = view.rows(columns)
    places = view.slots(width)
    slots, turns = torch.tensor(places), torch.tensor(turns_of(places))
    most = max(_public_turns(expected, width), int(np.bincount(places, minlength=1).max()))
    held = torch.full((most, width), len(view))
    held[turns, slots] = torch.arange(len(view))
    rows = (taken(inputs, row, len(view)) for row in held)
    parts = [lifted.scores(parameters, constants, each).reshape(-1) for each in rows]
    return torch.stack(parts)[turns, slots] if parts else torch.zeros(0)


def turns_of(slots: np.ndarray) -> np.ndarray:
    """How many patients before each one have the same slot."""
    # sixteen bits, all that a microbatch needs, are sorted several times faster
    order, counts = slots.astype(np.uint16).argsort(kind="stable"), np.bincount(slots)
    turns = np.empty_like(slots)
    turns[order] = np.arange(len(slots)) - (counts.cumsum() - counts)[slots[order]]
    return turns


def _public_turns(expected: float, width: int) -> int:
    """Microbatches in which the declared number of patients is hardly ever too many for a slot."""
    each = (expected + 6 * math.sqrt(expected)) / width
    return math.ceil(each + 4 * math.sqrt(each) + 4) if expected else 0
