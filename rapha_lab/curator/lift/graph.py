"""A checked program over lifted values: arguments bound to schemas, then each node's rule in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rapha_lab.curator.lift.even import FEW, Evenly, tracing
from rapha_lab.curator.lift.table import DRAWN, INSTEAD, TABLE, batch_of
from rapha_lab.protocol.errors import ProgramError
from rapha_lab.protocol.program import DTYPES, Node, Program, Ref, at

__all__ = ["Checked", "Graph", "Step", "draws", "refused", "run_steps"]

_STORAGE = {"layout", "device", "pin_memory", "memory_format", "generator", "out"}
Hook = Callable[[Node, list[Any]], Any]
Checked = Callable[[Node, Callable[[], Any]], Any]
Step = tuple[Node, Callable[..., Any], list[Any]]
"""A node, its rule and its arguments."""


class Graph:
    """The program's nodes with their arguments checked against the operations' schemas.

    Attributes:
        uneven: numbers of one patient that go through operations which take longer for some of them.

    Raises:
        ProgramError: for an operation that is not in the table or an argument that does not fit.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.uneven = program, 0
        self.steps: list[Step] = [(node, *self._bound(node)) for node in program.nodes]

    def _bound(self, node: Node) -> tuple[Any, list[Any]]:
        if node.op == "getitem":
            if (
                len(node.args) != 2
                or type(node.args[1]) is not int
                or node.kwargs
                or not isinstance(node.args[0], Ref)
            ):
                raise refused(node, "It takes a value and a number.")
            return _item, list(node.args)
        if node.op not in TABLE:
            what = f"{at(node)} is not an operation this site computes."
            why = "Only operations of the published table can be computed patient by patient."
            instead = INSTEAD.get(node.op, "Write it with other operations.")
            raise ProgramError(what, why, instead, field=node.op, line=node.line)
        op, function = TABLE[node.op]
        return function, _bind(node, op._schema.arguments)

    def evenly(self) -> AbstractContextManager[Any]:
        """What the program and its derivatives are computed in, so that no time tells of a number.

        The few that most losses are made of are not worth what it takes; a compiled step takes nothing for it.
        """
        return Evenly() if self.uneven > FEW or tracing() else nullcontext()

    def run(
        self, values: Mapping[str, Tensor], hook: Hook | None = None, checked: Checked | None = None
    ) -> Any:
        """The output, from inputs, parameters and constants by name with the patient as dimension 0.

        Args:
            values: all that the nodes may read.
            hook: computes a node in place of its rule, or returns NotImplemented.
            checked: calls each node's computation, for a dry run.
        """
        env, size = dict[str, Any](values), batch_of(*values.values())
        for node, function, args in self.steps:

            def compute(node: Node = node, function: Any = function, args: list[Any] = args) -> Any:
                given = [_resolved(a, env) for a in args]
                if node.op in DRAWN:
                    given[0] = given[0].expand(size, *given[0].shape[1:])
                out = hook(node, given) if hook is not None else NotImplemented
                return function(*given) if out is NotImplemented else out

            env[node.id] = compute() if checked is None else checked(node, compute)
        return env[self.program.output]


def run_steps(steps: Iterable[Step], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values and what steps that draw nothing make of them."""
    env = {**values}
    for node, function, args in steps:
        env[node.id] = function(*(_resolved(a, env) for a in args))
    return env


def draws(node: Node) -> bool:
    """Whether it may draw random numbers, as dropout does by itself, in attention and between recurrent layers."""
    return any(name in node.op for name in ("dropout", "attention", "gru", "lstm", "rnn", "rand"))


def refused(node: Node, why: str) -> ProgramError:
    """What to tell the author of a node whose arguments do not fit its operation."""
    return ProgramError(
        f"{at(node)} has arguments that do not fit.",
        why,
        "Change what that line computes, or the shapes that it gets.",
        field=node.op,
        line=node.line,
    )


def _item(value: Any, index: int) -> Any:
    if not isinstance(value, tuple | list):
        raise TypeError("a single tensor has no items")
    return value[index]


def _resolved(arg: Any, env: Mapping[str, Any]) -> Any:
    if isinstance(arg, Ref):
        return env[arg.ref]
    return [_resolved(a, env) for a in arg] if isinstance(arg, list) else arg


def _bind(node: Node, schema: list[Any]) -> list[Any]:
    """A node's arguments in the order of the schema, defaults filled in, storage left out."""
    positional = [a for a in schema if not a.kwarg_only]
    if len(node.args) > len(positional) or set(node.kwargs) - {a.name for a in schema}:
        raise refused(node, "There are too many of them, or one has an unknown name.")
    given: dict[str, Any] = {a.name: v for a, v in zip(positional, node.args, strict=False)}
    if set(given) & set(node.kwargs):
        raise refused(node, "One is given twice.")
    given |= node.kwargs
    bound = []
    for argument in schema:
        if argument.name in _STORAGE:
            continue
        if argument.name not in given:
            if not argument.has_default_value():
                raise refused(node, f"{argument.name} is missing.")
            bound.append(argument.default_value)
            continue
        bound.append(_fit(node, argument, given[argument.name]))
    return bound


def _fit(node: Node, argument: Any, value: Any) -> Any:
    """The value as the schema's type, or ProgramError."""
    kind = str(argument.type)
    if value is None and kind.startswith("Optional"):
        return None
    kind = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional") else kind
    if argument.name == "dtype":
        if isinstance(value, str) and value in DTYPES:
            return getattr(torch, value)
        raise refused(node, f"dtype is one of {', '.join(DTYPES)}.")
    if kind.startswith("List["):
        inner = kind[5:-1]
        # torch lets one number stand for a list of equal ones
        value = value if isinstance(value, list) else [value]
        return [_atom(node, argument.name, inner, v) for v in value]
    return _atom(node, argument.name, kind, value)


_NONFINITE = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


def _atom(node: Node, name: str, kind: str, value: Any) -> Any:
    if kind.startswith("Optional["):
        if value is None:
            return None
        kind = kind[9:-1]
    if isinstance(value, str) and kind in ("float", "number", "Tensor") and value in _NONFINITE:
        return _NONFINITE[value]
    number = isinstance(value, int | float)
    fits = {
        "Tensor": isinstance(value, Ref) or number,
        "int": type(value) is int,
        "float": number and not isinstance(value, bool),
        "number": number,
        "bool": type(value) is bool,
        "str": isinstance(value, str),
    }
    if not fits.get(kind, False):
        raise refused(node, f"{name} must be {kind}.")
    return float(value) if kind == "float" else value
