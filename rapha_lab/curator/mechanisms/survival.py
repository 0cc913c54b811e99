"""The share of patients without an event by time: Kaplan and Meier 1958 on public bins, with noise.

A patient is in one cell: the bin of their time, or the one beyond the time's upper bound, and whether it ended with
the event. With d_i events and n_i at risk in bin i (half of those censored in it are taken to be at risk, Cutler and
Ederer 1958), S = Π (1 - d_i / n_i) is taken of noisy counts as they are, since clipping them would bias the curve, and
made to fall. Its interval, on the scale of H = -log S, covers the patients' sampling (Greenwood 1926) and the noise
(by linearisation of H).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rapha_lab.curator.cohort import View
from rapha_lab.curator.mechanisms.counts import edges_of, where_of
from rapha_lab.curator.mechanisms.question import Keys, Question, Z
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import Column

__all__ = ["curve"]

MOST = 4000
"""Bins of all curves together."""

FEW = 6.0
"""A curve ends where fewer are at risk than this many standard deviations of the noise in their number."""


def curve(time: Column, event: Column, by: Keys, bins: int) -> Question:
    """Survival by time, one curve for each cell of `by`.

    Raises:
        RequestError: the time is no number, or the event no truth.
    """
    if not time.numeric:
        raise RequestError(f"The time {time.name} is a {time.type}.", "Name a number.", field="time")
    if event.type != "boolean":
        raise RequestError(f"The event {event.name} is a {event.type}.", "Name a truth.", field="event")
    edges = edges_of(time, bins)
    size = len(edges) - 1
    if by.size * size > MOST:
        what = f"{by.size} curves of {size} bins are too many."
        raise RequestError(what, f"{MOST} bins in all are the most.", "Take fewer bins.", field="bins")

    def exact(view: View) -> np.ndarray:
        cells = by.cells(view)
        known = (view.known(time.name) & view.known(event.name)).numpy() & (cells < by.size)
        beyond = view.numbers(time.name).numpy() >= time.limits[1]
        where = np.where(beyond, size, where_of(view, time, edges))
        cell = (cells * 2 + view.codes(event.name).numpy()) * (size + 1) + where
        return np.bincount(cell[known], minlength=2 * by.size * (size + 1))

    def read(noisy: list[int], sd: float) -> dict[str, Any]:
        counts = np.array(noisy, dtype=float).reshape(by.size, 2, size + 1)
        curves = [
            {"name": by.label(cell) or "survival", **_curve(counts[cell], edges, sd)}
            for cell in range(by.size)
        ]
        told = {"kind": "survival", "time": time.name, "event": event.name, "unit": time.unit, **by.told()}
        return told | {"curves": curves, "figures": _figures(curves, bool(by.columns), time.unit)}

    def expect(sd: float, expected: float | None) -> dict[str, Any]:
        if expected is None:
            return {"error": sd, "unit": "patients per cell"}
        half = sd * math.sqrt(size / 2) / (expected / by.size)
        notes = [
            "Noise alone, half way, where half of the patients are left at risk and few have had the event."
        ]
        return {"error": min(half * 2, 1.0), "unit": "of survival", "notes": notes}

    return Question(exact, 1.0, read, expect)


def _curve(counts: np.ndarray, edges: np.ndarray, sd: float) -> dict[str, Any]:
    """Survival at the end of each bin, its error and 95 % interval, from (censored, events) of one cell."""
    censored, events = counts
    left = np.cumsum((censored + events)[::-1])[::-1]  # at risk at the start of each bin
    at_risk = (left - censored / 2)[:-1]
    noise = sd * np.sqrt(2 * np.arange(len(left), 1, -1))
    size = int(np.logical_and.accumulate(at_risk > np.maximum(FEW * noise, 1.0)).sum())
    n, d = at_risk[:size], events[:size]
    hazard = np.minimum(d / n, 0.99)
    weight = 1 / (n * (1 - hazard))
    greenwood = np.cumsum(np.maximum(hazard, 0.0) * weight)
    errors = np.sqrt(greenwood + sd**2 * _gradients(weight, hazard * weight, len(left)))
    hazards = np.maximum.accumulate(np.maximum(np.cumsum(-np.log1p(-hazard)), 0.0))
    survival = np.exp(-hazards)
    low = np.exp(-(hazards + Z * errors))
    high = np.minimum(np.exp(-(hazards - Z * errors)), 1.0)
    return {
        "at": [float(edges[0]), *edges[1 : size + 1].tolist()],
        "survival": [1.0, *survival.tolist()],
        "errors": [0.0, *np.minimum(survival * errors, 1.0).tolist()],
        "intervals": [[1.0, 1.0], *np.stack([low, high], -1).tolist()],
    }


def _gradients(weight: np.ndarray, slope: np.ndarray, bins: int) -> np.ndarray:
    """Σ (∂H_k/∂cell)² over all cells, for each k: what one unit of noise in every cell does to H_k.

    One more event in bin j adds `weight` there, and one more at risk takes `slope` off in each bin up to j.
    """
    size = len(weight)
    found, through = np.zeros(size), np.cumsum(slope)
    for k in range(size):
        reach, own, half = np.full(bins, through[k]), np.zeros(bins), np.zeros(bins)
        reach[: k + 1], own[: k + 1] = through[: k + 1], weight[: k + 1]
        half[: k + 1] = slope[: k + 1] / 2  # of those censored in a bin half are at risk in it
        found[k] = ((own - reach) ** 2).sum() + ((half - reach) ** 2).sum()
    return found


def _figures(curves: list[dict[str, Any]], named: bool, unit: str) -> list[dict[str, Any]]:
    """Survival at a quarter, half, three quarters and the end of what is shown of each curve."""
    figures = []
    for each in curves:
        last = len(each["at"]) - 1
        for place in sorted({max(1, round(last * part / 4)) for part in range(1, 5)} if last else set()):
            name = f"at {each['at'][place]:.4g} {unit}".strip()
            figures.append(
                {
                    "name": f"{each['name']}, {name}" if named else name,
                    "value": each["survival"][place],
                    "error": each["errors"][place],
                    "interval": [
                        min(each["intervals"][place][0], each["survival"][place]),
                        each["intervals"][place][1],
                    ],
                }
            )
    return figures
