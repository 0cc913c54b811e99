"""Tensors laid out once: the same bytes as safetensors makes, and nothing but those is taken for them."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load

from rapha_lab.curator.lift import lift
from rapha_lab.protocol.errors import ProgramError
from rapha_lab.protocol.tensors import Layout, header, pack
from rapha_lab.session.tracing import loss_program

SHAPES = st.dictionaries(
    st.text("abp0123.", min_size=1, max_size=4),
    st.lists(st.integers(0, 3), max_size=3),
    min_size=1,
    max_size=14,
)


@given(SHAPES, st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_other_numbers_give_the_bytes_that_safetensors_gives(shapes: dict[str, list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, two = ({n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(2))
    layout = Layout(pack(one))
    strided = {n: t.mT.contiguous().mT if t.dim() > 1 else t for n, t in two.items()}
    data = layout.pack(strided)
    assert data == pack(two)
    if not layout.uniform:
        assert not any(t.numel() for t in one.values())
        return
    numbers = layout.unpack(data)
    assert numbers is not None
    found = layout.parts(np.frombuffer(numbers, np.float32))
    assert {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for n, t in load(data).items()}


@given(st.integers(0, 400), st.integers(0, 255))
@settings(max_examples=80, deadline=None)
def test_bytes_that_are_described_otherwise_are_not_taken(place: int, byte: int) -> None:
    data = bytearray(pack({"a": torch.ones(3), "b": torch.zeros(2, 2)}))
    layout, start = Layout(bytes(data)), len(data) - 28
    data[place % start] ^= byte or 1
    assert layout.unpack(bytes(data)) is None
    assert layout.unpack(bytes(data[:-1])) is None


def test_what_is_not_float32_alone_is_not_uniform() -> None:
    assert not Layout(pack({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.float64)})).uniform


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_parameter_that_is_no_number_is_refused_at_every_step(bad: float) -> None:
    """Although the tensors before it had passed with the same description."""
    model = torch.nn.Linear(3, 1)
    traced = loss_program(model, torch.nn.MSELoss(), {"x": torch.zeros(3)}, torch.zeros(()))
    lifted = lift(traced.program)
    first = lifted.tensors(traced.blob)
    again = lifted.tensors(traced.blob)
    assert [*first[0]] == [*again[0]]
    assert all(torch.equal(first[0][name], t) for name, t in again[0].items())
    with torch.no_grad():
        model.weight[0, 1] = bad
    with pytest.raises(ProgramError, match="not finite"):
        lifted.tensors(traced.blob)
    with torch.no_grad():
        model.weight[0, :2] = 3e38  # finite, though their sum is not
    parameters, _ = lifted.tensors(traced.blob)
    assert any(bool((t == 3e38).any()) for t in parameters.values())


@given(SHAPES, st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_a_header_before_numbers_makes_them_tensors(shapes: dict[str, list[int]], seed: int) -> None:
    """In the order given, which is not that of names: p10 comes before p2 there."""
    generator = torch.Generator().manual_seed(seed)
    told = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    data = header(shapes) + b"".join(t.numpy().tobytes() for t in told.values())
    found = load(data)
    assert {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for n, t in told.items()}
    assert all(found[n].shape == t.shape for n, t in told.items())
    if (layout := Layout(data)).uniform:
        assert layout.pack(told) == data
