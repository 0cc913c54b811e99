"""Automatic checks of what waits in the airlock: prompts for the custodian who decides, never a verdict.

The rules and their thresholds are those of acro (Smith et al. 2023, ACRO: a toolkit for semi-automated output
checking) as it ships them: counts below 10, the p % rule at 10 %, the (n, k) rule at two patients and 90 %. A few
things end the matter: a kind of value we have no word for, more than can be looked at, a patient's identifier.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np
import polars as pl
from safetensors.numpy import load, save

from rapha_lab.curator.cohort import View
from rapha_lab.curator.tables import PATIENT
from rapha_lab.protocol.columns import Column
from rapha_lab.protocol.policy import unseen

__all__ = ["Found", "result", "source", "tensors"]

THRESHOLD, NEAR, FEW, SHARE = 10, 0.1, 2, 0.9
MOST, DEPTH, DIGITS = 100_000, 16, 4
PLACES = 5
"""Of each kind of finding so many places are named, and the others counted."""

BLANK_LINES, _BLANKS = 40, re.compile(r"[ \t]{60,}\S")
"""What follows so much of nothing may be out of sight."""

Leaf = tuple[str, Any]


@dataclass
class Found:
    """What the checks found: why it must not leave, if so, what to look at, and what may leave of it.

    `parcel` and `blob` say the same values in the one way there is to say them: with nothing beside them, and
    nothing in spellings, names, headers, or the bits of what is no number.
    """

    stopped: str = ""
    prompts: list[str] = field(default_factory=list)
    parcel: dict[str, Any] = field(default_factory=dict)
    blob: bytes = b""


class _StoppedError(Exception):
    """Why it must not leave, in words of ours alone: they go where the answer would have gone."""


def result(parcel: Any, blob: bytes, view: View, tables: Sequence[str] = ()) -> Found:
    """Check what a reviewed function returned; total, whatever it is.

    Args:
        parcel: its description, as JSON.
        blob: its tensors, safetensors.
        view: the patients it saw.
        tables: the tables with many rows a patient that it saw.
    """
    found = Found()
    try:
        shown = [c for c in view.schema.columns if c.type != "image"]
        seen = [(shown, view.frame([c.name for c in shown]).with_row_index(PATIENT))]
        seen += [
            ([c for c in view.schema.table(t).columns if c.type != "image"], view.table(t)) for t in tables
        ]
        arrays = load(blob) if blob else {}
        spec = parcel["values"]["result"]
        leaves = list(islice(_leaves(spec, "result", arrays, 0), MOST + 1))
        if len(leaves) > MOST:
            raise _StoppedError(f"It has more than the {MOST:,} values that anybody can look at.")
        if any(unseen(text) for place in leaves for text in place if isinstance(text, str)):
            raise _StoppedError("It has characters that nobody sees.")
        if any(isinstance(value, str) and _names(value, view) for _, value in leaves):
            raise _StoppedError("A patient's identifier is in it.")
        if any(isinstance(v, int | float) and abs(v) >= 1000 and view.knows(f"{v:.0f}") for _, v in leaves):
            found.prompts.append("A number in it is also a patient's identifier.")
        numbers = [(w, float(v)) for w, v in leaves if isinstance(v, int | float) and not isinstance(v, bool)]
        numbers = [(where, value) for where, value in numbers if np.isfinite(value)]
        found.prompts += [
            *_sizes(leaves, view),
            *_counts(numbers),
            *_rounding(numbers),
            *_strings(leaves),
            *(line for columns, rows in seen for line in _singled(numbers, columns, rows)),
            *(line for columns, rows in seen for line in _tables(spec, "result", columns, rows)),
        ]
        kept: dict[str, np.ndarray] = {}
        found.parcel = {"values": {"result": _restated(spec, arrays, kept)}}
        found.blob = save(kept) if kept else b""
        found.prompts += [f"Values of {name}: {array.tolist()}" for name, array in kept.items()]
    except _StoppedError as why:
        return Found(str(why))
    except (
        BaseException
    ):  # a panic, too: else a function would tell by what it breaks here what nobody has released
        return Found("It holds something that cannot be looked at.")
    return found


def source(text: str) -> list[str]:
    """What of a function's source a custodian may overlook, or take for something else, by line."""
    lines, goes_on, at = text.split("\n"), list[str](), 1
    for blank, group in groupby(lines, lambda line: not line.strip()):
        size = len(list(group))
        if blank and size >= BLANK_LINES and at + size <= len(lines):
            goes_on.append(f"line {at + size}")
        at += size
    goes_on += [f"line {n}" for n, line in enumerate(lines, 1) if _BLANKS.search(line)]
    foreign = [
        f"line {n} (U+{ord(next(c for c in line if not c.isascii())):04X})"
        for n, line in enumerate(lines, 1)
        if not line.isascii()
    ]
    return [
        *_listed("It goes on after much that is blank", goes_on),
        *_listed("Characters beyond ASCII, which may look like others", foreign),
    ]


def tensors(blob: bytes) -> list[str]:
    """What the tensors are beside an answer: name, kind, shape and range, a line each."""
    lines = []
    for name, array in sorted(load(blob).items()) if blob else ():
        span = f", {float(array.min()):.4g} to {float(array.max()):.4g}" if array.size else ""
        lines.append(f"{name}: {array.dtype} {array.shape}{span}")
    return lines


def _leaves(spec: Any, where: str, arrays: Mapping[str, np.ndarray], depth: int) -> Iterator[Leaf]:
    """Every number and string of a parcel with its place.

    Raises:
        _StoppedError: for a kind that cannot be checked.
    """
    kind = spec["kind"]
    if depth > DEPTH or not isinstance(where, str):
        raise _StoppedError("It is nested too deeply.")
    if kind == "plain" and (spec["value"] is None or isinstance(spec["value"], bool | int | float | str)):
        yield where, spec["value"]
    elif kind == "float":
        yield where, float(spec["value"])
    elif kind in ("tensor", "array"):
        array = arrays[spec["tensor"]]
        if array.size > MOST:
            raise _StoppedError(f"It has an array of more than the {MOST:,} values that anybody can look at.")
        if array.dtype.kind not in "biuf":
            raise _StoppedError(f"It has an array of {array.dtype}, which cannot be checked.")
        for place, value in np.ndenumerate(array):
            yield f"{where}{list(place) if place else ''}", value.item()
    elif kind == "strings":
        yield from _texts(spec["value"], where, depth)
    elif kind in ("list", "tuple"):
        for number, item in enumerate(spec["items"]):
            yield from _leaves(item, f"{where}[{number}]", arrays, depth + 1)
    elif kind in ("dict", "table", "module"):
        parts = spec[{"dict": "items", "table": "columns", "module": "state"}[kind]]
        for name, item in parts.items():
            yield f"a name in {where}", str(name)
            yield from _leaves(item, f"{where}.{name}", arrays, depth + 1)
    else:
        raise _StoppedError("It holds a kind of value that cannot be checked.")


def _texts(value: Any, where: str, depth: int) -> Iterator[Leaf]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, list) and depth <= DEPTH:
        for number, item in enumerate(value):
            yield from _texts(item, f"{where}[{number}]", depth + 1)
    else:
        raise _StoppedError("It holds text that cannot be checked.")


def _restated(spec: Any, arrays: Mapping[str, np.ndarray], kept: dict[str, np.ndarray]) -> dict[str, Any]:
    """What `_leaves` has seen of a parcel, and nothing else; its arrays come into `kept`."""
    kind = spec["kind"]
    if kind == "float":
        return {"kind": kind, "value": repr(float(spec["value"]))}
    if kind in ("tensor", "array"):
        array, name = arrays[spec["tensor"]], str(len(kept))
        if array.dtype.kind == "f":  # one NaN and one zero, of the many that there are
            array = np.where(np.isnan(array), array.dtype.type(np.nan), array + array.dtype.type(0))
        kept[name] = array
        return {"kind": kind, "tensor": name, "grad": False}
    if kind in ("list", "tuple"):
        return {"kind": kind, "items": [_restated(item, arrays, kept) for item in spec["items"]]}
    if kind in ("dict", "table", "module"):
        field = {"dict": "items", "table": "columns", "module": "state"}[kind]
        parts = {str(name): _restated(item, arrays, kept) for name, item in sorted(spec[field].items())}
        return {"kind": kind, field: parts}
    return {"kind": kind, "value": spec["value"]}


def _names(text: str, view: View) -> bool:
    """Whether a text or a word of it is a patient's identifier."""
    words = "".join(c if c.isalnum() or c in "-_./" else " " for c in text).split()
    return any(view.knows(word) for word in [text.strip(), *words])


def _sizes(leaves: list[Leaf], view: View) -> Iterator[str]:
    if len(leaves) > 1000:
        yield f"Size: {len(leaves):,} values. Could a few say the same?"
    for where, value in leaves:
        if not isinstance(value, str) and value == len(view) and len(view) >= THRESHOLD:
            yield f"Size: {where} is the exact number of patients."
            return


def _counts(numbers: list[Leaf]) -> Iterator[str]:
    small = [where for where, value in numbers if 0 < value < THRESHOLD and value == int(value)]
    zeros = [where for where, value in numbers if value == 0]
    yield from _listed(f"Small counts, below {THRESHOLD}, if these are counts", small)
    yield from _listed("Zeros, which say that nobody is there, if these are counts", zeros)


def _rounding(numbers: list[Leaf]) -> Iterator[str]:
    whole = [where for where, v in numbers if abs(v) >= THRESHOLD and v == np.floor(v) and v % 5]
    exact = [where for where, v in numbers if v != np.floor(v) and float(f"{v:.{DIGITS}g}") != v]
    yield from _listed("Not rounded to 5, if these are counts", whole)
    yield from _listed(f"More than {DIGITS} digits", exact)


def _strings(leaves: list[Leaf]) -> Iterator[str]:
    texts = [w for w, v in leaves if isinstance(v, str) and not w.startswith("a name in")]
    yield from _listed("Text, which may say anything", texts)


def _singled(numbers: list[Leaf], columns: Sequence[Column], rows: pl.DataFrame) -> Iterator[str]:
    """Numbers that are some few patients' very own: a minimum, a maximum, a record."""
    for column in columns:
        if column.numeric:
            of = rows.group_by(column.name).agg(pl.col(PATIENT).n_unique())
            rare = set(of.filter(pl.col(PATIENT) < THRESHOLD)[column.name].drop_nulls().cast(pl.Float64))
            places = [w for w, v in numbers if v in rare and v != int(v)]
            yield from _listed(f"Equal to the {column.name} of fewer than {THRESHOLD} patients", places)


def _tables(spec: Any, where: str, columns: Sequence[Column], rows: pl.DataFrame) -> Iterator[str]:
    """For tables by categories of the schema: how many patients stand behind each row, and whether one rules it."""
    if spec["kind"] in ("dict", "list", "tuple"):
        parts = spec["items"].items() if spec["kind"] == "dict" else enumerate(spec["items"])
        for name, item in parts:
            yield from _tables(item, f"{where}.{name}", columns, rows)
    if spec["kind"] != "table":
        return
    known = {c.name: c for c in columns}
    keys = [name for name in spec["columns"] if name in known and not known[name].numeric]
    values = [c.name for c in known.values() if c.numeric and any(_about(n, c.name) for n in spec["columns"])]
    if not keys:
        return
    # what each patient adds to each row, from however many rows of theirs
    each = rows.group_by(*keys, PATIENT).agg(pl.col(name).abs().sum() for name in values)
    groups = each.group_by(keys)
    sizes = groups.len().filter(pl.col("len") < THRESHOLD)
    if len(sizes):
        yield f"Threshold: {len(sizes)} row(s) of {where} stand for fewer than {THRESHOLD} patients."
    for name in values:
        ruled = [str(key) for key, part in groups if _ruled(part[name].sort(descending=True))]
        yield from _listed(f"Dominance: few patients make up most of {name} in these rows of {where}", ruled)


def _about(name: str, column: str) -> bool:
    return name == column or name.startswith(f"{column}_")


def _ruled(sizes: pl.Series) -> bool:
    """The (n, k) rule and the p % rule on a group's contributions, the largest first."""
    total = float(sizes.sum())
    if total <= 0:
        return False
    rest = total - float(sizes[:FEW].sum())
    return float(sizes[:FEW].sum()) > SHARE * total or rest < NEAR * float(sizes[0])


def _listed(what: str, places: list[str]) -> Iterator[str]:
    if places:
        named = ", ".join(
            f"{place} ({n} times)" if n > 1 else place for place, n in Counter(places[:PLACES]).items()
        )
        more = f" and {len(places) - PLACES} more" if len(places) > PLACES else ""
        yield f"{what}: {named}{more}."
