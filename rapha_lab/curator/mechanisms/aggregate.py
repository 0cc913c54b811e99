"""Aggregates: which question a request asks, its price, and the plan that answers it with discrete Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import ROUND_UP, Context
from typing import Any

from rapha_lab.curator.accounting import UNIT, Gaussian, epsilon_of, least_epsilon, noise_for
from rapha_lab.curator.cohort import View
from rapha_lab.curator.mechanisms import Answer, Plan, Progress, counts, describe, moments, rows, survival
from rapha_lab.curator.mechanisms.question import Keys, Question, gaussian, touched
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Aggregate
from rapha_lab.protocol.schema import Schema

__all__ = ["epsilon_for", "expect", "plan", "price", "question"]

MOST = 1e6  # of ε in any request


def plan(ask: Aggregate, schema: Schema, delta: float) -> Plan:
    """How an aggregate will be answered at the asked (epsilon, delta).

    Raises:
        RequestError: for an unknown column, one that has no such figure, or an epsilon out of range.
    """
    asked, loss = price(ask, schema, delta)
    sd = loss.noise * asked.sensitivity
    add_noise = gaussian(sd)

    def run(view: View, progress: Progress) -> Answer:
        progress(1)
        return Answer(asked.read(add_noise(asked.exact(view)), sd))

    return Plan(loss, 1, touched(ask.split), run)


def price(ask: Aggregate, schema: Schema, delta: float) -> tuple[Question, Gaussian]:
    """What is asked as integers, and the privacy loss of answering it at the asked (epsilon, delta).

    Raises:
        RequestError: as for `plan`.
    """
    return question(ask, schema), Gaussian(noise_for(Gaussian, ask.epsilon, delta))


def question(ask: Aggregate, schema: Schema) -> Question:
    """What is asked, as integers.

    Raises:
        RequestError: for an unknown column, or one that has no such figure.
    """
    return _KINDS[type(ask)](ask, schema)


def expect(ask: Aggregate, schema: Schema, noise: float) -> dict[str, Any]:
    """The error of the answer at a noise multiplier, with its unit, as far as public figures define it."""
    asked = question(ask, schema)
    return asked.expect(noise * asked.sensitivity, schema.expected(ask.split))


def epsilon_for(ask: Aggregate, schema: Schema, delta: float, error: float) -> float:
    """The ε, rounded up to 4 digits, whose answer has at most this standard error.

    Raises:
        RequestError: if no ε gives it, or the error is not defined by public figures.
    """
    asked, expected = question(ask, schema), schema.expected(ask.split)

    def reached(noise: float) -> bool:
        return bool(asked.expect(noise * asked.sensitivity, expected)["error"] <= error)

    if asked.expect(asked.sensitivity, expected).get("error") is None:
        raise RequestError(
            f"{schema.name} declares no public number of patients.",
            "Without one nobody can say which ε gives this error.",
            "Give epsilon instead, or plan for patients=1000, say.",
            field="patients",
        )
    low, high = 1e-5, 1e11
    while high > low * (1 + 1e-9):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if reached(middle) else (low, middle)
    epsilon = max(epsilon_of(Gaussian(low * (1 - 1e-7)), delta) + 4 / UNIT, least_epsilon(delta))
    if not reached(low) or epsilon > MOST:
        what = f"No ε gives a standard error of {error:g}."
        raise RequestError(
            what, "It would take more ε than any budget holds.", "Ask for a larger error.", field="error"
        )
    return float(Context(prec=4, rounding=ROUND_UP).create_decimal(epsilon))


def _by(ask: Any, schema: Schema) -> Keys:
    return Keys([schema.column(name) for name in ask.by])


_KINDS: dict[type[Aggregate], Callable[[Any, Schema], Question]] = {
    messages.Count: lambda ask, schema: counts.count(_by(ask, schema)),
    messages.Histogram: lambda ask, schema: counts.histogram(schema.column(ask.column), ask.bins),
    messages.Quantiles: lambda ask, schema: counts.quantiles(schema.column(ask.column), ask.at, ask.bins),
    messages.Missing: lambda ask, schema: counts.missing([schema.column(name) for name in ask.columns]),
    messages.Sum: lambda ask, schema: moments.total(schema.column(ask.column), _by(ask, schema)),
    messages.Mean: lambda ask, schema: moments.mean(schema.column(ask.column), _by(ask, schema)),
    messages.Variance: lambda ask, schema: moments.variance(schema.column(ask.column), _by(ask, schema)),
    messages.Correlation: lambda ask, schema: moments.correlation([schema.column(n) for n in ask.columns]),
    messages.Survival: lambda ask, schema: survival.curve(
        schema.column(ask.time), schema.column(ask.event), _by(ask, schema), ask.bins
    ),
    messages.Describe: lambda ask, schema: describe.table([schema.column(name) for name in ask.columns]),
    messages.Rows: rows.question,
}
