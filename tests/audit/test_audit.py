"""One-run audits of every way to train, on a real desk and ledger: below the charged ε, and above it once broken.

Forty thousand canaries, each a patient or not by a coin; a canary's gradient is ten times the clip in a number of
its own (a Dirac canary), which no gradient can beat. ε and guesses are such that twice a patient's part is refuted.
RAPHA_LAB_DEEP=1 repeats each sound audit twenty times, with the noise of production.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import polars
import pytest
import torch
from house import DELTA, House
from torch import Tensor, nn

from rapha_lab.client.audit import Audit, audit, coins, p_value
from rapha_lab.curator.lift import clipping
from rapha_lab.curator.mechanisms import banded, train
from rapha_lab.curator.noise import SeededNoise, SystemNoise

CANARIES, EPSILON, GUESSES, LARGE = 40_000, 2.0, 600, 10.0
DEEP = bool(os.environ.get("RAPHA_LAB_DEEP"))
TRAIN = 0.98
PRESENT = coins(CANARIES, seed=1)
STARTS = count()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The canaries that came up heads; how many were expected is public."""
    names = [f"c{k}" for k in range(CANARIES)]
    column = {"meaning": "Which bird.", "public": "By design."}
    columns = [
        {"name": "bird", "type": "category", "categories": names, **column},
        {"name": "y", "type": "boolean", **column},
    ]
    about = {"title": "Birds", "citation": "none", "licence": "none", "source": "birds.parquet"}
    schema = {"name": "birds", "patient": "pid", "patients": CANARIES // 2, "columns": columns, **about}
    schema["splits"] = {"train": TRAIN, "validation": (1 - TRAIN) / 2, "test": (1 - TRAIN) / 2}
    frame = polars.DataFrame({"pid": names, "bird": names, "y": [False] * CANARIES})
    folder = tmp_path_factory.mktemp("birds")
    found = House(folder, schema, frame.filter(polars.Series(PRESENT)), epsilon=1000.0, metrics=["logloss"])
    yield found
    found.ledger.close()


class Dirac(nn.Module):
    """A weight for each canary; what it learns is how loud that canary was."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = nn.Embedding(CANARIES, 1)
        # another start each time: a question asked again would get the answer it got before
        nn.init.constant_(self.heard.weight, next(STARTS) / 1000)

    def forward(self, bird: Tensor) -> Tensor:
        return -LARGE * self.heard(bird)[:, 0]


def fit(house: House, *, share: float = 1.0, steps: int = 1, **options: Any) -> np.ndarray:
    model = Dirac()
    optimizer = options.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=1.0)
    batch = round(share * CANARIES / 2)
    house.patients.fit(
        model, lambda said, y: (said + 0 * y).mean(), inputs="bird", target="y", epsilon=EPSILON, clip=1.0,
        batch=batch, epochs=(steps - 0.5) * 2 * batch / CANARIES, optimizer=optimizer, **options,
    )  # fmt: skip
    return model.heard.weight.detach()[:, 0].numpy()


def loop(house: House) -> np.ndarray:
    model = Dirac()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for batch in house.patients.batches(size=CANARIES // 2, epochs=2, epsilon=EPSILON, clip=1.0):
        optimizer.zero_grad()
        model(batch["bird"]).mean().backward()
        optimizer.step()
    return model.heard.weight.detach()[:, 0].numpy()


def selection(house: House) -> np.ndarray:
    """Of nearly all canaries, and on nearly none of them chosen."""
    model = Dirac()
    house.patients.train.fit(
        model, lambda said, y: (said + 0 * y).mean(), inputs="bird", target="y", epsilon=EPSILON, clip=1.0,
        batch=round(TRAIN * CANARIES / 2), epochs=0.5, optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        candidates=[{"lr": 1.0}, {"lr": 0.9}], bound=1.0,
    )  # fmt: skip
    return model.heard.weight.detach()[:, 0].numpy()


PATHS: dict[str, Callable[[House], np.ndarray]] = {
    "fit": fit,
    "fit on samples": lambda house: fit(house, share=0.5, steps=4),
    "loop": loop,
    "bands": lambda house: fit(house, share=0.25, steps=8, bands=4),
    "average": lambda house: fit(house, average=0.5),
    "selection": selection,
    "corrected": lambda house: fit(house, steps=4, corrected=True, optimizer=torch.optim.Adam),
    "adaptive clip": lambda house: fit(house, steps=3, clip_quantile=0.5),
}


def audited(house: House, path: str) -> Audit:
    house.desk._noise = SystemNoise() if DEEP else SeededNoise(0)
    scores = PATHS[path](house)
    assert house.releases[-1].epsilon == EPSILON
    return audit(scores, PRESENT, DELTA, guesses=GUESSES)


@pytest.mark.parametrize("path", PATHS)
def test_a_sound_training_shows_less_than_it_charges(house: House, path: str) -> None:
    """The bound at 95 % is below the charged ε, by far; and the audit is not blind."""
    bounds = [audited(house, path).bound for _ in range(20 if DEEP else 1)]
    assert max(bounds) < EPSILON
    if path != "corrected":  # whose steps are of one size, whoever is loud
        assert (max if path == "selection" else min)(bounds) > 0.3  # none may count


def quartered(patch: pytest.MonkeyPatch) -> None:
    original = train.private
    patch.setattr(train, "private", lambda total, deviation, *args: original(total, deviation / 4, *args))


def unclipped(patch: pytest.MonkeyPatch) -> None:
    original = clipping.clipped_sum
    patch.setattr(clipping, "clipped_sum", lambda found, mask, clip, n: original(found, mask, clip * 1e6, n))


def twice(patch: pytest.MonkeyPatch) -> None:
    original = train.draw
    patch.setattr(train, "draw", lambda *args: torch.cat([original(*args)] * 2))


class Every:
    """Stands for patients' turns: it is always theirs."""

    def __getitem__(self, rows: Any) -> Every:
        return self

    def __eq__(self, other: object) -> Any:
        return torch.ones(1, dtype=torch.bool)

    __hash__ = None  # type: ignore[assignment]


def every_turn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(banded, "turns", lambda count, bands, noise: Every())
    patch.setattr(train, "most", lambda batch, rate, split: 5.0 * batch)


BROKEN = {"noise quartered": quartered, "clipping skipped": unclipped, "a patient counted twice": twice}


@pytest.mark.parametrize("path", ["fit", "loop", "average", "adaptive clip"])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_training_is_found(
    house: House, path: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same audit refutes the charged ε."""
    BROKEN[fault](monkeypatch)
    assert audited(house, path).bound > EPSILON


# The bound itself


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_guesses_at_the_odds_that_epsilon_allows_refute_it_seldom(epsilon: float) -> None:
    """Randomised response is right with odds e^ε exactly: its bound is above ε in 5 % of the audits at most, and near."""
    rng, right = np.random.default_rng(0), 1 / (1 + np.exp(-epsilon))
    bounds = []
    for _ in range(200):
        present = coins(1000, int(rng.integers(1 << 30)))
        told = np.where(rng.random(1000) < right, present, ~present)
        bounds.append(audit(told + rng.random(1000) / 2, present, 0.0, guesses=1000).bound)
    assert np.mean(np.array(bounds) > epsilon) <= 0.08
    assert np.median(bounds) > 0.75 * epsilon


def test_the_bound_moves_the_right_way() -> None:
    """More right guesses refute more; a larger δ, less confidence's worth of guesses, or chance refute less."""
    assert p_value(90, 100, 1000, 1.0, 1e-5) < p_value(85, 100, 1000, 1.0, 1e-5)
    assert p_value(90, 100, 1000, 1.0, 1e-3) > p_value(90, 100, 1000, 1.0, 1e-5)
    assert p_value(90, 100, 1000, 2.0, 1e-5) > p_value(90, 100, 1000, 1.0, 1e-5)
    assert p_value(0, 100, 1000, 0.0, 1e-5) == 1.0
    scores, present = np.arange(1000.0), np.arange(1000) % 2 == 0
    assert audit(scores, present, 1e-5, guesses=100).bound == 0.0


@pytest.mark.parametrize("fault", ["noise quartered", "clipping skipped"])
def test_a_selection_of_broken_trainings_is_found(
    house: House, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its best run alone."""
    BROKEN[fault](monkeypatch)
    assert audited(house, "selection").bound > EPSILON


def test_a_patient_who_takes_every_turn_is_found(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bands of noise, parts that overlap weigh more than was charged."""
    every_turn(monkeypatch)
    assert audited(house, "bands").bound > EPSILON
