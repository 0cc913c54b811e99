"""Counts, means and histograms: exact integers that one patient moves by so much, plus discrete noise.

Each question is a vector of integers with its L2 sensitivity under adding or removing one patient. OpenDP
adds discrete Gaussian noise (Canonne, Kamath and Steinke 2020) of standard deviation noise * sensitivity;
all that is released is computed from the noisy integers. Values are clamped to public bounds and put on a
fixed-point grid, so that no sum is ever taken in floating point (Mironov 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import opendp.prelude as dp

from rapha_lab.curator.accounting import Gaussian, noise_for
from rapha_lab.curator.cohort import View
from rapha_lab.curator.mechanisms import Answer, Plan, Progress
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Count, Histogram, Mean
from rapha_lab.protocol.schema import SPLITS, Column, Schema

__all__ = [
    "Question",
    "count",
    "errors_of_mean",
    "gaussian",
    "histogram",
    "laplace",
    "mean",
    "plan",
    "price",
    "touched",
]

dp.enable_features("contrib")

GRID = 1 << 20
"""Steps from the middle of a column's bounds to either end."""

Z = 1.959964
"""Standard deviations of a Gaussian from the middle to the ends of its 95 % interval."""

_VECTOR = dp.vector_domain(dp.atom_domain(T="i64"))


@dataclass(frozen=True)
class Question:
    """What is asked of the patients, as integers.

    Attributes:
        exact: the integers of a view, int64 of a fixed public length.
        sensitivity: by how much one patient can move them, in L2.
        read: the released values, from the noisy integers and the noise's standard deviation.
    """

    exact: Callable[[View], np.ndarray]
    sensitivity: float
    read: Callable[[list[int], float], dict[str, Any]]


def plan(ask: Count | Mean | Histogram, schema: Schema, delta: float) -> Plan:
    """How a count, mean or histogram will be answered at the asked (epsilon, delta).

    Raises:
        RequestError: for an unknown column, one that has no mean, or an epsilon out of range.
    """
    question, loss = price(ask, schema, delta)
    sd = loss.noise * question.sensitivity
    add_noise = gaussian(sd)

    def run(view: View, progress: Progress) -> Answer:
        progress(1)
        return Answer(question.read(add_noise(question.exact(view)), sd))

    return Plan(loss, 1, touched(ask.split), run)


def price(ask: Count | Mean | Histogram, schema: Schema, delta: float) -> tuple[Question, Gaussian]:
    """What is asked as integers, and the privacy loss of answering it at the asked (epsilon, delta).

    Raises:
        RequestError: for an unknown column, one that has no mean, or an epsilon out of range.
    """
    if isinstance(ask, Count):
        question = count()
    elif isinstance(ask, Mean):
        question = mean(schema.column(ask.column))
    else:
        question = histogram(schema.column(ask.column), ask.bins)
    return question, Gaussian(noise_for(Gaussian, ask.epsilon, delta))


def touched(split: str) -> tuple[str, ...]:
    """The splits whose patients a question about `split` looks at."""
    return SPLITS if split == "all" else (split,)


def gaussian(sd: float) -> Callable[[np.ndarray], list[int]]:
    """Adds discrete Gaussian noise to integers."""
    return _adding(dp.m.make_gaussian(_VECTOR, dp.l2_distance(T="f64"), scale=sd))


def laplace(scale: float) -> Callable[[np.ndarray], list[int]]:
    """Adds discrete Laplace noise to integers."""
    return _adding(dp.m.make_laplace(_VECTOR, dp.l1_distance(T="i64"), scale=scale))


def _adding(measurement: Callable[[list[int]], list[int]]) -> Callable[[np.ndarray], list[int]]:
    return lambda exact: measurement(exact.tolist())


def count() -> Question:
    """How many patients there are."""
    return Question(
        exact=lambda view: np.array([len(view)]),
        sensitivity=1.0,
        read=lambda noisy, sd: {"kind": "count", "unit": "patients", **_counted(noisy[0], sd)},
    )


def mean(column: Column) -> Question:
    """The mean over the patients in whom a column is known, as a ratio of a noisy sum and a noisy count.

    With y in [-1, 1] the value's distance from the middle of the bounds, one patient adds (a, y) to
    (a * count, sum). The error of the ratio m has variance proportional to (1 + a²)(1 + m²/a²);
    a² = 1/3 is never worse than 4/3 of the best choice, which would need m.
    """
    low, high = column.limits
    middle, half = low / 2 + high / 2, high / 2 - low / 2
    weight = round(GRID / math.sqrt(3))

    def exact(view: View) -> np.ndarray:
        values = view.numbers(column.name)[view.known(column.name)].numpy()
        steps = np.rint((values - middle) / half * GRID).clip(-GRID, GRID).astype(np.int64)
        return np.array([weight * len(steps), steps.sum()], dtype=np.int64)

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        total, sd_total = noisy[1] / GRID, sd / GRID
        number, sd_number = noisy[0] / weight, sd / weight
        ratio = min(max(total / max(number, 1.0), -1.0), 1.0)
        error = min(math.hypot(sd_total, ratio * sd_number) / max(number, 1.0), 1.0)
        interval = [middle + half * end for end in _fieller(total, sd_total, number, sd_number)]
        return {
            "kind": "mean",
            "column": column.name,
            "unit": column.unit,
            "value": middle + half * ratio,
            "error": half * error,
            "interval": interval,
            "patients": _counted(number, sd_number),
        }

    return Question(exact, math.nextafter(math.hypot(weight, GRID), math.inf), read)


def errors_of_mean(column: Column, noise: float, patients: float) -> tuple[float, float]:
    """Standard error of a mean in the middle of its bounds and at one of them, as `mean` will release it.

    Args:
        column: a column with limits.
        noise: the noise multiplier.
        patients: how many are expected to have a value.
    """
    half = (column.limits[1] - column.limits[0]) / 2
    middle = noise * mean(column).sensitivity / GRID / max(patients, 1.0)
    # at a bound the noise of the count, of which the weight is GRID / sqrt(3), counts in full
    return half * min(middle, 1.0), half * min(2 * middle, 1.0)


def _fieller(total: float, sd_total: float, number: float, sd_number: float) -> tuple[float, float]:
    """All m in [-1, 1] for which total - m * number is within its own 95 % interval (Fieller 1954)."""
    a, c = number**2 - (Z * sd_number) ** 2, total**2 - (Z * sd_total) ** 2
    if number <= 0 or a <= 0:
        return -1.0, 1.0
    root = math.sqrt(max((total * number) ** 2 - a * c, 0.0))
    low, high = ((total * number + sign * root) / a for sign in (-1, 1))
    return min(max(low, -1.0), 1.0), min(max(high, -1.0), 1.0)


def histogram(column: Column, bins: int) -> Question:
    """Patients by bin of a column; each is in one bin, or in the one for missing values.

    Bins are equal parts of the public bounds, on a log scale if the column has one; those of an integer
    hold equally many whole numbers. A category or boolean has one bin a value.

    Raises:
        RequestError: for a text or an image.
    """
    if column.type in ("text", "image"):
        what = f"The column {column.name} has no histogram."
        raise RequestError(what, f"It is a {column.type}.", "Train on it, or use shards.", field=column.name)
    names = list(column.categories) or ["no", "yes"]
    edges = _edges(column, bins) if column.numeric else None
    size = len(names) if edges is None else len(edges) - 1

    def exact(view: View) -> np.ndarray:
        known = view.known(column.name)
        if edges is None:
            where = view.codes(column.name).numpy()
        else:
            where = np.searchsorted(edges[1:-1], view.numbers(column.name).numpy(), side="right")
        # unknown where the schema says "never" is counted nowhere
        counts = np.bincount(where[known.numpy()], minlength=size)
        return np.append(counts, int((~known).sum())) if column.missing == "possible" else counts

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        counts = [_counted(value, sd) for value in noisy]
        return {
            "kind": "histogram",
            "column": column.name,
            "unit": column.unit,
            "counts": [entry["value"] for entry in counts[:size]],
            "intervals": [entry["interval"] for entry in counts[:size]],
            "error": sd,
            "missing": counts[size] if len(counts) > size else None,
            **({"categories": names} if edges is None else {"edges": edges.tolist()}),
        }

    return Question(exact, 1.0, read)


def _edges(column: Column, bins: int) -> np.ndarray:
    low, high = column.limits
    if column.type == "integer":
        width = math.ceil((high - low + 1) / bins)
        return low - 0.5 + width * np.arange(math.ceil((high - low + 1) / width) + 1.0)
    return np.geomspace(low, high, bins + 1) if column.scale == "log" else np.linspace(low, high, bins + 1)


def _counted(value: float, sd: float) -> dict[str, Any]:
    """A noisy number of patients with its error; that no number is negative is known without looking."""
    low, high = max(0.0, value - Z * sd), max(0.0, value + Z * sd)
    return {"value": max(0, round(value)), "error": sd, "interval": [low, high]}
