"""One column of records as its schema says: typed, within public limits, and encoded as programs see it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rapha_lab.protocol.columns import Column
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.tokenizer import token_ids

__all__ = ["Findings", "Records", "Values", "bounded", "identifiers", "own", "present", "taken"]

_TRUTHS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
_TEXTS = (pl.String, pl.Categorical, pl.Enum)


@dataclass(frozen=True)
class Findings:
    """What the custodian should know of a column or table, and nobody else: values, or rows, that ...

    Attributes:
        clamped: lay outside the public bounds and are treated as the nearest bound.
        unlisted: are in no public category, or of another shape, and are treated as missing.
        missing: are missing although the schema says they never are.
        beyond: are more than the rows of a patient that count, and are left out.
        unreadable: are images or notes in files that cannot be read, and are treated as missing.
        strangers: are of nobody among the patients, and are left out.
    """

    clamped: int = 0
    unlisted: int = 0
    missing: int = 0
    beyond: int = 0
    strangers: int = 0
    unreadable: int = 0

    def __str__(self) -> str:
        words = {
            "clamped": "outside the bounds", "unlisted": "in no category", "missing": "missing though it says never",
            "beyond": "rows beyond the most that count", "strangers": "rows of nobody here", "unreadable": "files unreadable",
        }  # fmt: skip
        return ", ".join(f"{count:,} {words[name]}" for name, count in vars(self).items() if count)


def taken(values: Tensor, rows: Tensor) -> Tensor:
    """Those rows of (n, ...), by one thread: a barrier of two costs more than it saves where others want the cores."""
    return torch.from_numpy(values.numpy().take(rows.numpy(), axis=0))


@dataclass(frozen=True)
class Values:
    """A column's values, one a row; meaningless where not known.

    Attributes:
        column: what is public about them.
        values: (n,) within the column's limits, or its codes; (n, tokens) ids of a text; (n, *shape) of an image.
        known: bool (n,).
        text: of a text, as it was written.
    """

    column: Column
    values: Tensor
    known: Tensor
    text: pl.Series | None = None

    def of(self, rows: Tensor) -> Values:
        """Those of some rows."""
        text = None if self.text is None else self.text.gather(rows.numpy())
        return Values(self.column, taken(self.values, rows), taken(self.known, rows), text)

    def alone(self) -> Tensor:
        """Each value by itself, (n, *shape) as `Schema.layout` says of a single name."""
        if self.column.type in ("category", "text"):
            values = self.values.long()
        elif self.column.type == "boolean":
            values = self.values.float()
        else:
            values = self._scaled()
        known = self.known.view(-1, *[1] * (values.dim() - 1))
        return values.where(known, torch.zeros((), dtype=values.dtype))

    def entries(self) -> Tensor:
        """Each value as its part of a vector, float32 (n, width)."""
        if self.column.numeric:
            return self.alone()[:, None]
        codes = self.values.long()
        if self.column.width == 1:
            return (2.0 * codes - 1).where(self.known, 0.0)[:, None].float()
        one_hot = torch.nn.functional.one_hot(codes, self.column.width).float()
        return one_hot * self.known[:, None]

    def series(self) -> pl.Series:
        """The values as a frame holds them, null where not known."""
        column = self.column
        if self.text is not None:
            return self.text.alias(column.name)
        if column.type == "category":
            words = np.array(column.categories, dtype=object)[self.values.long().numpy()]
            series = pl.Series(column.name, words, dtype=pl.String)
        elif column.type == "image":
            series = pl.Series(
                column.name, self.values.numpy(), dtype=pl.Array(pl.Float32, tuple(column.shape))
            )
        else:
            kind = {"integer": pl.Int64, "boolean": pl.Boolean}.get(column.type, pl.Float64)
            series = pl.Series(column.name, self.values.double().numpy()).cast(kind)
        known = pl.Series(self.known.numpy())
        return pl.select(pl.when(known).then(series).alias(column.name)).to_series()

    def _scaled(self) -> Tensor:
        low, high = self.column.bounds or (0.0, 1.0)
        values = self.values.double()
        if self.column.scale == "log":
            # a logarithm of each bound, so that the bounds themselves map to -1 and 1
            logs = torch.tensor([low, high], dtype=torch.float64).log()
            values, low, high = values.log(), float(logs[0]), float(logs[1])
        return ((values - low) / (high - low) * 2 - 1).clamp(-1, 1).float()


Records = pl.DataFrame | Callable[[], pl.DataFrame]
"""A frame, or what reads one."""


def own(records: Records) -> pl.DataFrame:
    """A frame that columns can be taken out of: nobody else's, with the same values."""
    return records.clone() if isinstance(records, pl.DataFrame) else records()


def present(frame: pl.DataFrame, name: str, where: str = "The records have") -> pl.Series:
    """The column of that name.

    Raises:
        RequestError: if there is none.
    """
    if name not in frame.columns:
        what = f"{where} no column {name}."
        raise RequestError(what, "The schema names it.", "Rename one of the two.", field=name)
    return frame[name]


def identifiers(name: str, series: pl.Series) -> pl.Series:
    """The patients' identifiers as text.

    Raises:
        RequestError: if they are floats (which round), or missing.
    """

    def fail(why: str, instead: str) -> RequestError:
        return RequestError(f"The column {name} does not identify patients.", why, instead, field=name)

    integers = series.dtype.is_integer()
    if not (integers or series.dtype in _TEXTS):
        raise fail(
            f"It holds {series.dtype}, which may round or merge them.", "Store them as text or integers."
        )
    text = series.cast(pl.String)
    if not integers and len(text) and text.str.contains(r"^-?\d+\.\d*([eE][-+]?\d+)?$").all():
        raise fail("They are written as decimal fractions.", "Store them as text or integers.")
    if text.null_count() or (text == "").any():
        raise fail("Some rows have none.", "Give every patient one.")
    return text


def bounded(column: Column, series: pl.Series, name: str = "") -> tuple[Values, Findings]:
    """The values within the public limits, and what was mended.

    Raises:
        RequestError: naming the column if the records hold another type.
    """
    name = name or column.name
    if column.type == "image":
        return _pictures(column, series, name)
    typed = _typed(column, series, name)
    text = None
    if column.type == "text":
        text = typed
        rows = [token_ids(each or "", column.tokens or 1, column.vocabulary or 2) for each in typed]
        values = np.array(rows, dtype=np.int64).reshape(len(typed), column.tokens or 1)
        known, clamped, unlisted = typed.is_not_null().to_numpy(), 0, 0
    elif column.type == "category":
        codes = typed.replace_strict(
            column.categories, range(len(column.categories)), default=None, return_dtype=pl.Int64
        )
        known, values = codes.is_not_null().to_numpy(), codes.fill_null(0).to_numpy().astype(np.int32)
        clamped, unlisted = 0, codes.null_count() - typed.null_count()
    else:
        low, high = column.limits
        # an infinite measurement is out of bounds on its side; NaN is none
        raw = typed.cast(pl.Float64).fill_null(float("nan")).to_numpy()
        known = ~np.isnan(raw)
        values = np.clip(np.where(known, raw, low), low, high)
        clamped, unlisted = int(np.sum(known & (values != raw))), 0
        values = values.astype(np.int8) if column.type == "boolean" else values
    return _found(column, values, known, clamped, unlisted, text)


def _found(
    column: Column,
    values: np.ndarray,
    known: np.ndarray,
    clamped: int,
    unlisted: int,
    text: pl.Series | None = None,
) -> tuple[Values, Findings]:
    lacking = int(np.sum(~known)) - unlisted if column.missing == "never" else 0
    kept = Values(column, torch.tensor(values), torch.tensor(known), text)
    return kept, Findings(clamped, unlisted, lacking)


def _pictures(column: Column, series: pl.Series, name: str) -> tuple[Values, Findings]:
    """Images stored as lists of pixels, row by row; one of another size is missing, a pixel that is none the middle."""
    low, high = column.bounds or (0.0, 1.0)
    inner = getattr(series.dtype, "inner", None)
    if series.dtype != pl.Null and (inner is None or not inner.is_numeric()):
        raise _mistyped(name, column, series)
    size = math.prod(column.shape)
    lists = series.cast(pl.List(pl.Float32))
    known = (lists.list.len() == size).fill_null(False).to_numpy()
    raw = lists.filter(known).explode().to_numpy() if known.any() else np.zeros(0, dtype=np.float32)
    pixels = np.clip(np.where(np.isnan(raw), low / 2 + high / 2, raw), low, high).astype(np.float32)
    values = np.zeros((len(known), size), dtype=np.float32)
    values[known] = pixels.reshape(-1, size)
    outside = ((raw < low) | (raw > high)).reshape(-1, size).any(axis=1)
    unlisted = int(np.sum(~known)) - series.null_count()
    return _found(column, values.reshape(-1, *column.shape), known, int(outside.sum()), unlisted)


def _typed(column: Column, series: pl.Series, name: str) -> pl.Series:
    """The column as Float64, Boolean or String, by its declared type."""
    dtype, text = series.dtype, series.dtype in _TEXTS
    result = None
    if dtype == pl.Null:
        kinds = {"category": pl.String, "text": pl.String, "boolean": pl.Boolean}
        result = series.cast(kinds.get(column.type, pl.Float64))
    elif (column.type == "text" and text) or (
        column.type == "category" and (text or dtype.is_integer() or dtype == pl.Boolean)
    ):
        result = series.cast(pl.String)
    elif column.type == "boolean" and dtype == pl.Boolean:
        result = series
    elif column.type == "boolean" and (text or dtype.is_integer()):
        lower = series.cast(pl.String).str.to_lowercase()
        result = lower.replace_strict(_TRUTHS, default=None, return_dtype=pl.Boolean)
    elif column.numeric and (text or dtype.is_numeric()):
        result = series.cast(pl.String).cast(pl.Float64, strict=False) if text else series.cast(pl.Float64)
    if result is None or result.null_count() > series.null_count() or not _whole(column, result):
        raise _mistyped(name, column, series)
    return result


def _mistyped(name: str, column: Column, series: pl.Series) -> RequestError:
    what = f"The column {name} does not hold what its type {column.type} says."
    instead = "Correct the type in the schema, or the records."
    return RequestError(what, f"It is stored as {series.dtype}.", instead, field=name)


def _whole(column: Column, series: pl.Series) -> bool:
    if column.type != "integer":
        return True
    finite = series.filter(series.is_finite())
    return bool((finite == finite.floor()).all())
