"""Lift one patient's program to a batch of patients, checked and bounded before any record is read.

Lifted values have the patient in front, and no argument of a program can name that dimension: so no operation
mixes two patients, whatever the program is. That independence is what the proof of DP-SGD needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rapha_lab.curator.lift import clipping, gradients, layers, losses, pools, recurrent, reductions, shapes  # noqa: F401
from rapha_lab.curator.lift.compiling import Step, compiled, is_kept
from rapha_lab.curator.lift.draws import DRAWS
from rapha_lab.curator.lift.even import Evenly
from rapha_lab.curator.lift.graph import Graph, draws, refused
from rapha_lab.curator.lift.parts import GROUP
from rapha_lab.curator.lift.routes import Routes
from rapha_lab.curator.lift.table import DRAWN, TABLE
from rapha_lab.protocol.errors import ProgramError, RefusedError
from rapha_lab.protocol.program import DTYPES, Node, Program, TensorSpec, at, check, refs, structure
from rapha_lab.protocol.tensors import Layout

__all__ = ["TABLE", "Lifted", "Limits", "Totals", "lift"]

Tensors = Mapping[str, Tensor]
# one fixed shape of batch keeps a patient's rounding apart from the neighbours'; below 8 rows kernels differ
SMALLEST, LARGEST = 8, 512
CHUNK = 1 << 27
"""Bytes that a microbatch may allocate in all its operations together, if that is enough for the smallest one."""
STORED, TOGETHER = 1 << 22, 32
"""Bytes of gradients that are written out at a time, so that they and what they are made of stay in the processor's
cache; and patients that a microbatch holds in any case. It holds no more than that has room for, except of recurrent
layers, whose steps are many small operations."""
LARGE = 1 << 20
"""Parameters from which on a sum of one group's gradients is held at a time."""


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


class Totals(dict[str, Tensor]):
    """Sums of gradients by parameter, float64.

    Attributes:
        flat: all of them in one vector, for one draw of noise.
        counted: how many patients' gradients were added, and how many of them whole, float64 (2,); without noise.
    """

    def __init__(self, wanted: Mapping[str, Sequence[int]]) -> None:
        self._wanted = wanted
        self.flat = torch.zeros(sum(map(math.prod, wanted.values())), dtype=torch.float64)
        self.counted = torch.zeros(2, dtype=torch.float64)
        super().__init__(self._views(self.flat))

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([math.prod(shape) for shape in self._wanted.values()])
        return {n: part.view(list(s)) for (n, s), part in zip(self._wanted.items(), parts, strict=True)}

    def cast(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """The sums in their parameters' dtypes."""
        made = {dtype: self._views(self.flat.to(dtype)) for dtype in {*dtypes.values()}}
        return {name: made[dtype][name] for name, dtype in dtypes.items()}


class Lifted:
    """A program that has passed all checks, ready for batches of patients.

    Attributes:
        microbatch: how many patients are computed at once, always; a function of the program alone.
        output: the shape of one patient's output.
        written: bytes of a patient's gradient that are written out before they are measured.
        paths: by parameter, how its gradient is computed and why so: outer, rows, stored, copy or none,
            as explained in `lift.gradients`, and the operations that use it.
        note: whether the step is compiled, and what that took.
    """

    def __init__(
        self,
        graph: Graph,
        routes: Routes,
        microbatch: int,
        output: tuple[int, ...],
        written: int,
        paths: dict[str, str],
    ) -> None:
        self.graph, self.routes, self.microbatch, self.output = graph, routes, microbatch, output
        self.written, self.paths, self.note = written, paths, "not compiled: too short a run to gain by it"
        self.program = graph.program
        self._step: Step = self._add
        self._drawn = DRAWS.drawn if any(map(draws, graph.program.nodes)) else nullcontext
        self._layout: Layout | None = None

    def tensors(self, blob: bytes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and constants out of a safetensors blob that holds exactly what the program states.

        Raises:
            ProgramError: naming the tensor at fault.
        """
        if (found := self._as_before(blob)) is not None:
            return found
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
        self._layout = Layout(blob)
        return self._named(held)

    def _as_before(self, blob: bytes) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Other numbers of the very tensors that passed before, byte for byte described alike; None if they are not."""
        if self._layout is None or not self._layout.uniform or (flat := self._layout.unpack(blob)) is None:
            return None
        # a sum that is finite has finite terms; one that overflowed says nothing
        if not math.isfinite(float(torch.frombuffer(flat, dtype=torch.float32).sum())):
            return None
        parts = self._layout.parts(np.frombuffer(flat, np.float32))
        return self._named({name: torch.from_numpy(part) for name, part in parts.items()})

    def _named(self, held: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parameters, constants = self.program.parameters, self.program.constants
        return {s.name: held[s.name] for s in parameters}, {s.name: held[s.name] for s in constants}

    def scores(self, parameters: Tensors, constants: Tensors, inputs: Tensors) -> Tensor:
        """The output for each patient, `(patients, *output)`, computed in padded microbatches."""
        count, values = len(next(iter(inputs.values()))), {**parameters, **constants}
        parts = [torch.empty(0, *self.output)]
        for start in range(0, count, self.microbatch):
            rows = {
                name: padded(t[start : start + self.microbatch], self.microbatch)
                for name, t in inputs.items()
            }
            with self._drawn():
                out = gradients.forward(self.graph, values, rows)
            parts.append(out.expand(self.microbatch, *self.output)[: count - start])
        return torch.cat(parts)

    def gradients(self, parameters: Tensors, constants: Tensors, inputs: Tensors) -> dict[str, Tensor]:
        """Each patient's gradient by each parameter the loss depends on: `(patients, *shape)`."""
        return gradients.per_patient(gradients.parts(self.graph, self.routes, parameters, constants, inputs))

    def clipped_sum(
        self,
        parameters: Tensors,
        constants: Tensors,
        inputs: Tensors,
        mask: Tensor,
        clip: float,
        totals: Totals | None = None,
    ) -> Totals:
        """The sum of the masked patients' gradients, each scaled down to norm `clip`, float64, and how many that left whole.

        Args:
            parameters: their values by name.
            constants: likewise.
            inputs: `(microbatch, *shape)` by name.
            mask: `(microbatch,)` booleans, False for padding.
            clip: the largest norm one patient may add.
            totals: what to add the sum to, in place; zeros if not given.
        """
        totals = self.zeros() if totals is None else totals
        norm = torch.full((), clip, dtype=torch.float64)
        with self._drawn():
            self._step(totals, parameters, constants, inputs, mask, norm, totals.counted)
        return totals

    def zeros(self) -> Totals:
        """Nothing yet, by parameter."""
        return Totals({spec.name: spec.shape for spec in self.program.parameters})

    def _add(
        self,
        totals: Tensors,
        parameters: Tensors,
        constants: Tensors,
        inputs: Tensors,
        mask: Tensor,
        clip: Tensor,
        counted: Tensor,
    ) -> None:
        found = gradients.parts(self.graph, self.routes, parameters, constants, inputs)
        self._into(totals, counted, *clipping.clipped_sum(found, mask, clip, self._together))

    @staticmethod
    def _into(totals: Tensors, counted: Tensor, sums: Tensors, more: Tensor) -> None:
        counted.add_(more)
        for name, t in sums.items():
            # piece by piece, since torch converts all that it adds to another dtype first
            for total, part in zip(
                totals[name].view(-1).split(LARGE), t.reshape(-1).split(LARGE), strict=True
            ):
                total.add_(part)

    @property
    def _together(self) -> int:
        """How many patients' gradients are written out at a time: a divisor of the microbatch.

        Half of them at most, so that few patients' take no more memory than training them plainly does; all if that is little.
        """
        if self.written * self.microbatch <= STORED // 4:
            return self.microbatch
        most = max(1, min(STORED // self.written, self.microbatch // 2))
        return next(n for n in range(most, 0, -1) if self.microbatch % n == 0)

    def _made(self, assemble: Callable[..., Any], example: tuple[Any, ...]) -> Step:
        """The clipped sum in machine code: in one piece if all is written out at once."""
        if self._together == self.microbatch:
            return assemble(self._add, *example)

        parts = partial(gradients.parts, self.graph, self.routes)
        return clipping.in_pieces(assemble, parts, self._into, self._together, example)

    @property
    def _shape(self) -> tuple[str, int]:
        """Programs that share it share a compiled step."""
        return structure(self.program), self.microbatch

    @property
    def compiled_before(self) -> bool:
        """Whether `compile` takes no time."""
        return is_kept(self._shape)

    def compile(
        self, parameters: Tensors, constants: Tensors, going: Callable[[], None] = lambda: None
    ) -> float | None:
        """Compile the clipped sum for its one shape; the seconds it took, or None if it stays as it is.

        `going` is called now and then meanwhile; what it raises ends the compiling.
        """
        generator = torch.Generator().manual_seed(0)
        batch = {spec.name: _made_up(spec, self.microbatch, generator) for spec in self.program.inputs}
        mask, clip = torch.ones(self.microbatch, dtype=torch.bool), torch.tensor(1.0, dtype=torch.float64)
        totals = self.zeros()
        example = (totals, {**parameters}, {**constants}, batch, mask, clip, totals.counted)
        fast = compiled(self._made, self._shape, example, going)
        if self._step == self._add or fast.step is None:
            self.note = fast.note  # of several runs in one job the first compiles
        self._step = fast.step or self._add
        return None if fast.step is None else fast.seconds

    def for_batches_of(self, most: int) -> int:
        """Let microbatches, no smaller than half, hold `most` patients with the least room to spare; how many there are."""
        largest = min(self.microbatch, -(-most // SMALLEST) * SMALLEST)
        sizes = range(largest, max(largest // 2, SMALLEST) - 1, -SMALLEST)
        self.microbatch = min(sizes, key=lambda size: -(-most // size) * size)
        return -(-most // self.microbatch)

    def selftest(self, parameters: Tensors, constants: Tensors) -> float:
        """Check on this machine that a made-up patient's gradient, and whether it is whole, has the same bits in any company.

        A kernel that rounds a row by its neighbours could be amplified until a patient moves another's part.

        Returns:
            About how many seconds one microbatch takes.

        Raises:
            RefusedError: if it does not; a function of program and machine alone.
        """

        def added(rows: Tensors, only: Tensor) -> list[Tensor]:
            totals = self.clipped_sum(parameters, constants, rows, only, 1.0)
            return [*totals.values(), totals.counted]

        return self._reproducible(added)

    def selftest_scores(self, parameters: Tensors, constants: Tensors) -> float:
        """The same for a made-up patient's score."""
        return self._reproducible(lambda rows, only: [self.scores(parameters, constants, rows)[only]])

    def _reproducible(self, compute: Callable[[Tensors, Tensor], list[Tensor]]) -> float:
        generator = torch.Generator().manual_seed(0)
        batch = {spec.name: _made_up(spec, self.microbatch, generator) for spec in self.program.inputs}
        took = []
        for slot in (0, self.microbatch // 2 + 1, self.microbatch - 1):
            only, seen = torch.arange(self.microbatch) == slot, []
            for company in (1.0, 0.0, 1e30, float("nan")):
                rows = {name: _beside(t, only, company) for name, t in batch.items()}
                with DRAWS.alone():
                    torch.manual_seed(0)
                    began = time.perf_counter()
                    seen.append(self._tried(compute, rows, only))
                took.append(time.perf_counter() - began)
            # a score that is no number is none in any company
            if not all(
                torch.equal(mine.nan_to_num(), again.nan_to_num())
                for other in seen
                for mine, again in zip(seen[0], other, strict=True)
            ):
                raise RefusedError(
                    "This machine does not compute this model reproducibly.",
                    "What is computed of a patient depended on the rest of the batch, so privacy is not proved.",
                    "Tell the site's custodian.",
                )
        return min(took)

    @staticmethod
    def _tried(
        compute: Callable[[Tensors, Tensor], list[Tensor]], rows: Tensors, only: Tensor
    ) -> list[Tensor]:
        """What is computed of made-up patients; what shapes alone did not tell, as of dtypes, is found here."""
        try:
            return compute(rows, only)
        except Exception as error:
            why = f"On made-up patients: {str(error).partition(chr(10))[0].rstrip('.')}."
            instead = "Give its tensors one dtype, and none of them a dimension of nothing."
            raise ProgramError("The program cannot be computed.", why, instead, field="program") from None


def _beside(rows: Tensor, only: Tensor, company: float) -> Tensor:
    """The rows with all but one multiplied by `company`."""
    mine = only.reshape(-1, *[1] * (rows.dim() - 1))
    other = rows * company if rows.is_floating_point() else rows * int(company == 1)
    return torch.where(mine, rows, other)


def _made_up(spec: TensorSpec, count: int, generator: torch.Generator) -> Tensor:
    shape, dtype = (count, *spec.shape), getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.rand(shape, generator=generator, dtype=dtype)
    return torch.randint(2, shape, generator=generator).to(dtype)


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
    routes = Routes(graph)
    cost, output, found, written = _dry_run(graph, routes, loss, limits)
    # rows, those that count, their sum and all sums
    if cost * SMALLEST + 4 * written > limits.memory:
        why = f"One patient takes {cost >> 20} MiB; {SMALLEST} at once may take {limits.memory >> 20} MiB."
        raise ProgramError(
            "The model is too large.", why, "Make its layers or inputs smaller.", field="program"
        )
    steps = any(node.op.split(".")[1:2] == [name] for node in program.nodes for name in recurrent.CELLS)
    # a recurrent layer's steps are many small operations, which are worth it for many patients at once
    room = min(CHUNK * (2 if steps else 1), limits.memory) // max(cost, 1) // SMALLEST * SMALLEST
    if not steps:
        room = min(room, max(TOGETHER, STORED // max(written, 1) // SMALLEST * SMALLEST))
    most = LARGEST if program.size < LARGE and not written else GROUP
    return Lifted(graph, routes, min(most, max(SMALLEST, room)), output, written, routes.explain(found))


def _dry_run(
    graph: Graph, routes: Routes, loss: bool, limits: Limits
) -> tuple[int, tuple[int, ...], gradients.Found, int]:
    """Bytes that one patient adds, the output's shape, the gradients and bytes of them written out, on no values."""
    program = graph.program
    made: dict[str, Any] = {}
    found: gradients.Found = {}
    apart = _keeps_apart(program)

    def checked(node: Node, compute: Callable[[], Any]) -> Any:
        try:
            out = compute()
            for value in out if isinstance(out, tuple | list) else [out]:
                _measured(value, limits)
            apart(node, out, SMALLEST)
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise refused(node, f"{text.rstrip('.')}.") from None
        if meter.flops.get_total_flops() > limits.work * SMALLEST or meter.bytes > limits.memory * SMALLEST:
            raise ProgramError(
                "The model is too large.", f"It was counted up to {at(node)}.", field="program"
            )
        made[node.id] = out
        return out

    parameters = {s.name: _meta(s, trained=True) for s in program.parameters}
    constants = {s.name: _meta(s) for s in program.constants}
    inputs = {s.name: _meta(s, SMALLEST) for s in program.inputs}
    evenly = Evenly()

    def differentiate() -> gradients.Found:
        with evenly:
            return gradients.parts(graph, routes, parameters, constants, inputs, checked)

    written = 0
    with Meter() as meter, torch.device("meta"):
        if loss:
            found, written = _loss(differentiate, meter, graph, made)
        else:
            with evenly:
                gradients.forward(graph, {**parameters, **constants}, inputs, checked)
    graph.uneven = evenly.numbers // SMALLEST
    _same_for_more(graph, {**parameters, **constants}, made, apart)
    out = made[program.output]
    if not isinstance(out, Tensor):
        raise ProgramError("The program's output is no tensor.", field="output")
    return meter.bytes // SMALLEST, tuple(out.shape[1:]), found, written


_FIRST = {
    f"aten.{name}"
    for name in ("view_as.default", "reshape_as.default", "expand_as.default", "type_as.default", "to.other")
}
"""Of their second argument only the shape or the dtype is read."""
_SHAPE = (
    {
        f"aten.{name}.default"
        for made in ("zeros", "ones", "full", "empty")
        for name in (f"{made}_like", f"new_{made}")
    }
    | {"aten.zero.default", "aten.fill.Scalar"}
    | DRAWN
)
"""Of their argument too."""


def _keeps_apart(program: Program) -> Callable[[Node, Any, int], None]:
    """Checks in a dry run of so many patients that what is made of their values is one value for each of them.

    If it were one that all share, it would be made of all of theirs.
    """
    theirs = {spec.name for spec in program.inputs}

    def apart(node: Node, out: Any, size: int) -> None:
        read = [] if node.op in _SHAPE else list(refs(node))[: 1 if node.op in _FIRST else None]
        if theirs.isdisjoint(read):
            return
        theirs.add(node.id)
        if any(len(value) != size for value in _several(out)):
            raise TypeError("it mixes patients")

    return apart


def _same_for_more(
    graph: Graph, values: Tensors, made: Mapping[str, Any], apart: Callable[[Node, Any, int], None]
) -> None:
    """Run dry with one more patient: a value whose own shape knew how many there are would be made of several."""

    def checked(node: Node, compute: Callable[[], Any]) -> Any:
        try:
            out = compute()
            apart(node, out, SMALLEST + 1)
            if [t.shape[1:] for t in _several(out)] != [t.shape[1:] for t in _several(made[node.id])]:
                raise TypeError("it mixes patients")
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise refused(node, f"{text.rstrip('.')}.") from None
        return out

    inputs = {s.name: _meta(s, SMALLEST + 1) for s in graph.program.inputs}
    with torch.device("meta"):
        gradients.forward(graph, values, inputs, checked)


def _several(value: Any) -> Sequence[Tensor]:
    return value if isinstance(value, tuple | list) else [value]


_VIEW = torch.ops.aten._unsafe_view.default


class Meter(TorchDispatchMode):
    """Counts what operations allocate and compute, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.flops = 0, FlopCounterMode(display=False)

    def __enter__(self) -> Meter:
        self.flops.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.flops.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # the schema of that view does not say that it is one
        if func is not _VIEW and not any(result.alias_info for result in func._schema.returns):
            values = out if isinstance(out, tuple | list) else [out]
            self.bytes += sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))
        return out


def _measured(value: Any, limits: Limits) -> None:
    if not isinstance(value, Tensor) or value.dim() < 1 or value.shape[0] not in (1, SMALLEST):
        raise TypeError("it does not compute a tensor for each patient")
    if str(value.dtype).removeprefix("torch.") not in DTYPES:
        raise TypeError(f"it computes {value.dtype}")
    if value.numel() * value.element_size() > limits.memory or value.dim() > 12:
        raise ValueError("its value is too large")


def _meta(spec: TensorSpec, *size: int, trained: bool = False) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    if trained and not dtype.is_floating_point:
        raise ProgramError(
            f"The parameter {spec.name} is {spec.dtype}.", "Only floats are trained.", field=spec.name
        )
    return torch.empty((*size, *spec.shape), dtype=dtype, device="meta")


def _loss(
    differentiate: Callable[[], gradients.Found], meter: Meter, graph: Graph, made: dict[str, Any]
) -> tuple[gradients.Found, int]:
    """Differentiate once, for the errors it gives; and bytes of one patient's gradients that are written out."""
    why, written = "", 0
    try:
        found = differentiate()
        clipping.measured(clipping.divided(found)[0], SMALLEST)
        bytes, written = meter.bytes, clipping.written(found, lambda: meter.bytes) // SMALLEST
        meter.bytes = bytes  # what is written out is forgotten
    except ProgramError:
        raise
    except Exception as error:
        found, why = {}, str(error).partition("\n")[0]
    out = made.get(graph.program.output)
    if isinstance(out, Tensor) and (out[0].numel() != 1 or not out.is_floating_point()):
        why = f"It has shape {tuple(out.shape[1:])} and dtype {str(out.dtype)[6:]}."
        raise ProgramError(
            "A loss is one number for each patient.", why, "Reduce it with .mean().", field="output"
        )
    if not found:
        raise ProgramError(
            "The loss cannot be differentiated by any parameter.", why, "Check requires_grad and detach().",
            field="parameters",
        )  # fmt: skip
    return found, written
