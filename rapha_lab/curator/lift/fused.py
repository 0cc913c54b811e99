"""A GRU's and an LSTM's layer as one operation each: the gradients by both affine maps come at every step.

Time comes first, `(time, rows, ...)`. `given` is the input's affine map, made before; `recalled` is zero and is
added to the state's affine map: its gradient is what the state's weights are differentiated by. The states of
all steps are returned stacked, an LSTM's cells after its outputs. To the compiler these are single operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rapha_lab.curator.lift.even import tanh

__all__ = ["FUSED"]

Kept = tuple[Tensor, Tensor]


def _affine(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h W^T + b, by oneDNN where there is one: on some processors in a third of the default library's time."""
    if h.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(h, weight, bias, "none", [], "")
    return h @ weight.T if bias is None else torch.addmm(bias, h, weight.T)


def gru(given: Tensor, recalled: Tensor, first: Tensor, weight: Tensor, bias: Tensor | None) -> Kept:
    """States `(1, time, rows, n)`, and what the gradient needs: gates r, z, n and the state's part of n."""
    time, rows, n = len(given), first.shape[1], first.shape[2]
    out, kept = given.new_empty(1, time, rows, n), given.new_empty(time, rows, 4 * n)
    h = first[0]
    for t in range(time):
        mine, memory = kept[t], _affine(h, weight, bias)
        rz = torch.add(given[t, :, : 2 * n], memory[:, : 2 * n], out=mine[:, : 2 * n]).sigmoid_()
        mine[:, 3 * n :] = memory[:, 2 * n :]
        new = tanh(torch.addcmul(given[t, :, 2 * n :], rz[:, :n], memory[:, 2 * n :]))
        mine[:, 2 * n : 3 * n] = new
        h = torch.lerp(new, h, rz[:, n:], out=out[0, t])
    return out, kept


def gru_back(grad: Tensor, first: Tensor, weight: Tensor, out: Tensor, kept: Tensor) -> list[Tensor]:
    """Gradients by `given`, `recalled` and `first`."""
    n = first.shape[2]
    given, recalled = (out.new_empty(*kept.shape[:2], 3 * n) for _ in range(2))
    dh = torch.zeros_like(first[0])
    for t in reversed(range(len(kept))):
        before = out[0, t - 1] if t else first[0]
        r, z, new, memory = kept[t].chunk(4, 1)
        dh = dh + grad[0, t]
        d_new = dh * (1 - z) * (1 - new * new)
        mine = given[t]
        mine[:, :n] = d_new * memory * r * (1 - r)
        mine[:, n : 2 * n] = dh * (before - new) * z * (1 - z)
        mine[:, 2 * n :] = d_new
        recalled[t, :, : 2 * n] = mine[:, : 2 * n]
        recalled[t, :, 2 * n :] = d_new * r
        dh = _affine(recalled[t], weight.T).addcmul_(dh, z)
    return [given, recalled, dh.unsqueeze(0)]


def lstm(given: Tensor, recalled: Tensor, first: Tensor, weight: Tensor, bias: Tensor | None) -> Kept:
    """States `(2, time, rows, n)`, outputs before cells; and the gates i, f, g, o."""
    time, rows, n = len(given), first.shape[1], first.shape[2]
    out, kept = given.new_empty(2, time, rows, n), given.new_empty(time, rows, 4 * n)
    h, c = first.unbind(0)
    for t in range(time):
        gates = torch.add(given[t], _affine(h, weight, bias), out=kept[t])
        gates[:, : 2 * n].sigmoid_()
        gates[:, 2 * n : 3 * n] = tanh(gates[:, 2 * n : 3 * n])
        gates[:, 3 * n :].sigmoid_()
        i, f, g, o = gates.chunk(4, 1)
        c = torch.addcmul(f * c, i, g, out=out[1, t])
        h = torch.mul(o, tanh(c), out=out[0, t])
    return out, kept


def lstm_back(grad: Tensor, first: Tensor, weight: Tensor, out: Tensor, kept: Tensor) -> list[Tensor]:
    """Gradients by `given`, `recalled` and `first`."""
    n = first.shape[2]
    given = torch.empty_like(kept)
    dh, dc = torch.zeros_like(first[0]), torch.zeros_like(first[1])
    for t in reversed(range(len(kept))):
        before = out[1, t - 1] if t else first[1]
        i, f, g, o = kept[t].chunk(4, 1)
        far = tanh(out[1, t])
        dh = dh + grad[0, t]
        dc = dc + grad[1, t] + dh * o * (1 - far * far)
        mine = given[t]
        mine[:, :n] = dc * g * i * (1 - i)
        mine[:, n : 2 * n] = dc * before * f * (1 - f)
        mine[:, 2 * n : 3 * n] = dc * i * (1 - g * g)
        mine[:, 3 * n :] = dh * far * o * (1 - o)
        dh, dc = _affine(mine, weight.T), dc * f
    return [given, given.clone(), torch.stack([dh, dc])]


FUSED: dict[str, Callable[..., Kept]] = {}
"""The operation of each kind of layer, differentiable by `given`, `recalled` and `first`."""


def _enter(
    name: str, states: int, forward: Callable[..., Kept], backward: Callable[..., list[Tensor]]
) -> None:
    schema = "(Tensor given, Tensor recalled, Tensor first, Tensor weight, Tensor? bias) -> (Tensor, Tensor)"
    op = torch.library.custom_op(f"rapha::{name}", forward, mutates_args=(), schema=schema)
    schema = "(Tensor grad, Tensor first, Tensor weight, Tensor out, Tensor kept) -> Tensor[]"
    back = torch.library.custom_op(f"rapha::{name}_back", backward, mutates_args=(), schema=schema)

    @op.register_fake
    def _(given: Tensor, recalled: Tensor, first: Tensor, weight: Tensor, bias: Tensor | None) -> Kept:
        lead, n = given.shape[:2], first.shape[2]
        return given.new_empty(states, *lead, n), given.new_empty(*lead, 4 * n)

    @back.register_fake
    def _(grad: Tensor, first: Tensor, weight: Tensor, out: Tensor, kept: Tensor) -> list[Tensor]:
        gates = kept.new_empty(*kept.shape[:2], len(weight))
        return [gates, torch.empty_like(gates), torch.empty_like(first)]

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[2], inputs[3], *output)

    def differentiate(ctx: Any, grad: Tensor, unused: Tensor) -> Any:
        return (*back(grad, *ctx.saved_tensors), None, None)

    op.register_autograd(differentiate, setup_context=keep)
    FUSED[name] = op


_enter("gru", 1, gru, gru_back)
_enter("lstm", 2, lstm, lstm_back)
