"""A training step does the same operations on the same shapes, whoever is drawn and however many."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rapha_lab.curator.lift import lift
from rapha_lab.curator.mapped import with_nobody
from rapha_lab.curator.mechanisms import train
from rapha_lab.curator.noise import SeededNoise
from rapha_lab.session import tracing


class Counting(TorchDispatchMode):
    """Notes each operation with the shapes and types it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        shapes = [
            (tuple(x.shape), x.dtype)
            for x in torch.utils._pytree.tree_leaves((args, kwargs))
            if torch.is_tensor(x)
        ]
        self.seen.append((str(function), shapes))
        return function(*args, **(kwargs or {}))


def step(drawn, rows, clip=1.0):
    """The operations of one step's clipped sum for these drawn patients."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    traced = tracing.loss_program(model, loss, {"x": torch.zeros(3)}, torch.zeros(()))
    lifted = lift(traced.program)
    parameters, constants = lifted.tensors(traced.blob)
    names = [spec.name for spec in traced.program.inputs]
    given = {name: with_nobody(t) for name, t in zip(names, rows, strict=True)}
    with Counting() as counting:
        train.clipped_sum(lifted, parameters, constants, given, drawn, clip)
    return counting.seen


def patients(n, scale=1.0):
    """Made-up inputs and targets."""
    return torch.randn(n, 3) * scale, (torch.rand(n) < 0.3).float()


def test_a_step_does_not_depend_on_how_many_are_drawn():
    """None, a few or as many as there is room for: operation by operation the same."""
    rows = patients(50)
    slots = torch.full((64,), 50)
    few, many = slots.clone(), slots.clone()
    few[[3, 40]] = torch.tensor([1, 2])
    many[:50] = torch.arange(50)
    nobody = step(slots, rows)
    assert len(nobody) > 20
    assert step(few, rows) == step(many, rows) == nobody


def test_a_step_does_not_depend_on_what_the_records_say():
    """Gradients far above and far below the clip, infinities and all."""
    drawn = torch.arange(64).clamp(max=50)
    wild = patients(50, 1e30)
    assert step(drawn, patients(50)) == step(drawn, patients(50, 1e-30)) == step(drawn, wild)


def test_mutant_a_step_on_the_drawn_alone_would_be_seen():
    """Without the padding the shapes would tell."""
    rows = patients(50)
    assert step(torch.arange(20), rows) != step(torch.arange(30), rows)


def test_a_draw_fills_a_public_number_of_slots():
    """Its length never says how many there are."""
    for rate in (0.0, 0.1, 0.9):
        assert train.draw(50, rate, 64, SeededNoise(0)).shape == (64,)
        assert train.draw(49, rate, 64, SeededNoise(1)).shape == (64,)
