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
"""Numbers and their places, of which one below zero is none."""

SHORT, WINDOWS = 8, 64
"""Numbers of a window that are compared one after another; windows of different lengths."""


def _larger(one: Found, other: Found, padded: bool) -> Found:
    """The other where it is larger or no number."""
    takes = (other[0] > one[0]) | (other[0] != other[0])
    takes = takes | (one[1] < 0) if padded else takes
    value, place = selected(takes, other, one)
    return value, place


def _largest(value: Tensor, place: Tensor, places: int) -> Found:
    """The largest along the last dimension, at the first place that it has of so many."""
    value, best = kept(value), kept(value).amax(-1, True)
    elsewhere = ((value != best) & (value == value)) | (place < 0)
    return best.squeeze(-1), (place + elsewhere.to(place.dtype) * places).amin(-1)


def _placed(x: Tensor, rank: int) -> Found:
    shape = x.shape[-rank:]
    places = torch.arange(math.prod(shape), device=x.device, dtype=WORDS[x.dtype.itemsize])
    return x, places.view(shape)


def _along(found: Found, d: int, windows: tuple[int, int, int, int], padded: bool, places: int) -> Found:
    """The largest along one dimension: of so many windows of k numbers, how far apart those and the windows are.

    For a compiler they are in memory: its loops over numbers with gaps between them would branch.
    """
    many, k, wide, s = windows
    if k > SHORT:
        value, place = (t.unfold(d, wide * (k - 1) + 1, s)[..., ::wide] for t in found)
        return _largest(value.narrow(d - 1, 0, many), place.narrow(d - 1, 0, many), places)
    behind = [slice(None)] * (-1 - d)
    parts = [slice(a * wide, a * wide + (many - 1) * s + 1, s) for a in range(k)]
    first, *others = [tuple(kept(t[..., part, *behind]) for t in found) for part in parts]  # type: ignore[index]
    for other in others:
        first = _larger(first, other, padded)  # type: ignore[arg-type]
    return kept(first[0]), kept(first[1])


def _told(found: Found) -> Found:
    return found[0].contiguous(), found[1].expand(found[0].shape).long().contiguous()


def _max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,), ceil: bool = False, *, rank: int,
) -> Found:  # fmt: skip
    found, places = _placed(x, rank), math.prod(x.shape[-rank:])
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
        found = _along(found, d, (many, k, wide, s), padded, places)
    return _told(found)


even(aten.max_pool2d_with_indices.default, compiled=True)(partial(_max_pool, rank=2))
even(aten.max_pool3d_with_indices.default, compiled=True)(partial(_max_pool, rank=3))


@even(aten.adaptive_max_pool2d.default, compiled=True)
def adaptive_max_pool2d(x: Tensor, size: Sequence[int]) -> Found:
    """Windows that may differ in length."""
    found, places = _placed(x, 2), math.prod(x.shape[-2:])
    for d in (-1, -2):
        n, many = x.shape[d], size[d]
        if n % many == 0:
            found = _along(found, d, (many, n // many, 1, n // many), False, places)
            continue
        if many > WINDOWS:
            raise ValueError(f"more than {WINDOWS} windows of different lengths; use a max_pool")
        bounds = [(i * n // many, -(-(i + 1) * n // many)) for i in range(many)]
        value, place = (t.movedim(d, -1) for t in found)
        cells = [_largest(value[..., a:b], place[..., a:b], places) for a, b in bounds]
        found = torch.stack([value for value, _ in cells], d), torch.stack([place for _, place in cells], d)
    return _told(found)
