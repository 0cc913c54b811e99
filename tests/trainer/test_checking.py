"""`rapha.check` says beforehand what training would say, and `rapha.fix` mends what has one way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from house import numbers
from torch import Tensor, nn
from torch.nn import functional as F

import rapha_lab as rapha
from rapha_lab.client.rehearsal import Rehearsal
from rapha_lab.protocol.errors import PolicyError, ProgramError, RequestError
from rapha_lab.protocol.schema import Schema
from rapha_lab.session import tracing

X, Y = torch.randn(5, 3, 8), torch.randint(2, (5,)).float()


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(inplace=True),
        nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4)), nn.Linear(4, 1),
    )  # fmt: skip


def test_every_layer_that_mixes_patients_is_named_with_its_way_out() -> None:
    """All at once, not the first alone."""
    found = rapha.check(images(), nn.BCEWithLogitsLoss(), X, Y)
    assert not found
    assert [f.where for f in found if f.stops] == ["1", "3.2"]
    assert all("nn.GroupNorm" in f.instead and "rapha.fix(model)" in f.instead for f in found)
    assert "does not train yet" in repr(found)
    with pytest.raises(ProgramError, match=r"model = rapha\.fix\(model\)"):  # as fit says it
        tracing.loss_program(images(), nn.BCEWithLogitsLoss(), {"x": X[0]}, Y[0])


def test_a_fixed_model_trains_and_keeps_what_it_can() -> None:
    """Scales and weights are kept, the first model is as it was."""
    model = images()
    with torch.no_grad():
        model[1].weight.fill_(3.0)
    fixed = rapha.fix(model)
    assert isinstance(model[1], nn.BatchNorm1d)
    assert isinstance(fixed[1], nn.GroupNorm)
    assert torch.equal(fixed[1].weight, model[1].weight)
    assert torch.equal(fixed[0].weight, model[0].weight)
    assert not fixed[2].inplace
    found = rapha.check(fixed, nn.BCEWithLogitsLoss(), X, Y)
    assert found
    assert set(found.paths) == {name for name, _ in fixed.named_parameters()}
    assert "trains  0.bias, 0.weight: stored: conv1d" in repr(found)
    assert isinstance(rapha.fix(nn.BatchNorm1d(6)), nn.GroupNorm)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_fixed_model_has_no_spectral_norm_and_its_weight(norm: Callable[[nn.Module], nn.Module]) -> None:
    """What the finding says that `rapha.fix` does; the weight is what the norm had made of it."""
    model = nn.Sequential(norm(nn.Linear(8, 1)), nn.Linear(1, 1))
    x = torch.randn(5, 8)
    want = model.eval()(x)
    assert not rapha.check(model, nn.BCEWithLogitsLoss(), x, Y)
    fixed = rapha.fix(model)
    assert rapha.check(fixed, nn.BCEWithLogitsLoss(), x, Y)
    assert torch.allclose(fixed(x), want)
    assert not rapha.check(model, nn.BCEWithLogitsLoss(), x, Y)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 1), nn.Linear(8, 1)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(self.frozen(x)) + 0 * self.idle(x).detach()


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(z, dim=-1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


@pytest.mark.parametrize(
    ("model", "loss", "says"),
    [
        (Branching(), None, "torch.where"),
        (nn.Linear(8, 4), contrastive, "mixes patients"),
        (nn.Linear(7, 1), nn.BCEWithLogitsLoss(), "One patient's shapes are x (8,), target ()."),
        (nn.Linear(8, 1), lambda p, y: F.mse_loss(torch.fft.fft(p).real[:, 0], y), "cosines"),
        (
            nn.Linear(8, 1),
            lambda p, y: F.mse_loss(torch.linalg.inv(p[:, :, None] + 2)[:, 0, 0], y),
            "operation",
        ),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(8, 1)), None, "weight_norm"),
        (nn.utils.spectral_norm(nn.Linear(8, 1)), None, "weight_norm"),
        (nn.Linear(8, 2), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0])), "reduction"),
        (nn.Linear(8, 1), nn.BCEWithLogitsLoss(reduction="none"), "The loss has shape (3,)"),
        (nn.Linear(8, 1), nn.BCEWithLogitsLoss, "Write BCEWithLogitsLoss()"),
        (nn.Linear(8, 1), "bce", "The loss is a str"),
        (nn.Linear(8, 1).requires_grad_(False), None, "nothing to train"),
    ],
)
def test_what_will_not_train_is_said_with_what_to_change(model: nn.Module, loss: Any, says: str) -> None:
    """A finding that stops, in the words that training would use."""
    y = torch.tensor([0, 1, 1, 0, 1]) if isinstance(loss, nn.CrossEntropyLoss) else Y
    found = rapha.check(model, loss or nn.BCEWithLogitsLoss(), torch.randn(5, 8), y)
    (stop,) = [f for f in found if f.stops]
    assert says in f"{stop.what} {stop.why} {stop.instead}"
    assert stop.instead


def test_what_will_not_move_is_noted() -> None:
    """Frozen parameters, and those that the loss does not reach; the rest trains."""
    found = rapha.check(Unused(), nn.BCEWithLogitsLoss(), torch.randn(5, 8), Y)
    assert found
    assert {f.where for f in found} == {"frozen.weight", "idle.weight", "idle.bias"}


def test_what_trains_slowly_is_noted_with_what_would_not() -> None:
    """A large parameter that is no layer's weight; each way that a parameter takes is explained below."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.gates = nn.Linear(200, 100), nn.Parameter(torch.ones(100, 200))

        def forward(self, x: Tensor) -> Tensor:
            return (torch.tanh(self.enter(x)).unsqueeze(2) * torch.sigmoid(x.unsqueeze(1) * self.gates)).sum(
                1
            )

    found = rapha.check(Gated(), nn.MSELoss(), torch.randn(5, 200), torch.randn(5, 200))
    assert found
    (note,) = found
    assert (note.where, note.stops) == ("gates", False)
    assert "20,000" in note.why
    assert "each patient gets a copy of the parameter" in repr(found)
    assert "rows:" not in repr(found)


def test_parameters_that_go_the_same_way_are_named_together() -> None:
    """A reason stands once, however many layers it holds for."""
    norms = [nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 1)]
    found = rapha.check(nn.Sequential(*norms), nn.BCEWithLogitsLoss(), torch.randn(5, 8), Y)
    (copies,) = [line for line in repr(found).splitlines() if "layer_norm is no layer" in line]
    assert copies.startswith("trains  0.bias, 0.weight, 2.bias, 2.weight: copy:")


def test_a_model_that_the_policy_does_not_let_train_is_refused_untraced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By `check` and by a rehearsal's fit, in the words that the site would use after a while."""
    monkeypatch.setattr(tracing, "loss_program", lambda *_: pytest.fail("traced"))

    class Known:
        schema = Schema.from_dict(numbers("known", 3, 100))
        largest_model = 3

    model = nn.Linear(3, 1)
    (stop,) = rapha.check(model, None, ["x0", "x1", "x2"], "y", of=Known())
    assert stop.stops
    assert "4 parameters" in stop.what
    source = "patients.train.fit(model, inputs=['x0', 'x1', 'x2'], target='y', epsilon=1)"
    rehearsal = Rehearsal()
    rehearsal.namespace["model"] = model
    with pytest.raises(PolicyError, match="3 at most"):
        rehearsal.run(source, Known.schema, epsilon=None, largest_model=3)


def test_columns_of_a_dataset_stand_for_tensors() -> None:
    """With the usual loss of the target."""

    class Known:
        schema = Schema.from_dict(numbers("known", 3, 100))

    found = rapha.check(nn.Linear(3, 1), None, ["x0", "x1", "x2"], "y", of=Known())
    assert found
    assert set(found.paths) == {"weight", "bias"}


def test_a_dataset_is_not_its_name() -> None:
    """Columns are looked up in it."""
    with pytest.raises(RequestError) as caught:
        rapha.check(nn.Linear(1, 1), nn.MSELoss(), ["a"], "y", of="nafld")
    assert caught.value.field == "of"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((len, nn.MSELoss(), X, Y), "model"),
        ((nn.Linear(8, 1), nn.MSELoss(), ["a"], Y), "inputs"),
        ((nn.Linear(8, 1), nn.MSELoss(), X, torch.tensor(1.0)), "target"),
        ((nn.Linear(8, 1), None, X, Y), "loss"),
    ],
)
def test_a_malformed_argument_is_named(arguments: Any, field: str) -> None:
    """With what to give instead."""
    with pytest.raises(RequestError) as caught:
        rapha.check(*arguments)
    assert caught.value.field == field
