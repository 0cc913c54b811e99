"""Drafts the description of one column from public knowledge and what the custodian says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import polars as pl

from rapha_lab.custodian.answers import Asker, Check
from rapha_lab.custodian.known import proposed
from rapha_lab.custodian.tables import Found, glance, nameable
from rapha_lab.protocol.errors import RequestError

__all__ = ["COPIED", "MARKS", "UNSET", "draft", "fitting", "lines", "look", "one_of", "word"]

UNSET = "TO BE SET"
TYPES = ("number", "integer", "boolean", "category", "text", "image")
COPIED = "Read off the records on {day}, as the custodian chose for this item."
MARKS = {
    "stored": "# as it is stored",
    "public": "# public knowledge",
    "custodian": "# said by the custodian",
    "copied": "# COPIED FROM THE RECORDS",
}


def draft(asker: Asker, found: Found, of: str, name: str, code: str) -> list[str]:
    """The column's lines of TOML, none if the custodian leaves it out.

    Args:
        asker: whom to ask.
        found: the table it is in.
        of: what the table is called, for the questions' keys.
        name: what cells call it.
        code: of a MEDS folder, the code it speaks of.

    Raises:
        RequestError: naming the question whose answer does not fit.
    """
    if not nameable(name):
        asker.tell(f"{name!r} is left out: no cell can write its name.")
        return []
    key, stored = f"{of}.{name}", "numeric_value" if code else name
    suggested = (
        "category"
        if code.endswith("//")
        else _suggested(name, None if found.untyped or code else found.columns[name])
    )

    def records() -> pl.Series:
        return found.column(stored)

    question = f"{key}: {', '.join(TYPES)}, or skip; look shows its records to you alone"
    type_ = look(asker, f"{key}.type", question, suggested, records, one_of(f"{key}.type", *TYPES, "skip"))
    if type_ == "skip":
        return []
    meaning = asker.ask(f"{key}.meaning", f"{name}: what it means, in one sentence")
    mark = MARKS["stored" if type_ == suggested else "custodian"]
    page = [f"name = {_toml(name)}", f"type = {_toml(type_)}  {mark}", *lines({"meaning": meaning})]
    page += [f"code = {_toml(code)}"] if code else []
    reason = {"boolean": "A yes or no.", "text": "Words are hashed by a public function."}.get(type_, "")
    more: list[str] = []
    if type_ in ("number", "integer", "image"):
        more, reason = _bounds(asker, key, name, type_, records)
    elif type_ == "category":
        more, reason = _categories(asker, key, code, lambda: found.column("code" if code else name))
    elif type_ == "text":
        tokens = asker.ask(f"{key}.tokens", "Words of it that count", "256", fitting(f"{key}.tokens", _WHOLE))
        more = [f"tokens = {tokens}", "vocabulary = 8192"]
    if type_ == "image":
        check = fitting(f"{key}.shape", r"\d+(, *\d+)*")
        more.append(f"shape = [{asker.ask(f'{key}.shape', 'Channels, rows, columns', '1, 64, 64', check)}]")
    question = f"{name}: can a patient lack it (possible or never)"
    absent = asker.ask(f"{key}.missing", question, "possible", one_of(f"{key}.missing", "possible", "never"))
    return [*page, *more, f'missing = "{absent}"  {MARKS["custodian"]}', f"public = {_toml(reason or UNSET)}"]


def look(
    asker: Asker, key: str, question: str, default: str, records: Callable[[], pl.Series], check: Check
) -> str:
    """The answer to a question at which the custodian may `look` at the records first."""

    def or_look(given: str) -> None:
        if given != "look":
            check(given)

    while (given := asker.ask(key, question, default, or_look)) == "look":
        asker.tell(glance(records()))
    return given


def _bounds(
    asker: Asker, key: str, name: str, type_: str, records: Callable[[], pl.Series]
) -> tuple[list[str], str]:
    known = proposed(name) if type_ != "image" else ("", (0.0, 255.0), "linear", "Pixels of eight bits.")
    default = f"{known[1][0]:g}, {known[1][1]:g}" if known else ""
    question = f"{key}: smallest and largest value, from public knowledge; look, or copy to take them from the records"
    given = look(asker, f"{key}.bounds", question, default, records, lambda said: _ends(key, said))
    unit = asker.ask(f"{key}.unit", f"{key}: unit", known[0] if known else "") if type_ != "image" else ""
    page = [f"unit = {_toml(unit)}"] if unit else []
    if not given:
        return [*page, f"bounds = {UNSET}"], ""
    if given == "copy":
        return [*page, f"bounds = {_toml(_extremes(records(), key))}  {MARKS['copied']}"], _copied()
    line = f"bounds = {_toml(_ends(key, given))}"
    if known and given == default:
        scale = [f'scale = "{known[2]}"'] if known[2] == "log" else []
        return [*page, f"{line}  {MARKS['public']}", *scale], known[3]
    reason = asker.ask(f"{key}.public", f"{key}: why these are public knowledge")
    return [*page, f"{line}  {MARKS['custodian']}"], reason


def _categories(asker: Asker, key: str, code: str, records: Callable[[], pl.Series]) -> tuple[list[str], str]:
    question = f"{key}: all categories, separated by semicolons; look, or copy to take them from the records"
    given = look(asker, f"{key}.categories", question, "", records, lambda said: None)
    if not given:
        return [f"categories = {UNSET}"], ""
    if given == "copy":
        values = records().drop_nulls().cast(pl.String)
        if code:
            values = values.filter(values.str.starts_with(code)).str.strip_prefix(code)
        return [f"categories = {_toml(sorted(values.unique()))}  {MARKS['copied']}"], _copied()
    listed = [part.strip() for part in given.split(";") if part.strip()]
    reason = asker.ask(f"{key}.public", f"{key}: why these are public knowledge")
    return [f"categories = {_toml(listed)}  {MARKS['custodian']}"], reason


def _suggested(name: str, kind: pl.DataType | None) -> str:
    """The type that a column's name and stored type speak for; nothing is guessed from values."""
    if kind is None:
        return "skip"
    if name.lower().endswith("_concept_id"):  # OMOP's codes
        return "category"
    if kind == pl.Boolean:
        return "boolean"
    if kind.is_integer():
        return "integer"
    if kind.is_numeric():
        return "number"
    return "image" if isinstance(kind, pl.List | pl.Array) else "skip"


def _extremes(series: pl.Series, key: str) -> list[float]:
    numbers = series.cast(pl.Float64, strict=False).drop_nulls().drop_nans()
    numbers = numbers.filter(numbers.is_finite())
    if len(numbers) == 0:
        raise RequestError(f"{key} holds no number to copy.", field=f"{key}.bounds")
    return [float(numbers.min()), float(numbers.max())]  # type: ignore[arg-type]


def _ends(key: str, given: str) -> list[float]:
    """Two numbers out of "0, 120"; none out of "" or "copy"."""
    if given in ("", "copy"):
        return []
    try:
        low, high = (float(part) for part in given.split(","))
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise _bad(f"{key}.bounds", given, 'Write two numbers, the smaller first, as in "0, 120".')
    return [low, high]


_WHOLE = r"\d{1,9}"


def fitting(key: str, pattern: str = _WHOLE, *, empty: bool = False) -> Check:
    """Lets an answer of that pattern pass, by default a whole number."""

    def check(given: str) -> None:
        if not (re.fullmatch(pattern, given) or (empty and not given)):
            instead = "Write a whole number." if pattern == _WHOLE else f"It has the form {pattern}"
            raise _bad(key, given, instead)

    return check


def one_of(key: str, *answers: str) -> Check:
    """Lets one of these answers pass."""

    def check(given: str) -> None:
        if given not in answers:
            raise _bad(key, given, f"There are {', '.join(answers)}.")

    return check


def word(asker: Asker, key: str, question: str, default: str) -> str:
    """A short name."""
    plain = re.sub(r"\.(parquet|csv|duckdb|snapshot)\b", "", default.rstrip("/")).rpartition("/")[2]
    plain = re.sub(r"[^A-Za-z0-9_]", "_", plain)[:32] or "table"
    return asker.ask(key, question, plain, fitting(key, r"[A-Za-z_][A-Za-z0-9_-]{0,31}"))


def lines(fields: dict[str, Any]) -> list[str]:
    """Fields as lines of TOML; what is empty is yet to be set."""
    return [f"{key} = {_toml(value or UNSET)}" for key, value in fields.items()]


def _bad(key: str, given: str, instead: str) -> RequestError:
    return RequestError(f"{given[:64]!r} is no answer to {key}.", "", instead, field=key)


def _copied() -> str:
    return COPIED.format(day=datetime.now(UTC).date())


def _toml(value: Any) -> str:
    """A text, a number or a list of them as TOML, unless it is yet to be set."""
    return UNSET if value == UNSET else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
