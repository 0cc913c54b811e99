"""No special number of a patient reaches a kernel that takes longer for it, and what is computed instead is the same."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import node, program
from hypothesis import given, settings
from hypothesis import strategies as st
from test_table import CASES, Given, bits, spoiled, tensors
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from rapha_lab.curator.lift import TABLE, Lifted, compiling, fused, lift
from rapha_lab.curator.lift.even import EVEN, FEW, Evenly
from rapha_lab.protocol.errors import ProgramError

pytestmark = pytest.mark.filterwarnings("ignore:Using padding")
aten = torch.ops.aten
SPECIAL = [0.0, -0.0, 1.0, -1.0, 3.0, math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38, 1e-30, 1e6, -1e6]

UNEVEN = {
    f"aten.{name}"
    for name in (
        "where.self masked_fill.Scalar heaviside.default max.dim min.dim argmax.default argmin.default "
        "any.dim all.dim exp.default log.default log2.default log10.default logit.default logsumexp.default sqrt.default "
        "softplus.default log_sigmoid_forward.default binary_cross_entropy_with_logits.default logaddexp.default "
        "logaddexp2.default xlogy.Tensor xlogy.Scalar_Other xlogy.Scalar_Self elu.default celu.default erfc.default "
        "sin.default cos.default tan.default sinc.default asin.default acos.default atan.default asinh.default "
        "acosh.default tanh.default trunc.default fmod.Tensor fmod.Scalar remainder.Tensor remainder.Scalar "
        "floor_divide.default lgamma.default digamma.default polygamma.default special_log_ndtr.default "
        "max_pool2d_with_indices.default "
        "max_pool3d_with_indices.default adaptive_max_pool2d.default"
    ).split()
}
"""Measured by benchmarks/evenness.py: longer by more than 1.15 times for some numbers."""

MEASURED = {
    f"aten.{name}"
    for name in (
        "abs.default add.Scalar add.Tensor addcdiv.default addcmul.default addmm.default amax.default "
        "amin.default atan2.default atanh.default avg_pool2d.default avg_pool3d.default bmm.default ceil.default "
        "clamp.Tensor clamp.default clamp_max.Tensor clamp_max.default clamp_min.Tensor clamp_min.default "
        "convolution.default convolution_backward.default copysign.Tensor cosh.default "
        "cumsum.default deg2rad.default div.Scalar div.Tensor elu_backward.default eq.Scalar eq.Tensor "
        "erf.default exp2.default expm1.default floor.default frac.default ge.Scalar ge.Tensor gelu.default "
        "gelu_backward.default glu.default glu_backward.default gt.Scalar gt.Tensor hardshrink.default "
        "hardshrink_backward.default hardsigmoid.default hardsigmoid_backward.default hardswish.default "
        "hardswish_backward.default hardtanh.default hardtanh_backward.default huber_loss.default "
        "huber_loss_backward.default hypot.default isinf.default isnan.default le.Scalar le.Tensor "
        "leaky_relu.default leaky_relu_backward.default lerp.Scalar lerp.Tensor log_sigmoid_backward.default "
        "logical_and.default logical_not.default logical_or.default logical_xor.default "
        "logit_backward.default lt.Scalar lt.Tensor max_pool2d_with_indices_backward.default "
        "max_pool3d_with_indices_backward.default maximum.default mean.dim minimum.default mish.default "
        "mish_backward.default mm.default mul.Scalar mul.Tensor nan_to_num.default native_batch_norm.default "
        "native_batch_norm_backward.default native_group_norm.default native_group_norm_backward.default "
        "native_layer_norm.default native_layer_norm_backward.default ne.Scalar ne.Tensor neg.default pow.Scalar "
        "pow.Tensor_Tensor prod.dim_int rad2deg.default reciprocal.default relu.default round.default rsqrt.default "
        "rsub.Scalar rsub.Tensor sgn.default sigmoid.default sigmoid_backward.default sign.default silu.default "
        "silu_backward.default sinh.default smooth_l1_loss.default smooth_l1_loss_backward.default "
        "softplus_backward.default softshrink.default softshrink_backward.default square.default std.correction "
        "sub.Scalar sub.Tensor sum.default sum.dim_IntList tanh_backward.default threshold.default "
        "threshold_backward.default var.correction __and__.Tensor __lshift__.Scalar __or__.Tensor "
        "__rshift__.Scalar __xor__.Tensor _softmax.default _softmax_backward_data.default _log_softmax.default "
        "_log_softmax_backward_data.default _to_copy.default bitwise_and.Scalar bitwise_and.Tensor "
        "bitwise_not.default bitwise_or.Scalar bitwise_or.Tensor bitwise_xor.Scalar bitwise_xor.Tensor "
        # with arguments for which they are even
        "log1p.default pow.Tensor_Scalar linalg_vector_norm.default div.Scalar_mode div.Tensor_mode"
    ).split()
}
"""Even, or nothing but sums, products and comparisons."""

MOVING = {
    f"aten.{name}"
    for name in (
        "_efficientzerotensor.default _unsafe_view.default alias.default arange.default arange.start "
        "arange.start_step as_strided.default cat.default clone.default constant_pad_nd.default copy.default "
        "detach.default diagonal.default diagonal_backward.default embedding.default "
        "embedding_dense_backward.default empty.memory_format empty_like.default expand.default eye.default eye.m "
        "fill.Scalar flip.default full.default full_like.default gather.default index.Tensor index_put.default "
        "lift_fresh.default lift_fresh_copy.default linspace.default new_empty.default new_empty_strided.default "
        "new_full.default new_ones.default new_zeros.default ones.default ones_like.default permute.default "
        "pixel_shuffle.default pixel_unshuffle.default reflection_pad2d.default reflection_pad2d_backward.default "
        "repeat.default replication_pad2d.default replication_pad2d_backward.default result_type.Scalar "
        "result_type.Tensor roll.default scalar_tensor.default scatter.src scatter.value scatter_add.default "
        "select.int select_backward.default select_scatter.default slice.Tensor slice_backward.default "
        "slice_scatter.default split.Tensor split_with_sizes.default squeeze.dim squeeze.dims stack.default "
        "t.default to.device to.dtype transpose.int tril.default triu.default unbind.int unfold.default "
        "unfold_backward.default unsqueeze.default view.default view.dtype zeros.default zeros_like.default "
        "adaptive_max_pool2d_backward.default"
    ).split()
}
"""Of the numbers they move none decides anything; which ones an index moves, the caches know."""

FIXED = ("_adaptive_avg_pool", "avg_pool", "upsample_", "_upsample_")
"""Weighted sums, whose weights follow from shapes."""


class Watch(TorchDispatchMode):
    """Notes the operations that kernels compute, and those of them with arguments that they are not even for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.bad: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = re.sub(r"(?<!_)_\.", ".", str(func))  # in place it is the same kernel
        self.seen.add(name)
        if name in UNEVEN or not fits(name, args, kwargs or {}):
            self.bad.add(str(func))
        return func(*args, **(kwargs or {}))


def fits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether the operation is even for these arguments."""
    if name == "aten.log1p.default":
        return bool(((args[0] >= -2) & (args[0] <= 1e38)).all())
    if name in ("aten.pow.Tensor_Scalar", "aten.pow.Scalar") and isinstance(args[0], Tensor):
        return args[1] != 0.5
    if name == "aten.linalg_vector_norm.default":
        return len(args) == 1 or args[1] in (1, 2, math.inf, -math.inf)
    if name in ("aten.div.Tensor_mode", "aten.div.Scalar_mode"):
        return kwargs["rounding_mode"] is None or (
            kwargs["rounding_mode"] == "trunc" and args[0].is_floating_point()
        )
    if name == "aten.scatter_add.default":  # along the last dimension sums to one place wait for each other
        return args[1] % args[0].dim() < args[0].dim() - 1
    if name == "aten.amin.default":
        return args[0].dtype != torch.int64
    if name in ("aten.gelu.default", "aten.gelu_backward.default"):
        return args[-1].dtype == torch.float32 or kwargs.get("approximate") == "tanh"
    return True


def flat(args: Any) -> list[Any]:
    return [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]


def special(arg: Any, generator: torch.Generator, dtype: torch.dtype) -> Any:
    """The argument with half of its numbers special ones."""
    if isinstance(arg, list):
        return [special(a, generator, dtype) for a in arg]
    if not isinstance(arg, Tensor) or not arg.is_floating_point():
        return arg
    picks = torch.randint(2 * len(SPECIAL), arg.shape, generator=generator)
    values = torch.tensor([*SPECIAL, *[0.0] * len(SPECIAL)], dtype=dtype)[picks]
    return torch.where(picks < len(SPECIAL), values, arg.to(dtype))


WITHOUT_GRADIENT = {"aten.heaviside.default", "aten.floor_divide.default", "aten.div.Tensor_mode"}


def computed(name: str, dtype: torch.dtype, *modes: TorchDispatchMode) -> None:
    """The operation's rule and its backward pass on special numbers."""
    generator = torch.Generator().manual_seed(0)
    for build in CASES[name]:
        args = [special(a, generator, dtype) for a in build(Given(3, 3, 4, 2, 8))]
        # torch differentiates by neither weights of classes nor their targets
        wanted = [t for t in flat(args) if isinstance(t, Tensor) and t.is_floating_point()]
        wanted = wanted[:1] if "loss" in name or "cross_entropy" in name else wanted
        with ExitStack() as entered:
            for mode in modes:
                entered.enter_context(mode)
            if name not in WITHOUT_GRADIENT:
                for t in wanted:
                    t.requires_grad_()
            made = [
                t for t in flat([TABLE[name][1](*args)]) if isinstance(t, Tensor) and t.grad_fn is not None
            ]
            if made:
                torch.autograd.grad([t.sum() for t in made], wanted, allow_unused=True)


def watched(name: str, dtype: torch.dtype = torch.float32) -> Watch:
    """What kernels see of an operation that is computed evenly."""
    watch = Watch()
    computed(name, dtype, watch, Evenly())
    return watch


@pytest.mark.parametrize("name", sorted(CASES))
def test_no_special_number_reaches_an_uneven_kernel(name: str) -> None:
    """Forward and backward, on float32 and float64; and each kernel that is reached has been measured."""
    for dtype in (torch.float32, torch.float64):
        watch = watched(name, dtype)
        assert not watch.bad
        unknown = {
            op
            for op in watch.seen - MEASURED - MOVING
            if not op.startswith(tuple(f"aten.{f}" for f in FIXED))
        }
        assert not unknown, "measure it with benchmarks/evenness.py, then enter it"


def brought() -> Iterator[tuple[str, str]]:
    """Each operation that is computed evenly, with an entry of the table that brings it."""
    left = {str(op) for op in EVEN}
    for name in sorted(CASES):
        plain = Watch()
        computed(name, torch.float64, plain)
        for op in sorted(plain.bad & left):
            left.remove(op)
            yield op, name
    assert left <= {"aten.log1p.default", "aten.gelu.default", "aten.amin.default"}, left


def test_each_entry_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of the even operations the test above would fail."""
    operations = {str(op): op for op in EVEN}
    for op, name in brought():
        with monkeypatch.context() as without:
            without.delitem(EVEN, operations[op])
            assert op in watched(name, torch.float64).bad


LEAST = {
    "amin": lambda x: x.amin(-1), "min": lambda x: x.min(-1).values, "argmin": lambda x: x.argmin(-1),
    "all": lambda x: x.amin((0, 1), True),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAST)
def test_the_least_of_long_integers_is_found_evenly(name: str) -> None:
    """Among random ones torch's own kernel takes half as long again."""
    x = torch.tensor([[3, -(2**63), 2**63 - 1, 0], [2**63 - 1] * 4, [-1, 1, -1, 1]])
    with (watch := Watch()), Evenly():
        found = LEAST[name](x)
    assert not watch.bad
    assert torch.equal(found, LEAST[name](x))


UNARY = [op for op in EVEN if len(op._schema.arguments) == 1 and op is not aten.log_sigmoid_forward.default]
numbers = st.floats(-50, 50, width=32, allow_subnormal=False) | st.sampled_from(SPECIAL)
LOOSE = {
    aten.lgamma.default: (-8.0, 1e30), aten.digamma.default: (1e-3, 1e30), aten.sin.default: (-1e9, 1e9),
    aten.cos.default: (-1e9, 1e9), aten.tan.default: (-1e9, 1e9), aten.sinc.default: (-1e5, 1e5),
    aten.exp.default: (-87.0, 87.0), aten.logit.default: (-1e30, 1e30), aten.log1p.default: (-2.0, 1e37),
}  # fmt: skip
"""Between which numbers the results are torch's, beside NaN and infinities."""


@pytest.mark.parametrize("op", UNARY, ids=str)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=st.lists(numbers, min_size=1, max_size=24))
def test_the_results_are_those_of_torch(op: Any, values: list[float]) -> None:
    """On ordinary and special numbers, to the last digits of float32."""
    low, high = LOOSE.get(op, (-math.inf, math.inf))
    x = torch.tensor([v for v in values if math.isnan(v) or math.isinf(v) or low <= v <= high])
    if op is aten.lgamma.default or op is aten.digamma.default:
        x = x[~torch.isneginf(x) & ((x > 0) | (x != x.floor()))]
    torch.testing.assert_close(EVEN[op](x), op(x.double()).float(), rtol=2e-6, atol=2e-6, equal_nan=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(2**-10, 2.0**100, width=32), min_size=1, max_size=24))
def test_a_digamma_functions_derivative_is_that_of_torch(values: list[float]) -> None:
    """To the last digits of float32."""
    x = torch.tensor(values)
    torch.testing.assert_close(
        EVEN[aten.polygamma.default](1, x), torch.polygamma(1, x.double()).float(), rtol=2e-6, atol=0
    )


pairs = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=24)


@pytest.mark.parametrize(
    "op",
    [aten.xlogy.Tensor, aten.logaddexp.default, aten.logaddexp2.default, aten.heaviside.default],
    ids=str,
)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=pairs)
def test_so_are_those_of_two_numbers(op: Any, values: list[tuple[float, float]]) -> None:
    """To the last digits, and the same infinities."""
    a, b = torch.tensor(values).unbind(1)
    torch.testing.assert_close(EVEN[op](a, b), op(a, b), rtol=2e-6, atol=2e-6, equal_nan=True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(a=st.floats(-1e6, 1e6, width=32), b=st.floats(0.015625, 1e4, width=32), sign=st.sampled_from((1, -1)))
def test_remainders_are_those_of_torch(a: float, b: float, sign: int) -> None:
    """Bit by bit for float32; whole quotients too."""
    x, y = torch.tensor([a]), torch.tensor([sign * b])
    for op in (aten.fmod.Tensor, aten.remainder.Tensor, aten.floor_divide.default):
        assert torch.equal(EVEN[op](x, y), op(x, y)), op


@settings(max_examples=200, deadline=None, derandomize=True)
@given(a=st.integers(-(2**63), 2**63 - 1), b=st.integers(1, 2**31 - 1), small=st.booleans())
def test_integers_are_divided_exactly(a: int, b: int, small: bool) -> None:
    """All of int64, and int32."""
    x = torch.tensor([a >> 32 if small else a], dtype=torch.int32 if small else torch.int64)
    assert torch.equal(EVEN[aten.remainder.Scalar](x, b), torch.remainder(x, b))
    assert torch.equal(EVEN[aten.fmod.Scalar](x, b), torch.fmod(x, b))
    for mode in ("floor", "trunc"):
        out = EVEN[aten.div.Scalar_mode](x, b, rounding_mode=mode)
        assert torch.equal(out, torch.div(x, b, rounding_mode=mode))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32, torch.bool])
def test_choices_keep_every_bit(dtype: torch.dtype) -> None:
    """Of NaN's sign and payload too."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (2, 4096), generator=generator)
    a, b = ((words & 1).bool() if dtype == torch.bool else words.to(torch.int32)).unbind(0)
    if dtype.is_floating_point:
        a, b = a.view(torch.float32), b.view(torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    condition = torch.rand(4096, generator=generator) < 0.5
    mine, theirs = EVEN[aten.where.self](condition, a, b), torch.where(condition, a, b)
    assert mine.dtype == theirs.dtype
    assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("best", [aten.max.dim, aten.min.dim])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=st.lists(st.sampled_from([*SPECIAL, 0.5, 0.25]), min_size=12, max_size=12))
def test_the_first_of_the_best_is_found(best: Any, values: list[float]) -> None:
    """Among equal ones, infinities and NaN, along either dimension."""
    x = torch.tensor(values).view(3, 4)
    for d in (0, 1, -1):
        for mine, theirs in zip(EVEN[best](x, d), best(x, d), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32), size=st.tuples(st.integers(5, 9), st.integers(5, 9)), kernel=st.integers(1, 4),
    stride=st.integers(1, 3), more=st.integers(0, 2), dilation=st.integers(1, 2), ceil=st.booleans(),
    bad=st.booleans(),
)  # fmt: skip
def test_pools_are_those_of_torch(
    seed: int,
    size: tuple[int, int],
    kernel: int,
    stride: int,
    more: int,
    dilation: int,
    ceil: bool,
    bad: bool,
) -> None:
    """Values and places, ties, infinities and NaN included; a place is always inside."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(4, (2, 3, *size), generator=generator).float()
    x = torch.where(x == 3, -math.inf, x)
    setting = [kernel, kernel], [stride, stride], [min(more, kernel // 2)] * 2, [dilation, dilation], ceil
    if dilation * (kernel - 1) >= min(size):
        return
    for mine, theirs in zip(
        EVEN[aten.max_pool2d_with_indices.default](x, *setting),
        aten.max_pool2d_with_indices(x, *setting),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    x = torch.where(x == 2, math.nan, x) if bad else x
    for op, more_args in (
        (aten.max_pool2d_with_indices.default, setting),
        (aten.adaptive_max_pool2d.default, ([3, 2],)),
    ):
        value, place = EVEN[op](x, *more_args)
        torch.testing.assert_close(value, op(x, *more_args)[0], equal_nan=True)
        picked = x.flatten(2).gather(2, place.flatten(2)).view_as(value)
        torch.testing.assert_close(picked, value, equal_nan=True)


def test_long_windows_are_searched_at_once() -> None:
    """A maximum over a whole series is a few operations, with places of the first of equal ones and none of padding."""
    x = torch.randint(5, (3, 2, 1, 700), generator=torch.Generator().manual_seed(0)).float()
    x[0] = -math.inf
    pools = (
        (aten.max_pool2d_with_indices.default, [[1, 700]]), (aten.adaptive_max_pool2d.default, [[1, 1]]),
        (aten.adaptive_max_pool2d.default, [[1, 9]]),
        (aten.max_pool2d_with_indices.default, [[1, 40], [1, 7], [0, 20], [1, 2], True]),
    )  # fmt: skip
    for op, setting in pools:
        watch = Watch()
        with watch:
            mine = EVEN[op](x, *setting)
        for found, theirs in zip(mine, op(x, *setting), strict=True):
            assert torch.equal(found, theirs)
        assert len(watch.seen) < 40
    with pytest.raises(ValueError, match="windows"):
        EVEN[aten.adaptive_max_pool2d.default](x, [1, 65])


@pytest.mark.parametrize("name", sorted(CASES))
def test_no_patient_moves_another_in_even_operations(name: str) -> None:
    """Whatever one patient's values become, every other's result keeps its bits; and its dtype and shape are as ever."""
    for build in CASES[name]:
        args = build(Given(1, 3, 2, 2))
        plain = tensors(TABLE[name][1](*args))
        with Evenly():
            before = tensors(TABLE[name][1](*args))
            after = [tensors(TABLE[name][1](*[spoiled(a, bad) for a in args])) for bad in (math.nan, 1e300)]
        for usual, mine, *others in zip(plain, before, *after, strict=True):
            torch.testing.assert_close(mine, usual, rtol=1e-9, atol=1e-9, equal_nan=True)
            for other in others:
                assert torch.equal(bits(mine[1:]), bits(other[1:]))


def hostile(op: str, size: int) -> Lifted:
    """A loss that is one operation of many numbers of a patient."""
    return lift(
        program(
            {"x": [size]}, {"w": [size]},
            [
                node("row", "view.default", "@x", [size]), node("a", "mul.Tensor", "@row", "@w"), node("b", op, "@a"),
                node("out", "sum.default", "@b"),
            ],
            "float32",
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "op", ["log.default", "sin.default", "exp.default", "tanh.default", "lgamma.default"]
)
def test_steps_and_scores_are_computed_evenly(op: str) -> None:
    """The engine's own step, of a program with more such numbers than a few; and its trace for a compiler."""
    it, parameters = hostile(op, 2 * FEW), {"w": torch.ones(2 * FEW)}
    rows = {"x": torch.tensor(SPECIAL).repeat(16)[: 8 * 2 * FEW].reshape(-1, 2 * FEW)[:7]}
    assert it.graph.uneven > FEW
    watch = Watch()
    with watch:
        it.gradients(parameters, {}, rows)
        it.scores(parameters, {}, rows)
    assert f"aten.{op}" not in watch.seen
    assert it.graph.uneven > FEW >= hostile(op, FEW // 4).graph.uneven


@pytest.mark.parametrize("op", ["sin.default", "lgamma.default", "acos.default"])
def test_a_compiler_sees_the_even_operations(op: str) -> None:
    """Where its own code would be uneven, however few the numbers; the others it can join into one loop."""
    it = hostile(op, 2)
    traced = make_fx(lambda w, x: it.gradients({"w": w}, {}, {"x": x})["w"])(torch.ones(2), torch.ones(8, 2))
    seen = {str(n.target) for n in traced.graph.nodes}
    assert not seen & {"aten.sin.default", "aten.cos.default", "aten.lgamma.default", "aten.digamma.default"}
    assert (f"aten.{op}" in seen) == (op == "acos.default")


@pytest.mark.parametrize("name", fused.CELLS)
def test_fused_recurrent_layers_are_even_inside(name: str) -> None:
    """No special number reaches an uneven kernel in a layer that is one operation, forward or backward."""
    cell, layer = fused.CELLS[name], fused.Layer(fused.CELLS[name])
    given = torch.tensor(SPECIAL * 6 * cell.gates).view(2, 7, cell.gates * 6)
    first, weight = torch.zeros(cell.states, 7, 6), torch.rand(cell.gates * 6, 6)
    with Watch() as watch:
        out, kept = layer.forward(given, None, first, weight, None, False)
        layer.backward(torch.ones_like(out), first, weight, out, kept, False)
    assert watch.seen & {"aten.sigmoid.default", "aten.copysign.Tensor", "aten.relu.default"}
    assert not watch.bad


def test_an_operation_without_an_even_way_is_refused_in_words() -> None:
    """And it is said what to write."""
    with pytest.raises(ProgramError, match="ndtr") as caught:
        hostile("special_log_ndtr.default", 4)
    assert caught.value.instead.startswith("Write torch.special.ndtr")


def test_patients_without_a_finite_gradient_add_nothing() -> None:
    """As with torch's own operations: what is no number stays so through every even one."""
    it, size = hostile("log.default", 2 * FEW), 2 * FEW
    rows = {"x": torch.ones(8, size)}
    rows["x"][2, 5], rows["x"][3, 1], rows["x"][4, 0] = math.nan, 0.0, -1.0
    found = it.gradients({"w": torch.ones(size)}, {}, rows)["w"]
    assert found.isfinite().all(1).tolist() == [True, True, False, False, True, True, True, True]
    totals = it.clipped_sum({"w": torch.ones(size)}, {}, rows, torch.ones(8, dtype=torch.bool), 1.0)
    assert totals.counted[0] == 6


def test_small_numbers_are_zero_in_every_thread() -> None:
    """In the thread that was told, torch's own workers, threads begun later, and autograd's backward passes."""
    code = """
import threading, torch
from rapha_lab.curator.lift.compiling import flush_denormals
flush_denormals(); torch.set_num_threads(2)
found = []
def look():
    x = torch.full((1 << 20,), 1e-30, requires_grad=True)
    y = x * 1e-10
    y.sum().backward(torch.tensor(1e-30))
    found.append(bool((y == 0).all()) and bool((x.grad == 0).all()) and bool((torch.full((9,), 1e-40) * 1e30 == 0).all()))
look()
thread = threading.Thread(target=look); thread.start(); thread.join()
assert found == [True, True], found
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def _scattered(index: Tensor, source: Tensor) -> tuple[Tensor]:
    """Of a gather's backward pass too."""
    x = torch.zeros(len(index), 9).requires_grad_()
    with torch.enable_grad(), Evenly():
        picked = (x.gather(1, index) * source).sum()
        (gradient,) = torch.autograd.grad(picked, [x])
        return (gradient + aten.scatter_add(torch.zeros(len(index), 9), 1, index, source),)


def test_sums_by_place_go_from_patient_to_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel, a compiled step's neither, adds one patient's numbers in a row: to one place that takes five times as long."""
    generator = torch.Generator().manual_seed(0)
    index, source = (
        torch.randint(9, (8, 40), generator=generator),
        torch.rand(8, 40, generator=generator),
    )
    expected = 2 * torch.zeros(8, 9).scatter_add(1, index, source)
    watch = Watch()
    with watch:
        assert torch.equal(_scattered(index, source)[0], expected)
    assert "aten.scatter_add.default" in watch.seen - watch.bad
    written = list[str]()
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(written.append))
    fast = compiling.assembled(_scattered, [index, source])
    torch.testing.assert_close(fast([index, source])[0], expected)
    assert "aten.scatter_add" in "".join(written)
    assert "atomic_add" not in "".join(written)
