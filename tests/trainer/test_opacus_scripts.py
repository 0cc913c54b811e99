"""Scripts written for Opacus run in a cell once their DataLoader is `patients.train.loader(...)`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import opacus
import polars
import pytest
import torch
from house import House, numbers

from rapha_lab.protocol.errors import RequestError, SealedError
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
    told = cell(house, "make_private", "target_epsilon=3, epochs=4")
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
    """Neither make_private, nor the loader, nor the cell says an ε."""
    with pytest.raises(RequestError, match="No ε was given") as caught:
        next(iter(house.patients.train.loader(["x0"], "y")))
    assert caught.value.field == "epsilon"


def test_more_epochs_than_were_paid_for_are_refused_and_not_empty(house: House) -> None:
    """Once epochs were given, each further pass over no batch at all would have looked like training."""
    with pytest.raises(RequestError, match="more than epochs=1 times"):
        cell(house, "make_private", "target_epsilon=3")


def test_a_loader_is_gone_through_at_its_own_price(house: House) -> None:
    """As in any script with a DataLoader; a look at a first batch is one of those paid for."""
    model = torch.nn.Linear(2, 1)
    loader = house.patients.train.loader(["x0", "x1"], "y", batch_size=100, epochs=2, epsilon=1.0)
    x, _ = next(iter(loader))
    assert repr(x.shape[1]) == "2"
    taken = 0
    for _ in range(2):
        for x, y in loader:
            torch.nn.functional.binary_cross_entropy_with_logits(model(x).squeeze(1), y).backward()
            taken += 1
    assert taken == 2 * len(loader) - 1
    assert [release.epsilon for release in house.releases] == [1.0]


def test_judging_by_a_loader_says_what_to_ask(house: House) -> None:
    """A script's test loop has no gradients, and would pay for nothing."""
    loader = house.patients.test.loader(["x0", "x1"], "y", epsilon=1.0)
    with torch.no_grad(), pytest.raises(RequestError, match=r"patients\.test\.evaluate"):
        list(loader)
    with pytest.raises(SealedError, match=r"loader\.batch_size"):
        len(loader.dataset)


AROUND = """
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.accountants import RDPAccountant
from opacus.layers import DPLSTM
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.validators import ModuleValidator
from torch import nn
from tqdm import tqdm

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x)))).squeeze(1)

assert not ModuleValidator.is_valid(Net()) and len(ModuleValidator.validate(Net(), strict=False)) == 1
model = ModuleValidator.fix_and_validate(Net())
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
engine = PrivacyEngine()
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model, optimizer=optimizer, data_loader=patients.train.loader(["x0", "x1"], "y", batch_size=100),
    target_epsilon=8, target_delta=1e-5, epochs=4, max_grad_norm=1.0)
assert isinstance(model, GradSampleModule) and isinstance(optimizer, DPOptimizer) and DPLSTM is nn.LSTM
noise, seen = optimizer.noise_multiplier, []
for epoch in tqdm(range(4), desc="epochs"):
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=32, optimizer=optimizer) as safe:
        for x, y in tqdm(safe):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(x), y).backward()
            optimizer.step()
    seen.append((engine.get_epsilon(1e-5), engine.accountant.get_epsilon(delta=1e-5)))
names = list(model._module.state_dict())
"""


def test_what_scripts_have_around_their_loop_is_there(house: House) -> None:
    """Validators, memory managers, wrappers, accountants and bars; the noise told is that of the release."""
    told: dict[str, Any] = {"patients": house.patients}
    run(AROUND, told, Screen(lambda output: None))
    (release,) = house.releases
    assert told["noise"] == pytest.approx(release.values["noise"])
    assert told["seen"] == [(8.0, 8.0)] * 4
    assert told["names"] == list(copy.deepcopy(told["model"]).state_dict())
    assert told["names"][0] == "first.weight"
    assert release.values["steps"] == 20


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "from opacus.accountants.utils import get_noise_multiplier as g; g(target_epsilon=1)",
            "target_epsilon=3",
        ),
        ("from opacus.schedulers import ExponentialNoise", "clip_quantile"),
        ("from opacus.optimizers import AdaClipDPOptimizer", "torch's own"),
        ("from opacus.optimizers import DPOptimizer; DPOptimizer(1)", "torch's own"),
        ("from opacus.data_loader import DPDataLoader", "patients.train.loader"),
        ("import opacus; opacus.PrivacyEngine().save_checkpoint(path='a')", "-o"),
        (
            "import opacus, torch; opacus.PrivacyEngine(torch.nn.Linear(1, 1), sample_rate=0.1)",
            "data_loader=",
        ),
    ],
)
def test_what_cannot_be_says_what_to_write(line: str, said: str) -> None:
    """In words of a script for Opacus."""
    with pytest.raises(RequestError) as caught:
        run(line, {}, Screen(lambda output: None))
    assert said in caught.value.instead
