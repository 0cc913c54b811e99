"""Adam that takes the noise out of its second moment: DP-AdamBC (Tang, Shpilevskiy and Lécuyer 2023, arXiv:2312.14334).

A private gradient is g + Φ z with public Φ, so the average of its squares is about that of g² plus Φ². Adam divides
by its root, which Φ² drowns: every number gets the same step. Subtracting Φ² gives each number back its own step.
It sees private gradients only, so it is post-processing and costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["CorrectedAdam"]


class CorrectedAdam(torch.optim.Optimizer):
    """Algorithm 1 of the paper, with decoupled weight decay.

    Args:
        weights: what to train.
        noise: Φ, the standard deviation of the noise in each number of a gradient.
        lr, betas, weight_decay: as in torch.optim.AdamW.
        floor: γ', the least second moment, in units of Φ²: below it there is nothing but noise.
    """

    def __init__(
        self,
        weights: list[Tensor],
        noise: float,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        floor: float = 0.05,
    ) -> None:
        if not (lr >= 0 and all(0 <= beta < 1 for beta in betas) and weight_decay >= 0 and floor > 0):
            raise ValueError("lr, betas, weight_decay or floor is out of range")
        super().__init__(weights, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self._noise, self._floor = noise**2, floor * noise**2

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the gradients."""
        for group in self.param_groups:
            (first, second), lr = group["betas"], group["lr"]
            for p in group["params"]:
                kept = self.state[p]
                t = kept["step"] = kept.get("step", 0) + 1
                m = kept.setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - first)
                v = kept.setdefault("v", torch.zeros_like(p)).lerp_(p.grad.square(), 1 - second)
                own = (v / (1 - second**t) - self._noise).clamp_(min=self._floor)
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * m / (1 - first**t) / own.sqrt_())
