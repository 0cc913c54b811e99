"""Patients' gradients scaled down to norm C and summed: norms are taken of the very numbers added.

What is measured as it is stored comes first. The rest is written out for a few patients at a time, as many as fit
into the processor's cache; there it is measured, scaled and added, and then forgotten. A compiled step is made of
the same three functions: `measured`, `add_group` for each group of patients, `total`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rapha_lab.curator.lift.compiling import Step
from rapha_lab.curator.lift.draws import DRAWS
from rapha_lab.curator.lift.parts import (
    HUGE,
    SHARED,
    Apart,
    Origin,
    Part,
    Through,
    Whole,
    counting,
    flat,
    squared,
)
from rapha_lab.curator.lift.stored import in_memory, kept, weighted

__all__ = ["clipped_sum", "divided", "in_pieces", "measured", "written"]

Tensors = Mapping[str, Tensor]
Wholes = dict[str, Whole]
Aparts = dict[str, Apart]


def divided(found: Mapping[str, Part]) -> tuple[Wholes, Aparts]:
    """What is measured as it is stored, in memory, and what is written out first."""
    apart: Any = {name: part for name, part in found.items() if isinstance(part, Apart)}
    whole: Any = {name: in_memory(part) for name, part in found.items() if name not in apart}
    return whole, apart


def written(found: Mapping[str, Part], allocated: Callable[[], int]) -> int:
    """Bytes of what is written out of all patients' gradients, and of what that takes on its way through a weight.

    `allocated` counts them all.
    """
    before, _ = allocated(), [origin.rows for origin in origins(found.values())]
    through = allocated() - before
    rows = [part.rows() for part in divided(found)[1].values()]
    return through + sum(t.numel() * t.element_size() for t in rows)


def origins(parts: Iterable[Any]) -> list[Origin]:
    """Of what they are, or of what is added up to them, each once."""
    found = {}
    for part in parts:
        if isinstance(part, Through):
            found[id(part.origin)] = part.origin
        for one in origins(getattr(part, "uses", ())):
            found[id(one)] = one
    return [*found.values()]


def measured(whole: Wholes, patients: int) -> Tensor:
    """Each patient's squared norm of what is stored whole, float64."""
    return reduce(torch.add, (p.square() for p in whole.values()), torch.zeros(patients, dtype=torch.float64))


def add_group(
    apart: Aparts, square: Tensor, mask: Tensor, clip: float | Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Write out some patients' gradients, measure them together with what was, and add them up.

    A patient whose mask is False, or whose gradient is not finite or is huge, adds nothing and does not count.

    Returns:
        The sums, flat, in the rows' own order; each patient's scale; and whether the patient counts.
    """
    rows = [flat(kept(part.rows())) for part in apart.values()]
    square = reduce(torch.add, map(squared, rows), square)
    counts = kept(mask & (square <= HUGE**2))
    # the root of what is no number would take longer
    scale = kept(torch.where(counts, (clip / torch.where(counts, square, 1.0).sqrt()).clamp(max=1.0), 0.0))
    return [weighted(scale.to(own.dtype), counting(own, counts)) for own in rows], scale, counts


def total(
    whole: Wholes, apart: Aparts, sums: Sequence[Tensor], scale: Tensor, counts: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """All patients' sums by parameter, and (2,) how many were added and how many of them whole."""
    added = {n: part.ordered(t[None])[0] for (n, part), t in zip(apart.items(), sums, strict=True)}
    added |= {name: part.total(scale, counts) for name, part in whole.items()}
    return added, torch.stack([counts.sum(), (scale == 1.0).sum()])


def clipped_sum(
    found: Mapping[str, Part], mask: Tensor, clip: float | Tensor, size: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """The sum over patients of their gradients scaled down to norm `clip`, and how many they are, as `total` says.

    Args:
        found: the gradients.
        mask: `(patients,)` booleans.
        clip: the norm.
        size: how many patients' are written out at a time, a divisor of their number; all if it is 0.
    """
    whole, apart = divided(found)
    square = measured(whole, len(mask))
    if size in (0, len(mask)):
        sums, scale, counts = add_group(apart, square, mask, clip)
        return total(whole, apart, sums, scale, counts)
    form, sums = Form(apart), list[Tensor]()
    scale, counts = torch.empty_like(square), torch.empty_like(mask)

    def add(scales: Tensor, counting: Tensor, square: Tensor, mask: Tensor, *own: Tensor) -> None:
        more, scale, counts = add_group(form.parts(own, form.shared), square, mask, clip)
        # in places made before: what a group leaves between large rows keeps the C library from using their room again
        scales.copy_(scale)
        counting.copy_(counts)
        for into, t in zip(sums, more, strict=False):
            into.add_(t)
        sums.extend(more[len(sums) :])

    for own in _groups(size, scale, counts, square, mask, *form.tensors):
        add(*own)
    return total(whole, apart, sums, scale, counts)


def _groups(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(size) for t in tensors), strict=True)


class Form:
    """What parts are made of besides their tensors, to make such parts of other tensors.

    Attributes:
        tensors: with the patients in front.
        shared: the same for all patients.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.tensors: list[Tensor] = []
        self.shared: list[Tensor] = []
        self._records: list[Any] = []
        self._makers = {name: self._maker(part, self.tensors) for name, part in parts.items()}

    def parts(self, tensors: Sequence[Any], shared: Sequence[Any]) -> dict[str, Any]:
        """Parts of these tensors, which are in the order of `tensors` and of `shared`."""
        given = {id(self.tensors): tensors, id(self.shared): shared}
        records: dict[int, Any] = {}
        return {name: make(given, records) for name, make in self._makers.items()}

    def clear(self) -> None:
        """Forget the tensors it was made of."""
        for some in (self.tensors, self.shared, self._records):
            some.clear()

    def _maker(self, value: Any, tensors: list[Tensor]) -> Callable[[Any, dict[int, Any]], Any]:
        if isinstance(value, Tensor):
            # two parts may share one
            place = next((n for n, t in enumerate(tensors) if t is value), len(tensors))
            tensors[place:] = tensors[place:] or [value]
            return lambda given, records: given[id(tensors)][place]
        if isinstance(value, tuple) and not isinstance(value, torch.Size):
            several = [self._maker(v, tensors) for v in value]
            return lambda given, records: tuple(make(given, records) for make in several)
        if not dataclasses.is_dataclass(value):
            return lambda given, records: value
        kind: Any = type(value)
        number = next((n for n, one in enumerate(self._records) if one is value), len(self._records))
        self._records[number:] = self._records[number:] or [value]
        fields = {
            f.name: self._maker(getattr(value, f.name), self.shared if f.metadata == SHARED else tensors)
            for f in dataclasses.fields(value)
        }

        def make(given: Any, records: dict[int, Any]) -> Any:
            if number not in records:
                records[number] = kind(**{name: one(given, records) for name, one in fields.items()})
            return records[number]

        return make


def in_pieces(
    assemble: Callable[..., Callable[..., Any]], parts: Callable[..., Mapping[str, Part]],
    add: Callable[..., None], size: int, example: Sequence[Any],
) -> Step:  # fmt: skip
    """A step in machine code: what is stored, then each group of patients, then the sums.

    Args:
        assemble: makes machine code of a function for arguments like those after it.
        parts: `(parameters, constants, inputs)` → gradients.
        add: adds what `total` returns to `totals` and `counted`.
        size: how many patients' are written out at a time, a divisor of their number.
        example: a step's arguments.
    """
    totals, parameters, constants, inputs, mask, clip, counted = example
    forms: list[Form] = []

    def store(*given: Any) -> list[Tensor]:
        both = divided(parts(*given))
        forms[:] = [Form(some) for some in both]
        square = measured(both[0], len(mask))
        return [square, *forms[0].tensors, *forms[1].tensors, *forms[1].shared]

    def group(
        clip: Tensor, square: Tensor, mask: Tensor, scale: Tensor, counts: Tensor, *rest: Tensor
    ) -> None:
        tensors, shared, sums = _split(rest, own, common)
        more, scales, counting = add_group(forms[1].parts(tensors, shared), square, mask, clip)
        scale.copy_(scales)
        counts.copy_(counting)
        for into, t in zip(sums, more, strict=True):
            into.add_(t)

    def finish(totals: Any, counted: Tensor, scale: Tensor, counts: Tensor, *rest: Tensor) -> None:
        tensors, sums = _split(rest, first)
        whole, apart = forms[0].parts(tensors, ()), forms[1].parts([None] * own, [None] * common)
        add(totals, counted, *total(whole, apart, sums, scale, counts))

    stored = assemble(store, parameters, constants, inputs)
    with DRAWS.drawn():
        square, *tensors = stored(parameters, constants, inputs)
    first, own, common = len(forms[0].tensors), len(forms[1].tensors), len(forms[1].shared)
    names = list(forms[1].parts([None] * own, [None] * common))
    lengths = [totals[name].numel() for name in names]
    dtype = reduce(torch.promote_types, (parameters[name].dtype for name in names))

    def zeros() -> tuple[Tensor, ...]:
        return torch.zeros(sum(lengths), dtype=dtype).split(lengths)

    scale, counts, sums = torch.empty_like(square), torch.empty_like(mask), zeros()
    whole, apart, shared = _split(tensors, first, own)
    example = next(_groups(size, square, mask, scale, counts, *apart))
    grouped = assemble(group, clip, *example, *shared, *sums)
    finished = assemble(finish, totals, counted, scale, counts, *whole, *sums)
    for form in forms:
        form.clear()

    def step(
        totals: Tensors, parameters: Tensors, constants: Tensors, inputs: Tensors,
        mask: Tensor, clip: Tensor, counted: Tensor,
    ) -> None:  # fmt: skip
        square, *tensors = stored(parameters, constants, inputs)
        scale, counts = torch.empty_like(square), torch.empty_like(mask)
        sums = zeros()
        whole, apart, shared = _split(tensors, first, own)
        for some in _groups(size, square, mask, scale, counts, *apart):
            grouped(clip, *some, *shared, *sums)
        finished(totals, counted, scale, counts, *whole, *sums)

    return step


def _split(tensors: Sequence[Tensor], *counts: int) -> Iterator[list[Tensor]]:
    """The first so many, and so on, and the rest."""
    it = iter(tensors)
    return (list(islice(it, count)) for count in (*counts, None))
