"""Per-patient gradients in stored form: measured and added up as they are, or first written out for a few patients.

Gradients larger than what they are made of (`Apart`) are written out a few patients at a time, so that they stay in
the processor's cache until they have been measured and added. No Gram matrices: see `lift.gradients`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rapha_lab.curator.lift.even import Evenly
from rapha_lab.curator.lift.places import tables
from rapha_lab.curator.lift.stored import kept, products, weighted

__all__ = [
    "GROUP",
    "HUGE",
    "SHARED",
    "Apart",
    "Beside",
    "Origin",
    "Outer",
    "Pairs",
    "Part",
    "Rows",
    "Several",
    "Stored",
    "Summed",
    "Table",
    "Through",
    "Whole",
    "Windows",
    "counting",
    "flat",
    "squared",
]


SHARED = {"shared": True}
"""Says of a record's field that its tensors are the same for all patients."""


class Part(Protocol):
    """Every patient's gradient by one parameter, in stored form."""

    @property
    def name(self) -> str:
        """The parameter's."""
        ...

    def dense(self) -> Tensor:
        """The gradients materialised, `(patients, *shape)`."""
        ...


class Whole(Part, Protocol):
    """Measured and added up as it is stored."""

    def square(self) -> Tensor:
        """Each patient's squared norm, `(patients,)` float64; not finite if a number of it is not."""
        ...

    def total(self, scale: Tensor, counts: Tensor) -> Tensor:
        """The sum of the counting patients' gradients times their scales, in the parameter's shape."""
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
    """Materialised gradients, `(patients, *shape)`."""

    name: str
    rows: Tensor

    def square(self) -> Tensor:
        """Of the rows."""
        return squared(self.rows)

    def total(self, scale: Tensor, counts: Tensor) -> Tensor:
        """One vector by matrix product."""
        rows = flat(counting(self.rows, counts))
        return in_groups(weighted, scale.to(rows.dtype), rows).view(self.rows.shape[1:])

    def dense(self) -> Tensor:
        """Themselves."""
        return self.rows


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

    def of(self, out: Tensor, inp: Tensor) -> Outer:
        """Of another weight, in these factors."""
        return Outer(self.name, out, inp)

    def turned(self) -> Outer:
        """Of the weight's transpose."""
        return self.of(self.inp, self.out)


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
        rows = counting(self.rows, counts) * scale.to(self.rows.dtype)[:, None, None]
        rows = rows if len(rows) <= GROUP else rows.double()
        return tables(self.index.flatten()[None], rows.flatten(0, 1)[None], self.length)[0]

    def dense(self) -> Tensor:
        """The whole table for each patient."""
        return tables(self.index, self.rows, self.length)


class Apart(ABC):
    """Larger than what it is made of, so written out for a few patients at a time."""

    name: str

    @abstractmethod
    def rows(self) -> Tensor:
        """The gradients, `(patients, ...)`, each patient's numbers in an order of its own."""

    def ordered(self, rows: Tensor) -> Tensor:
        """Numbers in that order as `(patients, *shape)`; only what all patients share is read."""
        return rows

    def dense(self) -> Tensor:
        """The rows in the parameter's order."""
        return self.ordered(self.rows())


@dataclass(frozen=True)
class Table(Apart):
    """Of a table no longer than twice the places: `index` (patients, t), output gradients `out` (patients, t, width)."""

    name: str
    index: Tensor
    out: Tensor
    length: int

    def rows(self) -> Tensor:
        """The whole table."""
        return tables(self.index, self.out, self.length)


@dataclass(frozen=True)
class Pairs(Apart):
    """Of a weight `(out, in)` at T positions: output gradients `(patients, T, out)` and inputs `(patients, T, in)`."""

    name: str
    out: Tensor
    inp: Tensor
    shape: torch.Size

    def rows(self) -> Tensor:
        """Their products, added up over the positions, the longer rows last."""
        g, a = kept(self.out), kept(self.inp)
        return products(a.mT, g) if self._wide else products(g.mT, a)

    @property
    def _wide(self) -> bool:
        return self.shape[1] < self.shape[0]

    def ordered(self, rows: Tensor) -> Tensor:
        """By outputs, then inputs."""
        return rows.reshape(-1, *self.shape[::-1]).mT if self._wide else rows.reshape(-1, *self.shape)

    @staticmethod
    def made(name: str, out: Tensor, inp: Tensor) -> Pairs:
        """Of the weight whose shape these factors have."""
        return Pairs(name, out, inp, torch.Size([out.shape[2], inp.shape[2]]))

    def of(self, out: Tensor, inp: Tensor) -> Pairs:
        """Of another weight, in these factors."""
        return Pairs.made(self.name, out, inp)

    def turned(self) -> Pairs:
        """Of the weight's transpose."""
        return self.of(self.inp, self.out)


@dataclass(frozen=True)
class Summed(Apart):
    """Of a bias: output gradients `(patients, places, out, places)`."""

    name: str
    out: Tensor

    def rows(self) -> Tensor:
        """Added up over the places."""
        return self.out.sum((1, 3))


@dataclass(frozen=True)
class Convolved(Apart):
    """Of a convolution's weight: output gradients and inputs, both `(patients, images, channels, ...)`.

    Attributes:
        shape: the weight's.
        setting: stride, padding, dilation, whether it is transposed, its output's padding, and groups.
    """

    name: str
    out: Tensor
    inp: Tensor
    shape: torch.Size
    setting: Any


@dataclass(frozen=True)
class Beside(Convolved):
    """Patients' channels side by side are groups of channels, whose weights' gradients do not mix."""

    def rows(self) -> Tensor:
        """By torch's own backward pass."""
        stride, padding, dilation, transposed, more, groups = self.setting
        size, x = len(self.inp), self.inp
        beside = [t.transpose(0, 1).flatten(1, 2) for t in (self.out, x)]
        weight = x.new_empty(size * self.shape[0], *self.shape[1:])  # only its shape is read
        wanted = (stride, padding, dilation, transposed, more, size * groups, [False, True, False])
        rows = torch.ops.aten.convolution_backward(*beside, weight, None, *wanted)[1]
        return rows.reshape(size, *self.shape)


@dataclass(frozen=True)
class Windows(Convolved):
    """Products of windows `(patients, positions, kernel * channels)` of the input and of the output's gradient."""

    @property
    def _wide(self) -> bool:
        """Whether a window is shorter than there are channels: the longer rows come last."""
        return math.prod(self.shape[1:]) < self.shape[0]

    def rows(self) -> Tensor:
        """Windows by channels, or channels by windows; a window's channels come after its places."""
        x, g = self._windows(), kept(self.out.flatten(3).transpose(2, 3).flatten(1, 2))
        return products(x.mT, g) if self._wide else products(g.mT, x)

    def _windows(self) -> Tensor:
        stride, padding, dilation, *_ = self.setting
        kernel, rank, size = self.shape[2:], len(self.shape) - 2, len(self.inp)
        x = self.inp.flatten(0, 1)
        x = kept(F.pad(x, [p for pair in padding[::-1] for p in (pair, pair)]).movedim(1, -1))
        for d in range(rank):
            x = x.unfold(1 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])[..., :: dilation[d]]
        # (images, *positions, channels, *kernel)
        return x.movedim(1 + rank, -1).reshape(size, -1, math.prod(self.shape[1:]))

    def ordered(self, rows: Tensor) -> Tensor:
        """Channels before places."""
        rank, inner = len(self.shape) - 2, [*self.shape[2:], self.shape[1]]
        if self._wide:
            rows = rows.reshape(-1, *inner, self.shape[0])
            return rows.permute(0, 2 + rank, 1 + rank, *range(1, 1 + rank))
        rows = rows.reshape(-1, self.shape[0], *inner)
        return rows.permute(0, 1, 2 + rank, *range(2, 2 + rank))


@dataclass(frozen=True)
class Several(Apart):
    """Of a parameter with several uses: norms of uses do not add, but their gradients do."""

    name: str
    uses: tuple[Part, ...]

    def rows(self) -> Tensor:
        """All uses' gradients added up."""
        return reduce(torch.add, (use.dense() for use in self.uses))


@dataclass(frozen=True)
class Origin:
    """What a layer's weight was made of, and its gradients.

    Attributes:
        by: the gradients by the weight.
        values: the parameters, then the constants, each with a 1 in front; the same for all patients.
        make: makes the weight of them, each patient's of its own.
        count: how many are parameters.
    """

    by: Part
    values: tuple[Tensor, ...] = field(metadata=SHARED)
    make: Callable[[Sequence[Tensor]], Tensor]
    count: int

    @cached_property
    def rows(self) -> list[Tensor]:
        """Each patient's gradients by each parameter: autograd differentiates copies."""
        g = kept(self.by.dense())
        with Evenly(), torch.enable_grad():
            own = [t.expand(len(g), *t.shape[1:]).requires_grad_() for t in self.values[: self.count]]
            weight = self.make([*own, *self.values[self.count :]])
            return [*torch.autograd.grad(weight, own, g, materialize_grads=True)]


@dataclass(frozen=True)
class Through(Apart):
    """Of a parameter that a layer's weight is made of."""

    name: str
    origin: Origin
    place: int

    def rows(self) -> Tensor:
        """The gradients by the weight, taken on to the parameter."""
        return self.origin.rows[self.place]
