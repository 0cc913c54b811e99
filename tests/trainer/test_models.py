"""Models of many kinds train: every patient's gradient is the one autograd gives for that patient alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import alone, lifted
from torch import Tensor, nn

bce = nn.BCEWithLogitsLoss()


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **kw: object) -> None:
        super().__init__()
        self.layer, self.head = kind(5, 6, batch_first=True, **kw), nn.LazyLinear(1)
        self(torch.zeros(1, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Stepwise(nn.Module):
    """A cell in a loop over visits, its state decaying with the gap between two (as GRU-D does, Che et al. 2018)."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.decay, self.head = cell, nn.Linear(1, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = kept = torch.zeros(x.shape[0], 6)
        for visit in range(x.shape[1]):
            h = h * torch.exp(-F.relu(self.decay(x[:, visit, :1])))
            if isinstance(self.cell, nn.LSTMCell):
                h, kept = self.cell(x[:, visit], (h, kept))
            else:
                h = self.cell(x[:, visit], h)
        return self.head(h)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.mix(self.mix(self.words(x)).mean(1)), self.words.weight)


class Scaled(nn.Module):
    """Parameters used bare, in products and through a weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(()))
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
        self.free = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.free(torch.tanh(self.layer(x * self.gain + self.shift)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Parameter(torch.rand(6, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.words(x) + self.places).mean(1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.up, self.out = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.down(x)), inplace=True)
        return self.out(torch.cat([h, self.up(F.max_pool2d(h, 2))], 1)).mean((2, 3))


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.a, self.b, self.head = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.base(x) + self.b(self.a(x))))


class Products(nn.Module):
    """Layers written as products, at one position and at several."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Parameter(torch.randn(8, n) / 3) for n in (6, 6, 6))
        self.mix, self.shift = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(6))
        self.left, self.last = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("ntd,df->ntf", x, self.second) + x @ self.first)
        h = self.left @ torch.cat([h[:, :3], h[:, :1] * h[:, 1:2]], 1)
        h = torch.tanh((h.transpose(1, 2) @ self.mix.T.tanh()[:, :3]).mean(1))
        h = torch.addmm(self.shift, h, self.mix.T)
        h = h + torch.mm(x[:, 0], self.third)
        return torch.einsum("bd,kd->bk", torch.tanh(h), self.last).sum(1)


class Adapted(nn.Module):
    """A low rank added to a frozen weight, with a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 1)
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(F.linear(x, self.base.weight + self.b @ self.a * 3 / 2, self.base.bias)))


class Turned(nn.Module):
    """An autoencoder whose decoder is its encoder's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(F.linear(x, self.weight, self.bias)), self.weight.t())


class Masked(nn.Module):
    """Weights made by other operations: masked, cut out, exponentials, added to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(6, 8).tril())
        self.weight, self.other = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(9, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.weight * self.mask))
        twice = self.other + self.other
        return F.linear(h, torch.softmax(self.other, 1)[:3] + twice[3:6]).sum(1)


class Series(nn.Module):
    """Weight-normed convolutions over time, then attention of learned queries."""

    def __init__(self) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.weight_norm
        self.one, self.two = normed(nn.Conv1d(5, 8, 3)), normed(nn.Conv1d(8, 8, 2, dilation=2))
        self.queries, self.attend = (
            nn.Parameter(torch.randn(3, 8)),
            nn.MultiheadAttention(8, 2, batch_first=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(torch.relu(self.one(x))).transpose(1, 2)
        return self.attend(self.queries.expand(len(x), 3, 8), h, h)[0].mean((1, 2))


class Biases(nn.Module):
    """Nothing but biases is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.states, self.head = (
            nn.Conv1d(5, 6, 3),
            nn.GRU(6, 4, batch_first=True),
            nn.Linear(4, 1),
        )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("bias" in name)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.states(self.conv(x).transpose(1, 2))[0][:, -1])


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(5, 6, 3, padding="same", dilation=2), nn.GELU(), nn.Conv1d(6, 6, 2, stride=2, groups=3),
        nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, 1),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 16), nn.PReLU(), nn.Linear(16, 1)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False),
        nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


def bag() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3, padding=1), nn.ReLU(), nn.Conv2d(6, 70, 1), nn.ReLU(),
        nn.Conv2d(70, 4, 5, stride=2, dilation=2, padding=4), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


class Codes(nn.Module):
    """Each visit's codes added up, many of them again and again."""

    def __init__(self, length: int = 5) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(length, 6, padding_idx=0), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x).sum(2)).mean(1))


class Copied(nn.Module):
    """A table that is also used otherwise, of which a row that fills up is not trained by what it fills."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(5, 6, padding_idx=0), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).sum(1) * torch.tanh(self.words.weight).mean(0))


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(5, *shape)


def words() -> Tensor:
    return torch.randint(7, (5, 6))


def yes() -> Tensor:
    return torch.randint(2, (5,)).float()


def kinds() -> Tensor:
    return torch.randint(3, (5,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Callable[[], Tensor], Callable[[], Tensor]]] = {
    "mlp": (mlp, bce, numbers(8), yes),
    "logistic": (lambda: nn.Linear(8, 1), bce, numbers(8), yes),
    "cnn with group norm": (cnn, nn.CrossEntropyLoss(), numbers(2, 9, 9), kinds),
    "1-d cnn": (conv1d, nn.MSELoss(), numbers(5, 12), yes),
    "3-d cnn": (
        lambda: nn.Sequential(nn.Conv3d(1, 3, 2), nn.Tanh(), nn.MaxPool3d(2), nn.Flatten(), nn.LazyLinear(1)),
        bce, numbers(1, 5, 5, 5), yes,
    ),
    "u-net": (UNet, bce, numbers(2, 8, 8), yes),
    "depthwise convolutions": (depthwise, nn.CrossEntropyLoss(), numbers(3, 8, 8), kinds),
    "codes of visits": (Codes, nn.CrossEntropyLoss(), lambda: torch.randint(5, (5, 4, 6)), kinds),
    "table used otherwise too": (Copied, nn.CrossEntropyLoss(), lambda: torch.randint(5, (5, 4)), kinds),
    "codes of a large table": (lambda: Codes(60), nn.CrossEntropyLoss(), lambda: torch.randint(5, (5, 4, 6)), kinds),
    "embedding and mlp": (bag, nn.CrossEntropyLoss(label_smoothing=0.1), words, kinds),
    "tied weights": (Tied, nn.CrossEntropyLoss(), lambda: torch.randint(9, (5, 4)), kinds),
    "bare parameters": (Scaled, nn.HuberLoss(), numbers(8), yes),
    "text transformer": (Tokens, nn.CrossEntropyLoss(), lambda: torch.randint(11, (5, 6)), kinds),
    "attention": (
        lambda: nn.Sequential(attention(), nn.Flatten(), nn.Linear(32, 1)), bce, numbers(4, 8), yes,
    ),
    "low rank on a frozen layer": (LowRank, bce, numbers(8), yes),
    "products": (Products, bce, numbers(4, 8), yes),
    "low rank added to a frozen weight": (Adapted, bce, numbers(8), yes),
    "transposed weight": (Turned, nn.MSELoss(), numbers(8), numbers(8)),
    "weights made of others": (Masked, bce, numbers(8), yes),
    "weight norm and cross-attention": (Series, bce, numbers(5, 12), yes),
    "biases alone": (Biases, bce, numbers(5, 12), yes),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2), bce, numbers(4, 5), yes),
    "gru both ways": (lambda: Recurrent(nn.GRU, bidirectional=True), bce, numbers(4, 5), yes),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2), bce, numbers(4, 5), yes),
    "rnn": (lambda: Recurrent(nn.RNN, bias=False), bce, numbers(4, 5), yes),
    "gru cell": (lambda: Stepwise(nn.GRUCell(5, 6)), bce, numbers(4, 5), yes),
    "lstm cell": (lambda: Stepwise(nn.LSTMCell(5, 6)), bce, numbers(4, 5), yes),
    "rnn cell": (lambda: Stepwise(nn.RNNCell(5, 6, bias=False)), bce, numbers(4, 5), yes),
    "rnn cell with relu": (lambda: Stepwise(nn.RNNCell(5, 6, nonlinearity="relu")), bce, numbers(4, 5), yes),
    "autoencoder": (
        lambda: nn.Sequential(nn.Linear(8, 2), nn.ELU(), nn.Linear(2, 8)), nn.MSELoss(), numbers(8), numbers(8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_patients_gradient_is_the_one_computed_alone(name: str) -> None:
    """To 1e-5 of its size, for every parameter of every model."""
    make, loss, xs, ys = MODELS[name]
    torch.manual_seed(1)
    model, x = make(), xs()
    model(x)
    y = ys()
    it, parameters, constants = lifted(model, loss, x, y)
    mine = it.gradients(parameters, constants, {"x": x, "target": y})
    for parameter, expected in alone(model, loss, x, y).items():
        scale = expected.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(mine[parameter] / scale, expected / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn with group norm", "embedding and mlp", "text transformer"])
def test_gradients_agree_with_opacus(name: str) -> None:
    """An independent implementation gives the same per-patient gradients."""
    from opacus import GradSampleModule

    make, loss, xs, ys = MODELS[name]
    torch.manual_seed(2)
    model, x, y = make(), xs(), ys()
    model(x)
    if name == "text transformer":
        pytest.skip("Opacus has no rule for MultiheadAttention and bare parameters")
    it, parameters, constants = lifted(model, loss, x, y)
    mine = it.gradients(parameters, constants, {"x": x, "target": y})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = GradSampleModule(model, loss_reduction="mean", strict=False)
        prediction = theirs(x)
        loss(prediction.reshape(y.shape) if prediction.numel() == len(y) else prediction, y).backward()
    for parameter, p in model.named_parameters():
        scale = p.grad_sample.abs().max()
        torch.testing.assert_close(mine[parameter] / scale, p.grad_sample / scale, rtol=1e-5, atol=1e-5)


def test_every_patient_is_scored_as_the_model_does() -> None:
    """Scores come for any number of patients, in padded microbatches."""
    from rapha_lab.curator.lift import lift
    from rapha_lab.session.tracing import score_program

    torch.manual_seed(3)
    model, x = cnn(), torch.randn(300, 2, 9, 9)
    model(x)
    traced = score_program(model, {"x": x[0]})
    it = lift(traced.program, loss=False)
    out = it.scores(*it.tensors(traced.blob), {"x": x})
    torch.testing.assert_close(out.squeeze(1), model(x).detach(), rtol=1e-4, atol=1e-5)
