"""How a step's cost grows: with patients, parameters, batch and sessions at once. Plots in benchmarks/pictures.

    python benchmarks/scaling.py

CPU milliseconds of a whole step: the Poisson draw, the padded clipped sum, noise and update, without a compiler.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import nn
from trainer import CLIP, RATE, cpu, memory

from rapha_lab.curator.lift import lift
from rapha_lab.curator.lift.compiling import keep_pages
from rapha_lab.curator.mapped import with_absent
from rapha_lab.curator.mechanisms import train
from rapha_lab.curator.noise import SystemNoise
from rapha_lab.session.tracing import loss_program

PICTURES = Path(__file__).parent / "pictures"
TARGET = Path("build/bench/scaling.json")


def step_of(patients: int, width: int, batch: int) -> Callable[[], None]:
    """A whole step of an MLP with two hidden layers, as `fit` takes it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
    )
    x, y = torch.randn(patients, 30), torch.randint(2, (patients,))
    traced = loss_program(model, nn.CrossEntropyLoss(), {"x": x[0]}, y[0])
    it, noise, rate = lift(traced.program), SystemNoise(), batch / patients
    slots = it.for_batches_of(train.capacity(batch, 1)) * it.microbatch
    weights, constants = it.tensors(traced.blob)
    rows = with_absent({"x": x, "target": y})
    optimizer = torch.optim.SGD(list(weights.values()), lr=RATE)

    def step() -> None:
        drawn = train.draw(patients, rate, slots, noise)
        total = train.clipped_sum(it, weights, constants, rows, drawn, CLIP)
        for name, grad in train.private(total, CLIP, batch, noise, weights).items():
            weights[name].grad = grad
        optimizer.step()

    return step


def figures(step: Callable[[], None]) -> tuple[float, float]:
    """CPU milliseconds and megabytes above what was there before, the least of three."""
    step()
    raised = memory(step)
    return min(cpu(step, 1) for _ in range(3)) * 1e3, raised


def session(seconds: float, start: Any, done: Any) -> None:
    """Steps for so long, as one of several processes at once."""
    torch.set_num_threads(1)
    step, count = step_of(100_000, 128, 256), 0
    step()
    start.wait()
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        step()
        count += 1
    done.put(count / seconds)


def together(sessions: int, seconds: float = 3.0) -> float:
    """Steps a second of so many sessions at once, all together."""
    context = multiprocessing.get_context("spawn")
    start, done = context.Barrier(sessions), context.Queue()
    workers = [context.Process(target=session, args=(seconds, start, done)) for _ in range(sessions)]
    for worker in workers:
        worker.start()
    total = sum(done.get() for _ in workers)
    for worker in workers:
        worker.join()
    return total


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    keep_pages()
    found: dict[str, list[Any]] = {"patients": [], "parameters": [], "batch": [], "sessions": []}
    for patients in (10**3, 10**4, 10**5, 10**6, 3 * 10**6):
        found["patients"].append((patients, *figures(step_of(patients, 128, 256))))
    for width in (64, 256, 1024, 3072):
        found["parameters"].append((width * (width + 34) + 2, *figures(step_of(10_000, width, 256))))
    for batch in (16, 64, 256, 1024, 4096, 16384):
        found["batch"].append((batch, *figures(step_of(20_000, 128, batch))))
    for sessions in (1, 2, 4, 8):
        found["sessions"].append((sessions, together(sessions)))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(found, indent=1))
    draw(found)


def draw(found: dict[str, list[Any]]) -> None:
    """One picture of four panels."""
    _, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    for axis, (what, rows) in zip(axes, found.items(), strict=True):
        x, y, *more = zip(*rows, strict=True)
        axis.plot(x, y, "o-", color="#1f5fa8")
        axis.set(
            xscale="log", xlabel=what, ylabel="steps a second" if what == "sessions" else "CPU ms a step"
        )
        if what == "sessions":
            axis.set(ylim=0)
        else:
            axis.set(yscale="log")
            beside = axis.twinx()
            beside.plot(x, [max(v, 0.1) for v in more[0]], "s--", color="#b5651d", markersize=3)
            beside.set(yscale="log", ylabel="MB (dashed)")
    PICTURES.mkdir(exist_ok=True)
    plt.savefig(PICTURES / "scaling.png", dpi=110)


if __name__ == "__main__":
    main()
