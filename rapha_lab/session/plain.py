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


def _quantile(
    x: Tensor, q: float, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Any:
    if interpolation != "linear" or not 0 <= q <= 1:
        return NotImplemented
    x, dim = (x.flatten(), 0) if dim is None else (x, dim)
    place = q * (x.shape[dim] - 1)
    below = int(place)
    inorder = _sorted(x, dim)[0]
    low, high = (inorder.narrow(dim, min(k, x.shape[dim] - 1), 1) for k in (below, below + 1))
    out = low + (high - low) * (place - below)
    return out if keepdim else out.squeeze(dim)


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


def _mesh(lines: Sequence[Tensor], *, indexing: str = "ij") -> list[Tensor]:
    size = [line.numel() for line in lines]
    found = [
        line.reshape([-1 if d == k else 1 for k in range(len(size))]).expand(size)
        for d, line in enumerate(lines)
    ]
    return [t.transpose(0, 1) for t in found] if indexing == "xy" and len(size) > 1 else found


def _grid(theta: Tensor, size: Sizes, corners: bool) -> Tensor:
    """torch.nn.functional.affine_grid over two or three dimensions."""
    ends = [min(n - 1, 1) if corners else (n - 1) / n for n in size[2:]]
    lines = [torch.linspace(-e, e, n, dtype=theta.dtype) for e, n in zip(ends, size[2:], strict=True)]
    places = torch.stack([*_mesh(lines)[::-1], torch.ones(list(size[2:]), dtype=theta.dtype)], -1)
    return (places.flatten(0, -2) @ theta.mT).unflatten(1, size[2:])


def _sampled(x: Tensor, grid: Tensor, mode: int, padding: int, corners: bool) -> Any:
    """torch.nn.functional.grid_sample of images: bilinear or nearest, with zeros or the border around."""
    if x.dim() != 4 or mode > 1 or padding > 1:
        return NotImplemented
    sizes = [x.shape[3], x.shape[2]]
    place = [
        (g + 1) / 2 * (n - 1) if corners else ((g + 1) * n - 1) / 2
        for g, n in zip(grid.unbind(-1), sizes, strict=True)
    ]
    if padding == 1:
        place = [p.clamp(0, n - 1) for p, n in zip(place, sizes, strict=True)]
    first = [p.floor() if mode == 0 else p.round() for p in place]
    flat, out = x.flatten(2), torch.zeros((), dtype=x.dtype)
    for corner in [(0, 0), (0, 1), (1, 0), (1, 1)] if mode == 0 else [(0, 0)]:
        at = [f + more for f, more in zip(first, corner, strict=True)]
        there = torch.ones((), dtype=torch.bool)
        weight = torch.ones((), dtype=x.dtype)
        for p, a, n in zip(place, at, sizes, strict=True):
            there = there & (a >= 0) & (a <= n - 1)
            weight = weight * (1 - (p - a).abs()) if mode == 0 else weight
        col, row = (a.clamp(0, n - 1).long() for a, n in zip(at, sizes, strict=True))
        index = (row * sizes[0] + col).flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
        picked = flat.gather(2, index).unflatten(2, grid.shape[1:3])
        out = out + picked * torch.where(there, weight, 0.0).unsqueeze(1)
    return out


def _apart(a: Tensor, b: Tensor, p: float = 2.0, eps: float = 1e-6, keep: bool = False) -> Tensor:
    return torch.linalg.vector_norm(a - b + eps, p, -1, keep)


def _chosen(x: Tensor, p: Any = None, **how: Any) -> Tensor:
    """Ones, each with the probability `p` or its own."""
    return (torch.rand_like(x) < (x if p is None else p)).to(x.dtype)


def _normal(x: Tensor, mean: float = 0.0, std: float = 1.0, **how: Any) -> Tensor:
    return torch.randn_like(x) * std + mean


def _around(mean: Any, std: Any = 1.0, **how: Any) -> Tensor:
    like = mean if isinstance(mean, Tensor) else std
    return (torch.randn_like(like) * std + mean).detach()


def _uniform(x: Tensor, low: float = 0.0, high: float = 1.0, **how: Any) -> Tensor:
    return torch.rand_like(x) * (high - low) + low


def _whole(low: int, high: int, size: Sizes, *, dtype: Any = None, **how: Any) -> Tensor:
    return (torch.rand(list(size)) * (high - low)).long().clamp(max=high - low - 1).to(
        dtype or torch.int64
    ) + low


def _sized(like: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Random numbers in a size, from those in the shape of a tensor."""
    return lambda size, *, dtype=None, **how: like(torch.zeros(list(size), dtype=dtype))


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
    _ATEN.quantile.scalar: _quantile,
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
    _ATEN.meshgrid.default: _mesh,
    _ATEN.meshgrid.indexing: _mesh,
    _ATEN.affine_grid_generator.default: _grid,
    _ATEN.grid_sampler.default: _sampled,
    _ATEN.grid_sampler_2d.default: _sampled,
    _ATEN.pairwise_distance.default: _apart,
    _ATEN.fill.Tensor: lambda x, value: torch.zeros_like(x) + value,
    _ATEN.rand.default: _sized(torch.rand_like),
    _ATEN.randn.default: _sized(torch.randn_like),
    _ATEN.randint.default: partial(_whole, 0),
    _ATEN.randint.low: _whole,
    _ATEN.bernoulli.p: _chosen,
    _ATEN.bernoulli.default: _chosen,
    _ATEN.normal_functional.default: _normal,
    _ATEN.normal.float_float: lambda mean, std, size, **how: _normal(torch.zeros(list(size)), mean, std),
    **dict.fromkeys(
        (_ATEN.normal.Tensor_float, _ATEN.normal.float_Tensor, _ATEN.normal.Tensor_Tensor), _around
    ),
    _ATEN.uniform.default: _uniform,
    _ATEN.exponential.default: lambda x, rate=1.0, **how: -torch.log1p(-torch.rand_like(x)) / rate,
    _ATEN.col2im.default: _overlaid,
    **dict.fromkeys((_ATEN.__and__.Tensor, _ATEN.__and__.Scalar), torch.bitwise_and),
    **dict.fromkeys((_ATEN.__or__.Tensor, _ATEN.__or__.Scalar), torch.bitwise_or),
    **dict.fromkeys((_ATEN.__xor__.Tensor, _ATEN.__xor__.Scalar), torch.bitwise_xor),
}
"""What `torch.export` puts in an operation's place."""
