"""Finds the tables in a data folder, and shows what is in a column to the custodian alone."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import polars as pl

from rapha_lab.curator.sources import database as duckdb_file
from rapha_lab.curator.sources import files, meds
from rapha_lab.custodian import snapshot
from rapha_lab.protocol.errors import RequestError

__all__ = ["Found", "find", "glance", "nameable", "plain", "said"]


_SQL: dict[str, pl.DataType] = {
    **dict.fromkeys(("int2", "int4", "int8"), pl.Int64()),
    **dict.fromkeys(("float4", "float8", "numeric"), pl.Float64()),
    **dict.fromkeys(("timestamp", "timestamptz"), pl.Datetime("us")),
    "bool": pl.Boolean(),
    "date": pl.Date(),
}


@dataclass(frozen=True)
class Found:
    """A table that records may be in.

    Attributes:
        folder: the data folder.
        source: how a schema names it.
        columns: names and stored types; nothing of a record.
        database: the address of the PostgreSQL database it is still in.
    """

    folder: Path
    source: str
    columns: dict[str, pl.DataType]
    database: str = ""

    @property
    def path(self) -> Path:
        """Where it is, if it is a file."""
        return self.folder / self.source

    @property
    def untyped(self) -> bool:
        """Whether its file says nothing of types, as CSV."""
        return self.source.endswith(".csv")

    def column(self, name: str) -> pl.Series:
        """One column of the records.

        Raises:
            RequestError: if it cannot be read.
        """
        path = self.path
        if self.database:
            values = snapshot.column(self.database, path.stem, name)
            return (
                values if self.columns[name] == pl.String else values.cast(self.columns[name], strict=False)
            )
        if self.source.endswith("/"):
            return meds.events(path)[name]
        if path.parent.suffix == ".duckdb":
            return duckdb_file.read(path.parent, path.name, [name])[name]
        return files.read(path, [name])[name]


def find(folder: Path, database: str = "") -> list[Found]:
    """Every table below the folder, by path, or those of a PostgreSQL database if its address is given.

    Raises:
        RequestError: if there is none, or one cannot be read.
    """
    found: list[Found] = []
    if database:
        name = urlsplit(database).path.strip("/") or "database"
        for table, stored in snapshot.tables(database).items():
            columns = {column: _SQL.get(kind, pl.String()) for column, kind in stored.items()}
            found.append(Found(folder, f"{name}.snapshot/{table}.parquet", columns, database))
        return found
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        # a snapshot's own folder is reached by its name without a date
        folders[:] = sorted(n for n in folders if not n.startswith(".") and ".snapshot." not in n)
        if (here / "metadata").is_dir() and (here / "data").is_dir():  # a MEDS folder
            kinds = {name: _plain(kind) for name, kind in meds.KINDS.items()}
            found.append(Found(folder, f"{here.relative_to(folder)}/".removeprefix("./") or "./", kinds))
            folders.clear()
            continue
        for path in (here / name for name in sorted(names) if not name.startswith(".")):
            relative = path.relative_to(folder)
            if path.suffix == ".duckdb":
                held = duckdb_file.tables(path).items()
                found += [Found(folder, f"{relative}/{name}", kinds) for name, kinds in held]
            elif path.suffix in (".parquet", ".csv"):
                found.append(Found(folder, str(relative), files.columns(path)))
    if not found:
        what = f"There is no table in {folder}."
        why = "Looked for .parquet, .csv and .duckdb files and MEDS folders."
        instead = "For PostgreSQL say --database postgresql://user@host/name."
        raise RequestError(what, why, instead, field="folder")
    return found


def glance(series: pl.Series) -> str:
    """What a custodian sees of a column: how much is missing, the range or the commonest values."""
    lacking = f"{series.null_count():,} of {len(series):,} rows lack it."
    known = series.drop_nulls()
    if known.dtype.is_numeric() and len(known):
        ends = [known.min(), *(known.quantile(q) for q in (0.01, 0.5, 0.99)), known.max()]
        told = "Least, 1 %, middle, 99 %, most: " + ", ".join(f"{float(end):g}" for end in ends)  # type: ignore[arg-type]
    else:
        counts = known.cast(pl.String, strict=False).value_counts(sort=True).head(20)
        told = "Commonest: " + ", ".join(f"{str(value)[:40]!r} ({count:,})" for value, count in counts.rows())
    return f"{lacking} {told}"


def nameable(column: str) -> bool:
    """Whether a schema can hold that name."""
    return len(column) <= 64 and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", column) is not None


def plain(source: str) -> str:
    """A table's own name: "cdm.person" of "omop.snapshot/cdm.person.parquet"."""
    return re.sub(r"\.(parquet|csv)$", "", source.rstrip("/")).rpartition("/")[2]


def said(kind: pl.DataType) -> str:
    """A stored type in a word."""
    words = {pl.String: "text", pl.Boolean: "yes or no", pl.Date: "date", pl.Datetime: "time"}
    whole = "whole number" if kind.is_integer() else "number" if kind.is_numeric() else str(kind).lower()
    return words.get(kind.base_type(), whole)


def _plain(kind: object) -> pl.DataType:
    return kind() if isinstance(kind, type) else kind  # type: ignore[return-value]
