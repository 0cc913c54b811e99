"""Rows added up by place, in order and as fast wherever they go.

Libraries sort the places first, or add number by number; a compiled step adds row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapha_lab.curator.lift.cells import machine_code
from rapha_lab.curator.lift.even import tracing

__all__ = ["added_up", "tables"]

CACHED = 1 << 20
"""Bytes of rows and of places that are worked on at a time, so that they stay in the processor's cache."""


def tables(index: Tensor, rows: Tensor, length: int) -> Tensor:
    """For each patient `(length, width)` zeros with the rows `(patients, t, width)` added at `index` `(patients, t)`."""
    return _tables(index, rows, length, tracing())


def added_up(index: Tensor, rows: Tensor, length: int) -> Tensor:
    """A patient's rows of the same index, below `length`, added up at the last of their places; zeros at the others."""
    return _added_up(index, rows, length, tracing())


@torch.library.custom_op("rapha::tables", mutates_args=())
def _tables(index: Tensor, rows: Tensor, length: int, fast: bool) -> Tensor:
    size, _, width = rows.shape
    out = rows.new_empty(size, length, width)
    _into(out, index, rows, fast)
    return out


def _into(out: Tensor, index: Tensor, rows: Tensor, fast: bool) -> None:
    machine_code(_add, [index, rows, out], fast, in_order=True)([index, rows, out])


def _add(index: Tensor, rows: Tensor, out: Tensor) -> tuple[()]:
    size, length, width = out.shape
    out.zero_()
    if tracing():
        first = torch.arange(0, size * length, length, device=out.device)
        place = (index + first.unsqueeze(1)).flatten()
        out.view(-1, width).index_put_((place,), rows.flatten(0, 1), accumulate=True)
    else:
        out.scatter_add_(1, index.unsqueeze(-1).expand_as(rows), rows)
    return ()


@_tables.register_fake
def _(index: Tensor, rows: Tensor, length: int, fast: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], length, rows.shape[2])


@torch.library.custom_op("rapha::added_up", mutates_args=())
def _added_up(index: Tensor, rows: Tensor, length: int, fast: bool) -> Tensor:
    size, many, width = rows.shape
    most = max(1, CACHED // (max(many * width, length, 1) * rows.element_size()))
    some = next(n for n in range(min(most, max(size, 1)), 0, -1) if size % n == 0)
    # along a dimension that is not the last, where it takes as long if all places are one: see `even.scatter_add`
    places = torch.arange(many, dtype=torch.int32).view(1, many, 1).expand(some, many, 1)
    out = rows.new_empty(rows.shape)
    for own, given, into in zip(*(t.split(some) for t in (index, rows, out)), strict=True):
        at = own.unsqueeze(-1)
        last = places.new_zeros(some, length, 1).scatter_reduce_(1, at, places, "amax")
        _into(into, last.gather(1, at).squeeze(-1).long(), given, fast)
    return out


@_added_up.register_fake
def _(index: Tensor, rows: Tensor, length: int, fast: bool) -> Tensor:
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
