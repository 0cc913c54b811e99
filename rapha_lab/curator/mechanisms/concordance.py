"""Harrell's concordance (1982) of risk scores with times of an event, from one noisy histogram.

A pair of patients counts if the earlier of the two had the event; it is concordant if that one has the higher score,
and half so if the scores tie. A patient is in one cell: a bin of scores, a bin of times, and whether the time ended
with the event. Discrete Laplace noise on the cells makes all of it (ε, 0)-private. Pairs in one bin of time are left
out, so a factor of the noise of a cell only ever meets that of another: the two sums of the ratio are unbiased, and are
taken of the noisy counts as they are. Score bins are placed by two noisy quantiles, as for the other metrics.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rapha_lab.curator.cohort import View
from rapha_lab.curator.mechanisms import Answer, Plan, Progress, evaluate
from rapha_lab.curator.mechanisms.counts import edges_of, where_of
from rapha_lab.curator.mechanisms.metrics import spread
from rapha_lab.curator.mechanisms.question import Z, laplace, touched
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Evaluate
from rapha_lab.protocol.schema import Schema

__all__ = ["TIMES", "judge", "plan"]

TIMES = 8
"""Bins of time."""


def plan(ask: Evaluate, tensors: bytes, schema: Schema) -> Plan:
    """How the concordance of a score with a time and an event will be answered at the asked epsilon.

    Raises:
        RequestError: naming the field that does not fit.
    """
    if ask.metrics != ["concordance"] or ask.by or ask.time is None:
        why = "Its histogram has times as well, so that other metrics would be worse from it."
        instead = 'Say evaluate(model, ["concordance"], target=EVENT, time=TIME).'
        raise RequestError("A concordance is asked for alone, with a time.", why, instead, field="metrics")
    event, time = schema.column(ask.target), schema.column(ask.time)
    if event.type != "boolean" or not time.numeric:
        what = f"The event {event.name} is a {event.type}, the time {time.name} a {time.type}."
        raise RequestError(what, "They must be a truth and a number.", field="time")
    score = evaluate.logits(ask, tensors, schema)
    loss, placing, scale = evaluate.price(ask.epsilon, schema.expected(ask.split))
    find, add_noise = evaluate.finder(placing), laplace(scale)
    times = edges_of(time, TIMES)
    size = len(times) - 1

    def run(view: View, progress: Progress) -> Answer:
        progress(1)
        known = (view.known(event.name) & view.known(time.name)).numpy()
        scores = evaluate.bounded(score(view))[known]
        low, high = (float(evaluate.CANDIDATES[find(part)]) for part in evaluate.utilities(scores))
        edges = evaluate.edges_between(low, high)
        when = where_of(view, time, times)[known]
        labels = view.codes(event.name).numpy()[known] * size + when
        exact = evaluate.cells(scores, labels, edges, 2 * size)
        noisy = np.array(add_noise(exact.ravel()), dtype=float).reshape(2, size, -1)
        told = {"kind": "evaluation", "target": event.name, "time": time.name}
        return Answer({**told, "metrics": {"concordance": judge(noisy, spread(scale))}})

    return Plan(loss, 1, touched(ask.split), run)


def judge(noisy: np.ndarray, sd: float) -> dict[str, Any]:
    """The concordance with its error and 95 % interval, which cover the patients' sampling and the noise.

    With C = A / B, one more patient in a cell moves it by (dA - C dB) / B; counts vary as Poisson's do, and each by
    the noise. The product of two cells' noise, which that misses, is added.

    Args:
        noisy: (2, times, scores) patients without and with the event.
        sd: standard deviation of the noise of each.
    """
    events, all_ = noisy[1], noisy.sum(0)
    # of those later than each time bin: how many score lower (ties count half), and how many there are
    later = np.cumsum(all_[::-1], 0)[::-1] - all_
    lower = np.cumsum(later, 1) - later / 2
    whole = later.sum(1, keepdims=True)
    concordant, pairs = float((events * lower).sum()), float((events * whole).sum())
    # of events earlier than each time bin: how many score higher, and how many there are
    earlier = np.cumsum(events, 0) - events
    higher = earlier.sum(1, keepdims=True) - np.cumsum(earlier, 1) + earlier / 2
    times, scores = events.shape
    noise = 2 * sd**4 * times * (times - 1) / 2 * scores**2  # of products, whose pairs of cells are so many
    loose = math.sqrt(noise + sd**2 * float((whole**2).sum() + 2 * (earlier.sum(1) ** 2).sum() * scores))
    if pairs <= 4 * loose:
        return {"value": 0.5, "error": 0.5, "interval": [0.0, 1.0]}
    value = min(max(concordant / pairs, 0.0), 1.0)
    as_later = higher - value * earlier.sum(1, keepdims=True)
    as_event = as_later + lower - value * whole
    sampling = float((noisy[0].clip(0) * as_later**2).sum() + (events.clip(0) * as_event**2).sum())
    linear = sd**2 * float((as_later**2).sum() + (as_event**2).sum())
    error = math.sqrt(sampling + linear + noise * (0.25 + (value - 0.5) ** 2)) / pairs
    ends = [max(value - Z * error, 0.0), min(value + Z * error, 1.0)]
    return {"value": value, "error": min(error, 0.5), "interval": ends}
