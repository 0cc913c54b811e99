"""What private training costs: CPU time of a step as a multiple of plain eager PyTorch's, interleaved rounds.

    python benchmarks/trainer.py [--workloads mlp256,gru] [--rounds 5] [--compile]

A private step is the sampled patients' clipped sum, cryptographic noise and the update; a plain one is zero_grad,
loss, backward, step. Writes build/bench/trainer.json: rows of workload, engine, cpu_ratio (median over rounds).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rapha_lab.curator.lift import lift
from rapha_lab.curator.lift.compiling import assembled
from rapha_lab.curator.mechanisms import train
from rapha_lab.curator.noise import SystemNoise, compile_noise
from rapha_lab.session.tracing import loss_program


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.GRU(40, 64, 2, batch_first=True), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class Series(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.inp, self.body, self.head = nn.Linear(40, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.inp(x)).mean(1))


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.words, self.places = nn.Embedding(8000, 128), nn.Parameter(torch.randn(128, 128) / 10)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(128, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.words(x) + self.places).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1000, 2800), nn.ReLU(), nn.Linear(2800, 2400), nn.ReLU(), nn.Linear(2400, 2)
    )


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1600, 240), nn.ReLU(), nn.Linear(240, 10),
    )  # fmt: skip


def series() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(40, 64, 5, padding=2), nn.GroupNorm(8, 64), nn.ReLU(),
        nn.Conv1d(64, 64, 5, padding=2), nn.GroupNorm(8, 64), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "mlp256": (mlp, (30,), 256, 2),
    "mlp1024": (mlp, (30,), 1024, 2),
    "cnn2d": (images, (1, 28, 28), 128, 10),
    "cnn1d": (series, (40, 48), 256, 2),
    "gru": (Recurrent, (48, 40), 256, 2),
    "transformer": (Series, (48, 40), 256, 2),
    "text": (Text, (128,), 32, 2),
    "wide256": (wide, (1000,), 256, 2),
}


def engines(name: str, compiled: bool) -> dict[str, Callable[[], None]]:
    """A step of each engine on the same data."""
    make, shape, size, classes = WORKLOADS[name]
    torch.manual_seed(0)
    model, loss = make(), nn.CrossEntropyLoss()
    x = torch.randint(8000, (size, *shape)) if name == "text" else torch.randn(size, *shape)
    y = torch.randint(classes, (size,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def plain() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    steps = {"plain": plain}
    traced = loss_program(model, loss, {"x": x[0]}, y[0])
    for engine in ["eager", *(["compiled"] if compiled else [])]:
        it = lift(traced.program)
        # the sizes are the benchmark's: a run pads to a microbatch and to the sample's upper bound
        it.microbatch = min(it.microbatch, size)
        weights, constants = it.tensors(traced.blob)
        if engine == "compiled" and it.compile(weights, constants) is None:
            continue
        compile_noise(assembled)
        steps[engine] = private(it, weights, constants, {"x": x, "target": y}, size)
    return steps


def private(it, weights, constants, inputs, size) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    rows, noise, drawn = train.with_absent(inputs), SystemNoise(), torch.arange(size)
    optimizer = torch.optim.SGD(list(weights.values()), lr=1e-3)

    def step() -> None:
        total = train.clipped_sum(it, weights, constants, rows, drawn, 0.1)
        grads = train.private(total, 0.1, size, noise, weights)
        for name, weight in weights.items():
            weight.grad = grads[name]
        optimizer.step()

    return step


def cpu(step: Callable[[], None], repeats: int) -> float:
    began = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - began) / repeats


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--workloads", default=",".join(WORKLOADS))
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--compile", action="store_true")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in given.workloads.split(","):
        steps = engines(name, given.compile)
        repeats = 20 if name.startswith("mlp") else 2
        for step in steps.values():
            step()
        rounds = [{engine: cpu(step, repeats) for engine, step in steps.items()} for _ in range(given.rounds)]
        for engine in list(steps)[1:]:
            ratio = statistics.median(r[engine] / r["plain"] for r in rounds)
            rows.append({"workload": name, "engine": engine, "cpu_ratio": round(ratio, 3)})
            print(f"{name:12} {engine:9} {ratio:.2f}", flush=True)
    target = Path("build/bench/trainer.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
