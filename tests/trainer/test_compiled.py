"""A compiled step computes what the eager one does, is kept for later jobs, and failing leaves the eager one."""

from __future__ import annotations

import math
import os
import random
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import lifted, node, program
from test_clipping import CLIP, norm, random_program
from test_models import MODELS
from torch import Tensor, nn
from torch._inductor import cpp_builder
from torch._inductor.exc import CppCompileError
from torch._inductor.runtime.cache_dir_utils import cache_dir

from rapha_lab.curator import lift as lift_module
from rapha_lab.curator import noise
from rapha_lab.curator.lift import Totals, clipping, compiling, gradients, lift
from rapha_lab.curator.lift.stored import KEPT
from rapha_lab.curator.mechanisms import train


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The traced graph as it is, without making machine code of it."""
    monkeypatch.setattr(compiling, "_machine_code", lambda graph, example: lambda tensors: graph(*tensors))
    monkeypatch.setattr(compiling, "_steps", {})


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["cnn with group norm", "embedding and mlp", "attention", "gru", "products"])
def test_the_traced_step_gives_the_same_sums(name: str) -> None:
    """Traced with its backward pass into one graph, to the last digits."""
    make, loss, xs, ys = MODELS[name]
    torch.manual_seed(5)
    model, x, y = make(), xs(), ys()
    model(x)
    it, parameters, constants = lifted(model, loss, x, y)
    it.microbatch = 10
    batch = {"x": torch.cat([x, xs()]), "target": torch.cat([y, ys()])}
    mask = torch.arange(10) != 4
    eager = it.clipped_sum(parameters, constants, batch, mask, 0.3)
    assert it.compile(parameters, constants) is not None
    fast = it.clipped_sum(parameters, constants, batch, mask, 0.3)
    for parameter, t in fast.items():
        torch.testing.assert_close(t, eager[parameter], rtol=1e-5, atol=1e-7)
    assert torch.equal(fast.counted, eager.counted)


@pytest.mark.parametrize(
    "name", ["gru", "lstm", "tied weights", "weights made of others", "weight norm and cross-attention"]
)
def test_machine_code_of_a_few_patients_at_a_time_gives_the_same_sums(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever one patient's numbers are, the others' in its group are added as they were."""
    make, loss, xs, ys = MODELS[name]
    torch.manual_seed(5)
    model, x, y = make(), xs(), ys()
    model(x)
    it, parameters, constants = lifted(model, loss, x, y)
    it.microbatch = 10
    batch = {"x": torch.cat([x, xs()]), "target": torch.cat([y, ys()])}
    if x.is_floating_point():
        batch["x"][3] = math.nan
    mask = torch.arange(10) != 4
    eager = it.clipped_sum(parameters, constants, batch, mask, 0.3)
    monkeypatch.setattr(compiling, "_steps", {})
    monkeypatch.setattr(lift_module, "STORED", 5 * it.written)
    assert it.compile(parameters, constants) is not None
    fast = it.clipped_sum(parameters, constants, batch, mask, 0.3)
    for parameter, t in fast.items():
        torch.testing.assert_close(t, eager[parameter], rtol=1e-5, atol=1e-7)
    assert torch.equal(fast.counted, eager.counted)
    assert int(fast.counted[0]) == 9 - x.is_floating_point()


def test_sums_over_groups_are_as_exact_as_the_gradients() -> None:
    """In float64 they were added up in float32."""
    nodes = [node("l", "linear.default", "@x", "@w"), node("y", "sum.default", "@l")]
    it = lift(program({"x": [3, 5]}, {"w": [4, 5]}, nodes))
    draw = torch.Generator().manual_seed(0)
    w, x = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((4, 5), (12, 3, 5)))
    totals, mask, clip = it.zeros(), torch.ones(12, dtype=torch.bool), torch.tensor(1.0, dtype=torch.float64)
    parts = partial(gradients.parts, it.graph, it.routes)
    given = {"w": w}, {}, {"x": x}, mask, clip
    step = clipping.in_pieces(lambda f, *_: f, parts, it._into, 4, (totals, *given, totals.counted))
    step(totals, *given, totals.counted)
    expected = it.clipped_sum({"w": w}, {}, {"x": x}, mask, 1.0)
    torch.testing.assert_close(totals["w"], expected["w"], rtol=1e-14, atol=0)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN multiplies")
def test_a_factor_with_gaps_between_its_rows_is_copied_for_the_faster_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """oneDNN takes a thousand times as long for it."""
    seen = list[torch.fx.GraphModule]()
    monkeypatch.setattr(compiling, "_machine_code", lambda graph, example: seen.append(graph))
    compiling.assembled(lambda a, b: (a @ b[:, :64],), [torch.ones(256, 192), torch.ones(192, 128)])
    (product,) = (n for n in seen[0].graph.nodes if n.target is compiling._LINEAR)
    assert product.args[1].args[0].target is KEPT
    given = torch.rand(256, 192), torch.rand(192, 128)
    torch.testing.assert_close(seen[0](*given)[0], given[0] @ given[1][:, :64])


@pytest.mark.usefixtures("quick")
def test_a_second_job_of_the_same_shape_starts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled step is found by the graph's structure; weights are arguments."""
    make, loss, xs, ys = MODELS["logistic"]
    x, y = xs(), ys()
    it, parameters, constants = lifted(make(), loss, x, y)
    assert it.compile(parameters, constants) is not None
    monkeypatch.setattr(compiling, "_compile", None)
    again, parameters, constants = lifted(make(), loss, x, y)
    assert again.compile(parameters, constants) == 0
    it.microbatch = again.microbatch
    assert again._step is it._step


@pytest.mark.usefixtures("quick")
def test_a_step_of_other_slots_or_numbers_is_compiled_for_itself() -> None:
    """Machine code has its shapes and numbers written in: on other arguments it would read what is not there."""
    make, loss, xs, ys = MODELS["logistic"]
    model, x, y = make(), xs(), ys()
    it, parameters, constants = lifted(model, loss, x, y)
    assert it.compile(parameters, constants) is not None
    same, *_ = lifted(model, loss, x, y)
    assert same.compiled_before
    same.microbatch += 8
    assert not same.compiled_before
    twice, *_ = lifted(model, lambda out, target: 2 * loss(out, target), x, y)
    thrice, *tensors = lifted(model, lambda out, target: 3 * loss(out, target), x, y)
    assert not twice.compiled_before
    assert thrice.compile(*tensors) is not None
    assert not twice.compiled_before


@pytest.mark.usefixtures("quick")
def test_a_short_run_uses_a_compiled_step_that_is_there_and_makes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiling pays for a long run only; what an earlier one left is free, for a loop as for a fit."""
    monkeypatch.setattr(train, "compile_noise", lambda assembled: True)
    make, loss, xs, ys = MODELS["logistic"]
    x, y, said = xs(), ys(), []

    def prepared(microbatches: int) -> str:
        it, *tensors = lifted(make(), loss, x, y)
        it.for_batches_of(64)
        for _ in range(2):  # as when one job trains several times
            train.prepare(it, *tensors, microbatches, lambda steps, doing: said.append((steps, doing)))
        return it.note

    assert "too short" in prepared(1)
    assert set(said) == {(0, train.TESTING)}
    assert prepared(10**9).startswith("compiled in")
    assert set(said) == {(0, train.TESTING), (0, train.COMPILING)}  # what its owner reads meanwhile
    said.clear()
    assert prepared(1) == "compiled before, for a model of the same shape"
    assert set(said) == {(0, train.TESTING)}


@pytest.mark.usefixtures("quick")
def test_what_did_not_compile_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minutes are lost once, not by every job of that shape."""
    tries = []

    def never(*args: object) -> None:
        tries.append(args)
        raise RuntimeError("no code for this")

    monkeypatch.setattr(compiling, "_machine_code", never)
    make, loss, xs, ys = MODELS["logistic"]
    x, y = xs(), ys()
    for _ in range(2):
        it, parameters, constants = lifted(make(), loss, x, y)
        assert it.compile(parameters, constants) is None
        assert it.note.startswith("not compiled")
    assert len(tries) == 1


@pytest.mark.parametrize("seconds", [0.05, 0.5])
def test_compiling_ends_when_its_time_is_up(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is traced, or in the compiler; nothing of it is left that would change what is computed next."""
    compiling._ready()
    monkeypatch.setattr(compiling, "_steps", {})
    monkeypatch.setattr(compiling, "SECONDS", seconds)
    make, loss, xs, ys = MODELS["text transformer"]
    x, y = xs(), ys()
    it, parameters, constants = lifted(make(), loss, x, y)
    rows, mask = {"x": x, "target": y}, torch.ones(5, dtype=torch.bool)
    eager = it.clipped_sum(parameters, constants, rows, mask, 1.0)
    assert it.compile(parameters, constants) is None
    assert "more than" in it.note
    for name, t in it.clipped_sum(parameters, constants, rows, mask, 1.0).items():
        assert torch.equal(t, eager[name])
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.is_grad_enabled()


def test_the_compilers_processes_end_with_its_time(tmp_path: Path) -> None:
    """Those that it started too: a driver's own children would go on for as long as they like."""
    with compiling._bounded(0.5), pytest.raises(CppCompileError):
        cpp_builder.run_compile_cmd(DRIVER, str(tmp_path))
    assert_gone(tmp_path)


class EndedError(Exception):
    """As a researcher's cancelling, or a veto."""


def going(times: int) -> Callable[[], None]:
    """Goes on so often, and no longer."""
    left = iter(range(times))

    def look() -> None:
        if next(left, None) is None:
            raise EndedError

    return look


def test_the_compilers_processes_end_with_the_job(tmp_path: Path) -> None:
    """And do not keep who cancelled it waiting for two minutes."""
    with compiling._bounded(100, going(1)), pytest.raises(EndedError):
        cpp_builder.run_compile_cmd(DRIVER, str(tmp_path))
    assert_gone(tmp_path)


@pytest.mark.parametrize(("seconds", "looks"), [(0.5, 100), (100, 1)])
def test_nothing_is_left_of_what_a_compiler_wrote_by_half(seconds: float, looks: int, tmp_path: Path) -> None:
    """By its time or with the job: the next job that needs the same code would find it there and load it."""
    written, look = tmp_path / "half.so", going(looks)
    with (
        compiling._bounded(seconds, lambda: look() if written.exists() else None),
        pytest.raises((CppCompileError, EndedError)),
    ):
        cpp_builder.run_compile_cmd(f"sh -c 'echo half > $1; sleep 60' -o {written}", str(tmp_path))
    assert not written.exists()


def test_another_process_under_the_compilers_number_is_left_alone() -> None:
    """It began at another time."""
    with subprocess.Popen(["/bin/sleep", "60"]) as other:
        told = Path(f"/proc/{other.pid}/stat").read_text()
        name, _, fields = told.rpartition(")")
        parts = fields.split()
        compiling._end(f"{name}) {' '.join([*parts[:19], str(int(parts[19]) - 1), *parts[20:]])}")
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.2)
        compiling._end(told)
        assert other.wait(10) == -signal.SIGTERM


@pytest.mark.usefixtures("quick")
def test_a_job_that_is_ended_ends_its_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is traced, too; it counts for no other job of the shape, and changes nothing that is computed next."""
    compiling._ready()
    monkeypatch.setattr(compiling, "PAUSE", 0.01)
    make, loss, xs, ys = MODELS["text transformer"]
    x, y = xs(), ys()
    it, parameters, constants = lifted(make(), loss, x, y)
    rows, mask = {"x": x, "target": y}, torch.ones(5, dtype=torch.bool)
    eager = it.clipped_sum(parameters, constants, rows, mask, 1.0)
    with pytest.raises(EndedError):
        it.compile(parameters, constants, going(0))
    assert not it.compiled_before
    for name, t in it.clipped_sum(parameters, constants, rows, mask, 1.0).items():
        assert torch.equal(t, eager[name])
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.is_grad_enabled()


def test_a_job_that_is_ended_waits_for_no_others_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may take as long as theirs."""
    monkeypatch.setattr(compiling, "_steps", {})
    make, loss, xs, ys = MODELS["logistic"]
    it, parameters, constants = lifted(make(), loss, xs(), ys())
    with compiling._turn, ThreadPoolExecutor(1) as pool, pytest.raises(EndedError):
        pool.submit(it.compile, parameters, constants, going(1)).result(60)


DRIVER = "sh -c 'sleep 60 & echo $! > child; wait'"


def assert_gone(folder: Path) -> None:
    """The driver's child is no more."""
    child = Path(f"/proc/{(folder / 'child').read_text().strip()}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the compiler's child is still there")


@pytest.mark.parametrize("name", ["mlp", "codes of visits", "codes of a large table"])
def test_machine_code_gives_the_same_sums(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real compiler; matrices large enough for the faster product among them."""
    monkeypatch.setattr(compiling, "_steps", {})
    monkeypatch.setattr(compiling, "WORTH", 0)
    make, loss, xs, ys = MODELS[name]
    torch.manual_seed(6)
    model, x, y = make(), xs(), ys()
    it, parameters, constants = lifted(model, loss, x, y)
    it.microbatch = 10
    batch = {"x": torch.cat([x, xs()]), "target": torch.cat([y, ys()])}
    mask = torch.arange(10) != 4
    eager = it.clipped_sum(parameters, constants, batch, mask, 0.3)
    seconds = it.compile(parameters, constants)
    assert seconds is not None
    assert seconds > 0
    fast = it.clipped_sum(parameters, constants, batch, mask, 0.3)
    for parameter, t in fast.items():
        torch.testing.assert_close(t, eager[parameter], rtol=1e-5, atol=1e-7)
    assert torch.equal(fast.counted, eager.counted)
    it.selftest(parameters, constants)


class Turned(nn.Module):
    """Dropout of what lies in memory in another order, as between recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x).transpose(1, 2)).cos().flatten(1))


def test_machine_code_drops_out_the_same_on_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask written in place had been overwritten before the gradient used it."""
    monkeypatch.setattr(compiling, "_steps", {})
    torch.manual_seed(8)
    x, y = torch.randn(8, 4, 8), torch.rand(8).round()
    it, parameters, constants = lifted(Turned(), nn.BCEWithLogitsLoss(), x, y)
    it.microbatch = 8

    def summed() -> Totals:
        torch.manual_seed(9)
        everyone = torch.ones(8, dtype=torch.bool)
        return it.clipped_sum(parameters, constants, {"x": x, "target": y}, everyone, 0.1)

    eager = summed()
    assert it.compile(parameters, constants) is not None
    it.selftest(parameters, constants)
    for name, t in summed().items():
        torch.testing.assert_close(t, eager[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "1-d cnn",
        "codes of a large table",
        "attention",
        "gru",
        "tied weights",
        "weights made of others",
    ],
)
def test_norms_and_sums_read_the_same_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler may compute a number twice, rounded otherwise; what it keeps in memory it must not."""
    seen = []
    monkeypatch.setattr(
        compiling,
        "_machine_code",
        lambda graph, example: seen.append(graph) or (lambda tensors: graph(*tensors)),
    )
    monkeypatch.setattr(compiling, "_steps", {})
    make, loss, xs, ys = MODELS[name]
    x, y = xs(), ys()
    model = make()
    model(x)
    it, parameters, constants = lifted(model, loss, x, y)
    monkeypatch.setattr(lift_module, "STORED", 8 * it.written)
    monkeypatch.setattr(compiling, "cells_by", lambda assemble: nullcontext())
    assert it.compile(parameters, constants) is not None
    assert len(seen) == (3 if it.written else 1)
    for graph in seen:
        both = [{origin(n) for n in nodes} for nodes in (measured(graph), added(graph))]
        assert all(n.op == "placeholder" or n.target is KEPT for n in both[0] | both[1])
        if graph is not seen[0] or len(seen) == 1:
            assert both[0] <= both[1]  # what was stored before is only added in the end


def origin(node: torch.fx.Node) -> torch.fx.Node:
    """What a view is of."""
    return origin(node.args[0]) if "view" in str(node.target) else node


def measured(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """What is squared in float64."""
    squares = [n.args[0] for n in graph.graph.nodes if n.target is torch.ops.aten.pow.Tensor_Scalar]
    return [n.args[0] for n in squares if n.target is torch.ops.prims.convert_element_type.default]


def added(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """What is taken of the patients that count."""
    wheres = [n for n in graph.graph.nodes if n.target is torch.ops.aten.where.self]
    counts = [n for n in wheres if n.args[1].meta["val"].dtype == torch.float32]
    return [
        n.args[1] for n in counts if origin(n.args[0]).target is KEPT or origin(n.args[0]).op == "placeholder"
    ]


@pytest.mark.parametrize("seed", range(40 if os.environ.get("RAPHA_LAB_DEEP") else 3))
def test_machine_code_holds_hostile_graphs_to_the_norm(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random hostile graphs on random records: alone or added, a patient moves the compiled sum by at most C."""
    monkeypatch.setattr(compiling, "_steps", {})
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    it = lift(random_program([(rng.randrange(100), rng.randrange(2)) for _ in range(rng.randint(1, 8))]))
    it.microbatch = 8
    monkeypatch.setattr(lift_module, "STORED", 2 ** (seed % 3) * it.written)
    parameters = {s.name: torch.randn(s.shape, generator=generator) for s in it.program.parameters}
    assert it.compile(parameters, {}) is not None
    it.selftest(parameters, {})
    everyone, bound = torch.ones(8, dtype=torch.bool), CLIP * (1 + train.slack(8))
    for scale in (1.0, 1e-20, 1e10, 1e30):
        x = {"x": torch.randn(8, 3, generator=generator) * scale}
        x["x"][3, 1] = float("nan")
        whole = it.clipped_sum(parameters, {}, x, everyone, CLIP)
        for i in range(8):
            only = it.clipped_sum(parameters, {}, x, torch.arange(8) == i, CLIP)
            rest = it.clipped_sum(parameters, {}, x, torch.arange(8) != i, CLIP)
            assert norm(only) <= bound
            assert norm({n: whole[n] - rest[n] for n in whole}) <= bound
            assert torch.equal(whole.counted - rest.counted, only.counted)


def test_compiled_noise_is_the_same_noise() -> None:
    """Machine code turns words into the numbers that the plain transformation does, and no others are taken."""
    plain = noise.SeededNoise(3).gaussian(20_000)
    try:
        assert noise.compile_noise(compiling.assembled)
        torch.testing.assert_close(noise.SeededNoise(3).gaussian(20_000), plain, rtol=1e-12, atol=1e-15)
        noise._normal = noise.box_muller
        assert not noise.compile_noise(lambda function, example: lambda tensors: tensors[1].zero_())
        assert noise._normal is noise.box_muller
    finally:
        noise._normal = noise.box_muller


def test_without_a_compiler_the_step_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never fails for want of speed."""
    make, loss, xs, ys = MODELS["autoencoder"]
    x, y = xs(), ys()
    it, parameters, constants = lifted(make(), loss, x, y)

    def broken(*args: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiling, "_compile", broken)
    assert it.compile(parameters, constants) is None
    rows = {"x": x, "target": y}
    assert it.clipped_sum(parameters, constants, rows, torch.ones(5, dtype=torch.bool), 1.0)


def test_two_jobs_do_not_compile_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler sets is the whole process's: two at once had broken each other's; each gets its compiled step."""
    at_work = threading.Semaphore(1)

    def machine_code(graph: torch.fx.GraphModule, example: object) -> object:
        assert at_work.acquire(blocking=False)
        time.sleep(0.3)
        at_work.release()
        return lambda tensors: graph(*tensors)

    monkeypatch.setattr(compiling, "_machine_code", machine_code)
    monkeypatch.setattr(compiling, "_steps", {})
    jobs = []
    for name in ("logistic", "mlp", "autoencoder"):
        make, loss, xs, ys = MODELS[name]
        jobs.append(lifted(make(), loss, xs(), ys()))
    with ThreadPoolExecutor(len(jobs)) as pool:
        took = list(pool.map(lambda job: job[0].compile(*job[1:]), jobs))
    assert None not in took
    monkeypatch.setattr(compiling, "PATIENCE", 0.01)
    with compiling._turn, ThreadPoolExecutor(1) as pool:
        assert pool.submit(jobs[0][0].compile, *jobs[0][1:]).result() is None


def test_no_one_else_can_write_where_compiled_code_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's files are in a folder of this process alone, whatever the environment says."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp")
    compiling._own_cache.cache_clear()
    compiling._own_cache()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert Path(cache_dir()) == folder
