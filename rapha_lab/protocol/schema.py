"""What everybody may know of a dataset: its columns, their public bounds and categories, and its splits.

A schema is written by the custodians and holds nothing computed from a record. It fixes, for every
program's input, a shape and a dtype that are the same whoever the patients are.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from rapha_lab.protocol.columns import (
    MISSING,
    PRESENT,
    Column,
    Dtype,
    Public,
    Table,
    Text,
    Word,
    check_column,
    check_correlations,
    check_source,
)
from rapha_lab.protocol.errors import RequestError

__all__ = ["MISSING", "SPLITS", "Column", "Dtype", "Schema", "Shares", "Table"]

SPLITS = ("train", "validation", "test")

_LINES = 60
"""Columns that a schema shows of itself."""

ROOM = 1 << 30
"""Numbers that the inputs of a question may have over all patients: 4 GiB."""


class Shares(Public, frozen=True):
    """Which part of the patients each split gets; they add up to 1."""

    train: Annotated[float, Meta(ge=0, le=1)] = 0.7
    validation: Annotated[float, Meta(ge=0, le=1)] = 0.1
    test: Annotated[float, Meta(ge=0, le=1)] = 0.2


class Schema(Public, frozen=True):
    """A dataset's public description.

    Attributes:
        name: what requests call it.
        title: one line for people.
        citation: the paper to cite.
        licence: under which the data may be used.
        patient: the column that identifies a patient; never an input.
        source: where the records are in the data folder: "ward.parquet", "ward.csv", "omop.duckdb/person" for a table
            of a DuckDB file, "omop.snapshot/person.parquet" for one of a snapshot, "meds/" for a MEDS folder.
        columns: what can be asked about.
        tables: tables with many rows a patient.
        patients: a number of patients the custodians declare public, if they do.
        splits: shares of the patients in train, validation and test.
    """

    name: Word
    title: Text
    citation: Text
    licence: Text
    patient: Word
    source: Text
    columns: Annotated[tuple[Column, ...], Meta(min_length=1, max_length=10_000)]
    tables: Annotated[tuple[Table, ...], Meta(max_length=100)] = ()
    patients: Annotated[int, Meta(ge=1, le=10**10)] | None = None
    splits: Shares = Shares()

    @classmethod
    def load(cls, path: str | Path) -> Schema:
        """Read and check a schema from a TOML file.

        Raises:
            RequestError: naming the field that is wrong and how to mend it.
            OSError: if the file cannot be read.
        """
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text("utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"The schema {Path(path).name} is no TOML: {error}.") from None

    @classmethod
    def from_dict(cls, fields: Any) -> Schema:
        """Check a schema given as plain fields.

        Raises:
            RequestError: as for `load`.
        """
        try:
            schema = msgspec.convert(fields, cls)
        except msgspec.ValidationError as error:
            raise _malformed(error, fields) from None
        schema.check()
        return schema

    @classmethod
    def from_json(cls, data: bytes) -> Schema:
        """Read and check a schema off the wire.

        Raises:
            RequestError: as for `load`.
        """
        try:
            return cls.from_dict(msgspec.json.decode(data))
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise RequestError(f"The schema is no JSON: {error}.") from None

    def to_json(self) -> bytes:
        """The schema for the wire; the same schema always gives the same bytes."""
        return msgspec.json.encode(self)

    def check(self) -> None:
        """Hold every rule that types alone cannot.

        Raises:
            RequestError: naming the column, the field and the way out.
        """
        seen = {self.patient}
        for column in self.columns:
            if column.name in seen:
                what = f"The name {column.name} is used twice."
                raise RequestError(what, instead="Give every column its own name.", field=column.name)
            seen.add(column.name)
        shares = (self.splits.train, self.splits.validation, self.splits.test)
        if abs(math.fsum(shares) - 1) > 1e-9:
            what = f"The splits add up to {math.fsum(shares):g}."
            raise RequestError(what, instead="Let train, validation and test add up to 1.", field="splits")
        check_source(self.source, "source")
        for column in self.columns:
            check_column(column)
        check_correlations(self.columns)
        names: set[str] = set()
        for table in self.tables:
            clash = [name for name in seen if name.startswith(f"{table.name}.")]
            if table.name in seen | names or clash:
                what = f"The name {table.name} is used twice."
                raise RequestError(what, instead="Give every table its own name.", field=table.name)
            names.add(table.name)
            table.check()

    def __repr__(self) -> str:
        """A line for each column: its name, as cells call it, its type, its values and what it means."""
        rows = [(c.name, c) for c in self.columns]
        rows += [(f"{table.name}.{c.name}", c) for table in self.tables for c in table.columns]
        wide = max(len(name) for name, _ in rows)
        lines = [
            f"  {name:<{wide}}  {c.type:<8}  {_short(c.values):<40}  {c.meaning}".rstrip()
            for name, c in rows[:_LINES]
        ]
        more = [f"  … and {len(rows) - _LINES} more"] if len(rows) > _LINES else []
        return "\n".join([f"{self.name}: {self.title}", *lines, *more])

    @property
    def _by_name(self) -> dict[str, Column]:
        return _index(self.columns)

    def column(self, name: str) -> Column:
        """The column of that name.

        Raises:
            RequestError: if there is none; names what was probably meant.
        """
        if not isinstance(name, str):
            raise RequestError(f"{name!r:.64} is no column.", "A column is named by a text.", field="column")
        if name in self._by_name:
            return self._by_name[name]
        near = difflib.get_close_matches(name[:64], self._by_name, n=3, cutoff=0.5)
        why = f"{self.patient} identifies patients and is never an input." if name == self.patient else ""
        instead = f"Did you mean {' or '.join(near)}?" if near else "The dataset's card lists its columns."
        what = f"The dataset {self.name} has no column {name[:64]!r}."
        raise RequestError(what, why, instead, field=name[:64])

    def layout(self, columns: str | Iterable[str]) -> tuple[tuple[int, ...], Dtype]:
        """The shape and dtype of one patient's `columns` as a tensor.

        A list of columns is a float32 vector. In it a number fills one entry, scaled by its public bounds to
        [-1, 1]; a boolean one, -1 or 1; a category of two values one, -1 or 1; of more, one-hot as many.
        Where a value is missing all its entries are 0; `"name.missing"` is one entry, 0 or 1.

        A single name is a scalar: a scaled number or a boolean as 0 or 1 in float32, a category's code in
        int64. Where the value is missing it is 0. A text is its token ids (tokens,) in int64, an image float32
        in its public shape, pixels scaled to [-1, 1].

        Names of a table, as in `"labs.value"`, give all that `most` times: a row of the tensor for each of the
        patient's rows in order of time, the last one last, zeros before them. `"labs.present"` is 1 where
        there is a row; `"labs.time"` is a number, the days before the patient's last row.

        Raises:
            RequestError: for an unknown column, names of several tables in one list, or more than the site's memory
                is sure to hold for the declared number of patients.
        """
        if isinstance(columns, str):
            rows = self.rows(columns)
            column, flag = self.find(columns)
            shape, dtype = ((), "float32") if flag else column.alone
            return self._held((*rows, *shape)), dtype
        if not isinstance(columns, Iterable):
            raise RequestError(
                f"{columns!r:.40} is no list of columns.", "A column is named by a text.",
                'Say ["age", "sex"], say.', field="columns",
            )  # fmt: skip
        names = list(columns)
        width = sum(1 if flag else column.width for column, flag in map(self.find, names))
        return self._held((*self.rows(*names), width)), "float32"

    def _held(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        self.held([shape])
        return shape

    def held(self, shapes: Iterable[tuple[int, ...]]) -> None:
        """Raise RequestError if inputs of these shapes are more than the site's memory is sure to hold together."""
        entries = sum(map(math.prod, shapes)) * (self.patients or 1)
        if entries > ROOM:
            what = f"These columns are {entries:,} numbers for the {self.patients or 1:,} patients declared."
            raise RequestError(what, f"At most {ROOM:,} are held at once.", "Name fewer.", field="inputs")

    def rows(self, *names: str) -> tuple[int, ...]:
        """How many rows `names` give one patient: (most,) if they are of a table, () if of the patients.

        Raises:
            RequestError: if they are not of the same table.
        """
        tables = {table.name if (table := self.table_of(name)) else "": table for name in names}
        if len(tables) > 1:
            where = " and ".join(sorted(name or "the patients" for name in tables))
            what = "These columns are not of one table."
            raise RequestError(
                what, f"They are of {where}.", "Make them inputs of their own.", field="inputs"
            )
        (table,) = tables.values() or (None,)
        return () if table is None else (table.most,)

    def feature_names(self, columns: str | Iterable[str]) -> list[str]:
        """A name for each entry of the vector that `layout` describes, as in "age" or "chapter=Skin"."""
        names: list[str] = []
        for name in [columns] if isinstance(columns, str) else columns:
            column, flag = self.find(name)
            one_hot = not flag and len(column.categories) > 2
            names += [f"{name}={category}" for category in column.categories] if one_hot else [name]
        return names

    def table(self, name: str) -> Table:
        """The table of that name.

        Raises:
            RequestError: if there is none.
        """
        for table in self.tables:
            if table.name == name:
                return table
        known = ", ".join(table.name for table in self.tables) or "none"
        what = f"The dataset {self.name} has no table {name!r:.64}."
        raise RequestError(what, f"Its tables: {known}.", field="table")

    def table_of(self, name: str) -> Table | None:
        """The table that a dotted name speaks of, if it speaks of one."""
        first, dot, _ = name.partition(".") if isinstance(name, str) else ("", "", "")
        return next((table for table in self.tables if dot and table.name == first), None)

    def find(self, name: str) -> tuple[Column, bool]:
        """The column that `name` speaks of, and whether it asks only if a value or row is there: 0 or 1.

        Raises:
            RequestError: as for `column`.
        """
        bare = name.removesuffix(MISSING) if isinstance(name, str) else name
        table = self.table_of(name)
        if table is None:
            return self.column(bare), bare != name
        within = bare.partition(".")[2]
        if within == PRESENT and bare == name:
            return Column(name=PRESENT, type="boolean", meaning="A row is there.", public="By design."), True
        column = table.find(within)
        if column is None:
            names = [each.name for each in table.columns]
            near = difflib.get_close_matches(within[:64], names, n=3, cutoff=0.5)
            instead = f"Did you mean {' or '.join(f'{table.name}.{name}' for name in near)}?" if near else ""
            what = f"The table {table.name} has no column {within[:64]!r}."
            raise RequestError(what, "", instead or f"It has {', '.join(names[:20])}.", field=name[:64])
        return column, bare != name

    def expected(self, split: str) -> float | None:
        """How many patients a split has in expectation, from the declared figure; None without one."""
        share = 1.0 if split == "all" else float(getattr(self.splits, split))
        return None if self.patients is None else self.patients * share


@lru_cache(maxsize=64)
def _index(columns: tuple[Column, ...]) -> dict[str, Column]:
    return {column.name: column for column in columns}


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"


def _malformed(error: msgspec.ValidationError, fields: Any) -> RequestError:
    what, _, path = str(error).partition(" - at `$")
    path = path.strip("`.")
    what = what.replace("Object missing", "it lacks the").replace("Object contains", "it contains an")
    if path.startswith("columns[") and isinstance(fields, dict):
        index = int(path[len("columns[") : path.index("]")])
        column = fields["columns"][index]
        if isinstance(column, dict) and "name" in column:
            path = path.replace(f"columns[{index}]", str(column["name"])[:64], 1)
    if "unknown field" in what:
        unknown = what.split("`")[-2]
        known = {
            field.name for kind in (Schema, Column, Table, Shares) for field in msgspec.structs.fields(kind)
        }
        near = difflib.get_close_matches(unknown, known, n=1)
        path = f"{path}.{unknown}".strip(".")
        instead = f"Did you mean {near[0]}?" if near else "Leave it out."
    else:
        instead = "Write it as documented in rapha_lab/protocol/schema.py and columns.py."
    at = f" (at {path})" if path else ""
    return RequestError(f"The schema is malformed{at}: {what}.", "", instead, field=path or None)
