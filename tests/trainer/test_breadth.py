"""Architectures as papers have them, small: each trains, and every patient's gradient is the one computed alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import alone, lifted
from torch import Tensor, nn

from rapha_lab.curator.lift import lift
from rapha_lab.session.tracing import loss_program

N = 3


class Block(nn.Module):
    """A basic block of ResNet with GroupNorm."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(2, out) for _ in range(2))
        self.short = (
            nn.Identity()
            if stride == 1 and inp == out
            else nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.GroupNorm(2, out))
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norms[0](self.one(x)), inplace=True)
        return F.relu(self.norms[1](self.two(h)) + self.short(x))


def resnet18() -> nn.Module:
    """Eighteen layers: a stem, four stages of two blocks, a head."""
    widths, blocks, inp = (4, 4, 6, 8), [], 4
    for stage, width in enumerate(widths):
        for k in range(2):
            blocks.append(Block(inp, width, 2 if stage and not k else 1))
            inp = width
    stem = [nn.Conv2d(1, 4, 7, 2, 3, bias=False), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class UNet(nn.Module):
    """A U-Net of two levels over one or two dimensions."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d)[rank - 1]
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d)[rank - 1]
        self.pool = (F.max_pool1d, F.max_pool2d)[rank - 1]
        self.first, self.second, self.third = (
            conv(1, 4, 3, padding=1),
            conv(4, 6, 3, padding=1),
            conv(6, 8, 3, padding=1),
        )
        self.up_two, self.up_one = up(8, 6, 2, 2), up(6, 4, 3, 2, 1, 1)
        self.join_two, self.join_one = conv(12, 6, 3, padding=1), conv(8, 4, 3, padding=1)
        self.norm, self.out = nn.GroupNorm(2, 4), conv(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm(self.first(x)))
        b = F.relu(self.second(self.pool(a, 2)))
        c = F.relu(self.third(self.pool(b, 2)))
        b = F.relu(self.join_two(torch.cat([b, self.up_two(c)], 1)))
        return self.out(F.relu(self.join_one(torch.cat([a, self.up_one(b)], 1))))


class ViT(nn.Module):
    """Patches, a class token, learnt places, an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(1, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.places
        return self.head(self.body(h)[:, 0])


class FTTransformer(nn.Module):
    """A tabular transformer: each number scales its own vector, each category looks one up."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
        self.kinds, self.token = nn.Embedding(6, 8), nn.Parameter(torch.randn(8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        numbers = x[:, :4, None] * self.scale + self.shift
        kinds = self.kinds(x[:, 4:].abs().long() % 6)
        tokens = torch.cat([self.token.expand(len(x), 1, 8), numbers, kinds], 1)
        return self.head(self.body(tokens)[:, 0])


class Heads(nn.Module):
    """One body, a head for a diagnosis and one for a length of stay."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.sick, self.days = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        return torch.cat([self.sick(h), self.days(h)], 1)


def both_tasks(prediction: Tensor, target: Tensor) -> Tensor:
    sick = F.binary_cross_entropy_with_logits(prediction[:, 0], target[:, 0])
    return sick + 0.3 * F.smooth_l1_loss(prediction[:, 1], target[:, 1])


def hazard(prediction: Tensor, target: Tensor) -> Tensor:
    """Cox's likelihood with a known baseline hazard, a sum over patients: time times risk less the event's logarithm."""
    time, event = target.unbind(1)
    risk = prediction.squeeze(1)
    return (time * risk.exp() - event * risk).mean()


class Bag(nn.Module):
    """The mean over a patient's records, padded and masked: the last feature says which are there."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU())
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        there = x[..., 4:]
        h = (self.encoder(x[..., :4]) * there).sum(1) / there.sum(1).clamp_min(1)
        return self.head(h)


def records() -> Tensor:
    """Patients with none, one and six records of six."""
    x = torch.randn(N, 6, 5, dtype=torch.float64)
    x[..., 4] = (torch.arange(6) < torch.tensor([[0], [1], [6]])).double()
    return x


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(N, *shape, dtype=torch.float64)


def kinds() -> Tensor:
    return torch.randint(3, (N,))


def survival() -> Tensor:
    return torch.stack([torch.rand(N) * 3, (torch.rand(N) < 0.5).float()], 1).double()


bce, ce = nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss()
yes = lambda: torch.randint(2, (N,)).double()  # noqa: E731

ARCHITECTURES: dict[str, tuple[Any, Any, Any, Any]] = {
    "resnet-18": (resnet18, ce, numbers(1, 32, 32), kinds),
    "1-d u-net": (lambda: UNet(1), bce, numbers(1, 8), numbers(1, 8)),
    "2-d u-net": (lambda: UNet(2), nn.MSELoss(), numbers(1, 8, 8), numbers(1, 8, 8)),
    "vision transformer": (ViT, ce, numbers(1, 8, 8), kinds),
    "tabular transformer": (FTTransformer, bce, numbers(6), yes),
    "two heads": (Heads, both_tasks, numbers(6), survival),
    "cox": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)), hazard, numbers(6), survival),
    "bag of records": (Bag, bce, records, yes),
    "gru over ragged visits": (
        lambda: nn.Sequential(nn.Linear(5, 6), Last(nn.GRU(6, 4, batch_first=True)), nn.Linear(4, 1)), bce, records, yes,
    ),
}  # fmt: skip


class Last(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_patients_gradient_is_the_one_computed_alone(name: str) -> None:
    """To 1e-5 of its size, for every parameter of every architecture."""
    make, loss, xs, ys = ARCHITECTURES[name]
    torch.manual_seed(1)
    model, x, y = make().double(), xs(), ys()
    it, parameters, constants = lifted(model, loss, x, y)
    mine = it.gradients(parameters, constants, {"x": x, "target": y})
    for parameter, expected in alone(model, loss, x, y).items():
        scale = expected.abs().max().clamp_min(1e-9)
        torch.testing.assert_close(mine[parameter] / scale, expected / scale, rtol=1e-5, atol=1e-5)


def test_what_fills_the_padding_of_a_bag_changes_nothing() -> None:
    """A patient's gradient is that of the mean over the true records, whatever lies in the others' place."""
    torch.manual_seed(2)
    model, x, y = Bag().double(), records(), yes()
    it, parameters, constants = lifted(model, bce, x, y)
    other = x.clone()
    other[..., :4] = torch.where(x[..., 4:] == 1, x[..., :4], 1e3)
    one, two = (it.gradients(parameters, constants, {"x": v, "target": y}) for v in (x, other))
    for name, t in one.items():
        torch.testing.assert_close(t, two[name], rtol=1e-12, atol=1e-15)


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))


def convolved() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 1)
    )


PATHS = {
    dense: {"0.weight": "outer: linear", "0.bias": "stored: linear"},
    convolved: {"1.weight": "stored: conv1d", "3.weight": "copy: layer_norm"},
}


@pytest.mark.parametrize("make", PATHS)
def test_the_plan_says_which_path_each_parameter_takes(make: Callable[[], nn.Module]) -> None:
    """Never silently slow: each parameter is named with its path and what makes it so."""
    model, x, y = make().double(), numbers(6)(), yes()
    it = lift(loss_program(model, bce, {"x": x[0]}, y[0]).program)
    assert set(it.paths) == {n for n, _ in model.named_parameters()}
    for parameter, path in PATHS[make].items():
        assert it.paths[parameter].startswith(path)


def test_a_weight_used_twice_and_one_not_used_are_said_so() -> None:
    """As often as it is used; a parameter without part in the loss is told."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.out, self.idle = nn.Linear(6, 6), nn.Linear(6, 1), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.mix(torch.tanh(self.mix(x)))))

    it, *_ = lifted(Twice().double(), bce, numbers(6)(), yes())
    assert it.paths["mix.weight"] == "stored: linear, 2 times"
    assert it.paths["idle"].startswith("none")


class Through(nn.Module):
    """A linear layer, a function of what it gives, weighted and added up; ties between values among its outputs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(6, 16), function

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        out = self.function(torch.where(h.abs() < 0.1, 0.0, h)).flatten(1).to(x.dtype)
        return out @ torch.linspace(-1, 1, out.shape[1], dtype=x.dtype)


def gated(h: Tensor) -> Tensor:
    """A mixture of experts' gates, of which the largest two stay."""
    value, place = h.topk(2, dim=-1)
    return torch.zeros_like(h).scatter(-1, place, value.softmax(-1))


def shared_keys(h: Tensor) -> Tensor:
    q = h.view(-1, 4, 2, 2)
    return F.scaled_dot_product_attention(q, q[:, :2], q[:, 2:], is_causal=True, enable_gqa=True)


def picture(h: Tensor) -> Tensor:
    return h.view(-1, 1, 4, 4)


def counts(h: Tensor) -> Tensor:
    """A negative binomial likelihood."""
    return torch.lgamma(h.exp() + 2) - torch.lgamma(h.exp()) - math.lgamma(3)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda h: h.sort(-1).values,
    "sort down": lambda h: h.view(-1, 4, 4).sort(1, descending=True).values,
    "argsort": lambda h: h.cumsum(-1).gather(-1, h.argsort(stable=True)),
    "top of gates": gated,
    "median": lambda h: h.view(-1, 4, 4).median(1).values,
    "product": lambda h: h.view(-1, 4, 4).prod(1),
    "cumulative product": lambda h: h.cumprod(-1),
    "cumulative logsumexp": lambda h: h.view(-1, 4, 4).logcumsumexp(1),
    "distances": lambda h: torch.cdist(h.view(-1, 4, 4), torch.ones(2, 4, dtype=h.dtype)),
    "buckets": lambda h: torch.bucketize(h, torch.tensor([-0.5, 0.0, 0.5]), right=True) * h,
    "repeated": lambda h: h.view(-1, 4, 4).repeat_interleave(3, dim=1),
    "channels shuffled": lambda h: F.channel_shuffle(h.view(-1, 4, 2, 2), 2),
    "pixels unshuffled": lambda h: F.pixel_unshuffle(picture(h), 2),
    "windows": lambda h: F.unfold(picture(h), (3, 2), dilation=(1, 2), padding=1, stride=2),
    "windows laid over": lambda h: F.fold(F.unfold(picture(h), 3, padding=1) ** 2, (4, 4), 3, padding=1),
    "shared keys": shared_keys,
    "resized": lambda h: F.interpolate(picture(h), (6, 5), mode="nearest-exact"),
    "resized smoothly": lambda h: F.interpolate(picture(h), (2, 3), mode="bilinear", antialias=True),
    "counts": counts,
    "a distribution": lambda h: torch.distributions.Normal(h, h.exp()).log_prob(torch.zeros_like(h)),
    "a variance": lambda h: F.gaussian_nll_loss(h[:, :8], h[:, 8:] * 0, h[:, 8:].exp(), reduction="none", full=True),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_written_out_gives_what_torch_gives(name: str) -> None:
    """Loss and gradient of each patient, with equal values among them where their order counts."""
    torch.manual_seed(3)
    model, x, y = Through(FUNCTIONS[name]).double(), torch.randn(N, 6, dtype=torch.float64), yes()
    it, parameters, constants = lifted(model, nn.MSELoss(), x, y)
    mine = it.gradients(parameters, constants, {"x": x, "target": y})
    for parameter, expected in alone(model, nn.MSELoss(), x, y).items():
        torch.testing.assert_close(mine[parameter], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_of_words_is_summed_without_its_padding(mode: str) -> None:
    """As nn.EmbeddingBag does, a bag of nothing but padding too."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.EmbeddingBag(7, 4, mode=mode, padding_idx=0), nn.Linear(4, 1)).double()
    x, y = torch.tensor([[1, 2, 2, 0], [3, 0, 0, 6], [0, 0, 0, 0]]), yes()
    it, parameters, constants = lifted(model, bce, x, y)
    mine = it.gradients(parameters, constants, {"x": x, "target": y})
    for parameter, expected in alone(model, bce, x, y).items():
        torch.testing.assert_close(mine[parameter], expected, rtol=1e-8, atol=1e-9)


def test_a_mask_of_the_models_own_is_no_decision() -> None:
    """torch looks whether a mask is the causal one; a decoder and an encoder with one train all the same."""

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            mask = self.body.generate_square_subsequent_mask(4, dtype=x.dtype)
            return self.head(self.body(x, x, src_mask=mask, tgt_mask=mask)[:, -1])

    torch.manual_seed(5)
    model, x, y = Translator().double(), torch.randn(N, 4, 8, dtype=torch.float64), yes()
    it, parameters, constants = lifted(model, bce, x, y)
    mine = it.gradients(parameters, constants, {"x": x, "target": y})
    for parameter, expected in alone(model, bce, x, y).items():
        torch.testing.assert_close(mine[parameter], expected, rtol=1e-8, atol=1e-9)
