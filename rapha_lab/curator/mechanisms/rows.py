"""Aggregates over a table with many rows a patient; the patient is the unit, whatever the number of rows.

Of each patient at most `cap` rows count, the latest, chosen from that patient's own rows alone. In L2 a patient
then moves counts by groups by at most cap (all rows in one group), numbers of distinct patients by the root of
the number of groups they can be in, and sums with numbers by cap times what one row can. Groups are public and
none is left out. How many patients had more rows than the cap is released as well: it says where bias may be.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rapha_lab.curator.cohort import View
from rapha_lab.curator.expressions import rows_where
from rapha_lab.curator.mechanisms.counts import NEEDS_NUMBER
from rapha_lab.curator.mechanisms.moments import WEIGHT, ratio
from rapha_lab.curator.mechanisms.question import GRID, Question, Z, added, counted, fixed, keys_of, root
from rapha_lab.curator.tables import PATIENT
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.expression import check_rows, text
from rapha_lab.protocol.messages import Rows
from rapha_lab.protocol.schema import Column, Schema, Table

__all__ = ["question"]

MARKED = 1 << 26


def question(ask: Rows, schema: Schema) -> Question:
    """What is asked of a table's rows, as integers.

    Raises:
        RequestError: naming the table, column or cap that is wrong.
    """
    table = schema.table(ask.table)
    check_rows(ask.rows, table, schema)
    by = _column(table, ask.by) if ask.by else None
    names = keys_of(by) if by else [""]
    value = _column(table, ask.column or "") if ask.of in ("sum", "mean") else None
    limits = value.limits if value else (0.0, 1.0)
    cap = min(ask.cap or table.most, table.most)
    cut = cap < table.most  # else nobody can have more
    size, most = len(names), max(abs(end) for end in limits)
    reach = {
        "count": float(cap) ** 2,
        "patients": float(min(size, cap)),
        "sum": (float(cap) * GRID) ** 2,
        "mean": float(cap) ** 2 * (float(WEIGHT) ** 2 + float(GRID) ** 2),
    }[ask.of]
    # half of what the rows can move says well enough how many patients were cut, for an eighth more noise
    flag = max(1, {"count": cap, "patients": 2, "sum": cap * GRID, "mean": cap * WEIGHT}[ask.of] // 2) * cut
    columns = {column.name for column in (by, value) if column is not None}

    def exact(view: View) -> np.ndarray:
        rows = rows_where(view, table.name, columns, ask.rows)
        if value is not None:
            rows = rows.drop_nulls(value.name)
        owner = rows[PATIENT].to_numpy().astype(np.int64)
        counts = np.bincount(owner, minlength=len(view))
        late = counts.cumsum()[owner] - np.arange(len(owner)) <= cap
        group = _groups(by, rows, names)[late] if by else np.zeros(int(late.sum()), dtype=np.int64)
        parts = [_sums(ask.of, owner[late], group, size)]
        if value is not None:
            ends = (-most, most) if ask.of == "sum" else limits
            steps = fixed(rows[value.name].cast(float).to_numpy()[late], *ends)
            parts = [*parts[: ask.of == "mean"], added(group, steps, size + 1)[:size]]
        over = np.array([flag * int((counts > cap).sum())] * cut, dtype=np.int64)
        return np.concatenate([*parts, over])

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        told: dict[str, Any] = {"kind": "rows", "of": ask.of, "table": table.name, "cap": cap}
        told |= {"column": value.name, "unit": value.unit} if value else {"unit": "rows"}
        told |= {"unit": "patients"} if ask.of == "patients" else {}
        told["note"] = _note(table, cap)
        told |= {"among": text(ask.rows)} if ask.rows is not None else {}
        if cut:
            told["cut"] = counted(noisy[-1] / flag, sd / flag)
        figures = _read(ask.of, noisy[: len(noisy) - cut], sd, limits, size)
        if by is None:
            return told | figures[0]
        named = [{"name": name} | figure for name, figure in zip(names, figures, strict=True)]
        return told | {"by": [by.name], "keys": [names], "figures": named}

    def expect(sd: float, expected: float | None) -> dict[str, Any]:
        told: dict[str, Any] = {"notes": [_note(table, cap)]}
        if ask.of != "mean":
            error = most * sd / GRID if value else sd
            return told | {"error": error, "unit": value.unit if value else told.get("unit", ask.of)}
        if expected is None:
            return told | {"notes": [NEEDS_NUMBER], "unit": value.unit if value else ""}
        inner = (limits[1] - limits[0]) / 2 * min(2 * sd / GRID / max(expected / size, 1.0), 1.0)
        told["notes"] = [
            *told["notes"],
            "If every patient has one such row; more of them make it more exact.",
        ]
        return told | {"error": inner, "unit": value.unit if value else ""}

    return Question(exact, root(reach, float(flag) ** 2), read, expect)


def _note(table: Table, cap: int) -> str:
    which = "latest" if table.time else "last"
    return f"At most {cap} rows of a patient count, the {which}; more of a patient's rows would be left out."


def _sums(of: str, owner: np.ndarray, group: np.ndarray, size: int) -> np.ndarray:
    """By group: rows, or the patients who have any, or rows as a mean's weights; `size` is no group."""
    if of == "patients":
        group = _distinct(owner * (size + 1) + group) % (size + 1)
    counts = np.bincount(group, minlength=size + 1)[:size]
    return WEIGHT * counts if of == "mean" else counts


def _distinct(cells: np.ndarray) -> np.ndarray:
    """The cells that occur; by marking them where they are few, which is quicker than to sort."""
    if not len(cells) or cells.max() >= MARKED:
        return np.unique(cells)
    seen = np.zeros(int(cells.max()) + 1, dtype=bool)
    seen[cells] = True
    return np.flatnonzero(seen)


def _groups(by: Column, rows: Any, names: list[str]) -> np.ndarray:
    """Each row's group; `len(names)`, no group, where the schema says the key is never missing and it is."""
    first = int(by.limits[0]) if by.type == "integer" else 0
    codes = rows[by.name].cast(float).to_numpy() - first
    lost = len(names) - 1 if by.missing == "possible" else len(names)
    return np.where(np.isnan(codes), lost, np.nan_to_num(codes)).astype(np.int64)


def _read(
    of: str, noisy: list[int], sd: float, limits: tuple[float, float], size: int
) -> list[dict[str, Any]]:
    if of in ("count", "patients"):
        return [counted(value, sd) for value in noisy]
    if of == "sum":
        step = max(abs(end) for end in limits) / GRID
        low, high = (-math.inf if limits[0] < 0 else 0.0), (math.inf if limits[1] > 0 else 0.0)
        ends = [(n * step - Z * sd * step, n * step, n * step + Z * sd * step) for n in noisy]
        kept = [[min(max(x, low), high) for x in three] for three in ends]
        return [{"value": v, "error": sd * step, "interval": [a, b]} for a, v, b in kept]
    middle, half = limits[0] / 2 + limits[1] / 2, limits[1] / 2 - limits[0] / 2
    told = []
    for number, sum_ in zip(noisy[:size], noisy[size:], strict=True):
        part = ratio(sum_ / GRID, sd / GRID, number / WEIGHT, sd / WEIGHT)
        ends_ = [middle + half * end for end in part["interval"]]
        figure = {"value": middle + half * part["value"], "error": half * part["error"], "interval": ends_}
        told.append(figure | {"rows": counted(number / WEIGHT, sd / WEIGHT)})
    return told


def _column(table: Table, name: str) -> Column:
    found = next((column for column in table.columns if column.name == name), None)
    if found is None:
        known = ", ".join(column.name for column in table.columns)
        raise RequestError(
            f"The table {table.name} has no column {name!r}.", f"It has {known}.", field="column"
        )
    return found
