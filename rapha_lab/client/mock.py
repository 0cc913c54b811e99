"""Made-up patients, drawn from a dataset's public schema alone."""

from __future__ import annotations

import math
from datetime import datetime, timedelta

import numpy as np
import polars as pl

from rapha_lab.protocol.columns import Column, Table
from rapha_lab.protocol.schema import Schema

__all__ = ["mock", "mock_tables"]

MISSING_SHARE = 0.1
SOME_WORDS = (
    "patient admitted with fever and cough denies chest pain no known allergies discharged home".split()
)


def mock(schema: Schema, n: int = 1000, seed: int = 0) -> pl.DataFrame:
    """`n` made-up patients in the layout of the records.

    Numbers spread over the public bounds on the column's scale and reach both; later categories are
    rarer and may not occur; where a value can be missing it is in a tenth. Columns are independent:
    nothing can be learnt from them. The same arguments give the same patients.

    Returns:
        A frame of `n` rows: the patient column, then the schema's columns in order.
    """
    rng = np.random.default_rng(seed)
    patients = pl.Series(schema.patient, _names(n), dtype=pl.String)
    return pl.DataFrame([patients, *(_draw(column, n, rng) for column in schema.columns)])


def mock_tables(schema: Schema, n: int = 1000, seed: int = 0) -> dict[str, pl.DataFrame]:
    """The rows of the same patients in each of the schema's tables, in no order: some have none, some too many."""
    return {
        table.name: _rows(table, n, np.random.default_rng([seed, number]))
        for number, table in enumerate(schema.tables)
    }


def _names(n: int) -> list[str]:
    return [f"mock-{row:06d}" for row in range(n)]


def _rows(table: Table, n: int, rng: np.random.Generator) -> pl.DataFrame:
    counts = rng.geometric(1 / (1 + table.most / 3), n) - 1
    counts[: min(n, 2)] = [0, table.most + 1][: min(n, 2)]
    owners = rng.permutation(np.repeat(np.arange(n), counts))
    names = np.array(_names(n), dtype=object)[owners] if n else []
    series = [pl.Series(table.patient, names, dtype=pl.String)]
    if table.time:
        days = rng.random(len(owners)) * table.span
        times = [datetime(2020, 1, 1) + timedelta(days=float(day)) for day in days]
        series.append(pl.Series(table.time, times, dtype=pl.Datetime("us")))
    return pl.DataFrame(series + [_draw(column, len(owners), rng) for column in table.columns])


def _draw(column: Column, n: int, rng: np.random.Generator) -> pl.Series:
    if column.type == "category":
        weights = 0.8 ** np.arange(len(column.categories))
        codes = rng.choice(len(column.categories), n, p=weights / weights.sum())
        series = pl.Series(column.name, [column.categories[code] for code in codes], dtype=pl.String)
    elif column.type == "boolean":
        series = pl.Series(column.name, rng.random(n) < 0.3, dtype=pl.Boolean)
    elif column.type == "text":
        notes = [" ".join(rng.choice(SOME_WORDS, rng.integers(3, 30))) for _ in range(n)]
        series = pl.Series(column.name, notes, dtype=pl.String)
    elif column.type == "image":
        low, high = column.bounds or (0.0, 1.0)
        pixels = low + (high - low) * rng.random((n, math.prod(column.shape)), dtype=np.float32)
        series = pl.Series(column.name, pixels, dtype=pl.Array(pl.Float32, pixels.shape[1]))
    else:
        series = pl.Series(column.name, _numbers(column, n, rng))
    if column.missing == "never":
        return series
    return pl.select(
        pl.when(pl.Series(rng.random(n) >= MISSING_SHARE)).then(series).alias(column.name)
    ).to_series()


def _numbers(column: Column, n: int, rng: np.random.Generator) -> np.ndarray:
    """Bell-shaped over the bounds, the first two patients at either end."""
    low, high = column.limits
    where = rng.beta(3, 3, n)
    where[: min(n, 2)] = [0.0, 1.0][: min(n, 2)]
    values = low * (high / low) ** where if column.scale == "log" else low + (high - low) * where
    values = values.clip(low, high)
    return values.round().astype(np.int64) if column.type == "integer" else values
