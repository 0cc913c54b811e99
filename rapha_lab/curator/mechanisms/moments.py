"""Sums, means, variances and correlations: whole steps of a public grid, added up exactly.

With y in [-1, 1] a value's distance from the middle of its bounds, a patient adds (a, y, b(2y² - 1), ...) to the
sums. Values are centred, and so are squares, since noise is in proportion to the farthest a patient can reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from rapha_lab.curator.cohort import View
from rapha_lab.curator.mechanisms.counts import NEEDS_NUMBER
from rapha_lab.curator.mechanisms.question import GRID, Keys, Question, Z, counted, figure, fixed, root
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import Column

__all__ = ["WEIGHT", "correlation", "mean", "mean_and_spread", "ratio", "squares", "total", "variance"]

WEIGHT = round(GRID / math.sqrt(3))
"""What a patient adds to the number of patients, in steps.

The error of the ratio m of a sum and a number has variance proportional to (1 + a²)(1 + m²/a²); a² = 1/3 is
never worse than 4/3 of the best choice, which would need m.
"""

DRAWS = 1000


def total(column: Column, by: Keys) -> Question:
    """The sum over the patients in whom a column is known, by cell, on a grid about 0."""
    most = max(abs(end) for end in column.limits)

    def exact(view: View) -> np.ndarray:
        known = view.known(column.name).numpy()
        steps = fixed(view.numbers(column.name).numpy(), -most, most)
        return by.per_cell(view, steps, known)

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        error = most * sd / GRID
        low, high = (-math.inf if column.limits[0] < 0 else 0.0), (math.inf if column.limits[1] > 0 else 0.0)
        sums = [
            figure(_name(by, cell, column), most * n / GRID, error, low, high) for cell, n in enumerate(noisy)
        ]
        return _told("sum", column, by, sums)

    return Question(exact, float(GRID), read, lambda sd, _: {"error": most * sd / GRID, "unit": column.unit})


def mean(column: Column, by: Keys) -> Question:
    """The mean over the patients in whom a column is known, by cell, as ratios of noisy sums and numbers."""
    low, high = column.limits
    middle, half = low / 2 + high / 2, high / 2 - low / 2
    sensitivity = root(float(WEIGHT) ** 2, float(GRID) ** 2)

    def exact(view: View) -> np.ndarray:
        known = view.known(column.name).numpy()
        steps = fixed(view.numbers(column.name).numpy(), low, high)
        return np.concatenate([WEIGHT * by.per_cell(view, of=known), by.per_cell(view, steps, known)])

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        means = []
        for cell, (number, sum_) in enumerate(np.reshape(noisy, (2, by.size)).T.tolist()):
            part = ratio(sum_ / GRID, sd / GRID, number / WEIGHT, sd / WEIGHT)
            ends = [middle + half * end for end in part["interval"]]
            told = {"value": middle + half * part["value"], "error": half * part["error"], "interval": ends}
            patients = counted(number / WEIGHT, sd / WEIGHT)
            means.append({"name": _name(by, cell, column), **told, "patients": patients})
        return _told("mean", column, by, means)

    def expect(sd: float, expected: float | None) -> dict[str, Any]:
        told: dict[str, Any] = {
            "unit": column.unit,
            "notes": ["Noise alone, and if no patient lacks the value."],
        }
        if expected is None:
            return told | {"notes": [NEEDS_NUMBER]}
        if by.size > 1:
            told["notes"] = [*told["notes"], f"If the {by.size} groups are equally large."]
        inner = sd / GRID / max(expected / by.size, 1.0)
        # at a bound the noise of the number, whose weight is 1/√3, counts in full
        ends = half * min(inner, 1.0), half * min(2 * inner, 1.0)
        names = "error if the mean is in the middle of the bounds", "error if it is at a bound"
        return told | {"error": ends[1], "figures": dict(zip(names, ends, strict=True))}

    return Question(exact, sensitivity, read, expect)


def ratio(total: float, sd_total: float, number: float, sd_number: float) -> dict[str, Any]:
    """A mean within [-1, 1] of a noisy sum and a noisy number, with its error and 95 % interval."""
    value = min(max(total / max(number, 1.0), -1.0), 1.0)
    error = min(math.hypot(sd_total, value * sd_number) / max(number, 1.0), 1.0)
    return {"value": value, "error": error, "interval": _fieller(total, sd_total, number, sd_number)}


def _fieller(total: float, sd_total: float, number: float, sd_number: float) -> tuple[float, float]:
    """All m in [-1, 1] for which total - m * number is within its own 95 % interval (Fieller 1954)."""
    a, c = number**2 - (Z * sd_number) ** 2, total**2 - (Z * sd_total) ** 2
    if number <= 0 or a <= 0:
        return -1.0, 1.0
    root = math.sqrt(max((total * number) ** 2 - a * c, 0.0))
    low, high = ((total * number + sign * root) / a for sign in (-1, 1))
    return min(max(low, -1.0), 1.0), min(max(high, -1.0), 1.0)


def squares(steps: np.ndarray) -> np.ndarray:
    """2y² - 1 of steps y on the grid, as whole steps: floor division is exact, so no rounding depends on company."""
    return 2 * (steps * steps) // GRID - GRID


def variance(column: Column, by: Keys) -> Question:
    """Mean, variance and standard deviation over the patients in whom a column is known, by cell."""
    if not column.numeric:
        what = f"The column {column.name} is a {column.type}."
        raise RequestError(
            what, "It has no variance.", f'Ask for patients.mean("{column.name}").', field=column.name
        )
    low, high = column.limits
    sensitivity = root(float(WEIGHT) ** 2, float(GRID) ** 2, float(GRID) ** 2)

    def exact(view: View) -> np.ndarray:
        known = view.known(column.name).numpy()
        steps = fixed(view.numbers(column.name).numpy(), low, high)
        number, sums = by.per_cell(view, of=known), by.per_cell(view, steps, known)
        return np.concatenate([WEIGHT * number, sums, by.per_cell(view, squares(steps), known)])

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        figures = []
        for cell, sums in enumerate(np.reshape(noisy, (3, by.size)).T.tolist()):
            label = f"{by.label(cell)}, " if by.columns else ""
            figures += [
                {**f, "name": f"{label}{f['name']}"} for f in mean_and_spread(sums, sd, sd, low, high)
            ]
        return _told("variance", column, by, figures)

    def expect(sd: float, expected: float | None) -> dict[str, Any]:
        if expected is None:
            return {"unit": column.unit, "notes": [NEEDS_NUMBER]}
        number = max(expected / by.size, 1.0)
        uniform = [WEIGHT * number, 0.0, -number * GRID / 3]
        told = mean_and_spread(uniform, sd, sd, low, high)
        notes = ["Of the standard deviation, for values spread evenly over the bounds."]
        return {"error": told[1]["error"], "unit": column.unit, "notes": notes}

    return Question(exact, sensitivity, read, expect)


def mean_and_spread(
    sums: Sequence[float], sd: float, sd_number: float, low: float, high: float
) -> list[dict[str, Any]]:
    """Mean, standard deviation and variance from (WEIGHT n, Σy, Σ(2y² - 1)) with noise of `sd` on each.

    For n patients with moments m and t, Var = (t + 1)/2 - m²; noise moves it by (δT - t δN)/2n - 2m (δS - m δN)/n.
    """
    middle, half = low / 2 + high / 2, high / 2 - low / 2
    number, noise, noise_n = sums[0] / WEIGHT, sd / GRID, sd_number / WEIGHT
    part = ratio(sums[1] / GRID, noise, number, noise_n)
    m, n = part["value"], max(number, 1.0)
    t = min(max(sums[2] / GRID / n, -1.0), 1.0)
    most = max(1 - m * m, 0.0)
    var = min(max((t + 1) / 2 - m * m, 0.0), most)
    error = math.sqrt((noise / 2) ** 2 + (2 * m * noise) ** 2 + ((2 * m * m - t / 2) * noise_n) ** 2) / n
    far = number < 5 * noise_n  # too few patients to divide by their number
    low_v, high_v = (0.0, 1.0) if far else (max(var - Z * error, 0.0), min(var + Z * error, 1.0))
    spread = {
        "name": "sd",
        "value": half * math.sqrt(var),
        "error": half * min((math.sqrt(high_v) - math.sqrt(low_v)) / (2 * Z), 1.0),
        "interval": [half * math.sqrt(low_v), half * math.sqrt(high_v)],
    }
    ends = [middle + half * end for end in part["interval"]]
    scaled = {"value": half**2 * var, "error": half**2 * min(error, 1.0)}
    return [
        {"name": "mean", "value": middle + half * m, "error": half * part["error"], "interval": ends},
        spread,
        {"name": "variance", **scaled, "interval": [half**2 * low_v, half**2 * high_v]},
    ]


def correlation(columns: Sequence[Column]) -> Question:
    """Pearson's correlation of each two columns, over the patients in whom all of them are known."""
    if len({column.name for column in columns}) < len(columns):
        raise RequestError("A column is named twice.", "Name each once.", field="columns")
    size, pairs = len(columns), list(combinations(range(len(columns)), 2))
    limits = [column.limits for column in columns]
    sensitivity = root(float(WEIGHT) ** 2, (2 * size + len(pairs)) * float(GRID) ** 2)

    def exact(view: View) -> np.ndarray:
        known = np.logical_and.reduce([view.known(column.name).numpy() for column in columns])
        y = [
            fixed(view.numbers(c.name).numpy()[known], *ends) for c, ends in zip(columns, limits, strict=True)
        ]
        products = [(y[i] * y[j] // GRID).sum() for i, j in pairs]
        sums = [each.sum() for each in y] + [squares(each).sum() for each in y]
        return np.array([WEIGHT * int(known.sum()), *sums, *products], dtype=np.int64)

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        drawn = np.array(noisy) + sd * np.random.default_rng().standard_normal((DRAWS, len(noisy)))
        value, draws = (
            _correlations(np.array(noisy, dtype=float), size, pairs),
            _correlations(drawn, size, pairs),
        )
        far = noisy[0] / WEIGHT < 5 * sd / WEIGHT
        figures = []
        for index, (i, j) in enumerate(pairs):
            ends = [-1.0, 1.0] if far else np.quantile(draws[:, index], [0.025, 0.975]).tolist()
            r = float(value[index])
            ends = [min(ends[0], r), max(ends[1], r)]
            name = f"{columns[i].name}, {columns[j].name}"
            figures.append(
                {"name": name, "value": r, "error": (ends[1] - ends[0]) / (2 * Z), "interval": ends}
            )
        told = {"kind": "correlation", "columns": [column.name for column in columns], "figures": figures}
        return told | {"patients": counted(noisy[0] / WEIGHT, sd / WEIGHT)}

    def expect(sd: float, expected: float | None) -> dict[str, Any]:
        if expected is None:
            return {"notes": [NEEDS_NUMBER]}
        # for values spread evenly over their bounds, of variance 1/3
        error = min(3 * sd / GRID / max(expected, 1.0), 1.0)
        return {"error": error, "notes": ["Of uncorrelated columns spread evenly over their bounds."]}

    return Question(exact, sensitivity, read, expect)


def _correlations(sums: np.ndarray, size: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """(..., pairs) from (..., 1 + 2 size + pairs); where noise leaves no variance, ±1."""
    n = np.maximum(sums[..., :1] / WEIGHT, 1.0)
    moments = sums[..., 1:] / GRID / n
    m, t, products = moments[..., :size], moments[..., size : 2 * size], moments[..., 2 * size :]
    var = (t + 1) / 2 - m * m
    i, j = (np.array([pair[end] for pair in pairs]) for end in (0, 1))
    cov = products - m[..., i] * m[..., j]
    scale = np.sqrt(np.maximum(var[..., i], 1e-9) * np.maximum(var[..., j], 1e-9))
    return np.clip(cov / scale, -1.0, 1.0)


def _name(by: Keys, cell: int, column: Column) -> str:
    return by.label(cell) if by.columns else column.name


def _told(kind: str, column: Column, by: Keys, figures: list[dict[str, Any]]) -> dict[str, Any]:
    """One figure stands at the top, several in a list."""
    common = {"kind": kind, "column": column.name, "unit": column.unit, **by.told()}
    if len(figures) == 1 and not by.columns:
        return common | {key: value for key, value in figures[0].items() if key != "name"}
    return common | {"figures": figures}
