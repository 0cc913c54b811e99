"""Layers whose per-patient parameter gradients are made from stored inputs and output gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rapha_lab.curator.lift.layers import folded
from rapha_lab.curator.lift.parts import Beside, Outer, Pairs, Part, Rows, Stored, Summed, Table, Windows
from rapha_lab.curator.lift.shapes import clamped
from rapha_lab.curator.lift.stored import kept
from rapha_lab.protocol.program import Ref

__all__ = ["TAPS", "Use", "names_of", "tap", "watched"]


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
        """An outer product at one position, to be written out at several."""
        a = self.inputs
        g = grads[0].reshape(*a.shape[:2], grads[0].shape[-1])
        if a.shape[1] == 1:
            bias: list[Part] = [] if self.bias is None else [Stored(self.bias, g[:, 0])]
            return [Outer(self.weight, g[:, 0], a[:, 0]), *bias]
        bias = [] if self.bias is None else [Summed(self.bias, g.unsqueeze(-1))]
        return [Pairs(self.weight, g, a, torch.Size([g.shape[2], a.shape[2]])), *bias]


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
        """To be written out."""
        (g,) = grads
        bias: list[Part] = [] if self.bias is None else [Summed(self.bias, g.flatten(3))]
        *_, transposed, _, groups = self.setting
        # windows are copies of the input: worth it where they are fewer numbers than the gradient
        beside = transposed or groups > 1 or math.prod(g.shape[3:]) >= self.shape[0]
        kind = Beside if beside else Windows
        return [kind(self.weight, g, self.inputs, self.shape, self.setting), *bias]


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
        """The table's, if it is small beside what is picked; else each used row's, added up where it was last used."""
        g = grads[0].reshape(*self.index.shape, -1)
        if self.padding >= 0:
            g = torch.where((self.index == self.padding).unsqueeze(-1), 0, g)
        if g.shape[1] > 1 and 2 * g.shape[1] >= self.length:
            return [Table(self.weight, self.index, g, self.length)]
        rows = g if g.shape[1] == 1 else _added_up(self.index, g, self.length)
        return [Rows(self.weight, self.index, rows, self.length)]


CACHED = 1 << 20
"""Bytes of rows and of places that are worked on at a time, so that they stay in the processor's cache."""


@torch.library.custom_op("rapha::added_up", mutates_args=())
def _added_up(index: Tensor, rows: Tensor, length: int) -> Tensor:
    """A patient's rows of the same index, added up at the last of their places; zeros at the others."""
    out, one = torch.zeros_like(rows), max(rows[0].numel(), length) * rows.element_size()
    for own, given, into in zip(*(t.split(max(1, CACHED // one)) for t in (index, rows, out)), strict=True):
        places = torch.arange(own.shape[1], dtype=torch.int32).expand(own.shape)
        last = places.new_zeros(len(own), length).scatter_reduce_(1, own, places, "amax")
        into.scatter_add_(1, last.gather(1, own).long().unsqueeze(-1).expand_as(given), given)
    return out


@_added_up.register_fake
def _(index: Tensor, rows: Tensor, length: int) -> Tensor:
    return torch.empty_like(rows)


@tap(lambda args: ["scaled by frequency" if args[3] else args[0]], "embedding.default")
def embedding(
    names: list[str | None], size: int, weight: Tensor, index: Tensor, padding: int, scale: bool, sparse: bool
) -> Any:
    """An embedding; indices out of range are clamped."""
    index = clamped(index, weight.shape[1]).expand(size, *index.shape[1:])
    # a compiler that sums rows as it picks them does so number by number
    y = watched(kept(F.embedding(index, weight[0])))
    return y, [Lookup(str(names[0]), index.reshape(size, -1), padding, weight.shape[1], [y])]
