"""MEDS folders (Medical Event Data Standard): events of a subject, a time, a code and a value.

A column of the schema names the `code` it speaks of. A number is the value of the event of that code, a boolean
whether there is one, a text its text; a category is what follows the code's beginning, as "F" in "SEX//F".
For a row a patient the latest event counts; for a table events of one time are one row. A table whose columns
name no code holds the events themselves, of the codes that its column `code` lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from rapha_lab.curator.sources.files import BROKEN, Seen, digest_of
from rapha_lab.protocol.columns import Column
from rapha_lab.protocol.errors import RequestError

__all__ = ["KINDS", "events", "read"]

SUBJECT, TIME, CODE, NUMBER, TEXT = "subject_id", "time", "code", "numeric_value", "text_value"
KINDS: dict[str, Any] = {
    SUBJECT: pl.Int64,
    TIME: pl.Datetime("us"),
    CODE: pl.String,
    NUMBER: pl.Float32,
    TEXT: pl.String,
}


def read(
    folder: Path,
    columns: Sequence[Column],
    patient: str,
    time: str,
    *,
    per_patient: bool,
    seen: Seen,
) -> pl.DataFrame:
    """A row a patient, or a row a time, or where no column names a code the events themselves.

    Raises:
        RequestError: if the folder is none of MEDS.
        OSError: if there is no such folder.
    """
    every = events(folder, seen)
    coded = [column for column in columns if column.code]
    keys = [SUBJECT] if per_patient else [SUBJECT, TIME]
    if per_patient or coded:
        subjects = every.select(SUBJECT).unique().sort(SUBJECT) if per_patient else None
        found = [_of_code(every, column, keys) for column in coded]
        frame = (
            subjects if subjects is not None else pl.concat([part.select(keys) for part in found]).unique()
        )
        for part in found:
            frame = frame.join(part, on=keys, how="left", nulls_equal=True, maintain_order="left")
        absent = [c.name for c in coded if c.type == "boolean"]
        frame = frame.with_columns(pl.col(name).fill_null(value=False) for name in absent)
    else:
        listed = [code for column in columns if column.name == CODE for code in column.categories]
        frame = every.filter(pl.col(CODE).is_in(listed)) if listed else every
    names = {SUBJECT: patient} | ({TIME: time} if time else {})
    return frame.rename({old: new for old, new in names.items() if old in frame.columns and old != new})


def _of_code(events: pl.DataFrame, column: Column, keys: list[str]) -> pl.DataFrame:
    """The column's value by patient, or by patient and time: that of the latest event of its code."""
    begins = column.type == "category"
    mine = pl.col(CODE).str.starts_with(column.code) if begins else pl.col(CODE) == column.code
    if begins:
        value = pl.col(CODE).str.strip_prefix(column.code)
    elif column.type == "boolean":
        value = pl.lit(value=True)
    else:
        value = pl.col(TEXT if column.type == "text" else NUMBER)
    chosen = events.lazy().filter(mine).sort(SUBJECT, TIME, nulls_last=False, maintain_order=True)
    chosen = chosen.with_columns(value.alias(column.name)).filter(pl.col(column.name).is_not_null())
    return chosen.group_by(keys, maintain_order=True).agg(pl.col(column.name).last()).collect()


def events(folder: Path, seen: Seen = digest_of) -> pl.DataFrame:
    """All events of a folder, in the standard's own columns.

    Raises:
        RequestError: if the folder is none of MEDS.
        OSError: if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(2, "No such folder", str(folder))
    parts = sorted((folder / "data").rglob("*.parquet"))
    if not parts:
        what = f"The folder {folder.name} holds no MEDS data set."
        raise RequestError(what, "It has no Parquet file below data/.", "Correct the source.", field="source")
    frames = []
    for part in parts:
        seen(part)
        try:
            frame = pl.read_parquet(part, glob=False)
            if not frame.schema[SUBJECT].is_integer():
                raise pl.exceptions.SchemaError
            for name in (NUMBER, TEXT):
                frame = frame if name in frame.columns else frame.with_columns(pl.lit(None).alias(name))
            frames.append(frame.select(pl.col(name).cast(kind) for name, kind in KINDS.items()))
        except (*BROKEN, KeyError):
            what = f"The file {part.name} is none of MEDS."
            why = "MEDS has subject_id, time, code and numeric_value in their own types."
            raise RequestError(what, why, "Write it again.", field="source") from None
    return pl.concat(frames)
