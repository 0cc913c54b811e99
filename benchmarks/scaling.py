"""How a step's cost grows: with patients on disk, parameters, batch and sessions at once; and what judging a model costs.

    python benchmarks/scaling.py [--axes patients,sessions] [--minutes 6]

CPU milliseconds of a whole step: the Poisson draw, the padded clipped sum, noise and update, without a compiler. Patients
are read from a file as the curator maps one; the others' axes hold them in memory. Points are kept as they come in
build/bench/scaling.json; those for which no time is left are left out with a note. Plots are in benchmarks/pictures.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib

matplotlib.use("Agg")
import numpy as np
import polars as pl
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from trainer import CLIP, RATE, cpu, memory, status
from workloads import mlp

from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.lift import lift
from rapha_lab.curator.lift.compiling import assembled, keep_pages
from rapha_lab.curator.mapped import OnDisk, filled, on_disk, with_nobody
from rapha_lab.curator.mechanisms import evaluate, train
from rapha_lab.curator.noise import SystemNoise, compile_noise
from rapha_lab.protocol.messages import Evaluate
from rapha_lab.protocol.schema import Schema
from rapha_lab.session.tracing import loss_program, score_program

PICTURES = Path(__file__).parent / "pictures"
TARGET = Path("build/bench/scaling.json")
AXES: dict[str, tuple[int, ...]] = {
    "patients": (10**3, 10**4, 10**5, 10**6, 10**7),
    "parameters": (10**4, 10**5, 10**6, 10**7, 10**8),
    "batch": (16, 64, 256, 1024, 4096, 16384),
    "sessions": (1, 2, 4, 8, 16),
    "patients judged": (10**3, 10**4, 10**5),
}
# about as long as a point takes on a calm machine, in seconds, where it is more than a few
LONG = {("patients", 10**7): 30, ("parameters", 10**8): 75, ("parameters", 10**7): 10}


def in_memory(patients: int) -> dict[str, Tensor]:
    made = {"x": torch.randn(patients, 30), "target": torch.randint(2, (patients,))}
    return {name: with_nobody(t) for name, t in made.items()}


def from_disk(patients: int) -> dict[str, Tensor]:
    """Made-up patients written part by part, as the curator writes a view's."""
    x = on_disk(TARGET.parent, (patients + 1, 30), torch.float32)
    y = on_disk(TARGET.parent, (patients + 1,), torch.int64)
    filled(x, patients, lambda start, end: torch.randn(end - start, 30))
    filled(y, patients, lambda start, end: torch.randint(2, (end - start,)))
    return OnDisk(x=x, target=y)


def step_of(rows: dict[str, Tensor], width: int, batch: int, *, compiled: bool = False) -> Callable[[], None]:
    """A whole step of an MLP with two hidden layers, as `fit` takes it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
    )
    traced = loss_program(model, nn.CrossEntropyLoss(), {"x": rows["x"][0]}, rows["target"][0])
    it, noise, patients = lift(traced.program), SystemNoise(), len(rows["x"]) - 1
    slots = it.for_batches_of(train.capacity(train.most(batch, batch / patients, "train"), 1)) * it.microbatch
    parameters, constants = it.tensors(traced.blob)
    weights, total = train.Weights(parameters), it.zeros()
    if compiled and it.compile(weights, constants) is not None:
        compile_noise(assembled)
    del model, traced, parameters
    optimizer = torch.optim.SGD(weights.vectors, lr=RATE)

    def step() -> None:
        drawn = train.draw(patients, batch / patients, slots, noise)
        train.clipped_sum(it, weights, constants, rows, drawn, CLIP, total)
        weights.follow(train.private(total, CLIP, batch, noise))
        optimizer.step()

    return step


def figures(made: Callable[[], Callable[[], None]]) -> tuple[float, float, float]:
    """CPU milliseconds of a step, the least of a few; megabytes that it raises memory by; megabytes held before it."""
    gc.collect()
    before = status("RssAnon")
    step = made()
    first = cpu(step, 1)
    gc.collect()
    held = (status("RssAnon") - before) / 1000
    raised = memory(step)
    times = 1 if first > 2 else max(3, round(0.3 / first))
    return min(cpu(step, 1) for _ in range(times)) * 1e3, raised, held


def together(sessions: int, *, compiled: bool, seconds: float = 4.0) -> tuple[float, float]:
    """Steps a second of so many sessions' trainings at once in one curator, and CPU milliseconds of a step."""
    rows = in_memory(100_000)
    steps = [step_of(rows, 128, 256, compiled=compiled) for _ in range(sessions)]
    counts, start = [0] * sessions, threading.Barrier(sessions + 1)

    def session(mine: int) -> None:
        torch.set_num_threads(1)
        steps[mine]()
        start.wait()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            steps[mine]()
            counts[mine] += 1

    threads = [threading.Thread(target=session, args=(mine,)) for mine in range(sessions)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.monotonic(), time.process_time()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began[0], time.process_time() - began[1]
    return sum(counts) / took[0], took[1] / sum(counts) * 1e3


def ward(patients: int) -> Cohort:
    """Made-up patients with thirty numbers and a yes or no, most of them in the test split."""
    said = {"meaning": "made up", "public": "made up", "missing": "never"}
    numbers = [f"x{k}" for k in range(30)]
    columns = [{"name": name, "type": "number", "bounds": [-5, 5], **said} for name in numbers]
    about = dict.fromkeys(("name", "title", "citation", "licence"), "made-up")
    schema = Schema.from_dict(
        about
        | {"patient": "id", "source": "made-up.parquet", "patients": patients}
        | {"columns": [*columns, {"name": "y", "type": "boolean", **said}]}
        | {"splits": {"train": 0.01, "validation": 0.01, "test": 0.98}}
    )
    random = np.random.default_rng(0)
    frame = {name: random.standard_normal(patients) for name in numbers}
    named = {"id": np.arange(patients), "y": random.random(patients) < 0.3}
    return Cohort(schema, pl.DataFrame(frame | named), bytes(16))


def judged(patients: int) -> tuple[float, float, float]:
    """CPU milliseconds of a whole answer to `evaluate`, of a plain forward pass on the same patients, and their ratio."""
    cohort, model = ward(patients), mlp(1)
    view, inputs = cohort.view("test"), [f"x{k}" for k in range(30)]
    traced = score_program(model, {"x": torch.zeros(30)})
    ask = Evaluate(
        dataset="made-up", split="test", program=traced.program, inputs={"x": inputs}, target="y",
        metrics=["auroc", "brier"], epsilon=1.0,
    )  # fmt: skip
    plan, x = evaluate.plan(ask, traced.blob, cohort.schema, 1e-5), view.tensor(inputs)

    @torch.no_grad()
    def plain() -> None:
        for part in x.split(512):
            model(part)

    def ours() -> None:
        plan.run(view, lambda *_: None)

    rounds = [(cpu(ours, 1), cpu(plain, 1)) for _ in range(9)]
    ratio = statistics.median(mine / other for mine, other in rounds)
    return min(r[0] for r in rounds) * 1e3, min(r[1] for r in rounds) * 1e3, ratio


def point(axis: str, value: int) -> tuple[float, ...]:
    if axis == "patients":
        return figures(lambda: step_of(from_disk(value), 128, 256))
    if axis == "parameters":
        width = round((17**2 + value) ** 0.5 - 17)  # width * (width + 34) + 2 in all
        return figures(lambda: step_of(in_memory(10_000), width, 256))
    if axis == "batch":
        return figures(lambda: step_of(in_memory(20_000), 128, value))
    if axis == "patients judged":
        return judged(value)
    return *together(value, compiled=False), *together(value, compiled=True)


def main() -> None:
    line = argparse.ArgumentParser()
    line.add_argument("--axes", default=",".join(AXES))
    line.add_argument("--minutes", type=float, default=6)
    given = line.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    keep_pages()
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    step_of(in_memory(100), 8, 8)()  # what is loaded once belongs to no point
    until = time.monotonic() + 60 * given.minutes
    axes = given.axes.split(",")
    # a run of some axes renews their rows only
    before = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    found: dict[str, list[Any]] = {a: [] if a in axes else before.get(a, []) for a in AXES}
    # the long points last, so that a slow machine leaves those out
    for axis, value in sorted(((a, v) for a in axes for v in AXES[a]), key=lambda p: LONG.get(p, 0)):
        began = time.monotonic()
        if until - began < LONG.get((axis, value), 5):
            print(f"{axis:12} {value:12,} not run: no time was left", flush=True)
            continue
        measured = [round(v, 3) for v in point(axis, value)]
        found[axis] = sorted([*found[axis], [value, *measured]])
        TARGET.write_text(json.dumps(found, indent=1))
        told = " ".join(f"{v:10.3g}" for v in measured)
        print(f"{axis:12} {value:12,} {told}   in {time.monotonic() - began:.0f} s", flush=True)
    draw(found)


def decades(values: Any) -> tuple[float, float]:
    """Powers of ten around the values."""
    return 10 ** math.floor(math.log10(max(min(values), 0.1))), 10 ** math.ceil(
        math.log10(max(values)) + 0.01
    )


def draw(found: dict[str, list[Any]]) -> None:
    """One picture of four panels."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    shown = [(what, rows) for what, rows in found.items() if what != "patients judged"]
    for axis, (what, rows) in zip(axes, shown, strict=True):
        if not rows:
            continue
        x, y, *more = zip(*rows, strict=True)
        axis.plot(x, y, "o-", color="#1f5fa8")
        axis.set(
            xscale="log", xlabel=what, ylabel="steps a second" if what == "sessions" else "CPU ms a step"
        )
        axis.grid(alpha=0.3)
        if what == "sessions":
            axis.set(xscale="linear", ylim=(0, None), xticks=x)
            continue
        beside = axis.twinx()
        beside.plot(x, [max(v, 0.1) for v in more[0]], "s--", color="#b5651d", markersize=3)
        axis.set(yscale="log", ylim=decades(y))
        beside.set(yscale="log", ylim=decades(more[0]), ylabel="MB a step (dashed)")
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / "scaling.png", dpi=90)


if __name__ == "__main__":
    main()
