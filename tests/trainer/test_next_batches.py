"""What a loop's first batch recorded is looked up by the next ones, and never where it would be another program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapha_lab.curator.lift import lift
from rapha_lab.protocol.errors import ProgramError, RaphaError
from rapha_lab.session import sealed
from rapha_lab.session.patients import _Gradients
from rapha_lab.session.sealed import PATIENTS, Batch
from rapha_lab.session.tracing import Traced

X, Y = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), (torch.arange(40) % 2).float()


def curator(traced: Traced, columns: dict[str, Any], reduction: str) -> dict[str, Tensor]:
    """The exact gradient over forty patients."""
    it = lift(traced.program)
    inputs = {name: X if c == "x" else Y for name, c in columns.items()}
    rows = it.gradients(*it.tensors(traced.blob), inputs)
    return {name: t.mean(0) if reduction == "mean" else t.sum(0) for name, t in rows.items()}


@pytest.fixture
def batches() -> Callable[[], Batch]:
    """Batches of one loop."""
    first = Batch(
        lambda c: torch.rand(PATIENTS, 8) if c == "x" else (torch.arange(PATIENTS) % 2).float(), curator, 20
    )
    return lambda: Batch(first.example, curator, 20, memory=first.memory)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(net(x).squeeze(-1), y)


def checked(loss: Callable[[Tensor, Tensor], Tensor], net: nn.Module, batch: Batch) -> None:
    """The private gradient without noise is the one that torch computes."""
    net.zero_grad()
    loss(batch["x"], batch["y"]).backward()
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    loss(X, Y).backward()
    for mine, p in zip(found, net.parameters(), strict=True):
        assert (mine is None) == (p.grad is None)
        if mine is not None:
            torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-6)


def test_the_same_operations_are_not_computed_again(batches: Callable[[], Batch]) -> None:
    net, calls = model(), []
    net[1].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(4):
        checked(lambda x, y: loss_of(net, x, y), net, batches())
    first = batches()
    known = len(first.memory.done)
    loss_of(net, first["x"], first["y"])
    assert calls, "the cell's own code runs each time"
    assert len(first.memory.done) == known


def test_a_loss_that_changes_on_the_way_is_another_program(batches: Callable[[], Batch]) -> None:
    net = model()
    for weight in (1.0, 1, 0.5, True, -0.0, 0.0, 2.0):
        checked(lambda x, y, w=weight: loss_of(net, x, y) * w, net, batches())  # type: ignore[misc]
    for power in (2, 3):
        checked(lambda x, y, p=power: (net(x).squeeze(-1) - y).abs().pow(p).mean(), net, batches())  # type: ignore[misc]


def test_layers_that_are_frozen_and_thawed_on_the_way(batches: Callable[[], Batch]) -> None:
    net = model()
    for frozen in (False, True, False):
        net[0].requires_grad_(not frozen)
        checked(lambda x, y: loss_of(net, x, y), net, batches())


def test_a_layer_that_is_exchanged_on_the_way(batches: Callable[[], Batch]) -> None:
    net = model()
    for width in (6, 6, 6):
        checked(lambda x, y: loss_of(net, x, y), net, batches())
        net[2] = nn.Linear(width, 1)


def test_a_constant_that_changes_on_the_way(batches: Callable[[], Batch]) -> None:
    net, weight = model(), torch.ones(8)
    for _ in range(3):
        checked(lambda x, y: loss_of(net, x * weight, y), net, batches())
        weight.mul_(2)


def test_what_is_made_without_gradient_stays_so(batches: Callable[[], Batch]) -> None:
    net = model()

    def both(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            soft = torch.sigmoid(net(x).squeeze(-1))
        return F.binary_cross_entropy_with_logits(net(x).squeeze(-1), 0.5 * y + 0.5 * soft)

    for _ in range(3):
        checked(both, net, batches())


def test_operations_in_place_are_done_in_their_order(batches: Callable[[], Batch]) -> None:
    """What was computed of a tensor before it changed is of what it was."""
    net = model()

    def residual(x: Tensor, y: Tensor) -> Tensor:
        h = net[0](x)
        before = h * 2
        h.add_(1)
        return F.binary_cross_entropy_with_logits(
            (net[2](h.tanh()) + before.mean(1, keepdim=True)).squeeze(-1), y
        )

    for _ in range(3):
        checked(residual, net, batches())


def test_a_change_in_place_behind_a_view_is_refused(batches: Callable[[], Batch]) -> None:
    """The view would change too, which a program of new tensors does not."""
    net = model()
    for _ in range(2):
        h = net[0](batches()["x"])
        seen = h.view(-1, 3, 2)
        with pytest.raises(ProgramError, match="in place"):
            F.relu_(h)
        assert seen.shape[1:] == (3, 2)


def after_use(h: Tensor) -> Tensor:
    before = h * 2
    return before + F.relu(h, inplace=True)


def result_left(h: Tensor) -> Tensor:
    F.relu(h, inplace=True)
    return h


def of_what_is_shared(h: Tensor) -> Tensor:
    same = h
    same /= 2
    same **= 2
    return h


def of_a_mask(h: Tensor) -> Tensor:
    mask = h > 0
    same = mask
    same &= h < 0.5
    return h * mask


@pytest.mark.parametrize("change", [after_use, result_left, of_what_is_shared, of_a_mask])
def test_what_is_changed_in_place_is_changed_whatever_it_is_called_by(
    change: Callable[[Tensor], Tensor], batches: Callable[[], Batch]
) -> None:
    net = model()
    for _ in range(2):
        checked(
            lambda x, y: F.binary_cross_entropy_with_logits(net[2](change(net[0](x))).squeeze(-1), y),
            net,
            batches(),
        )


ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda h: h.flatten(1),
    "view": lambda h: h.view(-1, 6),
    "contiguous": lambda h: h.contiguous(),
    "detach": lambda h: h.detach(),
    "dropout that is off": lambda h: F.dropout(h, 0.5, False),
}


@pytest.mark.parametrize("name", ALIASES)
def test_a_tensor_is_not_used_once_another_name_of_its_numbers_changed(
    name: str, batches: Callable[[], Batch]
) -> None:
    net = model()
    for _ in range(2):
        h = net[0](batches()["x"])
        other = ALIASES[name](h)
        other.mul_(2)
        assert other.sum().dim() == 0
        assert h.shape[1:] == (6,)
        with pytest.raises(ProgramError, match="in place"):
            h.sum()


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy_": lambda h, own: own.copy_(h.detach().mean(0)),
    "lerp_": lambda h, own: own.lerp_(h.detach().mean(0), 0.1),
    "setitem": lambda h, own: own.__setitem__(slice(None), h.detach().mean(0)),
    "out": lambda h, own: torch.mean(h, 0, out=own),
    "out sealed": lambda h, own: torch.add(h, 1, out=h),
    "data": lambda h, own: setattr(h, "data", own),
    "of a list": lambda h, own: torch._foreach_add_([own], [h.mean(0)]),
}


@pytest.mark.parametrize("name", WRITES)
def test_nothing_made_up_is_written_into_a_tensor_of_the_cell(
    name: str, batches: Callable[[], Batch]
) -> None:
    """Nor is a sealed tensor exchanged where the program would not see it."""
    net, own = model(), torch.zeros(6)
    for _ in range(2):
        with pytest.raises(RaphaError, match="writ"):
            WRITES[name](net[0](batches()["x"]), own)
    assert not own.any()


def test_columns_of_the_same_names_in_another_dataset_are_another_program() -> None:
    """Sessions and kernels outlive a loop, and its dataset."""
    weight, seen = nn.Parameter(torch.ones(())), []

    def gradients(traced: Traced, columns: dict[str, Any], reduction: str) -> dict[str, Tensor]:
        seen.append([(spec.shape, spec.dtype) for spec in traced.program.inputs])
        return {"p0": torch.zeros(())}

    for made_up in (torch.rand(PATIENTS, 8), torch.rand(PATIENTS, 5), torch.ones(PATIENTS, 5).long()):
        x = Batch(lambda _, made_up=made_up: made_up, gradients, 20)["x"]  # type: ignore[misc]
        (x * weight).sum(-1).mean().backward()
    assert seen == [[([8], "float32")], [([5], "float32")], [([5], "int64")]]


def test_another_default_dtype_on_the_way_is_another_program(batches: Callable[[], Batch]) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found.append(torch.where(batches()["x"] > 0.5, 1.0, 0.0).dtype)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found == [torch.float32, torch.float64]


def test_autocast_on_the_way_is_another_program(batches: Callable[[], Batch]) -> None:
    net, found = model(), []
    for dtype in (None, torch.bfloat16, torch.float16, None):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            found.append(net[0](batches()["x"]).dtype)
    assert found == [torch.float32, torch.bfloat16, torch.float16, torch.float32]


def test_a_tensor_of_another_batch_is_refused_although_it_was_recorded(batches: Callable[[], Batch]) -> None:
    net = model()
    one, other = batches(), batches()
    for batch in (one, other):
        loss_of(net, batch["x"], batch["y"]).backward()
    with pytest.raises(ProgramError, match="several batches"):
        loss_of(net, one["x"], other["y"]).backward()


def test_a_loop_of_ever_new_operations_forgets_old_ones(
    batches: Callable[[], Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "_OPERATIONS", 10)
    net = model()
    for step in range(8):
        checked(lambda x, y, s=step: loss_of(net, x, y) * (1 + s), net, batches())  # type: ignore[misc]
    assert len(batches().memory.done) <= 10


def test_many_parameters_travel(batches: Callable[[], Batch]) -> None:
    """What goes to the curator and comes back is laid out alike, whatever its order."""
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)], nn.Linear(8, 1))
    for _ in range(3):
        checked(lambda x, y: loss_of(net, x, y), net, batches())


class Carried:
    """The curator behind messages, as a session meets it."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.programs: dict[str, Any] = {}

    def __call__(self, request: Any, tensors: bytes) -> tuple[dict[str, Any], bytes]:
        from rapha_lab.protocol.tensors import pack

        self.requests.append(request)
        if request.program is not None:
            self.programs[request.digest] = lift(request.program)
        it = self.programs[request.digest]
        inputs = {name: X if c == "x" else Y for name, c in request.inputs.items()}
        rows = it.gradients(*it.tensors(tensors), inputs)
        return {}, pack({name: t.mean(0) for name, t in rows.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_program_travels_once_and_its_numbers_each_time(dtype: torch.dtype) -> None:
    asked = Carried()
    gradients = _Gradients(asked, "loop")
    first = Batch(
        lambda c: torch.rand(PATIENTS, 8) if c == "x" else (torch.arange(PATIENTS) % 2).float(), gradients, 20
    )
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)], nn.Linear(8, 1)).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(4):
        batch = Batch(first.example, gradients, 20, memory=first.memory)
        checked(lambda x, y: loss_of(net, x.to(dtype), y.to(dtype)), net, batch)
        optimizer.step()
    assert [r.program is not None for r in asked.requests] == [True, False, False, False]


def test_a_layer_that_is_frozen_after_the_loss_was_computed_gets_no_gradient(
    batches: Callable[[], Batch],
) -> None:
    net = model()
    for frozen in (False, True):
        batch = batches()
        net.zero_grad()
        loss = loss_of(net, batch["x"], batch["y"])
        net[0].requires_grad_(not frozen)
        loss.backward()
        assert (net[0].weight.grad is None) == frozen
        assert net[2].weight.grad is not None


WIDTHS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a slice of as many hidden units": lambda net, x: net(x)[:, :5],
    "one of as many hidden units": lambda net, x: net(x)[:, 3],
    "their number": lambda net, x: net(x) / net(x).size(1),
    "their number from the shape": lambda net, x: net(x).reshape(x.shape[0], 1, net(x).shape[1])[:, 0],
    "the patients second": lambda net, x: net(x).T[4],
    "all numbers of a batch": lambda net, x: net(x).sum(1) / (net(x).numel() / x.size(0)),
    "going through them": lambda net, x: torch.stack([h * 2 for h in net(x).T]),
}


@pytest.mark.parametrize("case", WIDTHS)
@pytest.mark.parametrize("width", [PATIENTS, 2 * PATIENTS, 12])
def test_a_layer_may_be_as_wide_as_there_are_made_up_patients(
    batches: Callable[[], Batch], case: str, width: int
) -> None:
    torch.manual_seed(0)
    net = nn.Linear(8, width)
    for _ in range(2):
        checked(lambda x, y: WIDTHS[case](net, x).tanh().mean(), net, batches())


@pytest.mark.parametrize("width", [PATIENTS, 2 * PATIENTS])
def test_patients_are_not_taken_apart_wherever_they_stand(batches: Callable[[], Batch], width: int) -> None:
    h = nn.Linear(8, width)(batches()["x"])
    for apart in (lambda: h[:5], lambda: h[0], lambda: h.T[:, 0], lambda: list(h), lambda: h[:, 3][2]):
        with pytest.raises(RaphaError):
            apart()
