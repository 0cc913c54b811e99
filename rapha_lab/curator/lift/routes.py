"""By which path each parameter of a program is differentiated, chosen from the program alone; see `lift.gradients`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rapha_lab.curator.lift.graph import Graph, Step, draws, run_steps
from rapha_lab.curator.lift.parts import Apart, Part
from rapha_lab.curator.lift.taps import PRODUCTS, TAPS
from rapha_lab.protocol.program import Ref

__all__ = ["Made", "Routes", "is_turn"]


DEEP = 64
"""Steps that what layers use as a weight may be made in; more are copied for each patient."""


@dataclass(frozen=True)
class Made:
    """A value that is made of parameters and constants alone, the same for all patients.

    Attributes:
        rank: how many dimensions it has.
        parameters: that it is made of.
        constants: likewise.
        steps: by which it is, in order, by name.
    """

    rank: int
    parameters: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    steps: Mapping[str, Step] = field(default_factory=dict)


_TURNS = ("aten.t.default", "aten.permute.default", "aten.transpose.int")


def is_turn(step: Step) -> bool:
    """Whether it makes a matrix's transpose."""
    node, _, (_, *how) = step
    swaps = how in ([], [[1, 0]]) or (len(how) == 2 and {d % 2 for d in how if type(d) is int} == {0, 1})
    return node.op in _TURNS and swaps


class Routes:
    """How each parameter of a program is differentiated.

    Attributes:
        made: what is made of parameters and constants alone, by name; they are themselves.
        tapped: the weights' names by layer, where they all are such, and of what they are made only layers use it, as weights.
        copied: parameters with any other use, with a node that makes it so.
        uses: the operations of patients' values that use each parameter, or what is made of it, in order.
    """

    def __init__(self, graph: Graph) -> None:
        self.made = _made(graph)
        ranks = {name: made.rank for name, made in self.made.items()}
        trained = {name for name, made in self.made.items() if made.parameters}
        uses = {node.id: [name for name in _read(args) if name in trained] for node, _, args in graph.steps}
        self.tapped: dict[str, list[str | None]] = {}
        self.uses: dict[str, list[str]] = {spec.name: [] for spec in graph.program.parameters}
        for node, _, args in graph.steps:
            if node.id in self.made:
                continue
            for name in self._of(uses[node.id]):
                self.uses[name].append(node.op)
            if node.op not in TAPS:
                continue
            found = self._names(TAPS[node.op][0](args, ranks))
            if found is not None and not trained.isdisjoint(found):
                self.tapped[node.id] = [n if n in trained else None for n in found]
        self.copied: dict[str, str] = {}
        while more := dict(self._others(graph, uses)):
            self.copied |= more
            self.tapped = {
                id: names for id, names in self.tapped.items() if not self._of(names) & self.copied.keys()
            }

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

    def _names(self, weights: list[Any] | None) -> list[str | None] | None:
        """What a layer's weights are; None if one depends on a patient, so that what it is made of must be copied."""
        if weights is None or not all(
            w is None or (isinstance(w, Ref) and w.ref in self.made) for w in weights
        ):
            return None
        return [None if w is None else w.ref for w in weights]

    def _of(self, names: Iterable[Any]) -> set[str]:
        """The parameters that they are made of."""
        return {p for name in names if name is not None for p in self.made[name].parameters}

    def _others(self, graph: Graph, uses: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
        for node, _, _ in graph.steps:
            # what is made of parameters alone is looked at where it is used
            if node.id not in self.made or node.id == graph.program.output:
                others = Counter(uses[node.id]) - Counter(n for n in self.tapped.get(node.id, []) if n)
                yield from ((name, node.op) for name in self._of(others) - self.copied.keys())


def _read(args: list[Any]) -> list[str]:
    """The values that arguments name."""
    flat = [a for arg in args for a in (arg if isinstance(arg, list) else [arg])]
    return [a.ref for a in flat if isinstance(a, Ref)]


def _made(graph: Graph) -> dict[str, Made]:
    program = graph.program
    parameters, constants = {s.name: s for s in program.parameters}, {s.name: s for s in program.constants}
    made = {name: Made(len(s.shape), parameters=(name,)) for name, s in parameters.items()}
    made |= {name: Made(len(s.shape), constants=(name,)) for name, s in constants.items()}
    values: dict[str, Any] = {}
    for name, spec in {**parameters, **constants}.items():
        values[name] = torch.empty((1, *spec.shape), dtype=getattr(torch, spec.dtype), device="meta")
    for step in graph.steps:
        node, _, args = step
        names = _read(args)
        layer = node.op in TAPS and node.op not in PRODUCTS
        if draws(node) or layer or any(name not in made for name in names):
            continue
        try:
            with torch.device("meta"):
                values[node.id] = run_steps([step], values)[node.id]
        except Exception:  # noqa: S112 - the dry run says what is wrong with it
            continue
        parts, own = [made[name] for name in names], {node.id: step}
        steps = {id: one for part in parts for id, one in part.steps.items()} | own
        if len(steps) <= DEEP:
            made[node.id] = Made(
                getattr(values[node.id], "ndim", 0) - 1,
                tuple(dict.fromkeys(p for part in parts for p in part.parameters)),
                tuple(dict.fromkeys(c for part in parts for c in part.constants)),
                steps,
            )
    return made
