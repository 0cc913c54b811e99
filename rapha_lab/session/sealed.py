"""Sealed tensors: patients' columns as an ordinary training loop sees them, without a value of any patient.

A sealed tensor has a shape, a dtype, arithmetic and autograd; its first dimension counts patients and has no
number. Underneath it holds a few made-up patients drawn from the public schema, so that shapes and dtypes are
real, and remembers the operations that made it. `backward()` replays those on one patient, which gives a
program; the curator answers with a private gradient. No record is in this process: what is refused here is
refused because a made-up value would mislead, not because a real one could get out.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from rapha_lab.protocol.columns import Column
from rapha_lab.protocol.errors import ProgramError, SealedError
from rapha_lab.session import losses, scaled, tracing
from rapha_lab.session.backward import backward
from rapha_lab.session.refusals import OF_TORCH, REFUSALS, TRANSFORMS
from rapha_lab.session.settled import name_of
from rapha_lab.session.tape import FEWER, PATIENTS, Columns, Count, Made, Tape, Use, filled, mapped
from rapha_lab.session.tracing import Traced

__all__ = ["PATIENTS", "Batch", "Gradients", "SealedTensor"]

_AS_SUBCLASS = Tensor.as_subclass  # which cells may not call on a sealed tensor

Gradients = Callable[[Traced, dict[str, Columns], str], dict[str, Tensor]]
"""`(traced, columns by input, "mean" or "sum")` → a private gradient by parameter of the program."""


class SealedTensor(Tensor):
    """A tensor of patients: `(patients, ...)`; see the module's docstring."""

    _made: Made
    _index: int | None
    _batch: Batch | None  # None for what several batches made
    _viewed: bool
    _changes: list[int]  # how often it was changed in place, one list for all views of the same numbers
    _change: int  # at which of them it was made

    @staticmethod
    def wrap(
        values: Tensor,
        made: Made,
        batch: Batch | None,
        index: int | None = None,
        changes: list[int] | None = None,
    ) -> SealedTensor:
        """Made-up values with how they were made, of which batch, and what counts the changes of what they are a view of."""
        it = torch.Tensor._make_subclass(SealedTensor, values)
        it._made, it._index, it._batch, it._viewed = made, index, batch, False
        it._changes = [0] if changes is None else changes
        it._change = it._changes[0]
        return it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` on the made-up values and remember it, or refuse it; what a batch before did is looked up."""
        kwargs = kwargs or {}
        batch, key = _known_by(func, args, kwargs)
        if key is not None and (done := batch.memory.done.get(key)) is not None:
            return _again(done, args, batch)
        name = name_of(func)
        if name in REFUSALS and not (
            name in ("__getitem__", "__iter__", "__len__") and not _by_patient(name, args)
        ):
            _refuse(name)
        if name == "backward":
            return backward(*args, **kwargs)
        if name == "requires_grad":
            return args[0]._made.grad and bool(Tape(_use(args[0])).parameters)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise SealedError(*TRANSFORMS, line=tracing.cell_line())
        _refuse_norms(name, kwargs)
        _refuse_order(name, args)
        _refuse_loss(name, args)
        if name == "squeeze" and len(args) == 1 and "dim" not in kwargs:
            # said by dimensions: one patient alone, too, stays in a dimension of its own
            kwargs = {"dim": tuple(d for d, n in enumerate(_plain(args[0]).shape) if n == 1)}
        if batch is not None and torch.is_autocast_enabled("cpu"):
            batch.memory.say_of_autocast()
        in_place = _in_place(name) or kwargs.get("inplace") is True
        _refuse_writing(func, name, args, kwargs, in_place)
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            before = mapped(args, SealedTensor, _plain)
            out = func(*before, **mapped(kwargs, SealedTensor, _plain))
            viewed = any(_shares(out, t) for t in before)
        made = Made(func, mapped(args, SealedTensor, _use), mapped(kwargs, SealedTensor, _use))
        made.line, made.grad, made.lasting = tracing.cell_line(), torch.is_grad_enabled(), key is not None
        if name in ("size", "shape", "numel", "nelement"):
            out = _counted(out, *args, **kwargs)
        done = _Done(made, out, in_place, viewed and not in_place)
        if in_place:
            _refuse_parts(args[0], name)
            made.kwargs = {**made.kwargs, "_in_place": True}
        if key is not None:
            batch.memory.keep(key, done)
        return _again(done, args, batch)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """As `torch.Tensor.backward`, with private gradients."""
        backward(self, *args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = ", ".join(repr(n) for n in self.shape)
        leaf = self._made.columns is not None and self._batch is not None
        about = self._batch.about(self._made.columns) if leaf else ""  # type: ignore[union-attr,arg-type]
        return f"<sealed tensor: ({shape}{',' if self.dim() == 1 else ''}), {str(self.dtype)[6:]}{about}>"

    def __format__(self, spec: str) -> str:
        return _refuse("__format__") if spec else repr(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("__reduce_ex__")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0)) if not _by_patient("__iter__", (self,)) else _refuse("__iter__")


class _Done(NamedTuple):
    """An operation on sealed tensors and what it gave: whether in place, and whether as a view of an argument."""

    made: Made
    out: Any
    in_place: bool
    viewed: bool


@dataclass
class Memory:
    """What the batches of a loop have in common: columns, and the operations on them by what these are known by."""

    leaves: dict[Any, Made] = field(default_factory=dict)
    done: dict[tuple[Any, ...], _Done] = field(default_factory=dict)
    warned: bool = False

    def say_of_autocast(self) -> None:
        """Warn, once in a loop, that half precision does nothing here."""
        if not self.warned:
            self.warned = True
            said = "autocast does nothing here: what is computed of patients is computed at the site, in float32."
            warnings.warn_explicit(said, UserWarning, tracing.CELL.get() or "cell", tracing.cell_line() or 1)

    def keep(self, key: tuple[Any, ...], done: _Done) -> None:
        """Remember an operation; a loop that never does the same twice remembers the last few thousand."""
        if len(self.done) >= _OPERATIONS:
            self.done.clear()
        self.done[key] = done


class _Passing(Exception):
    """An argument that the next batch would not bring again."""


_OPERATIONS = 4096
_PLAIN = {int, bool, str, type(None), type(Ellipsis), torch.dtype, torch.device}


def _known_by(func: Any, args: Any, kwargs: Any) -> tuple[Any, tuple[Any, ...] | None]:
    """The batch that the arguments are of, None if of several, and what the next batch knows the operation by, if at all."""
    found: list[Batch | None] = []
    try:
        parts, named = [_part(value, found) for value in args], _part(kwargs, found)
        key = func, tuple(parts), named, torch.is_grad_enabled(), _dtypes()
    except _Passing:
        key, found = None, []
        mapped((args, kwargs), SealedTensor, lambda t: found.append(t._batch))
        mapped((args, kwargs), Count, lambda n: found.append(n.batch))
    batch = found[0] if found else None
    for other in found:
        if other is not batch:
            return None, None
    return batch, key if batch is not None else None


def _part(value: Any, found: list[Batch | None]) -> Any:
    kind = type(value)
    if kind is SealedTensor:
        made = value._made
        if not made.lasting or value._change != value._changes[0]:
            raise _Passing
        found.append(value._batch)
        # what the memory keeps holds on to these objects, so that nothing else gets their ids
        return id(made), value._index
    if kind is Parameter or isinstance(value, Tensor):
        if value.requires_grad and value.is_leaf:
            return id(value), value.shape, value.dtype
        raise _Passing
    if kind in _PLAIN:
        return kind, value
    if kind is Count:
        found.append(value.batch)
        return kind, value.factor
    if kind is tuple or kind is list or kind is torch.Size:
        return (kind, *[_part(v, found) for v in value])
    if kind is float:
        return kind, repr(value)
    if kind is dict:
        return tuple([(k, _part(v, found)) for k, v in value.items()]) if value else ()
    if kind is slice:
        return kind, _part((value.start, value.stop, value.step), found)
    raise _Passing


def _dtypes() -> Any:
    """What decides on the dtype of a result besides its arguments."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    return torch.get_default_dtype(), autocast


def _again(done: _Done, args: Any, batch: Batch | None) -> Any:
    """What an operation gives on these arguments: it is the same whatever their made-up values."""
    made, out, changes = done.made, done.out, None
    if done.viewed:
        mapped(args, SealedTensor, _mark)
        changes = next((t._changes for t in args if isinstance(t, SealedTensor)), None)
    if done.in_place:
        it = args[0]
        it._made, it._index, it._batch = made, None, batch
        it._change = it._changes[0] = it._change + 1
        return it
    if isinstance(out, Tensor):
        return SealedTensor.wrap(out, made, batch, None, changes)
    if isinstance(out, tuple | list) and any(isinstance(t, Tensor) for t in out):
        wrapped = [
            SealedTensor.wrap(t, made, batch, i, changes) if isinstance(t, Tensor) else t
            for i, t in enumerate(out)
        ]
        # LSTM states come as a tuple within a list of outputs; x.max(1) has names for its two
        return type(out)(wrapped) if isinstance(out, tuple) else wrapped
    return mapped(out, Count, lambda n: Count(n.factor, batch))


def _mark(it: SealedTensor) -> SealedTensor:
    it._viewed = True
    return it


def _plain(it: SealedTensor) -> Tensor:
    return _AS_SUBCLASS(it, Tensor)


def _use(it: SealedTensor) -> Use:
    with torch._C.DisableTorchFunctionSubclass():
        return Use(it._made, it._index, it.shape)


def _shares(out: Any, argument: Any) -> bool:
    """Whether an operation gave a part of its argument, or the argument in another shape."""
    if isinstance(out, tuple | list):
        return any(_shares(t, argument) for t in out)
    both = isinstance(out, Tensor) and isinstance(argument, Tensor)
    return both and out.untyped_storage()._cdata == argument.untyped_storage()._cdata


_IN_PLACE = {"__setitem__"} | {
    f"__i{name}__"
    for name in (
        *("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"),
        *("lshift", "rshift"),
    )
}


def _in_place(name: str) -> bool:
    named = name.endswith("_") and not name.endswith("__")
    return named or name in _IN_PLACE


def _refuse_parts(it: SealedTensor, name: str) -> None:
    """Raise ProgramError for an operation in place on a part of another sealed tensor, or on one with such parts."""
    of = it._made.function
    part = of is not None and name_of(of) in ("__getitem__", "select")
    if part or it._viewed:
        which = "a part of another sealed tensor" if part else "a sealed tensor of which there is a view"
        raise ProgramError(
            f"{name} changes {which} in place.", "Programs only make new tensors.",
            f"Use {name.strip('_')} without an underscore or inplace=True; model = rapha.fix(model) does that for its layers.",
            line=tracing.cell_line(),
        )  # fmt: skip


def _refuse_writing(func: Any, name: str, args: Any, kwargs: Any, in_place: bool) -> None:
    """Raise for what would write elsewhere than into a sealed tensor, or is made of one that changed behind its back."""
    set_by = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__set__" else ""
    if kwargs.get("out") is not None or set_by not in ("", "requires_grad", "grad"):
        raise ProgramError(
            f"{set_by or name} writes into a tensor that is there.", "Programs only make new tensors.",
            "Leave out= out, and go on with the new tensor.", line=tracing.cell_line(),
        )  # fmt: skip
    if in_place and not isinstance(args[0], SealedTensor):
        raise SealedError(
            f"{name.strip('_')} would write what is computed of patients into a tensor of the cell.",
            "No value of theirs is here, so that it would hold made-up ones from then on.",
            "Make a new tensor of this batch, as by torch.stack, or keep running figures of the parameters alone.",
            line=tracing.cell_line(),
        )  # fmt: skip
    if name not in _ABOUT:
        mapped((args, kwargs), SealedTensor, _refuse_changed)


_ABOUT = {"shape", "size", "dim", "ndim", "dtype", "device", "numel", "nelement"}


def _refuse_changed(it: SealedTensor) -> None:
    if it._change != it._changes[0]:
        raise ProgramError(
            "A tensor is used of which a part, or another view, was changed in place.",
            "Programs only make new tensors, so that this one would not have changed.",
            "Change nothing in place there: use functions without an underscore, h = h + 1 and no inplace=True, "
            "which model = rapha.fix(model) takes out of its layers.",
            line=tracing.cell_line(),
        )  # fmt: skip


def _by_patient(name: str, args: Any) -> bool:
    """Whether an index, or going through, takes patients apart."""
    it = args[0]
    if not isinstance(it, SealedTensor):
        return False
    theirs = _theirs(it)
    if name != "__getitem__":
        return 0 in theirs
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    given = sum(i is not None and i is not Ellipsis for i in index)
    d = 0
    for i in index:
        if i is Ellipsis:
            d = _plain(it).dim() - given + d
            continue
        if i is None:
            continue
        whole = isinstance(i, slice) and i == slice(None)
        if not whole and d in theirs:
            return True
        d += 1
    return False


def _theirs(it: SealedTensor) -> list[int]:
    """The dimensions that grow with the number of patients.

    Where others are a multiple of the made-up number too, as are 26 columns, they are told apart with another number.
    """
    shape = _plain(it).shape
    found = [d for d, n in enumerate(shape) if n and n % PATIENTS == 0]
    if len(found) < 2:
        return found
    tape = Tape(_use(it))
    tape.filled = {id(t) for t in tape.constants if filled(t)}
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        fewer = tape.replay(FEWER, [made.values[:FEWER] for made in tape.leaves], {}, random=False)
    return [d for d in found if fewer.shape[d] != shape[d]]


def _counted(out: Any, it: SealedTensor, dim: int | None = None) -> Any:
    """Sizes of a sealed tensor with the number of patients as a `Count`."""
    shape, theirs = _plain(it).shape, _theirs(it)
    counts = tuple(Count(n // PATIENTS) if d in theirs else n for d, n in enumerate(shape))
    if isinstance(out, tuple):
        return counts
    return counts[dim] if dim is not None else Count(out // PATIENTS) if theirs else out


def _refuse(name: str) -> NoReturn:
    _refuse_torch()
    what, why, instead = REFUSALS[name]
    raise SealedError(what.format(name=name.strip("_")), why, instead, line=tracing.cell_line())


def _refuse_torch() -> None:
    """Raise SealedError in words of its own for what torch's code, called by the cell, looks at values for."""
    frame = inspect.currentframe()
    while frame is not None:
        for file, words in OF_TORCH.items():
            if file in frame.f_code.co_filename:
                raise SealedError(*words, line=tracing.cell_line())
        frame = frame.f_back


def _refuse_norms(name: str, kwargs: dict[str, Any]) -> None:
    """Raise ProgramError for a normalisation that would take statistics over patients."""
    mixes = kwargs.get("training") if name == "batch_norm" else kwargs.get("use_input_stats")
    if name not in ("batch_norm", "instance_norm") or not mixes:
        return
    if name == "batch_norm" or kwargs.get("running_mean") is not None:
        raise ProgramError(
            f"{name} mixes patients.", "It keeps statistics over the patients of a batch.",
            "Write model = rapha.fix(model) where the model is made (import rapha_lab as rapha), which puts nn.GroupNorm in for "
            "BatchNorm; or use nn.LayerNorm, or model.eval().",
            line=tracing.cell_line(),
        )  # fmt: skip


def _refuse_loss(name: str, args: Any) -> None:
    """Raise ProgramError for a loss of torch on a target that it is not made for."""
    if len(args) > 1 and all(isinstance(t, SealedTensor) for t in args[:2]):
        prediction, target = args[:2]
        losses.refuse_shapes(name, tuple(prediction.shape), tuple(target.shape), target.is_floating_point())
        if target._made.column is not None:
            losses.refuse_column(name, target._made.column)


def _refuse_order(name: str, args: Any) -> None:
    """Raise ProgramError for what puts the patients of a batch in an order."""
    if name in ("sort", "argsort", "logcumsumexp") and args[0].dim() == 1 and _by_patient(name, args):
        _refuse_torch()
        raise ProgramError(
            f"{name} goes by the order of patients.", "What is one patient's would depend on the others.",
            tracing.INTERVALS, line=tracing.cell_line(),
        )  # fmt: skip


@dataclass(repr=False)
class Batch:
    """One batch of patients: `batch[columns]` is a sealed tensor.

    Args:
        example: gives made-up values of columns, `(PATIENTS, *shape)`.
        gradients: asks the curator for a private gradient.
        expected: how many patients a batch holds in expectation, a public number.
        noise: the standard deviation of the noise in each number of a mean's gradient, which is public too.
        number: the column that is meant where it is one scaled number, else None.
        memory: what the batches of a loop have in common.
    """

    example: Callable[[Columns], Tensor]
    gradients: Gradients
    expected: float
    noise: float = 0.0
    number: Callable[[Columns], Column | None] = lambda columns: None
    memory: Memory = field(default_factory=Memory)
    _seen: dict[Any, SealedTensor] = field(default_factory=dict)

    def next(self) -> Batch:
        """Another one of the same loop."""
        return Batch(self.example, self.gradients, self.expected, self.noise, self.number, self.memory)

    def __getitem__(self, columns: Columns | Sequence[str]) -> SealedTensor:
        """The columns of this batch's patients."""
        key = columns if isinstance(columns, str) else tuple(columns)
        if key not in self._seen:
            made = self.memory.leaves.get(key)
            if made is None:
                columns = key if isinstance(key, str) else list(key)
                made = Made(
                    columns=columns, values=self.example(columns), column=self.number(columns), lasting=True
                )
                self.memory.leaves[key] = made
            self._seen[key] = SealedTensor.wrap(made.values, made, self)
        return self._seen[key]

    def about(self, columns: Columns) -> str:
        """What -1 and 1 are in a column, or that they are public bounds in several."""
        column = self.number(columns)
        if column is not None:
            return f"; {columns}: {scaled.words(column)}"
        return "" if isinstance(columns, str) else "; numbers scaled, -1 and 1 are their public bounds"

    def __repr__(self) -> str:
        return f"<batch of about {self.expected:g} patients: sealed; batch[columns] is a tensor of them>"

    def __len__(self) -> NoReturn:
        _refuse("__len__")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise SealedError(
            f"A batch has no {name}.", "It gives columns by their names, as tensors of the processor.",
            'Write x, y = batch[FEATURES], batch["death"].', line=tracing.cell_line(),
        )  # fmt: skip

    def __iter__(self) -> NoReturn:
        raise SealedError(
            "A batch was taken apart.", "It gives columns by their names.",
            'Write x, y = batch[FEATURES], batch["death"].', line=tracing.cell_line(),
        )  # fmt: skip
