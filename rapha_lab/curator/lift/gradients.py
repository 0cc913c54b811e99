"""Per-patient gradients of a lifted loss, in stored form.

A parameter's gradients take a path chosen from the program alone:

- outer: the weight of a linear layer, used once at one position. A patient's gradient is the outer product
  of the stored output gradient and input, its norm the product of theirs; it is never materialised.
- rows: an embedding used once, if its table is more than twice as long as the places it is used at. A patient's
  gradient is kept for the rows the patient uses.
- stored: linear layers at several positions, convolutions, recurrent layers, smaller tables, layers that share a parameter.
  A patient's gradient is written out, added up over the uses, measured and summed.
  So is that of parameters that a layer's weight is made of: the gradient by the weight is taken on to copies of them.
- copy: any other use. Each patient gets an own copy of the parameter, which autograd differentiates.

No Gram matrices: norms from them cancel in floating point, and the author of the program is the adversary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rapha_lab.curator.lift.graph import Checked, Graph, Step, run_steps
from rapha_lab.curator.lift.parts import Origin, Outer, Pairs, Part, Several, Stored, Through
from rapha_lab.curator.lift.routes import Made, Routes, is_turn
from rapha_lab.curator.lift.taps import TAPS, Use
from rapha_lab.protocol.program import Node, Ref

__all__ = ["Found", "forward", "parts", "per_patient"]

Tensors = Mapping[str, Tensor]
Found = dict[str, Part]


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
    for name in [name for name in found if name not in parameters]:
        for part in _through(name, _one(found.pop(name)), routes, {**parameters, **constants}):
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


def _through(root: str, by: Part, routes: Routes, values: Tensors) -> list[Part]:
    """The gradients by what a weight is made of, from those by the weight.

    Those in factors go on in factors through sums, products and transposes; all else by copies.
    """
    lifted = shared({name: t.detach() for name, t in values.items()})
    steps = routes.made[root].steps
    env = run_steps(steps.values(), lifted) if isinstance(by, Outer | Pairs) else {}
    got, found = {root: [by]}, list[Part]()
    for name in reversed([n for n in steps if routes.made[n].parameters]):
        if not (several := got.pop(name, [])):
            continue
        by = _one([_named(part, name) for part in several])
        on = _factors(steps[name], by, env) if isinstance(by, Outer | Pairs) and len(several) == 1 else None
        if on is None:
            found += _copies(name, by, routes.made[name], lifted)
        for of, part in on or ():
            got.setdefault(of, []).append(part)
    return found + [_named(part, of) for of, parts in got.items() if of in routes.uses for part in parts]


def _named(part: Any, name: str) -> Part:
    return replace(part, name=name)


def _factors(step: Step, by: Outer | Pairs, env: Mapping[str, Any]) -> list[tuple[str, Part]] | None:
    """By what a step's result is made of, from those by the result; None if not in factors."""
    node, _, (first, *rest) = step
    second = rest[0] if rest else None
    if not isinstance(first, Ref):
        return None
    if is_turn(step):
        return [(first.ref, by.turned())]
    if isinstance(second, int | float) and node.op in ("aten.mul.Tensor", "aten.div.Tensor"):
        scaled = by.out * second if "mul" in node.op else by.out / second
        return [(first.ref, replace(by, out=scaled))]
    if not isinstance(second, Ref) or not env[first.ref].dim() == env[second.ref].dim() == 3:
        return None
    a, b = env[first.ref], env[second.ref]
    if node.op == "aten.add.Tensor" and a.shape == b.shape and rest[1:] == [1]:
        return [(first.ref, by), (second.ref, by)]
    if node.op in ("aten.matmul.default", "aten.mm.default"):
        return [(first.ref, by.of(by.out, by.inp @ b[0].mT)), (second.ref, by.of(by.out @ a[0], by.inp))]
    return None


def _copies(name: str, by: Part, made: Made, lifted: Tensors) -> list[Part]:
    names = (*made.parameters, *made.constants)
    make = partial(_make, made, name, names)
    origin = Origin(by, tuple(lifted[n] for n in names), make, len(made.parameters))
    return [Through(of, origin, place) for place, of in enumerate(made.parameters)]


def _make(made: Made, name: str, names: Sequence[str], values: Sequence[Tensor]) -> Tensor:
    return run_steps(made.steps.values(), dict(zip(names, values, strict=True)))[name]


def _one(several: list[Part]) -> Part:
    name = several[0].name
    outer = [part for part in several if isinstance(part, Outer)]
    if len(several) == len(outer) > 1:
        out, inp = (torch.stack(ts, 1) for ts in zip(*((p.out, p.inp) for p in outer), strict=True))
        return Pairs.made(name, out, inp)
    return several[0] if len(several) == 1 else Several(name, tuple(several))


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
