"""What private training costs: CPU time of a step as a multiple of plain eager PyTorch's, interleaved rounds.

    python benchmarks/trainer.py [--workloads mlp256,gru] [--engines compiled,eager] [--rounds 7] [--write]

A private step is the drawn patients' clipped sum, noise and the update; a plain one is zero_grad, loss, backward,
step. One thread, CPU time of the process, medians of rounds in which every engine takes its turn. Writes
build/bench/trainer.json; with --write also benchmarks/README.md, with the plots of benchmarks/scaling.py.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import torch
from peers import CLIP, PEERS, RATE, TOO_LARGE, TOO_SLOW
from torch import nn
from workloads import WORKLOADS, Bag, Workload

from rapha_lab.curator.lift import lift
from rapha_lab.curator.lift.compiling import assembled, keep_pages
from rapha_lab.curator.mechanisms import train
from rapha_lab.curator.noise import SystemNoise, compile_noise
from rapha_lab.session.tracing import loss_program

Step = Callable[[], Any]
BUILD = Path("build/bench")
OURS = ("compiled", "eager")


def plain(workload: Workload) -> Step:
    """Ordinary training; a bag's records packed, without padding."""
    torch.manual_seed(0)
    model, loss = workload.make(), nn.CrossEntropyLoss()
    x, y = workload.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    forward = packed(model, x) if isinstance(model, Bag) else lambda: model(x)

    def step() -> None:
        optimizer.zero_grad()
        loss(forward(), y).backward()
        optimizer.step()

    return step


def packed(model: Bag, x: torch.Tensor) -> Step:
    there = x[..., 30] == 1
    rows, owner, counts = x[there][:, :30], there.nonzero()[:, 0], there.sum(1, keepdim=True)
    zeros = torch.zeros(len(x), 64)
    return lambda: model.head(zeros.index_add(0, owner, model.encoder(rows)) / counts)


def ours(workload: Workload, engine: str, notes: dict[str, Any]) -> Step:
    """This trainer's step on the same patients."""
    torch.manual_seed(0)
    model, (x, y) = workload.make(), workload.data()
    traced = loss_program(model, nn.CrossEntropyLoss(), {"x": x[0]}, y[0])
    it = lift(traced.program)
    slots = it.for_batches_of(workload.batch) * it.microbatch
    notes["slots"] = train.capacity(workload.batch, 1) / workload.batch
    weights, constants = it.tensors(traced.blob)
    if engine == "compiled":
        seconds = it.compile(weights, constants)
        if seconds is None or not compile_noise(assembled):
            raise NotImplementedError(it.note)
        notes["seconds"] = round(seconds, 1)
    it.selftest(weights, constants)
    rows, noise = train.with_absent({"x": x, "target": y}), SystemNoise()
    drawn = torch.arange(slots).clamp(max=workload.batch)  # what is left of the slots is empty
    optimizer = torch.optim.SGD(list(weights.values()), lr=RATE)

    def step() -> None:
        total = train.clipped_sum(it, weights, constants, rows, drawn, CLIP)
        grads = train.private(total, CLIP, workload.batch, noise, weights)
        for name, weight in weights.items():
            weight.grad = grads[name]
        optimizer.step()

    return step


def steps_of(name: str, engines: list[str], notes: dict[str, Any]) -> dict[str, Step]:
    """A step of each engine that takes the workload."""
    workload, steps = WORKLOADS[name], {"plain": plain(WORKLOADS[name])}
    for engine in engines:
        if (name, engine) in TOO_LARGE | TOO_SLOW:
            continue
        try:
            made = ours(workload, engine, notes) if engine in OURS else PEERS[engine](workload)
            made()
            steps[engine] = made
        except Exception as error:
            print(
                f"{name:12} {engine:16} not run: {str(error).splitlines()[0][:90] if str(error) else error!r}"
            )
    return steps


def cpu(step: Step, repeats: int) -> float:
    began = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - began) / repeats


def memory(step: Step) -> float:
    """By how much a step raises the resident memory at most, in MB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1000


def _status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def measure(name: str, engines: list[str], rounds: int) -> list[dict[str, Any]]:
    """Rows of workload, engine, cpu_ratio and memory_ratio."""
    notes: dict[str, Any] = {}
    steps = steps_of(name, engines, notes)
    memories = {engine: memory(step) for engine, step in steps.items()}
    keep_pages()
    for step in steps.values():
        step()
    repeats = max(1, round(0.1 / cpu(steps["plain"], 3)))
    seen = [{engine: cpu(step, repeats) for engine, step in steps.items()} for _ in range(rounds)]
    rows = []
    for engine in steps:
        rows.append({
            "workload": name, "engine": engine,
            "cpu_ratio": round(statistics.median(r[engine] / r["plain"] for r in seen), 3),
            "milliseconds": round(statistics.median(r[engine] for r in seen) * 1e3, 2),
            "memory_ratio": round(memories[engine] / max(memories["plain"], 1.0), 2),
            "megabytes": round(memories[engine], 1), **(notes if engine == "compiled" else {}),
        })  # fmt: skip
        print(
            f"{name:12} {engine:16} {rows[-1]['cpu_ratio']:7.2f} {rows[-1]['megabytes']:8.1f} MB", flush=True
        )
    return rows


def machine() -> str:
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores, one thread used, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}; load average {load}"
    )


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--workloads", default=",".join(WORKLOADS))
    arguments.add_argument("--engines", default=",".join([*OURS, *PEERS]))
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--write", action="store_true")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    target = BUILD / "trainer.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    # a run of some workloads renews their rows only
    rows = json.loads(target.read_text()) if target.exists() else []
    for name in given.workloads.split(","):
        found = measure(name, given.engines.split(","), given.rounds)
        fresh = {(r["workload"], r["engine"]) for r in found}
        rows = [r for r in rows if (r["workload"], r["engine"]) not in fresh] + found
        target.write_text(json.dumps(rows, indent=1))
    if given.write:
        import report

        report.write(rows, machine())


if __name__ == "__main__":
    main()
