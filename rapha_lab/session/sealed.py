"""Sealed tensors: patients' columns as an ordinary training loop sees them, without a value of any patient.

A sealed tensor has a shape, a dtype, arithmetic and autograd; its first dimension counts patients and has no
number. Underneath it holds a few made-up patients drawn from the public schema, so that shapes and dtypes are
real, and remembers the operations that made it. `backward()` replays those on one patient, which gives a
program; the curator answers with a private gradient. No record is in this process: what is refused here is
refused because a made-up value would mislead, not because a real one could get out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from rapha_lab.protocol.columns import Column
from rapha_lab.protocol.errors import ProgramError, SealedError
from rapha_lab.session import scaled, tracing
from rapha_lab.session.refusals import OF_TORCH, REFUSALS
from rapha_lab.session.tracing import Traced

__all__ = ["PATIENTS", "Batch", "Gradients", "SealedTensor"]

PATIENTS = 13
"""Made-up patients in a sealed tensor: a number that layers rarely have as one of their sizes."""

Columns = str | list[str]
Gradients = Callable[[Traced, dict[str, Columns], str], dict[str, Tensor]]
"""`(traced, columns by input, "mean" or "sum")` → a private gradient by parameter of the program."""


class Count(int):
    """The number of patients, or `factor` times it: a made-up number that replays know how to replace."""

    factor: int

    def __new__(cls, factor: int = 1) -> Count:
        """`factor` times the number of made-up patients."""
        made = super().__new__(cls, PATIENTS * factor)
        made.factor = factor
        return made

    def __mul__(self, other: Any) -> Any:
        return Count(self.factor * other) if type(other) is int else int(self) * other

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return (
            Count(self.factor // other)
            if type(other) is int and self.factor % other == 0
            else int(self) // other
        )

    def __repr__(self) -> str:
        return "patients" if self.factor == 1 else f"{self.factor} * patients"


@dataclass(eq=False)
class Made:
    """How a sealed tensor was made: a column, or an item of `function(*args, **kwargs)`.

    `grad` is False for what was made under `torch.no_grad()`, through which no gradient passes.
    """

    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    columns: Columns | None = None
    batch: Any = None
    line: int | None = None
    grad: bool = True


class SealedTensor(Tensor):
    """A tensor of patients: `(patients, ...)`; see the module's docstring."""

    _made: Made
    _index: int | None

    @staticmethod
    def wrap(values: Tensor, made: Made, index: int | None = None) -> SealedTensor:
        """Made-up values with how they were made."""
        it = torch.Tensor._make_subclass(SealedTensor, values.detach())
        it._made, it._index = made, index
        return it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` on the made-up values and remember it, or refuse it."""
        name, kwargs = _name(func), kwargs or {}
        if name in REFUSALS and not (
            name in ("__getitem__", "__iter__", "__len__") and not _by_patient(name, args)
        ):
            _refuse(name)
        if name == "backward":
            return _backward(*args, **kwargs)
        if name == "requires_grad":
            return args[0]._made.grad and bool(_Tape(args[0]).parameters)
        _refuse_norms(name, kwargs)
        _refuse_order(name, args)
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            before = _mapped(args, lambda t: t.as_subclass(Tensor))
            out = func(*before, **_mapped(kwargs, lambda t: t.as_subclass(Tensor)))
        if name in ("size", "shape", "numel", "nelement"):
            return _counted(out)
        return _remembered(func, name, args, kwargs, out)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = ", ".join(repr(n) for n in self.shape)
        about = self._made.batch.about(self._made.columns) if self._made.columns is not None else ""
        return f"<sealed tensor: ({shape}{',' if self.dim() == 1 else ''}), {str(self.dtype)[6:]}{about}>"

    def __format__(self, spec: str) -> str:
        return _refuse("__format__") if spec else repr(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("__reduce_ex__")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0)) if not _by_patient("__iter__", (self,)) else _refuse("__iter__")


@lru_cache(4096)
def _name(func: Any) -> str:
    name = getattr(func, "__name__", None) or str(func)
    # properties arrive as the __get__ of their descriptor
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def _remembered(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Any:
    made = Made(func, args, kwargs, line=tracing.cell_line(), grad=torch.is_grad_enabled())
    inplace = (name.endswith("_") and not name.endswith("__")) or name in (
        "__setitem__",
        "__iadd__",
        "__imul__",
        "__isub__",
    )
    if inplace and isinstance(args[0], SealedTensor):
        return _rebound(args[0], made, name)
    if isinstance(out, Tensor):
        return SealedTensor.wrap(out, made)
    if isinstance(out, tuple | list) and any(isinstance(t, Tensor) for t in out):
        wrapped = [SealedTensor.wrap(t, made, i) if isinstance(t, Tensor) else t for i, t in enumerate(out)]
        # LSTM states come as a tuple within a list of outputs; x.max(1) has names for its two
        return type(out)(wrapped) if isinstance(out, tuple) else wrapped
    return out


def _rebound(it: SealedTensor, made: Made, name: str) -> SealedTensor:
    """An operation in place, as one that gives the tensor new contents."""
    if it._made.function is not None and _name(it._made.function) in (
        "__getitem__",
        "select",
        "view",
        "transpose",
        "T",
    ):
        raise ProgramError(
            f"{name} changes a part of another sealed tensor in place.", "Programs only make new tensors.",
            f"Use the function without the underscore: {name.strip('_')}.", line=tracing.cell_line(),
        )  # fmt: skip
    old = SealedTensor.wrap(it.as_subclass(Tensor), it._made, it._index)
    made.args = (old, *made.args[1:])
    made.kwargs = {**made.kwargs, "_in_place": True}
    it._made, it._index = made, None
    return it


def _by_patient(name: str, args: Any) -> bool:
    """Whether an index, or going through, takes patients apart."""
    it = args[0]
    with torch._C.DisableTorchFunctionSubclass():
        shape = list(it.shape) if isinstance(it, SealedTensor) else []
    if name != "__getitem__":
        return bool(shape) and shape[0] % PATIENTS == 0
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    given = sum(i is not None and i is not Ellipsis for i in index)
    d = 0
    for i in index:
        if i is Ellipsis:
            d = len(shape) - given + d
            continue
        if i is None:
            continue
        whole = isinstance(i, slice) and i == slice(None)
        if not whole and d < len(shape) and shape[d] % PATIENTS == 0:
            return True
        d += 1
    return False


def _counted(out: Any) -> Any:
    """Sizes with the number of patients as a `Count`."""
    if isinstance(out, int):
        return Count(out // PATIENTS) if out and out % PATIENTS == 0 else out
    return tuple(_counted(n) for n in out)


def _mapped(value: Any, change: Callable[[SealedTensor], Any]) -> Any:
    if isinstance(value, SealedTensor):
        return change(value)
    if isinstance(value, tuple | list):
        return (
            type(value)(_mapped(v, change) for v in value)
            if type(value) in (tuple, list)
            else tuple(_mapped(v, change) for v in value)
        )
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    return value


def _refuse(name: str) -> NoReturn:
    _refuse_torch()
    what, why, instead = REFUSALS[name]
    raise SealedError(what.format(name=name.strip("_")), why, instead, line=tracing.cell_line())


def _refuse_torch() -> None:
    """Raise SealedError in words of its own for what torch's code, called by the cell, looks at values for."""
    frame = inspect.currentframe()
    while frame is not None:
        for file, words in OF_TORCH.items():
            if frame.f_code.co_filename.endswith(file):
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
            "Use nn.GroupNorm or nn.LayerNorm, which rapha.fix(model) puts in for BatchNorm, or model.eval().",
            line=tracing.cell_line(),
        )  # fmt: skip


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
    """

    example: Callable[[Columns], Tensor]
    gradients: Gradients
    expected: float
    noise: float = 0.0
    number: Callable[[Columns], Column | None] = lambda columns: None
    _seen: dict[str, SealedTensor] = field(default_factory=dict)

    def __getitem__(self, columns: Columns | Sequence[str]) -> SealedTensor:
        """The columns of this batch's patients."""
        columns = columns if isinstance(columns, str) else list(columns)
        key = repr(columns)
        if key not in self._seen:
            made = Made(columns=columns, batch=self)
            self._seen[key] = SealedTensor.wrap(self.example(columns), made)
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


class _Tape:
    """Everything that made a sealed tensor, in an order in which it can be replayed."""

    def __init__(self, of: SealedTensor) -> None:
        self.of = of
        self.order: list[Made] = []
        self.leaves: list[Made] = []
        self.values: dict[int, Tensor] = {}
        self.parameters: list[Tensor] = []
        self.constants: list[Tensor] = []
        self.filled: set[int] = set()
        seen: set[int] = set()
        stack: list[tuple[Made, bool]] = [(of._made, False)]
        while stack:
            made, done = stack.pop()
            if done:
                (self.leaves if made.columns is not None else self.order).append(made)
                continue
            if id(made) in seen:
                continue
            seen.add(id(made))
            stack.append((made, True))
            for t in _tensors((made.args, made.kwargs)):
                if isinstance(t, SealedTensor):
                    stack.append((t._made, False))
                    if t._made.columns is not None:
                        self.values[id(t._made)] = t
                else:
                    self._outside(t, made.line)
        if of._made.columns is not None:
            self.values[id(of._made)] = of

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

    def signature(self) -> tuple[Any, ...]:
        """Equal for tapes that make the same program."""
        place = {id(m): k for k, m in enumerate([*self.leaves, *self.order])}
        outside: dict[int, Any] = {id(t): ("p", k, t.shape) for k, t in enumerate(self.parameters)}
        outside |= {id(t): ("c", k, id(t), t._version) for k, t in enumerate(self.constants)}

        def seal(value: Any) -> Any:
            if isinstance(value, SealedTensor):
                return ("s", place[id(value._made)], value._index)
            if isinstance(value, Tensor):
                return outside[id(value)]
            if isinstance(value, tuple | list):
                return (type(value).__name__, *map(seal, value))
            if isinstance(value, dict):
                return tuple((k, seal(v)) for k, v in sorted(value.items()))
            return (type(value).__name__, repr(value))

        steps = tuple((m.function, seal(m.args), seal(m.kwargs), m.grad) for m in self.order)
        return (tuple(repr(m.columns) for m in self.leaves), steps, self.of._index)

    def replay(
        self, patients: int, leaves: Sequence[Tensor], outside: dict[int, Tensor], *, random: bool = True
    ) -> Tensor:
        """The tensor computed anew for `patients` patients."""
        found: dict[int, Any] = {id(m): t for m, t in zip(self.leaves, leaves, strict=True)}

        def put(value: Any) -> Any:
            if isinstance(value, SealedTensor):
                out = found[id(value._made)]
                return out if value._index is None else out[value._index]
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
            args, kwargs = put(made.args), put(made.kwargs)
            if kwargs.pop("_in_place", False):
                args = (args[0].clone(), *args[1:])
                out = made.function(*args, **kwargs)
                found[id(made)] = args[0] if out is None else out
                continue
            if not random and "training" in kwargs:
                kwargs["training"] = False
            out = made.function(*args, **kwargs)
            found[id(made)] = out if made.grad else _detached(out)
        out = found[id(self.of._made)]
        return out if self.of._index is None else out[self.of._index]


def _detached(value: Any) -> Any:
    """Tensors through which no gradient passes."""
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(map(_detached, value)) if type(value) in (tuple, list) else value


def _filled(constant: Tensor) -> bool:
    """Whether it has the number of patients as a size and the same for each, such as a recurrent layer's zeros."""
    if PATIENTS not in constant.shape:
        return False
    d = list(constant.shape).index(PATIENTS)
    return torch.equal(constant.narrow(d, 0, 1).expand_as(constant), constant)


def _narrowed(constant: Tensor, patients: int) -> Tensor:
    """A constant that is filled, for another number of patients."""
    d = list(constant.shape).index(PATIENTS)
    return constant.narrow(d, 0, 1).expand([patients if k == d else n for k, n in enumerate(constant.shape)])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


@dataclass(frozen=True)
class _Known:
    """The one-patient program of a loss, its reduction over patients, and which of the tape's parameters it reaches."""

    traced: Traced
    reduction: str
    reached: list[int]


_programs: dict[tuple[Any, ...], _Known] = {}
_KEPT = 64


def _backward(
    loss: SealedTensor,
    gradient: Any = None,
    retain_graph: Any = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Private gradients of a loss, added to the `.grad` of the parameters it was computed from."""
    tape = _Tape(loss if gradient is None else loss * gradient)
    _check_backward(tape, create_graph)
    key = tape.signature()
    if key not in _programs:
        while len(_programs) >= _KEPT:
            del _programs[next(iter(_programs))]
        _programs[key] = _program(tape)
    known = _programs[key]
    now = {f"p{k}": p.detach() for k, p in enumerate(tape.parameters)}
    traced = Traced(known.traced.program, {n: now.get(n, t) for n, t in known.traced.tensors.items()})
    columns = {f"x{k}": made.columns for k, made in enumerate(tape.leaves)}
    found = tape.leaves[0].batch.gradients(traced, columns, known.reduction)
    # autograd takes them further: into .grad, through hooks, and to what a parameter was itself computed from
    reached = [tape.parameters[k] for k in known.reached]
    grads = [found[f"p{k}"].to(p.dtype) for k, p in zip(known.reached, reached, strict=True)]
    torch.autograd.backward(reached, grads, inputs=inputs)


def _check_backward(tape: _Tape, create_graph: bool) -> None:
    """Raise ProgramError for a loss that has no private gradient."""
    wrong = None
    if not tape.parameters or not tape.of._made.grad:
        wrong = (
            "backward() found no parameter.", "The loss was computed from none that requires a gradient.",
            "Compute it with a model whose parameters require gradients, outside of torch.no_grad().",
        )  # fmt: skip
    elif len({id(made.batch) for made in tape.leaves}) != 1:
        wrong = (
            "The loss was computed from several batches.", "Each batch is another random sample of patients.",
            "Compute a loss from one batch and call backward() for each.",
        )  # fmt: skip
    elif create_graph:
        wrong = (
            "backward(create_graph=True) was asked for.", "A private gradient is noise and sum, not a function.",
            "Call backward() alone.",
        )  # fmt: skip
    if wrong:
        raise ProgramError(*wrong, line=tracing.cell_line())


def _program(tape: _Tape) -> _Known:
    tape.filled = {id(t) for t in tape.constants if _filled(t)}
    _refuse_drawn(tape)
    _refuse_unscaled(tape)
    made_up = [tape.values[id(m)].as_subclass(Tensor) for m in tape.leaves]
    reduction = _reduction(tape, made_up)
    reached = _reached(tape, made_up)

    def function(parameters: Any, constants: Any, inputs: Any) -> Tensor:
        both = {**parameters, **constants}
        outside = {id(t): both[f"p{k}"] for k, t in enumerate(tape.parameters)}
        outside |= {id(t): both[f"c{k}"] for k, t in enumerate(tape.constants)}
        return tape.replay(1, list(inputs.values()), outside)

    parameters = {f"p{k}": tape.parameters[k] for k in reached}
    constants = {f"p{k}": t for k, t in enumerate(tape.parameters) if k not in reached}
    constants |= {f"c{k}": t for k, t in enumerate(tape.constants)}
    inputs = {f"x{k}": t[0] for k, t in enumerate(made_up)}
    return _Known(tracing.trace(function, parameters, constants, inputs), reduction, reached)


def _refuse_drawn(tape: _Tape) -> None:
    """Raise ProgramError for a tensor with other numbers for each patient that no patient's values went into."""
    for made in tape.order:
        both = list(_tensors((made.args, made.kwargs)))
        with torch._C.DisableTorchFunctionSubclass():
            shapes = [t.shape for t in both if isinstance(t, SealedTensor) and t.dim() > 1]
            own = [t for t in both if not isinstance(t, SealedTensor) and not t.requires_grad]
            drawn = any(
                t.shape in shapes and t.shape[0] == PATIENTS and id(t) not in tape.filled for t in own
            )
        if drawn:
            raise ProgramError(
                "A tensor was made with numbers of its own for each patient.",
                "How many patients a batch holds is made up here, and none of them is anybody at the site.",
                tracing.DROPOUT, line=made.line,
            )  # fmt: skip


def _refuse_unscaled(tape: _Tape) -> None:
    """Raise ProgramError for a column compared with a number in its own unit."""
    for made in tape.order:
        of = made.args[0]._made if made.args and isinstance(made.args[0], SealedTensor) else made
        if len(made.args) == 2 and isinstance(of.columns, str) and (column := of.batch.number(of.columns)):
            written = f'batch["{of.columns}"]'
            scaled.refuse_unscaled(column, written, _name(made.function), made.args[1], made.line)


def _reached(tape: _Tape, made_up: list[Tensor]) -> list[int]:
    """The parameters that the loss's gradient reaches: not those behind detach() or torch.no_grad()."""
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), tracing._quiet():
        stand_ins = [p.detach().requires_grad_() for p in tape.parameters]
        outside = {id(p): own for p, own in zip(tape.parameters, stand_ins, strict=True)}
        loss = tape.replay(PATIENTS, made_up, outside)
        grads = torch.autograd.grad(loss, stand_ins, allow_unused=True) if loss.requires_grad else ()
    reached = [k for k, grad in enumerate(grads) if grad is not None]
    if not reached:
        raise ProgramError(
            "backward() found no parameter.", "No gradient of the loss reaches one: detach() or no_grad() cuts it off.",
            "Leave them out where the model is to learn.", line=tracing.cell_line(),
        )  # fmt: skip
    return reached


def _reduction(tape: _Tape, made_up: list[Tensor]) -> str:
    """ "mean" or "sum", by comparing made-up patients together with each alone."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), tracing._quiet():
        together, again = (tape.replay(PATIENTS, made_up, {}, random=False) for _ in range(2))
        if together.numel() != 1:
            raise ProgramError(
                "backward() was called on a value for each patient.", "A loss is one number.",
                "Reduce it with .mean() first.", line=tracing.cell_line(),
            )  # fmt: skip
        alone = [tape.replay(1, [t[i : i + 1] for t in made_up], {}, random=False) for i in range(PATIENTS)]
    tracing.refuse_random(together, again, tracing.cell_line())
    rows = torch.stack([t.double().reshape(()) for t in alone])
    if (
        not together.isfinite()
    ):  # else it is by being alone that a patient has none, as of a standard deviation
        tracing.refuse_nan(rows, tracing.cell_line())
    if tracing._close(together, rows.mean()):
        return "mean"
    if tracing._close(together, rows.sum()):
        return "sum"
    raise ProgramError(
        "The model or loss mixes patients.",
        "On made-up patients its value is neither the mean nor the sum of what each gives alone.",
        "Compute every patient alone: LayerNorm or GroupNorm for BatchNorm, no statistics over the batch, and divide "
        f"a weighted sum by batch.expected. Penalties on weights go with a mean, or into weight_decay. {tracing.INTERVALS}",
        line=tracing.cell_line(),
    )
