"""When choosing between settings in private wins: against a default, and against trying each at its own price.

    python benchmarks/selection.py [--seeds 10] [--patients 4000] [--epsilon 1]

Brier score on other patients (0.25 is chance), by which is chosen too, of models trained on those of `methods.py`, 100 steps
of a fifth of them, for 8 candidates and for 24:

- default: `fit` as it is without settings;
- selection: K of the candidates, drawn as `select` draws them, at the noise that makes all of it (ε, δ)-private, for each mean;
- each: all candidates, each trained and scored at a noise with which all of them together are so, by the ledger's accounting;
- each at ε/k: the same with ε divided by their number, as one would by the sum of their ε.

Runs that do not count are left out, since they change nothing but the time. Writes build/bench/selection.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from methods import DELTA, WIDTH, made
from torch import Tensor, nn

from rapha_lab.curator.accounting import Gaussian, SampledGaussian, Selected, Sum, noise_for, runs_for
from rapha_lab.curator.lift import lift
from rapha_lab.curator.mapped import with_nobody
from rapha_lab.curator.mechanisms import train
from rapha_lab.curator.mechanisms.adaptive import Clip
from rapha_lab.curator.mechanisms.select import counted, tried
from rapha_lab.curator.noise import SeededNoise
from rapha_lab.protocol.messages import Candidate, Fit
from rapha_lab.session import recipe
from rapha_lab.session.tracing import loss_program

STEPS, SHARE = 100, 0.2
RATES, CLIPS, MOMENTA = (0.03, 0.1, 0.3, 1.0), (0.5, 4.0), (0.5, 0.9, 0.99)
FEW = [Candidate(lr=lr, clip=clip) for clip in CLIPS for lr in RATES]
MANY = [Candidate(lr=lr, clip=clip, momentum=m) for m in MOMENTA for clip in CLIPS for lr in RATES]
MEANS = (5.0, 10.0)


class Trial:
    """Made-up patients to train on, to choose by and to judge on, and a model."""

    def __init__(self, patients: int, epsilon: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 1))
        self.data, self.judges, self.others = (
            made(n, seed + k) for n, k in ((patients, 0), (patients // 5, 5000), (4000, 1000))
        )
        self.noise = SeededNoise(seed)
        x, y = self.data
        traced = loss_program(self.model, nn.BCEWithLogitsLoss(), {"x": x[0]}, y[0])
        self.lifted = lift(traced.program)
        self.parameters, self.constants = self.lifted.tensors(traced.blob)
        self.ask = Fit(
            dataset="d", split="train", epsilon=epsilon, program=traced.program,
            inputs={"x": [f"x{k}" for k in range(WIDTH)], "target": "y"},
            **recipe.choose(patients, epsilon, self.model, None, batch=round(SHARE * patients), epochs=STEPS * SHARE),
        )  # fmt: skip

    def run(self, ask: Fit, sigma: float) -> dict[str, Tensor]:
        """The weights of one training at this noise."""
        rows = dict(zip(("x", "target"), map(with_nobody, self.data), strict=True))
        everybody = lambda rows: torch.ones(len(rows), dtype=torch.bool)  # noqa: E731
        data = rows, ask, SHARE, Clip(ask, sigma), self.noise, lambda *_: None, everybody
        return train.train(self.lifted, self.parameters, self.constants, *data, finite=lambda *_: None)

    @torch.no_grad()
    def brier(self, weights: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> float:
        """The Brier score of a model with these weights."""
        self.model.load_state_dict(weights)
        return float((self.model(data[0])[:, 0].sigmoid() - data[1]).square().mean())

    def best(self, asks: Sequence[Fit], sigma: float, scores: float) -> float:
        """On others, the best by its noisy score on those who choose; the untrained model if there are none."""
        runs = [self.run(ask, sigma) for ask in asks]
        noise = self.noise.gaussian(len(runs)).mul_(scores / 2 / len(self.judges[0])).tolist()
        judged = [self.brier(weights, self.judges) + z for weights, z in zip(runs, noise, strict=True)]
        return self.brier(runs[judged.index(min(judged))] if runs else self.parameters, self.others)


def figures(patients: int, epsilon: float, seed: int) -> dict[str, float]:
    trial, one = Trial(patients, epsilon, seed), SampledGaussian(SHARE, 1.0, STEPS)
    found = {"default": trial.best([trial.ask], noise_for(one.with_noise, epsilon, DELTA), 0.0)}
    for candidates in (FEW, MANY):
        asks, k = [tried(trial.ask, candidate) for candidate in candidates], len(candidates)
        for mean in MEANS:
            loss = Selected(one, mean, runs_for(mean))
            loss = loss.with_noise(noise_for(loss.with_noise, epsilon, DELTA))
            drawn = trial.noise.uniform(counted(loss, trial.noise)).mul_(k).long().tolist()
            those = [asks[which] for which in drawn]
            found[f"of {k}, selection, runs={mean:g}"] = trial.best(those, loss.noise, loss.score.noise)
        training, score = (_shared(loss, k, epsilon) for loss in (one, Gaussian(1.0)))
        found[f"of {k}, each"] = trial.best(asks, training, score)
        training, score = (_shared(loss, 1, epsilon / k) for loss in (one, Gaussian(1.0)))
        found[f"of {k}, each at ε/k"] = trial.best(asks, training, score)
    return found


def _shared(loss: SampledGaussian | Gaussian, k: int, epsilon: float) -> float:
    """The noise at which k of them together are (ε, δ)-private."""
    return noise_for(lambda sigma: Sum([(loss.with_noise(sigma), k)]), epsilon, DELTA)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seeds", type=int, default=10)
    arguments.add_argument("--patients", type=int, default=4000)
    arguments.add_argument("--epsilon", type=float, default=1.0)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    found = []
    for seed in range(given.seeds):
        found.append(figures(given.patients, given.epsilon, seed))
        print(seed, {name: round(score, 3) for name, score in found[-1].items()}, flush=True)
    for name in found[0]:
        found_of = [each[name] for each in found]
        spread = statistics.stdev(found_of) if len(found_of) > 1 else 0.0
        rows.append({"method": name, "brier": round(statistics.mean(found_of), 3), "sd": round(spread, 3)})
        print(rows[-1])
    target = Path("build/bench/selection.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"epsilon": given.epsilon, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
