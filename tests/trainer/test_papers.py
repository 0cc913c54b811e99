"""Models as papers and their public code write them, in a loop: each patient's gradient is the one computed alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapha_lab.curator.lift import lift
from rapha_lab.protocol.errors import ProgramError, SealedError
from rapha_lab.session.counted import counted
from rapha_lab.session.sealed import PATIENTS, Batch
from rapha_lab.session.tracing import Traced, loss_program

N, T, D = 5, 6, 3


def columns() -> dict[str, Tensor]:
    """Of so many patients: visits, of which the last few are there, their times, codes and an image."""
    generator = torch.Generator().manual_seed(0)
    there = (torch.arange(T) >= T - torch.arange(PATIENTS)[:, None] % (T + 1)).float()
    found = {
        "visits": torch.rand(PATIENTS, T, D, generator=generator) * there[..., None],
        "missing": (torch.rand(PATIENTS, T, D, generator=generator) > 0.5).float() * there[..., None],
        "time": torch.arange(T - 1, -1, -1.0).expand(PATIENTS, T) * there / T,
        "present": there,
        "codes": torch.randint(9, (PATIENTS, T), generator=generator) * there.long(),
        "x": torch.rand(PATIENTS, 7, generator=generator) * 2 - 1,
        "scan": torch.rand(PATIENTS, 1, 8, 8, generator=generator),
        "y": (torch.arange(PATIENTS) % 2).float(),
        "kind": torch.arange(PATIENTS) % 3,
    }
    return {name: t.double() if t.is_floating_point() else t for name, t in found.items()}


ROWS = columns()


class GRUD(nn.Module):
    """Decays of inputs and state by how long ago each was measured (Che et al. 2018)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.decay_x, self.decay_h = nn.Parameter(torch.rand(D)), nn.Linear(D, width)
        self.gates, self.new, self.out = (
            nn.Linear(2 * D + width, 2 * width),
            nn.Linear(2 * D + width, width),
            nn.Linear(width, 1),
        )

    def forward(self, batch: Any) -> Tensor:
        x, seen = batch["visits"], (1 - batch["missing"]) * batch["present"].unsqueeze(-1)
        h, last, since = (torch.zeros(x.shape[0], n) for n in (self.width, D, D))
        for t in range(x.shape[1]):
            h = h * torch.exp(-F.relu(self.decay_h(since)))
            last = seen[:, t] * x[:, t] + (1 - seen[:, t]) * last
            value = seen[:, t] * x[:, t] + (1 - seen[:, t]) * torch.exp(-F.relu(self.decay_x * since)) * last
            given = torch.cat([value, h, seen[:, t]], 1)
            z, r = torch.sigmoid(self.gates(given)).chunk(2, 1)
            n = torch.tanh(self.new(torch.cat([value, r * h, seen[:, t]], 1)))
            h = torch.where(batch["present"][:, t, None] > 0, (1 - z) * h + z * n, h)
            since = (since + 1 / T) * (1 - seen[:, t])
        return self.out(h).squeeze(-1)


class Clinical(nn.Module):
    """An encoder with a class token in front, of which padding is hidden, and a learnt place for each visit."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.token = nn.Embedding(9, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.places, self.head = nn.Parameter(torch.randn(T + 1, 8)), nn.Linear(8, 1)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, batch: Any) -> Tensor:
        size = batch["codes"].size(0)
        h = torch.cat([self.token.expand(size, -1, -1), self.code(batch["codes"])], 1) + self.places
        pad = torch.cat([torch.zeros(size, 1, dtype=torch.bool), batch["present"] == 0], 1)
        return self.head(self.body(h, src_key_padding_mask=pad)[:, 0]).view(size)


class SetAttention(nn.Module):
    """Inducing points for each patient, heads side by side with the patients (Lee et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.points, self.out = nn.Parameter(torch.randn(1, 2, 4)), nn.Linear(4, 1)
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(D, 4), nn.Linear(D, 4)

    def forward(self, batch: Any) -> Tensor:
        x = batch["visits"]
        q, k, v = self.q(self.points.repeat(x.size(0), 1, 1)), self.k(x), self.v(x)
        q, k, v = (torch.cat(t.split(2, 2), 0) for t in (q, k, v))
        attended = torch.cat(
            (q + torch.softmax(q.bmm(k.transpose(1, 2)) / 2, 2).bmm(v)).split(x.size(0), 0), 2
        )
        return self.out(attended).mean((1, 2))


class Learned(nn.Module):
    """A recurrent layer from learnt first states."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(D, 4, batch_first=True), nn.Linear(4, 1)
        self.h, self.c = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, batch: Any) -> Tensor:
        size = batch["visits"].shape[0]
        first = self.h.expand(-1, size, -1).contiguous(), self.c.repeat(1, size, 1)
        return self.out(self.layer(batch["visits"], first)[0][:, -1]).squeeze(1)


class Messages(nn.Module):
    """Two rounds of messages along the edges of a fixed graph, added up where they arrive in either way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0], [1, 2, 3, 4, 5, 6, 0, 3]]))
        self.begin, self.message, self.out = nn.Linear(1, 4), nn.Linear(8, 4), nn.Linear(4, 1)

    def forward(self, batch: Any) -> Tensor:
        x, (source, target) = batch["x"], self.edges
        h = self.begin(x.unsqueeze(-1))
        for way in range(2):
            m = F.relu(self.message(torch.cat([h[:, source], h.index_select(1, target)], -1)))
            if way:
                h = torch.zeros(x.shape[0], 7, 4).scatter_add(
                    1, target.view(1, -1, 1).expand(x.shape[0], -1, 4), m
                )
            else:
                h = torch.zeros_like(h).index_add(1, target, m)
        return self.out(h.sum(1)).squeeze(1)


class Looking(nn.Module):
    """A spatial transformer: where to look is learnt (Jaderberg et al. 2015)."""

    def __init__(self, mode: str, around: str, corners: bool) -> None:
        super().__init__()
        self.where, self.out, self.how = nn.Linear(64, 6), nn.Linear(30, 1), (mode, around, corners)

    def forward(self, batch: Any) -> Tensor:
        scan, (mode, around, corners) = batch["scan"], self.how
        theta = torch.eye(2, 3) + 0.5 * self.where(scan.flatten(1)).view(-1, 2, 3)
        grid = F.affine_grid(theta, [scan.shape[0], 1, 5, 6], align_corners=corners)
        seen = F.grid_sample(scan, grid, mode, around, corners)
        return self.out(seen.flatten(1)).squeeze(1)


class Columns(nn.Module):
    """Each column's vector, written into a tensor that was made empty, and attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.out = nn.ModuleList(nn.Linear(1, 4) for _ in range(7)), nn.Linear(4, 1)

    def forward(self, batch: Any) -> Tensor:
        x = batch["x"]
        h = torch.empty(x.shape[0], 7, 4)
        for k, layer in enumerate(self.each):
            h[:, k, :] = layer(x[:, k : k + 1])
        seen = (h @ h.mT / math.sqrt(4)).softmax(-1) @ h
        return self.out(seen.new_empty(seen.shape).fill_(0.5) * seen).mean((1, 2))


class Mixture(nn.Module):
    """The best two of four experts, their gates scattered into zeros for each patient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(7, 4), nn.ModuleList(nn.Linear(7, 1) for _ in range(4))

    def forward(self, batch: Any) -> Tensor:
        x = batch["x"]
        value, place = self.gate(x).topk(2, dim=-1)
        gates = torch.zeros(x.shape[0], 4).scatter(1, place, value.softmax(-1))
        return (gates * torch.cat([expert(x) for expert in self.experts], 1)).sum(1)


def logits(model: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch), batch["y"])


def evidence(model: nn.Module, batch: Any) -> Tensor:
    """Evidential classification (Sensoy et al. 2018)."""
    alpha = F.softplus(model(batch["x"])) + 1
    total = alpha.sum(1, keepdim=True)
    return (F.one_hot(batch["kind"], 3) * (torch.digamma(total) - torch.digamma(alpha))).sum(1).mean()


def distances(model: nn.Module, batch: Any) -> Tensor:
    h = model(batch["x"])
    middle = torch.quantile(h, 0.3, dim=1, keepdim=True)
    rows, cols = torch.meshgrid(torch.arange(3), torch.arange(1), indexing="ij")
    return (F.pairwise_distance(h, middle * h.cos()) + (h * (rows + cols).flatten()).sum(1)).mean()


Loss = Callable[[Any, Any], Tensor]
TRIALS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "GRU-D": (GRUD, logits),
    "a class token": (Clinical, logits),
    "set transformer": (SetAttention, logits),
    "learnt first states": (Learned, logits),
    "messages on a graph": (Messages, logits),
    "spatial transformer": (lambda: Looking("bilinear", "zeros", False), logits),
    "spatial transformer to the corners": (lambda: Looking("bilinear", "border", True), logits),
    "columns written one by one": (Columns, logits),
    "the best experts": (Mixture, logits),
    "evidence": (lambda: nn.Linear(7, 3), evidence),
    "distances and quantiles": (lambda: nn.Linear(7, 3), distances),
}


def asked(model: nn.Module, loss: Loss) -> tuple[Traced, dict[str, Any]]:
    """What a step of a loop sends, with its columns by input."""
    sent: list[Any] = []

    def gradients(traced: Traced, columns: dict[str, Any], reduction: str) -> dict[str, Tensor]:
        sent.append((traced, columns))
        return {spec.name: torch.zeros(spec.shape) for spec in traced.program.parameters}

    with counted():
        loss(model, Batch(ROWS.__getitem__, gradients, expected=20)).backward()
    return sent[0]


@pytest.fixture
def double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", TRIALS)
def test_a_patients_gradient_is_the_one_computed_alone(name: str, double: None) -> None:
    """To 1e-9 of its size, by the program that a loop as the paper writes it sends."""
    torch.manual_seed(1)
    make, loss = TRIALS[name]
    model = make()
    for p in model.parameters():
        p.data += torch.randn_like(p) / 10
    traced, columns = asked(model, loss)
    it = lift(traced.program)
    mine = it.gradients(*it.tensors(traced.blob), {k: ROWS[c][:N] for k, c in columns.items()})
    named = {id(p): name for name, p in model.named_parameters()}
    by = {k: next(n for n, p in model.named_parameters() if torch.equal(p, traced.tensors[k])) for k in mine}
    assert set(by.values()) == set(named.values())
    for i in range(N):
        model.zero_grad()
        loss(model, {name: t[i : i + 1] for name, t in ROWS.items()}).backward()
        alone = {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
        }
        for k, parameter in by.items():
            torch.testing.assert_close(mine[k][i], alone[parameter], rtol=1e-9, atol=1e-11)


class Packed(nn.Module):
    """The last states of rows that are packed, or, as a refusal tells, brought to the front."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.layer, self.out, self.packed = nn.GRU(D, 4, batch_first=True), nn.Linear(4, 1), packed

    def forward(self, batch: Any) -> Tensor:
        x, n = batch["visits"], batch["present"].sum(1, keepdim=True).long()
        front = (torch.arange(x.shape[1]) - n) % x.shape[1]
        x = x.gather(1, front[..., None].expand_as(x))
        if self.packed:
            rows = nn.utils.rnn.pack_padded_sequence(x, n[:, 0].clamp(min=1), True, False)
            return self.out(self.layer(rows)[1][-1]).squeeze(1)
        h = self.layer(x)[0]
        return self.out(
            h.gather(1, (n - 1).clamp(min=0)[..., None].expand(-1, -1, h.shape[2]))[:, 0]
        ).squeeze(1)


def test_the_way_that_is_told_gives_what_packing_gives(double: None) -> None:
    """Padding makes no difference to a patient's gradient."""
    torch.manual_seed(2)
    told, packed = Packed(False), Packed(True)
    packed.load_state_dict(told.state_dict())
    traced, columns = asked(told, logits)
    it = lift(traced.program)
    mine = it.gradients(*it.tensors(traced.blob), {k: ROWS[c][:N] for k, c in columns.items()})
    logits(packed, {name: t[:N] for name, t in ROWS.items()}).backward()
    for k, t in mine.items():
        theirs = next(p for p in packed.parameters() if torch.equal(p, traced.tensors[k]))
        torch.testing.assert_close(t.mean(0), theirs.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("made", [torch.empty, torch.zeros])
def test_a_fit_takes_what_is_written_part_by_part(made: Callable[..., Tensor]) -> None:
    """In single precision, as models are, into a tensor that was made for all patients."""

    class Parts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            h = made(x.shape[0], 7, 4)
            for k in range(7):
                h[:, k, :] = super().forward(x[:, k : k + 1])
            return h.sigmoid().sum((1, 2))

    traced = loss_program(Parts(1, 4), nn.MSELoss(), {"x": torch.zeros(7)}, torch.zeros(()))
    assert set(lift(traced.program).paths) == {"weight", "bias"}


def test_shapes_that_depend_on_values_are_told() -> None:
    """As torch makes them for a loss over all alignments."""

    def aligned(model: nn.Module, batch: Any) -> Tensor:
        logs = model(batch["visits"].float()).transpose(0, 1).log_softmax(-1)
        size = torch.full((logs.shape[1],), T)
        return F.ctc_loss(logs, batch["codes"][:, -2:] % 3 + 1, size, size // 3, reduction="sum") / 20

    with pytest.raises(ProgramError, match="makes shapes of a patient's values") as refused:
        asked(nn.Linear(D, 4), aligned)
    assert "F.cross_entropy" in refused.value.instead


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested", "ignore:To copy construct")
@pytest.mark.parametrize(
    "made",
    [
        lambda v: torch.sparse_coo_tensor(torch.arange(PATIENTS)[None], v, (PATIENTS,)),
        lambda v: torch.sparse_csr_tensor(torch.arange(PATIENTS + 1), torch.zeros(PATIENTS).long(), v),
        lambda v: torch.full((3,), v.sum()),
        lambda v: torch.full((3,), fill_value=v.sum()),
        lambda v: torch.ones(2).new_tensor(v),
        lambda v: torch.nested.nested_tensor([v, v]),
        lambda v: torch.FloatTensor(v),
        lambda v: torch.Tensor(v),
        lambda v: v.as_subclass(Tensor),
    ],
    ids=["coo", "csr", "full", "fill_value", "new_tensor", "nested", "FloatTensor", "Tensor", "as_subclass"],
)
def test_torch_copies_no_made_up_number_without_a_word(made: Callable[[Any], Any]) -> None:
    """What is made like it of plain numbers is, also of as many as there are patients."""
    x = Batch(ROWS.__getitem__, lambda *_: {}, expected=20)[next(iter(ROWS))]
    with counted():
        with pytest.raises(SealedError, match="made of a sealed tensor's numbers"):
            made(x)
        assert type(made(torch.rand(PATIENTS))) is torch.Tensor


def test_the_older_types_of_torch_are_types_and_make_tensors_of_plain_numbers() -> None:
    """A script's x.type(torch.FloatTensor) is a step of the program; a tensor of as many numbers as patients is refused."""
    x = Batch(ROWS.__getitem__, lambda *_: {}, expected=20)[next(iter(ROWS))]
    with counted():
        assert x.type(torch.DoubleTensor).dtype == torch.float64
        assert type(x.type("torch.LongTensor")) is type(x)
        assert isinstance(torch.zeros(2), torch.FloatTensor)
        assert not isinstance(torch.zeros(2), torch.LongTensor)
        assert torch.equal(torch.FloatTensor([1, 2]), torch.Tensor([1, 2]))
        assert torch.Tensor(2, 3).shape == (
            2,
            3,
        )
        assert nn.Parameter(torch.zeros(2)).type(dtype=torch.HalfTensor).dtype == torch.float16
        for made in (torch.Tensor, torch.FloatTensor):
            with pytest.raises(SealedError, match="made of a sealed tensor's numbers"):
                made(x.shape[0], 3)
