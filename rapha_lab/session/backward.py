"""`backward()` of a loss on sealed tensors: its one-patient program, sent once, and a private gradient from the curator."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rapha_lab.protocol.errors import ProgramError
from rapha_lab.session import mixing, scaled, tracing
from rapha_lab.session.settled import name_of
from rapha_lab.session.tape import FEWER, PATIENTS, Columns, Made, Tape, Use, filled, parts
from rapha_lab.session.tracing import Traced

__all__ = ["backward"]


@dataclass(frozen=True)
class _Known:
    """The one-patient program of a loss, its reduction over patients, and which of the tape's parameters it reaches."""

    traced: Traced
    reduction: str
    reached: list[int]


class _Loss(NamedTuple):
    """A loss with its program, the parameters that it was computed from and its columns by input."""

    known: _Known
    parameters: list[Tensor]
    columns: dict[str, Columns]


ALONE = (
    "Compute every patient alone: LayerNorm or GroupNorm for BatchNorm, no statistics over the batch, no softmax or "
    "distances across it, and divide a weighted sum by batch.expected. Penalties on weights go with a mean, or into "
    f"weight_decay. {tracing.INTERVALS}"
)

_programs: dict[tuple[Any, ...], _Known] = {}
_KEPT = 64
_ENGINE: Any = torch.autograd.Variable._execution_engine


def backward(
    loss: Any,
    gradient: Any = None,
    retain_graph: Any = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Private gradients of a loss, added to the `.grad` of the parameters it was computed from."""
    loss = loss if gradient is None else loss * gradient
    made = loss._made
    found = made.known
    if found is None or loss._index is not None or not all(p.requires_grad for p in found.parameters):
        found = _loss(loss)
        made.known = found if made.lasting and loss._index is None else None
    _check_backward(loss, found.parameters, create_graph)
    known = found.known
    now = {f"p{k}": p for k, p in enumerate(found.parameters)}
    traced = Traced(known.traced.program, {n: now.get(n, t) for n, t in known.traced.tensors.items()})
    assert loss._batch is not None
    given = loss._batch.gradients(traced, found.columns, known.reduction)
    reached = [found.parameters[k] for k in known.reached]
    grads = [given[f"p{k}"] for k in known.reached]
    grads = [g if g.dtype == p.dtype else g.to(p.dtype) for g, p in zip(grads, reached, strict=True)]
    # autograd takes them further: through hooks, and to what a parameter was itself computed from
    if inputs is not None:
        return torch.autograd.backward(reached, grads, retain_graph, inputs=inputs)
    # at once: the checks that come before it, of what is right here, take as long as the engine itself
    kept = bool(retain_graph)
    _ENGINE.run_backward(
        tuple(reached), tuple(grads), kept, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _loss(loss: Any) -> _Loss:
    """The program of a loss, made if it is a new one."""
    tape = Tape(Use(loss._made, loss._index))
    _check_backward(loss, tape.parameters)
    key = tape.signature()
    if key not in _programs:
        while len(_programs) >= _KEPT:
            del _programs[next(iter(_programs))]
        _programs[key] = _program(tape)
    columns = {f"x{k}": made.columns for k, made in enumerate(tape.leaves) if made.columns is not None}
    return _Loss(_programs[key], tape.parameters, columns)


def _check_backward(loss: Any, parameters: list[Tensor], create_graph: bool = False) -> None:
    """Raise ProgramError for a loss that has no private gradient."""
    wrong = None
    if not parameters or not loss._made.grad:
        wrong = (
            "backward() found no parameter.", "The loss was computed from none that requires a gradient.",
            "Compute it with a model whose parameters require gradients, outside of torch.no_grad().",
        )  # fmt: skip
    elif loss._batch is None:
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


def _program(tape: Tape) -> _Known:
    tape.filled = {id(t) for t in tape.constants if filled(t)}
    _refuse_drawn(tape)
    _refuse_unscaled(tape)
    made_up = [made.values for made in tape.leaves]
    reduction = _reduction(tape, made_up)
    _warn_of_none(tape, made_up)
    reached = _reached(tape, made_up)

    def function(parameters: Any, constants: Any, inputs: Any) -> Tensor:
        return tape.replay(1, list(inputs.values()), tape.outside({**parameters, **constants}))

    parameters = {f"p{k}": tape.parameters[k] for k in reached}
    constants = {f"p{k}": t for k, t in enumerate(tape.parameters) if k not in reached}
    constants |= {f"c{k}": t for k, t in enumerate(tape.constants)}
    inputs = {f"x{k}": t[0] for k, t in enumerate(made_up)}
    return _Known(tracing.trace(function, parameters, constants, inputs), reduction, reached)


def _warn_of_none(tape: Tape, made_up: list[Tensor]) -> None:
    """Warn where the loss of a patient without rows in a table is no number, as by a softmax of which all is masked."""
    tables = [_of_table(made) for made in tape.leaves]
    if not any(tables):
        return
    one = [torch.zeros_like(t[:1]) if table else t[:1] for t, table in zip(made_up, tables, strict=True)]
    loss = torch.zeros(())
    with torch.no_grad(), torch.random.fork_rng(devices=[]), tracing._quiet(), suppress(Exception):
        loss = tape.replay(1, one, {}, random=False)  # one that fails on zeros alone is traced all the same
    tracing.warn_of_none(loss)


def _of_table(made: Made) -> bool:
    """Whether a leaf's columns are a table's, which have a dimension of rows."""
    names = [made.columns] if isinstance(made.columns, str) else list(made.columns or [])
    return bool(names) and "." in names[0] and made.values.dim() == 2 + isinstance(made.columns, list)


def _refuse_drawn(tape: Tape) -> None:
    """Raise ProgramError for a tensor with other numbers for each patient that no patient's values went into."""
    for made in tape.order:
        both = list(parts((made.args, made.kwargs)))
        shapes = [t.shape for t in both if isinstance(t, Use) and len(t.shape) > 1]
        own = [t for t in both if isinstance(t, Tensor) and not t.requires_grad]
        if any(t.shape in shapes and t.shape[0] == PATIENTS and id(t) not in tape.filled for t in own):
            raise ProgramError(
                "A tensor was made with numbers of its own for each patient.",
                "How many patients a batch holds is made up here, and none of them is anybody at the site.",
                tracing.DRAWN, line=made.line,
            )  # fmt: skip


def _refuse_unscaled(tape: Tape) -> None:
    """Raise ProgramError for a column compared with a number in its own unit."""
    for made in tape.order:
        of = made.args[0].made if made.args and isinstance(made.args[0], Use) else made
        if len(made.args) == 2 and (column := of.column) is not None:
            written = f'batch["{of.columns}"]'
            scaled.refuse_unscaled(column, written, name_of(made.function), made.args[1], made.line)


def _reached(tape: Tape, made_up: list[Tensor]) -> list[int]:
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


def _of_made_up_number(error: Exception, at: Made | None) -> ProgramError:
    """What to tell of a loss that can be computed for as many patients as a sealed tensor pretends to have, and for no others."""
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return ProgramError(
        f"{name_of(at.function) if at else 'The loss'} works for no other number of patients: {text}.",
        "How many patients a batch holds is made up here, and a tensor or a size of that number is part of the loss.",
        "Take it from a tensor of the batch where it is used: torch.zeros(x.shape[0], 8), p.expand(x.shape[0], -1) or "
        "torch.randn_like(x).", field="model", line=(at and at.line) or tracing.cell_line(),
    )  # fmt: skip


def _reduction(tape: Tape, made_up: list[Tensor]) -> str:
    """ "mean" or "sum", by comparing made-up patients together with each alone."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), tracing._quiet():
        together, again = (tape.replay(PATIENTS, made_up, {}, random=False) for _ in range(2))
        if together.numel() != 1:
            raise ProgramError(
                "backward() was called on a value for each patient.", "A loss is one number.",
                "Reduce it with .mean() first.", line=tracing.cell_line(),
            )  # fmt: skip
        try:
            alone = [
                tape.replay(1, [t[i : i + 1] for t in made_up], {}, random=False) for i in range(PATIENTS)
            ]
            tape.replay(FEWER, [t[:FEWER] for t in made_up], {}, random=False)
        except ProgramError:
            raise
        except Exception as error:
            raise _of_made_up_number(error, tape.at) from None
    tracing.refuse_random(together, again, tracing.cell_line())
    rows = torch.stack([t.double().reshape(()) for t in alone])
    if (
        not together.isfinite()
    ):  # else it is by being alone that a patient has none, as of a standard deviation
        tracing.refuse_nan(rows, tracing.cell_line())
    named = [{f"x{k}": t[part] for k, t in enumerate(made_up)} for part in (slice(5), slice(5, None))]

    def compute(state: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        some = list(batch.values())
        return tape.replay(len(some[0]), some, tape.outside(state), random=False)

    def line() -> int | None:
        return tape.at.line if tape.at else None

    trained = {name for name in tape.named if name.startswith("p")}
    return mixing.reduction(compute, tape.named, trained, named, ALONE, line)
