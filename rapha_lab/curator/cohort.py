"""The records, one row a patient, held in the curator's memory and seen only through a split's `View`.

Opening validates for the custodian and may fail; the messages name columns and never hold a value. Once a
cohort is open every accessor is total: whatever the records say, it answers in the public shape.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import SPLITS, Column, Schema

__all__ = ["BESIDES", "EXCESS", "Cohort", "Findings", "View", "split_of"]

EXCESS, BESIDES = 1.1, 40
"""A split may hold this many times its expected patients, and this many more, before the schema is refused."""

_TRUTHS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


@dataclass(frozen=True)
class Findings:
    """What the custodian should know of one column, and nobody else: patients in whom a value ...

    Attributes:
        clamped: lay outside the public bounds and is treated as the nearest bound.
        unlisted: is in no public category and is treated as missing.
        missing: is missing although the schema says it never is.
    """

    clamped: int = 0
    unlisted: int = 0
    missing: int = 0


def split_of(patient: str, salt: bytes, schema: Schema) -> str:
    """The split a patient belongs to for ever: by keyed hash of the identifier, whoever else is there."""
    point = _point(patient, salt, b"split") / 2**64
    if point < schema.splits.train:
        return "train"
    return "validation" if point < schema.splits.train + schema.splits.validation else "test"


def _point(patient: str, salt: bytes, use: bytes) -> int:
    """A number below 2^64 from the patient's identifier, for one use."""
    return int.from_bytes(hmac.digest(salt, b"rapha " + use + b"\0" + patient.encode(), hashlib.sha256)[:8])


class Cohort:
    """All patients of a dataset who have not opted out.

    Args:
        schema: what is public about them.
        frame: one row a patient, with the schema's columns and its patient column.
        salt: the secret key of the split; the same for every snapshot of the same patients.
        opt_outs: identifiers of patients who are left out before anything else.

    Raises:
        RequestError: for the custodian alone, naming the column that does not fit its description.
    """

    def __init__(self, schema: Schema, frame: pl.DataFrame, salt: bytes, opt_outs: Collection[str] = ()):
        if len(salt) < 16:
            raise RequestError(
                "The salt is too short.", instead="Give 16 random bytes or more.", field="salt"
            )
        self.schema = schema
        self.findings: dict[str, Findings] = {}
        patients = _identifiers(schema, frame)
        kept = ~patients.is_in([str(patient) for patient in opt_outs])
        patients, frame = patients.filter(kept), frame.filter(kept)
        self._values: dict[str, Tensor] = {}
        self._known: dict[str, Tensor] = {}
        for column in schema.columns:
            series = _typed(column, _present(frame, column.name))
            values, known, self.findings[column.name] = _bounded(column, series)
            self._values[column.name], self._known[column.name] = torch.tensor(values), torch.tensor(known)
        splits = np.array(
            [SPLITS.index(split_of(patient, salt, schema)) for patient in patients], dtype=np.int8
        )
        rows = {name: torch.tensor(np.flatnonzero(splits == code)) for code, name in enumerate(SPLITS)}
        self._rows = rows | {"all": torch.arange(len(patients))}
        self._points = torch.tensor(
            [_point(patient, salt, b"shard") >> 32 for patient in patients], dtype=torch.int64
        )

    @classmethod
    def open(cls, schema: Schema, folder: str | Path, salt: bytes, opt_outs: Collection[str] = ()) -> Cohort:
        """Read the schema's source out of `folder`.

        Raises:
            RequestError: as for the class, or if the file is none of its kind.
            OSError: if there is no such file.
        """
        path = Path(folder) / schema.source
        with path.open("rb"):
            pass  # a missing file keeps its plain error
        try:
            if path.suffix == ".parquet":
                frame = pl.read_parquet(path, glob=False)
            else:
                frame = pl.read_csv(path, infer_schema=False, glob=False)
        except pl.exceptions.PolarsError:
            # polars quotes what it could not parse
            what = f"The file {schema.source} cannot be read as {path.suffix[1:]}."
            raise RequestError(what, instead="Write it again.", field="source") from None
        cohort = cls(schema, frame, salt, opt_outs)
        _check_size(cohort)
        return cohort

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

    def shards(self, k: int) -> list[View]:
        """Its patients in `k` disjoint parts, each patient's by keyed hash, whoever else is there."""
        where = (self._cohort._points[self._rows] * k) >> 32
        parts = self._rows[where.argsort(stable=True)].split(where.bincount(minlength=k).tolist())
        return [View(self._cohort, self.split, rows) for rows in parts]

    def frame(self, columns: Iterable[str]) -> pl.DataFrame:
        """The columns as a frame, a row a patient, null where not known."""
        return pl.DataFrame([self._series(self.schema.column(name)) for name in columns])

    def _series(self, column: Column) -> pl.Series:
        if column.type == "category":
            values = np.array(column.categories, dtype=object)[self.codes(column.name).numpy()]
            series = pl.Series(column.name, values, dtype=pl.String)
        else:
            kind = {"integer": pl.Int64, "boolean": pl.Boolean}.get(column.type, pl.Float64)
            series = pl.Series(column.name, self.numbers(column.name).numpy()).cast(kind)
        known = pl.Series(self.known(column.name).numpy())
        return pl.select(pl.when(known).then(series).alias(column.name)).to_series()

    def known(self, column: str) -> Tensor:
        """In which patients a column is known: bool (n,)."""
        return self._cohort._known[column][self._rows]

    def numbers(self, column: str) -> Tensor:
        """A number's or boolean's values within its limits: float64 (n,); meaningless where not known."""
        return self._cohort._values[column][self._rows].double()

    def codes(self, column: str) -> Tensor:
        """A category's codes, or a boolean's 0 and 1: int64 (n,); meaningless where not known."""
        return self._cohort._values[column][self._rows].long()

    def tensor(self, columns: str | Iterable[str]) -> Tensor:
        """The columns as programs see them: (n, *shape) in the shape and dtype of `Schema.layout`."""
        if isinstance(columns, str):
            return self._scalar(columns)
        parts = [self._entries(name) for name in columns]
        return torch.cat(parts, dim=1) if parts else torch.zeros(len(self), 0)

    def _scalar(self, name: str) -> Tensor:
        column, missing = self.schema.find(name)
        known = self.known(column.name)
        if missing:
            return (~known).float()
        if column.type == "category":
            return self.codes(name).where(known, 0)
        values = self._scaled(column) if column.numeric else self.numbers(name).float()
        return values.where(known, 0.0)

    def _entries(self, name: str) -> Tensor:
        column, missing = self.schema.find(name)
        if missing or column.numeric:
            return self._scalar(name)[:, None]
        codes, known = self.codes(column.name), self.known(column.name)
        if column.width == 1:
            return (2.0 * codes - 1).where(known, 0.0)[:, None].float()
        one_hot = torch.nn.functional.one_hot(codes, column.width).float()
        return one_hot * known[:, None]

    def _scaled(self, column: Column) -> Tensor:
        low, high = column.limits
        values = self.numbers(column.name)
        if column.scale == "log":
            # a logarithm of each bound, so that the bounds themselves map to -1 and 1
            logs = torch.tensor([low, high], dtype=torch.float64).log()
            values, low, high = values.log(), float(logs[0]), float(logs[1])
        return ((values - low) / (high - low) * 2 - 1).clamp(-1, 1).float()


def _present(frame: pl.DataFrame, name: str) -> pl.Series:
    if name not in frame.columns:
        what = f"The records have no column {name}."
        raise RequestError(what, "The schema names it.", "Rename one of the two.", field=name)
    return frame[name]


def _identifiers(schema: Schema, frame: pl.DataFrame) -> pl.Series:
    """The patients' identifiers as text.

    Raises:
        RequestError: if they are floats (which round), missing or not unique.
    """

    def fail(why: str, instead: str) -> RequestError:
        return RequestError(
            f"The column {schema.patient} does not identify patients.", why, instead, field=schema.patient
        )

    series = _present(frame, schema.patient)
    integers = series.dtype.is_integer()
    if not (integers or series.dtype in (pl.String, pl.Categorical, pl.Enum)):
        raise fail(
            f"It holds {series.dtype}, which may round or merge them.", "Store them as text or integers."
        )
    text = series.cast(pl.String)
    if not integers and len(text) and text.str.contains(r"^-?\d+\.\d*([eE][-+]?\d+)?$").all():
        raise fail("They are written as decimal fractions.", "Store them as text or integers.")
    if text.null_count() or (text == "").any():
        raise fail("Some patients have none.", "Give every patient one.")
    if text.n_unique() < len(text):
        raise fail("Some occur in more than one row.", "Bring each patient's records into one row.")
    return text


def _check_size(cohort: Cohort) -> None:
    """Sampling rates and the room for a step rest on the declared figure; a wrong one spoils model and proof."""
    schema = cohort.schema
    if schema.patients is None:
        return
    most = {split: (schema.expected(split) or 0) * EXCESS + BESIDES for split in SPLITS}
    if 2 * len(cohort.view("all")) < schema.patients or any(len(cohort.view(s)) > most[s] for s in SPLITS):
        what = f"The schema declares {schema.patients} patients, which is far from what the records hold."
        raise RequestError(what, instead="Correct `patients`, or leave it out.", field="patients")


def _typed(column: Column, series: pl.Series) -> pl.Series:
    """The column as Float64, Boolean or String, by its declared type.

    Raises:
        RequestError: naming the column if the records hold another type.
    """
    dtype, text = series.dtype, series.dtype in (pl.String, pl.Categorical, pl.Enum)
    result = None
    if dtype == pl.Null:
        result = series.cast({"category": pl.String, "boolean": pl.Boolean}.get(column.type, pl.Float64))
    elif column.type == "category" and (text or dtype.is_integer() or dtype == pl.Boolean):
        result = series.cast(pl.String)
    elif column.type == "boolean" and dtype == pl.Boolean:
        result = series
    elif column.type == "boolean" and (text or dtype.is_integer()):
        lower = series.cast(pl.String).str.to_lowercase()
        result = lower.replace_strict(_TRUTHS, default=None, return_dtype=pl.Boolean)
    elif column.numeric and (text or dtype.is_numeric()):
        result = series.cast(pl.String).cast(pl.Float64, strict=False) if text else series.cast(pl.Float64)
    if result is None or result.null_count() > series.null_count() or not _whole(column, result):
        what = f"The column {column.name} does not hold what its type {column.type} says."
        instead = "Correct the type in the schema, or the records."
        raise RequestError(what, f"It is stored as {dtype}.", instead, field=column.name)
    return result


def _whole(column: Column, series: pl.Series) -> bool:
    if column.type != "integer":
        return True
    finite = series.filter(series.is_finite())
    return bool((finite == finite.floor()).all())


def _bounded(column: Column, series: pl.Series) -> tuple[np.ndarray, np.ndarray, Findings]:
    """Values within the public limits, in which patients they are known, and what was mended."""
    if column.type == "category":
        codes = series.replace_strict(
            column.categories, range(len(column.categories)), default=None, return_dtype=pl.Int64
        )
        known, values = codes.is_not_null().to_numpy(), codes.fill_null(0).to_numpy()
        clamped, unlisted = 0, codes.null_count() - series.null_count()
    else:
        low, high = column.limits
        # an infinite measurement is out of bounds on its side; NaN is none
        raw = series.cast(pl.Float64).fill_null(float("nan")).to_numpy()
        known = ~np.isnan(raw)
        values = np.clip(np.where(known, raw, low), low, high)
        clamped, unlisted = int(np.sum(known & (values != raw))), 0
    lacking = int(np.sum(~known)) - unlisted if column.missing == "never" else 0
    return values, known, Findings(clamped, unlisted, lacking)
