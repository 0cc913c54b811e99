"""Metrics of a classifier from noisy counts of patients per class and bin of scores: post-processing only.

Counts are arrays (..., 2, K): negatives and positives in K bins of the logit, ascending. Everything is
vectorised over the leading dimensions, so that an interval is the same code on simulated counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from rapha_lab.curator.mechanisms.question import Z

__all__ = ["METRICS", "RATES", "gap", "judge", "mend", "refine", "spread"]

Counts = np.ndarray

DRAWS, PARTS, CAUTION = 1000, 4, 1.5
_TINY = 1e-9


def mend(noisy: Counts, sd: float) -> Counts:
    """Noisy counts with empty tails set to 0 and none below 0.

    A class's outermost bins are taken as empty as long as their sum is within half a standard deviation of
    its noise; clipping alone would turn noise into patients with extreme scores.
    """
    limit = 0.5 * sd * np.sqrt(np.arange(1, noisy.shape[-1] + 1))
    rising = np.logical_or.accumulate(np.cumsum(noisy, -1) > limit, -1)
    falling = np.logical_or.accumulate(np.cumsum(noisy[..., ::-1], -1) > limit, -1)[..., ::-1]
    return np.where(rising & falling, noisy, 0.0).clip(0)


def spread(scale: float) -> float:
    """The standard deviation of discrete Laplace noise, whose chance of k falls as exp(-|k| / scale)."""
    return math.sqrt(2 * math.exp(-1 / scale)) / -math.expm1(-1 / scale)


def judge(
    noisy: Counts, edges: np.ndarray, scale: float, names: Iterable[str], cut: float = 0.0
) -> dict[str, Any]:
    """The metrics asked for, each with its standard error and 95 % interval, and the curves behind them.

    Value, error and interval speak of all patients like these: they include both the sampling of the
    patients and the noise, and widen where few patients stand out from the noise.

    Args:
        noisy: (2, K) counts with noise.
        edges: (K-1,) inner edges of the bins: an equally spaced grid, and the cut.
        scale: of the discrete Laplace noise of each count.
        names: of RATES and METRICS, "calibration", and "confusion".
        cut: the logit from which on a score counts as a yes.
    """
    sd, raw = spread(scale), noisy.astype(float)
    counts = mend(raw, sd)
    moves = _simulate(counts, scale)
    draws = mend(counts + moves, sd)
    fine, logits = refine(counts, edges, cut)
    few, ties = _few(counts, sd), _ties(counts, edges, cut)
    answer: dict[str, Any] = {"metrics": {}}
    for name in dict.fromkeys(names):
        if name == "calibration":
            answer["calibration"] = _calibration(counts, draws, edges, 4 * sd)
        elif name == "confusion":
            answer["metrics"] |= _confusion(noisy, sd, edges, cut)
        elif name in RATES:
            answer["metrics"][name] = _rate(counts, sd, name, edges, cut)
        else:
            metric, most = METRICS[name]
            value = min(float(metric(fine, logits)), most)
            if few:
                answer["metrics"][name] = _within(value, most, 0.0, most, most)
            elif name == "auprc":
                drawn = metric(refine(draws, edges, cut)[0], logits)
                answer["metrics"][name] = _interval(value, value, drawn, most, _caution(counts, sd), ties)
            else:
                plain, drawn = (
                    metric(refine(c, edges, cut, whole=False)[0], logits) for c in (raw, raw + moves)
                )
                slack = ties if name == "auroc" else _crowd(counts, edges, cut, metric)
                answer["metrics"][name] = _interval(value, float(plain), drawn, most, 1.0, slack)
        if name == "auroc":
            answer["roc"] = _roc(counts)
    return answer


def _simulate(counts: Counts, scale: float) -> Counts:
    """By how much counts might have come out otherwise: other patients from the same scores, other noise."""
    rng = np.random.default_rng()
    shape = (DRAWS, *counts.shape)
    p = -math.expm1(-1 / scale)
    # the difference of two geometric variables is discrete Laplace
    return rng.poisson(counts, shape) - counts + rng.geometric(p, shape) - rng.geometric(p, shape)


def _noise_of(counts: Counts, sd: float) -> float:
    """The noise in a class's number of patients, as a part of the smaller class."""
    return sd * math.sqrt(counts.shape[-1]) / max(float(counts.sum(-1).min()), _TINY)


def _few(counts: Counts, sd: float) -> bool:
    """Whether hardly any patient of a class is distinguished from noise, so that nothing is known."""
    return _noise_of(counts, sd) >= 1 / 3


def _caution(counts: Counts, sd: float) -> float:
    """By how much to widen an interval whose simulation starts from mended counts, which are noisy themselves.

    The factor was set by simulation over sizes, prevalences and ε, and a test of coverage holds it.
    """
    return 1 + CAUTION * math.sqrt(_noise_of(counts, sd))


def _ties(counts: Counts, edges: np.ndarray, cut: float) -> float:
    """The cube of the share of pairs in one bin: a bound of experience on what their order adds to a rank."""
    grid = _without_cut(counts, edges, cut)[0]
    return float(_share(grid.prod(0).sum(), grid.sum(1).prod(), 1.0)) ** 3


def _crowd(counts: Counts, edges: np.ndarray, cut: float, metric: Callable[..., np.ndarray]) -> float:
    """By how much a metric may be other than its bins say where one holds most patients, who may be anywhere in it.

    So it is where scores are closer than the candidates for the bins' place, which then falls anywhere; else nothing.
    """
    grid, edges = _without_cut(counts, edges, cut)
    fullest = int(grid.sum(0).argmax())
    if grid[:, fullest].sum() <= grid.sum() / 2:
        return 0.0
    width = edges[1] - edges[0]
    places = edges[0] + width * (fullest - 1 + np.linspace(0, 1, PARTS + 1))
    crowd = grid[:, fullest][:, None]
    found = np.array([float(metric(crowd, np.array([place]))) for place in places])
    middle = float(metric(crowd, np.array([places[PARTS // 2]])))
    return float(np.abs(found - middle).max() * crowd.sum() / grid.sum())


def _interval(
    value: float, plain: float, drawn: np.ndarray, most: float, caution: float, slack: float
) -> dict[str, Any]:
    """The basic bootstrap: what the simulation adds to the figure it started from is taken off again."""
    low, high = (plain - np.quantile(drawn, [0.975, 0.025])) * caution
    error = min(float(np.std(drawn)) * caution, most)
    return _within(value, error, plain + low - slack, plain + high + slack, most)


def _within(value: float, error: float, low: float, high: float, most: float = 1.0) -> dict[str, Any]:
    ends = [min(max(float(end), 0.0), most) for end in (min(low, value), max(high, value))]
    return {"value": value, "error": error, "interval": ends}


def _without_cut(counts: Counts, edges: np.ndarray, cut: float) -> tuple[Counts, np.ndarray]:
    """The counts on the equally spaced grid alone, the bin that the cut divides put together again."""
    zero = int(np.searchsorted(edges, cut))
    joined = counts[..., zero : zero + 2].sum(-1, keepdims=True)
    return np.concatenate([counts[..., :zero], joined, counts[..., zero + 2 :]], -1), np.delete(edges, zero)


def refine(
    counts: Counts, edges: np.ndarray, cut: float = 0.0, whole: bool = True
) -> tuple[Counts, np.ndarray]:
    """Counts and logits of finer bins, each class falling linearly within a bin as its neighbours suggest.

    Returns:
        counts (..., 2, PARTS * (K-1)) and the middles of their bins. A tail is taken to be as wide as a bin.
    """
    counts, edges = _without_cut(counts, edges, cut)
    width = edges[1] - edges[0]
    starts = np.append(edges[0] - width, edges)
    x = (np.arange(PARTS) + 0.5) / PARTS
    padded = np.pad(counts, [(0, 0)] * (counts.ndim - 1) + [(1, 1)])
    slope = (padded[..., 2:] - padded[..., :-2]) / 2
    slope = slope.clip(-2 * counts, 2 * counts) if whole else slope
    fine = (counts[..., None] + slope[..., None] * (x - 0.5)) / PARTS
    return fine.reshape(*counts.shape[:-1], -1), (starts[:, None] + width * x).ravel()


def _share(part: np.ndarray, whole: np.ndarray, otherwise: float = 0.0) -> np.ndarray:
    return np.where(whole > _TINY, part / np.maximum(whole, _TINY), otherwise)


def _auroc(counts: Counts, logits: np.ndarray) -> np.ndarray:
    """The chance that a positive scores above a negative, ties counting half."""
    negatives, positives = counts[..., 0, :], counts[..., 1, :]
    below = np.cumsum(negatives, -1) - negatives / 2
    return _share((positives * below).sum(-1), positives.sum(-1) * negatives.sum(-1), 0.5)


def _auprc(counts: Counts, logits: np.ndarray) -> np.ndarray:
    """Average precision, from the top bin down, with the two classes evenly mixed within a bin.

    In a bin with p positives and n negatives, below t positives and c patients in all, the integral of
    precision over recall has the closed form below (the interpolation of Davis and Goadrich 2006).
    """
    n, p = counts[..., 0, ::-1], counts[..., 1, ::-1]
    t, c = np.cumsum(p, -1) - p, np.cumsum(p + n, -1) - p - n
    r = 1 + n / np.maximum(p, _TINY)
    growth = np.log1p((p + n) / np.maximum(c, _TINY))
    area = p / r + np.where(c > _TINY, (t - c / r) / r * growth, 0.0)
    return _share(np.where(p > 0, area, 0.0).sum(-1), p.sum(-1))


def _brier(counts: Counts, logits: np.ndarray) -> np.ndarray:
    """The mean squared distance of probability and outcome."""
    p = 1 / (1 + np.exp(-logits))
    return _share((counts * np.stack([p**2, (1 - p) ** 2])).sum((-1, -2)), counts.sum((-1, -2)))


def _logloss(counts: Counts, logits: np.ndarray) -> np.ndarray:
    """The mean of minus the logarithm of the probability given to the outcome."""
    losses = np.stack([np.logaddexp(0, logits), np.logaddexp(0, -logits)])
    return _share((counts * losses).sum((-1, -2)), counts.sum((-1, -2)))


METRICS: dict[str, tuple[Callable[[Counts, np.ndarray], np.ndarray], float]] = {
    "auroc": (_auroc, 1.0),
    "auprc": (_auprc, 1.0),
    "brier": (_brier, 1.0),
    "logloss": (_logloss, 16.0),
}
"""Metrics of the whole distribution of scores, with their largest possible values."""

# the cells (negatives, positives) of bins below and above the cut that count as right, and out of which
_CELLS = {
    "accuracy": ([[1, 0], [0, 1]], [[1, 1], [1, 1]]),
    "sensitivity": ([[0, 0], [0, 1]], [[0, 0], [1, 1]]),
    "specificity": ([[1, 0], [0, 0]], [[1, 1], [0, 0]]),
}
RATES = frozenset(_CELLS)
"""Metrics at the cut, which are shares of patients."""


def _rate(counts: Counts, sd: float, name: str, edges: np.ndarray, cut: float) -> dict[str, Any]:
    """A share of patients; its interval is that of Agresti and Coull (1998) plus the noise of its cells."""
    above = _above(edges, cut)
    right, of = (np.array(cells)[:, above] for cells in _CELLS[name])
    part, whole = float((counts * right).sum()), float((counts * of).sum())
    value = part / whole if whole > 0 else 0.5
    centre, size = (part + 2) / (whole + 4), whole + 4
    noise = sd**2 * float((of * (right - value) ** 2).sum())
    error = min(math.sqrt(centre * (1 - centre) * size + noise) / size, 1.0)
    return _within(value, error, centre - Z * error, centre + Z * error)


def _above(edges: np.ndarray, cut: float) -> np.ndarray:
    """1 for each bin of scores that count as a yes, else 0."""
    return (np.arange(len(edges) + 1) > np.searchsorted(edges, cut)).astype(int)


def _confusion(noisy: Counts, sd: float, edges: np.ndarray, cut: float) -> dict[str, Any]:
    """Patients by outcome and by what the score says; these speak of the very patients that were judged."""
    above = _above(edges, cut).astype(bool)
    told = {}
    for name, row, where in (
        ("true negatives", 0, ~above),
        ("false positives", 0, above),
        ("false negatives", 1, ~above),
        ("true positives", 1, above),
    ):
        value, error = float(noisy[row, where].sum()), sd * math.sqrt(int(where.sum()))
        told[name] = _within(max(value, 0.0), error, value - 2 * error, value + 2 * error, math.inf)
    return told


def gap(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """First minus second of two independent figures; the interval is that of Zou and Donner (2008), from theirs."""
    value = first["value"] - second["value"]
    (low, high), (under, over) = first["interval"], second["interval"]
    down = math.hypot(first["value"] - low, over - second["value"])
    up = math.hypot(high - first["value"], second["value"] - under)
    error = math.hypot(first["error"], second["error"])
    return {"value": value, "error": error, "interval": [value - down, value + up]}


def _roc(counts: Counts) -> dict[str, list[float]]:
    """False and true positive rates at each edge, from the strictest to the most lenient."""
    rates = _share(np.cumsum(counts[:, ::-1], -1), counts.sum(-1, keepdims=True))
    return {"fpr": [0.0, *rates[0].tolist()], "tpr": [0.0, *rates[1].tolist()]}


def _calibration(counts: Counts, draws: Counts, edges: np.ndarray, least: float) -> dict[str, Any]:
    """Predicted and observed share of positives in each bin that holds at least that many patients."""
    width = np.diff(edges).max()
    ends = np.concatenate([[edges[0] - width], edges, [edges[-1] + width]])
    middles = (ends[:-1] + ends[1:]) / 2
    held = counts.sum(0) > least
    observed = _share(counts[1], counts.sum(0))
    drawn = _share(draws[:, 1], draws.sum(1), 0.5)
    low, high = np.clip(2 * observed - np.quantile(drawn, [0.975, 0.025], axis=0), 0.0, 1.0)
    return {
        "predicted": (1 / (1 + np.exp(-middles)))[held].tolist(),
        "observed": observed[held].tolist(),
        "interval": np.stack([np.minimum(low, observed), np.maximum(high, observed)], -1)[held].tolist(),
    }
