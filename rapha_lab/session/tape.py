"""How sealed tensors were made: the operations behind one, to be replayed on any number of patients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from rapha_lab.protocol.columns import Column
from rapha_lab.protocol.errors import ProgramError, SealedError
from rapha_lab.session.refusals import REFUSALS
from rapha_lab.session.settled import settled

__all__ = ["FEWER", "PATIENTS", "Columns", "Count", "Made", "Tape", "Use", "filled", "mapped", "parts"]

PATIENTS, FEWER = 13, 7
"""Made-up patients in a sealed tensor, a number that layers rarely have as one of their sizes, and another number of them."""

Columns = str | list[str]


class Count(int):
    """The number of a batch's patients, or `factor` times it: a made-up number that replays know how to replace."""

    factor: int
    batch: Any

    def __new__(cls, factor: int = 1, batch: Any = None) -> Count:
        """`factor` times the number of made-up patients."""
        made = super().__new__(cls, PATIENTS * factor)
        made.factor, made.batch = factor, batch
        return made

    def __mul__(self, other: Any) -> Any:
        return Count(self.factor * other, self.batch) if type(other) is int else int(self) * other

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return (
            Count(self.factor // other, self.batch)
            if type(other) is int and self.factor % other == 0
            else int(self) // other
        )

    def __truediv__(self, other: Any) -> Any:
        return torch.tensor(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / torch.tensor(self)

    def __float__(self) -> NoReturn:
        what, why, instead = REFUSALS["__len__"]
        raise SealedError(what, why, instead)

    def __repr__(self) -> str:
        return "patients" if self.factor == 1 else f"{self.factor} * patients"


@dataclass(eq=False, slots=True)
class Made:
    """How a sealed tensor was made: a column with made-up values, or an item of `function(*args, **kwargs)`.

    Attributes:
        column: the one column that it is, where that is a scaled number.
        grad: False for what was made under `torch.no_grad()`, through which no gradient passes.
        lasting: whether the same operation in a later batch is this one: it was made of columns and parameters alone.
        known: what `backward()` on it found out, for the next batch.
    """

    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    columns: Columns | None = None
    values: Any = None
    column: Column | None = None
    line: int | None = None
    grad: bool = True
    lasting: bool = False
    known: Any = None


@dataclass(frozen=True, slots=True)
class Use:
    """A sealed tensor among an operation's arguments, as it was then."""

    made: Made
    index: int | None
    shape: Sequence[int] = ()


def mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Arguments with everything of a kind in them changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple | list):
        changed = [mapped(v, kind, change) for v in value]
        return changed if type(value) is list else tuple(changed)
    if isinstance(value, dict):
        return {k: mapped(v, kind, change) for k, v in value.items()}
    return value


class Tape:
    """Everything that made a sealed tensor, in an order in which it can be replayed.

    Attributes:
        leaves, order: the columns, and the operations.
        parameters, constants: tensors from outside, by whether they require a gradient.
        filled: the ids of those constants that are as long as the batch and the same for each patient.
        at: the operation that a replay is at.
    """

    at: Made | None = None

    def __init__(self, of: Use) -> None:
        self.of = of
        self.order: list[Made] = []
        self.leaves: list[Made] = []
        self.parameters: list[Tensor] = []
        self.constants: list[Tensor] = []
        self.filled: set[int] = set()
        seen: set[int] = set()
        stack: list[tuple[Made, bool]] = [(of.made, False)]
        while stack:
            made, done = stack.pop()
            if done:
                (self.leaves if made.columns is not None else self.order).append(made)
                continue
            if id(made) in seen:
                continue
            seen.add(id(made))
            stack.append((made, True))
            for part in parts((made.args, made.kwargs)):
                if isinstance(part, Use):
                    stack.append((part.made, False))
                else:
                    self._outside(part, made.line)

    def _outside(self, t: Tensor, line: int | None) -> None:
        if PATIENTS in t.shape and type(t.grad_fn).__name__ in ("ExpandBackward0", "RepeatBackward0"):
            raise ProgramError(
                "A parameter was expanded to the number of patients.", "That number is made up here.",
                "Let it broadcast; where it must be as long as the batch, as for torch.cat, "
                "write p + torch.zeros_like(x[:, :1]) with x of the batch.", field="model", line=line,
            )  # fmt: skip
        # a tensor computed from parameters elsewhere is one more parameter, whose gradient autograd takes further
        kept = self.parameters if t.requires_grad else self.constants
        if not any(t is other for other in kept):
            kept.append(t)

    @property
    def named(self) -> dict[str, Tensor]:
        """The tensors from outside by name."""
        parameters = {f"p{k}": t for k, t in enumerate(self.parameters)}
        return parameters | {f"c{k}": t for k, t in enumerate(self.constants)}

    def outside(self, named: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """What a replay takes in place of the tensors from outside."""
        return {id(t): named[name] for name, t in self.named.items()}

    def signature(self) -> tuple[Any, ...]:
        """Equal for tapes that make the same program."""
        place = {id(m): k for k, m in enumerate([*self.leaves, *self.order])}
        outside: dict[int, Any] = {id(t): ("p", k, t.shape, t.dtype) for k, t in enumerate(self.parameters)}
        outside |= {id(t): ("c", k, id(t), t._version, t.dtype) for k, t in enumerate(self.constants)}

        def seal(value: Any) -> Any:
            if isinstance(value, Use):
                return ("s", place[id(value.made)], value.index)
            if isinstance(value, Tensor):
                return outside[id(value)]
            if isinstance(value, tuple | list):
                return (type(value).__name__, *map(seal, value))
            if isinstance(value, dict):
                return tuple((k, seal(v)) for k, v in sorted(value.items()))
            return (type(value).__name__, repr(value))

        steps = tuple((m.function, seal(m.args), seal(m.kwargs), m.grad) for m in self.order)
        # columns of another dataset, or derived anew, may have the same names
        columns = tuple(
            (repr(m.columns), m.values.shape, m.values.dtype, repr(m.column)) for m in self.leaves
        )
        return (columns, steps, self.of.index)

    def replay(
        self, patients: int, leaves: Sequence[Tensor], outside: dict[int, Tensor], *, random: bool = True
    ) -> Tensor:
        """The tensor computed anew for `patients` patients."""
        found: dict[int, Any] = {id(m): t for m, t in zip(self.leaves, leaves, strict=True)}

        def put(value: Any) -> Any:
            if isinstance(value, Use):
                out = found[id(value.made)]
                return out if value.index is None else out[value.index]
            if isinstance(value, Tensor):
                now = outside.get(id(value), value)
                return _narrowed(now, patients) if id(value) in self.filled else now
            if isinstance(value, Count):
                return value.factor * patients
            if isinstance(value, tuple | list):
                return (
                    type(value)(map(put, value)) if type(value) in (tuple, list) else tuple(map(put, value))
                )
            return {k: put(v) for k, v in value.items()} if isinstance(value, dict) else value

        for made in self.order:
            self.at = made
            args, kwargs = put(made.args), put(made.kwargs)
            computed = made.function if random else partial(settled, made.function)
            if kwargs.pop("_in_place", False):
                args = (args[0].clone(), *args[1:])
                out = computed(*args, **kwargs)
                found[id(made)] = args[0] if out is None else out
                continue
            out = computed(*args, **kwargs)
            found[id(made)] = out if made.grad else _detached(out)
        return put(self.of)


def _detached(value: Any) -> Any:
    """Tensors through which no gradient passes."""
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(map(_detached, value)) if type(value) in (tuple, list) else value


def filled(constant: Tensor) -> bool:
    """Whether it has the number of patients as a size and the same for each, such as a recurrent layer's zeros."""
    if PATIENTS not in constant.shape:
        return False
    d = list(constant.shape).index(PATIENTS)
    return torch.equal(constant.narrow(d, 0, 1).expand_as(constant), constant)


def _narrowed(constant: Tensor, patients: int) -> Tensor:
    """A constant that is filled, for another number of patients."""
    d = list(constant.shape).index(PATIENTS)
    return constant.narrow(d, 0, 1).expand([patients if k == d else n for k, n in enumerate(constant.shape)])


def parts(value: Any) -> Iterator[Use | Tensor]:
    """The tensors among arguments."""
    if isinstance(value, Use | Tensor):
        yield value
    elif isinstance(value, dict):
        yield from parts(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from parts(item)
