"""A hostile or mistaken program is refused cleanly, by operation and line, before anything is computed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from conftest import node, program
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor, nn

from rapha_lab.curator.lift import Limits, lift
from rapha_lab.protocol.errors import ProgramError
from rapha_lab.protocol.program import Node, Program, Ref, TensorSpec, check, digest, structure
from rapha_lab.protocol.tensors import pack
from rapha_lab.session.tracing import loss_program, score_program

SUM = node("loss", "sum.default", "@y")


def simple(*nodes: Node) -> Program:
    return program({"x": [3]}, {"w": [3]}, [*nodes, SUM])


GOOD = simple(node("y", "mul.Tensor", "@x", "@w"))


def test_a_program_survives_the_wire() -> None:
    """JSON and back is the same program with the same digest."""
    again = msgspec.json.decode(msgspec.json.encode(GOOD), type=Program)
    assert again == GOOD
    assert digest(again) == digest(GOOD)
    lift(again)


def test_lines_do_not_change_what_is_computed() -> None:
    """Programs that differ in lines alone share their structure, and not their digest."""
    moved = msgspec.structs.replace(GOOD, nodes=[msgspec.structs.replace(n, line=9) for n in GOOD.nodes])
    assert structure(moved) == structure(GOOD)
    assert digest(moved) != digest(GOOD)


HOSTILE: dict[str, Program] = {
    "an operation that is not in the table": simple(node("y", "empty.memory_format", [3])),
    "a name that resolves to code": simple(Node("y", "os.system", [Ref("x")], line=7)),
    "memory by stride": simple(node("y", "as_strided.default", "@x", [3], [1])),
    "a value as a shape": simple(node("y", "item.default", "@x")),
    "a forward reference": simple(node("y", "mul.Tensor", "@x", "@loss")),
    "a name used twice": simple(node("x", "abs.default", "@w"), node("y", "mul.Tensor", "@x", "@w")),
    "an argument too many": simple(node("y", "abs.default", "@x", 1)),
    "an argument missing": simple(node("y", "mul.Tensor", "@x")),
    "an unknown keyword": simple(node("y", "abs.default", "@x", out=Ref("w"))),
    "an argument given twice": simple(node("y", "add.Tensor", "@x", "@w", other=Ref("w"))),
    "a string for a number": simple(node("y", "mul.Scalar", "@x", "three")),
    "a number for a list": simple(node("y", "permute.default", "@x", [1.5])),
    "a dtype that is none": simple(node("y", "_to_copy.default", "@x", dtype="complex64")),
    "a dimension out of range": simple(node("y", "select.int", "@x", 5, 0)),
    "the patients' dimension": simple(node("y", "sum.dim_IntList", "@x", [-3])),
    "another shape": simple(node("y", "view.default", "@x", [2])),
    "an item of a tensor": simple(Node("y", "getitem", [Ref("x"), 0], line=7)),
    "shapes that do not fit": simple(node("y", "mm.default", "@x", "@x")),
    "a huge value": simple(node("y", "expand.default", "@x", [1 << 50, 3])),
    "a huge value out of nothing": simple(node("y", "zeros.default", [1 << 50])),
    "many huge values": simple(
        node("a0", "repeat.default", "@x", [1 << 20, 1]), *(node(f"a{k}", "exp.default", f"@a{k - 1}") for k in range(1, 40)),
        node("y", "exp.default", "@a39"),
    ),
    "integers divided": simple(
        node("i", "_to_copy.default", "@x", dtype="int64"), node("y", "remainder.Tensor", "@i", "@i")
    ),
    "a power by a patient's whole number": simple(
        node("i", "_to_copy.default", "@x", dtype="int64"), node("p", "pow.Scalar", 2, "@i"), node("y", "mul.Tensor", "@p", "@w")
    ),
    "a mask as an index": simple(
        node("m", "gt.Scalar", "@x", 0.0), node("y", "index.Tensor", "@x", ["@m"])
    ),
    "a loss without parameters": simple(node("y", "abs.default", "@x")),
    "a loss of several numbers": program({"x": [3]}, {"w": [3]}, [node("y", "mul.Tensor", "@x", "@w")]),
    "integers as parameters": program({"x": [3]}, {"w": [3]}, [node("y", "mul.Tensor", "@x", "@w"), SUM], "int64"),
    "an equation of products that is none": simple(node("y", "einsum.default", "a->b->c", ["@x"])),
    "statistics over patients": simple(
        node("y", "batch_norm.default", "@x", None, None, None, None, True, 0.1, 1e-5, False)
    ),
    "an output that is no node": msgspec.structs.replace(GOOD, output="x"),
    "a parameter too large": program({"x": [3]}, {"w": [1 << 40]}, [node("y", "mul.Tensor", "@x", "@w"), SUM]),
    "a convolution of nothing": simple(node("y", "conv1d.default", "@x", "@w", None, [0], [0], [1], 1)),
    "recurrence without end": program(
        {"x": [100_000, 1]}, {"w": [3, 1], "v": [3, 1]},
        [node("h", "zeros.default", [1, 1, 1], dtype="float64"),
         node("g", "gru.input", "@x", "@h", ["@w", "@v"], False, 1, 0.0, True, False, True),
         Node("y", "getitem", [Ref("g"), 0]), SUM],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_refused(name: str) -> None:
    """With a ProgramError that names the field, and the line where a node made it."""
    with pytest.raises(ProgramError) as caught:
        lift(HOSTILE[name])
    assert caught.value.field
    assert caught.value.what


@pytest.mark.parametrize(("base", "dtype"), [(2.0, "int64"), (2, "float64"), (0.5, "bool")])
def test_a_power_that_is_a_float_is_computed(base: float, dtype: str) -> None:
    exponent = node("i", "_to_copy.default", "@x", dtype=dtype)
    lift(simple(exponent, node("p", "pow.Scalar", base, "@i"), node("y", "mul.Tensor", "@p", "@w")))


ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**62), 2**62), st.floats(), st.sampled_from(["inf", "nan", "float32", "sum"]),
    st.sampled_from([Ref("x"), Ref("w"), Ref("n0"), Ref("n1")]),
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_no_arguments_whatever_raise_anything_else(data: st.DataObject) -> None:
    """Random operations of the table with random arguments lift or are refused, never crash."""
    from rapha_lab.curator.lift import TABLE

    nodes = []
    for k in range(data.draw(st.integers(1, 3))):
        args = data.draw(st.lists(st.one_of(ATOMS, st.lists(ATOMS, max_size=3)), max_size=6))
        nodes.append(Node(f"n{k}", data.draw(st.sampled_from(sorted(TABLE))), args))
    made = program({"x": [2, 3]}, {"w": [3]}, nodes)
    try:
        lift(made, loss=False)
    except ProgramError:
        return


@pytest.mark.parametrize(
    "change",
    [
        b'"unknown":1,', b'"inputs":3,', b'"version":"other",',
    ],
)  # fmt: skip
def test_unknown_or_malformed_fields_do_not_decode(change: bytes) -> None:
    """Decoding knows nothing but the stated fields and types."""
    text = msgspec.json.encode(GOOD)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b"{" + change + text[1:], type=Program, strict=True)


def test_deep_nesting_does_not_decode() -> None:
    """Arguments are atoms or lists of atoms."""
    deep = {"id": "y", "op": "aten.abs.default", "args": [[[{"ref": "x"}]]]}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(deep, Node)


def test_too_many_nodes_do_not_decode() -> None:
    """A program's length is bounded before it is looked at."""
    text = msgspec.json.encode({**msgspec.to_builtins(GOOD), "nodes": [msgspec.to_builtins(SUM)] * 20_001})
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=Program)


@pytest.mark.parametrize(("shape", "dtype"), [([4, 3], "float64"), ([0, 3], "float32")])
def test_what_shapes_do_not_tell_is_found_on_made_up_patients(shape: list[int], dtype: str) -> None:
    """A product of two dtypes, or with a dimension of nothing, was the site's own failure."""
    made = program({"x": [5, 3]}, {"w": shape}, [node("y", "linear.default", "@x", "@w"), SUM], "float32")
    (weight,) = made.parameters
    it = lift(msgspec.structs.replace(made, parameters=[msgspec.structs.replace(weight, dtype=dtype)]))
    with pytest.raises(ProgramError, match="cannot be computed") as caught:
        it.selftest({"w": torch.ones(shape, dtype=getattr(torch, dtype))}, {})
    assert caught.value.field == "program"


def test_gradients_that_cannot_be_written_out_are_refused() -> None:
    """A linear layer whose bias is of another dtype was the site's own failure."""
    nodes = [node("y", "linear.default", "@x", "@w", "@b"), SUM]
    made = program({"x": [5, 3]}, {"w": [4, 3], "b": [4]}, nodes, "float32")
    lift(made)
    weight, bias = made.parameters
    mixed = [weight, msgspec.structs.replace(bias, dtype="float64")]
    with pytest.raises(ProgramError, match="cannot be differentiated"):
        lift(msgspec.structs.replace(made, parameters=mixed))


def test_a_model_beyond_the_limits_is_refused_by_field() -> None:
    """Parameters, memory and work are bounded, and the error says by how much."""
    traced = loss_program(nn.Linear(8, 1), nn.MSELoss(), {"x": torch.zeros(8)}, torch.tensor(0.0))
    for limits in (Limits(parameters=8), Limits(memory=100), Limits(work=10)):
        with pytest.raises(ProgramError) as caught:
            lift(traced.program, limits=limits)
        assert caught.value.field in ("parameters", "program")


@pytest.mark.parametrize("spoil", ["missing", "extra", "shape", "nan", "bytes"])
def test_tensors_must_be_those_stated(spoil: str) -> None:
    """A blob with a tensor missing, extra, of another shape, not finite, or no safetensors is refused by name."""
    from safetensors.torch import save

    tensors = {"w": torch.ones(3, dtype=torch.float64)}
    if spoil == "missing":
        tensors = {}
    elif spoil == "extra":
        tensors["v"] = torch.ones(1)
    elif spoil == "shape":
        tensors["w"] = torch.ones(4, dtype=torch.float64)
    elif spoil == "nan":
        tensors["w"][1] = float("nan")
    blob = b"\x08\x00\x00" if spoil == "bytes" else save(tensors)
    with pytest.raises(ProgramError):
        lift(GOOD).tensors(blob)


# What a researcher writes


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        return self.layer(x)


class Centred(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


class Item(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * x[:, 0].abs().max().item()


MISTAKES: dict[str, tuple[Any, str]] = {
    "batch norm": (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), "GroupNorm"),
    "a branch on values": (Branch(), "torch.where"),
    "statistics over the batch": (Centred(), "alone"),
    "a value taken out": (Item(), ""),
    "a layer of another size": (nn.Linear(5, 1), "shapes"),
    "several outputs": (nn.LSTM(4, 2), "forward"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_model_that_cannot_be_lifted_says_what_to_change(name: str) -> None:
    """The error names the module or the line, and the way out."""
    model, hint = MISTAKES[name]
    with pytest.raises(ProgramError) as caught:
        loss_program(model, nn.BCEWithLogitsLoss(), {"x": torch.rand(4)}, torch.tensor(1.0))
    assert hint in caught.value.instead
    assert caught.value.field or caught.value.line


def test_a_contrastive_loss_is_refused() -> None:
    """It compares patients, so no patient has a loss of their own."""

    def contrast(z: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z @ z.T, torch.arange(len(z)))

    with pytest.raises(ProgramError, match="mixes patients"):
        loss_program(nn.Linear(4, 3), contrast, {"x": torch.rand(4)}, torch.tensor(1.0))


def test_several_inputs_go_by_name() -> None:
    """A model of two arguments gets both, each with its own shape and dtype."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer = nn.Embedding(5, 3), nn.Linear(6, 1)

        def forward(self, code: Tensor, values: Tensor) -> Tensor:
            return self.layer(torch.cat([self.words(code), values], 1))

    inputs = {"code": torch.tensor(2), "values": torch.rand(3)}
    traced = loss_program(Two(), nn.BCEWithLogitsLoss(), inputs, torch.tensor(1.0))
    assert [(s.name, s.dtype, s.shape) for s in traced.program.inputs] == [
        ("code", "int64", []), ("values", "float32", [3]), ("target", "float32", []),
    ]  # fmt: skip
    lift(traced.program)
    lift(score_program(Two(), inputs).program, loss=False)


def test_tracing_leaves_the_model_as_it_was() -> None:
    """Modes, weights and gradients are untouched, and nothing is printed or warned."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1)).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    loss_program(model, nn.BCEWithLogitsLoss(), {"x": torch.rand(4)}, torch.tensor(1.0))
    assert model.training
    assert model[1].training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(type(p) is nn.Parameter and p.grad is None for p in model.parameters())


def test_check_finds_what_decoding_cannot() -> None:
    """Sizes multiply: no dimension is too large alone."""
    spec = TensorSpec("x", "float32", [1 << 20, 1 << 20])
    with pytest.raises(ProgramError, match="too large"):
        check(msgspec.structs.replace(GOOD, inputs=[spec]))


def test_tensors_of_any_layout_are_packed_as_they_read() -> None:
    """Views, transposed, expanded and empty ones, each by its own numbers and nothing of its neighbours."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"whole": base, "turned": base.t(), "part": base[:, 1:3], "many": torch.ones(1).expand(4)}
    tensors |= {"none": torch.zeros(0), "rows": torch.zeros(3, 0), "one": torch.tensor(3.0)}
    tensors |= {"flags": torch.tensor([True, False]), "codes": torch.arange(5)}
    tensors["trained"] = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    read = load(pack(tensors))
    assert {*read} == {*tensors}
    for name, t in tensors.items():
        assert (read[name].shape, read[name].dtype) == (t.shape, t.dtype)
        assert torch.equal(read[name], t)
    assert load(pack({})) == {}


def test_tensors_that_are_not_what_lies_in_memory_are_packed_as_they_read() -> None:
    """A negated view by its values; one that says falsely that it is contiguous; one without values is refused."""

    class Lies(Tensor):
        def contiguous(self, *_: object, **__: object) -> Tensor:
            return self

    negated = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    turned = torch.arange(6.0).reshape(2, 3).t()
    read = load(pack({"negated": negated, "turned": turned.as_subclass(Lies)}))
    assert read["negated"].tolist() == [-2.0, 4.0]
    assert torch.equal(read["turned"], turned)
    for nothing in (torch.zeros(3, device="meta"), torch.ones(3).to_sparse()):
        with pytest.raises((TypeError, NotImplementedError)):
            pack({"nothing": nothing})
