"""Finds records that were printed without being a table: a column, one row, a record a line, a note."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["columns_in", "is_series", "note_in", "records_in"]

Columns = dict[str, list[str]]

_SERIES = re.compile(r"^(?:Name: (.+?), )?(?:Length: \d+, )?dtype: [\w\[\], ]+$")
_POLARS = re.compile(r"Series: '(.+?)' \[[^\]]+\]\n\[\n(.*?)\n\]", re.DOTALL)
_GLIMPSE = re.compile(r"^\$ (.+?)\s+<[^>]+> (.+)$", re.MULTILINE)
_VALUE = r"""(?:'[^']*'|"[^"]*"|[^,()'"]+)"""
_CALL = re.compile(rf"\b\w+\((\w+={_VALUE}(?:, \w+={_VALUE})*)\)")
_FIELD = re.compile(rf"(\w+)=({_VALUE})")
_NOTE = re.compile(
    r"\b(?:MRN|NHS|DOB|date of birth|hospital|patient|medical record)(?: (?:no|number|id))?\b[.:# ]*"
    r"(?:\d{3}[ -]?\d{3}[ -]?\d{4}|\d{5,}|\d{1,2}[./-]\d{1,2}[./-]\d{2,4}|\d{4}-\d{2}-\d{2})",
    re.IGNORECASE,
)


def columns_in(text: str) -> Iterator[Columns]:
    """Columns by name, printed as a pandas or polars series, as one row of a frame, or by `glimpse`."""
    for name, values in _POLARS.findall(text):
        yield {"": [], name: [value.strip(" \t\"'") for value in values.splitlines()]}
    if shown := _GLIMPSE.findall(text):
        yield {name: [value.strip("'\" ") for value in values.split(",")] for name, values in shown}
    for block in re.split(r"\n\s*\n", text):
        yield from _series([line for line in block.splitlines() if line.strip()])


def is_series(lines: list[str]) -> bool:
    """Whether they are a printed pandas series, by the last one."""
    return len(lines) > 2 and _SERIES.match(lines[-1].strip()) is not None


def _series(lines: list[str]) -> Iterator[Columns]:
    """Labels and values of a printed series, each alone since neither describes the other, and the row they may be."""
    if not is_series(lines) or not (name := _SERIES.match(lines[-1].strip())[1]):  # type: ignore[index]
        return  # without a name it is a statistic of each column
    pairs = [line.rsplit(None, 1) for line in lines[:-1]]
    if len(pairs[0]) == 1:
        index, pairs = pairs[0][0], pairs[1:]  # its index has a name
    else:
        index = ""
    rows = [(label.strip(), value) for label, value in (pair for pair in pairs if len(pair) == 2)]
    yield {"": [], index: [label for label, _ in rows]}
    yield {"": [], name: [value for _, value in rows]}
    yield {label: [value] for label, value in rows}


def records_in(text: str) -> Iterator[list[Any]]:
    """Records printed one after the other: JSON, dictionaries or tuples a line, or objects as `Row(id=1, age=63)`."""
    lines = [found for line in text.splitlines() if (found := _literal(line.strip().rstrip(","))) is not None]
    if len(lines) > 1:
        yield lines
    calls = [dict(_FIELD.findall(fields)) for fields in _CALL.findall(text)]
    if len(calls) > 1:
        yield [{name: value.strip("'\"") for name, value in call.items()} for call in calls]


def _literal(line: str) -> Any:
    if line[:1] + line[-1:] not in ("{}", "()"):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(line)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, (dict, tuple)) and found else None
    return None


def note_in(text: str) -> bool:
    """Whether a text names a person by a record number or a date of birth, as a clinical note does."""
    return _NOTE.search(text) is not None
