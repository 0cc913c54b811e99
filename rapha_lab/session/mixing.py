"""Whether a loss or scores are computed of every patient alone, by comparing made-up ones together with each alone.

What is trained is one patient's program; a loss that mixes patients would train as something else than is written. So
its gradients are compared too, in double precision, where rounding hides next to nothing, and also at weights and
patients other than those at hand, since the program will be used at all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rapha_lab.protocol.errors import ProgramError
from rapha_lab.session import tracing
from rapha_lab.session.settled import name_of
from rapha_lab.session.tape import mapped

__all__ = ["Compute", "reduction", "refuse_mixed_rows"]

Tensors = Mapping[str, Tensor]
Compute = Callable[[Tensors, Tensors], Tensor]
"""Of parameters and constants, and of a batch, either by name."""

Line = Callable[[], int | None]
Batches = Sequence[Tensors]

DOUBLE, SINGLE = 1e-8, 1e-3
"""How far values may be apart, measured by the largest of them: what rounding does to sums, and far less than mixing."""


def reduction(
    compute: Compute,
    state: Tensors,
    trained: set[str],
    batches: Batches,
    instead: str,
    line: Line | None = None,
) -> str:
    """ "mean" or "sum": what a loss of patients together is of the losses of each.

    Args:
        compute: the loss, one number and the same each time.
        state: parameters and constants by name.
        trained: the names of those whose gradients count.
        batches: two of made-up patients, of different sizes.
        instead: what to write where patients are mixed.
        line: gives the line of the operation that runs; else it is that of the author's frame.

    Raises:
        ProgramError: it is neither.
    """
    left = ["mean", "sum"]
    for draw, batch in enumerate(batches):
        near = _near(state, trained, draw) if draw else state
        left = [way for way in left if way in _holding(compute, near, trained, batch)]
        if not left:
            _refuse(compute, near, batch, instead, line)
    return left[0]


def refuse_mixed_rows(compute: Compute, state: Tensors, batches: Batches, instead: str) -> None:
    """Raise ProgramError unless each patient's row of scores is the same together with others and alone."""
    for batch in batches:
        if "rows" not in _holding(compute, state, set(), batch):
            _refuse(compute, state, batch, instead, None)


def _near(state: Tensors, trained: set[str], seed: int) -> dict[str, Tensor]:
    """Other weights of about the same size."""
    generator = torch.Generator().manual_seed(seed)

    def moved(t: Tensor) -> Tensor:
        by = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        return t + (by * (t.double().square().mean().sqrt() / 2 + 0.01)).to(t.dtype)

    return {name: moved(t.detach()) if name in trained and t.numel() else t for name, t in state.items()}


def _holding(compute: Compute, state: Tensors, trained: set[str], batch: Tensors) -> set[str]:
    """What of mean, sum and rows patients together are of each alone; all of it if that can't be computed here."""
    for precise in (True, False):
        with (
            suppress(Exception),  # what cannot be computed in double precision often can in single
            tracing._quiet(),
            torch.random.fork_rng(devices=[]),
            _InDouble() if precise else nullcontext(),
        ):
            return _compared(compute, state, trained, batch, precise)
    return {"mean", "sum", "rows"}


def _compared(compute: Compute, state: Tensors, trained: set[str], batch: Tensors, precise: bool) -> set[str]:
    if precise:
        state, batch = ({k: _doubled(t) for k, t in part.items()} for part in (state, batch))
    state = {name: t.detach().requires_grad_(name in trained) for name, t in state.items()}
    n = _patients(batch)
    together = _values(compute, state, trained, batch)
    alone = (_values(compute, state, trained, one) for one in _each(batch))
    ways = {}
    if trained:
        scale, total = 0.0, torch.zeros_like(together)
        for values in alone:
            scale = max(scale, _largest(values))
            total += values
        if not total[0].isfinite() and not together[0].isfinite():
            return {"mean", "sum"}
        ways = {"mean": total / n, "sum": total}
    else:
        rows = torch.cat(list(alone))
        scale, ways["rows"] = _largest(rows), rows
    most = (DOUBLE if precise else SINGLE) * max(scale, 1e-30)
    return {
        way
        for way, values in ways.items()
        if values.shape == together.shape
        and torch.allclose(together, values, rtol=0, atol=most, equal_nan=True)
    }


def _values(compute: Compute, state: Tensors, trained: set[str], batch: Tensors) -> Tensor:
    """A loss and its gradients in one row of numbers, or scores if nothing is trained."""
    with torch.set_grad_enabled(bool(trained)):
        value = compute(state, batch)
        grads: Any = ()
        if value.requires_grad:
            wanted = [state[name] for name in sorted(trained)]
            try:
                grads = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
            except RuntimeError:  # an operation without a derivative, which the site's table will speak of
                grads = ()
    own = value.detach().reshape(1) if trained else value
    return torch.cat([own.flatten(), *[g.flatten() for g in grads]]).double()


def _largest(values: Tensor) -> float:
    known = values[values.isfinite()]
    return float(known.abs().max()) if known.numel() else 0.0


def _patients(batch: Tensors) -> int:
    return len(next(iter(batch.values())))


def _each(batch: Tensors) -> Iterator[dict[str, Tensor]]:
    for i in range(_patients(batch)):
        yield {name: t[i : i + 1] for name, t in batch.items()}


class _InDouble(TorchFunctionMode):
    """Computes in double precision, whatever precision is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args, kwargs = (
            mapped(mapped(part, Tensor, _doubled), torch.dtype, _wide) for part in (args, kwargs or {})
        )
        out = func(*args, **kwargs)
        return _doubled(out) if isinstance(out, Tensor) else out  # what was made of nothing is single


def _doubled(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() and t.dtype != torch.float64 else t


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


# -- which operation it is -----------------------------------------------------------------------------


class _Step(NamedTuple):
    """An operation that ran: what it was made of and gave, and the author's line."""

    name: str
    line: int | None
    given: list[Tensor]
    out: Tensor
    value: Tensor  # that of then, whatever is done in place later


class _Steps(TorchFunctionMode):
    """Takes down every operation that gives a tensor."""

    def __init__(self, line: Line | None) -> None:
        super().__init__()
        self.taken: list[_Step] = []
        self._line = line or partial(tracing.cell_line, _steps.__code__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        given: list[Tensor] = []
        mapped((args, kwargs), Tensor, given.append)
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self.taken.append(_Step(name_of(func).strip("_"), self._line(), given, t, t.double().clone()))
        return out


def _steps(compute: Compute, state: Tensors, batch: Tensors, line: Line | None) -> list[_Step]:
    state, batch = ({k: _doubled(t) for k, t in part.items()} for part in (state, batch))
    with (
        tracing._quiet(),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        _InDouble(),
        _Steps(line) as it,
    ):
        compute(state, batch)
    return it.taken


def _first_mixing(together: list[_Step], alone: list[list[_Step]]) -> _Step | None:
    """The first operation that gives a patient another value together, or what it took over all patients to do so."""
    of_all: dict[int, _Step] = {}  # values without a patient's dimension that differ, by what they began with
    odd = None
    for step, *ones in zip(together, *alone, strict=False):
        if any(one.name != step.name for one in ones):
            break
        begun = next((of_all[id(t)] for t in step.given if id(t) in of_all), step)
        # p.squeeze(-1) on one score each leaves nothing of one patient's dimension
        values = [
            v.unsqueeze(0) if v.dim() + 1 == step.value.dim() else v for v in (one.value for one in ones)
        ]
        if any(value.dim() != step.value.dim() for value in values):
            break
        shape = values[0].shape
        grown = [d for d, n in enumerate(step.value.shape) if n != shape[d]]
        if not grown:
            whole = torch.stack(values)
            if not all(_near_enough(step.value, value) for value in values):
                of_all[id(step.out)] = begun
                if not any(_near_enough(step.value, way) for way in (whole.mean(0), whole.sum(0))):
                    odd = odd or step
        elif len(grown) > 1 or not _near_enough(step.value, torch.cat(values, grown[0])):
            return begun
    return odd


def _near_enough(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-8 * (_largest(b) or 1), equal_nan=True)


def _refuse(compute: Compute, state: Tensors, batch: Tensors, instead: str, line: Line | None) -> NoReturn:
    """Raise ProgramError with the operation whose value for a patient depends on who else is there, where one is found."""
    found = None
    with suppress(Exception):
        alone = [_steps(compute, state, one, line) for one in _each(batch)]
        found = _first_mixing(_steps(compute, state, batch, line), alone)
    raise ProgramError(
        f"{found.name} mixes patients." if found else "The model or loss mixes patients.",
        "On made-up patients its value or gradient is neither the mean nor the sum of what each gives alone.",
        instead, field="model", line=(found and found.line) or (line and tracing.cell_line()),
    )  # fmt: skip
