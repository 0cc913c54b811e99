"""A clip that follows a quantile of the patients' gradient norms (Andrew et al. 2021, arXiv:1905.03871, Algorithm 1).

Beside its sum of gradients clipped to C, each step counts whom that left whole. With γ the wished share of them:

1. x = Σ (b_i - γ) over the patients drawn, b_i being 1 if the norm of i's gradient is at most C, else 0.
2. C ← C exp(-η (x + z) / L), with z Gaussian of standard deviation σ_b, and L the expected number of patients.

A patient moves x by s = max(γ, 1 - γ) at most. So the sum, with noise of σ_Δ C, and the count together are one
sampled Gaussian of noise σ, if σ_Δ^-2 + (s / σ_b)^2 = σ^-2 (Theorem 1 there; the proof is in docs/accounting.md). The
paper centres b at 1/2, whatever γ, hence its 2 σ_b. Centred at γ the clip stays at its quantile however many are drawn.
"""

from __future__ import annotations

import math

from torch import Tensor

from rapha_lab.curator.noise import Noise, noisy
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Fit

__all__ = ["Clip"]

RATE = 0.2
"""η, as in the paper."""

SHARE, LEAST = 1 / 20, 5
"""σ_b is this share of L, as there, but at least so many times s σ: then the gradients' noise grows by 2 % at most."""

LOW, HIGH = 1e-6, 1e6
"""Between which C stays: the bounds of a clip that is asked for."""

GRID = 2.0**-20
"""Of γ, so that x is computed without rounding."""


class Clip:
    """The clip of a training, which stays as asked if no quantile is.

    Attributes:
        norm: C of the next step; made of noisy counts alone, so that it may be told.
        noise: σ_Δ, the noise multiplier of the sum of gradients.
        count_noise: σ_b; 0 if nothing is counted.

    Raises:
        RequestError: the request has options whose proof or rule is for a clip that stays.
    """

    def __init__(self, ask: Fit, sigma: float) -> None:
        self.norm, self.noise, self.count_noise, self._batch = ask.clip, sigma, 0.0, ask.batch
        if not ask.clip_quantile:
            return
        if ask.bands > 1 or ask.corrected:
            raise RequestError(
                "clip_quantile changes the size of the noise from step to step.",
                "bands takes back noise, and corrected subtracts noise, of one size.",
                "Leave either out.",
                field="clip_quantile",
            )
        self._quantile = round(ask.clip_quantile / GRID) * GRID
        sensitivity = max(self._quantile, 1 - self._quantile)
        self.count_noise = max(SHARE * ask.batch, LEAST * sensitivity * sigma)
        self.noise = (sigma**-2 - (sensitivity / self.count_noise) ** 2) ** -0.5

    def follow(self, counted: Tensor, noise: Noise) -> None:
        """Move on after a step that counted so many patients, and so many of them whole, float64 (2,)."""
        if not self.count_noise:
            return
        x = noisy(counted[1:] - self._quantile * counted[:1], self.count_noise, noise)
        log = math.log(self.norm) - RATE * float(x) / self._batch
        self.norm = math.exp(min(max(log, math.log(LOW)), math.log(HIGH)))
