"""A loss or a score as a graph of tensor operations on one patient: data, never code.

Operations are named by their ATen overload and mean nothing here; the curator's table decides what each does,
and refuses what is not in it. Tensors (parameters, constants) travel beside the JSON as one safetensors blob.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rapha_lab.protocol.errors import PolicyError, ProgramError

__all__ = [
    "DTYPES",
    "Arg",
    "Node",
    "Program",
    "Ref",
    "TensorSpec",
    "at",
    "check",
    "digest",
    "refs",
    "structure",
    "within",
]

Id = Annotated[str, Meta(min_length=1, max_length=256)]
Dtype = Literal["float32", "float64", "int64", "int32", "bool"]
DTYPES: dict[str, int] = {"float32": 4, "float64": 8, "int64": 8, "int32": 4, "bool": 1}
"""The dtypes a program may name, and their bytes an element."""

MAX_NODES = 20_000
MAX_ARGS = 32
MAX_LIST = 4_096
MAX_RANK = 8
MAX_NUMEL = 1 << 28
MAX_INT = (1 << 63) - 1


class Ref(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The value of the input, parameter, constant or node with this id."""

    ref: Id


Atom = None | bool | int | float | Annotated[str, Meta(max_length=256)] | Ref
Arg = Atom | Annotated[list[Atom], Meta(max_length=MAX_LIST)]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named tensor's dtype and shape; an input's shape is one patient's, without a batch."""

    name: Id
    dtype: Dtype
    shape: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=MAX_RANK)]


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One operation, and for its author the line of the cell and the module that made it.

    Non-finite floats are written as the strings "inf", "-inf" and "nan", dtypes by their names.
    """

    id: Id
    op: Annotated[str, Meta(min_length=1, max_length=128)]
    args: Annotated[list[Arg], Meta(max_length=MAX_ARGS)] = []
    kwargs: Annotated[dict[Id, Arg], Meta(max_length=MAX_ARGS)] = {}
    line: Annotated[int, Meta(ge=0)] | None = None
    module: Annotated[str, Meta(max_length=256)] = ""


class Program(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One patient's computation. An input enters its nodes as a batch of one: `(1, *shape)`."""

    inputs: Annotated[list[TensorSpec], Meta(max_length=256)]
    parameters: Annotated[list[TensorSpec], Meta(max_length=MAX_NODES)]
    constants: Annotated[list[TensorSpec], Meta(max_length=MAX_NODES)]
    nodes: Annotated[list[Node], Meta(max_length=MAX_NODES)]
    output: Id
    version: Literal["rapha-program-1"] = "rapha-program-1"

    @property
    def size(self) -> int:
        """How many numbers its parameters hold."""
        return sum(math.prod(spec.shape) for spec in self.parameters)


def refs(node: Node) -> Iterator[str]:
    """The ids a node reads, in order of its arguments."""
    for arg in (*node.args, *node.kwargs.values()):
        for atom in arg if isinstance(arg, list) else (arg,):
            if isinstance(atom, Ref):
                yield atom.ref


def at(node: Node) -> str:
    """Where a node comes from, in words for its author: "aten.relu.default (line 3, in model.1)"."""
    place = [f"line {node.line}"] if node.line else []
    place += [f"in {node.module}"] if node.module else []
    return f"{node.op} ({', '.join(place)})" if place else node.op


def check(program: Program) -> None:
    """Check that a decoded program is well formed: names unique and defined before use, sizes within caps.

    Raises:
        ProgramError: naming the tensor, or the node's operation and line.
    """
    known: set[str] = set()
    for spec in (*program.inputs, *program.parameters, *program.constants):
        _define(known, spec.name, spec.name, None)
        if math.prod(spec.shape) > MAX_NUMEL or max(spec.shape, default=0) > MAX_NUMEL:
            raise _refuse(f"The tensor {spec.name} is too large.", f"Limit: {MAX_NUMEL} numbers.", spec.name)
    for node in program.nodes:
        for name in refs(node):
            if name not in known:
                why = f"It reads {name!r}, which nothing before it defines."
                raise _refuse(f"{at(node)} is not well formed.", why, node.op, node.line)
        for arg in (*node.args, *node.kwargs.values()):
            for atom in arg if isinstance(arg, list) else (arg,):
                _check_number(atom, node)
        _define(known, node.id, at(node), node.line)
    if program.output not in {node.id for node in program.nodes}:
        raise _refuse("The program has no output.", f"No node is called {program.output!r}.", "output")


def _define(known: set[str], name: str, what: str, line: int | None) -> None:
    if name in known:
        raise _refuse(f"{what} is not well formed.", f"The name {name!r} is taken.", name, line)
    known.add(name)


def _check_number(atom: Atom, node: Node) -> None:
    if isinstance(atom, int) and abs(atom) > MAX_INT:
        raise _refuse(f"{at(node)} is not well formed.", "An integer is out of range.", node.op, node.line)


def _refuse(what: str, why: str, field: str, line: int | None = None) -> ProgramError:
    return ProgramError(what, why, "Trace it with rapha_lab.session.tracing.", field=field, line=line)


def digest(program: Program) -> str:
    """SHA-256 of the program, in hex: what a log names it by."""
    return hashlib.sha256(msgspec.json.encode(program)).hexdigest()


def structure(program: Program) -> str:
    """SHA-256 of what it computes, lines and modules aside: programs that share it share compiled code."""
    bare = [msgspec.structs.replace(node, line=None, module="") for node in program.nodes]
    return digest(msgspec.structs.replace(program, nodes=bare))


def within(size: int, largest: int, who: str = "Your project") -> None:
    """Raise PolicyError if a model of so many numbers is larger than the policy lets `who` train."""
    if size > largest:
        raise PolicyError(
            f"The model has {size:,} parameters.",
            f"{who} may train {largest:,} at most.",
            "Make it smaller, or ask the custodians for a new version of the policy.",
        )
