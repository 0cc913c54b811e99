"""From polars' words to the curator's: a `pl.Expr` is read, function by function, into an expression of ours.

The curator never sees a polars plan: plans can carry pickles. What has no counterpart is refused here by name.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from typing import Any

import polars as pl

from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.expression import Call, Col, Expression, Lit, Over

__all__ = ["named", "over", "translate"]

Json = Any

_OPERATORS = {
    "Eq": "eq", "NotEq": "ne", "Lt": "lt", "LtEq": "le", "Gt": "gt", "GtEq": "ge", "And": "and", "Or": "or",
    "LogicalAnd": "and", "LogicalOr": "or", "Xor": "ne", "Plus": "add", "Minus": "sub", "Multiply": "mul",
    "Divide": "div", "TrueDivide": "div",
}  # fmt: skip
_SINGLE = {
    "Abs": "abs",
    "Exp": "exp",
    "Floor": "floor",
    "FillNull": "fill_null",
    "IsNull": "is_null",
    "Not": "not",
}
_MANY = {"MinHorizontal": "min", "MaxHorizontal": "max", "AllHorizontal": "and", "AnyHorizontal": "or"}
_AGGREGATES = {
    "Mean": "mean", "Sum": "sum", "Min": "min", "Max": "max", "First": "first", "Last": "last", "Std": "std",
    "Count": "count", "NUnique": "n_unique",
}  # fmt: skip
_FLOATS, _WHOLES = (
    ("Float64", "Float32"),
    ("Int64", "Int32", "Int16", "Int8", "UInt64", "UInt32", "UInt16", "UInt8"),
)


def translate(expression: Any) -> Expression:
    """A polars expression of one patient's columns, or a plain value.

    Raises:
        RequestError: naming what has no counterpart.
    """
    return _Reader(None, None).read(_tree(expression))


def over(expression: Any, table: str, where: Expression | None) -> Expression:
    """A polars aggregation over a table's rows, as one value a patient.

    Raises:
        RequestError: as `translate`, or if it does not end in an aggregation.
    """
    return _Reader(table, where).read(_tree(expression))


def named(expressions: tuple[Any, ...], by_name: dict[str, Any]) -> dict[str, Any]:
    """Positional and keyword expressions by the names of the columns they make, as polars names them."""
    found: dict[str, Any] = {}
    for expression in expressions:
        if not isinstance(expression, pl.Expr):
            raise _refused(f"{expression!r:.60} is no polars expression.", 'Write pl.col("age") * 2, say.')
        found[expression.meta.output_name()] = expression
    return found | by_name


def _tree(expression: Any) -> Json:
    if not isinstance(expression, pl.Expr):
        if isinstance(expression, bool | int | float | str) or expression is None:
            expression = pl.lit(expression)
        else:
            raise _refused(f"{expression!r:.60} is no polars expression.", 'Write pl.col("age") > 60, say.')
    return json.loads(expression.meta.serialize(format="json"))


def _refused(what: str, instead: str = "") -> RequestError:
    why = "Expressions are of one patient's own values, by the functions that rapha_lab/protocol/expression.py lists."
    return RequestError(what, why, instead, field="expression")


class _Reader:
    """Reads polars' JSON; with a table, aggregations are over a patient's rows in which `where` holds."""

    def __init__(self, table: str | None, where: Expression | None, *, inside: bool = False) -> None:
        self._table, self._where, self._inside = table, where, inside

    def read(self, tree: Json) -> Expression:
        if tree == "Len":
            return self._over("len", None)
        if not isinstance(tree, dict) or len(tree) != 1:
            raise _refused(f"The expression {tree!r:.60} has no counterpart here.")
        ((kind, inner),) = tree.items()
        readers: dict[str, Callable[[Json], Expression]] = {
            "Column": self._column,
            "Literal": self._literal,
            "Alias": lambda inner: self.read(inner[0]),
            "BinaryExpr": self._binary,
            "Ternary": self._ternary,
            "Cast": self._cast,
            "Filter": self._filter,
            "Agg": self._agg,
            "Function": self._function,
        }
        if kind not in readers:
            raise _refused(f"polars' {kind} has no counterpart here.")
        return readers[kind](inner)

    def _column(self, name: str) -> Expression:
        if self._table is not None and not self._inside:
            raise _refused(
                f"{name} is of a patient's many rows.", f'Reduce it: pl.col("{name}").mean(), say.'
            )
        return Col(name)

    def _literal(self, inner: Json) -> Expression:
        values = _values({"Literal": inner})
        if len(values) != 1:
            raise _refused("A list of values stands where one is needed.")
        return Lit(values[0])

    def _binary(self, inner: Json) -> Expression:
        left, right, sign = self.read(inner["left"]), self.read(inner["right"]), inner["op"]
        if sign == "FloorDivide":
            return Call("floor", [Call("div", [left, right])])
        if sign not in _OPERATORS:
            raise _refused(f"polars' operator {sign} has no counterpart here.")
        return Call(_OPERATORS[sign], [left, right])

    def _ternary(self, inner: Json) -> Expression:
        return Call("when", [self.read(inner[part]) for part in ("predicate", "truthy", "falsy")])

    def _cast(self, inner: Json) -> Expression:
        dtype, of = inner["dtype"], self.read(inner["expr"])
        kind = dtype.get("Literal") if isinstance(dtype, dict) else dtype
        if kind in _FLOATS or kind in _WHOLES:
            return Call("number" if kind in _FLOATS else "integer", [of])
        if kind == "Date" and isinstance(of, Lit) and isinstance(of.value, float):
            return Lit(math.floor(of.value))  # days already
        raise _refused(f"A cast to {kind!r:.40} has no counterpart here.", "Cast to pl.Float64 or pl.Int64.")

    def _filter(self, inner: Json) -> Expression:
        raise _refused(
            "filter() stands before an aggregation.", 'Write pl.col("value").filter(...).mean(), say.'
        )

    # -- aggregations over a patient's rows

    def _agg(self, inner: Json) -> Expression:
        ((kind, of),) = inner.items()
        if kind not in _AGGREGATES or (kind == "Std" and of[1] != 1):
            raise _refused(
                f"polars' {kind} has no counterpart here.", f"There are {', '.join(_AGGREGATES.values())}."
            )
        if kind == "Count" and of.get("include_nulls"):
            return self._over("len", of["input"])
        return self._over(_AGGREGATES[kind], of[0] if kind == "Std" else of.get("input", of))

    def _over(self, fn: Any, of: Json) -> Expression:
        if self._table is None or self._inside:
            raise _refused(f"{fn} speaks of many rows.", "Aggregate a table's: patients.table(...).agg(...).")
        where, rows = self._where, _Reader(self._table, None, inside=True)
        while isinstance(of, dict) and ("Filter" in of or "SortBy" in of):
            if "SortBy" in of:
                raise _refused(
                    "Rows are in order of time already.", "Leave sort_by out: first() and last() go by time."
                )
            also = rows.read(of["Filter"]["by"])
            where = also if where is None else Call("and", [where, also])
            of = of["Filter"]["input"]
        value = None if of is None or fn == "len" else rows.read(of)
        return Over(self._table, fn, value, where)

    # -- functions

    def _function(self, inner: Json) -> Expression:
        name: Any = inner["function"]
        options: Any = {}
        while isinstance(name, dict):
            ((name, options),) = name.items()
            if isinstance(options, str) or name in ("Boolean", "Pow"):
                name, options = options, {}
        if name in ("Any", "All"):
            return self._over(name.lower(), inner["input"][0])
        of = [] if name in ("IsIn", "Cut", "Bin") else [self.read(part) for part in inner["input"]]
        if name in _SINGLE or name in _MANY:
            return Call((_SINGLE | _MANY)[name], of)
        if name not in _FUNCTIONS:
            raise _refused(f"polars' {name} has no counterpart here.")
        return _FUNCTIONS[name](self, inner["input"], of, options)


def _values(tree: Json) -> list[Any]:
    """The values of a literal, which this process made itself."""
    found = pl.select(pl.Expr.deserialize(io.StringIO(json.dumps(tree)), format="json")).to_series()
    if found.dtype.is_nested():
        found = found.explode()
    if found.dtype == pl.Duration:
        return [value / 86_400_000 for value in found.dt.total_milliseconds().to_list()]  # days
    if found.dtype in (pl.Date, pl.Datetime):
        return [value / 86_400_000 for value in found.cast(pl.Datetime("ms")).dt.epoch("ms").to_list()]
    if found.dtype.is_decimal():
        found = found.cast(pl.Float64)
    return found.to_list()


def _between(reader: _Reader, parts: list[Json], of: list[Expression], options: Json) -> Expression:
    closed = options.get("closed", "Both") if isinstance(options, dict) else "Both"
    low = Call("ge" if closed in ("Both", "Left") else "gt", [of[0], of[1]])
    return Call("and", [low, Call("le" if closed in ("Both", "Right") else "lt", [of[0], of[2]])])


def _in(reader: _Reader, parts: list[Json], of: list[Expression], options: Json) -> Expression:
    return Call("is_in", [reader.read(parts[0]), *map(Lit, _values(parts[1]))])


def _clip(reader: _Reader, parts: list[Json], of: list[Expression], options: Json) -> Expression:
    if not (options.get("has_min") and options.get("has_max")):
        raise _refused("clip needs both bounds.", ".clip(0, 100), say.")
    return Call("clip", of)


def _cut(reader: _Reader, parts: list[Json], of: list[Expression], options: Json) -> Expression:
    """Categories by breaks, of cut() or of bin_intervals(); without labels, as polars names them."""
    method = options.get("method", {}).get("Intervals")
    if method is not None:
        breaks = _values({"Literal": {"Scalar": {"List": method["spec"]["Breaks"]}}})
        right = bool(method["right_closed"])
    elif "breaks" in options:
        breaks, right = [float(point) for point in options["breaks"]], not options.get("left_closed")
    else:
        raise _refused(
            "Bins whose edges follow from the records have no counterpart here.", "Name the edges."
        )
    ends = [-math.inf, *map(float, breaks), math.inf]
    plain = [f"({a:g}, {b:g}]" if right else f"[{a:g}, {b:g})" for a, b in pairwise(ends)]
    labels = options.get("labels") or plain
    value, last = reader.read(parts[0]), Lit(labels[-1])  # type: tuple[Expression, Expression]
    for point, label in reversed(list(zip(breaks, labels[:-1], strict=True))):
        last = Call("when", [Call("le" if right else "lt", [value, Lit(float(point))]), Lit(label), last])
    return Call("when", [Call("is_null", [value]), Lit(None), last])


def _log(reader: _Reader, parts: list[Json], of: list[Expression], options: Json) -> Expression:
    base = of[1] if len(of) > 1 else Lit(float(options["base"]) if "base" in options else math.e)
    logarithm = Call("log", [of[0]])
    natural = isinstance(base, Lit) and base.value == math.e
    return logarithm if natural else Call("div", [logarithm, Call("log", [base])])


def _isnt(fn: str) -> Callable[..., Expression]:
    return lambda reader, parts, of, options: Call("not", [Call(fn, of)])


_FUNCTIONS: dict[str, Callable[[_Reader, list[Json], list[Expression], Json], Expression]] = {
    "IsNotNull": _isnt("is_null"),
    "IsBetween": _between,
    "IsIn": _in,
    "Clip": _clip,
    "Cut": _cut,
    "Bin": _cut,
    "Log": _log,
    "Log1p": lambda reader, parts, of, options: Call("log", [Call("add", [of[0], Lit(1.0)])]),
    "Negate": lambda reader, parts, of, options: Call("sub", [Lit(0), of[0]]),
    "Ceil": lambda reader, parts, of, options: Call(
        "sub", [Lit(0), Call("floor", [Call("sub", [Lit(0), of[0]])])]
    ),
    "Sqrt": lambda reader, parts, of, options: Call("sqrt", [of[0]]),
    "Generic": lambda reader, parts, of, options: Call("pow", of),
    "Round": lambda reader, parts, of, options: Call("round", [of[0], Lit(int(options.get("decimals", 0)))]),
    "Coalesce": lambda reader, parts, of, options: reduce(lambda a, b: Call("fill_null", [a, b]), of),
}
