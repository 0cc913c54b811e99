"""Layers whose per-patient parameter gradients are made from stored inputs and output gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rapha_lab.curator.lift.layers import folded
from rapha_lab.curator.lift.shapes import clamped
from rapha_lab.curator.lift.stored import kept, products, weighted
from rapha_lab.protocol.program import Ref

__all__ = ["GROUP", "HUGE", "TAPS", "Outer", "Part", "Rows", "Stored", "Use", "squared"]


class Part(Protocol):
    """Every patient's gradient by one parameter, in stored form."""

    @property
    def name(self) -> str:
        """The parameter's."""
        ...

    def square(self) -> Tensor:
        """Each patient's squared norm, `(patients,)` float64; not finite if a number of it is not."""
        ...

    def total(self, scale: Tensor, counts: Tensor) -> Tensor:
        """The sum of the counting patients' gradients times their scales, in the parameter's shape."""
        ...

    def dense(self) -> Tensor:
        """The gradients materialised, `(patients, *shape)`."""
        ...


HUGE = 1e28
"""A patient adds nothing whose numbers have a larger norm than this: scaled down to C they would leave float32's
normal numbers, below which a product can round to twice itself."""


def squared(values: Tensor) -> Tensor:
    """Squared norms of rows in float64, where squares of float32 neither overflow nor vanish; infinite if `HUGE`."""
    norm = torch.linalg.vector_norm(flat(values), dim=1, dtype=torch.float64)
    return torch.where(norm <= HUGE, norm, math.inf).square()


def flat(values: Tensor) -> Tensor:
    """One row a patient."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def counting(values: Tensor, counts: Tensor) -> Tensor:
    """The values with zeros for patients that do not count: 0 times NaN would not do."""
    return torch.where(counts.reshape(-1, *[1] * (values.dim() - 1)), values, 0)


GROUP = 256
"""Patients added up in float32; groups of them are added in float64, so that rounding does not grow with the batch."""


def in_groups(add: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """The sum of `add` over groups of patients, float64 if there is more than one group."""
    if len(first) <= GROUP:
        return add(first, second)
    pairs = zip(first.split(GROUP), second.split(GROUP), strict=True)
    return reduce(torch.add, (add(one, other).double() for one, other in pairs))


@dataclass(frozen=True)
class Stored:
    """Materialised gradients, `(patients, *shape)`, or in another order of dimensions.

    Attributes:
        order: which of the rows' dimensions make the parameter's, in order; some may be parts of one.
        shape: the parameter's, if an order is given.
    """

    name: str
    rows: Tensor
    order: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    def square(self) -> Tensor:
        """Of the rows."""
        return squared(self.rows)

    def total(self, scale: Tensor, counts: Tensor) -> Tensor:
        """One vector by matrix product."""
        rows = flat(counting(self.rows, counts))
        return self._ordered(in_groups(weighted, scale.to(rows.dtype), rows).view(1, *self.rows.shape[1:]))[0]

    def dense(self) -> Tensor:
        """Themselves."""
        return self._ordered(self.rows)

    def _ordered(self, rows: Tensor) -> Tensor:
        return rows.permute(0, *self.order).reshape(-1, *self.shape) if self.order else rows


@dataclass(frozen=True)
class Outer:
    """Outer products of output gradients `(patients, out)` and inputs `(patients, in)`, not materialised."""

    name: str
    out: Tensor
    inp: Tensor

    def square(self) -> Tensor:
        """The product of two squared norms."""
        return squared(self.out) * squared(self.inp)

    def total(self, scale: Tensor, counts: Tensor) -> Tensor:
        """One matrix product."""
        out = counting(self.out, counts) * scale.to(self.out.dtype)[:, None]
        return in_groups(lambda one, other: one.T @ other, out, counting(self.inp, counts))

    def dense(self) -> Tensor:
        """The products."""
        return self.out.unsqueeze(2) * self.inp.unsqueeze(1)


@dataclass(frozen=True)
class Rows:
    """Gradients of the rows of a table a patient used: `index` (patients, t), `rows` (patients, t, width).

    A row used at several places is added up at the last of them and zero at the others.
    """

    name: str
    index: Tensor
    rows: Tensor
    length: int

    def square(self) -> Tensor:
        """Of the rows."""
        return squared(self.rows)

    def total(self, scale: Tensor, counts: Tensor) -> Tensor:
        """Scaled rows added to their places."""
        rows = (counting(self.rows, counts) * scale.to(self.rows.dtype)[:, None, None]).double()
        table = rows.new_zeros(self.length, rows.shape[-1])
        return table.index_add(0, self.index.flatten(), rows.flatten(0, 1))

    def dense(self) -> Tensor:
        """The whole table for each patient."""
        size, _, width = self.rows.shape
        place = self.index.unsqueeze(-1).expand_as(self.rows)
        return self.rows.new_zeros(size, self.length, width).scatter_add(1, place, self.rows)


class Use(Protocol):
    """One use of a layer's parameters."""

    @property
    def outputs(self) -> list[Tensor]:
        """What the loss is differentiated by."""
        ...

    def parts(self, grads: Sequence[Tensor]) -> list[Part]:
        """The gradients of its parameters, from the gradients of the loss by its outputs."""
        ...


Run = Callable[..., tuple[Any, list[Use]]]
TAPS: dict[str, tuple[Callable[[list[Any]], list[Any]], Run]] = {}
"""Operation → (which of its arguments are weights; the layer, giving its output and uses).

Weights that a layer does without are None. The layer is called with the weights' names, the number of
patients and the operation's arguments."""


def tap(weights: Callable[[list[Any]], list[Any]], *names: str) -> Callable[[Run], Run]:
    """Enter a layer."""

    def enter(function: Run) -> Run:
        TAPS.update({f"aten.{name}": (weights, function) for name in names})
        return function

    return enter


def names_of(weights: list[Any], parameters: set[str]) -> list[str | None] | None:
    """The parameters a layer's weights are; None if one is anything else, so that it must be copied."""
    if not all(w is None or (isinstance(w, Ref) and w.ref in parameters) for w in weights):
        return None
    return [None if w is None else w.ref for w in weights]


def watched(y: Tensor) -> Tensor:
    """A layer's output as something the loss can be differentiated by."""
    return y if y.requires_grad else y.requires_grad_()


@dataclass(frozen=True)
class Product:
    """`y = a W^T + b` at each of T positions: inputs `(patients, T, in)`."""

    weight: str
    bias: str | None
    inputs: Tensor
    outputs: list[Tensor]

    def parts(self, grads: Sequence[Tensor]) -> list[Part]:
        """An outer product at one position, materialised at several."""
        a = kept(self.inputs)
        g = kept(torch.cat([g.reshape(len(a), -1, g.shape[-1]) for g in grads], dim=1))
        bias: list[Part] = [] if self.bias is None else [Stored(self.bias, g.sum(1))]
        if a.shape[1] == 1:
            return [Outer(self.weight, g[:, 0], a[:, 0]), *bias]
        return [Stored(self.weight, products(g.mT, a)), *bias]


@tap(lambda args: args[1:3], "linear.default")
def linear(names: list[str | None], size: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """A linear layer."""
    x = x.expand(size, *x.shape[1:])
    y = watched(folded(x, weight[0], None if bias is None else bias[0]))
    return y, [Product(str(names[0]), names[1], x.detach().reshape(size, -1, x.shape[-1]), [y])]


@dataclass(frozen=True)
class Convolution:
    """A convolution of images `(patients, images, channels, ...)`, or a transposed one."""

    weight: str
    bias: str | None
    inputs: Tensor
    outputs: list[Tensor]
    shape: torch.Size
    setting: Any

    def parts(self, grads: Sequence[Tensor]) -> list[Part]:
        """Materialised."""
        (g,) = grads
        bias: list[Part] = [] if self.bias is None else [Stored(self.bias, g.flatten(3).sum((1, 3)))]
        *_, transposed, _, groups = self.setting
        # windows are copies of the input: worth it where they are fewer numbers than the gradient
        apart = transposed or groups > 1 or math.prod(g.shape[3:]) >= self.shape[0]
        return [self._side_by_side(g) if apart else self._by_windows(g), *bias]

    def _side_by_side(self, g: Tensor) -> Part:
        """Patients' channels side by side are groups of channels, whose weights' gradients do not mix."""
        stride, padding, dilation, transposed, more, groups = self.setting
        x, size = self.inputs, len(self.inputs)
        beside = [t.transpose(0, 1).flatten(1, 2) for t in (g, x)]
        weight = x.new_empty(size * self.shape[0], *self.shape[1:])  # only its shape is read
        wanted = (stride, padding, dilation, transposed, more, size * groups, [False, True, False])
        rows = torch.ops.aten.convolution_backward(*beside, weight, None, *wanted)[1]
        return Stored(self.weight, rows.reshape(size, *self.shape))

    def _by_windows(self, g: Tensor) -> Part:
        """As products of windows `(patients, positions, kernel * channels)` of the input and of `g`."""
        stride, padding, dilation, *_ = self.setting
        kernel, x, rank, size = self.shape[2:], self.inputs, len(self.shape) - 2, len(g)
        x = kept(F.pad(x.flatten(0, 1), [p for pair in padding[::-1] for p in (pair, pair)]).movedim(1, -1))
        for d in range(rank):
            x = x.unfold(1 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])[..., :: dilation[d]]
        # (images, *positions, channels, *kernel)
        x = x.movedim(1 + rank, -1).reshape(size, -1, math.prod(self.shape[1:]))
        g = kept(g.flatten(3).transpose(2, 3).flatten(1, 2))
        inner = [*kernel, self.shape[1]]
        if x.shape[2] < g.shape[2]:  # the longer rows last
            rows = products(x.mT, g).unflatten(1, inner)
            return Stored(self.weight, rows, (2 + rank, 1 + rank, *range(1, 1 + rank)), self.shape)
        rows = products(g.mT, x).unflatten(2, inner)
        return Stored(self.weight, rows, (1, 2 + rank, *range(2, 2 + rank)), self.shape)


def _images(x: Tensor, size: int, rank: int) -> Tensor:
    """Inputs of a convolution over `rank` dimensions as `(patients, images, channels, ...)`."""
    if x.dim() not in (rank + 2, rank + 3):
        raise ValueError(f"an input of {rank + 2} dimensions is expected")
    x = x.expand(size, *x.shape[1:])
    return x if x.dim() == rank + 3 else x.unsqueeze(1)


@tap(lambda args: args[1:3], *(f"conv{n}d.{kind}" for n in (1, 2, 3) for kind in ("default", "padding")))
def convolution(
    names: list[str | None], size: int, x: Tensor, weight: Tensor, bias: Tensor | None,
    stride: list[int], padding: Any, dilation: list[int], groups: int,
) -> Any:  # fmt: skip
    """A convolution over one, two or three dimensions; the program's own batch folds with the patients."""
    rank, shape = weight.dim() - 3, weight.shape[1:]
    images, dilation = _images(x, size, rank), _each(dilation, rank)
    images, padding = _padded(
        images, shape[2:], padding if isinstance(padding, str) else list(padding), dilation
    )
    setting = (_each(stride, rank), _each(padding, rank), dilation, False, [0] * rank, groups)
    return _convolved(names, images, x, weight, bias, setting)


@tap(
    lambda args: args[1:3],
    "conv_transpose1d.default",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
)
def transposed(
    names: list[str | None], size: int, x: Tensor, weight: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], more: list[int], groups: int, dilation: list[int],
) -> Any:  # fmt: skip
    """A transposed convolution."""
    rank = weight.dim() - 3
    setting = (*(_each(v, rank) for v in (stride, padding, dilation)), True, _each(more, rank), groups)
    return _convolved(names, _images(x, size, rank), x, weight, bias, setting)


def _each(numbers: list[int], rank: int) -> list[int]:
    return list(numbers) * (rank if len(numbers) == 1 else 1)


def _convolved(
    names: list[str | None], images: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, setting: Any
) -> Any:
    y = torch.convolution(images.flatten(0, 1), weight[0], None if bias is None else bias[0], *setting)
    y = watched(y.unflatten(0, (len(images), -1)))
    use = Convolution(str(names[0]), names[1], images.detach(), [y], weight.shape[1:], setting)
    return (y if x.dim() == images.dim() else y.squeeze(1)), [use]


def _padded(x: Tensor, kernel: torch.Size, padding: Any, dilation: list[int]) -> tuple[Tensor, list[int]]:
    """Padding by name turned into zeros around the input, which may be uneven."""
    if padding == "same":
        around = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        x = F.pad(x, [p for total in around[::-1] for p in (total // 2, total - total // 2)])
    return x, [0] if isinstance(padding, str) else padding


@dataclass(frozen=True)
class Lookup:
    """Rows of a table picked by index `(patients, t)`."""

    weight: str
    index: Tensor
    padding: int
    length: int
    outputs: list[Tensor]

    def parts(self, grads: Sequence[Tensor]) -> list[Part]:
        """Each used row's gradient, added up where the row was last used."""
        g = grads[0].reshape(*self.index.shape, -1)
        if self.padding >= 0:
            g = torch.where((self.index == self.padding).unsqueeze(-1), 0, g)
        return [Rows(self.weight, self.index, g if g.shape[1] == 1 else self._added_up(g), self.length)]

    def _added_up(self, g: Tensor) -> Tensor:
        size, places = self.index.shape
        place = torch.arange(places, dtype=torch.int32, device=g.device).expand(size, places)
        last = place.new_zeros(size, self.length).scatter_reduce(1, self.index, place, "amax")
        row = last.gather(1, self.index).long().unsqueeze(-1)
        # patient by patient, so that threads do not share one's rows and add them in any order
        return torch.zeros_like(g).scatter_add(1, row.expand_as(g), g)


@tap(lambda args: ["scaled by frequency" if args[3] else args[0]], "embedding.default")
def embedding(
    names: list[str | None], size: int, weight: Tensor, index: Tensor, padding: int, scale: bool, sparse: bool
) -> Any:
    """An embedding; indices out of range are clamped."""
    index = clamped(index, weight.shape[1]).expand(size, *index.shape[1:])
    y = watched(F.embedding(index, weight[0]))
    return y, [Lookup(str(names[0]), index.reshape(size, -1), padding, weight.shape[1], [y])]
