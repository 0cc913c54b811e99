"""Cohorts in expressions, computed: our own checked JSON becomes polars over typed, bounded columns.

Every function works on one row, or on one patient's own rows. All numbers are float64 within polars, so that
nothing overflows, and a cast, a division by zero or a logarithm of nothing gives null or an infinity, which
the clamp to public bounds ends: no record makes one raise.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, reduce
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rapha_lab.curator.cohort import Cohort, View
from rapha_lab.curator.columns import Values
from rapha_lab.curator.tables import DAY, PATIENT, Rows
from rapha_lab.protocol.expression import (
    DAYS,
    Call,
    Col,
    Expression,
    Lit,
    Over,
    Typed,
    extended,
    names,
    scope_in,
    scope_of,
    typed_in,
    united,
)
from rapha_lab.protocol.messages import Ask
from rapha_lab.protocol.schema import Column, Schema

__all__ = ["Chosen", "chosen", "evaluated", "rows_where"]

TIMED, VALUE = "__timed", "__value"
GRID = 1 << 20


class Chosen(Cohort):
    """Those patients of a cohort for whom `where` holds, with derived columns beside their own.

    Nothing is computed before a view of it is used. Patients who are left out contribute nothing to any
    answer, and how many are left is as little public as before.

    Raises:
        RequestError: as `extended`, from public descriptions alone.
    """

    def __init__(self, cohort: Cohort, derive: Mapping[str, Expression], where: Expression | None) -> None:
        self.schema = extended(cohort.schema, derive, where)
        self.findings = cohort.findings
        self._of, self._derive, self._where = cohort, derive, where
        self._tables, self._points, self.scratch = cohort._tables, cohort._points, cohort.scratch
        self.knows = cohort.knows

    @property
    def present(self) -> Tensor:  # type: ignore[override]
        """Who of the cohort has not opted out since."""
        return self._of.present

    def view(self, split: str) -> View:
        """The chosen patients of one split, or of "all"; who they are is found out when it is first used."""
        return _Later(self, split)

    @cached_property
    def _columns(self) -> dict[str, Values]:  # type: ignore[override]
        columns = dict(self._of._columns)
        for column in self.schema.columns:
            if column.name in self._derive:
                series = self._evaluated(self._derive[column.name], columns)
                columns[column.name] = _held(column, series)
        return columns

    @cached_property
    def _rows(self) -> dict[str, Tensor]:  # type: ignore[override]
        if self._where is None:
            return self._of._rows
        holds = self._evaluated(self._where, self._columns).fill_null(False)
        kept = torch.tensor(holds.to_numpy())
        return {split: rows[kept[rows]] for split, rows in self._of._rows.items()}

    def _evaluated(self, expression: Expression, columns: Mapping[str, Values]) -> pl.Series:
        """The expression's value for each patient, after what it takes from tables."""
        frame = _frame(names(expression), columns, len(self._points))
        scope, plain = scope_of(self.schema), expression
        for node in _overs(expression):
            name = f"__over{len(frame.columns)}"
            found = _from_rows(node, frame, self.schema, self._tables[node.table])
            frame = frame.with_columns(found.alias(name))
            scope[name] = typed_in(node, scope_of(self.schema), self.schema)
            plain = _replaced(plain, node, Col(name))
        return evaluated(plain, frame, scope)


def chosen(cohort: Cohort, ask: Ask) -> Cohort:
    """The patients that are asked about, with the columns made for it."""
    return Chosen(cohort, ask.derive, ask.where) if ask.derive or ask.where is not None else cohort


class _Later(View):
    """A view whose patients are found when it is first used."""

    def __init__(self, cohort: Chosen, split: str) -> None:
        self.schema, self.split, self._cohort = cohort.schema, split, cohort

    @property
    def _rows(self) -> Tensor:  # type: ignore[override]
        return self._cohort._rows[self.split]


def _frame(wanted: set[str], columns: Mapping[str, Values], length: int) -> pl.DataFrame:
    """The wanted columns as expressions take them: float64, truths, or codes of categories; null where unknown."""
    series = [pl.int_range(length, dtype=pl.UInt32, eager=True).alias(PATIENT)]
    series += [_plain(columns[name]) for name in sorted(wanted) if name in columns]
    return pl.DataFrame(series)


def _plain(values: Values) -> pl.Series:
    if values.text is not None:
        return values.series()
    kind = {"category": pl.Int64, "boolean": pl.Boolean}.get(values.column.type, pl.Float64)
    series = pl.Series(values.column.name, values.values.double().numpy()).cast(kind)
    known = pl.Series(values.known.numpy())
    return pl.select(pl.when(known).then(series).alias(values.column.name)).to_series()


def _held(column: Column, series: pl.Series) -> Values:
    """A derived column as a cohort keeps one: within its public limits, and in whom it is known."""
    if column.type == "category":
        codes = series.fill_null(0).to_numpy().clip(0, len(column.categories) - 1)
        return Values(column, torch.tensor(codes), torch.tensor(series.is_not_null().to_numpy()))
    low, high = column.limits
    raw = series.cast(pl.Float64).fill_null(float("nan")).to_numpy()
    known = ~np.isnan(raw)
    return Values(column, torch.tensor(np.clip(np.where(known, raw, low), low, high)), torch.tensor(known))


# -- rows of tables ----------------------------------------------------------------------------------------


def _overs(expression: Expression) -> list[Over]:
    if isinstance(expression, Over):
        return [expression]
    parts = expression.of if isinstance(expression, Call) else []
    return [node for part in parts for node in _overs(part)]


def _replaced(expression: Expression, old: Over, new: Col) -> Expression:
    if expression is old:
        return new
    if isinstance(expression, Call):
        return Call(expression.fn, [_replaced(part, old, new) for part in expression.of])
    return expression


def _from_rows(node: Over, frame: pl.DataFrame, schema: Schema, held: Rows) -> pl.Series:
    """One value for each patient, from their own rows of a table."""
    table = held.table
    scope = scope_in(table, scope_of(schema))
    wanted = names(node.of) | names(node.where)
    rows = rows_of(held, wanted, torch.arange(len(frame)))
    rows = rows.join(
        frame.drop(set(rows.columns) - {PATIENT}, strict=False), on=PATIENT, how="left", maintain_order="left"
    )
    if node.where is not None:
        rows = rows.filter(evaluated(node.where, rows, scope))
    rows = rows.with_columns(evaluated(Lit(True) if node.of is None else node.of, rows, scope).alias(VALUE))
    value = pl.col(VALUE)
    if node.fn in ("first", "last"):
        rows = rows.filter(pl.col(TIMED) & value.is_not_null())
    middle, half = _grid_of(node.of, scope) if node.fn in ("sum", "mean", "std") else (0.0, 1.0)
    if node.fn in ("sum", "mean", "std"):
        value = ((value.cast(pl.Float64) - middle) / half * GRID).clip(-GRID, GRID).round().cast(pl.Int64)
    small = rows.select(PATIENT, value.alias("value"))
    found = small.group_by(PATIENT, maintain_order=True).agg(_AGGREGATES[node.fn](middle, half / GRID))
    joined = frame.select(PATIENT).join(found, on=PATIENT, how="left", maintain_order="left")["value"]
    empty = {"len": 0.0, "count": 0.0, "n_unique": 0.0, "sum": 0.0, "any": False, "all": True}
    return joined.fill_null(empty[node.fn]) if node.fn in empty else joined


def rows_of(held: Rows, wanted: set[str], patients: Tensor) -> pl.DataFrame:
    """These patients' rows of a table in order of time, as expressions take them; times in days since 1970."""
    index, owner = held.of(patients)
    series = [pl.Series(PATIENT, owner.numpy(), dtype=pl.UInt32)]
    names = [column.name for column in held.table.columns if column.name in wanted]
    series += [_plain(held.values(name, index)) for name in names]
    if held.times is not None:
        times = held.times.gather(index.numpy())
        days = (times.cast(pl.Float64) / DAY).clip(*DAYS)
        series += [days.alias(held.table.time), times.is_not_null().alias(TIMED)]
    return pl.DataFrame(series)


def rows_where(view: View, table: str, columns: set[str], where: Expression | None) -> pl.DataFrame:
    """The rows of a view's patients in which `where` holds, each with `__patient`, its patient's place in the view."""
    held, cohort, patients = view._cohort._tables[table], view._cohort, view._rows
    rows = rows_of(held, columns | names(where), patients)
    if where is None:
        return rows
    wanted = {name for name in names(where) if name in cohort._columns and name not in rows.columns}
    frame = _frame(wanted, {name: cohort._columns[name].of(patients) for name in wanted}, len(patients))
    rows = rows.join(frame, on=PATIENT, how="left", maintain_order="left")
    return rows.filter(evaluated(where, rows, scope_in(held.table, scope_of(view.schema))))


def _grid_of(of: Expression | None, scope: Mapping[str, Typed]) -> tuple[float, float]:
    """Middle and half width of what is added up: sums are of integers, so that no order of rows moves them."""
    assert of is not None
    kind = typed_in(of, scope, None)
    return kind.low / 2 + kind.high / 2, (kind.high / 2 - kind.low / 2) or 1.0


def _std(middle: float, step: float) -> pl.Expr:
    n, total, squares = pl.col("value").count(), pl.col("value").sum(), (pl.col("value") ** 2).sum()
    spread = (squares.cast(pl.Float64) - total.cast(pl.Float64) ** 2 / n).clip(0.0) / (n - 1)
    return pl.when(n > 1).then(spread.sqrt() * step).alias("value")


_AGGREGATES: dict[str, Callable[[float, float], pl.Expr]] = {
    "len": lambda middle, step: pl.len().cast(pl.Float64).alias("value"),
    "count": lambda middle, step: pl.col("value").count().cast(pl.Float64),
    "n_unique": lambda middle, step: pl.col("value").drop_nulls().n_unique().cast(pl.Float64),
    "sum": lambda middle, step: pl.col("value").sum() * step + pl.col("value").count() * middle,
    "mean": lambda middle, step: pl.col("value").sum() / pl.col("value").count() * step + middle,
    "std": _std,
    "min": lambda middle, step: pl.col("value").cast(pl.Float64).min(),
    "max": lambda middle, step: pl.col("value").cast(pl.Float64).max(),
    "first": lambda middle, step: pl.col("value").first(),
    "last": lambda middle, step: pl.col("value").last(),
    "any": lambda middle, step: pl.col("value").any(),
    "all": lambda middle, step: pl.col("value").all(),
}


# -- one row at a time -------------------------------------------------------------------------------------


def evaluated(expression: Expression, frame: pl.DataFrame, scope: Mapping[str, Typed]) -> pl.Series:
    """The expression's value in each row of a frame with columns of `scope`: float64, truths, or codes of categories.

    A part at a time: in one expression of polars a part is computed as often as it is written, and what ends NaN
    writes its argument twice, so that work and memory would double with every level.
    """
    if isinstance(expression, Col):
        return frame[expression.name]
    held, parts = frame.select(PATIENT), []
    if isinstance(expression, Call):
        for place, part in enumerate(expression.of):
            if isinstance(part, Lit):
                parts.append(_literal(part.value))
                continue
            held = held.with_columns(evaluated(part, frame, scope).alias(str(place)))
            parts.append(pl.col(str(place)))
        found = _called(expression, parts, scope)
    else:
        assert isinstance(expression, Lit)
        found = _literal(expression.value)
    # beside the patients, since alone what is made of literals would have one row, however many there are
    return held.select(PATIENT, found.alias(VALUE))[VALUE]


def _called(call: Call, parts: list[pl.Expr], scope: Mapping[str, Typed]) -> pl.Expr:
    kinds = [typed_in(part, scope, None) for part in call.of]
    whole = typed_in(call, scope, None)
    if call.fn in ("eq", "ne", "is_in") and any(k.type == "text" for k in kinds):
        return _NUMERIC[call.fn]([_words(node, part) for node, part in zip(call.of, parts, strict=True)])
    if call.fn in ("eq", "ne", "is_in", "when", "fill_null") and any(k.type == "category" for k in kinds):
        return _of_categories(call.fn, parts, kinds)
    if call.fn in _ALIKE:
        return _ALIKE[call.fn](parts)
    found = _NUMERIC[call.fn]([part.cast(pl.Float64) for part in parts])
    # what is no number is missing, and an infinity stays one until it is clipped
    return found if whole.type == "boolean" else found.fill_nan(None)


def _literal(value: Any) -> pl.Expr:
    if isinstance(value, str):
        return pl.lit(0, pl.Int64)  # its only category
    if value is None or isinstance(value, bool):
        return pl.lit(value, pl.Boolean)
    return pl.lit(float(value), pl.Float64)


def _words(node: Expression, part: pl.Expr) -> pl.Expr:
    """A text as it is compared, spaces around it left out, as they are of discovered keys."""
    words = pl.lit(node.value, pl.String) if isinstance(node, Lit) else part.cast(pl.String)
    return words.str.strip_chars(" ")


def _of_categories(fn: str, parts: list[pl.Expr], kinds: Sequence[Typed]) -> pl.Expr:
    """Codes of several lists of categories are brought to those of one."""
    which = range(1, 3) if fn == "when" else range(len(parts))
    whole = reduce(lambda a, b: united(a, b, fn), (kinds[n] for n in which))
    code = {name: number for number, name in enumerate(whole.categories)}
    for n in which:
        if kinds[n].type == "null":
            parts[n] = pl.lit(None, pl.Int64)
        elif kinds[n].type == "category" and kinds[n].categories != whole.categories:
            new = {old: code[name] for old, name in enumerate(kinds[n].categories)}
            parts[n] = parts[n].replace_strict(new, default=None, return_dtype=pl.Int64)
    return _ALIKE[fn](parts) if fn in _ALIKE else _NUMERIC[fn](parts)


def _any_of(parts: list[pl.Expr]) -> pl.Expr:
    return reduce(operator.or_, (parts[0] == part for part in parts[1:]))


Compiled = Callable[[list[pl.Expr]], pl.Expr]

_ALIKE: dict[str, Compiled] = {
    "and": lambda of: reduce(operator.and_, of),
    "or": lambda of: reduce(operator.or_, of),
    "not": lambda of: ~of[0],
    "is_null": lambda of: of[0].is_null(),
    "when": lambda of: pl.when(of[0]).then(of[1]).otherwise(of[2]),
    "fill_null": lambda of: pl.when(of[0].is_null()).then(of[1]).otherwise(of[0]),
}
_NUMERIC: dict[str, Compiled] = {
    "eq": lambda of: of[0] == of[1],
    "ne": lambda of: of[0] != of[1],
    "lt": lambda of: of[0] < of[1],
    "le": lambda of: of[0] <= of[1],
    "gt": lambda of: of[0] > of[1],
    "ge": lambda of: of[0] >= of[1],
    "is_in": _any_of,
    "add": lambda of: of[0] + of[1],
    "sub": lambda of: of[0] - of[1],
    "mul": lambda of: of[0] * of[1],
    "div": lambda of: of[0] / of[1],
    "pow": lambda of: of[0].pow(of[1]),
    "abs": lambda of: of[0].abs(),
    "sqrt": lambda of: of[0].sqrt(),
    "exp": lambda of: of[0].exp(),
    "log": lambda of: of[0].log(),
    "floor": lambda of: of[0].floor(),
    "round": lambda of: (of[0] * 10 ** of[1]).round() / 10 ** of[1],
    "clip": lambda of: of[0].clip(of[1], of[2]),
    "min": lambda of: pl.min_horizontal(of),
    "max": lambda of: pl.max_horizontal(of),
    "number": lambda of: of[0],
    "integer": lambda of: pl.when(of[0] < 0).then(of[0].ceil()).otherwise(of[0].floor()),
}
