"""Layers whose per-patient parameter gradients are made from stored inputs and output gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rapha_lab.curator.lift.layers import folded
from rapha_lab.curator.lift.parts import Beside, Outer, Pairs, Part, Rows, Stored, Summed, Table, Windows
from rapha_lab.curator.lift.places import added_up
from rapha_lab.curator.lift.shapes import clamped
from rapha_lab.curator.lift.stored import kept
from rapha_lab.protocol.program import Ref

__all__ = ["PRODUCTS", "TAPS", "Use", "tap", "watched"]


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
Weights = Callable[[list[Any], Mapping[str, int]], list[Any] | None]
TAPS: dict[str, tuple[Weights, Run]] = {}
"""Operation → (which of its arguments are weights; the layer, giving its output and uses).

The first is told the number of dimensions of all values that are the same for all patients; None is no layer.
Weights that a layer does without are None, and so is the name of one that is not trained. The layer is called with
the weights' names, the number of patients and the operation's arguments."""
PRODUCTS: set[str] = set()
"""Operations that are a layer only where one factor depends on the patient."""


def tap(weights: Weights, *names: str) -> Callable[[Run], Run]:
    """Enter a layer."""

    def enter(function: Run) -> Run:
        TAPS.update({f"aten.{name}": (weights, function) for name in names})
        return function

    return enter


def watched(y: Tensor) -> Tensor:
    """A layer's output as something the loss can be differentiated by."""
    return y if y.requires_grad else y.requires_grad_()


@dataclass(frozen=True)
class Product:
    """`y = a W^T + b` at each of T positions, or `y = a W + b`: inputs `(patients, T, in)`."""

    weight: str | None
    bias: str | None
    inputs: Tensor
    outputs: list[Tensor]
    turned: bool = False

    def parts(self, grads: Sequence[Tensor]) -> list[Part]:
        """An outer product at one position, to be written out at several."""
        a = self.inputs
        g = grads[0].reshape(*a.shape[:2], grads[0].shape[-1])
        alone, (one, other) = a.shape[1] == 1, (a, g) if self.turned else (g, a)
        made: list[Part] = []
        if self.weight is not None and alone:
            made.append(Outer(self.weight, one[:, 0], other[:, 0]))
        elif self.weight is not None:
            made.append(Pairs.made(self.weight, one, other))
        if self.bias is not None:
            made.append(Stored(self.bias, g[:, 0]) if alone else Summed(self.bias, g.unsqueeze(-1)))
        return made


@tap(lambda args, ranks: args[1:3] if _matrix(args[1], ranks) else None, "linear.default")
def linear(names: list[str | None], size: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """A linear layer."""
    return _times(names, size, x, weight, bias)


def _times(
    names: list[str | None], size: int, x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool = False
) -> Any:
    x, weight = x.expand(size, *x.shape[1:]), weight[0].mT if turned else weight[0]
    if bias is not None and bias.shape[1:] != weight.shape[:1]:
        raise ValueError("a bias has one number for each output")
    y = watched(folded(x, weight, None if bias is None else bias[0]))
    name, other = names
    return y, [Product(name, other, x.detach().reshape(size, -1, x.shape[-1]), [y], turned)]


def _matrix(arg: Any, ranks: Mapping[str, int]) -> bool:
    return isinstance(arg, Ref) and ranks.get(arg.ref) == 2


def product(weights: Weights, *names: str) -> Callable[[Run], Run]:
    """Enter a layer written as a product."""
    PRODUCTS.update(f"aten.{name}" for name in names)
    return tap(weights, *names)


def _factors(args: list[Any], ranks: Mapping[str, int]) -> list[Any] | None:
    if _matrix(args[1], ranks):
        return [None, args[1]]
    return [args[0], None] if _matrix(args[0], ranks) else None


@product(_factors, "matmul.default", "mm.default", "mv.default")
def matmul(names: list[str | None], size: int, a: Tensor, b: Tensor) -> Any:
    """A product with a matrix of parameters on the right, or on the left."""
    first, second = names
    if second is not None:
        return _times([second, None], size, a, b, None, turned=True)
    if b.dim() == 2:
        return _times([first, None], size, b, a, None)
    y, uses = _times([first, None], size, b.mT, a, None)
    return y.mT, uses


@product(
    lambda args, ranks: (
        [args[0], args[2]]
        if _matrix(args[2], ranks)
        and isinstance(args[0], Ref)
        and ranks.get(args[0].ref) == 1
        and args[3:] == [1, 1]
        else None
    ),
    "addmm.default",
)
def addmm(
    names: list[str | None], size: int, bias: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float
) -> Any:
    """A linear layer whose weight comes with the inputs first."""
    return _times(names[::-1], size, a, b, bias, turned=True)


def _contracted(equation: str, tensors: list[Any], ranks: Mapping[str, int]) -> tuple[int, bool] | None:
    """Which factor of a sum of products is a layer's matrix, and whether its inputs come first."""
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or len(tensors) != 2:
        return None
    for place, (matrix, x) in enumerate(zip(terms, terms[::-1], strict=True)):
        c = x[-1:]
        out = matrix.replace(c, "", 1) if c else ""
        named = [letter for letter in x + out if letter.isalpha()]
        fits = len(out) == 1 and len(matrix) == 2 and len({*named}) == len(named)
        if fits and c.isalpha() and right == x[:-1] + out and _matrix(tensors[place], ranks):
            return place, matrix == c + out
    return None


def _of_einsum(args: list[Any], ranks: Mapping[str, int]) -> list[Any] | None:
    found = _contracted(args[0], args[1], ranks)
    return None if found is None else [args[1][found[0]]]


@product(_of_einsum, "einsum.default")
def einsum(names: list[str | None], size: int, equation: str, tensors: list[Tensor], path: Any) -> Any:
    """A sum of products over the last dimension of what is multiplied by a matrix."""
    ranks = {str(n): t.dim() - 1 for n, t in enumerate(tensors)}
    place, turned = _contracted(equation, [Ref(n) for n in ranks], ranks) or (0, False)
    return _times([names[0], None], size, tensors[1 - place], tensors[place], None, turned)


@dataclass(frozen=True)
class Convolution:
    """A convolution of images `(patients, images, channels, ...)`, or a transposed one."""

    weight: str | None
    bias: str | None
    inputs: Tensor
    outputs: list[Tensor]
    shape: torch.Size
    setting: Any

    def parts(self, grads: Sequence[Tensor]) -> list[Part]:
        """To be written out."""
        (g,) = grads
        bias: list[Part] = [] if self.bias is None else [Summed(self.bias, g.flatten(3))]
        if self.weight is None:
            return bias
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


@tap(
    lambda args, ranks: args[1:3], *(f"conv{n}d.{kind}" for n in (1, 2, 3) for kind in ("default", "padding"))
)
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
    lambda args, ranks: args[1:3],
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
    use = Convolution(names[0], names[1], images.detach(), [y], weight.shape[1:], setting)
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
        rows = g if g.shape[1] == 1 else added_up(self.index, g, self.length)
        return [Rows(self.weight, self.index, rows, self.length)]


@tap(lambda args, ranks: None if args[3] else args[:1], "embedding.default")
def embedding(
    names: list[str | None], size: int, weight: Tensor, index: Tensor, padding: int, scale: bool, sparse: bool
) -> Any:
    """An embedding; indices out of range are clamped."""
    index = clamped(index, weight.shape[1]).expand(size, *index.shape[1:])
    # a compiler that sums rows as it picks them does so number by number
    y = watched(kept(F.embedding(index, weight[0])))
    return y, [Lookup(str(names[0]), index.reshape(size, -1), padding, weight.shape[1], [y])]
