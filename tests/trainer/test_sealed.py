"""A training loop on sealed tensors gets private gradients and no values."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapha_lab.curator.lift import lift
from rapha_lab.protocol.errors import ProgramError, RaphaError, SealedError
from rapha_lab.session.sealed import PATIENTS, Batch, SealedTensor
from rapha_lab.session.tracing import Traced

FEATURES = list("abcdefgh")
X, Y = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), (torch.arange(40) % 2).float()
asked: list[Traced] = []


def curator(traced: Traced, columns: dict[str, Any], reduction: str) -> dict[str, Tensor]:
    """The exact gradient over forty patients, through the curator's own lifting."""
    asked.append(traced)
    it = lift(traced.program)
    inputs = {name: X if isinstance(c, list) else Y for name, c in columns.items()}
    rows = it.gradients(*it.tensors(traced.blob), inputs)
    return {name: t.mean(0) if reduction == "mean" else t.sum(0) for name, t in rows.items()}


def batch() -> Batch:
    def example(columns: Any) -> Tensor:
        return torch.rand(PATIENTS, 8) if isinstance(columns, list) else (torch.arange(PATIENTS) % 2).float()

    return Batch(example, curator, expected=20)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.view(x.shape[0], 4, 2))[0][:, -1])


class Stepwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 5)
        for step in range(4):
            h = self.cell(x[:, 2 * step : 2 * step + 2], h)
        return self.head(h)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = (
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
            nn.Linear(4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        patients, width = x.size()
        return self.head(self.layer(x.reshape(patients, width // 4, 4)).mean(1))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        h += 1
        h = F.relu(h, inplace=True)
        return self.head(torch.cat([h[:, 4:], 2 * h[:, :4]], dim=1))


class Weighed(nn.Module):
    """With as many outputs as there are made-up patients, and a constant for each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weights = nn.Linear(8, PATIENTS), torch.linspace(-1, 1, PATIENTS)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.weights).sum(1, keepdim=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1)),
    "gru": Recurrent,
    "gru cell": Stepwise,
    "attention": Attending,
    "in place": InPlace,
    "a constant as long as the made-up patients": Weighed,
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_backward_gives_the_gradient_over_patients(name: str, reduction: str) -> None:
    """An unmodified model and loss get in .grad what autograd gives on the records."""
    torch.manual_seed(0)
    model = MODELS[name]()
    twin = copy.deepcopy(model)
    b = batch()
    F.binary_cross_entropy_with_logits(model(b[FEATURES]).squeeze(-1), b["y"], reduction=reduction).backward()
    F.binary_cross_entropy_with_logits(twin(X).squeeze(-1), Y, reduction=reduction).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_a_loop_as_one_writes_it_anywhere() -> None:
    """Optimiser, schedule, frozen layer and accumulation are PyTorch's own; the program is traced once."""
    torch.manual_seed(1)
    model = MODELS["mlp"]()
    model[0].bias.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    asked.clear()
    for _ in range(3):
        b = batch()
        optimizer.zero_grad()
        for part in range(2):
            loss = F.mse_loss(model(b[FEATURES]).squeeze(-1), b["y"]) / 2
            loss.backward()
            assert part in (0, 1)
        optimizer.step()
        schedule.step()
    assert len(asked) == 6
    assert len({id(traced.program) for traced in asked}) == 1
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, False, True, True]


def test_a_regulariser_is_part_of_every_patients_loss() -> None:
    """A mean over patients plus a penalty on weights is a mean over patients."""
    model = nn.Linear(8, 1)
    b = batch()
    (F.mse_loss(model(b[FEATURES]).squeeze(-1), b["y"]) + 0.1 * model.weight.square().sum()).backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    (F.mse_loss(twin(X).squeeze(-1), Y) + 0.1 * twin.weight.square().sum()).backward()
    torch.testing.assert_close(model.weight.grad, twin.weight.grad, rtol=1e-4, atol=1e-5)


class LowRank(nn.Module):
    """A frozen layer with a trained correction of rank two."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Linear(8, 16).requires_grad_(False), nn.Linear(16, 1)
        self.a, self.b = nn.Parameter(torch.randn(2, 8) / 3), nn.Parameter(torch.randn(16, 2) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(x) + (x @ self.a.T) @ self.b.T)


def logloss(model: nn.Module, x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(x).squeeze(-1), y, **kwargs)


def cut(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        h = model[0](x)
    F.mse_loss(model[2](h).squeeze(-1), y).backward()


def token(model: nn.Module, x: Tensor, y: Tensor) -> None:
    first = model[0].weight[:1, :1] + torch.zeros_like(x[:, :1])
    F.binary_cross_entropy_with_logits(model(torch.cat([first, x[:, 1:]], 1))[:, 0], y).backward()


def computed(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Two losses on weights that are computed from parameters, a view among them."""
    first, second = 2 * model[0].weight, model[2].weight.view(-1)
    h = F.linear(x, first, model[0].bias).relu()
    F.mse_loss(F.linear(h, second[None])[:, 0], y).backward(retain_graph=True)
    F.linear(h, second[None] + model[2].bias).square().mean().backward()


LOOPS: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "weights": lambda m, x, y: (logloss(m, x, y, reduction="none") * (1 + 2 * y)).mean().backward(),
    "a sum over the batch's size": lambda m, x, y: (logloss(m, x, y, reduction="sum") / x.shape[0]).backward(),
    "several losses": lambda m, x, y: (logloss(m, x, y) + 0.1 * m(x).square().mean()).backward(),
    "several backwards": lambda m, x, y: [logloss(m, x, y).backward(), m(x).square().mean().backward()],
    "a gradient given": lambda m, x, y: logloss(m, x, y).backward(torch.tensor(2.0)),
    "some of the parameters": lambda m, x, y: logloss(m, x, y).backward(inputs=[m[0].weight]),
    "detach": lambda m, x, y: F.mse_loss(m[2](m[0](x).detach()).squeeze(-1), y).backward(),
    "no_grad": cut,
    "weights per class": lambda m, x, y: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))(m(x)[:, 0], y).backward(),
    "a closure": lambda m, x, y: torch.optim.SGD(m.parameters(), lr=0.0).step(lambda: logloss(m, x, y).backward()),
    "a token of parameters": token,
    "a hook": lambda m, x, y: [m[0].weight.register_hook(lambda g: 3 * g), logloss(m, x, y).backward()],
    "a hook after": lambda m, x, y: [
        m[0].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", 3 * p.grad)),
        logloss(m, x, y).backward(), logloss(m, x, y).backward(),
    ],
    "computed weights": computed,
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_what_loops_do_is_done(name: str) -> None:
    """Each way of using a loss leaves in .grad what autograd leaves there on the records, and None where it leaves none."""
    torch.manual_seed(2)
    model, b = MODELS["mlp"](), batch()
    twin = copy.deepcopy(model)
    LOOPS[name](model, b[FEATURES], b["y"])
    LOOPS[name](twin, X, Y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        LowRank,
        lambda: nn.Sequential(MODELS["mlp"](), nn.Linear(1, 1)),
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), nn.Tanh(), nn.Linear(4, 1)
        ),
    ],
    ids=["low rank", "two models", "weight norm"],
)
def test_what_a_model_is_made_of_makes_no_difference(make: Callable[[], nn.Module]) -> None:
    """Frozen parts, several models, and parameters computed from parameters."""
    torch.manual_seed(3)
    model, b = make(), batch()
    twin = copy.deepcopy(model)
    logloss(model, b[FEATURES], b["y"]).backward()
    logloss(twin, X, Y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_every_optimiser_of_torch_steps() -> None:
    """All of torch.optim but the two that need more than a gradient."""
    for name in dir(torch.optim):
        kind = getattr(torch.optim, name)
        if not isinstance(kind, type) or name in ("Optimizer", "LBFGS", "SparseAdam"):
            continue
        model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 1, bias=False))
        before, optimizer, b = model[0].weight.clone(), kind(model.parameters(), lr=0.1), batch()
        logloss(model, b[FEATURES], b["y"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert not torch.equal(before, model[0].weight), name


def test_dropout_follows_train_and_eval() -> None:
    """The program has it in training alone."""
    model, b = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5), nn.Linear(4, 1)), batch()
    for mode in (True, False):
        model.train(mode)
        logloss(model, b[FEATURES], b["y"]).backward()
        assert any("dropout" in node.op for node in asked[-1].program.nodes) == mode


def lbfgs(model: nn.Module, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        loss = logloss(model, x, y)
        loss.backward()
        return loss

    torch.optim.LBFGS(model.parameters()).step(closure)


def evaluated(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return ((model(x)[:, 0] > 0) == y.bool()).float().mean().item()


def untaught(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        loss = logloss(model, x, y)
    loss.backward()


def summarised(model: nn.Module, x: Tensor, y: Tensor) -> None:
    token = nn.Parameter(torch.zeros(1, 1))
    F.mse_loss(model(torch.cat([token.expand(x.shape[0], -1), x[:, 1:]], 1))[:, 0], y).backward()


def repeated(model: nn.Module, x: Tensor, y: Tensor) -> None:
    filled = torch.where(x > 0, x, nn.Parameter(torch.zeros(1, 8)).repeat(x.shape[0], 1))
    F.mse_loss(model(filled)[:, 0], y).backward()


REFUSED: dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], Any], str]] = {
    "LBFGS": (lbfgs, "SGD or AdamW"),
    "a token for each patient": (summarised, "torch.zeros_like(x[:, :1])"),
    "a parameter for each patient": (repeated, "broadcast"),
    "evaluation": (evaluated, "evaluate"),
    "the loss's value": (lambda m, x, y: logloss(m, x, y).item(), "evaluate"),
    "a schedule by the loss": (
        lambda m, x, y: torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(m.parameters())).step(logloss(m, x, y)),
        "evaluate",
    ),
    "a loss made without gradients": (untaught, "outside of torch.no_grad"),
    "all detached": (lambda m, x, y: (m(x).detach() * m[2].bias).mean().detach().backward(), "Leave them out"),
    "batch norm": (lambda m, x, y: logloss(nn.Sequential(nn.BatchNorm1d(8), m), x, y).backward(), "GroupNorm"),
    "a weighted mean": (lambda m, x, y: ((m(x)[:, 0] * (1 + y)).sum() / (1 + y).sum()).backward(), "batch.expected"),
    "second derivatives": (lambda m, x, y: logloss(m, x, y).backward(create_graph=True), "backward"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_private_gradient_says_what_to_do(name: str) -> None:
    """What, why and instead, with the line; nothing is asked of the curator that was not asked before."""
    function, instead = REFUSED[name]
    b = batch()
    with pytest.raises(RaphaError) as caught:
        function(MODELS["mlp"](), b[FEATURES], b["y"])
    assert instead in caught.value.instead
    assert caught.value.what
    assert caught.value.why
    assert caught.value.line


VALUES: dict[str, Callable[[SealedTensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "numpy": lambda x: x.numpy(),
    "tolist": lambda x: x.tolist(),
    "float": lambda x: float(x.mean()),
    "int": lambda x: int(x.mean()),
    "if": lambda x: 1 if x.mean() < 1 else 0,
    "iteration": lambda x: list(x),
    "unpacking": lambda x: [*x],
    "len": lambda x: len(x),
    "one patient": lambda x: x[0],
    "some patients": lambda x: x[2:4],
    "patients by a mask": lambda x: x[x[:, 0] > 0],
    "data": lambda x: x.cpu().data,
    "pickle": lambda x: pickle.dumps(x),
    "torch.save": lambda x: torch.save(x, io.BytesIO()),
    "np.asarray": lambda x: np.asarray(x),
    "a format": lambda x: f"{x.mean():.3f}",
    "percent": lambda x: "%f" % x.mean(),  # noqa: UP031
    "deepcopy": lambda x: copy.deepcopy(x),
    "unique": lambda x: x.unique(),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "in": lambda x: 1.0 in x,
    "storage": lambda x: x.untyped_storage(),
    "autograd.grad": lambda x: torch.autograd.grad(x.sum(), [torch.ones(1, requires_grad=True)]),
    "detach first": lambda x: x.detach().numpy(),
    "max of a list": lambda x: max(x),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_refused_with_what_why_and_what_instead(name: str) -> None:
    """Whatever would show, decide on, or copy a patient's value raises SealedError with the line that asked."""
    with pytest.raises(SealedError) as caught:
        VALUES[name](batch()[FEATURES])
    error = caught.value
    assert error.what
    assert error.why
    assert error.instead
    assert error.line


def test_printing_shows_shape_and_dtype_alone() -> None:
    """The first dimension has no number; what was read from a record says how it is scaled."""
    x = batch()[FEATURES]
    assert (
        repr(x) == "<sealed tensor: (patients, 8), float32; numbers scaled, -1 and 1 are their public bounds>"
    )
    assert str(x.mean(1)) == "<sealed tensor: (patients,), float32>"
    assert f"{x.mean()}" == "<sealed tensor: (), float32>"
    assert repr(x.shape[0]) == "patients"
    assert x.shape[1] == 8
    assert repr(batch()) == "<batch of about 20 patients: sealed; batch[columns] is a tensor of them>"


MIXING: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "centring": lambda x, model: model(x - x.mean(0)).square().mean(),
    "a softmax over patients": lambda x, model: model(x).softmax(0).square().sum(),
    "the largest": lambda x, model: model(x).max(),
    "a value a patient": lambda x, model: model(x),
    "pairs": lambda x, model: (model(x) @ model(x).T).mean(),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_loss_that_mixes_patients_is_refused(name: str) -> None:
    """Nothing is asked of the curator."""
    asked.clear()
    with pytest.raises(ProgramError):
        MIXING[name](batch()[FEATURES], nn.Linear(8, 1)).backward()
    assert not asked


def test_two_batches_do_not_meet() -> None:
    """Each is another random sample."""
    model = nn.Linear(8, 1)
    with pytest.raises(ProgramError, match="several batches"):
        (model(batch()[FEATURES]).mean() + model(batch()[FEATURES]).mean()).backward()


@pytest.mark.parametrize("ask", [len, iter])
def test_a_batch_is_not_gone_through(ask: Callable[[Any], Any]) -> None:
    """Neither counted nor iterated."""
    with pytest.raises(RaphaError):
        ask(batch())
