"""The privacy loss of a mechanism as a Rényi curve, its price in integers, and the noise for a wished ε.

A loss is kept as a few numbers, from which its curve follows exactly at every integer order. Adjacent data
sets differ in one patient, added or removed. Everything rounds to the safe side: prices and noise up, budgets
down. The theorems, and where their conditions are met, are in docs/accounting.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Context
from fractions import Fraction
from functools import lru_cache, partial
from typing import ClassVar, Protocol

import msgspec

from rapha_lab.protocol.errors import RequestError

__all__ = [
    "DELTA_UNIT",
    "ORDERS",
    "UNIT",
    "BandedGaussian",
    "Gaussian",
    "Loss",
    "Nothing",
    "Order",
    "Pure",
    "Reviewed",
    "SampledGaussian",
    "Selected",
    "Sum",
    "Thresholded",
    "budget_at",
    "decode_loss",
    "delta_budget",
    "delta_price",
    "encode_loss",
    "epsilon_of",
    "largest_epsilon",
    "least_epsilon",
    "noise_for",
    "order_for",
    "runs_for",
    "units",
]

UNIT = 10**9
"""Units of Rényi loss in 1: the ledger counts billionths."""

DELTA_UNIT = 10**18
"""Units of δ in 1, of what discoveries spend beside their Rényi loss."""

_LARGEST = 1 << 60
_NOISIEST = 1e8
_ROUNDING = 1e-12  # more than the floating point error of a conversion


def _orders() -> tuple[int, ...]:
    orders = list(range(2, 65))
    while orders[-1] < 1024:
        orders.append(min(1024, math.ceil(orders[-1] * 1.05)))
    return tuple(orders)


ORDERS = _orders()
"""The Rényi orders in use: integers, where the sampled Gaussian is a finite sum, and below its overflow."""


class Curve(Protocol):
    """Anything with a Rényi curve: one loss, or the sum of many."""

    def rdp(self, alpha: int) -> float:
        """The Rényi divergence of order `alpha` between adjacent data sets, at most."""
        ...


class Loss(msgspec.Struct, frozen=True, tag_field="kind", forbid_unknown_fields=True):
    """The privacy loss of one job of `steps` equal steps, at most.

    Raises:
        RequestError: on construction, if a number is not finite or out of range.
    """

    @property
    def steps(self) -> int:
        """How many steps the job announces before they touch a record."""
        return 1

    def rdp(self, alpha: int) -> float:
        """The Rényi divergence of order `alpha` between adjacent data sets, at most."""
        raise NotImplementedError

    @property
    def delta_units(self) -> int:
        """The δ that it spends beside its curve, in units of 10^-18."""
        return 0

    def with_noise(self, noise: float) -> Loss:
        """The same mechanism with another noise multiplier."""
        raise NotImplementedError

    def part(self, steps: int) -> Loss:
        """The loss of the first `steps` steps alone."""
        _within("steps", steps, 0, self.steps)
        return self if steps else Nothing()


class Nothing(Loss, frozen=True, tag="nothing"):
    """No loss: nothing was touched."""

    def rdp(self, alpha: int) -> float:
        """Zero at every order."""
        return 0.0


class Reviewed(Loss, frozen=True, tag="reviewed"):
    """An answer that custodians release by looking at it: outside every guarantee, and so at no price.

    What an account has spent says nothing of such answers; the log names each one.
    """

    def rdp(self, alpha: int) -> float:
        """Zero: it is not counted."""
        return 0.0


class Gaussian(Loss, frozen=True, tag="gaussian"):
    """One answer with Gaussian noise of standard deviation `noise` times the L2 sensitivity.

    α/(2 noise²) (Mironov 2017, Corollary 3); the discrete Gaussian of that parameter loses no more
    (Canonne, Kamath and Steinke 2020).
    """

    noise: float

    def __post_init__(self) -> None:
        _within("noise", self.noise, 1e-6, 1e12)

    def rdp(self, alpha: int) -> float:
        """α/(2 noise²)."""
        return alpha / (2 * self.noise**2)

    def with_noise(self, noise: float) -> Gaussian:
        """The same answer with another noise multiplier."""
        return Gaussian(noise)


class Thresholded(Loss, frozen=True, tag="thresholded"):
    """Noisy counts of which those leave that pass a threshold: a Gaussian answer but for a chance of `delta`.

    `delta` is in units of 10^-18. Why it is added up beside the curve: docs/accounting.md, "Discovered keys".
    """

    noise: float
    delta: int

    def __post_init__(self) -> None:
        _within("noise", self.noise, 1e-6, 1e12)
        _within("delta", self.delta, 1, DELTA_UNIT // 2)

    @property
    def delta_units(self) -> int:
        """`delta`."""
        return self.delta

    def rdp(self, alpha: int) -> float:
        """That of the counts of keys that others have too."""
        return Gaussian(self.noise).rdp(alpha)

    def with_noise(self, noise: float) -> Thresholded:
        """The same answer with another noise multiplier."""
        return Thresholded(noise, self.delta)


class SampledGaussian(Loss, frozen=True, tag="sampled-gaussian"):
    """`times` Gaussian answers, each on a fresh Poisson sample of the patients at `rate` (DP-SGD).

    Mironov, Talwar and Zhang 2019, section 3.3; both directions of adding and removing a patient.
    """

    rate: float
    noise: float
    times: int

    # More than the rounding of a log-sum of 1,025 terms; of no consequence at a million steps.
    _GUARD: ClassVar[float] = 1e-12

    def __post_init__(self) -> None:
        _within("rate", self.rate, 1e-9, 1.0)
        _within("noise", self.noise, 1e-6, 1e12)
        _within("steps", self.times, 1, 10**9)

    @property
    def steps(self) -> int:
        """The number of samples drawn."""
        return self.times

    def rdp(self, alpha: int) -> float:
        """`times` times the curve of one step."""
        return self.times * (_sampled_gaussian(self.rate, self.noise, alpha) + self._GUARD)

    def with_noise(self, noise: float) -> SampledGaussian:
        """The same samples with another noise multiplier."""
        return SampledGaussian(self.rate, noise, self.times)

    def part(self, steps: int) -> Loss:
        """The loss of the first `steps` samples."""
        _within("steps", steps, 0, self.steps)
        return SampledGaussian(self.rate, self.noise, steps) if steps else Nothing()


class BandedGaussian(Loss, frozen=True, tag="banded-gaussian"):
    """`times` steps with noise of `bands` bands, where each patient's turn comes every `bands` steps.

    Choquette-Choo et al. 2023, Theorem 4: a patient's turns are one sampled Gaussian each, of the `rate` at which
    those whose turn it is are drawn. See mechanisms/banded.py.
    """

    rate: float
    noise: float
    bands: int
    times: int

    def __post_init__(self) -> None:
        _within("bands", self.bands, 1, 256)
        SampledGaussian(self.rate, self.noise, self.times)

    @property
    def steps(self) -> int:
        """The number of steps, of which a patient has every `bands`-th."""
        return self.times

    def rdp(self, alpha: int) -> float:
        """That of ⌈times/bands⌉ sampled Gaussians."""
        return SampledGaussian(self.rate, self.noise, -(-self.times // self.bands)).rdp(alpha)

    def with_noise(self, noise: float) -> BandedGaussian:
        """The same steps with another noise multiplier."""
        return BandedGaussian(self.rate, noise, self.bands, self.times)

    def part(self, steps: int) -> Loss:
        """The loss of the first `steps` steps: nobody had more than ⌈steps/bands⌉ turns."""
        _within("steps", steps, 0, self.steps)
        return BandedGaussian(self.rate, self.noise, self.bands, steps) if steps else Nothing()


@lru_cache(maxsize=1 << 14)
def _sampled_gaussian(rate: float, noise: float, alpha: int) -> float:
    if rate == 1.0:
        return alpha / (2 * noise**2)
    # Importing Opacus loads torch, which a process that only keeps the books has no need of.
    from opacus.accountants.analysis.rdp import compute_rdp

    rdp = float(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=float(alpha)))
    return rdp if math.isfinite(rdp) else math.inf


class Pure(Loss, frozen=True, tag="pure"):
    """One (ε, 0)-private answer, such as one with Laplace noise.

    The curve is that of randomised response, the worst of all (ε, 0)-private mechanisms
    (Kairouz, Oh and Viswanath 2015), so it holds whatever the mechanism.
    """

    epsilon: float

    def __post_init__(self) -> None:
        _within("epsilon", self.epsilon, 1e-9, 1e6)

    def rdp(self, alpha: int) -> float:
        """ln(cosh((α-½)ε) / cosh(ε/2)) / (α-1), in the form that is exact for large or for small ε."""
        e = self.epsilon
        if alpha * e > 30:
            return e + (math.log1p(math.exp((1 - 2 * alpha) * e)) - math.log1p(math.exp(-e))) / (alpha - 1)
        excess = 2 * math.sinh(alpha * e / 2) * math.sinh((alpha - 1) * e / 2) / math.cosh(e / 2)
        return math.log1p(excess) / (alpha - 1)

    def with_noise(self, noise: float) -> Pure:
        """The same answer with Laplace noise of scale `noise` times the L1 sensitivity."""
        return Pure(1 / noise)


class Selected(Loss, frozen=True, tag="selected"):
    """The best, by a private score, of as many of `runs` trainings as a hidden number says, `mean` on average.

    Papernot and Steinke 2022, Theorem 6, for a Poisson number of at most `runs`; each training is judged on patients of
    another split. The proof is in docs/accounting.md, "Selection".
    """

    train: SampledGaussian | BandedGaussian
    mean: float
    runs: int

    def __post_init__(self) -> None:
        _within("mean", self.mean, 1.0, 100.0)
        _within("runs", self.runs, 1, 1000)
        _within("tail", _tail(self.mean, self.runs), 0.0, 0.5)

    @property
    def steps(self) -> int:
        """Every run has its steps and its score, whether it counts or not."""
        return self.runs * (self.train.steps + 1)

    @property
    def noise(self) -> float:
        """The noise multiplier of each training."""
        return self.train.noise

    @property
    def score(self) -> Gaussian:
        """The loss of one score: as much noise as loses at order 2 what a training does."""
        return Gaussian(max(self.train.rdp(2) ** -0.5, 1e-6))

    def rdp(self, alpha: int) -> float:
        """ln((e^-mean + mean e^((α-1)(ρ + mean δ))) (1 - tail)^-α) / (α-1), with ρ and δ of one run."""
        one, chi2, gap = self._one(alpha), math.expm1(min(self._one(2), 50.0)), 1 / (alpha - 1)
        delta = chi2 / (2 * (math.sqrt(chi2 + gap**2) + gap))  # at e^ε = 1 + gap (Scarf 1958)
        chosen = (alpha - 1) * (one + self.mean * min(delta, 1.0))
        none = math.exp(-self.mean - chosen)
        total = chosen + math.log(self.mean + none) - alpha * math.log1p(-_tail(self.mean, self.runs))
        return total / (alpha - 1) + _ROUNDING

    def _one(self, alpha: int) -> float:
        return max(self.train.rdp(alpha), self.score.rdp(alpha))

    def with_noise(self, noise: float) -> Selected:
        """The same selection of trainings with another noise multiplier."""
        return Selected(self.train.with_noise(noise), self.mean, self.runs)

    def part(self, steps: int) -> Loss:
        """All of it once anything ran: the proof is of the best of all that count."""
        _within("steps", steps, 0, self.steps)
        return self if steps else Nothing()


TAIL = 1e-3
"""How likely a Poisson number may be to reach the last run: what it costs, about as much ε, buys shorter selections."""


def runs_for(mean: float) -> int:
    """How many runs there have to be for a hidden number of this mean of them to count."""
    return next(runs for runs in range(1, 1000) if _tail(mean, runs) <= TAIL)


def _tail(mean: float, runs: int) -> float:
    """The chance that a Poisson number is `runs` or more."""
    below = math.fsum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(runs))
    return max(0.0, 1 - below) + _ROUNDING


class Sum:
    """The Rényi curve of several losses one after another, each so many times."""

    def __init__(self, losses: list[tuple[Loss, int]]) -> None:
        self._losses = losses

    def rdp(self, alpha: int) -> float:
        """The sum of their curves."""
        return sum(times * loss.rdp(alpha) for loss, times in self._losses)


_decoder = msgspec.json.Decoder(
    Nothing | Reviewed | Gaussian | Thresholded | SampledGaussian | BandedGaussian | Selected | Pure
)


def encode_loss(loss: Loss) -> str:
    """The loss as JSON: its kind and its numbers."""
    return msgspec.json.encode(loss, order="sorted").decode()


def decode_loss(text: str) -> Loss:
    """The loss that `encode_loss` wrote."""
    return _decoder.decode(text)


class Order(msgspec.Struct, frozen=True):
    """The one order at which an account is kept, and its budget there in billionths."""

    alpha: int
    units: int


def order_for(epsilon: float, delta: float) -> Order:
    """The order at which (epsilon, delta) buys most Gaussian answers, and what it buys, rounded down.

    Raises:
        RequestError: naming `epsilon` or `delta`, if it is out of range or too small to answer anything.
    """
    _within("epsilon", epsilon, 1e-6, 1e6)
    _within("delta", delta, 1e-300, 0.5)
    alpha = max(ORDERS, key=lambda order: (epsilon - _overhead(order, delta)) / order)
    order = Order(alpha, budget_at(alpha, epsilon, delta))
    if not 0 < order.units < _LARGEST:
        raise RequestError(
            f"A budget of epsilon={epsilon:g} at delta={delta:g} allows no answer at all.",
            "Rényi accounting certifies no epsilon as small as that at this delta, whatever the noise.",
            "State a larger epsilon or a larger delta.",
            field="epsilon",
        )
    return order


def budget_at(alpha: int, epsilon: float, delta: float) -> int:
    """The loss at order `alpha` that implies (epsilon, delta), rounded down; below 1 if none does."""
    return math.floor(Fraction(epsilon - _overhead(alpha, delta) - _ROUNDING) * UNIT)


def _overhead(alpha: int, delta: float) -> float:
    """What conversion to `delta` adds to a Rényi loss (Canonne, Kamath and Steinke 2020, Proposition 12)."""
    return math.log1p(-1 / alpha) - (math.log(delta) + math.log(alpha)) / (alpha - 1)


def epsilon_of(curve: Curve, delta: float) -> float:
    """The ε for which `curve` implies (ε, delta): the least over ORDERS."""
    return _at(curve, delta, _best_order(curve, delta))


def _at(curve: Curve, delta: float, alpha: int) -> float:
    return max(0.0, curve.rdp(alpha) + _overhead(alpha, delta))


def _best_order(curve: Curve, delta: float) -> int:
    """The order of the least ε; with (α-1)·rdp and (α-1)·overhead convex in α, ε(α) has one valley."""

    def falls(i: int) -> bool:
        here, after = (curve.rdp(order) + _overhead(order, delta) for order in ORDERS[i : i + 2])
        return after < here

    low, high = 0, len(ORDERS) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if falls(middle) else (low, middle)
    return ORDERS[low]


def noise_for(make: Callable[[float], Curve], epsilon: float, delta: float) -> float:
    """The smallest noise multiplier with which `make(noise)` is (epsilon, delta)-private on its own.

    Args:
        make: the loss of the mechanism at a noise multiplier; it must fall as the noise grows.
        epsilon: the guarantee wished.
        delta: the policy's δ.

    Raises:
        RequestError: naming `epsilon`, if it is out of range or no amount of noise reaches it.
    """
    _within("epsilon", epsilon, 1e-6, 1e6)
    # Three units lower, so that an answer that asks for a whole budget fits in it with its price rounded up.
    target = epsilon - 3 / UNIT
    high = 1.0
    while epsilon_of(make(high), delta) > target:
        if high > _NOISIEST:
            raise RequestError(
                f"No amount of noise gives epsilon={epsilon:g} at delta={delta:g}.",
                "It is smaller than Rényi accounting can certify at this delta.",
                f"Ask for at least epsilon={max(least_epsilon(delta), 1.1 * epsilon_of(make(high), delta)):.2g}.",
                field="epsilon",
            )
        high *= 2

    def reaches(alpha: int, noise: float) -> bool:
        return _at(make(noise), delta, alpha) <= target

    # Each round solves at one order, which suffices for the guarantee, then moves to that noise's best order.
    while True:
        alpha = _best_order(make(high), delta)
        solved = _smallest(partial(reaches, alpha), high)
        if solved > high * (1 - 1e-7):
            return solved
        high = solved


def least_epsilon(delta: float) -> float:
    """About the least ε that noise can reach at this δ."""
    return 1.1 * max(1e-6, min(_overhead(order, delta) for order in ORDERS))


def _smallest(holds: Callable[[float], bool], high: float) -> float:
    """The smallest noise, to 1e-8 and on the side where it holds, below `high` where it holds."""
    low = high / 2
    while low > 1e-5 and holds(low):
        low, high = low / 2, low
    while high > low * (1 + 1e-8):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def largest_epsilon(make: Callable[[float], Loss], alpha: int, left: int, delta: float) -> float:
    """The largest ε, to about 4 digits, at which `make` calibrated by `noise_for` costs at most `left`.

    A `Pure` loss is asked for by its own ε, so that is the one meant.

    Args:
        make: the loss of the mechanism at a noise multiplier.
        alpha: the order of the account.
        left: what is left there, in billionths.
        delta: the policy's δ.

    Returns:
        0.0 if not even the noisiest answer fits.
    """

    if units(make(_NOISIEST), alpha) > left:
        return 0.0
    noise = _smallest(lambda noise: make(noise).rdp(alpha) * UNIT <= left, _NOISIEST)
    found = make(noise)

    def asked(epsilon: float) -> Loss:
        return Pure(epsilon) if isinstance(found, Pure) else make(noise_for(make, epsilon, delta))

    exact, least = (
        (found.epsilon, 0.0) if isinstance(found, Pure) else (epsilon_of(found, delta), least_epsilon(delta))
    )
    for rounding in (ROUND_HALF_EVEN, ROUND_DOWN):
        epsilon = float(Context(prec=4, rounding=rounding).create_decimal(exact))
        if epsilon > least and units(asked(epsilon), alpha) <= left:
            return epsilon
    return 0.0


def units(loss: Curve, alpha: int) -> int:
    """The price of `loss` at order `alpha` in billionths, rounded up.

    Raises:
        RequestError: if the curve gives a negative, subnormal, infinite or overflowing value, or none.
    """
    rdp = loss.rdp(alpha)
    subnormal = isinstance(rdp, float) and 0 < rdp < sys.float_info.min
    if not isinstance(rdp, float) or not math.isfinite(rdp) or rdp < 0 or subnormal or rdp * UNIT >= _LARGEST:
        raise RequestError(
            "The request has no price.",
            f"Its privacy loss at order {alpha} is negative, subnormal, too large or no number.",
            "Ask with more noise, that is a smaller epsilon.",
            field="epsilon",
        )
    return math.ceil(Fraction(rdp) * UNIT)


def delta_price(delta: float) -> int:
    """A δ as it is written, in units of 10^-18, rounded up."""
    return math.ceil(Fraction(repr(delta)) * DELTA_UNIT)


def delta_budget(delta: float) -> int:
    """A total of δ as it is written, in units of 10^-18, rounded down."""
    return math.floor(Fraction(repr(delta)) * DELTA_UNIT)


def _within(field: str, value: float, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise RequestError(
            f"{field}={value!r} is out of range.",
            f"It has to be a number from {low:g} to {high:g}.",
            f"Give a value of {field} in that range.",
            field=field,
        )
