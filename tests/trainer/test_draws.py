"""Jobs with dropout do not disturb each other's test of the machine: torch's random numbers are one stream for all."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapha_lab.curator import lift as lifting
from rapha_lab.curator.lift import Lifted, lift
from rapha_lab.curator.lift.draws import Draws
from rapha_lab.curator.lift.table import DRAWN
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


class Drawing(nn.Module):
    """Ones for each patient, times random numbers."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ones, self.draw = nn.Parameter(torch.ones(16)), draw

    def forward(self, x: Tensor) -> Tensor:
        h = self.ones.expand(x.shape[0], 16)
        return (self.draw(h) * h).sum(1) + 0 * x.sum(1)


MEANS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "rand_like": (torch.rand_like, 0.5, 1 / 12),
    "randn": (lambda h: torch.randn(h.shape[0], 16), 0.0, 1.0),
    "bernoulli in place": (lambda h: h.new_empty(h.shape).bernoulli_(0.7), 0.7, 0.21),
    "bernoulli of tensors": (lambda h: torch.bernoulli(torch.full(h.shape, 0.2)), 0.2, 0.16),
    "normal in place": (lambda h: torch.empty_like(h).normal_(2.0, 3.0), 2.0, 9.0),
    "normal of numbers": (lambda h: torch.normal(1.0, 2.0, h.shape), 1.0, 4.0),
    "normal of tensors": (lambda h: torch.normal(h.detach(), 2.0), 1.0, 4.0),
    "uniform in place": (lambda h: torch.empty(h.shape).uniform_(1, 3), 2.0, 1 / 3),
    "exponential in place": (lambda h: torch.empty_like(h).exponential_(2.0), 0.5, 0.25),
    "randint": (lambda h: torch.randint(2, 5, h.shape), 3.0, 2 / 3),
    "gumbel softmax": (lambda h: F.gumbel_softmax(0 * h, hard=True), 1 / 16, 15 / 256),
}


@pytest.mark.parametrize("name", MEANS)
def test_each_patient_gets_random_numbers_of_their_own(name: str) -> None:
    """With the mean and variance that torch's have, also where what they are drawn like is the same for all."""
    draw, mean, variance = MEANS[name]
    traced = loss_program(Drawing(draw), lambda p, y: p.mean(), {"x": torch.zeros(3)}, torch.zeros(()))
    lifted = lift(traced.program)
    assert any(node.op in DRAWN for node in traced.program.nodes)
    torch.manual_seed(0)
    rows = {"x": torch.zeros(2000, 3), "target": torch.zeros(2000)}
    rows = {spec.name: rows[spec.name] for spec in traced.program.inputs}
    drawn = lifted.gradients(*lifted.tensors(traced.blob), rows)["ones"].double()
    assert len(drawn) == 2000
    assert drawn[:, 0].unique().numel() > 1
    assert float(drawn.mean()) == pytest.approx(mean, abs=6 * math.sqrt(variance / drawn.numel()))
    assert float(drawn.var()) == pytest.approx(variance, rel=0.1)


def test_a_machine_is_tested_with_the_same_random_numbers_in_any_company() -> None:
    traced = loss_program(
        Drawing(torch.randn_like), lambda p, y: p.mean(), {"x": torch.zeros(3)}, torch.zeros(())
    )
    lifted = lift(traced.program)
    lifted.selftest(*lifted.tensors(traced.blob))


def test_a_compiled_step_learns_from_the_numbers_that_it_drew() -> None:
    """With the same seed it gives what the step gives that is not compiled."""

    def noisy(h: Tensor) -> Tensor:
        return h.sin() * torch.randn_like(h) + torch.rand(h.shape[0], 16)

    traced = loss_program(Drawing(noisy), lambda p, y: p.mean(), {"x": torch.zeros(3)}, torch.zeros(()))
    lifted = lift(traced.program)
    lifted.microbatch = 16
    parameters, constants = lifted.tensors(traced.blob)
    rows = {spec.name: torch.zeros(16, *spec.shape) for spec in traced.program.inputs}

    def added() -> Tensor:
        torch.manual_seed(3)
        return lifted.clipped_sum(parameters, constants, rows, torch.ones(16, dtype=torch.bool), 1.0).flat

    plain = added()
    if lifted.compile(parameters, constants) is None:
        pytest.skip(lifted.note)
    torch.testing.assert_close(added(), plain, rtol=1e-5, atol=1e-6)
