"""Layers are found in whatever way a program writes them, and what their weights are made of is trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import node, program
from test_models import lifted
from torch import Tensor, nn

from rapha_lab.curator.lift import lift
from rapha_lab.curator.mechanisms import train
from rapha_lab.protocol.errors import ProgramError

FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x @ w": lambda x, w: x @ w,
    "x @ w.T": lambda x, w: x @ w.T,
    "w @ x": lambda x, w: (w @ x.unsqueeze(-1)).squeeze(-1),
    "mm": torch.mm,
    "addmm": lambda x, w: torch.addmm(torch.ones(4), x, w),
    "linear of the transpose": lambda x, w: F.linear(x, w.transpose(0, 1)),
    "einsum": lambda x, w: torch.einsum("...d,df->...f", x, w),
    "einsum, turned": lambda x, w: torch.einsum("fd, bd -> bf", w, x),
    "a scaled weight": lambda x, w: F.linear(x, w * 2 / 3),
}


class Formed(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight).sum(-1)


@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_a_layer_however_it_is_written(form: str) -> None:
    """Its gradient is never written out: copies of its weight for each patient take many times as long."""
    it, *_ = lifted(Formed(FORMS[form]), nn.MSELoss(), torch.randn(3, 4), torch.randn(3))
    assert it.paths["weight"].startswith("outer")


def test_what_is_no_layer_is_copied() -> None:
    """The diagonal of a product, and a weight that a patient's number scales."""
    for form in (
        lambda x, w: torch.einsum("bd,dd->bd", x, w),
        lambda x, w: (x.unsqueeze(1) * w @ x.unsqueeze(-1)).squeeze(-1),
    ):
        it, *_ = lifted(Formed(form), nn.MSELoss(), torch.randn(3, 4), torch.randn(3))
        assert it.paths["weight"].startswith("copy")


def doubled(times: int) -> list:
    """A weight added to itself again and again: each time twice as many ways lead back to it."""
    nodes = [
        node(f"w{k + 1}", "add.Tensor", f"@w{k}" if k else "@w", f"@w{k}" if k else "@w")
        for k in range(times)
    ]
    return [*nodes, node("v", "linear.default", "@x", f"@w{times}"), node("z", "sum.default", "@v")]


@pytest.mark.parametrize("times", [5, 60, 500])
def test_many_ways_back_to_a_parameter_take_no_longer(times: int) -> None:
    """Of 2^60 none would end. Nor does one patient move the sum by more than the norm."""
    it = lift(program({"x": [3]}, {"w": [2, 3]}, doubled(times), "float64"))
    it.microbatch = 8
    weights, everyone = {"w": torch.ones(2, 3, dtype=torch.float64)}, torch.ones(8, dtype=torch.bool)
    x = {"x": torch.randn(8, 3, dtype=torch.float64)}
    if times == 5:
        found = it.gradients(weights, {}, x)["w"]
        torch.testing.assert_close(found, 32 * x["x"].unsqueeze(1).expand(8, 2, 3))
    whole = it.clipped_sum(weights, {}, x, everyone, 1.0)
    rest = it.clipped_sum(weights, {}, x, torch.arange(8) > 0, 1.0)
    assert float((whole["w"] - rest["w"]).norm()) <= 1 + train.slack(8)


def test_what_a_weight_takes_on_its_way_counts_as_memory() -> None:
    """It is made for each patient: a weight of one number may be the sum of very many."""
    nodes = [
        node("wide", "expand.default", "@w", [1 << 26]),
        node("exps", "exp.default", "@wide"),
        node("s", "sum.default", "@exps"),
        node("m", "view.default", "@s", [1, 1]),
        node("v", "linear.default", "@x", "@m"),
        node("z", "sum.default", "@v"),
    ]
    with pytest.raises(ProgramError, match="too large"):
        lift(program({"x": [1]}, {"w": [1]}, nodes, "float32"))
