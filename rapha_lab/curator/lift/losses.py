# ruff: noqa: D103  (a rule does what the operation it is entered under does)
"""The table's rules for losses: elementwise, then the mean or sum over one patient's own dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rapha_lab.curator.lift.table import aligned, raised, rule

NONE, MEAN, SUM = 0, 1, 2


def reduced(loss: Tensor, reduction: int) -> Tensor:
    """The loss itself, its mean or its sum, per patient."""
    if reduction == NONE:
        return loss
    flat = loss.reshape(loss.shape[0], -1)
    return flat.mean(1) if reduction == MEAN else flat.sum(1)


@rule("binary_cross_entropy_with_logits.default")
def bce_with_logits(
    x: Tensor, target: Tensor, weight: Tensor | None, positive: Tensor | None, reduction: int
) -> Tensor:
    x, target, weight, positive = aligned([x, target, weight, positive])
    x, target = torch.broadcast_tensors(x, target.to(x.dtype))
    loss = F.binary_cross_entropy_with_logits(x, target, weight, pos_weight=positive, reduction="none")
    return reduced(loss, reduction)


@rule("binary_cross_entropy.default")
def bce(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    x, target, weight = aligned([x, target, weight])
    # torch raises on probabilities outside [0, 1]; -100 is its own floor for the logarithms
    loss = -(target * x.log().clamp_min(-100) + (1 - target) * (1 - x).log().clamp_min(-100))
    return reduced(loss if weight is None else loss * weight, reduction)


@rule("mse_loss.default")
def mse(x: Tensor, target: Tensor, reduction: int) -> Tensor:
    x, target = aligned([x, target])
    return reduced((x - target).square(), reduction)


@rule("l1_loss.default")
def l1(x: Tensor, target: Tensor, reduction: int) -> Tensor:
    x, target = aligned([x, target])
    return reduced((x - target).abs(), reduction)


@rule("smooth_l1_loss.default")
def smooth_l1(x: Tensor, target: Tensor, reduction: int, beta: float) -> Tensor:
    x, target = torch.broadcast_tensors(*aligned([x, target]))
    return reduced(F.smooth_l1_loss(x, target, reduction="none", beta=beta), reduction)


@rule("huber_loss.default")
def huber(x: Tensor, target: Tensor, reduction: int, delta: float) -> Tensor:
    x, target = torch.broadcast_tensors(*aligned([x, target]))
    return reduced(F.huber_loss(x, target, reduction="none", delta=delta), reduction)


@rule("soft_margin_loss.default")
def soft_margin(x: Tensor, target: Tensor, reduction: int) -> Tensor:
    x, target = aligned([x, target])
    return reduced(F.softplus(-target * x), reduction)


@rule("kl_div.default")
def kl_div(x: Tensor, target: Tensor, reduction: int, log_target: bool) -> Tensor:
    x, target = torch.broadcast_tensors(*aligned([x, target]))
    return reduced(F.kl_div(x, target, reduction="none", log_target=log_target), reduction)


@rule("poisson_nll_loss.default")
def poisson_nll(x: Tensor, target: Tensor, log: bool, full: bool, eps: float, reduction: int) -> Tensor:
    x, target = aligned([x, target])
    loss = x.exp() - target * x if log else x - target * (x + eps).log()
    if full:
        safe = target.clamp_min(1)
        more = safe * safe.log() - safe + 0.5 * (2 * torch.pi * safe).log()
        loss = loss + torch.where(target > 1, more, 0)
    return reduced(loss, reduction)


@rule("cosine_similarity.default")
def cosine_similarity(a: Tensor, b: Tensor, d: int, eps: float) -> Tensor:
    a, b = torch.broadcast_tensors(*aligned([a, b]))
    rank = a.dim() - 1
    if not -rank <= d < rank:
        raise IndexError(f"dimension {d}")
    return F.cosine_similarity(a, b, d % rank + 1, eps)


@rule("cross_entropy_loss.default")
def cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: int, smoothing: float
) -> Tensor:
    classes = 1 if x.dim() == 2 else 2
    logs = x.log_softmax(classes)
    if target.is_floating_point():
        return _soft_targets(logs, target, weight, reduction, smoothing, classes)
    loss, weights = _picked(logs, target, weight, ignore, classes)
    if smoothing:
        spread = logs if weight is None else logs * _along(weight, logs, classes)
        even = -spread.sum(classes) / x.shape[classes]
        loss = (1 - smoothing) * loss + smoothing * torch.where(weights[1], even, 0)
    return _weighted(loss, weights[0], reduction)


@rule("nll_loss.default", "nll_loss_nd.default", "nll_loss2d.default")
def nll(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: int) -> Tensor:
    loss, weights = _picked(x, target, weight, ignore, 1 if x.dim() == 2 else 2)
    return _weighted(loss, weights[0], reduction)


def _along(weight: Tensor, x: Tensor, classes: int) -> Tensor:
    return weight.reshape(weight.shape[0], *[1] * (classes - 1), -1, *[1] * (x.dim() - classes - 1))


def _picked(logs: Tensor, target: Tensor, weight: Tensor | None, ignore: int, classes: int) -> Any:
    """Minus the target's entries (times its weight), the weights, and which targets count; others are 0."""
    if (
        logs.shape[1:classes] != target.shape[1:classes]
        or logs.shape[classes + 1 :] != target.shape[classes:]
    ):
        raise ValueError("a class for each prediction is expected")
    counts = (target != ignore) & (target >= 0) & (target < logs.shape[classes])
    index = torch.where(counts, target, 0).long().unsqueeze(classes)
    size = max(logs.shape[0], index.shape[0])
    logs = logs.expand(size, *logs.shape[1:])
    picked = -logs.gather(classes, index.expand(size, *index.shape[1:])).squeeze(classes)
    scale = counts.to(logs.dtype).expand(picked.shape)
    if weight is not None:
        scale = scale * weight.expand(size, -1).gather(
            1, index.expand(size, *index.shape[1:]).reshape(size, -1)
        ).reshape(picked.shape)
    return torch.where(counts, picked * scale, 0), (scale, counts)


def _weighted(loss: Tensor, weights: Tensor, reduction: int) -> Tensor:
    if reduction != MEAN:
        return reduced(loss, reduction)
    total = weights.reshape(weights.shape[0], -1).sum(1)
    return reduced(loss, SUM) / torch.where(total == 0, 1, total)


def _soft_targets(
    logs: Tensor, target: Tensor, weight: Tensor | None, reduction: int, smoothing: float, classes: int
) -> Tensor:
    if smoothing:
        target = target * (1 - smoothing) + smoothing / logs.shape[classes]
    loss = -(logs * raised(target, logs.dim() - 1))
    loss = (loss if weight is None else loss * _along(weight, loss, classes)).sum(classes)
    return reduced(loss, reduction)
