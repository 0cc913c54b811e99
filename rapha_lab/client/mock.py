"""Made-up patients, drawn from a dataset's public schema alone."""

from __future__ import annotations

import numpy as np
import polars as pl

from rapha_lab.protocol.schema import Column, Schema

__all__ = ["mock"]

MISSING_SHARE = 0.1


def mock(schema: Schema, n: int = 1000, seed: int = 0) -> pl.DataFrame:
    """`n` made-up patients in the layout of the records.

    Numbers spread over the public bounds on the column's scale and reach both; later categories are
    rarer and may not occur; where a value can be missing it is in a tenth. Columns are independent:
    nothing can be learnt from them. The same arguments give the same patients.

    Returns:
        A frame of `n` rows: the patient column, then the schema's columns in order.
    """
    rng = np.random.default_rng(seed)
    patients = pl.Series(schema.patient, [f"mock-{row:06d}" for row in range(n)], dtype=pl.String)
    return pl.DataFrame([patients, *(_draw(column, n, rng) for column in schema.columns)])


def _draw(column: Column, n: int, rng: np.random.Generator) -> pl.Series:
    if column.type == "category":
        weights = 0.8 ** np.arange(len(column.categories))
        codes = rng.choice(len(column.categories), n, p=weights / weights.sum())
        series = pl.Series(column.name, [column.categories[code] for code in codes], dtype=pl.String)
    elif column.type == "boolean":
        series = pl.Series(column.name, rng.random(n) < 0.3, dtype=pl.Boolean)
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
