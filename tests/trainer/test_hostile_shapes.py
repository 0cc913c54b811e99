"""Programs whose shapes are chosen to let patients meet: each is refused, or keeps them apart all the same.

PyTorch takes no dimensions for all of them, and lines up the last dimensions of values of different rank. A rule
that lets a program use either puts patients where an operation adds them up. The self-test would not notice all of
them: a program can keep quiet for made-up patients. What stops them is the table, and behind it the dry run.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from conftest import node, program
from torch import Tensor

from rapha_lab.curator.lift import lift, table
from rapha_lab.curator.lift.parts import HUGE
from rapha_lab.curator.mechanisms import train
from rapha_lab.protocol.errors import ProgramError
from rapha_lab.protocol.messages import Clip
from rapha_lab.protocol.program import Node, Program, Ref

PATIENTS = 8
Case = tuple[dict[str, list[int]], dict[str, list[int]], list[Node]]


def x(*shape: int) -> Node:
    """The input, as one patient's value of this shape."""
    return node("x", "view.default", "@given", [*shape])


def lstm(rows: int, size: int) -> Case:
    states = [Ref("h"), Ref("c")]
    weights = {"wi": [rows, 3], "wh": [rows, size]}
    nodes = [
        x(2, 3),
        node("h", "view.default", "@zeros", [1, 1]),
        node("c", "view.default", "@zeros", [1, 1]),
        Node(
            "l",
            "aten.lstm.input",
            [Ref("x"), states, [Ref("wi"), Ref("wh")], False, 1, 0.0, False, False, True],
            {},
            line=7,
        ),
        Node("y", "getitem", [Ref("l"), 0], line=7),
        node("v", "detach.default", "@y"),
    ]
    return {"given": [2, 3], "zeros": [1, 1]}, weights, nodes


CASES: dict[str, Case] = {
    "roll of single numbers": ({"given": []}, {}, [x(), node("v", "roll.default", "@x", [1], [0])]),
    "norm of single numbers": (
        {"given": []},
        {},
        [x(), node("v", "linalg_vector_norm.default", "@x", 2.0, [0], True)],
    ),
    "older norm of single numbers": (
        {"given": []},
        {},
        [x(), node("v", "norm.ScalarOpt_dim", "@x", 2.0, [0], True)],
    ),
    "norm over nothing": ({"given": [3]}, {}, [x(3), node("v", "_weight_norm.default", "@x", "@x", 0)]),
    "frozen batch norm without a batch": (
        {"given": [3]},
        {"m": [3]},
        [
            x(3),
            node("b", "batch_norm.default", "@x", None, None, "@m", "@m", False, 0.1, 1e-5, False),
            node("v", "sum.dim_IntList", "@b", [0]),
        ],
    ),
    "prelu of single numbers": ({"given": []}, {"m": [1]}, [x(), node("v", "prelu.default", "@x", "@m")]),
    "a bilinear layer's bias": (
        {"given": [3]},
        {"k": [2, 3, 3], "m": [1, 2]},
        [x(3), node("v", "bilinear.default", "@x", "@x", "@k", "@m")],
    ),
    "a linear layer's bias": (
        {"given": [3]},
        {"m": [1, 3]},
        [x(3), node("k", "outer.default", "@x", "@x"), node("v", "linear.default", "@x", "@k", "@m")],
    ),
    "a shared linear layer's bias": (
        {"given": [3]},
        {"k": [3, 3], "m": [1, 1, 3]},
        [x(3), node("v", "linear.default", "@x", "@k", "@m")],
    ),
    "an affine map's bias": (
        {"given": [1, 3]},
        {"m": [1, 1, 3, 3]},
        [x(1, 3), node("k", "t.default", "@x"), node("v", "addmm.default", "@m", "@k", "@x")],
    ),
    "a norm's weight": (
        {"given": [3]},
        {"m": [1, 3]},
        [x(3), node("v", "rms_norm.default", "@x", [3], "@m")],
    ),
    "a norm's own bias": (
        {"given": [3]},
        {"m": [1, 3]},
        [x(3), node("k", "mul.Tensor", "@m", "@x"), node("v", "layer_norm.default", "@x", [3], None, "@k")],
    ),
    "soft targets": (
        {"given": [3]},
        {"m": [1, 3]},
        [x(3), node("v", "cross_entropy_loss.default", "@x", "@m", None, 0)],
    ),
    "a mask of attention": (
        {"given": [2, 3]},
        {"m": [1, 1, 2, 2]},
        [x(2, 3), node("v", "scaled_dot_product_attention.default", "@x", "@x", "@x", "@m")],
    ),
    "pooling over patients": (
        {"given": [4]},
        {},
        [
            x(4),
            node("p", "max_pool2d_with_indices.default", "@x", [3, 1], [1, 1], [1, 0]),
            Node("v", "getitem", [Ref("p"), 0], line=7),
        ],
    ),
    "shuffled pixels of patients": (
        {"given": [4, 4]},
        {},
        [x(4, 4), node("v", "pixel_shuffle.default", "@x", 1)],
    ),
    "an LSTM of the wrong size": lstm(8, 1),
}


def hostile(name: str) -> Program:
    """The case's value times a weight."""
    inputs, parameters, nodes = CASES[name]
    end = [node("zv", "mul.Tensor", "@v", "@w"), node("zs", "sum.default", "@zv")]
    return program(inputs, {**parameters, "w": []}, [*nodes, *end])


def tensors(specs: Any, *lead: int, low: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        s.name: torch.rand((*lead, *s.shape), generator=generator, dtype=torch.float64) + low for s in specs
    }


def moved(name: str) -> list[int]:
    """Whose gradient moves with the second patient's record."""
    loss = hostile(name)
    it = lift(loss)
    it.microbatch = PATIENTS
    parameters, given = tensors(loss.parameters), tensors(loss.inputs, PATIENTS)
    other = {n: t.clone() for n, t in given.items()}
    other["given"][1] *= 3
    one, two = (it.gradients(parameters, {}, rows)["w"] for rows in (given, other))
    return (one != two).nonzero().flatten().tolist()


@pytest.mark.parametrize("name", sorted(CASES))
def test_no_choice_of_shapes_mixes_patients(name: str) -> None:
    try:
        who = moved(name)
    except ProgramError:
        return
    assert who in ([1], [])


MIXING = {
    "a sum that all share": lambda v: v.sum(0, keepdim=True),
    "patients in another place": lambda v: v.unsqueeze(0),
    "each with each": lambda v: v.unsqueeze(1) * v,
    "one patient picked": lambda v: v[:1],
}


@pytest.mark.parametrize("name", sorted(MIXING))
def test_the_dry_run_stops_a_rule_that_forgot(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second wall: whatever is wrong with a rule, a value that is not one for each patient is refused."""
    op, _ = table.TABLE["aten.tanh.default"]
    monkeypatch.setitem(table.TABLE, "aten.tanh.default", (op, MIXING[name]))
    nodes = [
        x(3),
        node("v", "tanh.default", "@x"),
        node("l", "sum.default", "@v"),
        node("z", "mul.Tensor", "@l", "@w"),
    ]
    with pytest.raises(ProgramError, match="mixes patients"):
        lift(program({"given": [3]}, {"w": []}, nodes))


def test_the_self_test_alone_would_not_have_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that looks at its neighbour only where that one's number is in (1.5, 3): made-up patients' is not."""
    op, _ = table.TABLE["aten.roll.default"]
    monkeypatch.setitem(table.TABLE, "aten.roll.default", (op, lambda v, shifts, dims: v.roll(shifts, [])))
    nodes = [
        x(),
        node("n", "roll.default", "@x", [1], [0]),
        node("a", "gt.Scalar", "@n", 1.5),
        node("b", "lt.Scalar", "@n", 3.0),
        node("c", "logical_and.default", "@a", "@b"),
        node("v", "where.ScalarOther", "@c", "@n", 0.0),
        node("z", "mul.Tensor", "@v", "@w"),
    ]
    it = lift(program({"given": []}, {"w": []}, nodes))
    it.microbatch = PATIENTS
    it.selftest({"w": torch.tensor(1.0, dtype=torch.float64)}, {})
    given = torch.zeros(PATIENTS, dtype=torch.float64)
    given[0] = 2.0
    found = it.gradients({"w": torch.tensor(1.0, dtype=torch.float64)}, {}, {"given": given})["w"]
    assert found.tolist() == [0, 2.0, *[0] * (PATIENTS - 2)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("clip", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("large", [3e38, 1e27, 1e26, 1e20, 1e150])
def test_no_range_of_numbers_lets_a_patient_add_more_than_the_clip(
    large: float, clip: float, dtype: str
) -> None:
    """Scaled down to C, huge gradients would be no normal float32 numbers, and those can round to twice themselves."""
    for small in (1e-165, 1e-30, 1e-8, 1e-3, 0.7, 2.8):
        nodes = [
            x(1, 10),
            node("a", "mul.Scalar", "@x", large),
            node("l", "linear.default", "@a", "@w"),
            node("s", "mul.Scalar", "@l", small),
            node("z", "sum.default", "@s"),
        ]
        it = lift(program({"given": [10]}, {"w": [10, 10]}, nodes, dtype))
        it.microbatch = PATIENTS
        given = {"given": torch.ones(PATIENTS, 10, dtype=getattr(torch, dtype))}
        weights = {"w": torch.zeros(10, 10, dtype=getattr(torch, dtype))}
        total = it.clipped_sum(weights, {}, given, torch.arange(PATIENTS) == 0, clip)
        assert float(total["w"].norm()) <= clip * (1 + train.slack(PATIENTS)), small


def test_a_clip_too_small_for_that_is_refused() -> None:
    """HUGE over the least C has to stay above float32's least normal number, with room for a layer's many numbers."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(1e-7, Clip)
    assert 1e3 * torch.finfo(torch.float32).tiny < 1e-6 / HUGE


@pytest.mark.parametrize("other", ["x", "h", "wi", "wh", "bh"])
def test_a_recurrent_layer_of_two_dtypes_is_refused(other: str) -> None:
    """Machine code took a float64 gradient for float32: each number was two, half of them another patient's."""
    weights = {"wi": [12, 3], "wh": [12, 4], "bi": [12], "bh": [12]}
    nodes = [
        node("g", "gru.input", "@x", "@h", ["@wi", "@wh", "@bi", "@bh"], True, 1, 0.0, False, False, True),
        Node("y", "getitem", [Ref("g"), 0], line=7),
        node("loss", "sum.default", "@y"),
    ]
    made = program({"x": [5, 3]}, weights | {"h": [1, 1, 4]}, nodes, "float32")
    lift(made)

    def mixed(specs: list[Any]) -> list[Any]:
        return [msgspec.structs.replace(s, dtype="float64") if s.name == other else s for s in specs]

    mixture = msgspec.structs.replace(made, inputs=mixed(made.inputs), parameters=mixed(made.parameters))
    with pytest.raises(ProgramError, match="one dtype"):
        lift(mixture)
