"""Any function of some patients made private: sample and aggregate (Smith 2011; GUPT, Mohan et al. 2012).

1. T_1 .. T_k: the patients in k disjoint shards, by keyed hash of the patient.
2. O_i = f(T_i), each in a process of its own that has nothing but its shard and a fixed time; the public
   default stands for whatever is no k-th answer: none, late, of another size, not finite.
3. Clip every entry of O_i to its public bounds [l, u].
4. Release (1/k) Σ O_i + noise.

Neighbouring data sets differ in one patient, who is in one shard; so one O_i differs, by at most u - l in each
entry, whatever f is. With every entry counted in units of u - l the sensitivity is √entries / k. Entries are
put on a grid of integers and get discrete Gaussian noise, so that nothing is summed in floating point.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from rapha_lab.curator.accounting import Gaussian, noise_for
from rapha_lab.curator.cohort import View
from rapha_lab.curator.mechanisms import Answer, Plan, Progress
from rapha_lab.curator.mechanisms.question import GRID, Z, gaussian, touched
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Shards
from rapha_lab.protocol.schema import Schema

__all__ = ["FEWEST", "LEAST", "Workers", "choose", "entries", "job", "plan"]

LEAST = 200
"""Shards at least: with fewer the noise drowns what they say."""

FEWEST = 20
"""Patients expected in a shard at least."""

AIM = 0.02
"""The noise wished for when k is chosen, as a part of an entry's bounds."""


class Workers(Protocol):
    """Where a function meets its shards."""

    def waves(self, k: int) -> int:
        """In how many waves of workers `k` shards are done."""
        ...

    def answers(
        self,
        jobs: Iterable[bytes],
        k: int,
        size: int,
        seconds: float,
        started: Callable[[], None],
        beat: Callable[[], None],
    ) -> list[bytes]:
        """What the `k` jobs answered, each `size` bytes or taken as none, after a time that no shard moves.

        `started` is called before the first job is taken, `beat` before each wave.
        """
        ...


def plan(
    ask: Shards, schema: Schema, delta: float, workers: Workers, *, least: int = LEAST, fewest: int = FEWEST
) -> Plan:
    """How the shards will be averaged at the asked (epsilon, delta).

    Raises:
        RequestError: naming the field that is out of range.
    """
    size = math.prod(ask.shape)
    low, high, default = _public(ask, size)
    for name in ask.columns:
        schema.column(name)
    loss = Gaussian(noise_for(Gaussian, ask.epsilon, delta))
    most = math.floor((schema.expected(ask.split) or 0.0) / fewest)
    k = choose(loss.noise, size, least, most, ask.k)
    sd = loss.noise * 2 * GRID * math.sqrt(size)
    add_noise = gaussian(sd)

    def jobs(view: View) -> Iterator[bytes]:
        for shard in view.shards(k):
            yield job(ask, shard)

    def run(view: View, progress: Progress) -> Answer:
        told = workers.answers(jobs(view), k, 8 * size, ask.seconds, lambda: progress(1), lambda: progress(0))
        total = np.sum([entries(answer, low, high, default) for answer in told], axis=0)
        noisy, half = np.array(add_noise(total)) / (k * GRID), (high - low) / 2
        values = np.clip((low + high) / 2 + half * noisy, low, high)
        return Answer(_released(ask, values, half * sd / (k * GRID), low, high) | {"shards": k})

    return Plan(loss, 1, touched(ask.split), run, workers.waves(k))


def choose(noise: float, size: int, least: int, most: int, asked: int | None = None) -> int:
    """The number of shards: enough for noise of `AIM` of an entry's bounds, if there are patients enough.

    Raises:
        RequestError: if `least` shards, or those asked for, leave too few patients in each.
    """
    if most < least or (asked or least) > most:
        raise RequestError(
            f"{asked or least} shards leave too few patients in each.",
            f"For this split at most {most} shards are sensible, and at least {least} are needed.",
            "Ask of patients instead of a split, use an aggregate, or train with fit().",
            field="k",
        )
    if asked is not None and asked < least:
        raise RequestError(
            f"k is {asked}.", f"At least {least} shards are needed.", f"Say k={least}.", field="k"
        )
    return asked or min(max(least, math.ceil(noise * math.sqrt(size) / AIM)), most, 5 * least)


def entries(answer: bytes, low: np.ndarray, high: np.ndarray, default: np.ndarray) -> np.ndarray:
    """A shard's answer as integers in [-GRID, GRID]; total: anything at all may have been answered."""
    value = np.frombuffer(answer, "<f8") if len(answer) == 8 * len(low) else default
    value = value if np.isfinite(value).all() else default
    middle, half = low / 2 + high / 2, high / 2 - low / 2
    return np.rint((value.clip(low, high) - middle) / half * GRID).clip(-GRID, GRID).astype(np.int64)


def job(ask: Shards, shard: View) -> bytes:
    """All that a worker is given."""
    records, frame = io.BytesIO(), io.BytesIO()
    shard.frame(ask.columns).write_ipc(records)
    header = {"source": ask.source, "name": ask.name, "shape": ask.shape}
    messages.write_frame(frame, messages.encode(header), records.getvalue())
    return frame.getvalue()


def _public(ask: Shards, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper bounds and the default, (size,) each."""
    if size > 100:
        what = f"The shape {ask.shape} has {size} entries."
        raise RequestError(what, "Noise grows with them; 100 are the most.", field="shape")
    pairs = ask.bounds * size if len(ask.bounds) == 1 else ask.bounds
    low, high = (np.array(ends, dtype=np.float64) for ends in zip(*pairs, strict=True))
    if len(pairs) != size or not (np.abs([low, high]) <= 1e12).all() or not (high - low > 1e-12).all():
        why = f"There must be one pair (low, high), or one for each of {size} entries, with low below high."
        raise RequestError("The bounds do not fit.", why, field="bounds")
    default = np.array(ask.default if ask.default is not None else (low + high) / 2, dtype=np.float64)
    default = np.full(size, default[0]) if len(default) == 1 else default
    if len(default) != size or not ((low <= default) & (default <= high)).all():
        raise RequestError(
            "The default does not fit.", "It needs one number within the bounds per entry.", field="default"
        )
    return low, high, default


def _released(
    ask: Shards, values: np.ndarray, sd: np.ndarray, low: np.ndarray, high: np.ndarray
) -> dict[str, Any]:
    ends = zip(np.maximum(values - Z * sd, low), np.minimum(values + Z * sd, high), strict=True)
    return {
        "kind": "shards",
        "function": ask.name,
        "shape": ask.shape,
        "estimates": values.tolist(),
        "errors": sd.tolist(),
        "intervals": [[float(a), float(b)] for a, b in ends],
    }
