"""When what is offered beside plain DP-SGD wins: expected error of banded noise, and models trained with each method.

    python benchmarks/methods.py [--seeds 5] [--patients 8000]

The first table is exact: the root mean square error that noise adds to the iterates of SGD (learning rate 1, no
momentum) over that of independent noise at the same ε, δ = 1e-5, for so many bands. The second trains on made-up
patients by the curator's own mechanism and gives the mean log loss on others. Writes build/bench/methods.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from rapha_lab.curator.accounting import BandedGaussian, noise_for
from rapha_lab.curator.mapped import with_nobody
from rapha_lab.curator.mechanisms import banded, train
from rapha_lab.curator.noise import SeededNoise
from rapha_lab.protocol.messages import Fit, Optimizer
from rapha_lab.session.tracing import loss_program

DELTA, WIDTH = 1e-5, 20


def error(rate: float, steps: int, bands: int, epsilon: float) -> float:
    """Root mean square of the noise in the iterates, a number of norm 1 clipped to 1."""
    if bands * rate > 1:
        return float("nan")
    one = BandedGaussian(bands * rate, 1.0, bands, steps)
    sigma = noise_for(one.with_noise, epsilon, DELTA)
    c = banded.coefficients(bands)
    inverse = torch.zeros(steps, dtype=torch.float64)  # first column of the Toeplitz matrix C^-1
    inverse[0] = 1.0
    for t in range(1, steps):
        inverse[t] = -sum(float(c[k]) * inverse[t - k] for k in range(1, min(bands, t + 1)))
    summed = inverse.cumsum(0).square().cumsum(0).mean().sqrt()
    return float(sigma * c.norm() * summed)


def ratios() -> list[dict[str, Any]]:
    rows = []
    for rate, epochs in ((0.02, 10), (0.02, 40), (0.1, 20), (0.1, 100)):
        steps = round(epochs / rate)
        for epsilon in (1.0, 8.0):
            plain = error(rate, steps, 1, epsilon)
            found = {
                b: round(error(rate, steps, b, epsilon) / plain, 2)
                for b in (2, 4, 8, 16, 32)
                if b * rate <= 1
            }
            rows.append({"rate": rate, "epochs": epochs, "epsilon": epsilon, "error by bands": found})
            print(rows[-1], flush=True)
    return rows


class Records:
    """Stands for a view of made-up patients."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def of(self, which: Tensor) -> Records:
        return Records(self.x[which], self.y[which])

    def rows(self, inputs: Any) -> dict[str, Tensor]:
        return {n: with_nobody(self.x if isinstance(c, list) else self.y) for n, c in inputs.items()}

    def known(self, column: str) -> Tensor:
        return torch.ones(len(self.x), dtype=torch.bool)

    def present(self, rows: Tensor) -> Tensor:
        return torch.ones(len(rows), dtype=torch.bool)


class Public:
    """Stands for their schema."""

    def __init__(self, patients: int) -> None:
        self.patients = patients

    def expected(self, split: str) -> float:
        return float(self.patients)

    def layout(self, columns: Any) -> tuple[tuple[int, ...], str]:
        return ((WIDTH,) if isinstance(columns, list) else ()), "float32"

    def held(self, shapes: Any) -> None:
        """All of it fits in memory."""


def made(patients: int, seed: int, elsewhere: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs of very different use: a few matter, through a product too; elsewhere, partly others and less so."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(patients, WIDTH, generator=generator) * 2 - 1
    if elsewhere:
        risk = 2 * x[:, 0] - x[:, 1] + 3 * x[:, 2] * x[:, 3] + 0.5 * x[:, 10:16].sum(1)
    else:
        risk = 3 * x[:, 0] - 2 * x[:, 1] + 4 * x[:, 2] * x[:, 3] + 0.5 * x[:, 4:10].sum(1)
    return x, (torch.rand(patients, generator=generator) < risk.sigmoid()).float()


METHODS: dict[str, dict[str, Any]] = {
    "SGD": {"optimizer": ("sgd", {"lr": 1.0})},
    "SGD, average 0.95": {"optimizer": ("sgd", {"lr": 1.0}), "average": 0.95},
    "SGD, 4 bands": {"optimizer": ("sgd", {"lr": 1.0}), "bands": 4},
    "SGD, 4 bands, average": {"optimizer": ("sgd", {"lr": 1.0}), "bands": 4, "average": 0.95},
    "SGD, clip 0.1": {"optimizer": ("sgd", {"lr": 1.0}), "clip": 0.1},
    "SGD, clip 3": {"optimizer": ("sgd", {"lr": 1.0}), "clip": 3.0},
    "SGD, clip 10": {"optimizer": ("sgd", {"lr": 1.0}), "clip": 10.0},
    "SGD, quantile 0.5 from 1": {"optimizer": ("sgd", {"lr": 1.0}), "clip_quantile": 0.5},
    "SGD, quantile 0.9 from 1": {"optimizer": ("sgd", {"lr": 1.0}), "clip_quantile": 0.9},
    "SGD, quantile 0.9 from 0.1": {"optimizer": ("sgd", {"lr": 1.0}), "clip": 0.1, "clip_quantile": 0.9},
    "SGD, quantile 0.9 from 10": {"optimizer": ("sgd", {"lr": 1.0}), "clip": 10.0, "clip_quantile": 0.9},
    "SGD momentum": {"optimizer": ("sgd", {"lr": 0.3, "momentum": 0.9})},
    "SGD momentum, 4 bands": {"optimizer": ("sgd", {"lr": 0.3, "momentum": 0.9}), "bands": 4},
    "Adam": {"optimizer": ("adam", {"lr": 0.01})},
    "Adam, clip 0.1": {"optimizer": ("adam", {"lr": 0.01}), "clip": 0.1},
    "Adam, clip 3": {"optimizer": ("adam", {"lr": 0.01}), "clip": 3.0},
    "Adam, clip 10": {"optimizer": ("adam", {"lr": 0.01}), "clip": 10.0},
    "Adam, quantile 0.9 from 0.1": {"optimizer": ("adam", {"lr": 0.01}), "clip": 0.1, "clip_quantile": 0.9},
    "Adam, quantile 0.9 from 10": {"optimizer": ("adam", {"lr": 0.01}), "clip": 10.0, "clip_quantile": 0.9},
    "Adam, corrected": {"optimizer": ("adam", {"lr": 0.01}), "corrected": True},
    "public weights, SGD lr 0.1": {"optimizer": ("sgd", {"lr": 0.1}), "public": True},
    "public weights, Adam lr 0.001": {"optimizer": ("adam", {"lr": 0.001}), "public": True},
    "public weights, Adam, corrected": {
        "optimizer": ("adam", {"lr": 0.01}),
        "corrected": True,
        "public": True,
    },
}
ALONE = "public weights alone"


def pretrain(model: nn.Module, seed: int) -> None:
    """Ordinary training on 2,000 public patients of another place."""
    x, y = made(2000, seed + 2000, elsewhere=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
    for _ in range(100):  # stopped before they are overfitted, which starts worse than nothing
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y).backward()
        optimizer.step()


def trained(method: dict[str, Any], patients: int, epsilon: float, seed: int) -> float:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 1))
    (x, y), (others, outcomes) = made(patients, seed), made(4000, seed + 1000)
    loss = nn.BCEWithLogitsLoss()
    if method.get("public"):
        pretrain(model, seed)
    if "optimizer" not in method:
        return told(model, others, outcomes)
    traced = loss_program(model, loss, {"x": x[0]}, y[0])
    name, settings = method["optimizer"]
    batch = patients // 10
    ask = Fit(
        dataset="d", split="train", epsilon=epsilon, program=traced.program, steps=300, batch=batch,
        inputs={"x": [f"x{k}" for k in range(WIDTH)], "target": "y"},
        optimizer=Optimizer(name=name, settings=settings),
        **{"clip": 1.0} | {k: v for k, v in method.items() if k not in ("optimizer", "public")},
    )  # fmt: skip
    noise = SeededNoise(seed)
    plan = train.plan(ask, traced.blob, Public(patients), DELTA, noise)  # type: ignore[arg-type]
    weights = load(plan.run(Records(x, y), lambda *_: None).tensors)  # type: ignore[arg-type]
    model.load_state_dict(weights)
    return told(model, others, outcomes)


@torch.no_grad()
def told(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean log loss."""
    return float(nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y))


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--patients", type=int, default=8000)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    rows, table = [], ratios()
    for epsilon in (0.5, 2.0, 8.0):
        for name, method in (METHODS | {ALONE: {"public": True}}).items():
            losses = [trained(method, given.patients, epsilon, seed) for seed in range(given.seeds)]
            mean, spread = statistics.mean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0
            rows.append({"epsilon": epsilon, "method": name, "loss": round(mean, 4), "sd": round(spread, 4)})
            print(f"ε {epsilon:<4} {name:28} {mean:.4f} ± {spread:.4f}", flush=True)
    target = Path("build/bench/methods.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"bands": table, "trained": rows}, indent=1))


if __name__ == "__main__":
    main()
