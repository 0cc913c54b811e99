"""A researcher who is taken out of the policy gets nothing more, not even of what is running."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars
import pytest
import torch
import torch.nn.functional as F
from house import House
from msgspec import structs
from torch import nn

from rapha_lab.curator.desk import Desk
from rapha_lab.protocol.errors import PolicyError
from rapha_lab.protocol.policy import Lane, Policy

COLUMNS = [
    {"name": "a", "type": "number", "bounds": [0, 1], "meaning": "A number.", "public": "By construction."},
    {"name": "y", "type": "boolean", "meaning": "A label.", "public": "Yes or no."},
]
SCHEMA = {
    "name": "d", "title": "D", "citation": "none", "licence": "none", "patient": "pid", "patients": 2000,
    "source": "d.parquet", "columns": COLUMNS,
}  # fmt: skip
STEPS = 5


@pytest.fixture
def house(tmp_path: Path) -> House:
    """A curator over 2,000 patients."""
    rng = np.random.default_rng(0)
    pid = [f"p{n}" for n in range(2000)]
    frame = polars.DataFrame({"pid": pid, "a": rng.random(2000), "y": rng.random(2000) < 0.5})
    return House(tmp_path, SCHEMA, frame)


def stopped(house: House, change: Callable[[Policy], Policy]) -> int:
    """Change the policy after STEPS steps of a long fit; gives how many steps ran."""
    touch = house.ledger.touch

    def touched(job: str, steps: int) -> None:
        touch(job, steps)
        if sum(house.steps) >= STEPS:
            house.policy = change(house.policy)

    house.ledger.touch = touched  # type: ignore[method-assign]
    model = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
    torch.manual_seed(0)
    with pytest.raises(PolicyError):
        house.patients.train.fit(model, inputs=["a"], target="y", epochs=40, batch=100, epsilon=1)
    return sum(house.steps)


def revoked(policy: Policy) -> Policy:
    """The policy after a custodian revoked its only researcher."""
    return replace(policy, revoked=frozenset(policy.projects[0].researchers))


@pytest.mark.parametrize(
    "change",
    [revoked, lambda policy: replace(policy, revoked=frozenset({policy.projects[0].name}))],
    ids=["researcher", "project"],
)
def test_a_running_fit_stops_at_its_next_step(house: House, change: Callable[[Policy], Policy]) -> None:
    """Nothing is released; the steps that ran stay charged, the others are refunded."""
    ran = stopped(house, change)
    assert STEPS <= ran < 60
    assert not house.releases
    assert house.ledger._db.execute("SELECT state, touched FROM job").fetchall() == [("stopped", ran)]


def test_a_veto_stops_it_as_well(house: House) -> None:
    """So does expiry: a policy that is not in force lets no step run."""

    def vetoed(policy: Policy) -> Policy:
        def ended() -> Policy:
            raise PolicyError("A custodian vetoed the policy.")

        house.desk._policy = ended
        return policy

    assert stopped(house, vetoed) < 60


def test_mutant_that_asks_the_policy_once_runs_to_the_end(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question before each step is what stops it."""
    permit, answers = Desk._permit, list[object]()

    def once(self: Desk, *args: object, **how: object) -> object:
        answers.append(answers[0] if answers else permit(self, *args, **how))  # type: ignore[arg-type]
        return answers[0]

    monkeypatch.setattr(Desk, "_permit", once)
    touch = house.ledger.touch

    def touched(job: str, steps: int) -> None:
        touch(job, steps)
        house.policy = revoked(house.policy)

    house.ledger.touch = touched  # type: ignore[method-assign]
    house.patients.train.fit(nn.Linear(1, 1), inputs=["a"], target="y", epochs=1, batch=200, epsilon=1)
    assert len(answers) > 2
    assert house.releases


def smaller(policy: Policy) -> Policy:
    """The policy once it lets nobody train a model of this size."""
    return replace(policy, projects=[structs.replace(policy.projects[0], largest_model=3)])


def reviewed(policy: Policy) -> Policy:
    """The policy once a custodian releases what is trained."""
    lanes = {**policy.projects[0].lanes, "train": Lane(release="one custodian")}
    return replace(policy, projects=[structs.replace(policy.projects[0], lanes=lanes)])


def ended(policy: Policy) -> Policy:
    """Of a policy that is not in force any more: vetoed, or expired at midnight."""
    raise PolicyError("The policy is not in force.")


@pytest.mark.parametrize("change", [revoked, smaller, reviewed, ended])
def test_a_running_loop_stops_at_its_next_step(house: House, change: Callable[[Policy], Policy]) -> None:
    """Though what the policy says is looked at for another policy only."""
    model, page, ran = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)), house.policy, [0]

    def loop() -> None:
        for batch in house.patients.train.batches(100, epochs=1, epsilon=1):
            F.binary_cross_entropy_with_logits(model(batch[["a"]]).squeeze(-1), batch["y"]).backward()
            ran[0] += 1
            if ran[0] == STEPS:
                house.desk._policy = lambda: change(page)

    with pytest.raises(PolicyError):
        loop()
    assert ran == [STEPS]
