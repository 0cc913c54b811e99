"""Bounds of common clinical measurements from general medical knowledge, to be proposed for a column of that name."""

from __future__ import annotations

import re

__all__ = ["proposed"]

_LIVING = "Outside of it nobody lives long; general medical knowledge."
_WIDE = "From far below to far above the normal range; general medical knowledge."

# names as they are common, unit, bounds, scale, reason
_KNOWN: tuple[tuple[str, str, tuple[float, float], str, str], ...] = (
    (r"age", "years", (0, 120), "linear", "Nobody on record lived much past 120."),
    (r"(year_of_birth|birth_year)", "calendar year", (1900, 2030), "linear", "Nobody alive was born before."),
    (r"(heart_?rate|hr|pulse)", "1/min", (0, 300), "linear", _LIVING),
    (r"(sbp|systolic\w*)", "mmHg", (0, 300), "linear", _LIVING),
    (r"(dbp|diastolic\w*)", "mmHg", (0, 200), "linear", _LIVING),
    (r"(map|mean_?bp\w*)", "mmHg", (0, 250), "linear", _LIVING),
    (r"(resp\w*_?rate|rr)", "1/min", (0, 90), "linear", _LIVING),
    (r"(temp|temperature|body_temp\w*)", "Celsius", (25, 45), "linear", _LIVING),
    (r"(spo2|sao2|o2_?sat\w*)", "%", (0, 100), "linear", "A share."),
    (r"(weight|weight_kg)", "kg", (0.3, 300), "log", "From a preterm infant to the end of hospital scales."),
    (
        r"(height|height_cm)",
        "cm",
        (20, 250),
        "linear",
        "From a preterm infant to the tallest on record, about.",
    ),
    (r"bmi", "kg/m2", (8, 100), "linear", "From starvation to the heaviest on record, about."),
    (r"(crea|creat|creatinine)", "mg/dL", (0.1, 25), "log", _WIDE),
    (r"(bun|urea_nitrogen)", "mg/dL", (1, 300), "log", _WIDE),
    (r"(sodium|na)", "mmol/L", (100, 190), "linear", _LIVING),
    (r"(potassium|k)", "mmol/L", (1, 12), "linear", _LIVING),
    (r"(glucose|glu)", "mg/dL", (10, 1500), "log", _WIDE),
    (r"(hemoglobin|haemoglobin|hgb|hb)", "g/dL", (1, 25), "linear", _LIVING),
    (r"(hematocrit|haematocrit|hct)", "%", (2, 75), "linear", _LIVING),
    (
        r"(wbc|leu[ck]ocytes)",
        "1000/uL",
        (0.05, 500),
        "log",
        "From aplasia to leukaemia; general medical knowledge.",
    ),
    (r"(platelets|plt)", "1000/uL", (1, 2000), "log", _WIDE),
    (r"albumin", "g/dL", (0.4, 7), "linear", _WIDE),
    (r"bilirubin", "mg/dL", (0.1, 60), "log", _WIDE),
    (r"crp", "mg/L", (0.1, 700), "log", _WIDE),
    (r"lactate", "mmol/L", (0.1, 40), "log", _WIDE),
    (r"(ph|arterial_ph)", "", (6.5, 8), "linear", _LIVING),
)


def proposed(name: str) -> tuple[str, tuple[float, float], str, str] | None:
    """Unit, bounds, scale and reason for a column of that name, if it is a common one."""
    for pattern, *rest in _KNOWN:
        if re.fullmatch(pattern, name.lower()):
            return tuple(rest)  # type: ignore[return-value]
    return None
