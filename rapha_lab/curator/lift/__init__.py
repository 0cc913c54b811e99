"""Lift one patient's program to a batch of patients by the table, checked and bounded before any record is read.

Lifted values have the patient in front, and no argument of a program can name that dimension: so no operation
mixes two patients, whatever the program is. That independence is what the proof of DP-SGD needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rapha_lab.curator.lift import gradients, layers, losses, reductions, shapes  # noqa: F401  (rules)
from rapha_lab.curator.lift.graph import Graph, refused
from rapha_lab.curator.lift.table import TABLE
from rapha_lab.protocol.errors import ProgramError
from rapha_lab.protocol.program import DTYPES, Node, Program, TensorSpec, at, check

__all__ = ["TABLE", "Lifted", "Limits", "lift"]

Tensors = Mapping[str, Tensor]
# one fixed shape of batch keeps a patient's rounding apart from the neighbours'; below 8 rows kernels differ
SMALLEST, LARGEST = 8, 256


@dataclass(frozen=True)
class Limits:
    """What a program may take.

    Attributes:
        parameters: numbers to train.
        memory: bytes for one microbatch, forward and backward.
        work: floating-point operations for one patient's value and gradient.
    """

    parameters: int = 1 << 27
    memory: int = 1 << 30
    work: int = 1 << 38


class Lifted:
    """A program that has passed all checks, ready for batches of patients.

    Attributes:
        microbatch: how many patients are computed at once, always; a function of the program alone.
    """

    def __init__(self, graph: Graph, microbatch: int, output: tuple[int, ...]) -> None:
        self.graph, self.microbatch, self.output = graph, microbatch, output
        self.program = graph.program

    def tensors(self, blob: bytes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and constants out of a safetensors blob, which must hold exactly what the program states.

        Raises:
            ProgramError: naming the tensor at fault.
        """
        try:
            held = load(blob)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ProgramError("The tensors cannot be read.", f"{error}.", field="tensors") from None
        specs = {spec.name: spec for spec in (*self.program.parameters, *self.program.constants)}
        for name in {*held} ^ {*specs}:
            why = "It is missing." if name in specs else "The program does not state it."
            raise ProgramError(f"The tensor {name} does not fit the program.", why, field=name)
        for name, t in held.items():
            if (list(t.shape), t.dtype) != (specs[name].shape, getattr(torch, specs[name].dtype)):
                raise ProgramError(f"The tensor {name} has another shape or dtype than stated.", field=name)
            if (
                t.is_floating_point()
                and name in {s.name for s in self.program.parameters}
                and not t.isfinite().all()
            ):
                raise ProgramError(
                    f"The parameter {name} is not finite.", "It holds NaN or infinity.", field=name
                )
        return tuple(
            {s.name: held[s.name] for s in part} for part in (self.program.parameters, self.program.constants)
        )  # type: ignore[return-value]

    def scores(self, parameters: Tensors, constants: Tensors, inputs: Tensors) -> Tensor:
        """The output for each patient, `(patients, *output)`, computed in padded microbatches."""
        count = len(next(iter(inputs.values())))
        parts = [torch.empty(0, *self.output)]
        for start in range(0, count, self.microbatch):
            rows = {
                name: padded(t[start : start + self.microbatch], self.microbatch)
                for name, t in inputs.items()
            }
            out = gradients.forward(self.graph, parameters, constants, rows)
            parts.append(out.expand(self.microbatch, *self.output)[: count - start])
        return torch.cat(parts)

    def gradients(self, parameters: Tensors, constants: Tensors, inputs: Tensors) -> dict[str, Tensor]:
        """Each patient's gradient by every parameter, materialised."""
        return gradients.per_patient(self.graph, parameters, constants, inputs)

    def clipped_sum(
        self, parameters: Tensors, constants: Tensors, inputs: Tensors, mask: Tensor, clip: float
    ) -> dict[str, Tensor]:
        """The sum of the masked patients' gradients, each scaled down to norm `clip`, in float64.

        Args:
            parameters: their values by name.
            constants: likewise.
            inputs: `(microbatch, *shape)` by name.
            mask: `(microbatch,)` booleans, False for padding.
            clip: the largest norm one patient may add.
        """
        return gradients.clipped_sum(self.gradients(parameters, constants, inputs), mask, clip)


def padded(rows: Tensor, size: int) -> Tensor:
    """The rows and zeros below them, `size` in all."""
    if len(rows) == size:
        return rows
    return torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])])


def lift(program: Program, *, loss: bool = True, limits: Limits = Limits()) -> Lifted:
    """Check a program against the table and the limits, on shapes alone.

    Args:
        program: one patient's computation.
        loss: whether it must be one number to differentiate; a score may have any shape.
        limits: what it may take.

    Raises:
        ProgramError: naming the operation and line, or the tensor, that cannot be computed.
    """
    check(program)
    if program.size > limits.parameters:
        why = f"It has {program.size:,} parameters; this site trains up to {limits.parameters:,}."
        raise ProgramError("The model is too large.", why, "Make it smaller.", field="parameters")
    graph = Graph(program)
    cost, output = _dry_run(graph, loss, limits)
    room = limits.memory // max(cost, 1)
    if room < SMALLEST:
        why = f"One patient takes {cost >> 20} MiB; {SMALLEST} at once may take {limits.memory >> 20} MiB."
        raise ProgramError(
            "The model is too large.", why, "Make its layers or inputs smaller.", field="program"
        )
    return Lifted(graph, min(LARGEST, 1 << (room.bit_length() - 1)), output)


def _dry_run(graph: Graph, loss: bool, limits: Limits) -> tuple[int, tuple[int, ...]]:
    """Bytes a patient needs and the output's shape, by running the rules on tensors without values."""
    program, size, spent = graph.program, 8, 0
    functions = {node.id: function for node, function, _ in graph.steps}

    def careful(node: Node, args: list[Any]) -> Any:
        nonlocal spent
        try:
            out = functions[node.id](*args)
            values = out if isinstance(out, tuple | list) else [out]
            for value in values:
                spent += _measured(value, size, limits)
        except ProgramError as error:
            raise ProgramError(
                f"{at(node)}: {error.what}", error.why, error.instead, field=node.op, line=node.line
            ) from None
        except Exception as error:
            raise refused(
                node, f"{str(error).splitlines()[0] if str(error) else type(error).__name__}."
            ) from None
        if flops.get_total_flops() > limits.work * size:
            raise ProgramError(
                "The model takes too much work.", f"It was counted up to {at(node)}.", field="program"
            )
        return out

    parameters = {s.name: _meta(s, size, trained=True) for s in program.parameters}
    values = parameters | {s.name: _meta(s, 1) for s in program.constants}
    values |= {s.name: _meta(s, size).unsqueeze(1) for s in program.inputs}
    with FlopCounterMode(display=False) as flops, torch.enable_grad():
        out = graph.run(values, careful)
        if not isinstance(out, Tensor):
            raise ProgramError("The program's output is no tensor.", field="output")
        if loss:
            _differentiate(out, list(parameters.values()))
    # forward values, their gradients, and each patient's own gradient by every parameter
    weights = sum(math.prod(s.shape) * DTYPES[s.dtype] for s in program.parameters)
    return 2 * spent // size + 2 * weights, tuple(out.shape[1:])


def _measured(value: Any, size: int, limits: Limits) -> int:
    if not isinstance(value, Tensor) or value.shape[0] not in (1, size):
        raise TypeError("it does not compute a tensor for each patient")
    if str(value.dtype).removeprefix("torch.") not in DTYPES:
        raise TypeError(f"it computes {value.dtype}")
    taken = value.numel() * value.element_size()
    if taken > limits.memory or value.dim() > 12:
        raise ProgramError("its value is too large.", f"{taken >> 20} MiB.", "Make it smaller.")
    return taken


def _meta(spec: TensorSpec, size: int, trained: bool = False) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    if trained and not dtype.is_floating_point:
        raise ProgramError(
            f"The parameter {spec.name} is {spec.dtype}.", "Only floats are trained.", field=spec.name
        )
    t = torch.empty(1, *spec.shape, dtype=dtype, device="meta").expand(size, *spec.shape)
    return t.requires_grad_() if trained else t


def _differentiate(out: Tensor, parameters: list[Tensor]) -> None:
    if out[0].numel() != 1 or not out.is_floating_point():
        why = f"It has shape {tuple(out.shape[1:])} and dtype {str(out.dtype)[6:]}."
        raise ProgramError(
            "A loss is one number for each patient.", why, "Reduce it with .mean().", field="output"
        )
    if not out.requires_grad:
        raise ProgramError(
            "The loss does not depend on any parameter.",
            "",
            "Check requires_grad and detach().",
            field="parameters",
        )
    try:
        torch.autograd.grad(out.sum(), parameters, allow_unused=True)
    except Exception as error:
        raise ProgramError(
            "The loss cannot be differentiated.", f"{str(error).splitlines()[0]}.", field="program"
        ) from None
