"""One patient moves the sum by at most C, whatever the graph, and nobody moves anybody else's part."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import lifted, node, program
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import MODELS
from torch import Tensor, nn

from rapha_lab.curator.lift import Lifted, clipping, lift
from rapha_lab.curator.lift.parts import Pairs, Several, Stored
from rapha_lab.curator.mechanisms import train
from rapha_lab.protocol.program import Program
from rapha_lab.session.tracing import trace

CLIP = 1.0
CHOSEN = [
    "mlp",
    "cnn with group norm",
    "1-d cnn",
    "depthwise convolutions",
    "embedding and mlp",
    "codes of visits",
    "codes of a large table",
    "tied weights",
    "text transformer",
    "products",
    "weights made of others",
    "weight norm and cross-attention",
    "gru",
]


def norm(sums: dict[str, Tensor]) -> float:
    return float(torch.cat([t.double().flatten() for t in sums.values()]).norm())


def batch_for(name: str, size: int) -> tuple[Lifted, dict, dict, dict[str, Tensor]]:
    make, loss, xs, ys = MODELS[name]
    torch.manual_seed(4)
    model = make()
    x = torch.cat([xs() for _ in range(-(-size // 5))])[:size]
    y = torch.cat([ys() for _ in range(-(-size // 5))])[:size]
    model(x)
    it, parameters, constants = lifted(model, loss, x, y)
    return it, parameters, constants, {"x": x, "target": y}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_sum_is_that_of_clipped_gradients(name: str) -> None:
    """Layer rules give what clipping materialised gradients one by one gives."""
    it, parameters, constants, batch = batch_for(name, 10)
    mask = torch.arange(10) != 3
    rows = it.gradients(parameters, constants, batch)
    expected = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in parameters.items()}
    for i in mask.nonzero().flatten().tolist():
        one = {n: t[i] for n, t in rows.items()}
        for n, t in one.items():
            expected[n] += t * min(1.0, CLIP / norm(one))
    for n, t in it.clipped_sum(parameters, constants, batch, mask, CLIP).items():
        torch.testing.assert_close(t, expected[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("bad", [float("nan"), 3e38])
def test_a_patient_keeps_every_bit_whoever_the_neighbours_are(name: str, bad: float) -> None:
    """Beside absent ones, or records that are not finite, a patient's clipped gradient is bitwise the same."""
    it, parameters, constants, batch = batch_for(name, 16)
    for slot in (0, 7, 15):
        only = torch.arange(16) == slot
        mine = it.clipped_sum(parameters, constants, batch, only, CLIP)
        for value in (bad, 0):
            rows = {n: t.clone() for n, t in batch.items()}
            for t in rows.values():
                t[~only] = value if t.is_floating_point() else 10**9
            again = it.clipped_sum(parameters, constants, rows, only, CLIP)
            assert all(torch.equal(t, again[n]) for n, t in mine.items())
            assert torch.equal(mine.counted, again.counted)


def test_a_gradient_that_is_not_finite_adds_nothing() -> None:
    """The sum is bitwise that of the batch without the patient."""
    it, parameters, constants, batch = batch_for("mlp", 8)
    batch["x"][2] = float("nan")
    everyone = torch.ones(8, dtype=torch.bool)
    with_it = it.clipped_sum(parameters, constants, batch, everyone, CLIP)
    without = it.clipped_sum(parameters, constants, batch, torch.arange(8) != 2, CLIP)
    assert all(torch.equal(t, without[n]) and t.isfinite().all() for n, t in with_it.items())


class Cancelling(nn.Module):
    """Two positions whose huge gradients cancel: a Gram norm of them reads 0 in float32."""

    def __init__(self, size: float, seed: int = 5) -> None:
        super().__init__()
        self.layer, self.size = nn.Linear(64, 1, bias=False), size
        self.register_buffer("direction", torch.randn(64, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor) -> Tensor:
        # rows s z + x and -s z, whose common gradient is x
        rows = torch.stack([self.size * self.direction + x, -self.size * self.direction.expand_as(x)], 1)
        return self.layer(rows).sum((1, 2))


def identity(prediction: Tensor, target: Tensor) -> Tensor:
    return (1000 * prediction).mean() + 0 * target.mean()


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e12, 1e30])
def test_cancelling_rows_do_not_hide_a_gradient(size: float) -> None:
    """The norm is taken of the numbers that are added, so that cancellation cannot make them differ."""
    torch.manual_seed(6)
    x, y = torch.randn(8, 64), torch.zeros(8)
    model = Cancelling(size)

    def attack(parameters: dict, constants: dict, inputs: dict) -> Tensor:
        return identity(
            torch.func.functional_call(model, {**parameters, **constants}, inputs["x"]), inputs["target"]
        )

    # the author of a hostile graph does not use our tracing's checks
    traced = trace(
        attack, dict(model.named_parameters()), dict(model.named_buffers()), {"x": x[0], "target": y[0]}
    )
    it = lift(traced.program)
    for i in range(8):
        mine = it.clipped_sum(*it.tensors(traced.blob), {"x": x, "target": y}, torch.arange(8) == i, CLIP)
        assert norm(mine) <= CLIP * (1 + train.slack(8))


def test_ghost_norms_fail_where_ours_hold() -> None:
    """The same graph under Opacus' ghost clipping: one patient adds many times the clipping norm."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    torch.manual_seed(6)
    worst = 0.0
    for seed in range(20):
        model, x = Cancelling(1e4, seed), torch.randn(1, 64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ghost = GradSampleModuleFastGradientClipping(
                model, max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="mean"
            )
            identity(ghost(x), torch.zeros(1)).backward(retain_graph=True)
            scale = float(ghost.get_clipping_coef()[0])
        worst = max(worst, scale * float(model.layer.weight.grad.norm()))
    assert worst > 100 * CLIP


OPERATIONS: list[Callable[[str, str], tuple[str, list]]] = [
    lambda a, w: ("mul.Tensor", [f"@{a}", f"@{w}"]),
    lambda a, w: ("add.Tensor", [f"@{a}", f"@{w}"]),
    lambda a, w: ("div.Tensor", [f"@{a}", f"@{w}"]),
    lambda a, w: ("linear.default", [f"@{a}", "@square"]),
    lambda a, w: ("linear.default", [f"@{a}", "@square", f"@{w}"]),
    lambda a, w: ("matmul.default", [f"@{a}", "@square"]),
    lambda a, w: ("linear.default", [f"@{a}", "@made"]),
    lambda a, w: ("matmul.default", [f"@{a}", "@added"]),
    lambda a, w: ("exp.default", [f"@{a}"]),
    lambda a, w: ("reciprocal.default", [f"@{a}"]),
    lambda a, w: ("mul.Scalar", [f"@{a}", 1e18]),
    lambda a, w: ("mul.Scalar", [f"@{a}", 1e-30]),
    lambda a, w: ("cumsum.default", [f"@{a}", -1]),
    lambda a, w: ("flip.default", [f"@{a}", [0]]),
    lambda a, w: ("roll.default", [f"@{a}", [1]]),
    lambda a, w: ("softmax.int", [f"@{a}", 0]),
    lambda a, w: ("layer_norm.default", [f"@{a}", [3], f"@{w}"]),
    lambda a, w: ("sub.Tensor", [f"@{a}", "@x"]),
    lambda a, w: ("view.default", [f"@{a}", [-1, 3]]),
    lambda a, w: ("transpose.int", [f"@{a}", 0, 0]),
    lambda a, w: ("expand.default", [f"@{a}", [2, 3]]),
    lambda a, w: ("index_select.default", [f"@{a}", 0, "@places"]),
    lambda a, w: ("sqrt.default", [f"@{a}"]),
    lambda a, w: ("log.default", [f"@{a}"]),
]


def random_program(picks: list[tuple[int, int]]) -> Program:
    """A chain of hostile operations on one patient's three numbers."""
    nodes, last = [node("places", "zeros.default", [2], dtype="int64")], "x"
    nodes += [
        node("turned", "t.default", "@square"),
        node("product", "mm.default", "@square", "@turned"),
        node("large", "mul.Tensor", "@product", 1e9),
        node("added", "add.Tensor", "@large", "@square"),
        node("made", "exp.default", "@added"),
    ]
    for k, (which, weight) in enumerate(picks):
        op, args = OPERATIONS[which % len(OPERATIONS)](last, ("v", "w")[weight % 2])
        nodes.append(node(f"n{k}", op, *args))
        last = f"n{k}"
    nodes += [node("both", "mul.Tensor", f"@{last}", "@v"), node("loss", "sum.default", "@both")]
    return program({"x": [3]}, {"v": [3], "w": [3], "square": [3, 3]}, nodes, "float32")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    picks=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 1)), min_size=1, max_size=8),
    rows=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=24, max_size=24),
    seed=st.integers(0, 1000),
)
def test_hostile_graphs_move_the_sum_by_at_most_the_norm(
    picks: list[tuple[int, int]], rows: list[float], seed: int
) -> None:
    """Random graphs on random records: alone at most C, and adding a patient changes the sum by at most C."""
    it = lift(random_program(picks))
    generator = torch.Generator().manual_seed(seed)
    parameters = {s.name: torch.randn(s.shape, generator=generator) for s in it.program.parameters}
    x = {"x": torch.tensor(rows, dtype=torch.float32).reshape(8, 3)}
    everyone = torch.ones(8, dtype=torch.bool)
    bound = CLIP * (1 + train.slack(8))
    whole = it.clipped_sum(parameters, {}, x, everyone, CLIP)
    for i in (0, 5):
        only = it.clipped_sum(parameters, {}, x, torch.arange(8) == i, CLIP)
        rest = it.clipped_sum(parameters, {}, x, torch.arange(8) != i, CLIP)
        assert norm(only) <= bound
        assert norm({n: whole[n].double() - rest[n].double() for n in whole}) <= bound
        assert torch.equal(whole.counted - rest.counted, only.counted)


# Teeth: each broken engine is caught by the checks above


Sums = tuple[dict[str, Tensor], Tensor]


def unclipped(found: dict, mask: Tensor, clip: float, size: int) -> Sums:
    ones = torch.where(mask, 1.0, 0.0).double()
    return {name: part.total(ones, mask) for name, part in found.items()}, torch.zeros(2)


def first_use_only(found: dict, mask: Tensor, clip: float, size: int) -> Sums:
    square = next(iter(found.values())).square()
    scale = torch.where(mask, (clip / square.sqrt()).clamp(max=1.0), 0.0)
    return {name: part.total(scale, mask) for name, part in found.items()}, torch.zeros(2)


def twice(found: dict, mask: Tensor, clip: float, size: int) -> Sums:
    sums, counted = as_it_is(found, mask, clip, size)
    return {name: 2 * t for name, t in sums.items()}, counted


as_it_is = clipping.clipped_sum


@pytest.mark.parametrize("mutant", [unclipped, first_use_only, twice])
def test_broken_clipping_is_caught(mutant: Callable[..., Sums], monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipping the clip, measuring one parameter only, or adding a patient twice breaks the bound."""
    it, parameters, constants, batch = batch_for("mlp", 8)
    batch["x"] *= 100
    monkeypatch.setattr(clipping, "clipped_sum", mutant)
    only = it.clipped_sum(parameters, constants, batch, torch.arange(8) == 0, CLIP / 100)
    assert norm(only) > CLIP / 100 * (1 + train.slack(8))


@pytest.mark.parametrize("size", [1, 4, 12, 24])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20, 1e38])
def test_written_out_in_groups_a_patient_moves_the_sum_by_at_most_the_norm(size: int, scale: float) -> None:
    """At either edge of a group, of a weight used twice whose gradients nearly cancel; one that is no number adds nothing."""
    draw, patients = torch.Generator().manual_seed(0), 24
    out, inp = (torch.randn(patients, 6, n, generator=draw) for n in (5, 7))
    shape = torch.Size((5, 7))
    for who in (0, 3, 4, 23):
        for bad in (1.0, math.nan, math.inf, 1e30):
            spoiled = out * scale
            spoiled[who, 0] *= bad
            uses = (Pairs("w", spoiled, inp, shape), Pairs("w", -spoiled * (1 + 2**-20), inp, shape))
            found = {"w": Several("w", uses), "b": Stored("b", spoiled[:, 0])}
            full = torch.ones(patients, dtype=torch.bool)
            without = full.clone()
            without[who] = False
            (whole, counted), (rest, fewer) = (
                clipping.clipped_sum(found, m, 1.0, size) for m in (full, without)
            )
            apart = torch.cat([(whole[n].double() - rest[n]).flatten() for n in whole]).norm()
            assert float(apart) <= 1 + train.slack(patients)
            if bad != 1.0 and not spoiled[who].isfinite().all():
                assert float(apart) == 0
                assert counted[0] == fewer[0]


def test_nothing_of_a_group_stays_between_the_rows_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number kept between freed rows kept their room from being used again: a step took forty times its gradients."""
    left = list[weakref.ref[Tensor]]()
    plain = clipping.add_group

    def watched(*given: Any) -> Any:
        assert all(ref() is None for ref in left)
        sums, *how = plain(*given)
        left.extend(map(weakref.ref, how if not left else [*sums, *how]))
        return sums, *how

    monkeypatch.setattr(clipping, "add_group", watched)
    x = torch.randn(12, 3, 5)
    found = {"w": Pairs("w", x, x, torch.Size((5, 5))), "b": Stored("b", x[:, 0])}
    clipping.clipped_sum(found, torch.ones(12, dtype=torch.bool), 1.0, 4)
    assert len(left) == 8
    assert all(ref() is None for ref in left)
