"""What every aggregate is: exact integers that one patient moves by so much, plus discrete noise.

OpenDP adds discrete Gaussian noise (Canonne, Kamath and Steinke 2020) of standard deviation noise * sensitivity;
all that is released is computed from the noisy integers. Values are clamped to public bounds and put on a
fixed-point grid, so that no sum is ever taken in floating point (Mironov 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import opendp.prelude as dp

from rapha_lab.curator.cohort import View
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import SPLITS, Column

__all__ = [
    "GRID",
    "Keys",
    "Question",
    "Z",
    "added",
    "counted",
    "figure",
    "fixed",
    "gaussian",
    "keys_of",
    "laplace",
    "root",
    "touched",
]

dp.enable_features("contrib")

GRID = 1 << 20
"""Steps from the middle of a column's bounds to either end."""

Z = 1.959964
"""Standard deviations of a Gaussian from the middle to the ends of its 95 % interval."""

MOST_CELLS = 10_000
MOST_WHOLE = 200

_VECTOR = dp.vector_domain(dp.atom_domain(T="i64"))


@dataclass(frozen=True)
class Question:
    """What is asked of the patients, as integers.

    Attributes:
        exact: the integers of a view, int64 of a fixed public length.
        sensitivity: by how much one patient can move them, in L2.
        read: the released values, from the noisy integers and the noise's standard deviation.
        expect: what error the answer will have, from that standard deviation and the number of patients to
            expect, None where none is public: `error`, `unit`, and further `figures` and `notes`.
    """

    exact: Callable[[View], np.ndarray]
    sensitivity: float
    read: Callable[[list[int], float], dict[str, Any]]
    expect: Callable[[float, float | None], dict[str, Any]]


class Keys:
    """The cells that the public values of a few columns make; each patient is in one.

    Args:
        columns: categories, booleans or integers of few values.

    Raises:
        RequestError: naming the column that has no public list of values, or too many together.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self.names = [keys_of(column) for column in columns]
        self.size = math.prod(len(names) for names in self.names)
        if self.size > MOST_CELLS:
            what = f"{' and '.join(c.name for c in columns)} have {self.size} values together."
            raise RequestError(what, f"{MOST_CELLS} are the most.", field="by")

    def cells(self, view: View) -> np.ndarray:
        """Each patient's cell, (n,); `size` for one whose key is unknown although the schema says it never is."""
        where, nowhere = np.zeros(len(view), dtype=np.int64), np.zeros(len(view), dtype=bool)
        for column, names in zip(self.columns, self.names, strict=True):
            known = view.known(column.name).numpy()
            first = int(column.limits[0]) if column.type == "integer" else 0
            codes = np.where(known, view.codes(column.name).numpy() - first, len(names) - 1)
            where = where * len(names) + codes
            nowhere |= ~known & (column.missing == "never")
        return np.where(nowhere, self.size, where)

    def per_cell(
        self, view: View, values: np.ndarray | None = None, of: np.ndarray | None = None
    ) -> np.ndarray:
        """The sum of whole `values`, or the number of patients, by cell, (size,); of the patients `of` alone."""
        cells = self.cells(view)
        if of is not None:
            cells = np.where(of, cells, self.size)
        if values is None:
            return np.bincount(cells, minlength=self.size + 1)[: self.size]
        return added(cells, values, self.size + 1)[: self.size]

    def label(self, cell: int) -> str:
        """A cell in words, as in "F, North"."""
        parts = []
        for names in reversed(self.names):
            cell, code = divmod(cell, len(names))
            parts.append(names[code])
        return ", ".join(reversed(parts))

    def told(self) -> dict[str, Any]:
        """What a release says of its keys."""
        return {"by": [column.name for column in self.columns], "keys": self.names} if self.columns else {}


def keys_of(column: Column) -> list[str]:
    """The public values of a column to group by, `missing` last if it can be.

    Raises:
        RequestError: it has none, or too many.
    """
    if column.type == "integer":
        low, high = (int(end) for end in column.limits)
        if high - low >= MOST_WHOLE:
            raise _no_keys(column)
        names = [str(value) for value in range(low, high + 1)]
    elif column.type in ("category", "boolean"):
        names = list(column.categories) or ["no", "yes"]
    else:
        raise _no_keys(column)
    return names + (["missing"] if column.missing == "possible" else [])


def _no_keys(column: Column) -> RequestError:
    return RequestError(
        f"{column.name} has no short public list of values.",
        "Patients are grouped by a category, a truth or a small whole number.",
        f'Make groups: pl.col("{column.name}").cut([...]).alias("{column.name}_group").',
        field=column.name,
    )


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


def fixed(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values as whole steps from the middle of [low, high], in [-GRID, GRID] whatever they are."""
    middle, half = low / 2 + high / 2, high / 2 - low / 2
    steps = np.nan_to_num((values - middle) / half * GRID, nan=0.0)
    return np.rint(steps.clip(-GRID, GRID)).astype(np.int64)


def added(cells: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Whole values added up by cell, (size,): in float64 whole numbers add exactly below 2^53."""
    return np.bincount(cells, weights=values.astype(np.float64), minlength=size).astype(np.int64)


def root(*squares: float) -> float:
    """The root of a sum, rounded up."""
    return math.nextafter(math.sqrt(math.fsum(squares)), math.inf)


def counted(value: float, sd: float) -> dict[str, Any]:
    """A noisy number of patients with its error; that no number is negative is known without looking."""
    value, sd = float(value), float(sd)
    low, high = max(0.0, value - Z * sd), max(0.0, value + Z * sd)
    return {"value": max(0, round(value)), "error": sd, "interval": [low, high]}


def figure(name: str, value: float, error: float, low: float, high: float) -> dict[str, Any]:
    """One figure of a release that has several, within its public limits."""
    middle = float(min(max(value, low), high))
    ends = [min(max(value - Z * error, low), middle), max(min(value + Z * error, high), middle)]
    return {"name": name, "value": middle, "error": min(error, high - low), "interval": ends}
