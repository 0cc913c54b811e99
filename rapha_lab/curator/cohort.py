"""The records, held in the curator's memory by patient and seen only through a split's `View`.

Opening validates for the custodian and may fail; the messages name columns and never hold a value. Once a
cohort is open every accessor is total: whatever the records say, it answers in the public shape.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rapha_lab.curator import mapped
from rapha_lab.curator.columns import Findings, Records, Values, bounded, identifiers, own, present
from rapha_lab.curator.mapped import OnDisk, filled, on_disk, with_nobody
from rapha_lab.curator.sources import Reader
from rapha_lab.curator.tables import Rows
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import MISSING, SPLITS, Schema

__all__ = ["BESIDES", "EXCESS", "Cohort", "Findings", "View", "mark_of", "split_of"]

EXCESS, BESIDES = 1.1, 40
"""A split may hold this many times its expected patients, and this many more, before the schema is refused."""


def split_of(patient: str, salt: bytes, schema: Schema) -> str:
    """The split a patient belongs to for ever: by keyed hash of the identifier, whoever else is there."""
    point = _point(patient, salt, b"split") / 2**64
    if point < schema.splits.train:
        return "train"
    return "validation" if point < schema.splits.train + schema.splits.validation else "test"


def _point(patient: str, salt: bytes, use: bytes) -> int:
    """A number below 2^64 from the patient's identifier, for one use."""
    return int.from_bytes(hmac.digest(salt, b"rapha " + use + b"\0" + patient.encode(), hashlib.sha256)[:8])


def mark_of(patient: str, salt: bytes) -> str:
    """What stands for an identifier where the identifier itself must not: a keyed hash."""
    return hmac.digest(salt, b"rapha identifier\0" + patient.encode(), hashlib.sha256)[:16].hex()


class Cohort:
    """All patients of a dataset who have not opted out.

    Args:
        schema: what is public about them.
        frame: one row a patient, with the schema's columns and its patient column; or what reads it, so that each
            column is given up as soon as it is held.
        salt: the secret key of the split; the same for every snapshot of the same patients.
        opt_outs: identifiers of patients who are left out before anything else.
        tables: the rows of each of the schema's tables by name, or what reads them.
        scratch: a folder of the site's own, for what is too large for memory; everything is held there without one.

    Attributes:
        findings: by column or table, what the custodian should know of it.
        present: who has not opted out since it was opened, bool (n,).
        knows: whether a text is the identifier of one of its patients.
        snapshot: a random name of the records as they were read now, which tells nothing of them.
        digest: SHA-256 of the sources, for the custodians alone; empty if it was not opened from any.

    Raises:
        RequestError: for the custodian alone, naming the column that does not fit its description.
    """

    def __init__(
        self,
        schema: Schema,
        frame: Records,
        salt: bytes,
        opt_outs: Collection[str] = (),
        tables: Mapping[str, Records] = MappingProxyType({}),
        scratch: Path | None = None,
    ) -> None:
        if len(salt) < 16:
            raise RequestError(
                "The salt is too short.", instead="Give 16 random bytes or more.", field="salt"
            )
        self.schema, self.scratch = schema, scratch
        self.digest, self.snapshot = b"", os.urandom(16)
        self.findings: dict[str, Findings] = {}
        left, frame = [str(patient) for patient in opt_outs], own(frame)
        patients = _unique(schema, identifiers(schema.patient, present(frame, schema.patient)))
        kept = ~patients.is_in(left)
        patients = patients.filter(kept)
        self._columns: dict[str, Values] = {}
        for column in schema.columns:
            found = bounded(column, present(frame, column.name).filter(kept))
            self._columns[column.name], self.findings[column.name] = found
            frame.drop_in_place(column.name)
        self._tables: dict[str, Rows] = {}
        for table in schema.tables:
            if table.name not in tables:
                what = f"The records have no table {table.name}."
                raise RequestError(what, "The schema names it.", "Give its rows.", field=table.name)
            self._tables[table.name] = Rows(table, tables[table.name], patients, left)
            self.findings |= self._tables[table.name].findings
        count = len(patients)
        codes = (SPLITS.index(split_of(patient, salt, schema)) for patient in patients)
        splits = np.fromiter(codes, np.int8, count)
        rows = {name: torch.tensor(np.flatnonzero(splits == code)) for code, name in enumerate(SPLITS)}
        self._rows = rows | {"all": torch.arange(count)}
        points = (_point(patient, salt, b"shard") >> 32 for patient in patients)
        self._points = torch.from_numpy(np.fromiter(points, np.int64, count))
        marks = np.fromiter((mark_of(patient, salt) for patient in patients), "S32", count)
        # in order, at a tenth of a dictionary's memory
        self._marks, self._marked = np.sort(marks), marks.argsort()
        self.knows: Callable[[str], bool] = lambda text: self._row(mark_of(text, salt)) is not None
        self._everybody, self._left = self._rows, frozenset[str]()
        self.present = torch.ones(len(patients), dtype=torch.bool)

    @classmethod
    def open(
        cls,
        schema: Schema,
        folder: str | Path,
        salt: bytes,
        opt_outs: Collection[str] = (),
        scratch: Path | None = None,
    ) -> Cohort:
        """Read the schema's sources out of `folder`.

        Raises:
            RequestError: as for the class, or if a source is none of its kind.
            OSError: if one is not there.
        """
        reader = Reader(folder)
        tables = {
            t.name: partial(reader.read, t.source, t.patient, t.columns, time=t.time, table=t.name)
            for t in schema.tables
        }
        frame = partial(reader.read, schema.source, schema.patient, schema.columns)
        cohort = cls(schema, frame, salt, opt_outs, tables, scratch)
        cohort.digest = reader.digest
        for name, count in reader.unreadable.items():
            cohort.findings[name] = replace(cohort.findings[name], unreadable=count)
        _check_size(cohort)
        return cohort

    def leave_out(self, marks: frozenset[str]) -> None:
        """Leave out, from now on, exactly the patients of these marks: of new views, and of steps of older ones."""
        if marks == self._left:
            return
        present = torch.ones(len(self.present), dtype=torch.bool)
        present[[row for mark in marks if (row := self._row(mark)) is not None]] = False
        self._rows = {split: rows[present[rows]] for split, rows in self._everybody.items()}
        self.present, self._left = present, marks

    def _row(self, mark: str) -> int | None:
        """The patient of a mark, if there is one."""
        at = int(np.searchsorted(self._marks, mark.encode()))
        found = at < len(self._marks) and self._marks[at] == mark.encode()
        return int(self._marked[at]) if found else None

    def view(self, split: str) -> View:
        """The patients of one split, or of "all"."""
        return View(self, split, self._rows[split])


class View:
    """The patients of one split, as exact tensors; never leaves the curator, and neither does its length."""

    def __init__(self, cohort: Cohort, split: str, rows: Tensor) -> None:
        self.schema, self.split = cohort.schema, split
        self._cohort, self._rows = cohort, rows

    def __len__(self) -> int:
        return len(self._rows)

    def other(self, split: str) -> View:
        """The patients of another split."""
        return self._cohort.view(split)

    def shards(self, k: int) -> list[View]:
        """Its patients in `k` disjoint parts, each patient's by keyed hash, whoever else is there."""
        where = torch.from_numpy(self.slots(k))
        parts = self._rows[where.argsort(stable=True)].split(where.bincount(minlength=k).tolist())
        return [View(self._cohort, self.split, rows) for rows in parts]

    def slots(self, width: int) -> np.ndarray:
        """Each patient's place among `width`, int64 (n,), by keyed hash, whoever else is there."""
        return ((self.points() * width) >> 32).numpy()

    def frame(self, columns: Iterable[str]) -> pl.DataFrame:
        """The columns as a frame, a row a patient, null where not known."""
        return pl.DataFrame([self._of(self.schema.column(name).name).series() for name in columns])

    def points(self) -> Tensor:
        """A keyed hash of each patient's identifier below 2^32, int64 (n,), whoever else is there."""
        return self._cohort._points[self._rows]

    def present(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Who of some of them has not opted out since, bool: a step of a training leaves the others out."""
        return self._cohort.present[self._rows[rows]]

    def knows(self, text: str) -> bool:
        """Whether a text is the identifier of a patient of the cohort."""
        return self._cohort.knows(text)

    def table(self, name: str) -> pl.DataFrame:
        """A table's rows that count, each with `__patient`, the patient's position in this view, and its time.

        A patient's rows stand together in order of time; values are null where not known.
        """
        return self._cohort._tables[self.schema.table(name).name].frame(self._rows)

    def _of(self, column: str) -> Values:
        return self._cohort._columns[column].of(self._rows)

    def known(self, column: str) -> Tensor:
        """In which patients a column is known: bool (n,); for a table's, whose missing rows are zeros, in all."""
        if self.schema.table_of(column) is not None:
            return torch.ones(len(self), dtype=torch.bool)
        return self._cohort._columns[column].known[self._rows]

    def numbers(self, column: str) -> Tensor:
        """A number's or boolean's values within its limits: float64 (n,); meaningless where not known."""
        return self._cohort._columns[column].values[self._rows].double()

    def codes(self, column: str) -> Tensor:
        """A category's codes, or a boolean's 0 and 1: int64 (n,); meaningless where not known."""
        return self._cohort._columns[column].values[self._rows].long()

    def tensor(self, columns: str | Iterable[str]) -> Tensor:
        """The columns as programs see them: (n, *shape) in the shape and dtype of `Schema.layout`."""
        columns = columns if isinstance(columns, str) else list(columns)
        self.schema.layout(columns)
        first = columns if isinstance(columns, str) else next(iter(columns), "")
        table = self.schema.table_of(first)
        if table is None:
            return self._encoded(columns, self._of, len(self))
        rows = self._cohort._tables[table.name]
        index, owner = rows.of(self._rows)
        encoded = self._encoded(columns, lambda name: rows.values(name, index), len(index))
        return rows.padded(encoded, owner, self._rows)

    def rows(self, inputs: Mapping[str, str | Iterable[str]]) -> dict[str, Tensor]:
        """The columns as programs see them by input, `(n + 1, *shape)`, the last row zeros; on disk where large."""
        found = {name: self._with_nobody(columns) for name, columns in inputs.items()}
        return OnDisk(found) if any(self._large(columns) for columns in inputs.values()) else found

    def held(self, inputs: Mapping[str, str | Iterable[str]]) -> int:
        """How many of the rows' numbers are held in memory, by the declared number of patients."""
        shapes = (self.schema.layout(columns)[0] for columns in inputs.values() if not self._large(columns))
        return math.ceil(sum(map(math.prod, shapes)) * _most(self.schema, self.split))

    def _with_nobody(self, columns: str | Iterable[str]) -> Tensor:
        if not self._large(columns):
            return with_nobody(self.tensor(columns))
        assert self._cohort.scratch is not None
        shape, dtype = self.schema.layout(columns)
        room = max(math.ceil(_most(self.schema, self.split)), len(self)) + 1
        out = on_disk(self._cohort.scratch, (room, *shape), getattr(torch, dtype))
        return filled(out, len(self), lambda start, end: self.of(slice(start, end)).tensor(columns))

    def _large(self, columns: str | Iterable[str]) -> bool:
        """Whether the columns are held on disk: by the declared number of patients, never by how many there are."""
        shape, dtype = self.schema.layout(columns)
        size = _most(self.schema, self.split) * math.prod(shape) * getattr(torch, dtype).itemsize
        return self._cohort.scratch is not None and size > mapped.MEMORY

    def of(self, which: Tensor | slice) -> View:
        """Some of its patients."""
        return View(self._cohort, self.split, self._rows[which])

    def _encoded(self, columns: str | list[str], of: Callable[[str], Values], count: int) -> Tensor:
        """The columns of `count` rows, whose values `of` gives by a column's name in its table."""

        def alone(name: str) -> Tensor:
            column, flag = self.schema.find(name)
            if not flag:
                return of(column.name).alone()
            return (~of(column.name).known).float() if name.endswith(MISSING) else torch.ones(count)

        def entries(name: str) -> Tensor:
            column, flag = self.schema.find(name)
            return alone(name)[:, None] if flag else of(column.name).entries()

        if isinstance(columns, str):
            return alone(columns)
        return torch.cat([entries(name) for name in columns], dim=1) if columns else torch.zeros(count, 0)


def _unique(schema: Schema, patients: pl.Series) -> pl.Series:
    if patients.n_unique() < len(patients):
        what = f"The column {schema.patient} does not identify patients."
        instead = "Bring each patient's records into one row."
        raise RequestError(what, "Some occur in more than one row.", instead, field=schema.patient)
    return patients


def _most(schema: Schema, split: str) -> float:
    """How many patients a split may hold by the declared figure."""
    several = len(SPLITS) if split == "all" else 1
    return (schema.expected(split) or 0) * EXCESS + BESIDES * several


def _check_size(cohort: Cohort) -> None:
    """Sampling rates and the room for a step rest on the declared figure; a wrong one spoils model and proof."""
    schema = cohort.schema
    if schema.patients is None:
        return
    most = {split: _most(schema, split) for split in SPLITS}
    if 2 * len(cohort.view("all")) < schema.patients or any(len(cohort.view(s)) > most[s] for s in SPLITS):
        what = f"The schema declares {schema.patients} patients, which is far from what the records hold."
        raise RequestError(what, instead="Correct `patients`, or leave it out.", field="patients")
