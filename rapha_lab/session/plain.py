"""Operations that are written out in those that a site computes, when a model is traced: no rule is needed there.

Whole recurrent layers (`nn.GRU`) travel as one operation. `nn.GRUCell` and its like, with which loops over visits
are written, are one step of them; `a & b` is another name of `torch.bitwise_and(a, b)`. Sorting compares all pairs:
how long a site computes must not depend on the order in which a patient's values are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["WRITTEN_OUT", "gaussian_nll_loss"]

Bias = Tensor | None
Pair = tuple[Tensor, Tensor]


def _gru(x: Tensor, h: Tensor, w: Tensor, u: Tensor, b: Bias = None, c: Bias = None) -> Tensor:
    (r, z, n), (hr, hz, hn) = linear(x, w, b).chunk(3, -1), linear(h, u, c).chunk(3, -1)
    z = torch.sigmoid(z + hz)
    n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return n + z * (h - n)


def _lstm(
    x: Tensor, state: list[Tensor], w: Tensor, u: Tensor, b: Bias = None, c: Bias = None
) -> tuple[Tensor, Tensor]:
    i, f, g, o = (linear(x, w, b) + linear(state[0], u, c)).chunk(4, -1)
    kept = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(kept), kept


def _tanh(x: Tensor, h: Tensor, w: Tensor, u: Tensor, b: Bias = None, c: Bias = None) -> Tensor:
    return torch.tanh(linear(x, w, b) + linear(h, u, c))


def _relu(x: Tensor, h: Tensor, w: Tensor, u: Tensor, b: Bias = None, c: Bias = None) -> Tensor:
    return torch.relu(linear(x, w, b) + linear(h, u, c))


def _bag(
    table: Tensor, index: Tensor, offsets: Tensor, scale: bool = False, mode: int = 0, sparse: bool = False,
    weights: Tensor | None = None, last: bool = False, padding: int | None = None,
) -> Any:  # fmt: skip
    """One patient's bag of embeddings: the sum (mode 0), mean (1) or maximum (2) of those that are no padding."""
    if len(offsets) != 1 or scale or last:
        return NotImplemented
    rows = F.embedding(index, table)
    there = (index != -1 if padding is None else index != padding).unsqueeze(-1)
    if mode == 2:
        best = rows.masked_fill(~there, -math.inf).amax(0, keepdim=True)
        out = torch.where(there.any(), best, 0.0)
    else:
        rows = rows if weights is None else rows * weights.unsqueeze(-1)
        out = (rows * there).sum(0, keepdim=True)
        out = out / there.sum().clamp(min=1) if mode == 1 else out
    return out, offsets, offsets, offsets


def _sorted(x: Tensor, dim: int = -1, descending: bool = False) -> Pair:
    """The values in order, and where each was; equal ones as they came."""
    x = x.movedim(dim, -1)
    mine, other, places = x.unsqueeze(-1), x.unsqueeze(-2), torch.arange(x.shape[-1])
    first = other > mine if descending else other < mine
    rank = (first | ((other == mine) & (places < places.unsqueeze(-1)))).sum(-1)
    order = ((rank.unsqueeze(-2) == places.unsqueeze(-1)) * places).sum(-1)
    return x.gather(-1, order).movedim(-1, dim), order.movedim(-1, dim)


def _stably(x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Pair:
    return _sorted(x, dim, descending)


def _top(x: Tensor, k: int, dim: int = -1, largest: bool = True, ordered: bool = True) -> Pair:
    values, order = _sorted(x, dim, largest)
    return values.narrow(dim, 0, k), order.narrow(dim, 0, k)


def _median(x: Tensor, dim: int = -1, keepdim: bool = False) -> Pair:
    middle = (x.shape[dim] - 1) // 2
    found = [t.narrow(dim, middle, 1) for t in _sorted(x, dim)]
    value, place = found if keepdim else [t.squeeze(dim) for t in found]
    return value, place


def _scanned(combine: Callable[[Tensor, Tensor], Tensor], x: Tensor, dim: int, **how: Any) -> Tensor:
    """Each place with all before it (Hillis and Steele 1986): torch differentiates a cumprod by what is zero in it."""
    x, far = x.movedim(dim, 0), 1
    while far < len(x):
        x, far = torch.cat([x[:far], combine(x[far:], x[:-far])]), 2 * far
    return x.movedim(0, dim)


def _product(x: Tensor, dim: int, keepdim: bool = False, **how: Any) -> Tensor:
    last = _scanned(torch.mul, x, dim).narrow(dim, x.shape[dim] - 1, 1)
    return last if keepdim else last.squeeze(dim)


def _distances(a: Tensor, b: Tensor, p: float = 2.0, mode: int | None = None) -> Tensor:
    return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


def _bucket(x: Tensor, edges: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    below = edges <= x.unsqueeze(-1) if right else edges < x.unsqueeze(-1)
    return below.sum(-1)


def _repeated(x: Tensor, times: int, dim: int | None = None, **how: Any) -> Tensor:
    x, dim = (x.flatten(), 0) if dim is None else (x, dim % x.dim())
    wide = x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], times, *x.shape[dim + 1 :])
    return wide.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])


def _channels(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _unshuffled(x: Tensor, factor: int) -> Tensor:
    x = x.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor))
    return x.movedim((-3, -1), (-4, -3)).flatten(-5, -3)


Sizes = Sequence[int]


def _windows(x: Tensor, kernel: Sizes, dilation: Sizes, padding: Sizes, stride: Sizes) -> Tensor:
    """torch.nn.Unfold: each window of the images as a column."""
    x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]])
    for d in (0, 1):
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])[..., :: dilation[d]]
    return x.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)


def _overlaid(
    x: Tensor, size: Sizes, kernel: Sizes, dilation: Sizes, padding: Sizes, stride: Sizes
) -> Tensor:
    """torch.nn.Fold: columns added up where their windows were, as a transposed convolution does."""
    reach = [size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1 for d in (0, 1)]
    many = math.prod(kernel)
    columns = x.reshape(-1, many, *(reach[d] // stride[d] + 1 for d in (0, 1)))
    one = torch.eye(many, dtype=x.dtype).reshape(many, 1, *kernel)
    more = [reach[d] % stride[d] for d in (0, 1)]
    out = F.conv_transpose2d(columns, one, None, list(stride), list(padding), more, 1, list(dilation))
    return out.reshape(len(x), -1, *size)


def gaussian_nll_loss(
    x: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """torch's, without its look at the values whether a variance is negative."""
    var = torch.as_tensor(var, dtype=x.dtype)
    var = (var if var.shape == x.shape or var.dim() == x.dim() else var.unsqueeze(-1)).clamp(min=eps)
    loss = 0.5 * (var.log() + (x - target).square() / var) + (0.5 * math.log(2 * math.pi) if full else 0.0)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


_ATEN = torch.ops.aten

WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    _ATEN.gru_cell.default: _gru,
    _ATEN.lstm_cell.default: _lstm,
    _ATEN.rnn_tanh_cell.default: _tanh,
    _ATEN.rnn_relu_cell.default: _relu,
    _ATEN.embedding_bag.padding_idx: _bag,
    _ATEN.sort.default: _sorted,
    _ATEN.sort.stable: _stably,
    _ATEN.argsort.default: lambda *args: _sorted(*args)[1],
    _ATEN.argsort.stable: lambda x, **how: _stably(x, **how)[1],
    _ATEN.topk.default: _top,
    _ATEN.median.dim: _median,
    _ATEN.cumprod.default: partial(_scanned, torch.mul),
    _ATEN.logcumsumexp.default: partial(_scanned, torch.logaddexp),
    _ATEN.prod.dim_int: _product,
    _ATEN.prod.default: lambda x, **how: _product(x.flatten(), 0),
    _ATEN.cdist.default: _distances,
    _ATEN.bucketize.Tensor: _bucket,
    _ATEN.repeat_interleave.self_int: _repeated,
    _ATEN.channel_shuffle.default: _channels,
    _ATEN.pixel_unshuffle.default: _unshuffled,
    _ATEN.im2col.default: _windows,
    _ATEN.col2im.default: _overlaid,
    **dict.fromkeys((_ATEN.__and__.Tensor, _ATEN.__and__.Scalar), torch.bitwise_and),
    **dict.fromkeys((_ATEN.__or__.Tensor, _ATEN.__or__.Scalar), torch.bitwise_or),
    **dict.fromkeys((_ATEN.__xor__.Tensor, _ATEN.__xor__.Scalar), torch.bitwise_xor),
}
"""What `torch.export` puts in an operation's place."""
