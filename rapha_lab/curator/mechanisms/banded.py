"""Noise that later steps take back: the banded matrix mechanism (Choquette-Choo et al. 2023, arXiv:2306.08153).

With x_t the clipped sum of step t and C a lower triangular Toeplitz matrix of b bands, 1 = c_0, c_1, ... c_(b-1):

1. Each patient takes one of b turns, at random and for the whole run.
2. Step t draws from the patients whose turn is t mod b, each with probability q' = b L / N.
3. It releases x_t + w_t, where C w = z with z independent Gaussian: w_t = z_t - c_1 w_(t-1) - ... - c_(b-1) w_(t-b+1).

A patient's parts in C x have no row in common, as turns are b steps apart; each is C's column times one clipped
gradient, of norm ‖c‖ C at most, or nothing. So with z of standard deviation σ ‖c‖ C each turn is one sampled
Gaussian of rate q' and noise σ, and a run of T steps is ⌈T/b⌉ of them (the proof is in docs/accounting.md). With
b = 1 this is DP-SGD. C is the banded square root of the sum that gradient descent makes of gradients (Kalinin and
Lampert 2024, arXiv:2405.13763), which has a closed form and is close to the best.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rapha_lab.curator.noise import Noise

__all__ = ["Memory", "coefficients", "turns"]


def coefficients(bands: int, momentum: float = 0.0) -> Tensor:
    """c_0 .. c_(b-1), float64: those of 1 / sqrt((1 - x)(1 - momentum x)), the root of SGD's workload."""
    root = [math.comb(2 * k, k) / 4**k for k in range(bands)]
    return torch.tensor(
        [sum(root[i] * root[k - i] * momentum ** (k - i) for i in range(k + 1)) for k in range(bands)],
        dtype=torch.float64,
    )


def turns(count: int, bands: int, noise: Noise) -> Tensor:
    """Each patient's turn in 0 .. bands - 1, independent of all others', int64 (count,)."""
    return noise.uniform(count).mul_(bands).long()


class Memory:
    """The noise of the last steps.

    Attributes:
        norm: ‖c‖, by which the noise of a step has to be larger.
    """

    def __init__(self, bands: int, momentum: float = 0.0) -> None:
        c = coefficients(bands, momentum)
        self.norm, self._coefficients = float(c.norm()), c[1:].tolist()
        self._past: deque[Tensor] = deque(maxlen=bands - 1)

    @contextmanager
    def of(self, sums: Tensor, share: float) -> Iterator[None]:
        """Take past noise out of the sums; within, they are to be made private and divided by `share`, in place."""
        if not self._coefficients:
            yield
            return
        true = sums.clone()
        for c, w in zip(self._coefficients, self._past, strict=False):
            sums.sub_(w, alpha=c)
        yield
        # all that was added, rounding included: so the next release is a function of C x + z and past ones
        self._past.appendleft((sums * share).sub_(true))
