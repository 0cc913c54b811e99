"""Jobs with dropout do not disturb each other's test of the machine: torch's random numbers are one stream for all."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from rapha_lab.curator import lift as lifting
from rapha_lab.curator.lift import Lifted, lift
from rapha_lab.curator.lift.draws import Draws
from rapha_lab.session.tracing import loss_program


def with_dropout() -> tuple[Lifted, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 1), nn.Flatten(0))
    traced = loss_program(model, nn.BCEWithLogitsLoss(), {"x": torch.zeros(8)}, torch.zeros(()))
    lifted = lift(traced.program)
    return lifted, *lifted.tensors(traced.blob)


def disturbed() -> None:
    """Test the machine for one job while another trains."""
    lifted, parameters, constants = with_dropout()
    rows = {"x": torch.rand(lifted.microbatch, 8), "target": torch.ones(lifted.microbatch)}
    mask, over = torch.ones(lifted.microbatch, dtype=torch.bool), threading.Event()

    def train() -> None:
        while not over.is_set():
            lifted.clipped_sum(parameters, constants, rows, mask, 1.0)

    other = threading.Thread(target=train)
    other.start()
    try:
        for _ in range(20):
            lifted.selftest(parameters, constants)
    finally:
        over.set()
        other.join()


def test_a_machine_is_tested_while_others_train_with_dropout() -> None:
    disturbed()


def test_without_taking_turns_it_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Apart(Draws):
        """As if each test and each step had numbers of its own."""

        def drawn(self) -> object:  # type: ignore[override]
            return Draws().drawn()

    monkeypatch.setattr(lifting, "DRAWS", Apart())
    with pytest.raises(Exception, match="reproducibly"):
        disturbed()


def test_the_numbers_go_on_after_a_test_as_if_it_had_not_been() -> None:
    lifted, parameters, constants = with_dropout()
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    lifted.selftest(parameters, constants)
    assert torch.equal(torch.rand(4), expected)
