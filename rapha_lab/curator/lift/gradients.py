"""Per-patient gradients of a lifted loss, in stored form.

A parameter's gradients take a path chosen from the program alone:

- outer: the weight of a linear layer, used once at one position. A patient's gradient is the outer product
  of the stored output gradient and input, its norm the product of theirs; it is never materialised.
- rows: an embedding used once, if its table is more than twice as long as the places it is used at. A patient's
  gradient is kept for the rows the patient uses.
- stored: linear layers at several positions, convolutions, recurrent layers, smaller tables, layers that share a parameter.
  A patient's gradient is written out, added up over the uses, measured and summed.
- copy: any other use. Each patient gets an own copy of the parameter, which autograd differentiates.

No Gram matrices: norms from them cancel in floating point, and the author of the program is the adversary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rapha_lab.curator.lift.graph import Checked, Graph
from rapha_lab.curator.lift.parts import Apart, Part, Several, Stored
from rapha_lab.curator.lift.taps import TAPS, Use, names_of
from rapha_lab.protocol.program import Node, Ref

__all__ = ["Found", "Routes", "forward", "parts", "per_patient"]

Tensors = Mapping[str, Tensor]
Found = dict[str, Part]


class Routes:
    """How each parameter of a program is differentiated.

    Attributes:
        tapped: the weights' names by node, where they all are parameters that only such nodes use.
        copied: parameters with any other use, with a node that makes it so.
        uses: the operations that use each parameter, in order.
    """

    def __init__(self, graph: Graph) -> None:
        names = {spec.name for spec in graph.program.parameters}
        uses = {node.id: [name for name in _read(args) if name in names] for node, _, args in graph.steps}
        self.tapped: dict[str, list[str | None]] = {}
        for node, _, args in graph.steps:
            found = names_of(TAPS[node.op][0](args), names) if node.op in TAPS else None
            if found is not None and Counter(uses[node.id]) == Counter(n for n in found if n):
                self.tapped[node.id] = found
        self.uses = {name: [n.op for n, _, _ in graph.steps if name in uses[n.id]] for name in names}
        self.copied: dict[str, str] = {}
        while more := self._others(graph, uses):
            self.copied |= more
            kept = {id for id, found in self.tapped.items() if not set(found) & set(self.copied)}
            self.tapped = {id: self.tapped[id] for id in kept}

    def explain(self, found: Mapping[str, Part]) -> dict[str, str]:
        """Which path each parameter takes, and why, in words for the model's author."""
        return {name: self._why(name, found.get(name)) for name in sorted(self.uses)}

    def _why(self, name: str, part: Part | None) -> str:
        if part is None:
            return "none: the loss does not depend on it"
        ops = list(dict.fromkeys(op.removeprefix("aten.").split(".")[0] for op in self.uses[name]))
        if name in self.copied:
            other = self.copied[name].removeprefix("aten.").split(".")[0]
            return f"copy: {other} is no layer with a rule of its own, so each patient gets a copy of it"
        times = f"{' and '.join(ops)}" + (f", {n} times" if (n := len(self.uses[name])) > 1 else "")
        kind = "stored" if isinstance(part, Apart) else type(part).__name__.lower()
        return f"{kind}: {times}"

    def _others(self, graph: Graph, uses: dict[str, list[str]]) -> dict[str, str]:
        return {
            name: node.op
            for node, _, _ in graph.steps
            if node.id not in self.tapped
            for name in uses[node.id]
            if name not in self.copied
        }


def _read(args: list[Any]) -> list[str]:
    flat = [a for arg in args for a in (arg if isinstance(arg, list) else [arg])]
    return [a.ref for a in flat if isinstance(a, Ref)]


def parts(
    graph: Graph,
    routes: Routes,
    parameters: Tensors,
    constants: Tensors,
    inputs: Tensors,
    checked: Checked | None = None,
) -> dict[str, Part]:
    """Every patient's gradient of the loss by each parameter that it depends on, in stored form.

    Args:
        graph: a one-patient loss.
        routes: how its parameters are differentiated.
        parameters: their values, without a patient dimension.
        constants: likewise.
        inputs: `(patients, *shape)` by name.
        checked: runs each node, for a dry run.
    """
    size, uses = len(next(iter(inputs.values()))), []

    def hook(node: Node, args: list[Any]) -> Any:
        if node.id not in routes.tapped:
            return NotImplemented
        out, used = TAPS[node.op][1](routes.tapped[node.id], size, *args)
        uses.extend(used)
        return out

    with graph.evenly(), torch.enable_grad():
        own = {
            name: parameters[name].detach().expand(size, *parameters[name].shape).requires_grad_()
            for name in routes.copied
        }
        values = {
            **shared({n: t.detach() for n, t in parameters.items()}),
            **own,
            **shared(constants),
            **batched(inputs),
        }
        losses = graph.run(values, hook, checked)
        watched = [y for use in uses for y in use.outputs]
        grads = iter(torch.autograd.grad(losses.sum(), [*watched, *own.values()], allow_unused=True))
    found: dict[str, list[Part]] = {}
    with graph.evenly():
        for use in uses:
            for part in _parts(use, [next(grads) for _ in use.outputs]):
                found.setdefault(part.name, []).append(part)
    for name, gradient in zip(own, grads, strict=True):
        if gradient is not None:
            found[name] = [Stored(name, gradient)]
    return {name: _one(several) for name, several in found.items()}


def _parts(use: Use, grads: list[Tensor | None]) -> list[Part]:
    if all(g is None for g in grads):
        return []
    return use.parts(
        [torch.zeros_like(y) if g is None else g for y, g in zip(use.outputs, grads, strict=True)]
    )


def _one(several: list[Part]) -> Part:
    return several[0] if len(several) == 1 else Several(several[0].name, tuple(several))


def per_patient(found: Mapping[str, Part]) -> dict[str, Tensor]:
    """The gradients materialised, `(patients, *shape)` by parameter."""
    return {name: part.dense() for name, part in found.items()}


def shared(tensors: Tensors) -> dict[str, Tensor]:
    """Values that are the same for every patient, lifted."""
    return {name: t.unsqueeze(0) for name, t in tensors.items()}


def batched(inputs: Tensors) -> dict[str, Tensor]:
    """Inputs, lifted: each patient's with the leading 1 that a program expects."""
    return {name: t.unsqueeze(1) for name, t in inputs.items()}


def forward(graph: Graph, values: Tensors, inputs: Tensors, checked: Checked | None = None) -> Tensor:
    """The program's output for each patient, without gradients."""
    with graph.evenly(), torch.no_grad():
        return graph.run({**shared(values), **batched(inputs)}, None, checked)
