"""Copies a CSV as spreadsheets write it into a Parquet file that a schema can speak of: `rapha-lab data tidy`.

Separators, encodings, names with blanks, decimal commas and dates of a country are settled here, by the custodian and
before a site opens anything, so that what reads records there has one way to read them.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import polars as pl

from rapha_lab.curator.sources.files import BROKEN
from rapha_lab.custodian.tables import nameable
from rapha_lab.protocol.errors import RequestError

__all__ = ["tidy"]

COMMA = r"^-?\d+(,\d+)?$"


def tidy(path: Path, out: Path | None = None, dates: str = "", missing: str = "") -> list[str]:
    """Write the copy, and say to the custodian alone what was changed, a line each. All values stay texts.

    Args:
        path: the CSV: separated by commas, semicolons, tabs or bars; in UTF-8, UTF-16 or Windows' Latin.
        out: the new file; if not given, beside the old one.
        dates: how its dates are written, as in "%d.%m.%Y"; they become 2026-01-31.
        missing: what stands for a value that is not there, beside nothing at all: "n/a; unknown".

    Raises:
        RequestError: it is no CSV, or the new file is there already.
    """
    frame, told = _read(path)
    names = _names(frame.columns)
    told += [f"{old!r} is now {new}" for old, new in zip(frame.columns, names, strict=True) if old != new]
    frame.columns = names
    nothing = ["", *(word.strip() for word in missing.split(";"))]
    frame = frame.select(pl.all().str.strip_chars()).select(pl.when(~pl.all().is_in(nothing)).then(pl.all()))
    made: list[pl.Series] = []
    for column in frame:
        mended, how = _values(column, dates)
        made.append(mended)
        told += [f"{column.name}: {line}" for line in (how, _mixed(mended)) if line]
    out = out or path.with_name(f"{_names([path.stem])[0]}.parquet")
    try:
        with out.open("xb") as file:
            pl.DataFrame(made).write_parquet(file)
    except FileExistsError:
        what = f"{out} exists."
        raise RequestError(what, "Nothing is written over.", "Say --out FILE.", field="out") from None
    return [*told, f"Written: {out}, {len(frame):,} rows. Now: rapha-lab data add {out.parent}"]


def _read(path: Path) -> tuple[pl.DataFrame, list[str]]:
    text, encoding = _decoded(path.read_bytes())
    header = text.partition("\n")[0]
    separator = max(",;\t|", key=header.count)
    try:
        frame = pl.read_csv(text.encode(), separator=separator, infer_schema=False)
    except BROKEN:
        what = f"The file {path.name} cannot be read as a table separated by {separator!r}."
        why = "Some of its lines have more fields than its first, say."
        raise RequestError(what, why, "Write it again.", field="file") from None
    return frame, [f"Read as {encoding}, separated by {separator!r}."]


def _decoded(data: bytes) -> tuple[str, str]:
    first = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    for encoding in (first, "cp1252"):
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), "latin-1"


def _names(given: list[str]) -> list[str]:
    """Each a name that cells can write, and no two alike."""
    names: list[str] = []
    for old in given:
        name = old
        if not nameable(old):
            ascii_ = unicodedata.normalize("NFKD", old.replace("ß", "ss")).encode("ascii", "ignore").decode()
            name = re.sub(r"[^A-Za-z0-9]+", "_", ascii_).strip("_")[:56] or "column"
            name = f"c_{name}" if name[0].isdigit() else name
        alike, number = name, 1
        while name in names:
            number += 1
            name = f"{alike}_{number}"
        names.append(name)
    return names


def _values(column: pl.Series, dates: str) -> tuple[pl.Series, str]:
    """The column with decimal points and ISO dates, where all of it is written another way."""
    known = column.drop_nulls()
    if not len(known):
        return column, ""
    if known.str.contains(COMMA).all() and known.str.contains(",").any():
        return column.str.replace(",", ".", literal=True), "decimal commas are points now"
    if not dates:
        maybe = known.str.contains(r"^\d{1,2}[./-]\d{1,2}[./-]\d{2,4}$").all()
        return column, "if these are dates, say how they are written: --dates %d.%m.%Y" if maybe else ""
    try:
        days = known.str.to_date(dates, strict=False)
    except BROKEN:
        raise RequestError(
            f"{dates!r} is no form of dates.", "", "Write one such as %d.%m.%Y.", field="dates"
        ) from None
    if days.null_count():
        return column, ""
    return column.str.to_date(dates, strict=False).dt.to_string(
        "%Y-%m-%d"
    ), f"dates written {dates} are ISO now"


def _mixed(column: pl.Series) -> str:
    """What is no number in a column of which most are; for the custodian alone."""
    known = column.drop_nulls()
    others = known.filter(known.cast(pl.Float64, strict=False).is_null())
    if not 0 < len(others) < len(known) / 2:
        return ""
    found = others.value_counts(sort=True).head(5).rows()
    words = ", ".join(f"{str(value)[:40]!r} ({count:,})" for value, count in found)
    return f"mostly numbers, but also {words}; if these say that it is not known: --missing 'WORD; WORD'"
