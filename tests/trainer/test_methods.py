"""What trains better than plain DP-SGD: each option does what its paper says, and is charged what it loses."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from house import House, numbers
from safetensors.torch import load, save
from test_train import N, Public, Records, Silent, Unit, ask
from torch import Tensor, nn

from rapha_lab.curator.accounting import BandedGaussian, SampledGaussian, decode_loss, encode_loss, epsilon_of
from rapha_lab.curator.mechanisms import banded, train
from rapha_lab.curator.mechanisms.adam import CorrectedAdam
from rapha_lab.curator.noise import Noise, SeededNoise, noisy
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Optimizer


def trained(values: Tensor, noise: Noise, **changes: Any) -> tuple[Tensor, Any]:
    """Weights from zero on the loss w.x, and the plan."""
    plan = train.plan(ask(**changes), save({"w": torch.zeros(4)}), Public(), 1e-5, noise)  # type: ignore[arg-type]
    return load(plan.run(Records(values), lambda *_: None).tensors)["w"], plan  # type: ignore[arg-type]


# Bands of noise


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_bands_are_the_root_of_what_sgd_sums(momentum: float) -> None:
    """With all bands, C C is the matrix that makes iterates of gradients."""
    n = 12
    c = banded.coefficients(n, momentum)
    matrix = sum(torch.diag(c[k].expand(n - k), -k) for k in range(n))
    work = [sum(momentum**i for i in range(k + 1)) for k in range(n)]
    wanted = sum(torch.diag(torch.tensor(work[k], dtype=torch.float64).expand(n - k), -k) for k in range(n))
    torch.testing.assert_close(matrix @ matrix, wanted)


def test_what_is_released_is_c_inverse_of_independent_noise() -> None:
    """C times the released sums is C times the true ones plus independent noise, grown by the norm of C's column."""
    b, steps, size, noise = 4, 4000, 3, SeededNoise(0)
    c, memory, x = banded.coefficients(b), banded.Memory(b), torch.randn(steps, size, dtype=torch.float64)
    given = x.clone()
    for t in range(steps):
        with memory.of(given[t], 1.0):
            noisy(given[t], 2.0 * memory.norm, noise)
    w = given - x
    z = sum(c[k] * torch.cat([w.new_zeros(k, size), w[: steps - k]]) for k in range(b))
    assert abs(float(z.std()) / (2.0 * float(c.norm())) - 1) < 0.03
    lags = [float((z[k:] * z[: steps - k]).mean() / z.var()) for k in range(1, 6)]
    assert max(map(abs, lags)) < 0.05
    assert float(w.sum(0).std()) < 0.8 * float(z.sum(0).std())  # which is what it is for


def test_each_patient_has_one_turn_in_as_many_steps_as_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn at steps that leave the same rest, at b times the rate; batches are as large as without bands."""
    seen: list[Tensor] = []
    original = train.draw

    def noted(*args: Any) -> Tensor:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(train, "draw", noted)
    trained(torch.randn(N, 4), SeededNoise(3), steps=40, batch=100, bands=5)
    steps = torch.zeros(N, 40)
    for step, drawn in enumerate(seen):
        steps[drawn[drawn < N], step] = 1
    turns = torch.stack([steps[:, rest::5].sum(1) for rest in range(5)], 1)
    assert int((turns > 0).sum(1).max()) == 1
    assert abs(float(steps.sum(0).mean()) - 100) < 5
    assert abs(float(turns.sum(1).mean()) - 4) < 0.3  # 8 turns, each taken with probability 1/2


def test_bands_are_charged_as_a_sampled_gaussian_a_turn() -> None:
    """The loss of T steps is that of ⌈T/b⌉ at b times the rate; parts of it round up; with one band it is DP-SGD's."""
    loss = BandedGaussian(0.5, 2.0, 4, 10)
    for steps, turns in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (10, 3)):
        assert loss.part(steps).rdp(8) == SampledGaussian(0.5, 2.0, turns).rdp(8)
    assert loss.part(0).rdp(8) == 0.0
    assert BandedGaussian(0.1, 2.0, 1, 10).rdp(8) == SampledGaussian(0.1, 2.0, 10).rdp(8)
    assert decode_loss(encode_loss(loss)) == loss
    _, plan = trained(torch.zeros(N, 4), Silent(0), steps=50, bands=5)
    assert plan.loss == BandedGaussian(0.5, plan.loss.noise, 5, 50)
    assert 0.99 < epsilon_of(plan.loss, 1e-5) <= 1.0


def test_the_noise_of_bands_is_not_less_than_was_charged() -> None:
    """At the first step, where nothing is taken back: sigma times the norm of C's column, times C, over L."""
    moved, plan = trained(torch.zeros(N, 4), Unit(0), bands=4)
    least = plan.loss.noise * float(banded.coefficients(4).norm())
    assert torch.allclose(-moved * 100, torch.full((4,), least), rtol=1e-2)
    assert float((-moved * 100).min()) > least


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (
            {"bands": 2, "optimizer": Optimizer(name="sgd", settings={"lr": 1.0, "momentum": 1e6})},
            "optimizer.settings.momentum",
        ),
        ({"bands": 11}, "bands"),  # of a tenth of the patients each there are ten turns
        ({"corrected": True}, "corrected"),
        ({"corrected": True, "bands": 2, "optimizer": Optimizer(name="adam")}, "corrected"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes: dict[str, Any], field: str) -> None:
    """Naming the option."""
    with pytest.raises(RequestError) as caught:
        trained(torch.zeros(N, 4), Silent(0), **changes)
    assert caught.value.field == field


def test_too_much_noise_to_remember_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything runs."""
    monkeypatch.setattr(train, "MEMORY", 10)
    with pytest.raises(RequestError, match="bands is 4"):
        trained(torch.zeros(N, 4), Silent(0), bands=4)


# Adam without the noise in its second moment


def test_adam_without_noise_is_adamw() -> None:
    """To its eps."""
    torch.manual_seed(0)
    grads = torch.randn(20, 6)
    ours, theirs = torch.ones(6), torch.ones(6)
    mine = CorrectedAdam([ours], 1e-9, lr=0.1, weight_decay=0.01)
    plain = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01)
    for g in grads:
        ours.grad, theirs.grad = g.clone(), g.clone()
        mine.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_steps_regain_the_sizes_that_noise_took_from_them() -> None:
    """Of two numbers, one with a gradient ten times the other's, Adam moves both alike without noise; drowned in
    noise it does not, and corrected it does again."""
    torch.manual_seed(1)
    signal, phi = torch.tensor([3.0, 0.3]), 1.0
    moved = {}
    for name in ("plain", "corrected"):
        w = torch.zeros(2)
        rule: Any = torch.optim.Adam([w], lr=0.01) if name == "plain" else CorrectedAdam([w], phi, lr=0.01)
        for _ in range(3000):
            w.grad = signal + phi * torch.randn(2)
            rule.step()
        moved[name] = float(w[1] / w[0])
    assert moved["plain"] < 0.35
    assert 0.7 < moved["corrected"] < 1.4


# Averages


def test_the_average_is_what_is_released() -> None:
    """Weights that fall by one a step, averaged with the decay as it grows."""
    x = torch.full((N, 4), 0.5)
    last, _ = trained(x, Silent(0), batch=N, steps=5)
    mean, plan = trained(x, Silent(0), batch=N, steps=5, average=0.9)
    step = float(last[0]) / 5
    wanted = 0.0
    for t in range(5):
        decay = min(0.9, (1 + t) / (10 + t))
        wanted = decay * wanted + (1 - decay) * step * (t + 1)
    torch.testing.assert_close(mean, torch.full((4,), wanted), rtol=1e-4, atol=1e-5)
    assert plan.loss.times == 5


def test_options_are_told_in_the_release(tmp_path: Path) -> None:
    """And asked for in the words of fit."""
    import polars

    frame = polars.DataFrame({"pid": [f"{n}" for n in range(400)], "x0": [0.5] * 400, "y": [True] * 400})
    house, model = House(tmp_path, numbers("options", 1, 400), frame), nn.Linear(1, 1)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    common: dict[str, Any] = {"inputs": ["x0"], "target": "y", "epsilon": 1.0, "batch": 50, "epochs": 2}
    house.patients.train.fit(model, bands=2, average=0.5, **common)
    house.patients.train.fit(model, optimizer=adam, corrected=True, **common)
    house.patients.train.fit(model, **common)
    told = [release.values.keys() & {"bands", "average", "corrected"} for release in house.releases]
    assert told == [{"bands", "average"}, {"corrected"}, set()]
    with pytest.raises(RequestError) as caught:
        house.patients.train.fit(model, average=1.0, **common)
    assert caught.value.field == "average"
    assert math.isfinite(house.spent())
    house.ledger.close()


def test_the_survival_model_of_the_documentation_trains(tmp_path: Path) -> None:
    """As it is printed there; who has an x below 0 was still alive when last seen, and the model finds that out."""
    import polars

    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    whole, loop = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "hazards" in block
    ]
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, 2000)
    time, death = rng.uniform(0, 1000, 2000), x > 0
    frame = polars.DataFrame({"pid": [f"{n}" for n in range(2000)], "x0": x, "time": time, "death": death})
    schema = numbers("survival", 1, 2000, outcome=False)
    about = {"meaning": "Follow-up.", "public": "By design."}
    schema["columns"] += [
        {"name": "time", "type": "number", "bounds": [0, 1000], **about},
        {"name": "death", "type": "boolean", **about},
    ]
    house = House(tmp_path, schema, frame, noise=SeededNoise(1), metrics=("concordance",))
    cell: dict[str, Any] = {"patients": house.patients, "FEATURES": ["x0"]}
    torch.manual_seed(0)
    for code in (whole, loop):
        exec(code, cell)
        risks = cell["score"](torch.tensor([[-1.0], [1.0]]))
        assert risks[1] > risks[0] + 0.5
        torch.nn.init.zeros_(cell["score"].weight)
    assert [release.op for release in house.releases] == ["fit", "evaluate", "open"]
    assert set(house.releases[1].values["metrics"]) == {"concordance"}
    house.ledger.close()
