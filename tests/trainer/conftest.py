"""Programs and patients that the trainer's tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rapha_lab.curator.lift import Lifted, lift
from rapha_lab.protocol.program import Node, Program, Ref, TensorSpec
from rapha_lab.session.tracing import loss_program


def program(
    inputs: dict[str, list[int]], parameters: dict[str, list[int]], nodes: list[Node], dtype: str = "float64"
) -> Program:
    """A program written by hand, as an attacker would."""
    specs = [[TensorSpec(n, dtype, s) for n, s in part.items()] for part in (inputs, parameters)]  # type: ignore[arg-type]
    return Program(inputs=specs[0], parameters=specs[1], constants=[], nodes=nodes, output=nodes[-1].id)


def node(id: str, op: str, *args: Any, **kwargs: Any) -> Node:
    """A node whose string arguments that begin with @ are references."""
    return Node(id, f"aten.{op}", [_arg(a) for a in args], kwargs, line=7)


def _arg(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_arg(a) for a in arg]
    return Ref(arg[1:]) if isinstance(arg, str) and arg.startswith("@") else arg


def lifted(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> tuple[Lifted, dict, dict]:
    """A model's loss lifted, with its parameters and constants."""
    traced = loss_program(model, loss, {"x": x[0]}, y[0])
    it = lift(traced.program)
    return it, *it.tensors(traced.blob)


def alone(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Each patient's gradient by plain autograd, one after another."""
    rows: dict[str, list[Tensor]] = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    for i in range(len(x)):
        model.zero_grad()
        prediction = model(x[i : i + 1])
        loss(
            prediction.reshape(y[i : i + 1].shape) if prediction.numel() == y[i].numel() == 1 else prediction,
            y[i : i + 1],
        ).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return {name: torch.stack(grads) for name, grads in rows.items()}
