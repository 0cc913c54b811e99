"""The largest numbers of windows and where they are, found by as many comparisons of whole tensors whatever they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rapha_lab.curator.lift.even import WORDS, even, selected
from rapha_lab.curator.lift.stored import kept

__all__: list[str] = []

aten = torch.ops.aten
Found = tuple[Tensor, Tensor]
"""Numbers and their places; a place below zero is none."""


def _larger(one: Found, other: Found, padded: bool) -> Found:
    """The other where it is larger or no number."""
    takes = (other[0] > one[0]) | (other[0] != other[0])
    takes = takes | (one[1] < 0) if padded else takes
    value, place = selected(takes, other, one)
    return value, place


def _along(d: int, found: Found, windows: Sequence[Sequence[slice]], padded: bool = False) -> Found:
    """The largest along one dimension: of each window so many slices.

    For a compiler they are in memory: its loops over numbers with gaps between them would branch.
    """
    behind = [slice(None)] * (-1 - d)
    best = []
    for window in windows:
        first, *others = [
            (kept(found[0][..., part, *behind]), kept(found[1][..., part, *behind]))  # type: ignore[index]
            for part in window
        ]
        for other in others:
            first = _larger(first, other, padded)
        best.append((kept(first[0]), kept(first[1].expand(first[0].shape))))
    if len(best) == 1:
        return best[0]
    return torch.cat([value for value, _ in best], d), torch.cat([place for _, place in best], d)


def _placed(x: Tensor, rank: int) -> Found:
    shape = x.shape[-rank:]
    places = torch.arange(math.prod(shape), device=x.device, dtype=WORDS[x.dtype.itemsize])
    return x, places.view(shape)


def _max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,), ceil: bool = False, *, rank: int,
) -> Found:  # fmt: skip
    found = _placed(x, rank)
    given = [list(v) * (rank if len(v) == 1 else 1) for v in (kernel, stride or kernel, padding, dilation)]
    each = list(zip(*given, strict=True))
    padded = ceil or any(p for _, _, p, _ in each)
    for d in range(-1, -rank - 1, -1):
        k, s, p, wide = each[d]
        reach, n = wide * (k - 1), x.shape[d]
        many = (n + 2 * p - reach - 1 + (s - 1 if ceil else 0)) // s + 1
        many -= ceil and (many - 1) * s >= n + p
        if padded:
            around = [*[0, 0] * (-1 - d), p, max(0, (many - 1) * s + reach + 1 - n - p)]
            found = F.pad(found[0], around, value=-math.inf), F.pad(found[1], around, value=-1)
        starts = range(0, reach + 1, wide)
        found = _along(d, found, [[slice(a, a + (many - 1) * s + 1, s) for a in starts]], padded)
    return found[0].contiguous(), found[1].long().contiguous()


even(aten.max_pool2d_with_indices.default, compiled=True)(partial(_max_pool, rank=2))
even(aten.max_pool3d_with_indices.default, compiled=True)(partial(_max_pool, rank=3))


@even(aten.adaptive_max_pool2d.default, compiled=True)
def adaptive_max_pool2d(x: Tensor, size: Sequence[int]) -> Found:
    """Windows that differ in length."""
    found = _placed(x, 2)
    for d in (-1, -2):
        n, many = x.shape[d], size[d]
        bounds = [(i * n // many, -(-(i + 1) * n // many)) for i in range(many)]
        found = _along(d, found, [[slice(a, a + 1) for a in range(*each)] for each in bounds])
    return found[0].contiguous(), found[1].long().contiguous()
