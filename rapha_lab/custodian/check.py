"""Tries a schema on the records and says to the custodian alone what was found: `rapha-lab data check`."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from rapha_lab.curator.cohort import Cohort
from rapha_lab.custodian.columns import UNSET
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import Schema

__all__ = ["report", "unset"]


def unset(text: str) -> list[str]:
    """The lines of a draft that somebody has yet to set, with their numbers."""
    return [
        f"line {number}: {line}"
        for number, line in enumerate(text.splitlines(), 1)
        if line.rstrip().endswith(f"= {UNSET}")
    ]


def report(path: Path, folder: Path, rows: int = 5) -> str:
    """What the records hold by this schema: patients, what was mended, and a few rows as a cell's function gets them.

    Raises:
        RequestError: if the schema is not whole, or the records do not fit it.
        OSError: if a file is not there.
    """
    if missing := unset(path.read_text("utf-8")):
        what = f"{len(missing)} items of {path.name} are to be set."
        raise RequestError(what, "; ".join(missing)[:1000], "Write them into the file.", field="schema")
    schema = Schema.load(path)
    cohort = Cohort.open(schema, folder, os.urandom(32))
    view = cohort.view("all")
    page = [f"FOR CUSTODIANS ALONE. {schema.name}: {len(view):,} patients, {len(schema.columns)} columns."]
    page += [f"  SHA-256 of the records: {cohort.digest.hex()}"]
    page += [f"  {name}: {told}" for name, found in cohort.findings.items() if (told := str(found))]
    with pl.Config(tbl_rows=rows, tbl_cols=20, tbl_hide_dataframe_shape=True):
        page.append(str(view.frame([column.name for column in schema.columns]).head(rows)))
        for table in schema.tables:
            whole = view.table(table.name)
            page += [f"{table.name}: {len(whole):,} rows that count", str(whole.head(rows))]
    return "\n".join(page)
