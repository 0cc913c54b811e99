"""Per-patient gradients of a lifted loss, clipped and summed: the norm is taken of the numbers that are added."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rapha_lab.curator.lift.graph import Graph

__all__ = ["clipped_sum", "per_patient"]

Tensors = Mapping[str, Tensor]


def per_patient(graph: Graph, parameters: Tensors, constants: Tensors, inputs: Tensors) -> dict[str, Tensor]:
    """Each patient's gradient of the loss by every parameter, `(patients, *shape)`, all materialised.

    Args:
        graph: a one-patient loss.
        parameters: their values, without a patient dimension.
        constants: likewise.
        inputs: `(patients, *shape)` by name.
    """
    size = len(next(iter(inputs.values())))
    with torch.enable_grad():
        own = {name: t.detach().expand(size, *t.shape).requires_grad_() for name, t in parameters.items()}
        losses = graph.run({**own, **_shared(constants), **_batched(inputs)})
        grads = torch.autograd.grad(losses.sum(), list(own.values()), allow_unused=True)
    pairs = zip(own.items(), grads, strict=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in pairs}


def clipped_sum(gradients: Tensors, mask: Tensor, clip: float) -> dict[str, Tensor]:
    """The sum over patients of their gradients scaled down to norm `clip`, in float64.

    A patient whose mask is False, or whose gradient is not finite, adds nothing.
    """
    flat = [g.reshape(len(mask), -1) for g in gradients.values()]
    norms = torch.stack([torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in flat])
    norm = torch.linalg.vector_norm(norms, dim=0)
    counts = mask & norm.isfinite()
    scale = torch.where(counts, (clip / norm).clamp(max=1.0), 0.0)
    sums = [scale @ torch.where(counts[:, None], g, 0).double() for g in flat]
    return {name: s.reshape(g.shape[1:]) for s, (name, g) in zip(sums, gradients.items(), strict=True)}


def _shared(tensors: Tensors) -> dict[str, Tensor]:
    return {name: t.unsqueeze(0) for name, t in tensors.items()}


def _batched(inputs: Tensors) -> dict[str, Tensor]:
    return {name: t.unsqueeze(1) for name, t in inputs.items()}


def forward(graph: Graph, parameters: Tensors, constants: Tensors, inputs: Tensors) -> Tensor:
    """The program's output for each patient, with shared parameters and no gradient."""
    with torch.no_grad():
        return graph.run({**_shared(parameters), **_shared(constants), **_batched(inputs)})
