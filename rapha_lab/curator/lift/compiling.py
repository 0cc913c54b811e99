"""The lifted step as one compiled graph, kept for later jobs of the same shape; eager computation if that fails.

Only our own lifted code is compiled, from the checked program: nothing a session sends is. The step is traced
with its backward pass, norms and sums into one graph of plain tensor operations, on shapes alone, and the code
made of it is called as it is: shapes are fixed, so there is nothing to guard.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import math
import os
import shlex
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph_module import GraphModule

from rapha_lab.curator.lift.cells import cells_by
from rapha_lab.curator.lift.draws import DRAWS
from rapha_lab.curator.lift.stored import KEPT

__all__ = [
    "NODES",
    "SECONDS",
    "Compiled",
    "Make",
    "Step",
    "assembled",
    "compiled",
    "flush_denormals",
    "is_kept",
    "keep_pages",
]

Step = Callable[..., None]
"""`(totals, parameters, constants, inputs, mask, clip, counted)`: adds a microbatch's clipped sum and counts to them."""

Make = Callable[[Callable[..., Callable[..., Any]], tuple[Any, ...]], Step]
"""`(assemble, example)`: makes a step. `assemble(function, *arguments)` makes machine code of a function of dicts of
tensors, then tensors, for arguments like these; it may return tensors."""

NODES = 2_500
"""Operations above which a step is not compiled: a compiler takes some 30 ms for each, so more than a minute."""

SECONDS = 120.0
"""What compiling may take, however busy the machine; then the job goes on without."""

WORTH = 1 << 21
"""Floating-point operations from which on oneDNN multiplies two matrices faster than the default library."""

_LINEAR = torch.ops.mkldnn._linear_pointwise.default
_AS_THEY_ARE = (
    _LINEAR,  # which the compiler takes for constant weights only
    torch.ops.aten.scatter_add.default,  # its loops would go through one patient's numbers in a row, see `even.scatter_add`
    torch.ops.aten.avg_pool2d_backward.default,  # which it computes number by number, anew wherever one is read
    torch.ops.aten.avg_pool3d_backward.default,
)
"""Operations that the compiler calls as they are."""


@dataclass(frozen=True)
class Compiled:
    """What came of compiling a step.

    Attributes:
        step: the same as the eager one, None if it stays as it is.
        seconds: what compiling took; 0 where the step was there already.
        note: both in words.
    """

    step: Step | None
    seconds: float
    note: str


_BEFORE = Compiled(None, 0.0, "compiled before, for a model of the same shape")
_steps: dict[tuple[Any, ...], Compiled] = {}
_KEPT = 32
_turn = threading.RLock()
PATIENCE = 120.0
"""Seconds that a job waits for others' compiling; then it goes on without."""
PAUSE = 0.5
"""Seconds after which a job that waits or compiles looks whether it is still wanted."""

Going = Callable[[], None]
"""Called now and then meanwhile; raises if the job is to end."""


def _unasked() -> None:
    """Nobody would end it."""


class _Busy(Exception):
    """Others compile."""


@contextmanager
def _alone(going: Going) -> Iterator[None]:
    """Nobody else compiles meanwhile: tracing, the compiler's settings and its rules are the process's, not a thread's."""
    due = time.monotonic() + PATIENCE
    while not _turn.acquire(timeout=PAUSE):
        going()
        if time.monotonic() > due:
            raise _Busy
    try:
        yield
    finally:
        _turn.release()


def is_kept(key: tuple[Any, ...]) -> bool:
    """Whether a step of this key was compiled, or failed to be, so that `compiled` takes no time."""
    return key in _steps


def compiled(make: Make, key: tuple[Any, ...], example: tuple[Any, ...], going: Going = _unasked) -> Compiled:
    """A step compiled for arguments shaped as in `example`, if there is a compiler that takes it in `SECONDS`.

    Args:
        make: makes it, of functions without data-dependent control flow.
        key: equal for steps that compute the same.
        example: made-up arguments.
        going: what it raises ends the compiling, of which nothing is kept.
    """
    try:
        with _alone(going):
            if key not in _steps:
                while len(_steps) >= _KEPT:
                    del _steps[next(iter(_steps))]
                _steps[key] = made = _tried(make, example, going)
                return made
            kept = _steps[key]
            return kept if kept.step is None else dataclasses.replace(_BEFORE, step=kept.step)
    except _Busy:
        return Compiled(None, 0.0, "not compiled: others' models were being compiled")


def _tried(make: Make, example: tuple[Any, ...], going: Going) -> Compiled:
    began = time.monotonic()
    try:
        fast = _compile(make, example, going)
    except Exception:
        going()  # a job that was ended says nothing of the model
        # whatever a compiler stumbles on, the step computes without it
        late = time.monotonic() - began > SECONDS
        why = (
            f"it takes more than {SECONDS:.0f} s"
            if late
            else "no compiler here, or it does not take this model"
        )
        return Compiled(None, 0.0, f"not compiled: {why}")
    seconds = time.monotonic() - began
    return Compiled(fast, seconds, f"compiled in {seconds:.0f} s")


def _compile(make: Make, example: tuple[Any, ...], going: Going) -> Step:
    due = time.monotonic() + SECONDS

    def assemble(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        names = [[*part] for part in arguments if isinstance(part, Mapping)]

        def by_position(*flat: Tensor) -> Any:
            tensors, parts = iter(flat), []
            for part in names:
                parts.append({name: next(tensors) for name in part})
            return function(*parts, *tensors) or ()

        fast = assembled(by_position, _flat(arguments, names), going, due - time.monotonic())
        return lambda *arguments: fast(_flat(arguments, names))

    def cell(function: Callable[..., Any], tensors: list[Tensor], in_order: bool) -> Callable[..., Any]:
        return assembled(function, tensors, going, due - time.monotonic(), in_order)

    with cells_by(cell):
        run = make(assemble, example)
        with DRAWS.drawn():
            run(*example)
    return run


def _flat(arguments: Sequence[Any], names: list[list[str]]) -> list[Tensor]:
    parts = zip(arguments, names, strict=False)
    return [part[name] for part, own in parts for name in own] + list(arguments[len(names) :])


def assembled(
    function: Callable[..., Any], example: list[Tensor], going: Going = _unasked, seconds: float | None = None,
    in_order: bool = False,
) -> Callable[[list[Tensor]], Any]:  # fmt: skip
    """Machine code for a function of tensors of these very shapes; it takes them as a list, which it empties.

    It may take `SECONDS`, or so many. With `in_order`, one thread computes it: others would add up in any order.

    Raises:
        Exception: whatever the compiler says.
    """
    _ready()
    import torch._inductor.config as inductor
    import torch._inductor.lowering  # some decompositions look there
    from torch._inductor.decomposition import select_decomp_table

    with (
        _alone(going),
        _bounded(SECONDS if seconds is None else seconds, going),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        graph = make_fx(function, tracing_mode="fake", decomposition_table=select_decomp_table())(*example)
        graph.graph.eliminate_dead_code()
        if sum(map(_computes, graph.graph.nodes)) > NODES:
            raise ValueError("the graph is too large to compile")
        _faster_products(graph)
        graph.recompile()
        given = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
        with inductor.patch({"cpp.threads": 1} if in_order else {}):
            return _machine_code(graph, given)


def _computes(node: Any) -> bool:
    """Whether there is anything to compile: a view is none."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not any(result.alias_info for result in schema.returns)


@contextmanager
def _bounded(seconds: float, going: Going = _unasked) -> Iterator[None]:
    """Raises TimeoutError in this thread's tracing or compiling once it takes longer than that, or what `going` raises.

    Nearly all of the time goes by in the C++ compiler's processes, which are ended; for the rest, what tracing and
    the compiler's own stages call all the time looks at the clock. It raises once a second at most, so that what
    is tidied up on the way out can be.
    """
    import torch._inductor.cpp_builder as builder
    from torch._inductor.virtualized import Virtualized
    from torch._subclasses.fake_tensor import FakeTensorMode

    mine, due, look = threading.get_ident(), time.monotonic() + seconds, time.monotonic() + PAUSE

    def watching(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal due, look
            # with False, handlers are put back
            if (
                (now := time.monotonic()) > min(due, look)
                and threading.get_ident() == mine
                and args[-1] is not False
            ):
                if now > due:
                    due = now + 1
                    raise TimeoutError
                look = now + 1
                going()
            return function(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for owner, name in ((Virtualized, "_get_handler"), (FakeTensorMode, "__torch_dispatch__")):
            patches.enter_context(patch.object(owner, name, watching(getattr(owner, name))))
        run = builder._run_compile_cmd

        def timed(command: str, folder: str) -> None:
            left = max(due - time.monotonic(), 0.01)
            try:
                _watched(run, f"{left:.2f} {command}", folder, going)  # which ends what a driver starts too
            except BaseException:
                _forget(command, folder)
                raise

        patches.enter_context(patch.object(builder, "_run_compile_cmd", timed))
        yield


def _watched(run: Callable[[str, str], None], command: str, folder: str, going: Going) -> None:
    """Run a compiler's process as `run` does, and end it with what `going` raises."""
    number = Path(folder, f"{time.monotonic_ns()}.pid")
    # the shell becomes `timeout`, under the number and since the time that it has told, and that passes on what it is sent
    script = 'read -r it < /proc/$$/stat; echo "$it" > "$0"; exec timeout --signal=KILL "$@"'
    told = f"sh -c {shlex.quote(script)} {shlex.quote(str(number))} {command}"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, told, folder)
        try:
            while not wait([running], PAUSE).done:
                going()
        except BaseException:
            with suppress(OSError, IndexError):  # it has not begun, or ended by itself
                _end(number.read_text())
            raise
        finally:
            number.unlink(missing_ok=True)
    running.result()


def _forget(command: str, folder: str) -> None:
    """Remove what a compiler that was ended has written by half: a later job would take it for whole, and load it."""
    for option, path in pairwise(shlex.split(command)):
        if option == "-o":
            Path(folder, path).unlink(missing_ok=True)


def _end(told: str) -> None:
    """Ask the process of which this was /proc/PID/stat to end, and no other that has its number by now."""
    number = told.split()[0]
    held = os.pidfd_open(int(number))
    try:
        if _since(Path(f"/proc/{number}/stat").read_text()) == _since(told):
            signal.pidfd_send_signal(held, signal.SIGTERM)
    finally:
        os.close(held)


def _since(stat: str) -> str:
    """When a process began, which comes twenty fields after its name, whatever is in that."""
    return stat.rpartition(")")[2].split()[19]


def _machine_code(graph: GraphModule, example: list[Tensor]) -> Callable[[list[Tensor]], Any]:
    import torch._inductor.config as inductor
    from torch._inductor.compile_fx import compile_fx_inner

    with ExitStack() as settings:
        # no pool of worker processes beside the one that holds records, torch's own random numbers in dropout, and images
        # as they are: convolutions gain less by channels that lie together than all else around them loses
        settings.enter_context(
            inductor.patch(compile_threads=1, fallback_random=True, layout_optimization=False)
        )
        for operation in _AS_THEY_ARE:
            settings.enter_context(_called_as_it_is(operation))
        settings.enter_context(_held_in_memory(KEPT))
        return compile_fx_inner(graph, example)


def _called_as_it_is(operation: Any) -> Any:
    """Keeps the compiler from rewriting an operation."""
    from torch._inductor.lowering import fallback_handler, lowerings

    return patch.dict(lowerings, {operation: fallback_handler(operation)})


def _held_in_memory(operation: Any) -> Any:
    """Has the compiler write an operation's argument to memory, from where all that use it read it."""
    from torch._inductor.ir import ExternKernel
    from torch._inductor.lowering import lowerings

    return patch.dict(lowerings, {operation: ExternKernel.require_contiguous})


def keep_pages() -> None:
    """Let the C library keep freed buffers up to a gigabyte: else each step gives them back and faults them in again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim, mmap, most = -1, -3, 1 << 30
        mallopt(mmap, most)
        mallopt(trim, most)


@cache
def _ready() -> None:
    """What must be there before anything is compiled, and does not depend on what."""
    _own_cache()  # before anything of the compiler is imported, which makes a folder of its own
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    pick_vec_isa()  # tries the compiler; a try cut short would count as the processor's want of instructions


def flush_denormals() -> None:
    """Take numbers nearer to zero than 1e-38 for zero, in this thread and all that it starts.

    Processors take up to thirty times as long for them, by which the time of a step would tell of its numbers.
    """
    torch.set_flush_denormal(True)


@cache
def _own_cache() -> None:
    """A folder for the compiler's files that no one else can write to: what lies there is run."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    folder = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="rapha-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _faster_products(graph: GraphModule) -> None:
    """Let oneDNN multiply float32 matrices: on processors whose maker is not the default library's, twice as fast."""
    if not torch.backends.mkldnn.is_available():
        return
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target is aten.mm.default:
            bias, (a, b) = None, node.args
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, a, b = node.args
            if bias.meta["val"].dim() != 1:
                continue
        else:
            continue
        left, right = a.meta["val"], b.meta["val"]
        work = 2 * math.prod(left.shape) * right.shape[1]
        if left.dtype != torch.float32 or work < WORTH or min(*left.shape, right.shape[1]) < 8:
            continue
        with graph.graph.inserting_before(node):
            if left.stride(1) != 1:  # oneDNN would turn it in a pass of its own
                a = graph.graph.call_function(KEPT, (a,))
                a.meta["val"] = left.contiguous()
            if not (right.is_contiguous() or right.t().is_contiguous()):  # a thousand times slower
                b = graph.graph.call_function(KEPT, (b,))
                b.meta["val"] = right = right.contiguous()
            turned = graph.graph.call_function(aten.permute.default, (b, [1, 0]))
            turned.meta["val"] = right.t()
            product = graph.graph.call_function(_LINEAR, (a, turned, bias, "none", [], ""))
            product.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(product)
        graph.graph.erase_node(node)
