"""Counts of patients by public cells, and what follows from them: histograms, quantiles, missing values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rapha_lab.curator.cohort import View
from rapha_lab.curator.mechanisms.question import Keys, Question, Z, counted, figure, root
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import Column

__all__ = ["count", "edges_of", "histogram", "missing", "quantiles", "where_of"]


def count(by: Keys) -> Question:
    """How many patients there are, by cell; each is in one."""

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        if not by.columns:
            return {"kind": "count", "unit": "patients", **counted(noisy[0], sd)}
        figures = [{"name": by.label(cell)} | counted(value, sd) for cell, value in enumerate(noisy)]
        return {"kind": "counts", "unit": "patients", **by.told(), "figures": figures, "error": sd}

    return Question(by.per_cell, 1.0, read, lambda sd, expected: {"error": sd, "unit": "patients"})


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
    edges = edges_of(column, bins) if column.numeric else None
    size = len(names) if edges is None else len(edges) - 1

    def exact(view: View) -> np.ndarray:
        known = view.known(column.name)
        where = view.codes(column.name).numpy() if edges is None else where_of(view, column, edges)
        # unknown where the schema says "never" is counted nowhere
        counts = np.bincount(where[known.numpy()], minlength=size)
        return np.append(counts, int((~known).sum())) if column.missing == "possible" else counts

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        counts = [counted(value, sd) for value in noisy]
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

    return Question(exact, 1.0, read, lambda sd, expected: {"error": sd, "unit": "patients per bin"})


def edges_of(column: Column, bins: int) -> np.ndarray:
    """The edges of a numeric column's bins."""
    low, high = column.limits
    if column.type == "integer":
        width = math.ceil((high - low + 1) / bins)
        return low - 0.5 + width * np.arange(math.ceil((high - low + 1) / width) + 1.0)
    return np.geomspace(low, high, bins + 1) if column.scale == "log" else np.linspace(low, high, bins + 1)


def where_of(view: View, column: Column, edges: np.ndarray) -> np.ndarray:
    """Each patient's bin, (n,); meaningless where not known."""
    return np.searchsorted(edges[1:-1], view.numbers(column.name).numpy(), side="right")


def quantiles(column: Column, at: Sequence[float], bins: int) -> Question:
    """Quantiles of a numeric column over the patients in whom it is known, all from one histogram.

    With F(k) the noisy number of patients below edge k of K and N that of all, q's quantile lies where
    F - qN crosses 0. Its noise at edge k has variance sd² (k (1-q)² + (K-k) q²), so that every bin at one of
    whose edges the crossing is within the noise may hold it: the interval is all of those bins (Woodruff 1952).
    """
    column.limits  # noqa: B018 - a category has no quantiles, and says so
    edges = edges_of(column, bins) if column.numeric else np.array([0.0, 0.5, 1.0])
    size = len(edges) - 1
    ends = np.clip(edges, *column.limits).astype(float)
    shares = sorted(set(at))

    def exact(view: View) -> np.ndarray:
        return np.bincount(where_of(view, column, edges)[view.known(column.name).numpy()], minlength=size)

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        below = np.concatenate([[0.0], np.cumsum(noisy)])
        figures = [_quantile(q, below, ends, sd) for q in shares]
        kind = {"kind": "quantiles", "column": column.name, "unit": column.unit}
        return kind | {"figures": figures, "patients": counted(below[-1], sd * math.sqrt(size))}

    def expect(sd: float, expected: float | None) -> dict[str, Any]:
        if expected is None:
            return {"unit": "of the patients", "notes": [NEEDS_NUMBER]}
        rank = sd * math.sqrt(size) / 2 / expected
        notes = [
            f"Of the median's rank; the bins are {(ends[-1] - ends[0]) / size:.3g} {column.unit} wide on average."
        ]
        return {"error": min(rank, 1.0), "unit": "of the patients", "notes": notes}

    return Question(exact, 1.0, read, expect)


NEEDS_NUMBER = "The error depends on the number of patients, which the dataset does not declare."


def _quantile(q: float, below: np.ndarray, ends: np.ndarray, sd: float) -> dict[str, Any]:
    size = len(ends) - 1
    edge = np.arange(size + 1)
    short = below - q * below[-1]
    noise = sd * np.sqrt(edge * (1 - q) ** 2 + (size - edge) * q**2)
    rising = (np.maximum.accumulate(short) + np.minimum.accumulate(short[::-1])[::-1]) / 2
    value = float(np.interp(0.0, rising, ends)) if rising[-1] > rising[0] else float(ends[size // 2])
    # bins whose upper edge may lie above the quantile, and whose lower edge may lie below it
    first = (
        int(np.argmax(short[1:] + Z * noise[1:] >= 0)) if (short[1:] + Z * noise[1:] >= 0).any() else size - 1
    )
    may = np.flatnonzero(short[:-1] - Z * noise[:-1] <= 0)
    last = int(may[-1]) if len(may) else 0
    low, high = float(ends[min(first, last)]), float(ends[max(first, last) + 1])
    ends_of = [min(low, value), max(high, value)]
    name = f"{100 * q:g} %" if q != 0.5 else "median"
    return {"name": name, "value": value, "error": (ends_of[1] - ends_of[0]) / (2 * Z), "interval": ends_of}


def missing(columns: Sequence[Column]) -> Question:
    """In how many patients each column is not known, and how many there are; a patient may move each by one."""

    def exact(view: View) -> np.ndarray:
        lacking = [int((~view.known(column.name)).sum()) for column in columns]
        return np.array([len(view), *lacking], dtype=np.int64)

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        number = max(float(noisy[0]), 1.0)
        shares = [
            figure(
                column.name,
                100 * value / number,
                100 * math.hypot(sd, value / number * sd) / number,
                0.0,
                100.0,
            )
            for column, value in zip(columns, noisy[1:], strict=True)
        ]
        return {
            "kind": "missing",
            "unit": "% of patients",
            "figures": shares,
            "patients": counted(noisy[0], sd),
        }

    def expect(sd: float, expected: float | None) -> dict[str, Any]:
        if expected is None:
            return {"unit": "% of patients", "notes": [NEEDS_NUMBER]}
        return {
            "error": min(100 * sd / expected, 100.0),
            "unit": "% of patients",
            "notes": ["Where few are missing."],
        }

    return Question(exact, root(len(columns) + 1.0), read, expect)
