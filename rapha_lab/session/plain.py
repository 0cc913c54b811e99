"""Operations that are written out in those that a site computes, when a model is traced: no rule is needed there.

Whole recurrent layers (`nn.GRU`) travel as one operation. `nn.GRUCell` and its like, with which loops over visits
are written, are one step of them; `a & b` is another name of `torch.bitwise_and(a, b)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["WRITTEN_OUT"]

Bias = Tensor | None


def _gru(x: Tensor, h: Tensor, w: Tensor, u: Tensor, b: Bias = None, c: Bias = None) -> Tensor:
    (r, z, n), (hr, hz, hn) = linear(x, w, b).chunk(3, -1), linear(h, u, c).chunk(3, -1)
    z = torch.sigmoid(z + hz)
    n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return n + z * (h - n)


def _lstm(
    x: Tensor, state: list[Tensor], w: Tensor, u: Tensor, b: Bias = None, c: Bias = None
) -> tuple[Tensor, Tensor]:
    i, f, g, o = (linear(x, w, b) + linear(state[0], u, c)).chunk(4, -1)
    kept = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(kept), kept


def _tanh(x: Tensor, h: Tensor, w: Tensor, u: Tensor, b: Bias = None, c: Bias = None) -> Tensor:
    return torch.tanh(linear(x, w, b) + linear(h, u, c))


def _relu(x: Tensor, h: Tensor, w: Tensor, u: Tensor, b: Bias = None, c: Bias = None) -> Tensor:
    return torch.relu(linear(x, w, b) + linear(h, u, c))


_ATEN = torch.ops.aten

WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    _ATEN.gru_cell.default: _gru,
    _ATEN.lstm_cell.default: _lstm,
    _ATEN.rnn_tanh_cell.default: _tanh,
    _ATEN.rnn_relu_cell.default: _relu,
    **dict.fromkeys((_ATEN.__and__.Tensor, _ATEN.__and__.Scalar), torch.bitwise_and),
    **dict.fromkeys((_ATEN.__or__.Tensor, _ATEN.__or__.Scalar), torch.bitwise_or),
    **dict.fromkeys((_ATEN.__xor__.Tensor, _ATEN.__xor__.Scalar), torch.bitwise_xor),
}
"""What `torch.export` puts in an operation's place."""
