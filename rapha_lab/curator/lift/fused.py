"""A recurrent layer in one direction as one operation, whose gradient by both affine maps comes for all steps at once.

Time comes first, `(time, rows, ...)`. `given` is the input's affine map, made before; `recalled` is zero and is
added to the state's affine map: its gradient is what the state's weights are differentiated by where that is not the
gradient by `given`. States come with the first before them, an LSTM's cells after its outputs. Between two products
a step is one function of rows, its cell, which a compiled step has in machine code. To the compiler a layer is a
single operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rapha_lab.curator.lift import even
from rapha_lab.curator.lift.cells import machine_code

__all__ = ["CELLS", "FUSED", "Cell", "Layer"]

Pieces = list[Tensor]
"""Each `(rows, n)`."""


class Cell(NamedTuple):
    """What one step computes of rows.

    Attributes:
        gates: pieces that an affine map has.
        kept: pieces that the gradient needs beside the states.
        states: an LSTM's are two.
        twice: whether the gradients by the two maps differ.
        forward: `(given, recalled, states)`, the maps' pieces → new states, kept.
        backward: `(gradients by the new states, kept, states, new states)` → gradients by `given`, by `recalled` where
            they differ, and by the states but for the affine map; None is zero.
    """

    gates: int
    kept: int
    states: int
    twice: bool
    forward: Callable[[Pieces, Pieces, Pieces], tuple[Pieces, Pieces]]
    backward: Callable[[Pieces, Pieces, Pieces, Pieces], tuple[Pieces, Pieces, list[Tensor | None]]]


def tanh(x: Tensor) -> Tensor:
    """To 1e-7, which is what the sums before it are exact to; machine code takes a third of the time for an exponential."""
    if x.requires_grad:  # no layer in one operation: differentiated step by step
        return torch.tanh(x)
    return 2 * torch.sigmoid(2 * x) - 1 if even.tracing() else even.tanh(x)


def gru(given: Pieces, recalled: Pieces, states: Pieces) -> tuple[Pieces, Pieces]:
    """torch.nn.GRU's update; what the state's map adds to the new value is kept too."""
    (h,), memory = states, recalled[2]
    r, z = (torch.sigmoid(a + b) for a, b in zip(given[:2], recalled, strict=False))
    new = tanh(given[2] + r * memory)
    return [new + z * (h - new)], [r, z, new, memory]


def gru_back(grads: Pieces, kept: Pieces, states: Pieces, ends: Pieces) -> Any:
    """Its gradient."""
    (dh,), (r, z, new, memory) = grads, kept
    d_new = dh * (1 - z) * (1 - new * new)
    both = [d_new * memory * r * (1 - r), dh * (states[0] - new) * z * (1 - z)]
    return [*both, d_new], [*both, d_new * r], [dh * z]


def lstm(given: Pieces, recalled: Pieces, states: Pieces) -> tuple[Pieces, Pieces]:
    """torch.nn.LSTM's update."""
    i, f, g, o = (a + b for a, b in zip(given, recalled, strict=True))
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), tanh(g), torch.sigmoid(o)
    c = f * states[1] + i * g
    return [o * tanh(c), c], [i, f, g, o]


def lstm_back(grads: Pieces, kept: Pieces, states: Pieces, ends: Pieces) -> Any:
    """Its gradient."""
    (dh, dc), (i, f, g, o), far = grads, kept, tanh(ends[1])
    dc = dc + dh * o * (1 - far * far)
    ways = [
        dc * g * i * (1 - i),
        dc * states[1] * f * (1 - f),
        dc * i * (1 - g * g),
        dh * far * o * (1 - o),
    ]
    return ways, [], [None, dc * f]


def rnn_tanh(given: Pieces, recalled: Pieces, states: Pieces) -> tuple[Pieces, Pieces]:
    """torch.nn.RNN's update."""
    return [tanh(given[0] + recalled[0])], []


def rnn_tanh_back(grads: Pieces, kept: Pieces, states: Pieces, ends: Pieces) -> Any:
    """Its gradient."""
    return [grads[0] * (1 - ends[0] * ends[0])], [], [None]


def rnn_relu(given: Pieces, recalled: Pieces, states: Pieces) -> tuple[Pieces, Pieces]:
    """torch.nn.RNN's update with nonlinearity="relu"."""
    return [torch.relu(given[0] + recalled[0])], []


def rnn_relu_back(grads: Pieces, kept: Pieces, states: Pieces, ends: Pieces) -> Any:
    """Its gradient."""
    return [grads[0] * (ends[0] > 0)], [], [None]


CELLS = {
    "gru": Cell(3, 4, 1, True, gru, gru_back),
    "lstm": Cell(4, 4, 2, False, lstm, lstm_back),
    "rnn_tanh": Cell(1, 0, 1, False, rnn_tanh, rnn_tanh_back),
    "rnn_relu": Cell(1, 0, 1, False, rnn_relu, rnn_relu_back),
}

# Layers


def _affine(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h W^T + b, by oneDNN where there is one: on some processors in a third of the default library's time."""
    if h.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(h, weight, bias, "none", [], "")
    return h @ weight.T if bias is None else torch.addmm(bias, h, weight.T)


def _pieces(t: Tensor, n: int) -> Pieces:
    """Parts of the last dimension."""
    return [t[..., k : k + n] for k in range(0, t.shape[-1], n)]


def _write(targets: Sequence[Tensor], pieces: Sequence[Tensor]) -> None:
    for target, piece in zip(targets, pieces, strict=True):
        target.copy_(piece)


def _divided(tensors: Sequence[Tensor], *counts: int) -> Iterator[list[Tensor]]:
    it = iter(tensors)
    return (list(islice(it, count)) for count in counts)


class Layer:
    """A kind's operation, forward and backward."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def forward(
        self, given: Tensor, recalled: Tensor | None, first: Tensor, weight: Tensor, bias: Tensor | None, fast: bool
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """States `(states, 1 + time, rows, n)`, and what is kept for the gradient."""
        (time, rows), n, cell = given.shape[:2], first.shape[2], self.cell
        out, kept = (
            given.new_empty(cell.states, 1 + time, rows, n),
            given.new_empty(time, rows, cell.kept * n),
        )
        out[:, 0], run = first, None
        steps = given, out[0], *out, *out[:, 1:], *_pieces(kept, n)
        for mine, h, *more in zip(*steps, strict=False):
            tensors = [mine, _affine(h, weight, bias), *more]
            run = run or machine_code(self.step, tensors, fast)
            run(tensors)
        return out, kept

    def step(self, given: Tensor, memory: Tensor, *tensors: Tensor) -> tuple[()]:
        """From the maps and the states to the states after them and what is kept, which are written."""
        states, ends, kept = _divided(tensors, *[self.cell.states] * 2, self.cell.kept)
        n = states[0].shape[1]
        after, keep = self.cell.forward(_pieces(given, n), _pieces(memory, n), states)
        _write(ends, after)
        _write(kept, keep)
        return ()

    def backward(
        self, grad: Tensor, first: Tensor, weight: Tensor, out: Tensor, kept: Tensor, fast: bool
    ) -> list[Tensor]:
        """Gradients by `given`, by `recalled` if that is another, and by `first`."""
        (time, rows), n, cell = kept.shape[:2], first.shape[2], self.cell
        ways = [kept.new_empty(time, rows, cell.gates * n) for _ in range(1 + cell.twice)]
        now, through = torch.zeros_like(first), torch.zeros_like(first[0])
        turned, run = weight.T.contiguous(), None
        each = (p for t in (kept, *ways) for p in _pieces(t, n))
        steps = ways[-1], *grad[:, 1:], *out, *out[:, 1:], *each
        for mine, *more in reversed(list(zip(*steps, strict=False))):
            tensors = [through, *now, *more]
            run = run or machine_code(self.step_back, tensors, fast)
            run(tensors)
            through = _affine(mine, turned)
        now[0] += through
        return [*ways, now + grad[:, 0]]

    def step_back(self, through: Tensor, *tensors: Tensor) -> tuple[()]:
        """From gradients by the states after a step, of which `through` came of the map, to those before it and by the maps."""
        cell = self.cell
        counts = *[cell.states] * 4, cell.kept, *[cell.gates] * (1 + cell.twice)
        now, grads, states, ends, kept, *ways = _divided(tensors, *counts)
        after = [a + b for a, b in zip(now, grads, strict=True)]
        after[0] = after[0] + through
        *found, before = cell.backward(after, kept, states, ends)
        for targets, pieces in zip(ways, found, strict=False):
            _write(targets, pieces)
        _write(now, [torch.zeros_like(through) if t is None else t for t in before])
        return ()


FUSED: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}
"""The operation of each kind of layer, differentiable by `given`, `recalled` and `first`."""


def _enter(name: str, cell: Cell) -> None:
    layer = Layer(cell)
    schema = "(Tensor given, Tensor? recalled, Tensor first, Tensor weight, Tensor? bias, bool fast) -> (Tensor, Tensor)"
    op = torch.library.custom_op(f"rapha::{name}", layer.forward, mutates_args=(), schema=schema)
    schema = "(Tensor grad, Tensor first, Tensor weight, Tensor out, Tensor kept, bool fast) -> Tensor[]"
    back = torch.library.custom_op(f"rapha::{name}_back", layer.backward, mutates_args=(), schema=schema)

    @op.register_fake
    def _(
        given: Tensor, recalled: Any, first: Tensor, weight: Tensor, bias: Any, fast: bool
    ) -> tuple[Tensor, Tensor]:
        (time, rows), n = given.shape[:2], first.shape[2]
        return given.new_empty(cell.states, 1 + time, rows, n), given.new_empty(time, rows, cell.kept * n)

    @back.register_fake
    def _(grad: Tensor, first: Tensor, weight: Tensor, out: Tensor, kept: Tensor, fast: bool) -> list[Tensor]:
        ways = [kept.new_empty(*kept.shape[:2], len(weight)) for _ in range(1 + cell.twice)]
        return [*ways, torch.empty_like(first)]

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[2], inputs[3], *output)
        ctx.fast = inputs[5]

    def differentiate(ctx: Any, grad: Tensor, unused: Tensor) -> Any:
        *ways, first = back(grad, *ctx.saved_tensors, ctx.fast)
        return ways[0], (ways[1] if cell.twice else None), first, None, None, None

    op.register_autograd(differentiate, setup_context=keep)
    FUSED[name] = op


for _name, _cell in CELLS.items():
    _enter(_name, _cell)
