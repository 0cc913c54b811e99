# ruff: noqa: D103  (a rule does what the operation it is entered under does)
"""The table's rules for shapes, slices and indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rapha_lab.curator.lift.table import batch_of, dim, dims, raised, rule, some, together


@rule("view.default", "reshape.default", "_unsafe_view.default", "_reshape_alias.default")
def view(x: Tensor, size: Sequence[int], *stride: Any) -> Tensor:
    return x.reshape(x.shape[0], *size)


@rule("view_as.default", "reshape_as.default")
def view_as(x: Tensor, other: Tensor) -> Tensor:
    return x.reshape(x.shape[0], *other.shape[1:])


@rule("flatten.using_ints")
def flatten(x: Tensor, start: int, end: int) -> Tensor:
    return x.flatten(dim(x, start), dim(x, end)) if x.dim() > 1 else x.unsqueeze(1)


@rule("unflatten.int")
def unflatten(x: Tensor, d: int, sizes: Sequence[int]) -> Tensor:
    return x.unflatten(dim(x, d), list(sizes))


@rule("squeeze.default")
def squeeze(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], *(n for n in x.shape[1:] if n != 1))


@rule("squeeze.dim", "squeeze.dims")
def squeeze_dims(x: Tensor, which: int | Sequence[int]) -> Tensor:
    gone = [d for d in dims(x, which) if x.shape[d] == 1]
    return x.reshape(*(n for d, n in enumerate(x.shape) if d not in gone))


@rule("unsqueeze.default")
def unsqueeze(x: Tensor, d: int) -> Tensor:
    rank = x.dim()
    if not -rank <= d < rank:
        raise IndexError(f"dimension {d}")
    return x.unsqueeze(d % rank + 1)


@rule("permute.default")
def permute(x: Tensor, order: Sequence[int]) -> Tensor:
    return x.permute(0, *dims(x, order))


@rule("transpose.int", "swapaxes.default")
def transpose(x: Tensor, a: int, b: int) -> Tensor:
    return x.transpose(dim(x, a), dim(x, b))


@rule("t.default", "numpy_T.default")
def t(x: Tensor) -> Tensor:
    return x.permute(0, *range(x.dim() - 1, 0, -1))


@rule("mT.default")
def m_t(x: Tensor) -> Tensor:
    return x.transpose(dim(x, -2), dim(x, -1))


@rule("movedim.intlist", "movedim.int")
def movedim(x: Tensor, source: Any, destination: Any) -> Tensor:
    return x.movedim(dims(x, source), dims(x, destination))


@rule("expand.default")
def expand(x: Tensor, size: Sequence[int], implicit: bool) -> Tensor:
    return raised(x, len(size)).expand(x.shape[0], *size)


@rule("expand_as.default")
def expand_as(x: Tensor, other: Tensor) -> Tensor:
    return raised(x, other.dim() - 1).expand(x.shape[0], *other.shape[1:])


@rule("broadcast_tensors.default")
def broadcast_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    shape = torch.broadcast_shapes(*(t.shape[1:] for t in tensors))
    return [raised(t, len(shape)).expand(t.shape[0], *shape) for t in together(tensors)]


@rule("repeat.default", "tile.default")
def repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    repeats = [1] * max(0, x.dim() - 1 - len(repeats)) + list(repeats)
    return raised(x, len(repeats)).repeat(1, *repeats)


@rule("cat.default", "concat.default")
def cat(tensors: Sequence[Tensor], d: int) -> Tensor:
    tensors = [t for t in tensors if t.shape[1:] != (0,)] or list(tensors)
    return torch.cat(together(tensors), dim(tensors[0], d))


@rule("stack.default")
def stack(tensors: Sequence[Tensor], d: int) -> Tensor:
    return cat([unsqueeze(t, d) for t in tensors], d)


@rule("split.Tensor", "split_with_sizes.default")
def split(x: Tensor, size: int | list[int], d: int) -> Any:
    return x.split(size, dim(x, d))


@rule("chunk.default")
def chunk(x: Tensor, chunks: int, d: int) -> Any:
    return x.chunk(chunks, dim(x, d))


@rule("unbind.int")
def unbind(x: Tensor, d: int) -> Any:
    return x.unbind(dim(x, d))


@rule("select.int")
def select(x: Tensor, d: int, index: int) -> Tensor:
    return x.select(dim(x, d), index)


@rule("slice.Tensor")
def slice_(x: Tensor, d: int, start: int | None, end: int | None, step: int) -> Tensor:
    return torch.ops.aten.slice.Tensor(x, dim(x, d), start, end, step)


@rule("narrow.default")
def narrow(x: Tensor, d: int, start: int, length: int) -> Tensor:
    return x.narrow(dim(x, d), start, length)


@rule("flip.default")
def flip(x: Tensor, which: Sequence[int]) -> Tensor:
    return x.flip(dims(x, which))


@rule("roll.default")
def roll(x: Tensor, shifts: Sequence[int], which: Sequence[int]) -> Tensor:
    if not which:
        return x.flatten(1).roll(list(shifts), [1] * len(shifts)).reshape(x.shape)
    return x.roll(list(shifts), some(x, which))


for _name, _op in (("tril", torch.tril), ("triu", torch.triu)):

    def _triangle(x: Tensor, diagonal: int, _op: Any = _op) -> Tensor:
        dims(x, [-2, -1])
        return _op(x, diagonal)

    rule(f"{_name}.default")(_triangle)


@rule("diagonal.default")
def diagonal(x: Tensor, offset: int, a: int, b: int) -> Tensor:
    return x.diagonal(offset, dim(x, a), dim(x, b))


@rule("unfold.default")
def unfold(x: Tensor, d: int, size: int, step: int) -> Tensor:
    return x.unfold(dim(x, d), size, step)


@rule("constant_pad_nd.default")
def constant_pad(x: Tensor, pad: Sequence[int], value: float) -> Tensor:
    if len(pad) > 2 * (x.dim() - 1):
        raise IndexError("more paddings than dimensions")
    return F.pad(x, list(pad), value=value)


@rule("pad.default")
def pad(x: Tensor, sizes: Sequence[int], mode: str, value: float | None) -> Tensor:
    if mode == "constant":
        return constant_pad(x, sizes, value or 0.0)
    n = len(sizes) // 2
    if x.dim() - 1 < n + 1:
        raise IndexError("more paddings than dimensions")
    folded = x.reshape(-1, *x.shape[-n:]).unsqueeze(1)
    return F.pad(folded, list(sizes), mode=mode).reshape(*x.shape[:-n], *_padded(x, sizes, n))


def _padded(x: Tensor, sizes: Sequence[int], n: int) -> list[int]:
    pairs = [sizes[2 * i] + sizes[2 * i + 1] for i in range(n)][::-1]
    return [size + more for size, more in zip(x.shape[-n:], pairs, strict=True)]


# Indices: out of range is clamped, since a record must not be able to raise


def clamped(index: Tensor, size: int) -> Tensor:
    """Indices brought into a dimension of `size`, negative ones counted from its end."""
    if size == 0 and index.numel():
        raise IndexError("an index into nothing")
    index = index.long()
    return torch.where(index < 0, index + size, index).clamp(0, max(size - 1, 0))


@rule("index_select.default")
def index_select(x: Tensor, d: int, index: Tensor) -> Tensor:
    if index.dim() != 2:
        raise IndexError("an index of one dimension is expected")
    d = dim(x, d)
    shape = (index.shape[0], *[1] * (d - 1), index.shape[1], *[1] * (x.dim() - d - 1))
    index = clamped(index, x.shape[d]).reshape(shape)
    size = batch_of(x, index)
    wide = index.expand(size, *x.shape[1:d], index.shape[d], *x.shape[d + 1 :])
    return x.expand(size, *x.shape[1:]).gather(d, wide)


@rule("gather.default", "take_along_dim.default")
def gather(x: Tensor, d: Any, index: Any, sparse: bool = False) -> Tensor:
    if isinstance(d, Tensor):
        d, index = index, d
    where = dim(x, d)
    x, index = together([x, clamped(index, x.shape[where])])
    return x.gather(where, index)


@rule("scatter.src", "scatter.value")
def scatter(x: Tensor, d: int, index: Tensor, source: Any) -> Tensor:
    where = dim(x, d)
    given = [x, clamped(index, x.shape[where]), *([source] if isinstance(source, Tensor) else [])]
    x, index, *more = together(given)
    return x.scatter(where, index, *(more or [source]))


@rule("scatter_add.default")
def scatter_add(x: Tensor, d: int, index: Tensor, source: Tensor) -> Tensor:
    where = dim(x, d)
    x, index, source = together([x, clamped(index, x.shape[where]), source])
    return x.scatter_add(where, index, source)


@rule("index_add.default")
def index_add(x: Tensor, d: int, index: Tensor, source: Tensor, alpha: float) -> Tensor:
    where = dim(x, d)
    if index.dim() > 2 or source.dim() != x.dim():
        raise IndexError("an index of one dimension, and as many dimensions to add as there are")
    shape = [1] * x.dim()
    shape[0], shape[where] = index.shape[0], -1
    return scatter_add(x, d, index.reshape(shape).expand(-1, *source.shape[1:]), source * alpha)


@rule("index.Tensor")
def index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    given = [i for i in indices if i is not None]
    if any(i.dtype == torch.bool for i in given):
        raise TypeError("a mask as an index makes shapes depend on values; use torch.where")
    if len(indices) > x.dim() - 1:
        raise IndexError("more indices than dimensions")
    rank = max(i.dim() - 1 for i in given)
    size = batch_of(x, *given)
    picks = [
        None if i is None else raised(clamped(i, n), rank) for i, n in zip(indices, x.shape[1:], strict=False)
    ]
    where = [d for d, i in enumerate(indices) if i is not None]
    patient = torch.arange(size, device=x.device).reshape(size, *[1] * rank)
    out = x.expand(size, *x.shape[1:])[(patient, *(slice(None) if i is None else i for i in picks))]
    first, apart = where[0], where != list(range(where[0], where[-1] + 1))
    # beside the patient's index torch puts picked dimensions first if they do not follow it
    if first and not apart:
        out = out.movedim(tuple(range(1, rank + 1)), tuple(range(first + 1, first + rank + 1)))
    return out


@rule("one_hot.default")
def one_hot(x: Tensor, classes: int) -> Tensor:
    if classes < 1:
        raise ValueError("say how many classes there are")
    return (x.unsqueeze(-1) == torch.arange(classes, device=x.device)).long()


@rule("slice_scatter.default")
def slice_scatter(x: Tensor, source: Tensor, d: int, start: int | None, end: int | None, step: int) -> Tensor:
    x, source = together([x, source])
    return torch.ops.aten.slice_scatter.default(x, source, dim(x, d), start, end, step)


@rule("select_scatter.default")
def select_scatter(x: Tensor, source: Tensor, d: int, index: int) -> Tensor:
    x, source = together([x, source])
    return torch.ops.aten.select_scatter.default(x, source, dim(x, d), index)


@rule("copy.default")
def copy(x: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
    x, source = together([x, source])
    return raised(source, x.dim() - 1).to(x.dtype).expand(x.shape)
