"""The table's rules for recurrent layers: PyTorch's equations, step by step.

With weights that all patients share, a layer is one operation (`fused`) with its own backward pass, which gives the
gradients by both affine maps at every step; otherwise autograd follows each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rapha_lab.curator.lift.even import tracing
from rapha_lab.curator.lift.fused import CELLS, FUSED, Cell
from rapha_lab.curator.lift.layers import dropped, linear
from rapha_lab.curator.lift.table import batch_of, rule
from rapha_lab.curator.lift.taps import Product, Use, tap, watched

__all__: list[str] = []

MAX_STEPS = 4096
"""Steps times layers: each is a few operations of their own."""

Affine = Callable[[int, Tensor], Tensor]
"""`(which weight, x)` → x W^T + b; weights of a layer are 0 for its input and 1 for its state."""


def unrolled(
    way: Any, x: Tensor, state: Sequence[Tensor], *,
    layers: int, dropout: float, both_ways: bool, time_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The layer's outputs and last states.

    Args:
        way: `(k, x, states, backwards)` → outputs, last states: computes one layer in one direction, the k-th.
        x: `(patients, batch, time, features)`, time and batch swapped if `time_first`.
        state: each `(patients, layers * directions, batch, features)`.
    """
    ways = 2 if both_ways else 1
    alone = x.dim() == 3
    if alone:
        x, state = x.unsqueeze(2 if time_first else 1), [s.unsqueeze(2) for s in state]
    x = x.transpose(1, 2) if time_first else x
    if any(s.shape[1:3] != (layers * ways, x.shape[1]) for s in state):
        raise ValueError("a state for each layer, direction and sequence is expected")
    if x.shape[2] * layers * ways > MAX_STEPS:
        raise ValueError(f"more than {MAX_STEPS} steps")
    last: list[list[Tensor]] = []
    for layer in range(layers):
        outs = []
        for back in range(ways):
            k = layer * ways + back
            out, end = way(k, x, [s[:, k] for s in state], back == 1)
            outs.append(out)
            last.append(end)
        x = torch.cat(outs, -1) if both_ways else outs[0]
        x = dropped(x, dropout) if dropout and layer < layers - 1 else x
    x = x.transpose(1, 2) if time_first else x
    ends = [torch.stack(parts, 1) for parts in zip(*last, strict=True)]
    if alone:
        x, ends = x.squeeze(2 if time_first else 1), [e.squeeze(2) for e in ends]
    return (x, *ends)


def _way(
    cell: Cell, affine: Affine, x: Tensor, state: list[Tensor], back: bool
) -> tuple[Tensor, list[Tensor]]:
    given, outs = affine(0, x), []
    steps = range(x.shape[2])
    for t in reversed(steps) if back else steps:
        maps = (list(m.chunk(cell.gates, -1)) for m in (given[:, :, t], affine(1, state[0])))
        state, _ = cell.forward(next(maps), next(maps), state)
        outs.append(state[0])
    return torch.stack(outs[::-1] if back else outs, 2), state


def _arguments(name: str, x: Tensor, args: Sequence[Any]) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    """Initial states, weights in groups of (input, state, input's bias, state's bias), and settings."""
    states, weights, biased, layers, dropout, training, both_ways, batch_first = args
    states = list(states) if name == "lstm" else [states]
    if x.dim() not in (3, 4) or any(s.dim() != x.dim() for s in states):
        raise ValueError("an input and states of two or three dimensions are expected")
    per = 4 if biased else 2
    if len(weights) != per * layers * (2 if both_ways else 1) or len(states) != (2 if name == "lstm" else 1):
        raise ValueError("another number of weights than expected; proj_size is not computed here")
    groups = [[*weights[i : i + per], *[None] * (4 - per)] for i in range(0, len(weights), per)]
    # compiled, a number of one dtype would be read as two of another
    if len({t.dtype for t in (x, *states, *weights)}) > 1:
        raise ValueError("an input, states and weights of one dtype are expected")
    for group in groups:
        _fit(group, CELLS[name].gates, states)
    settings = {"layers": layers, "dropout": dropout if training else 0.0, "both_ways": both_ways}
    return states, groups, {**settings, "time_first": not batch_first}


def _fit(group: list[Any], gates: int, states: list[Tensor]) -> None:
    """Check a layer's sizes, which the fused operations trust: an output of another size would move other rows."""
    size = states[0].shape[-1]
    made, kept, *biases = group
    fits = made.dim() == 3 and made.shape[1] == gates * size and kept.shape[1:] == (gates * size, size)
    fits = fits and all(bias is None or bias.shape[1:] == (gates * size,) for bias in biases)
    if not fits or any(state.shape[1:] != states[0].shape[1:] for state in states):
        raise ValueError("weights, biases and states whose sizes do not go together")


def _enter(name: str, cell: Cell) -> None:
    @rule(f"{name}.input")
    def apply(x: Tensor, *args: Any) -> Any:
        states, groups, settings = _arguments(name, x, args)
        size = batch_of(x, *states, *(w for group in groups for w in group if w is not None))
        states = [s.expand(size, *s.shape[1:]) for s in states]
        x = x.expand(size, *x.shape[1:])

        def way(k: int, *given: Any) -> Any:
            return _way(cell, lambda which, x: linear(x, groups[k][which], groups[k][2 + which]), *given)

        return unrolled(way, x, states, **settings)

    @tap(lambda args, ranks: args[2], f"{name}.input")
    def tapped(names: list[str | None], size: int, x: Tensor, *args: Any) -> Any:
        states, groups, settings = _arguments(name, x, args)
        x, states = x.expand(size, *x.shape[1:]), [s.expand(size, *s.shape[1:]) for s in states]
        per = len(names) // len(groups)
        named = [[*names[i : i + per], *[None] * (4 - per)] for i in range(0, len(names), per)]
        uses: list[Use] = []

        def way(k: int, *given: Any) -> Any:
            out, end, own = _fused(name, named[k], groups[k], *given)
            uses.extend(own)
            return out, end

        return unrolled(way, x, states, **settings), uses


def _fused(
    name: str, names: list[Any], weights: list[Any], x: Tensor, state: list[Tensor], back: bool
) -> tuple[Tensor, list[Tensor], list[Use]]:
    """One layer in one direction, whose weights all patients share, and its uses: the input's map and the state's."""
    x = x.permute(2, 0, 1, 3)  # time first: each step's rows lie together
    x = x.flip(0) if back else x
    given = watched(_patients_first(linear(x, weights[0], weights[2])))
    recalled = None
    if CELLS[name].twice:
        recalled = watched(given.new_zeros((), requires_grad=False).expand(given.shape))
    # the program's own batch folds with the patients
    flat, added = (None if t is None else t.permute(2, 0, 1, 3).flatten(1, 2) for t in (given, recalled))
    first = torch.stack([s.flatten(0, 1) for s in state])
    bias = None if weights[3] is None else weights[3][0]
    out, _ = FUSED[name](flat, added, first, weights[1][0], bias, tracing())
    ways = out.unflatten(2, x.shape[1:3])  # (states, 1 + time, patients, batch, n)
    uses: list[Use] = [
        Product(names[which], names[2 + which], _patients_first(value).detach().flatten(1, 2), [made])
        for which, value, made in ((0, x, given), (1, ways[0, :-1], given if recalled is None else recalled))
    ]
    y = ways[0, 1:]
    return _patients_first(y.flip(0) if back else y), list(ways[:, -1]), uses


def _patients_first(x: Tensor) -> Tensor:
    """`(time, patients, batch, ...)` as `(patients, batch, time, ...)`."""
    return x.permute(1, 2, 0, 3)


for _name, _cell in CELLS.items():
    _enter(_name, _cell)
