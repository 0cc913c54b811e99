"""Numbers that a compiled step must hold in memory, and products that it makes in loops of its own.

A compiler may compute a number anew wherever it is read, along other loops and so rounded otherwise. A patient's
gradient must not be: its norm is that of the very numbers added only if both are read from memory. Outside of
tracing all numbers are in memory, and a library multiplies.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

from rapha_lab.curator.lift.even import tracing

__all__ = ["KEPT", "in_memory", "kept", "products", "weighted"]

Record = TypeVar("Record")

AT_ONCE = (8, 10, 9, 12, 11, 7, 6, 5, 4)
"""Rows of a product that the compiler's loops make together, the first of these that divides them: each number
of the other factor is then read once for all of them, and their sums stay in registers."""

WIDE, LONG = 16, 9
"""Columns and terms of a product from which on those loops are worth it: shorter ones are no loops at all."""


@torch.library.custom_op("rapha::kept", mutates_args=())
def _kept(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@_kept.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


KEPT = torch.ops.rapha.kept.default
"""What a compiler must compute once, contiguous in memory."""


def kept(x: Tensor) -> Tensor:
    """The same numbers, in memory."""
    return _kept(x) if tracing() else x


def in_memory(record: Record) -> Record:
    """The record with its tensors in memory."""
    values: dict[str, Any] = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}  # type: ignore[arg-type]
    tensors = {name: kept(value) for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(record, **tensors)  # type: ignore[type-var]


def products(a: Tensor, b: Tensor) -> Tensor:
    """Each patient's matrix product, `(..., n, t)` by `(..., t, m)`."""
    (n, t), m = a.shape[-2:], b.shape[-1]
    rows = next((k for k in AT_ONCE if n % k == 0), 0)
    if not (tracing() and rows and m >= WIDE and t >= LONG and a.dtype == torch.float32):
        return torch.bmm(a, b) if a.dim() == 3 else a @ b
    a, b = a.unflatten(-2, (-1, rows)).unsqueeze(-1), b.unsqueeze(-3)
    return kept(torch.stack([(a[..., k, :, :] * b).sum(-2) for k in range(rows)], -2).flatten(-3, -2))


def weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """The sum of the rows times their weights."""
    return (weights.unsqueeze(1) * rows).sum(0) if tracing() else weights @ rows
