"""A clip that follows a quantile: it counts whom it left whole, pays for that, and comes to the quantile."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from house import House, numbers
from safetensors.torch import save
from test_train import DOT, N, Public, Silent, Unit, ask, run
from torch import Tensor, nn

from rapha_lab.curator.accounting import SampledGaussian, epsilon_of
from rapha_lab.curator.lift import lift
from rapha_lab.curator.mechanisms import adaptive, train
from rapha_lab.curator.noise import SeededNoise, SystemNoise
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Optimizer
from rapha_lab.session import patients
from rapha_lab.session.questions import made

NOBODY = torch.full((N, 4), math.nan)
"""Patients who count for nothing."""


def counted(x: Tensor, mask: Tensor, clip: float) -> list[float]:
    """How many patients of gradients `x` count, and how many of them whole."""
    return lift(DOT).clipped_sum({"w": torch.zeros(4)}, {}, {"x": x}, mask, clip).counted.tolist()


def test_it_counts_whom_the_clip_left_whole() -> None:
    """The very numbers that are added decide; who is masked, not finite or huge counts neither way."""
    x = torch.zeros(12, 4)
    x[:8, 0] = torch.tensor([0.0, 1e-30, 0.5, 1.0, 1.001, 2.0, 1e20, -1.0])
    x[8, 1], x[9, 2], x[10, 3] = math.nan, math.inf, 1e30
    everyone = torch.ones(12, dtype=torch.bool)
    assert counted(x, everyone, 1.0) == [9, 6]  # the last patient, of zeros, is one too
    assert counted(x, everyone & (torch.arange(12) != 2), 1.0) == [8, 5]
    assert counted(x, everyone, 1e-6) == [9, 3]
    assert counted(x, ~everyone, 1.0) == [0, 0]


def test_nobody_moves_anybody_elses_count() -> None:
    """One patient more is one more counted, whole or not, in whatever company."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    everyone = torch.ones(16, dtype=torch.bool)
    for company in (1.0, 0.0, 1e30, math.nan):
        for i in range(16):
            mine = torch.arange(16) == i
            rows = torch.where(mine[:, None], x, x * company)
            alone = counted(rows, mine, 2.0)
            assert alone == [1, float(x[i].double().norm() <= 2.0)]
            pairs = zip(counted(rows, everyone, 2.0), counted(rows, ~mine, 2.0), alone, strict=True)
            assert all(whole - rest == one for whole, rest, one in pairs)


def test_a_step_moves_the_clip_by_the_true_count() -> None:
    """Without noise, by exp(-0.2 (share whole - quantile)) for the share of the expected patients."""
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(1))
    x[::7] = math.nan
    norms = x.double().norm(dim=1)
    for quantile in (0.5, 0.75):
        _, values = run(x, Silent(0), batch=N, clip=1.5, clip_quantile=quantile)
        whole, known = int((norms <= 1.5).sum()), int((~norms.isnan()).sum())
        wanted = 1.5 * math.exp(-0.2 * (whole - quantile * known) / N)
        assert values["last_clip"] == pytest.approx(wanted, rel=1e-12)
        assert values["clip"] == 1.5
        assert values["clip_quantile"] == quantile


SETTINGS = [(0.5, 100, 1.0), (0.5, 10, 0.3), (0.9, 500, 8.0), (0.05, 40, 1.0)]


def deviations(quantile: float, batch: int, epsilon: float) -> tuple[float, float, float]:
    """What a step adds of noise: to the sum of gradients, over the most that a patient moves it, likewise to the count,
    and what was charged."""
    clip, asked = 2.0, {"batch": batch, "epsilon": epsilon, "clip_quantile": quantile}
    moved, values = run(NOBODY, Unit(0), clip=clip, **asked)
    it = lift(DOT)
    it.for_batches_of(train.capacity(train.most(batch, batch / N, "train"), 1))
    of_sum = float(-moved[0]) * batch / (clip * (1 + train.slack(it.microbatch)))
    of_count = -5 * batch * math.log(values["last_clip"] / clip) / max(quantile, 1 - quantile)
    return of_sum, of_count, values["noise"]


def test_both_noises_together_are_what_was_charged() -> None:
    """Sum and count, each over its noise, move by 1/σ together for any patient, whatever sets the count's noise."""
    for setting in SETTINGS:
        of_sum, of_count, sigma = deviations(*setting)
        assert of_sum**-2 + of_count**-2 == pytest.approx(sigma**-2, rel=1e-5)
        assert sigma < of_sum < 1.0207 * sigma
    assert deviations(0.5, 100, 1.0)[1] == pytest.approx(2 * 100 / 20, rel=1e-5)  # the paper's rule


def test_the_price_is_that_of_a_clip_that_stays() -> None:
    """One sampled Gaussian a step."""
    plans = [
        train.plan(ask(steps=30, **more), save({"w": torch.zeros(4)}), Public(), 1e-5, SystemNoise())  # type: ignore[arg-type]
        for more in ({}, {"clip_quantile": 0.5})
    ]
    assert plans[0].loss == plans[1].loss == SampledGaussian(0.1, plans[0].loss.noise, 30)  # type: ignore[attr-defined]
    assert 0.99 < epsilon_of(plans[1].loss, 1e-5) <= 1.0


def test_the_noise_of_each_step_is_of_that_steps_clip() -> None:
    """Unit noise makes the clip shrink by the same factor each time, and the noise with it."""
    moved, values = run(NOBODY, Unit(0), steps=20, clip=2.0, clip_quantile=0.5)
    shrinks = (values["last_clip"] / 2.0) ** (1 / 20)
    assert shrinks < 0.99
    deviation = (values["noise"] ** -2 - (2 * values["count_noise"]) ** -2) ** -0.5
    wanted = deviation * sum(2.0 * shrinks**t for t in range(20)) / 100
    assert wanted < -float(moved[0]) < 1.01 * wanted  # rounding's slack


@pytest.mark.parametrize("quantile", [0.5, 0.9])
@pytest.mark.parametrize("start", [0.02, 50.0])
def test_the_clip_comes_to_the_quantile(quantile: float, start: float) -> None:
    """From far below and far above, also where a third of the declared patients are not there."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2 * N // 3, 4, generator=generator)
    x *= torch.randn(len(x), 1, generator=generator).exp()
    shares = []
    for seed in range(3):
        asked = {"batch": N // 4, "steps": 500, "epsilon": 4.0, "clip": start, "clip_quantile": quantile}
        last = run(x, SeededNoise(seed), **asked)[1]["last_clip"]
        shares.append(float((x.norm(dim=1) <= last).double().mean()))
    assert abs(sum(shares) / 3 - quantile) < 0.04


@pytest.mark.parametrize("way", [-1.0, 1.0])
def test_the_clip_stays_within_public_bounds(way: float) -> None:
    """However loud the count's noise: nothing overflows, and the weights stay numbers."""

    class Loud(SeededNoise):
        def gaussian(self, n: int) -> Tensor:
            return torch.full((n,), 8.6 * way, dtype=torch.float64)

    weights, values = run(NOBODY, Loud(0), batch=1, epsilon=0.01, steps=50, clip_quantile=0.5)
    assert values["last_clip"] == pytest.approx(adaptive.LOW if way > 0 else adaptive.HIGH)
    assert weights.isfinite().all()


def test_without_a_quantile_the_clip_stays() -> None:
    """And nothing is said of a count, nor noise drawn for one."""
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(3))
    _, values = run(x, SystemNoise(), steps=3)
    assert not values.keys() & {"clip_quantile", "count_noise", "last_clip"}


@pytest.mark.parametrize("changes", [{"bands": 2}, {"corrected": True, "optimizer": Optimizer(name="adam")}])
def test_options_made_for_noise_of_one_size_are_refused(changes: dict[str, Any]) -> None:
    """Naming the option."""
    with pytest.raises(RequestError) as caught:
        run(NOBODY, Silent(0), clip_quantile=0.5, **changes)
    assert caught.value.field == "clip_quantile"


def test_a_fit_tells_its_first_and_last_clip(tmp_path: Path) -> None:
    """Asked for in the words of fit; a quantile that is none is refused before anything is spent."""
    import polars

    frame = polars.DataFrame({"pid": [f"{n}" for n in range(400)], "x0": [0.5] * 400, "y": [True] * 400})
    house, model = House(tmp_path, numbers("adaptive", 1, 400), frame), nn.Linear(1, 1)
    common: dict[str, Any] = {"inputs": ["x0"], "target": "y", "epsilon": 1.0, "batch": 50, "clip": 3.0}
    for wrong in (-0.5, 1.0, math.nan, None, "half"):
        with pytest.raises(RequestError) as caught:
            house.patients.train.fit(model, clip_quantile=wrong, **common)
        assert caught.value.field == "clip_quantile"
    assert not house.releases
    release = house.patients.train.fit(model, clip_quantile=0.5, average=0.9, **common)
    assert release["clipping norm"].value == 3.0
    assert 0 < release["clipping norm in the end"].value < 3.0
    assert release.count_noise >= 50 / 20
    house.ledger.close()


@pytest.mark.parametrize(("start", "quantile", "like"), [(0.1, 0.9, 2.0), (10.0, 0.9, 10.0), (0.1, 0.0, 0.1)])
def test_a_low_start_is_given_no_faster_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: float, quantile: float, like: float
) -> None:
    """The clip climbs from it; the rate that suits it would have the model run away."""
    import polars

    asked: list[Any] = []
    monkeypatch.setattr(patients, "made", lambda kind, **fields: asked.append(fields) or made(kind, **fields))
    frame = polars.DataFrame({"pid": [f"{n}" for n in range(400)], "x0": [0.5] * 400, "y": [True] * 400})
    house, model = House(tmp_path, numbers("adaptive", 1, 400), frame), nn.Linear(1, 1)
    common: dict[str, Any] = {"inputs": ["x0"], "target": "y", "epsilon": 1.0, "batch": 50, "epochs": 1}
    house.patients.train.fit(model, clip=start, clip_quantile=quantile, **common)
    house.patients.train.fit(model, clip=like, **common)
    followed, fixed = (each["optimizer"].settings["lr"] for each in asked)
    assert followed == fixed
    house.ledger.close()


# Teeth


def silent_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(adaptive, "noisy", lambda values, deviation, noise: values)


def cheap_gradients(patch: pytest.MonkeyPatch) -> None:
    original = adaptive.Clip.__init__

    def init(self: Any, request: Any, sigma: float) -> None:
        original(self, request, sigma)
        self.noise = sigma

    patch.setattr(adaptive.Clip, "__init__", init)


def halved_count(patch: pytest.MonkeyPatch) -> None:
    original = adaptive.noisy
    patch.setattr(adaptive, "noisy", lambda values, deviation, noise: original(values, deviation / 2, noise))


@pytest.mark.parametrize("mutant", [silent_count, cheap_gradients, halved_count])
def test_noise_that_was_not_paid_for_is_caught(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count without noise or with half of it, or gradients whose noise did not make room for it."""
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ZeroDivisionError)):
        test_both_noises_together_are_what_was_charged()


def test_noise_of_the_first_clip_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the clip grew and its noise did not, or shrank."""
    original = train.private
    seen: list[float] = []

    def first(total: Any, deviation: float, *more: Any) -> Any:
        seen.append(deviation)
        return original(total, seen[0], *more)

    monkeypatch.setattr(train, "private", first)
    with pytest.raises(AssertionError):
        test_the_noise_of_each_step_is_of_that_steps_clip()
