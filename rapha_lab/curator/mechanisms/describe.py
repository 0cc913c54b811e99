"""Table 1 of a paper at once: one Gaussian vector for all columns, weighted for equal relative error.

A patient adds to the number of patients, to three sums of each number (as for a variance), and to one count of
each category or truth. Blocks are scaled before noise of one size is added. With noise s for a block of weight 1
and n patients, the mean of a number errs by √3 s/(w n) of the standard deviation of evenly spread values, and a
share by 2 s/(w n) of that of a fair coin: 2 : √3 makes the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rapha_lab.curator.cohort import View
from rapha_lab.curator.mechanisms.counts import NEEDS_NUMBER
from rapha_lab.curator.mechanisms.moments import WEIGHT, mean_and_spread, squares
from rapha_lab.curator.mechanisms.question import GRID, Keys, Question, counted, figure, fixed, root
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import Column

__all__ = ["table"]

SHARE = round(2 * GRID / math.sqrt(3))
"""What a patient adds to the count of their category, in steps."""


def table(columns: Sequence[Column]) -> Question:
    """Means and standard deviations of numbers, shares of categories, and what is missing.

    Raises:
        RequestError: a column is named twice, or is a text or an image.
    """
    if len({column.name for column in columns}) < len(columns):
        raise RequestError("A column is named twice.", "Name each once.", field="columns")
    keys = {column.name: Keys([column]) for column in columns if column.type in ("category", "boolean")}
    reach = [float(WEIGHT) ** 2]
    for column in columns:
        if column.name not in keys:
            column.limits  # noqa: B018 - a text has none, and says so before anything is spent
        numeric = [float(WEIGHT) ** 2, float(GRID) ** 2, float(GRID) ** 2]
        reach += [float(SHARE) ** 2] if column.name in keys else numeric

    def exact(view: View) -> np.ndarray:
        parts = [np.array([WEIGHT * len(view)], dtype=np.int64)]
        for column in columns:
            if column.name in keys:
                parts.append(SHARE * keys[column.name].per_cell(view))
            else:
                known = view.known(column.name).numpy()
                steps = fixed(view.numbers(column.name).numpy()[known], *column.limits)
                sums = [WEIGHT * len(steps), steps.sum(), squares(steps).sum()]
                parts.append(np.array(sums, dtype=np.int64))
        return np.concatenate(parts)

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        number, start = max(noisy[0] / WEIGHT, 1.0), 1
        patients = counted(noisy[0] / WEIGHT, sd / WEIGHT)
        figures = [{"name": "patients", **patients}]
        for column in columns:
            size = keys[column.name].size if column.name in keys else 3
            block = noisy[start : start + size]
            start += size
            figures += (
                _shares(column, keys[column.name], block, sd)
                if column.name in keys
                else _numbers(column, block, sd, number)
            )
        told = {"kind": "description", "columns": [column.name for column in columns], "figures": figures}
        return told | {"patients": patients}

    def expect(sd: float, expected: float | None) -> dict[str, Any]:
        if expected is None:
            return {"unit": "% of patients", "notes": [NEEDS_NUMBER]}
        share = min(100 * sd / SHARE / max(expected, 1.0), 100.0)
        figures = {
            f"error of the mean of {c.name}": (c.limits[1] - c.limits[0])
            / 2
            * min(sd / GRID / max(expected, 1.0), 1.0)
            for c in columns
            if c.name not in keys
        }
        return {
            "error": share,
            "unit": "% of patients",
            "figures": figures,
            "notes": ["Of a share; noise alone."],
        }

    return Question(exact, root(*reach), read, expect)


def _shares(column: Column, keys: Keys, block: list[int], sd: float) -> list[dict[str, Any]]:
    """Each value's share of the column's own sum, which is less noisy than the number of patients."""
    number, noise = max(sum(block) / SHARE, 1.0), sd / SHARE
    told = []
    for cell, value in enumerate(block):
        share = min(max(value / SHARE / number, 0.0), 1.0)
        error = noise / number * math.sqrt((1 - share) ** 2 + (keys.size - 1) * share**2)
        name = f"{column.name}, {keys.label(cell)} (%)"
        told.append(figure(name, 100 * share, 100 * error, 0.0, 100.0) | {"column": column.name})
    return told


def _numbers(column: Column, block: list[int], sd: float, number: float) -> list[dict[str, Any]]:
    mean, spread, _ = mean_and_spread(block, sd, sd, *column.limits)
    unit = f" ({column.unit})" if column.unit else ""
    told = [{**mean, "name": f"{column.name}, mean{unit}"}, {**spread, "name": f"{column.name}, sd{unit}"}]
    if column.missing == "possible":
        lacking = 1 - block[0] / WEIGHT / number
        error = math.hypot(1.0, 1 - lacking) * sd / WEIGHT / number
        told.append(figure(f"{column.name}, missing (%)", 100 * lacking, 100 * error, 0.0, 100.0))
    return [each | {"column": column.name} for each in told]
