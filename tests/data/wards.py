"""A dataset with every kind of column, and patients as nasty as records come."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import polars as pl
from hypothesis import strategies as st

from rapha_lab.client.mock import mock
from rapha_lab.curator.cohort import Cohort
from rapha_lab.protocol.schema import Schema

SALT = b"sixteen bytes ok"

FIELDS: dict[str, Any] = {
    "name": "ward",
    "title": "Patients of a made-up ward",
    "citation": "None.",
    "licence": "CC0",
    "patient": "id",
    "source": "ward.parquet",
    "patients": 100,
    "columns": [
        {"name": "age", "type": "number", "bounds": [0, 100], "unit": "years", "missing": "possible"},
        {"name": "crp", "type": "number", "bounds": [0.1, 1000], "scale": "log", "unit": "mg/L"},
        {"name": "visits", "type": "integer", "bounds": [0, 9]},
        {"name": "smoker", "type": "boolean", "missing": "possible"},
        {"name": "died", "type": "boolean"},
        {"name": "sex", "type": "category", "categories": ["F", "M"], "missing": "possible"},
        {"name": "site", "type": "category", "categories": ["North", "East", "South"], "missing": "possible"},
    ],
}
TABLES: list[dict[str, Any]] = [
    {
        "name": "labs",
        "meaning": "A row a blood sample.",
        "patient": "pid",
        "source": "labs.parquet",
        "time": "taken",
        "span": 100,
        "most": 4,
        "columns": [
            {"name": "value", "type": "number", "bounds": [0, 10], "missing": "possible"},
            {"name": "code", "type": "category", "categories": ["a", "b", "c"], "missing": "possible"},
            {"name": "urgent", "type": "boolean"},
        ],
    },
    {
        "name": "notes",
        "meaning": "A row a note or a scan, in no order of time.",
        "patient": "pid",
        "source": "notes.csv",
        "most": 2,
        "columns": [
            {"name": "text", "type": "text", "tokens": 5, "vocabulary": 64, "missing": "possible"},
            {"name": "scan", "type": "image", "shape": [1, 2, 3], "bounds": [0, 255], "missing": "possible"},
        ],
    },
]
for column in [*FIELDS["columns"], *(column for table in TABLES for column in table["columns"])]:
    column.update(meaning="Made up.", public="Made up.")

NASTY = [0.0, -0.0, 1.0, 50.0, 1e300, -1e300, float("inf"), float("-inf"), float("nan"), 5e-324, None]


def ward(**changes: Any) -> Schema:
    """The schema, with some of its fields changed."""
    return Schema.from_dict(msgspec.json.decode(msgspec.json.encode(FIELDS)) | changes)


def hospital(**changes: Any) -> Schema:
    """The ward with its tables."""
    return ward(tables=msgspec.json.decode(msgspec.json.encode(TABLES)), **changes)


def rows(size: st.SearchStrategy[int] | None = None) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Patients with any value a float column, a boolean and a text can hold."""
    number = st.sampled_from(NASTY) | st.floats(-10, 1100)
    truth = st.sampled_from([True, False, None])
    word = st.sampled_from(["F", "M", "North", "East", "South", "", "unlisted", None])
    row = st.fixed_dictionaries(
        {
            "age": number,
            "crp": number,
            "visits": st.sampled_from([0.0, 3.0, 9.0, 12.0, -4.0, float("inf"), float("nan"), None]),
            "smoker": truth,
            "died": truth,
            "sex": word,
            "site": word,
        }
    )
    return st.lists(row, max_size=12)


def cohort_of(patients: list[dict[str, Any]], schema: Schema | None = None) -> Cohort:
    """A cohort of these patients."""
    frame = mock(schema or ward(), 0).cast({"visits": pl.Float64})
    named = [{"id": f"p{number}", **patient} for number, patient in enumerate(patients)]
    return Cohort(schema or ward(), pl.DataFrame(named, schema=frame.schema), SALT)


def repeatable(law, scale, rng):
    """Adds rounded noise of a law of `rng` to integers: as the curator's own, but the same in every run."""
    return lambda exact: [int(n) for n in np.rint(exact + getattr(rng, law)(0.0, scale, len(exact)))]
