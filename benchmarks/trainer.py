"""What private training costs: CPU time of a step as a multiple of plain eager PyTorch's, interleaved rounds.

    python benchmarks/trainer.py [--workloads mlp256,gru] [--engines compiled,eager] [--rounds 7] [--minutes 19] [--write]

A private step is the drawn patients' clipped sum, noise and the update; a plain one is zero_grad, loss, backward,
step. One thread, CPU time of the process, medians of rounds in which every engine takes its turn; one whose step is slow
takes fewer steps a round, and no turn once its time is up. One process a workload, which shares what is left of the
minutes with those after it; an engine that fails, or takes too long to start, is left out with a note. Rows are kept as
they come in build/bench/trainer.json, notes in notes.json; with --write also benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import torch
from peers import CLIP, NOT_RUN, PEERS, RATE
from torch import nn
from workloads import WORKLOADS, Bag, Workload

from rapha_lab.curator.lift import lift
from rapha_lab.curator.lift.compiling import assembled, keep_pages
from rapha_lab.curator.mapped import with_nobody
from rapha_lab.curator.mechanisms import train
from rapha_lab.curator.noise import SystemNoise, compile_noise
from rapha_lab.protocol.program import Program
from rapha_lab.session.tracing import loss_program

Step = Callable[[], Any]
BUILD = Path("build/bench")
OURS = ("compiled", "eager")
PATIENTS = 100
"""Batches that the patients would make, where a step's slots are told."""
START, TURNS = 100, 5.0
"""Seconds that an engine may take to start, ours excepted, and all its turns of a workload together."""
SLOW = 300.0
"""Seconds beyond its own that a workload may take: ours start in their own time, which is long on a busy machine."""


def plain(workload: Workload, pad: bool = False) -> Step:
    """Ordinary training; a bag's records packed, without padding, unless `pad`."""
    torch.manual_seed(0)
    model, loss = workload.make(), nn.CrossEntropyLoss()
    x, y = workload.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    forward = packed(model, x) if isinstance(model, Bag) and not pad else lambda: model(x)

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


def ours(workload: Workload, engine: str, facts: dict[str, Any]) -> Step:
    """This trainer's step on the same patients."""
    torch.manual_seed(0)
    model, (x, y) = workload.make(), workload.data()
    traced = loss_program(model, nn.CrossEntropyLoss(), {"x": x[0]}, y[0])
    it = lift(traced.program)
    slots = it.for_batches_of(workload.batch) * it.microbatch
    facts["slots"] = slots_of(traced.program, workload.batch) / workload.batch
    parameters, constants = it.tensors(traced.blob)
    weights, total = train.Weights(parameters), it.zeros()
    if engine == "compiled":
        seconds = it.compile(weights, constants)
        if seconds is None or not compile_noise(assembled):
            raise NotImplementedError(it.note)
        facts["seconds"] = round(seconds, 1)
    it.selftest(weights, constants)
    rows, noise = {"x": with_nobody(x), "target": with_nobody(y)}, SystemNoise()
    drawn = torch.arange(slots).clamp(max=workload.batch)  # what is left of the slots is empty
    optimizer = torch.optim.SGD(weights.vectors, lr=RATE)

    def step() -> None:
        train.clipped_sum(it, weights, constants, rows, drawn, CLIP, total)
        weights.follow(train.private(total, CLIP, workload.batch, noise))
        optimizer.step()

    return step


def slots_of(program: Program, batch: int) -> int:
    """Slots of a step of `fit`, in whole microbatches."""
    it = lift(program)
    return it.for_batches_of(train.capacity(train.most(batch, 1 / PATIENTS, "train"), 1)) * it.microbatch


def steps_of(
    name: str, engines: list[str], facts: dict[str, Any], seconds: float
) -> tuple[dict[str, Step], dict[str, str], float]:
    """A step of each engine that takes the workload, why the others do not, and until when there is time.

    Ours are made ready first, however long that takes; the seconds are for the peers and for all turns.
    """
    workload, steps, notes = WORKLOADS[name], {"plain": plain(WORKLOADS[name])}, {}
    if WORKLOADS[name].make is Bag:
        steps["padded"] = plain(workload, pad=True)
    first = [engine for engine in OURS if engine in engines]
    for engine in first:
        steps |= ready(lambda e=engine: ours(workload, e, facts), engine, None, notes)
    until = time.monotonic() + seconds
    for engine in engines:
        if engine in first:
            continue
        left = until - time.monotonic() - TURNS * (2 + len(steps))
        if (name, engine) in NOT_RUN:
            notes[engine] = NOT_RUN[name, engine]
        elif left < 1:
            notes[engine] = "no time was left"
        else:
            steps |= ready(lambda e=engine: PEERS[e](workload), engine, min(START, left), notes)
    return steps, notes, until


def ready(
    make: Callable[[], Step], engine: str, seconds: float | None, notes: dict[str, str]
) -> dict[str, Step]:
    """The engine's step after its first run, or nothing and a note if that fails or takes longer."""
    try:
        with alarm(seconds or 0):
            step = make()
            step()
    except Exception as error:
        late = next((e for e in chain_of(error) if isinstance(e, TimeoutError)), error)
        notes[engine] = (str(late).splitlines() or [repr(late)])[0][:120]
        return {}
    return {engine: step}


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer; 0 is no limit."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


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
    before = status("VmRSS")
    step()
    return (status("VmHWM") - before) / 1000


def status(field: str) -> int:
    """A field of this process's memory, in KB."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def turns(steps: dict[str, Step], rounds: int, until: float) -> list[dict[str, float]]:
    """Rounds in which every engine whose time is not up takes its turn, seconds a step by engine; at least one."""
    cost = {engine: cpu(step, 1) for engine, step in steps.items()}
    cost["plain"] = cpu(steps["plain"], 3)
    wanted = max(1, round(0.1 / cost["plain"]))
    repeats = {engine: max(1, min(wanted, round(TURNS / 4 / c))) for engine, c in cost.items()}
    spent, seen = dict.fromkeys(steps, 0.0), []
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        due = [e for e in steps if number == 0 or spent[e] + repeats[e] * cost[e] < TURNS or e not in PEERS]
        seen.append({engine: cpu(steps[engine], repeats[engine]) for engine in due})
        for engine in due:
            spent[engine] += seen[-1][engine] * repeats[engine]
    return seen


def measure(name: str, engines: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Rows of workload, engine, cpu_ratio and memory_ratio, and notes on engines that were not run."""
    facts: dict[str, Any] = {}
    steps, notes, until = steps_of(name, engines, facts, seconds)
    memories = {engine: memory(step) for engine, step in steps.items()}
    keep_pages()
    for step in steps.values():
        step()
    seen = turns(steps, rounds, until)
    rows = []
    if "padded" in steps and "compiled" in steps:
        facts["padded_ratio"] = round(statistics.median(r["compiled"] / r["padded"] for r in seen), 3)
    for engine in steps:
        own = [r for r in seen if engine in r]
        rows.append({
            "workload": name, "engine": engine,
            "cpu_ratio": round(statistics.median(r[engine] / r["plain"] for r in own), 3),
            "milliseconds": round(statistics.median(r[engine] for r in own) * 1e3, 2),
            "memory_ratio": round(memories[engine] / max(memories["plain"], 1.0), 2),
            "megabytes": round(memories[engine], 1), "rounds": len(own), **(facts if engine == "compiled" else {}),
        })  # fmt: skip
        print(
            f"{name:12} {engine:16} {rows[-1]['cpu_ratio']:7.2f} {rows[-1]['megabytes']:8.1f} MB", flush=True
        )
    for engine, note in notes.items():
        print(f"{name:12} {engine:16} not run: {note}", flush=True)
    return {"rows": rows, "notes": {f"{name}, {engine}": note for engine, note in notes.items()}}


def apart(name: str, given: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The same in a process of its own, which is ended when it takes much longer than it was given."""
    part = BUILD / f"{name}.json"
    part.unlink(missing_ok=True)
    line = ["--workloads", name, "--engines", given.engines, "--rounds", str(given.rounds)]
    try:
        subprocess.run(
            [sys.executable, __file__, *line, "--seconds", str(seconds), "--part", str(part)],
            timeout=seconds + SLOW, check=True,
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError) as error:
        print(f"{name:12} failed: {error}", flush=True)
    try:
        return json.loads(part.read_text())
    except (OSError, ValueError):
        return {"rows": [], "notes": {f"{name}, all": "its process failed or was ended"}}
    finally:
        part.unlink(missing_ok=True)


def machine() -> str:
    """What this ran on, and whether others ran there too."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    load = os.getloadavg()[2]  # of the last quarter of an hour; this run alone makes one
    busy = "" if load < 1.6 else (
        f" **It was shared with other work (load average {load:.1f})**: expect 10 to 30 % either way, and more on"
        " steps below a millisecond."
    )  # fmt: skip
    return (
        f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores, one thread used, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}.{busy}"
    )


def kept(name: str, empty: Any) -> Any:
    path = BUILD / name
    return json.loads(path.read_text()) if path.exists() else empty


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--workloads", default=",".join(WORKLOADS))
    arguments.add_argument("--engines", default=",".join([*OURS, *PEERS]))
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--minutes", type=float, default=19)
    arguments.add_argument("--write", action="store_true")
    arguments.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if given.part:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        found = measure(given.workloads, given.engines.split(","), given.rounds, given.seconds)
        given.part.write_text(json.dumps(found))
        return
    # a run of some workloads or engines renews their rows only
    rows, notes, until = (
        kept("trainer.json", []),
        kept("notes.json", {}),
        time.monotonic() + 60 * given.minutes,
    )
    names = given.workloads.split(",")
    try:
        for number, name in enumerate(names):
            found = apart(name, given, max(20.0, until - time.monotonic()) / (len(names) - number))
            fresh = {(r["workload"], r["engine"]) for r in found["rows"]}
            tried = fresh | {tuple(cell.split(", ", 1)) for cell in found["notes"]}
            rows = [r for r in rows if (r["workload"], r["engine"]) not in tried] + found["rows"]
            done = {f"{workload}, {engine}" for workload, engine in fresh}
            notes = {key: note for key, note in notes.items() if key not in done} | found["notes"]
            (BUILD / "trainer.json").write_text(json.dumps(rows, indent=1))
            (BUILD / "notes.json").write_text(json.dumps(notes, indent=1))
    finally:  # also of what there is when interrupted
        if given.write and rows:
            import report

            report.write(rows, notes, machine())


if __name__ == "__main__":
    main()
