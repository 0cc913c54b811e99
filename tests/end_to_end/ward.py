"""A ward of made-up patients whose outcome can be predicted, for tests that need a dataset and no canary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import hospital
import numpy as np
import polars

from rapha_lab.client.site import Site as Connected
from rapha_lab.enclave.site import Site
from rapha_lab.protocol.keys import PrivateKey

PATIENTS = 1200
CHAPTERS = ["infections", "neoplasms", "blood", "endocrine", "nervous", "circulatory", "respiratory"]

SCHEMA = f"""
name = "ward"
title = "A made-up ward"
citation = "Nobody (2026)"
licence = "CC0"
patient = "hospital_number"
patients = {PATIENTS}
source = "ward.parquet"

[[columns]]
name = "age"
type = "number"
unit = "years"
bounds = [0, 100]
meaning = "Age at admission."
public = "Hardly anybody is older."

[[columns]]
name = "potassium"
type = "number"
unit = "mmol/L"
bounds = [1, 10]
scale = "log"
missing = "possible"
meaning = "Serum potassium."
public = "The assay's range."

[[columns]]
name = "visits"
type = "integer"
unit = "visits"
bounds = [0, 20]
meaning = "Visits last year."
public = "Counted up to twenty."

[[columns]]
name = "sex"
type = "category"
categories = ["F", "M"]
meaning = "Sex as recorded."
public = "As in the form."

[[columns]]
name = "chapter"
type = "category"
categories = {CHAPTERS!r}
meaning = "Chapter of the main diagnosis."
public = "Chapters of the ICD."

[[columns]]
name = "died"
type = "boolean"
meaning = "Whether the patient died within a year."
public = "A yes or no."
"""

FEATURES = ["age", "potassium", "visits", "sex"]


def frame(seed: int = 0) -> polars.DataFrame:
    """The ward's records."""
    rng = np.random.default_rng(seed)
    age, visits = rng.uniform(0, 100, PATIENTS), rng.integers(0, 21, PATIENTS)
    chapter = rng.integers(0, len(CHAPTERS), PATIENTS)
    risk = 0.06 * (age - 50) + 0.15 * (visits - 10) + (chapter % 3 - 1.0)
    known = rng.random(PATIENTS) > 0.1
    return polars.DataFrame(
        {
            "hospital_number": [f"w{n:05d}" for n in range(PATIENTS)],
            "age": age,
            "potassium": [
                float(v) if k else None for v, k in zip(rng.uniform(2, 7, PATIENTS), known, strict=True)
            ],
            "visits": visits,
            "sex": [("F", "M")[n] for n in rng.integers(0, 2, PATIENTS)],
            "chapter": [CHAPTERS[n] for n in chapter],
            "died": rng.random(PATIENTS) < 1 / (1 + np.exp(-risk)),
        }
    )


@dataclass(frozen=True)
class Ward:
    """The running site, and two researchers of one project."""

    site: Site
    url: str
    key: PrivateKey
    other: PrivateKey
    folder: Path

    def connect(self, key: PrivateKey | None = None) -> Connected:
        """A new connection."""
        return hospital.connected(self.url, key or self.key)

    def spent(self) -> dict[str, int]:
        """Of each account, in the ledger's own units."""
        return hospital.spent(self.folder)
