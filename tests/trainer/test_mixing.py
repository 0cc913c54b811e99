"""A loss that mixes patients is told whatever the weights, with its line and operation; an honest one never is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from house import numbers
from torch import Tensor, nn
from torch.nn import functional as F

import rapha_lab as rapha
from rapha_lab.client.rehearsal import Rehearsal
from rapha_lab.protocol.errors import ProgramError
from rapha_lab.protocol.schema import Schema
from rapha_lab.session import tracing
from rapha_lab.session.sealed import Batch
from rapha_lab.session.tape import PATIENTS

SEEDS = 400 if os.environ.get("RAPHA_LAB_DEEP") else 3
FEATURES = [f"v{i}" for i in range(8)]
Way = Callable[[Any], Any]


def layer_norm(x: Any) -> Any:
    return F.layer_norm(x.T, (x.shape[0],)).T


WAYS: dict[str, tuple[Way, str]] = {
    "centring": (lambda x: x - x.mean(0), "mean"),
    "a little of the mean": (lambda x: x + 1e-4 * x.mean(0, keepdim=True), "mean"),
    "deviation": (lambda x: x / (x.std(0) + 1), "std"),
    "maximum": (lambda x: x - x.max(0).values, "max"),
    "softmax": (lambda x: x.softmax(0), "softmax"),
    "length": (lambda x: F.normalize(x, dim=0), "normalize"),
    "layer norm": (layer_norm, "layer_norm"),
    "cumsum": (lambda x: x.cumsum(0), "cumsum"),
    "sort": (lambda x: x.sort(0).values, "sort"),
    "argsort": (lambda x: x.argsort(0).float(), "argsort"),
    "flip": (lambda x: x.flip(0), "flip"),
    "roll": (lambda x: x.roll(1, 0), "roll"),
    "products": (lambda x: x @ (x.T @ x), "matmul"),
    "distances": (lambda x: x + torch.cdist(x, x).mean(1, keepdim=True), "cdist"),
}
HERE = next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.startswith("WAYS"))


class Mixing(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.layer, self.way = nn.Linear(8, 1), way

    def forward(self, x: Any) -> Any:
        return self.layer(self.way(x)).squeeze(-1)


def made_up(columns: Any) -> Tensor:
    one = torch.zeros((8,) if isinstance(columns, list) else ())
    return (
        tracing.made_up(one, PATIENTS, len(columns)) * 2 - 1 if one.dim() else tracing.made_up(one, PATIENTS)
    )


def unasked(*_: Any) -> Any:
    pytest.fail("something was asked of the site")


def looped(model: nn.Module, loss: Any) -> None:
    batch = Batch(made_up, unasked, 20)
    loss(model(batch[FEATURES]), batch["y"]).backward()


def fitted(model: nn.Module, loss: Any) -> None:
    tracing.loss_program(model, loss, {"x": torch.zeros(8)}, torch.tensor(0.0))


LOSSES = [F.binary_cross_entropy_with_logits, F.mse_loss]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("trained", [fitted, looped])
def test_no_weights_hide_it(name: str, trained: Any) -> None:
    """Refused at every draw of them, by the operation and its line in the cell."""
    way, operation = WAYS[name]
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        with pytest.raises(ProgramError) as caught:
            trained(Mixing(way), LOSSES[seed % 2])
        assert caught.value.what == f"{operation} mixes patients."
        assert caught.value.line is not None
        assert layer_norm.__code__.co_firstlineno <= caught.value.line <= HERE + len(WAYS)


def in_pairs(z: Any, y: Any) -> Any:
    z = F.normalize(z, dim=1)
    return -torch.log_softmax(z @ z.T, 1).diagonal().mean()


MIXED: dict[str, tuple[Any, str]] = {
    "a contrastive loss": (in_pairs, "matmul"),
    "the largest": (lambda z, y: z.max(), "max"),
    "a quotient of sums": (lambda z, y: (y * z[:, 0] ** 2).sum() / y.sum(), "div"),
    "weights of the batch": (lambda z, y: ((z[:, 0] - y) ** 2 * y.softmax(0)).sum(), "softmax"),
    "the deviation": (lambda z, y: (z[:, 0] - y).std(), "std"),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("trained", [fitted, looped])
def test_losses_over_the_batch_are_named(name: str, trained: Any) -> None:
    """Where nothing but the one number shows it, too."""
    loss, operation = MIXED[name]
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        with pytest.raises(ProgramError) as caught:
            trained(nn.Linear(8, 3), loss)
        assert operation in caught.value.what
        assert caught.value.line


@pytest.mark.parametrize("trained", [fitted, looped])
def test_a_gradient_that_mixes_shows_though_no_value_does(trained: Any) -> None:
    """As behind detach(), which changes no loss."""

    def through(z: Any, y: Any) -> Any:
        mean = z[:, 0].mean()
        return F.mse_loss(z[:, 0] + mean - mean.detach(), y)

    with pytest.raises(ProgramError, match="mean mixes patients"):
        trained(nn.Linear(8, 3), through)


@pytest.mark.parametrize(
    ("mixing", "operation"),
    [
        (lambda p: p.softmax(0), "softmax"),
        (lambda p: p - p.mean(), "mean"),
        (lambda p: p.sort().values, "sort"),
    ],
)
def test_scores_squeezed_to_one_each_hide_no_operation(mixing: Way, operation: str) -> None:
    """Of a patient alone p.squeeze(-1) leaves a number without a dimension, of several a row."""

    def loss(p: Any, y: Any) -> Any:
        return (mixing(p.squeeze(-1)) * y.float()).square().mean()

    schema = Schema.from_dict(numbers("mixed", 8, 100))
    (found,) = rapha.check(nn.Linear(8, 1), loss, [f"x{i}" for i in range(8)], "y", of=Of(schema))
    assert found.what == f"{operation} mixes patients."


class Of:
    """A dataset's schema."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema


def test_batch_norm_that_trains_is_named_by_its_layer() -> None:
    """Before anything is computed."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1), nn.Flatten(0))
    for trained in (fitted, looped):
        with pytest.raises(ProgramError, match=r"[bB]atch.?[nN]orm.* mixes? patients"):
            trained(model, F.mse_loss)


def test_a_check_says_the_line() -> None:
    """And the operation, in a finding."""
    (found,) = rapha.check(Mixing(WAYS["centring"][0]), F.mse_loss, torch.rand(5, 8), torch.rand(5))
    assert (found.what, found.line) == ("mean mixes patients.", HERE + 1)
    assert f"(line {HERE + 1})" in str(found)


def test_a_rehearsal_says_it_too() -> None:
    """For a fit and for a loop, with the cell's line."""
    schema = Schema.from_dict(numbers("ward", 3, 4000))
    model = """
import torch
from torch import nn
class Centred(nn.Linear):
    def forward(self, x):
        m = x.mean(0)
        return super().forward(x - m)
model = Centred(3, 1)
"""
    fit = 'patients.train.fit(model, nn.MSELoss(), inputs=["x0", "x1", "x2"], target="y", epochs=1)'
    loop = """
for batch in patients.train.batches(64, epochs=1):
    ((model(batch[["x0", "x1", "x2"]])[:, 0] - batch["y"]) ** 2).mean().backward()
"""
    for train in (fit, loop):
        with pytest.raises(ProgramError) as caught:
            Rehearsal().run(model + train, schema, epsilon=1.0)
        assert (caught.value.what, caught.value.line) == ("mean mixes patients.", 6)


class Gated(nn.Module):
    """Experts of which two are chosen by a gate that starts at zero, so that all are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 1) for _ in range(4))
        nn.init.zeros_(self.gate.weight)

    def forward(self, x: Any) -> Any:
        top, which = self.gate(x).topk(2, -1)
        weights = torch.zeros_like(self.gate(x)).scatter(1, which, top.softmax(-1))
        return (weights * torch.cat([e(x) for e in self.experts], 1)).sum(1)


class Half(nn.Module):
    """Asks for single precision by name on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(8, 8), nn.LSTM(1, 4, batch_first=True), torch.ones(8, 8)

    def forward(self, x: Any) -> Any:
        h = torch.softmax(self.a(x.to(torch.float32)) @ self.scale, -1, dtype=torch.float32)
        return self.b(h.float().unsqueeze(-1))[0][:, -1, 0] + torch.zeros(1, dtype=torch.float32)


class Tiny(nn.Module):
    """A tiny temperature and a residual branch that starts at nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.t, self.alpha = nn.Parameter(torch.tensor(1e-3)), nn.Parameter(torch.zeros(()))
        self.f, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Any) -> Any:
        flat = self.norm(x * 0 + 1)  # of a constant: its variance is rounding alone
        return (self.norm(x + self.alpha * self.f(x)) / self.t).tanh().mean(1) + flat.mean(1)


HONEST: dict[str, Callable[[], nn.Module]] = {
    "experts behind a gate of zeros": Gated,
    "single precision by name": Half,
    "tiny numbers": Tiny,
    "zeros": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), zeros(nn.Linear(8, 1)), nn.Flatten(0, 1)),
    "steps": lambda: Mixing(lambda x: (x * 4).round().clamp(-3, 3).abs().sort(1).values),
    "maxima": lambda: Mixing(lambda x: x.round() * x.amax(1, keepdim=True)),
    "a convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 1, 8), nn.Flatten(0, 2)),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(1),
        nn.Linear(8, 1), nn.Flatten(0, 1),
    ),
}  # fmt: skip


def zeros(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    return layer


@pytest.mark.parametrize("name", HONEST)
def test_no_honest_model_is_taken_for_one(name: str) -> None:
    """Whether a mean or a sum, with what hides in rounding: ties, zeros, steps and numbers of other sizes."""
    for seed, loss in enumerate(
        [nn.MSELoss(reduction="sum"), lambda p, y: 1e-6 * F.smooth_l1_loss(p, y) + 1e3]
    ):
        torch.manual_seed(seed)
        fitted(HONEST[name](), loss)
