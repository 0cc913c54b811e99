"""Clinic: made-up patients with a note and a picture each, in both of which a pneumonia may show."""

from __future__ import annotations

import numpy as np
import polars as pl

__all__ = ["frame"]

OPENINGS = ("Presents with", "Complains of", "Admitted with", "Brought in with")
ILL = (
    "productive cough and fever",
    "fever, chills and cough",
    "pleuritic chest pain",
    "crackles on auscultation",
)
WELL = (
    "a sprained ankle",
    "chest pain on exertion",
    "abdominal pain",
    "headache since yesterday",
    "dry cough",
)
CLOSINGS = ("No known allergies.", "Lives alone.", "Smoker.", "Vaccinated last year.", "Denies travel.")
SIDE = 16


def frame(n: int = 3000, seed: int = 0) -> pl.DataFrame:
    """`n` patients; a fifth have a pneumonia, whose words and bright spot are in most but not all of them."""
    rng = np.random.default_rng(seed)
    ill = rng.random(n) < 0.2
    age = np.clip(rng.normal(58, 18, n) + 6 * ill, 18, 100)
    notes = [_note(bool(each), rng) for each in ill]
    pixels = np.stack([_scan(bool(each), rng) for each in ill]).reshape(n, SIDE * SIDE)
    return pl.DataFrame(
        {
            "pid": [f"C{number:05d}" for number in range(n)],
            "age": age,
            "note": notes,
            "scan": pl.Series(pixels, dtype=pl.Array(pl.Float32, SIDE * SIDE)),
            "pneumonia": ill,
        }
    )


def _note(ill: bool, rng: np.random.Generator) -> str:
    told = ILL if rng.random() < (0.7 if ill else 0.08) else WELL
    return f"{rng.choice(OPENINGS)} {rng.choice(told)}. {rng.choice(CLOSINGS)}"


def _scan(ill: bool, rng: np.random.Generator) -> np.ndarray:
    """Two dark lungs on a grey ground, and in most of the ill a bright spot in one of them."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    picture = np.full((SIDE, SIDE), 120.0)
    for centre in (4, 11):
        picture[((rows - 8) / 6) ** 2 + ((columns - centre) / 2.5) ** 2 < 1] = 40
    if rng.random() < (0.8 if ill else 0.05):
        row, column = rng.integers(5, 12), rng.choice([4, 11]) + rng.integers(-1, 2)
        picture += 110 * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 3)
    return (picture + rng.normal(0, 12, picture.shape)).clip(0, 255).astype(np.float32)
