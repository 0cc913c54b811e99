"""The table's rules for recurrent layers: PyTorch's equations, step by step.

With weights that all patients share, a GRU's or LSTM's layer is one operation (`fused`) with its own backward
pass, which gives the gradients by both affine maps at every step; otherwise autograd follows each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rapha_lab.curator.lift.fused import FUSED
from rapha_lab.curator.lift.layers import dropped, linear
from rapha_lab.curator.lift.table import batch_of, rule
from rapha_lab.curator.lift.taps import Product, Use, tap, watched

__all__: list[str] = []

MAX_STEPS = 4096
"""Steps times layers: each is a few operations of their own."""

Affine = Callable[[int, Tensor], Tensor]
"""`(which weight, x)` → x W^T + b; weights of a layer are 0 for its input and 1 for its state."""


def gru_cell(given: Tensor, recalled: Tensor, state: list[Tensor]) -> list[Tensor]:
    """torch.nn.GRU's update."""
    (h,) = state
    (r, z, n), (hr, hz, hn) = given.chunk(3, -1), recalled.chunk(3, -1)
    z = torch.sigmoid(z + hz)
    n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return [n + z * (h - n)]


def lstm_cell(given: Tensor, recalled: Tensor, state: list[Tensor]) -> list[Tensor]:
    """torch.nn.LSTM's update."""
    i, f, g, o = (given + recalled).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def tanh_cell(given: Tensor, recalled: Tensor, state: list[Tensor]) -> list[Tensor]:
    """torch.nn.RNN's update."""
    return [torch.tanh(given + recalled)]


def relu_cell(given: Tensor, recalled: Tensor, state: list[Tensor]) -> list[Tensor]:
    """torch.nn.RNN's update with nonlinearity="relu"."""
    return [torch.relu(given + recalled)]


GATES = {"gru": 3, "lstm": 4, "rnn_tanh": 1, "rnn_relu": 1}
CELLS = {"gru": gru_cell, "lstm": lstm_cell, "rnn_tanh": tanh_cell, "rnn_relu": relu_cell}


def unrolled(
    way: Any, affine: Callable[[int], Any], x: Tensor, state: Sequence[Tensor], *,
    layers: int, dropout: float, both_ways: bool, time_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The layer's outputs and last states.

    Args:
        way: computes one layer in one direction.
        affine: by layer and direction, its two affine maps.
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
            out, end = way(affine(k), x, [s[:, k] for s in state], back == 1)
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
    cell: Any, affine: Affine, x: Tensor, state: list[Tensor], back: bool
) -> tuple[Tensor, list[Tensor]]:
    given, outs = affine(0, x), []
    steps = range(x.shape[2])
    for t in reversed(steps) if back else steps:
        state = cell(given[:, :, t], affine(1, state[0]), state)
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
    for group in groups:
        _fit(group, GATES[name], states)
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


@dataclass
class Affines:
    """A layer's two maps with shared weights, remembering every use."""

    names: list[str | None]
    weights: list[Any]
    size: int
    seen: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    made: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))

    def __call__(self, which: int, x: Tensor) -> Tensor:
        """The map, its output watched."""
        y = watched(linear(x, self.weights[which], self.weights[2 + which]))
        self.seen[which].append(x.detach().reshape(self.size, -1, x.shape[-1]))
        self.made[which].append(y)
        return y

    def uses(self) -> list[Use]:
        """Of the weight and bias of the input, then of the state."""
        return [
            Product(str(self.names[i]), self.names[2 + i], torch.cat(self.seen[i], 1), self.made[i])
            for i in (0, 1)
        ]


def _enter(name: str, cell: Any) -> None:
    @rule(f"{name}.input")
    def apply(x: Tensor, *args: Any) -> Any:
        states, groups, settings = _arguments(name, x, args)
        size = batch_of(x, *states, *(w for group in groups for w in group if w is not None))
        states = [s.expand(size, *s.shape[1:]) for s in states]
        x = x.expand(size, *x.shape[1:])

        def affine(k: int) -> Affine:
            return lambda which, value: linear(value, groups[k][which], groups[k][2 + which])

        return unrolled(partial(_way, cell), affine, x, states, **settings)

    @tap(lambda args: args[2], f"{name}.input")
    def tapped(names: list[str | None], size: int, x: Tensor, *args: Any) -> Any:
        states, groups, settings = _arguments(name, x, args)
        x, states = x.expand(size, *x.shape[1:]), [s.expand(size, *s.shape[1:]) for s in states]
        per = len(names) // len(groups)
        named = [[*names[i : i + per], *[None] * (4 - per)] for i in range(0, len(names), per)]
        maps = [Affines(n, group, size) for n, group in zip(named, groups, strict=True)]
        way = partial(_fused_way, name) if name in FUSED else partial(_way, cell)
        out = unrolled(way, maps.__getitem__, x, states, **settings)
        return out, [use for each in maps for use in each.uses()]


def _fused_way(
    name: str, maps: Affines, x: Tensor, state: list[Tensor], back: bool
) -> tuple[Tensor, list[Tensor]]:
    """One layer in one direction by the fused operation; remembers its uses as if it had been step by step."""
    x = x.flip(2) if back else x
    given = maps(0, x)
    weight, bias = maps.weights[1][0], maps.weights[3]
    recalled = watched(torch.zeros_like(given, requires_grad=False))
    # time first, the program's own batch folded with the patients
    flat = [t.flatten(0, 1).transpose(0, 1) for t in (given, recalled)]
    start = [s.flatten(0, 1) for s in state]
    first = torch.stack(start)
    out, _ = FUSED[name](*flat, first, weight, None if bias is None else bias[0])
    ways = out.unflatten(2, x.shape[:2]).permute(0, 2, 3, 1, 4)  # (states, patients, batch, time, features)
    before = torch.cat([start[0].unflatten(0, x.shape[:2]).unsqueeze(2), ways[0, :, :, :-1]], 2)
    maps.seen[1].append(before.detach().reshape(maps.size, -1, weight.shape[1]))
    maps.made[1].append(recalled)
    y = ways[0].flip(2) if back else ways[0]
    return y, [s[:, :, -1] for s in ways]


for _name, _cell in CELLS.items():
    _enter(_name, _cell)
