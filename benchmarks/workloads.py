"""The models and made-up patients that engines are compared on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WORDS, RECORDS = 8000, 48
VISITS, CODES, KINDS = 32, 12, 2000


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.GRU) -> None:
        super().__init__()
        self.layers, self.head = kind(40, 64, 2, batch_first=True), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class Series(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.inp, self.body, self.head = nn.Linear(40, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.inp(x)).mean(1))


class Columns(nn.Module):
    """A transformer over the columns of a table, each number a token (Gorishniy et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.randn(30, 64) / 8) for _ in range(2))
        layer = nn.TransformerEncoderLayer(64, 8, 128, dropout=0.1, batch_first=True, norm_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.unsqueeze(-1) * self.scale + self.shift).mean(1))


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(128, 128) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.words, self.places = nn.Embedding(WORDS, 128), Places()
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(128, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.places(self.words(x))).mean(1))


class Bag(nn.Module):
    """The mean over a patient's records; the last of the 31 numbers of a record says whether there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = mlp(64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        there = x[..., 30:]
        return self.head((self.encoder(x[..., :30]) * there).sum(1) / there.sum(1))


class Visits(nn.Module):
    """Codes of a patient's visits, added up by visit; a GRU's mean over the visits that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.layers = nn.Embedding(KINDS, 48, padding_idx=0), nn.GRU(48, 64, batch_first=True)
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        there = (x[..., :1] > 0).float()
        out = self.layers(self.codes(x).sum(2))[0]
        return self.head((out * there).sum(1) / there.sum(1))


class Adapted(nn.Module):
    """Frozen layers, to whose weights products of low rank are added (Hu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        for n in range(3):
            self.register_buffer(f"frozen{n}", torch.randn(256, 256) / 16)
        self.down = nn.ParameterList(torch.randn(8, 256) / 16 for _ in range(3))
        self.up = nn.ParameterList(torch.randn(256, 8) / 16 for _ in range(3))
        self.head = nn.Linear(256, 2)

    def forward(self, x: Tensor) -> Tensor:
        for n in range(3):
            weight = getattr(self, f"frozen{n}") + self.up[n] @ self.down[n]
            x = torch.relu(nn.functional.linear(x, weight))
        return self.head(x)


def lstm() -> nn.Module:
    return Recurrent(nn.LSTM)


def mlp(out: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, out))


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1000, 2800), nn.ReLU(), nn.Linear(2800, 2400), nn.ReLU(), nn.Linear(2400, 2)
    )


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1600, 240), nn.ReLU(), nn.Linear(240, 10),
    )  # fmt: skip


def separable() -> nn.Module:
    """Depthwise convolutions, each followed by a pointwise one (Howard et al. 2017)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU()]
    for before, after, stride in ((32, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [
            nn.Conv2d(before, before, 3, stride, 1, groups=before), nn.GroupNorm(8, before), nn.ReLU(),
            nn.Conv2d(before, after, 1), nn.GroupNorm(8, after), nn.ReLU(),
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def series() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(40, 64, 5, padding=2), nn.GroupNorm(8, 64), nn.ReLU(),
        nn.Conv1d(64, 64, 5, padding=2), nn.GroupNorm(8, 64), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip


def records(size: int) -> Tensor:
    """Patients with 1 to 48 records of 30 numbers, padded; the 31st says which are there."""
    x = torch.randn(size, RECORDS, 31)
    x[..., 30] = (torch.arange(RECORDS) < torch.randint(1, RECORDS + 1, (size, 1))).float()
    return x


def visits(size: int) -> Tensor:
    """Patients with 1 to 32 visits of 1 to 12 codes, padded with zeros."""
    x = torch.randint(1, KINDS, (size, VISITS, CODES))
    x = x * (torch.arange(VISITS) < torch.randint(1, VISITS + 1, (size, 1))).unsqueeze(-1)
    return x * (torch.arange(CODES) < torch.randint(1, CODES + 1, (size, VISITS, 1)))


@dataclass(frozen=True)
class Workload:
    """A model with a batch of patients.

    Attributes:
        title: for the table.
        make: the model.
        shape: of one patient's input.
        batch, classes: patients in a step, kinds of target.
    """

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    classes: int = 2

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        torch.manual_seed(0)
        if self.make is Text:
            x = torch.randint(WORDS, (self.batch, *self.shape))
        elif self.make in (Bag, Visits):
            x = (records if self.make is Bag else visits)(self.batch)
        else:
            x = torch.randn(self.batch, *self.shape)
        return x, torch.randint(self.classes, (self.batch,))


WORKLOADS = {
    "mlp256": Workload("MLP 30-128-128-2, batch 256", mlp, (30,), 256),
    "mlp1024": Workload("the same, batch 1,024", mlp, (30,), 1024),
    "cnn2d": Workload("CNN 28×28, batch 128", images, (1, 28, 28), 128, 10),
    "separable": Workload("separable CNN 32×32, batch 64", separable, (3, 32, 32), 64, 10),
    "cnn1d": Workload("1-D CNN, 48×40 series, batch 256", series, (40, 48), 256),
    "gru": Workload("GRU 2×64, 48×40 series, batch 256", Recurrent, (48, 40), 256),
    "lstm": Workload("LSTM 2×64, 48×40 series, batch 256", lstm, (48, 40), 256),
    "columns": Workload("transformer over 30 columns, dropout, batch 256", Columns, (30,), 256),
    "transformer": Workload("transformer, 48×40 series, batch 256", Series, (48, 40), 256),
    "text": Workload("text transformer, vocabulary 8k, length 128, batch 32", Text, (128,), 32),
    "wide4096": Workload("MLP, 9.5 M parameters, batch 4,096", wide, (1000,), 4096),
    "visits": Workload("visits of codes, vocabulary 2k, GRU, batch 128", Visits, (VISITS, CODES), 128),
    "adapted": Workload("low rank added to 3 frozen layers of 256, batch 256", Adapted, (256,), 256),
    "bag": Workload("bags of up to 48 records, batch 256", Bag, (RECORDS, 31), 256),
}
