"""Scripts written for Opacus run in a cell once their DataLoader is `patients.train.loader(...)`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import opacus
import polars
import pytest
import torch
from house import House, numbers

from rapha_lab.protocol.errors import RequestError
from rapha_lab.session.interpreter import Screen, run
from rapha_lab.session.opacus import PrivacyEngine

N = 600

SCRIPT = """
import torch
from opacus import PrivacyEngine
from torch import nn

model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
loader = patients.train.loader(["x0", "x1"], "y", batch_size=100)
engine = PrivacyEngine(accountant="rdp")
model, optimizer, loader = engine.{call}(
    module=model, optimizer=optimizer, data_loader=loader, max_grad_norm=1.0, {price}
)
criterion = nn.BCEWithLogitsLoss()
for epoch in range(4):
    for x, y in loader:
        optimizer.zero_grad()
        loss = criterion(model(x).squeeze(1), y)
        loss.backward()
        optimizer.step()
epsilon = engine.get_epsilon(delta=1e-5)
"""


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Patients whose outcome follows from two numbers."""
    x = np.random.default_rng(0).uniform(-1, 1, (N, 2))
    columns = {"pid": [f"p{n}" for n in range(N)], "x0": x[:, 0], "x1": x[:, 1], "y": x.sum(1) > 0}
    found = House(tmp_path, numbers("script", 2, N), polars.DataFrame(columns))
    yield found
    found.ledger.close()


def cell(house: House, call: str, price: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"patients": house.patients}
    run(SCRIPT.format(call=call, price=price), namespace, Screen(lambda output: None))
    return namespace


def learnt(model: Any) -> bool:
    x = torch.rand(500, 2) * 2 - 1
    return float(((model(x)[:, 0] > 0) == (x.sum(1) > 0)).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("call", "price"),
    [
        ("make_private_with_epsilon", "target_epsilon=3, target_delta=1e-5, epochs=4"),
        ("make_private", "target_epsilon=3, epochs=4"),
    ],
)
def test_an_epsilon_is_that_of_all_epochs(house: House, call: str, price: str) -> None:
    """One loop over four passes, released at its end."""
    told = cell(house, call, price)
    (release,) = house.releases
    assert release.epsilon == told["epsilon"] == 3.0
    assert release.values["steps"] == 4 * len(told["loader"]) == 20
    assert release.values["clip"] == 1.0
    assert learnt(told["model"])
    assert 2.9 < house.spent() <= 3.0


def test_a_noise_multiplier_is_had_at_the_epsilon_that_it_has(house: House) -> None:
    """Not less noise than was asked, and hardly more; looking for it is free."""
    told = cell(house, "make_private", "noise_multiplier=1.3, epochs=4")
    (release,) = house.releases
    assert 1.3 <= release.values["noise"] <= 1.313
    assert release.epsilon == told["epsilon"]
    assert abs(house.spent() - release.epsilon) < 0.01 * release.epsilon


def test_outside_of_cells_opacus_is_what_it_was(house: House) -> None:
    """The class is put in while a cell runs."""
    original = opacus.PrivacyEngine
    told = cell(house, "make_private", "target_epsilon=3")
    assert opacus.PrivacyEngine is original
    assert told["PrivacyEngine"] is PrivacyEngine


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data_loader": [1, 2]}, "data_loader"),
        ({"target_epsilon": None}, "target_epsilon"),
        ({"noise_multiplier": 1.0}, "target_epsilon"),
        ({"max_grad_norm": [1.0, 2.0]}, "max_grad_norm"),
        ({"clipping": "per_layer"}, "max_grad_norm"),
        ({"loss_reduction": "sum"}, "loss_reduction"),
    ],
)
def test_what_would_change_the_mechanism_is_refused(
    house: House, changes: dict[str, Any], field: str
) -> None:
    """Naming the argument, and what to give instead."""
    asked: dict[str, Any] = {"module": None, "optimizer": None, "max_grad_norm": 1.0, "target_epsilon": 1.0}
    asked |= {"data_loader": house.patients.train.loader(["x0"], "y"), **changes}
    with pytest.raises(RequestError) as caught:
        PrivacyEngine().make_private(**asked)
    assert caught.value.field == field
    assert caught.value.instead


def test_a_loader_without_a_price_is_not_gone_through(house: House) -> None:
    """It names both ways to give it one."""
    with pytest.raises(RequestError, match="make_private"):
        next(iter(house.patients.train.loader(["x0"], "y")))
