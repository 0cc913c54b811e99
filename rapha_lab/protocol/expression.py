"""Cohorts in expressions: what makes a patient one of a cohort, and a column out of other columns.

An expression is a small tree in JSON over a closed list of functions, each of one patient's own values; nothing
in it can speak of two patients, resolve a name of Python's or run code. Its type, bounds, categories and whether
it can be missing follow from the public schema alone, by interval arithmetic, so that a derived column is as
public as the ones it is made of. The curator clamps what it computes to these bounds: privacy rests on the
clamp, not on the arithmetic here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any, Literal, Union

import msgspec
from msgspec import Meta

from rapha_lab.protocol.columns import LARGEST
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import Column, Schema, Table

__all__ = [
    "FUNCTIONS", "Call", "Col", "Expression", "Lit", "Over", "Typed", "check_rows", "extended", "names", "scope_in",
    "scope_of", "text", "typed", "typed_in", "united",
]  # fmt: skip

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")]

MOST_NODES, MOST_DEPTH, MOST_CATEGORIES = 500, 40, 1000

MOST_LOOKUPS = 200
"""How often the columns and the filter of one question may look through all rows of a table."""

DAYS = (-25_567.0, 47_847.0)
"""A table's time as days since 1970: what is dated before 1900 or after 2100 is taken to be at these ends."""


class _Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="is", omit_defaults=True):
    """A part of an expression."""


class Col(_Node, frozen=True, tag="col"):
    """A column's value."""

    name: Name


class Lit(_Node, frozen=True, tag="lit"):
    """A number, a truth, a category, or nothing."""

    value: bool | int | float | Annotated[str, Meta(max_length=200)] | None


class Call(_Node, frozen=True, tag="call"):
    """A function of other expressions; FUNCTIONS has them."""

    fn: Annotated[str, Meta(max_length=16)]
    of: Annotated[list[Expression], Meta(min_length=1, max_length=MOST_NODES)]


class Over(_Node, frozen=True, tag="over"):
    """One value from all of a patient's own rows of a table in which `where` holds.

    In `of` and `where` a name is a column of the table, its time in days since 1970, or else one of the patient's.
    """

    table: Name
    fn: Literal["len", "count", "sum", "mean", "std", "min", "max", "first", "last", "any", "all", "n_unique"]
    of: Expression | None = None
    where: Expression | None = None


Expression = Union[Col, Lit, Call, Over]  # noqa: UP007 - a recursive type, resolved by name


@dataclass(frozen=True)
class Typed:
    """What is public about an expression's value.

    Attributes:
        type: number, integer, boolean, category, text, or null for nothing but a missing value.
        low, high: of a number; infinite where nothing public bounds it.
        categories: of a category.
        missing: whether it can be missing.
    """

    type: Literal["number", "integer", "boolean", "category", "text", "null"]
    low: float = 0.0
    high: float = 1.0
    categories: tuple[str, ...] = ()
    missing: bool = False

    @property
    def numeric(self) -> bool:
        """Whether one can calculate with it; a truth counts as 0 or 1."""
        return self.type in ("number", "integer", "boolean")


Scope = Mapping[str, Typed]


def scope_of(schema: Schema) -> dict[str, Typed]:
    """The patients' columns by name."""
    return {column.name: of_column(column) for column in schema.columns if column.type in _PLAIN}


def scope_in(table: Table, patients: Scope) -> dict[str, Typed]:
    """The names that an expression over a table's rows may use."""
    own = {column.name: of_column(column) for column in table.columns if column.type in _PLAIN}
    time = {table.time: Typed("number", *DAYS, missing=True)} if table.time else {}
    return {**patients, **own, **time}


_PLAIN = ("number", "integer", "boolean", "category", "text")


def of_column(column: Column) -> Typed:
    """What is public about a column's value."""
    low, high = column.limits if column.type not in ("category", "text") else (0.0, 1.0)
    kind: Any = column.type
    return Typed(kind, low, high, column.categories, column.missing == "possible")


def extended(schema: Schema, derive: Mapping[str, Expression], where: Expression | None = None) -> Schema:
    """The schema with derived columns, each of which may use those before it; checks `where` too.

    Raises:
        RequestError: naming the column, function or name at fault and the fix.
    """
    for name, expression in derive.items():
        if any(column.name == name for column in schema.columns) or name == schema.patient:
            raise RequestError(
                f"There is a column {name} already.", "", "Give the new one another name.", field=name
            )
        if "." in name or name.startswith("__"):
            raise RequestError(f"{name} is no name for a column.", "A dot speaks of a table.", field=name)
        found = typed(expression, schema)
        schema = msgspec.structs.replace(schema, columns=(*schema.columns, _column(name, expression, found)))
    if where is not None and typed(where, schema).type != "boolean":
        what = f"{text(where):.200} is neither true nor false."
        raise RequestError(what, instead='Write a comparison: pl.col("age") > 60, say.', field="where")
    parts = (node for each in (*derive.values(), where) for node in _nodes(each, 0))
    if sum(isinstance(node, Over) for node in parts) > MOST_LOOKUPS:
        what = "The columns and the filter look into tables too often."
        raise RequestError(what, f"{MOST_LOOKUPS} times are the most.", "Ask about fewer.", field="derive")
    return schema


def _column(name: str, expression: Expression, found: Typed) -> Column:
    known: dict[str, Any] = {"name": name, "type": found.type, "missing": "possible"}
    if found.type == "null":
        raise RequestError(f"{name} is always missing.", "Nothing but a null makes it.", field=name)
    if found.type == "text":
        raise RequestError(f"{name} is a text.", "Texts are only compared with words.", field=name)
    if found.type in ("number", "integer"):
        if not max(abs(found.low), abs(found.high)) <= LARGEST:
            raise RequestError(
                f"Nothing public bounds {name}.",
                f"{text(expression):.200} can lie between {found.low:g} and {found.high:g}.",
                "Bound it: (...).clip(0, 100), with a smallest and a largest value that make sense.",
                field=name,
            )
        if not found.low < found.high:
            raise RequestError(f"{name} is always {found.low:g}.", "It says nothing of patients.", field=name)
        known["bounds"] = (found.low, found.high)
    if found.type == "category":
        known["categories"] = found.categories
    if not found.missing:
        known["missing"] = "never"
    return Column(
        meaning=text(expression)[:2000], public="It follows from the columns it is made of.", **known
    )


# -- types -------------------------------------------------------------------------------------------------


def typed(expression: Expression, schema: Schema) -> Typed:
    """What is public about an expression over patients.

    Raises:
        RequestError: naming what does not fit.
    """
    if sum(1 for _ in islice(_nodes(expression, 0), MOST_NODES + 1)) > MOST_NODES:
        raise RequestError("An expression is too long.", f"{MOST_NODES} parts are the most.", field="where")
    return typed_in(expression, scope_of(schema), schema)


def typed_in(expression: Expression, scope: Scope, schema: Schema | None) -> Typed:
    """As `typed`, where names have these meanings; without a schema there are no tables to look at."""
    if isinstance(expression, Col):
        return _found(expression.name, scope)
    if isinstance(expression, Lit):
        return _literal(expression.value)
    if isinstance(expression, Over):
        return _over(expression, scope, schema)
    if expression.fn not in FUNCTIONS:
        near = difflib.get_close_matches(expression.fn, FUNCTIONS, n=1)
        raise RequestError(
            f"{expression.fn} is no function of expressions.",
            f"There are {', '.join(FUNCTIONS)}.",
            f"Did you mean {near[0]}?" if near else "",
            field=expression.fn,
        )
    fewest, most, rule = FUNCTIONS[expression.fn]
    if not fewest <= len(expression.of) <= most:
        raise RequestError(f"{expression.fn} does not take {len(expression.of)} values.", field=expression.fn)
    return rule(expression, [typed_in(part, scope, schema) for part in expression.of])


def check_rows(where: Expression | None, table: Table, schema: Schema) -> None:
    """Raise RequestError unless `where` is true or false of each row of the table."""
    node = Over(table.name, "len", None, where)
    typed(node, schema)


def _nodes(expression: Expression | None, depth: int) -> Iterator[Expression]:
    if expression is None:
        return
    if depth > MOST_DEPTH:
        raise RequestError("An expression is nested too deep.", f"{MOST_DEPTH} levels are the most.")
    yield expression
    parts: list[Any] = []
    if isinstance(expression, Call):
        parts = expression.of
    elif isinstance(expression, Over):
        parts = [expression.of, expression.where]
    for part in parts:
        yield from _nodes(part, depth + 1)


def names(expression: Expression | None) -> set[str]:
    """The columns it speaks of, those of tables' rows included."""
    return {node.name for node in _nodes(expression, 0) if isinstance(node, Col)}


def _found(name: str, scope: Scope) -> Typed:
    if name not in scope:
        near = difflib.get_close_matches(name, scope, n=3, cutoff=0.5)
        instead = f"Did you mean {' or '.join(near)}?" if near else "The dataset's card lists its columns."
        raise RequestError(f"There is no column {name!r} here.", "", instead, field=name)
    return scope[name]


def _literal(value: bool | int | float | str | None) -> Typed:
    if value is None:
        return Typed("null", missing=True)
    if isinstance(value, str):
        return Typed("category", categories=(value,))
    if isinstance(value, bool):
        return Typed("boolean", float(value), float(value))
    if not abs(value) <= 1e15:
        raise RequestError("A number is too large.", "1e15 is the largest.", field="where")
    return Typed("integer" if isinstance(value, int) else "number", float(value), float(value))


def _over(node: Over, patients: Scope, schema: Schema | None) -> Typed:
    table = next((t for t in (schema.tables if schema else ()) if t.name == node.table), None)
    if table is None:
        what = f"There is no table {node.table!r} here."
        known = ", ".join(t.name for t in schema.tables) if schema and schema.tables else "none"
        raise RequestError(what, f"The dataset's tables: {known}.", field="table")
    scope = scope_in(table, patients)
    if node.where is not None and typed_in(node.where, scope, None).type != "boolean":
        raise RequestError(f"{text(node.where):.200} is neither true nor false.", field="where")
    if node.fn == "len":
        return Typed("integer", 0.0, float(table.most))
    if node.of is None:
        raise RequestError(f"{node.fn} of what?", instead='Say pl.col("value").mean(), say.', field=node.fn)
    of = typed_in(node.of, scope, None)
    if node.fn in ("count", "n_unique"):
        return Typed("integer", 0.0, float(table.most))
    if node.fn in ("any", "all"):
        if of.type != "boolean":
            raise RequestError(f"{node.fn} is of truths, not of a {of.type}.", field=node.fn)
        return Typed("boolean")
    if node.fn in ("first", "last") and of.type != "text":
        if not table.time:
            raise RequestError(
                f"The table {table.name} has no time.", f"So it has no {node.fn}.", field=node.fn
            )
        return replace(of, missing=True)
    if not of.numeric:
        raise RequestError(f"A {of.type} has no {node.fn}.", instead="Use len, first or last.", field=node.fn)
    if node.fn in ("sum", "mean", "std") and not math.isfinite(of.high - of.low):
        what = f"Nothing public bounds {text(node.of):.200}."
        raise RequestError(
            what, f"So it has no {node.fn}.", "Bound it first: (...).clip(0, 100), say.", field=node.fn
        )
    if node.fn == "sum":
        return Typed(_whole(of), min(0.0, table.most * of.low), max(0.0, table.most * of.high))
    if node.fn == "std":
        return Typed("number", 0.0, of.high - of.low, missing=True)
    return Typed("number" if node.fn == "mean" else _whole(of), of.low, of.high, missing=True)


# -- the functions -----------------------------------------------------------------------------------------

Rule = Callable[[Call, list[Typed]], Typed]


def _whole(*of: Typed) -> Literal["number", "integer"]:
    return "number" if any(part.type == "number" for part in of) else "integer"


def _numbers(call: Call, of: list[Typed]) -> list[tuple[float, float]]:
    for part, node in zip(of, call.of, strict=True):
        if not (part.numeric or part.type == "null"):
            what = f"{text(node):.200} is a {part.type}."
            raise RequestError(what, f"{call.fn} is of numbers.", field=call.fn)
    return [(part.low, part.high) for part in of]


def _calculated(of: list[Typed], ends: list[float], *, whole: bool = True, missing: bool = False) -> Typed:
    low, high = (-math.inf, math.inf) if any(map(math.isnan, ends)) else (min(ends), max(ends))
    exact = whole and _whole(*of) == "integer" and max(abs(low), abs(high)) < 2**53
    return Typed("integer" if exact else "number", low, high, (), missing or any(p.missing for p in of))


def _add(call: Call, of: list[Typed]) -> Typed:
    (a, b), (c, d) = _numbers(call, of)
    return _calculated(of, [a + c, b + d] if call.fn == "add" else [a - d, b - c])


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _mul(call: Call, of: list[Typed]) -> Typed:
    x, y = _numbers(call, of)
    return _calculated(of, [_times(a, b) for a in x for b in y])


def _div(call: Call, of: list[Typed]) -> Typed:
    x, (low, high) = _numbers(call, of)
    if low <= 0 <= high:
        return _calculated(of, [-math.inf, math.inf], whole=False, missing=True)
    return _calculated(of, [a / b for a in x for b in (low, high)], whole=False)


def _pow(call: Call, of: list[Typed]) -> Typed:
    (low, high), (power, same) = _numbers(call, of)
    if (
        not isinstance(call.of[1], Lit)
        or power != same
        or not 0 <= power <= 8
        or not float(power).is_integer()
    ):
        raise RequestError(
            "A power is a whole number from 0 to 8.", instead="Write sqrt, exp or log else.", field="pow"
        )
    ends = [_raised(low, power), _raised(high, power)] + ([0.0] if low < 0 < high else [])
    return _calculated(of, ends)


def _raised(base: float, power: float) -> float:
    try:
        return float(base**power)
    except OverflowError:
        return math.inf if base > 0 or power % 2 == 0 else -math.inf


def _grows(
    function: Callable[[float], float],
    *,
    whole: bool = False,
    lost: Callable[[float], bool] = lambda low: False,
) -> Rule:
    """A function that never falls; `lost` if it has no value for an argument as low as that."""

    def rule(call: Call, of: list[Typed]) -> Typed:
        ((low, high),) = _numbers(call, of)
        made = _calculated(of, [function(low), function(high)], whole=False, missing=lost(low))
        return replace(made, type="integer") if whole and abs(made.low) < 2**53 > abs(made.high) else made

    return rule


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def _log(x: float) -> float:
    return -math.inf if x <= 0 else math.log(x)


def _floor(x: float) -> float:
    return float(math.floor(x)) if math.isfinite(x) else x


def _abs(call: Call, of: list[Typed]) -> Typed:
    ((low, high),) = _numbers(call, of)
    return _calculated(of, [abs(low), abs(high)] + ([0.0] if low < 0 < high else []))


def _round(call: Call, of: list[Typed]) -> Typed:
    (low, high), (digits, same) = _numbers(call, of)
    if not isinstance(call.of[1], Lit) or digits != same or digits not in range(0, 7):
        raise RequestError("Round to 0 to 6 digits.", field="round")
    made = _calculated(
        of, [round(low, int(digits)), round(high, int(digits))] if math.isfinite(high - low) else [low, high]
    )
    return replace(made, type="integer") if not digits and abs(made.low) < 2**53 > abs(made.high) else made


def _clip(call: Call, of: list[Typed]) -> Typed:
    (low, high), (least, same), (most, also) = _numbers(call, of)
    fixed = all(isinstance(part, Lit) for part in call.of[1:])
    if not fixed or least != same or most != also or not least <= most or of[1].type == "null":
        raise RequestError(
            "clip needs two numbers, the smaller first.", instead=".clip(0, 100), say.", field="clip"
        )
    ends = [min(max(low, least), most), min(max(high, least), most)]
    return replace(_calculated(of, ends), missing=of[0].missing)


def _extreme(call: Call, of: list[Typed]) -> Typed:
    """The least or largest of those that are known."""
    ends, best = _numbers(call, of), min if call.fn == "min" else max
    known = [pair for pair, part in zip(ends, of, strict=True) if not part.missing]
    # one that may lack may also be the only one
    reach = [best(a for a, _ in ends), best(b for _, b in ends)] + [x for pair in ends for x in pair] * (
        not known
    )
    return replace(_calculated(of, reach), missing=not known)


def _compare(call: Call, of: list[Typed]) -> Typed:
    a, b = of
    missing = a.missing or b.missing
    ordered = call.fn not in ("eq", "ne")
    if (a.numeric and b.numeric) or (
        "null" in (a.type, b.type) and not (ordered and "text" in (a.type, b.type))
    ):
        return Typed("boolean", missing=missing)
    if a.type == b.type == "category" and not ordered:
        _listed(call.of[0], a, [call.of[1]])
        _listed(call.of[1], b, [call.of[0]])
        united(a, b, call.fn)
        return Typed("boolean", missing=missing)
    words = call.of[0 if a.type == "category" else 1]
    if {a.type, b.type} == {"text", "category"} and isinstance(words, Lit) and not ordered:
        return Typed("boolean", missing=missing)
    what = f"A {a.type} and a {b.type} cannot be compared by {call.fn}."
    raise RequestError(what, f"In {text(call):.200}.", field=call.fn)


def _listed(of: Expression, kind: Typed, literals: list[Expression]) -> None:
    """Whether the categories that are named are among the public ones."""
    for literal in literals:
        if isinstance(of, Lit) or not isinstance(literal, Lit) or not isinstance(literal.value, str):
            continue
        if literal.value not in kind.categories:
            near = difflib.get_close_matches(literal.value, kind.categories, n=1)
            instead = (
                f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(kind.categories[:12])}."
            )
            raise RequestError(
                f"{text(of):.100} is never {literal.value!r:.60}.", "", instead, field=text(of)[:64]
            )


def _is_in(call: Call, of: list[Typed]) -> Typed:
    for literal in call.of[1:]:
        if not isinstance(literal, Lit) or literal.value is None:
            raise RequestError("is_in needs a list of values.", field="is_in")
    first, rest = of[0], of[1:]
    if first.type != "text":
        _listed(call.of[0], first, call.of[1:])
    if any((part.type == "category") != (first.type in ("category", "text")) for part in rest):
        raise RequestError(f"A {first.type} is none of these values.", field="is_in")
    return Typed("boolean", missing=first.missing)


def _truths(call: Call, of: list[Typed]) -> Typed:
    for part, node in zip(of, call.of, strict=True):
        if part.type not in ("boolean", "null"):
            why = "Put comparisons in parentheses: (pl.col('age') > 60) & (...)."
            raise RequestError(f"{text(node):.200} is neither true nor false.", why, field=call.fn)
    return Typed("boolean", missing=any(part.missing for part in of))


def _is_null(call: Call, of: list[Typed]) -> Typed:
    return Typed("boolean")


def united(a: Typed, b: Typed, where: str) -> Typed:
    """The type of what is either of two."""
    if "text" in (a.type, b.type):
        raise RequestError("A text is only compared with words.", field=where)
    if "null" in (a.type, b.type):
        return replace(b if a.type == "null" else a, missing=True)
    missing = a.missing or b.missing
    if a.type == b.type == "category":
        both = tuple(dict.fromkeys((*a.categories, *b.categories)))
        if len(both) > MOST_CATEGORIES:
            raise RequestError(
                f"{where} has {len(both)} categories.", f"{MOST_CATEGORIES} are the most.", field=where
            )
        return Typed("category", categories=both, missing=missing)
    if a.type == b.type == "boolean":
        return Typed("boolean", missing=missing)
    if a.type in ("number", "integer") and b.type in ("number", "integer"):
        return Typed(_whole(a, b), min(a.low, b.low), max(a.high, b.high), (), missing)
    raise RequestError(f"{where} is a {a.type} or a {b.type}.", "It must be one of them.", field=where)


def _when(call: Call, of: list[Typed]) -> Typed:
    if of[0].type not in ("boolean", "null"):
        raise RequestError(f"{text(call.of[0]):.200} is neither true nor false.", field="when")
    return united(of[1], of[2], "when")


def _fill_null(call: Call, of: list[Typed]) -> Typed:
    return replace(united(of[0], of[1], "fill_null"), missing=of[0].missing and of[1].missing)


def _to_number(call: Call, of: list[Typed]) -> Typed:
    ((low, high),) = _numbers(call, of)
    return Typed("number", low, high, (), of[0].missing)


def _to_integer(call: Call, of: list[Typed]) -> Typed:
    ((low, high),) = _numbers(call, of)
    if not max(abs(low), abs(high)) < 2**53:
        raise RequestError(
            "Nothing public bounds what is to be whole.", instead="Clip it first.", field="integer"
        )
    return Typed("integer", float(math.trunc(low)), float(math.trunc(high)), (), of[0].missing)


FUNCTIONS: dict[str, tuple[int, int, Rule]] = {
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), (2, 2, _compare)),
    "and": (1, MOST_NODES, _truths),
    "or": (1, MOST_NODES, _truths),
    "not": (1, 1, _truths),
    "is_null": (1, 1, _is_null),
    "is_in": (2, MOST_NODES, _is_in),
    "add": (2, 2, _add),
    "sub": (2, 2, _add),
    "mul": (2, 2, _mul),
    "div": (2, 2, _div),
    "pow": (2, 2, _pow),
    "abs": (1, 1, _abs),
    "sqrt": (1, 1, _grows(lambda x: math.sqrt(max(x, 0.0)), lost=lambda low: low < 0)),
    "exp": (1, 1, _grows(_exp)),
    "log": (1, 1, _grows(_log, lost=lambda low: low < 0)),
    "floor": (1, 1, _grows(_floor, whole=True)),
    "round": (2, 2, _round),
    "clip": (3, 3, _clip),
    "min": (1, MOST_NODES, _extreme),
    "max": (1, MOST_NODES, _extreme),
    "when": (3, 3, _when),
    "fill_null": (2, 2, _fill_null),
    "number": (1, 1, _to_number),
    "integer": (1, 1, _to_integer),
}
"""By name: the fewest and the most arguments, and the type of the value from theirs."""


# -- words -------------------------------------------------------------------------------------------------

_SIGNS = {
    "eq": "=", "ne": "≠", "lt": "<", "le": "≤", "gt": ">", "ge": "≥", "add": "+", "sub": "-", "mul": "*",
    "div": "/", "pow": "^", "and": "and", "or": "or",
}  # fmt: skip


def text(expression: Expression) -> str:
    """The expression in words, for cards and messages."""
    if isinstance(expression, Col):
        return expression.name
    if isinstance(expression, Lit):
        return "missing" if expression.value is None else str(expression.value)
    if isinstance(expression, Over):
        of = f" of {text(expression.of)}" if expression.of is not None else ""
        where = f" where {text(expression.where)}" if expression.where is not None else ""
        return f"({expression.fn}{of} in {expression.table}{where})"
    parts = [text(part) for part in expression.of]
    if expression.fn in _SIGNS:
        return f"({f' {_SIGNS[expression.fn]} '.join(parts)})"
    if expression.fn == "when" and len(parts) == 3:
        return f"({parts[1]} if {parts[0]} else {parts[2]})"
    return f"{expression.fn}({', '.join(parts)})"
