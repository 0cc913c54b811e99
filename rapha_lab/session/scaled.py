"""Numbers in a loop are scaled, -1 and 1 being public bounds: said where a number in the column's own unit is meant."""

from __future__ import annotations

import math
from typing import Any

from rapha_lab.protocol.columns import Column
from rapha_lab.protocol.errors import ProgramError

__all__ = ["place", "refuse_unscaled", "words"]

_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}


def words(column: Column) -> str:
    """What -1 and 1 are of this number."""
    low, high = column.limits
    log = " on a log scale" if column.scale == "log" else ""
    return f"-1 and 1 are {low:g} and {high:g} {column.unit}".rstrip() + log


def place(column: Column, value: float) -> float:
    """A value of the column as loops see it, -1 to 1 within the bounds."""
    (low, high), log = column.limits, column.scale == "log"
    if log:
        low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
    return 2 * (value - low) / (high - low) - 1


def refuse_unscaled(column: Column, written: str, function: str, value: Any, line: int | None) -> None:
    """Raise ProgramError for a comparison of a scaled number with one beyond -1 and 1, which has one answer for all."""
    sign = _SIGNS.get(function.strip("_"))
    if sign is None or isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) <= 1:
        return
    within = min(1.0, max(-1.0, place(column, value)))
    raise ProgramError(
        f"{written} {sign} {value:g} is the same for every patient.",
        f"{column.name} is scaled: {words(column)}.",
        f"Write {written} {sign} {within:.4g}.", field=column.name, line=line,
    )  # fmt: skip
