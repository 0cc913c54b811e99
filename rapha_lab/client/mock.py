"""Made-up patients, drawn from a dataset's public schema alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta

import numpy as np
import polars as pl
from scipy.special import betaincinv, ndtr

from rapha_lab.protocol.columns import Column, Table
from rapha_lab.protocol.schema import Schema

__all__ = ["mock", "mock_tables"]

EPOCH = datetime(2020, 1, 1)

MISSING_SHARE = 0.1
SOME_WORDS = (
    "patient admitted with fever and cough denies chest pain no known allergies discharged home".split()
)


def mock(schema: Schema, n: int = 1000, seed: int = 0) -> pl.DataFrame:
    """`n` made-up patients in the layout of the records.

    Numbers spread over the public bounds on the column's scale and reach both; counts from zero are often zero; later
    categories are rarer and may not occur; where a value can be missing it is in a tenth. Columns go together only as
    the schema says, so that nothing can be learnt from them. The same arguments give the same patients.

    Returns:
        A frame of `n` rows: the patient column, then the schema's columns in order.
    """
    rng = np.random.default_rng(seed)
    patients = pl.Series(schema.patient, _names(n), dtype=pl.String)
    return pl.DataFrame([patients, *_drawn(schema.columns, n, rng)])


def mock_tables(schema: Schema, n: int = 1000, seed: int = 0) -> dict[str, pl.DataFrame]:
    """The rows of the same patients in each of the schema's tables, in order of time: some have none, some too many."""
    return {
        table.name: _rows(table, n, np.random.default_rng([seed, number]))
        for number, table in enumerate(schema.tables)
    }


def _names(n: int) -> list[str]:
    return [f"mock-{row:06d}" for row in range(n)]


def _rows(table: Table, n: int, rng: np.random.Generator) -> pl.DataFrame:
    counts = rng.geometric(1 / (1 + table.most / 3), n) - 1
    counts[: min(n, 2)] = [0, table.most + 1][: min(n, 2)]
    owners = np.repeat(np.arange(n), counts)
    series = [pl.Series(table.patient, np.array(_names(n), dtype=object)[owners].tolist(), dtype=pl.String)]
    if table.time:
        days = rng.random(len(owners)) * table.span
        days = days[np.lexsort((days, owners))]
        times = [EPOCH + timedelta(days=float(day)) for day in days]
        series.append(pl.Series(table.time, times, dtype=pl.Datetime("us")))
    return pl.DataFrame(series + list(_drawn(table.columns, len(owners), rng)))


def _drawn(columns: Iterable[Column], n: int, rng: np.random.Generator) -> Iterator[pl.Series]:
    """The columns in order, each from a normal score that is mixed with those it correlates with."""
    scores: dict[str, np.ndarray] = {}
    for column in columns:
        with_others = [(much, scores[name]) for name, much in column.correlates]
        own = math.sqrt(max(0.0, 1 - sum(much * much for much, _ in with_others)))
        mixed = sum((much * score for much, score in with_others), own * rng.standard_normal(n))
        scores[column.name] = mixed
        series = _draw(column, n, ndtr(mixed), rng)
        if column.missing == "possible":
            known = pl.Series(rng.random(n) >= MISSING_SHARE)
            series = pl.select(pl.when(known).then(series).alias(column.name)).to_series()
        yield series


def _draw(column: Column, n: int, rank: np.ndarray, rng: np.random.Generator) -> pl.Series:
    """A column's values by each patient's rank in it, from 0 to 1."""
    if column.type == "category":
        weights = 0.8 ** np.arange(len(column.categories))
        codes = np.searchsorted((weights / weights.sum()).cumsum()[:-1], rank)
        return pl.Series(column.name, [column.categories[code] for code in codes], dtype=pl.String)
    if column.type == "boolean":
        return pl.Series(column.name, rank > 0.7, dtype=pl.Boolean)
    if column.type == "text":
        notes = [" ".join(rng.choice(SOME_WORDS, rng.integers(3, 30))) for _ in range(n)]
        return pl.Series(column.name, notes, dtype=pl.String)
    if column.type == "image":
        low, high = column.bounds or (0.0, 1.0)
        pixels = low + (high - low) * rng.random((n, math.prod(column.shape)), dtype=np.float32)
        return pl.Series(column.name, pixels, dtype=pl.Array(pl.Float32, pixels.shape[1]))
    return pl.Series(column.name, _numbers(column, rank))


def _numbers(column: Column, rank: np.ndarray) -> np.ndarray:
    """Bell-shaped over the bounds, counts from zero falling from there, the first two patients at either end."""
    low, high = column.limits
    counts = column.type == "integer" and low == 0
    where = betaincinv(0.6, 2.4, rank) if counts else betaincinv(3.0, 3.0, rank)
    where[:2] = [0.0, 1.0][: len(where)]
    values = low * (high / low) ** where if column.scale == "log" else low + (high - low) * where
    values = values.clip(low, high)
    return values.round().astype(np.int64) if column.type == "integer" else values
