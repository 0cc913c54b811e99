"""Every entry of the table does to a batch of patients what its operation does to each patient alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rapha_lab.curator.lift import TABLE
from rapha_lab.curator.lift.table import DRAWN

PATIENTS = 4


class Given:
    """Draws arguments of one case: sizes a, b, c and tensors, of each patient (`each`) or shared (`same`)."""

    def __init__(self, seed: int, a: int, b: int, c: int, patients: int = PATIENTS) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.a, self.b, self.c, self.patients = a, b, c, patients

    def each(self, *shape: int, low: float = -2.0, high: float = 2.0) -> Tensor:
        return self.same(self.patients, *shape, low=low, high=high)

    def same(self, *shape: int, low: float = -2.0, high: float = 2.0) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, (self.patients, *shape), generator=self.generator)

    def bools(self, *shape: int) -> Tensor:
        return self.ints(2, *shape).bool()


Case = Callable[[Given], list[Any]]
CASES: dict[str, list[Case]] = {}


def case(names: str, *builders: Case) -> None:
    for name in names.split():
        CASES.setdefault(f"aten.{name}", []).extend(builders)


def unary(low: float = -2.0, high: float = 2.0, *more: Any) -> Case:
    return lambda g: [g.each(g.a, g.b, low=low, high=high), *more]


case(
    "abs.default neg.default exp.default exp2.default expm1.default sin.default cos.default tan.default asin.default "
    "acos.default atan.default sinh.default cosh.default tanh.default asinh.default atanh.default erf.default "
    "erfc.default sigmoid.default log_sigmoid.default relu.default relu6.default hardswish.default "
    "hardsigmoid.default silu.default selu.default mish.default square.default sign.default sgn.default "
    "positive.default floor.default ceil.default round.default trunc.default frac.default isnan.default "
    "isinf.default isfinite.default logical_not.default alias.default detach.default lift_fresh_copy.default "
    "clone.default contiguous.default sinc.default deg2rad.default rad2deg.default special_ndtr.default "
    "squeeze.default max.default min.default any.default all.default",
    unary(-0.9, 0.9), lambda g: [g.each(low=-0.9, high=0.9)],
)  # fmt: skip
case(
    "log.default log2.default log10.default log1p.default sqrt.default rsqrt.default reciprocal.default lgamma.default "
    "digamma.default",
    unary(0.1, 2),
)
case("acosh.default", unary(1.1, 2))
case("hardtanh.default", unary(-2, 2, -0.5, 0.7))
case("gelu.default", unary(-2, 2, "none"), unary(-2, 2, "tanh"))
case("softplus.default", unary(-2, 2, 1.5, 2.0))
case("elu.default", unary(-2, 2, 1.1, 1.2, 0.9))
case("celu.default leaky_relu.default softshrink.default hardshrink.default", unary(-2, 2, 0.3))
case("threshold.default", unary(-2, 2, 0.1, 3.0))
case("clamp.default", unary(-2, 2, -0.5, None), unary(-2, 2, -0.5, 0.4))
case("clamp_min.default clamp_max.default", unary(-2, 2, 0.2))
case("nan_to_num.default", unary(-2, 2, 0.0, None, None))
case("logit.default", unary(0.1, 0.9, None), unary(0.1, 0.9, 0.2))
case("eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar mul.Scalar div.Scalar", unary(-2, 2, 0.5))
case("add.Scalar sub.Scalar rsub.Scalar", unary(-2, 2, 0.5, 2))
case("fmod.Scalar remainder.Scalar", unary(-2, 2, 0.7), lambda g: [g.ints(9, g.a), 4])
case("div.Scalar_mode", unary(-2, 2, 0.7, "floor"), unary(-2, 2, 0.7, "trunc"), unary(-2, 2, 0.7, None))
case("pow.Tensor_Scalar", unary(0.1, 2, 1.5))
case("pow.Scalar", lambda g: [1.5, g.each(g.a)])
case("xlogy.Scalar_Self", lambda g: [1.5, g.each(g.a, low=0.1)])
case("xlogy.Scalar_Other", lambda g: [g.each(g.a), 1.5])

PAIRS: list[Case] = [
    lambda g: [g.each(g.a, g.b), g.each(g.a, g.b)],
    lambda g: [g.each(g.a, g.b), g.each(g.b)],
    lambda g: [g.each(g.b), g.same(1, g.a, g.b)],
    lambda g: [g.each(), g.each(g.a, 1)],
]


def pairs(*more: Any, low: float = -2.0) -> list[Case]:
    return [
        lambda g, build=build: [t.abs() + 0.2 if low > 0 else t for t in build(g)] + list(more)
        for build in PAIRS
    ]


case(
    "mul.Tensor div.Tensor eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor logical_and.default "
    "logical_or.default logical_xor.default maximum.default minimum.default max.other min.other atan2.default "
    "hypot.default logaddexp.default logaddexp2.default copysign.Tensor clamp_min.Tensor clamp_max.Tensor "
    "fmod.Tensor remainder.Tensor floor_divide.default heaviside.default",
    *pairs(),
)  # fmt: skip
case("add.Tensor sub.Tensor rsub.Tensor", *pairs(2))
case("xlogy.Tensor pow.Tensor_Tensor", *pairs(low=0.1))
case("div.Tensor_mode", *pairs("floor"), *pairs(None))
case("lerp.Scalar", *pairs(0.3))
case("clamp.Tensor", lambda g: [g.each(g.a, g.b), g.each(g.b, high=0), None])
case("lerp.Tensor", lambda g: [g.each(g.a, g.b), g.each(g.a, g.b), g.each(g.b)])
case(
    "addcmul.default addcdiv.default",
    lambda g: [g.each(g.a, g.b), g.each(g.b), g.each(g.a, g.b, low=0.5), 0.7],
)
case("where.self", lambda g: [g.bools(g.a, g.b), g.each(g.b), g.each(g.a, 1)])
case("where.ScalarOther", lambda g: [g.bools(g.a), g.each(g.b, g.a), 0.5])
case("where.ScalarSelf", lambda g: [g.bools(g.a), 0.5, g.each(g.b, g.a)])
case("where.Scalar", lambda g: [g.bools(g.a), 0.5, 1.5])
case("masked_fill.Scalar", lambda g: [g.each(g.a, g.b), g.bools(g.b), float("-inf")])
case("masked_fill.Tensor", lambda g: [g.each(g.a, g.b), g.bools(g.b), g.each()])
case(
    "bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor", lambda g: [g.ints(9, g.a, g.b), g.ints(9, g.b)]
)
case("bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar", lambda g: [g.ints(9, g.a), 5])
case("bitwise_not.default", lambda g: [g.bools(g.a)])
case("_to_copy.default", unary(-2, 2, torch.float32, False), unary(-2, 2, None, False))
case("to.dtype", unary(-2, 2, torch.float32, False, False))
case("type_as.default", lambda g: [g.each(g.a), g.ints(3, g.b)])
case("to.other", lambda g: [g.each(g.a), g.ints(3, g.b), False, False])
case(
    "prelu.default", lambda g: [g.each(g.a, g.b, 2), g.same(1, g.b)], lambda g: [g.each(g.a, g.b), g.each(1)]
)
case("_prelu_kernel.default", lambda g: [g.each(g.a, g.b), g.same(1, 1, g.b)])

case("view.default reshape.default _unsafe_view.default", lambda g: [g.each(g.a, g.b, g.c), [g.a, -1]])
case("view_as.default reshape_as.default", lambda g: [g.each(g.a, g.b), g.each(g.b * g.a)])
case("flatten.using_ints", lambda g: [g.each(g.a, g.b, g.c), 1, -1], lambda g: [g.each(), 0, -1])
case("unflatten.int", lambda g: [g.each(g.a, g.b * g.c), -1, [g.b, g.c]])
case(
    "squeeze.dim",
    lambda g: [g.each(g.a, 1), -1],
    lambda g: [g.each(g.a, g.b), 0],
    lambda g: [g.each(1, 1), 0],
)
case("squeeze.dims", lambda g: [g.each(1, g.b, 1), [0, 2]])
case("unsqueeze.default", *(lambda g, d=d: [g.each(g.a, g.b), d] for d in (0, 1, 2, -1, -2, -3)))
case("permute.default", lambda g: [g.each(g.a, g.b, g.c), [2, 0, -2]])
case("transpose.int swapaxes.default", lambda g: [g.each(g.a, g.b, g.c), 0, -1])
case("t.default numpy_T.default", lambda g: [g.each(g.a, g.b)])
case("mT.default", lambda g: [g.each(g.a, g.b, g.c)])
case("movedim.intlist", lambda g: [g.each(g.a, g.b, g.c), [0, 1], [2, 0]])
case("movedim.int", lambda g: [g.each(g.a, g.b, g.c), 0, -1])
case(
    "expand.default",
    lambda g: [g.each(1, g.b), [g.a, -1, g.b], False],
    lambda g: [g.each(), [g.a, g.b], False],
)
case("expand_as.default", lambda g: [g.each(1, g.b), g.each(g.c, g.a, g.b)])
case("broadcast_tensors.default", lambda g: [[g.each(g.a, 1), g.each(g.c, 1, g.b)]])
case("repeat.default", lambda g: [g.each(g.a, g.b), [2, 1, 3]])
case("tile.default", lambda g: [g.each(g.a, g.b), [2]])
case("cat.default concat.default", lambda g: [[g.each(g.a, g.b), g.same(1, g.c, g.b)], 0])
case("stack.default", *(lambda g, d=d: [[g.each(g.a, g.b), g.same(1, g.a, g.b)], d] for d in (0, 1, -1)))
case("split.Tensor", lambda g: [g.each(g.a, g.b + 2), 2, -1])
case("split_with_sizes.default", lambda g: [g.each(g.a + g.b), [g.a, g.b], 0])
case("chunk.default", lambda g: [g.each(g.a, g.b), 2, 1])
case("unbind.int", lambda g: [g.each(g.a, g.b), 0])
case("select.int", lambda g: [g.each(g.a, g.b), 0, -1], lambda g: [g.each(g.a, g.b), -1, 0])
case(
    "slice.Tensor",
    lambda g: [g.each(g.a, g.b + 2), 1, 1, 2**63 - 1, 2],
    lambda g: [g.each(g.a), 0, None, -1, 1],
)
case("narrow.default", lambda g: [g.each(g.a, g.b + 1), 1, 1, g.b])
case("flip.default", lambda g: [g.each(g.a, g.b), [0, -1]])
case("roll.default", lambda g: [g.each(g.a, g.b), [1], [0]], lambda g: [g.each(g.a, g.b), [1], []])
case("tril.default triu.default", lambda g: [g.each(g.a, g.b), 0], lambda g: [g.each(2, g.a, g.b), -1])
case("diagonal.default", lambda g: [g.each(g.a, g.b, g.c), 0, -1, 0])
case("unfold.default", lambda g: [g.each(g.a, g.b + 2), 1, 2, 1])
case("constant_pad_nd.default", lambda g: [g.each(g.a, g.b), [1, 2, 0, 1], 0.5])
case("pad.default", *(
    lambda g, m=m: [g.each(2, g.a + 2, g.b + 2), [1, 2, 2, 1], m, None]
    for m in ("constant", "reflect", "replicate", "circular")
))  # fmt: skip
case("index_select.default", lambda g: [g.each(g.a, g.b), 1, g.ints(g.b, g.c)])
case("gather.default", lambda g: [g.each(g.a, g.b), 1, g.ints(g.b, g.a, g.c), False])
case("scatter.src", lambda g: [g.each(g.a, g.b), 1, g.ints(g.b, g.a, 1), g.each(g.a, 1)])
case("scatter.value", lambda g: [g.same(1, g.a, g.b), 0, g.ints(g.a, 1, g.b), 0.5])
case("take_along_dim.default", lambda g: [g.each(g.a, g.b), g.ints(g.b, g.a, g.c), 1])
case(
    "index.Tensor",
    lambda g: [g.each(g.a, g.b), [g.ints(g.a, g.c)]],
    lambda g: [g.each(g.a, g.b, 2), [None, g.ints(g.b, g.c, 2)]],
    lambda g: [g.each(g.a, g.b, 3), [g.ints(g.a, 2), None, g.ints(3, 2)]],
    lambda g: [g.each(2, g.a, g.b, 3), [None, g.ints(g.a, 2), None, g.ints(3, 2)]],
    lambda g: [g.each(2, g.a, g.b), [None, g.ints(g.a, 2), g.ints(g.b, 3, 1)]],
)
case("one_hot.default", lambda g: [g.ints(g.a, g.b), g.a])
case(
    "scatter_add.default",
    lambda g: [g.each(g.a, g.b), 1, g.ints(g.b, g.a, 2), g.each(g.a, 2)],
    lambda g: [g.same(1, g.a, g.b), 0, g.ints(g.a, 3, g.b), g.same(1, 3, g.b)],
)
case(
    "index_add.default",
    lambda g: [g.each(g.a, g.b), 1, g.ints(g.b, 3), g.each(g.a, 3), 2],
    lambda g: [g.same(1, g.a, g.b), -2, g.ints(g.a, 3), g.each(3, g.b), 1],
)
case("slice_scatter.default", lambda g: [g.each(g.a, g.b + 1), g.each(g.a, g.b), 1, 1, None, 1])
case("select_scatter.default", lambda g: [g.same(1, g.a, g.b), g.each(g.b), 0, -1])
case("copy.default", lambda g: [g.same(1, g.a, g.b), g.each(g.b), False])

OVER_DIMS: list[Case] = [
    lambda g: [g.each(g.a, g.b), [0], False],
    lambda g: [g.each(g.a, g.b, g.c), [0, -1], True],
    lambda g: [g.each(g.a), None, True],
]
case("sum.default mean.default", unary(-2, 2, None), lambda g: [g.each(), None])
case("sum.dim_IntList mean.dim", *(lambda g, f=f: [*f(g), None] for f in OVER_DIMS))
case("logsumexp.default", *OVER_DIMS[:2])
case("amax.default amin.default", *OVER_DIMS[:2], lambda g: [g.each(g.a, g.b), [], False])
case(
    "var.correction std.correction",
    lambda g: [g.each(g.a + 1, g.b), [0], 1, True],
    lambda g: [g.each(g.a + 1), None, 0, False],
)
case("var.default std.default", lambda g: [g.each(g.a + 1, g.b), True])
case("var.dim std.dim", lambda g: [g.each(g.a + 1, g.b), [0], False, True])
case(
    "max.dim min.dim any.dim all.dim",
    lambda g: [g.each(g.a, g.b), 0, True],
    lambda g: [g.each(g.a, g.b), -1, False],
)
case(
    "argmax.default argmin.default",
    lambda g: [g.each(g.a, g.b), 0, True],
    lambda g: [g.each(g.a, g.b), None, False],
)
case("cumsum.default", lambda g: [g.each(g.a, g.b), -1, None])
case(
    "softmax.int log_softmax.int",
    lambda g: [g.each(g.a, g.b), 0, None],
    lambda g: [g.each(g.a, g.b), -1, None],
)
case("_softmax.default _log_softmax.default", lambda g: [g.each(g.a, g.b), 0, False])
case(
    "linalg_vector_norm.default",
    lambda g: [g.each(g.a, g.b), 2, [1], True, None],
    lambda g: [g.each(g.a, g.b), 2.5, [1], True, None],
    lambda g: [g.each(g.a, g.b), 0.5, [0], False, None],
    lambda g: [g.each(g.a, g.b), 1, None, False, None],
)
case("norm.ScalarOpt_dim", lambda g: [g.each(g.a, g.b), 2.0, [1], True])
case("norm.Scalar", lambda g: [g.each(g.a, g.b), 2.0])
case(
    "matmul.default",
    lambda g: [g.each(g.a, g.b), g.each(g.b, g.c)],
    lambda g: [g.each(g.b), g.same(1, g.b, g.c)],
    lambda g: [g.each(2, g.a, g.b), g.each(g.b)],
    lambda g: [g.same(1, 3, 1, g.a, g.b), g.each(2, g.b, g.c)],
    lambda g: [g.each(g.b), g.each(g.b)],
)
case("mm.default", lambda g: [g.each(g.a, g.b), g.each(g.b, g.c)])
case("bmm.default", lambda g: [g.each(2, g.a, g.b), g.each(2, g.b, g.c)])
case("mv.default", lambda g: [g.each(g.a, g.b), g.each(g.b)])
case("dot.default", lambda g: [g.each(g.b), g.each(g.b)])
case("addmm.default", lambda g: [g.each(g.c), g.each(g.a, g.b), g.each(g.b, g.c), 0.5, 2.0])
case("addmv.default", lambda g: [g.each(g.a), g.each(g.a, g.b), g.each(g.b), 0.5, 2.0])
case("baddbmm.default", lambda g: [g.each(2, g.a, g.c), g.each(2, g.a, g.b), g.each(2, g.b, g.c), 0.5, 2.0])
case("outer.default", lambda g: [g.each(g.a), g.each(g.b)])
case(
    "einsum.default",
    lambda g: ["zij, jk -> zk", [g.each(g.a, g.b, g.c), g.same(1, g.c, 2)], None],
    lambda g: ["...i,...i", [g.each(g.a, g.b), g.each(g.a, g.b)], None],
)
case("zeros.default ones.default", lambda g: [[g.a], torch.float64])
case("zeros_like.default ones_like.default", lambda g: [g.each(g.a), None])
case("zero.default", lambda g: [g.each(g.a)])
case("fill.Scalar", lambda g: [g.each(g.a, g.b), 0.5])
case("new_zeros.default new_ones.default", lambda g: [g.each(g.a), [g.b], None])
case("full.default", lambda g: [[g.a], 2.5, None])
case("full_like.default", lambda g: [g.each(g.a), 2.5, None])
case("new_full.default", lambda g: [g.each(g.a), [g.b], 2.5, None])
case("scalar_tensor.default", lambda g: [2.5, None])
case("arange.default", lambda g: [5, None])
case("arange.start", lambda g: [1, 5, None])
case("arange.start_step", lambda g: [1, 9, 2, torch.float64])
case("linspace.default", lambda g: [0.0, 1.0, 5, None])
case("eye.default", lambda g: [g.a, None])
case("eye.m", lambda g: [g.a, g.b, None])

REDUCTIONS = (0, 1, 2)
case(
    "mse_loss.default l1_loss.default soft_margin_loss.default",
    *(p for r in REDUCTIONS for p in pairs(r)[:2]),
)
case("smooth_l1_loss.default huber_loss.default", *(p for r in REDUCTIONS for p in pairs(r, 0.7)[:2]))
case("kl_div.default", *(p for r in REDUCTIONS for p in pairs(r, True)[:2]))
case(
    "poisson_nll_loss.default",
    *(p for r in REDUCTIONS for p in pairs(True, False, 1e-8, r)[:1]),
    *pairs(False, False, 1e-8, 1, low=0.1)[:1],
)
case("cosine_similarity.default", *pairs(-1, 1e-8)[:2], *pairs(0, 1e-8)[:1])
case(
    "binary_cross_entropy_with_logits.default",
    lambda g: [g.each(1, g.a), g.each(1, g.a, low=0, high=1), None, g.same(1, g.a, low=0.5), 1],
    lambda g: [g.each(1, g.a), g.each(1, g.a, low=0, high=1), g.each(1, 1), None, 0],
)
case(
    "binary_cross_entropy.default",
    lambda g: [g.each(g.a, low=0.1, high=0.9), g.each(g.a, low=0, high=1), None, 1],
)
case(
    "cross_entropy_loss.default",
    lambda g: [g.each(1, g.a), g.ints(g.a, 1), None, 1, -100, 0.0],
    lambda g: [g.each(1, g.a), g.ints(g.a, 1), g.same(1, g.a, low=0.5), 2, -100, 0.1],
    lambda g: [g.each(2, g.a, g.b), g.ints(g.a, 2, g.b), g.same(1, g.a, low=0.5), 1, -100, 0.1],
    lambda g: [g.each(2, g.a), g.each(2, g.a, low=0, high=1), None, 0, -100, 0.1],
)
case("nll_loss.default nll_loss_nd.default", lambda g: [g.each(1, g.a), g.ints(g.a, 1), None, 1, -100])
case("nll_loss2d.default", lambda g: [g.each(1, g.a, g.b, g.c), g.ints(g.a, 1, g.b, g.c), None, 0, -100])

case(
    "linear.default",
    lambda g: [g.each(1, g.a), g.same(1, g.b, g.a), g.same(1, g.b)],
    lambda g: [g.each(g.c, g.a), g.each(g.b, g.a), g.each(g.b)],
    lambda g: [g.each(g.a), g.each(g.b, g.a), None],
)
case("bilinear.default", lambda g: [g.each(1, g.a), g.each(1, g.b), g.same(1, g.c, g.a, g.b), g.same(1, g.c)])
for n in (1, 2, 3):
    size = lambda g, n=n: [g.a + 3, g.b + 3, g.c + 3][:n]  # noqa: E731
    one = [1] * n
    case(
        f"conv{n}d.default",
        lambda g, n=n, size=size, one=one: [
            g.each(1, 4, *size(g)),
            g.same(1, 2, 2, *[3] * n),
            g.same(1, 2),
            [2] * n,
            one,
            one,
            2,
        ],
        lambda g, n=n, size=size, one=one: [
            g.each(1, 2, *size(g)),
            g.each(3, 2, *[2] * n),
            None,
            one,
            [0] * n,
            [2] * n,
            1,
        ],
    )
    case(
        f"conv{n}d.padding",
        lambda g, n=n, size=size, one=one: [
            g.each(1, 2, *size(g)),
            g.same(1, 3, 2, *[2] * n),
            None,
            one,
            "same",
            one,
            1,
        ],
    )
    case(
        f"conv_transpose{n}d.{'default' if n == 1 else 'input'}",
        lambda g, n=n, size=size, one=one: [
            g.each(1, 2, *size(g)),
            g.same(1, 2, 3, *[2] * n),
            g.same(1, 3),
            [2] * n,
            [0] * n,
            one,
            1,
            one,
        ],
    )
    case(
        f"avg_pool{n}d.default",
        lambda g, n=n, size=size: (
            [g.each(1, 2, *size(g)), [2] * n, [1] * n, [0] * n, False, True] + [None] * (n > 1)
        ),
    )
    case(
        f"max_pool{n}d.default",
        lambda g, n=n, size=size: [g.each(1, 2, *size(g)), [2] * n, [1] * n, [0] * n, [1] * n, False],
    )
    case(f"adaptive_avg_pool{n}d.default", lambda g, n=n, size=size: [g.each(1, 2, *size(g)), [2] * n])
    case(
        f"upsample_nearest{n}d.vec _upsample_nearest_exact{n}d.vec",
        lambda g, n=n, size=size: [g.each(1, 2, *size(g)), None, [2.0] * n],
    )
case(
    "convolution.default",
    lambda g: [g.each(1, 2, g.a + 2), g.same(1, 3, 2, 2), None, [1], [0], [1], False, [0], 1],
)
case("adaptive_max_pool1d.default", lambda g: [g.each(1, 2, g.a + 3), [2]])
case("adaptive_max_pool2d.default", lambda g: [g.each(1, 2, g.a + 3, g.b + 2), [2, 2]])
case(
    "max_pool2d_with_indices.default",
    lambda g: [g.each(1, 2, g.a + 3, g.b + 2), [2, 2], [1, 1], [0, 0], [1, 1], False],
)
case("upsample_linear1d.vec", lambda g: [g.each(1, 2, g.a + 1), [7], False, None])
case(
    "upsample_bilinear2d.vec upsample_bicubic2d.vec _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec",
    lambda g: [g.each(1, 2, g.a + 1, g.b + 1), [7, 5], True, None],
)
case("upsample_trilinear3d.vec", lambda g: [g.each(1, 2, g.a + 1, g.b + 1, 2), [7, 5, 3], True, None])
case("pixel_shuffle.default", lambda g: [g.each(1, 4, g.a, g.b), 2])
case("glu.default", lambda g: [g.each(g.a, 2 * g.b), -1])
case(
    "layer_norm.default",
    lambda g: [g.each(g.a, g.b + 1), [g.b + 1], g.same(1, g.b + 1), g.same(1, g.b + 1), 1e-5, True],
    lambda g: [g.each(g.a, g.b + 1), [g.b + 1], g.each(g.b + 1), None, 1e-5, True],
)
case("rms_norm.default", lambda g: [g.each(g.a, g.b + 1), [g.b + 1], g.each(g.b + 1), 1e-5])
case("group_norm.default", lambda g: [g.each(1, 4, g.a + 1), 2, g.same(1, 4), g.each(4), 1e-5, True])
case(
    "instance_norm.default",
    lambda g: [g.each(1, 4, g.a + 1), g.same(1, 4), None, None, None, True, 0.1, 1e-5, True],
)
case(
    "batch_norm.default",
    lambda g: [
        g.each(1, 4, g.a),
        g.same(1, 4),
        None,
        g.same(1, 4),
        g.same(1, 4, low=0.5),
        False,
        0.1,
        1e-5,
        True,
    ],
)
case(
    "_native_batch_norm_legit_no_training.default",
    lambda g: [g.each(1, 4, g.a), None, None, g.same(1, 4), g.same(1, 4, low=0.5), 0.1, 1e-5],
)
case(
    "embedding.default",
    lambda g: [g.same(1, 5, g.b), g.ints(5, g.a), -1, False, False],
    lambda g: [g.each(5, g.b), g.ints(5, g.a, 2), -1, False, False],
)
case(
    "scaled_dot_product_attention.default",
    lambda g: [
        g.each(1, 2, g.a, g.b),
        g.each(1, 2, g.c, g.b),
        g.each(1, 2, g.c, 3),
        None,
        0.0,
        False,
        None,
        False,
    ],
    lambda g: [
        g.each(1, 2, g.a, g.b),
        g.each(1, 2, g.a, g.b),
        g.each(1, 2, g.a, 3),
        None,
        0.0,
        True,
        0.3,
        False,
    ],
    lambda g: [
        g.each(1, 2, g.a, g.b),
        g.each(1, 2, g.c, g.b),
        g.each(1, 2, g.c, 3),
        g.each(g.a, g.c),
        0.0,
        False,
        None,
        False,
    ],
    lambda g: [
        g.each(1, 4, g.a, g.b),
        g.each(1, 2, g.a, g.b),
        g.each(1, 2, g.a, 3),
        None,
        0.0,
        True,
        None,
        True,
    ],
)
case("native_dropout.default", unary(-2, 2, 0.0, True), unary(-2, 2, 0.5, False))
case("dropout.default feature_dropout.default", unary(-2, 2, 0.5, False))

case("_weight_norm.default", lambda g: [g.each(g.a, g.b), g.each(g.a, 1), 0])
RNN = [False, 1, 0.0, True, False, True]
for name, gates in (("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
    case(
        f"{name}.input",
        lambda g, n=gates: [
            g.each(1, 3, g.a),
            g.each(1, 1, g.b),
            [g.same(1, n * g.b, g.a), g.same(1, n * g.b, g.b)],
            *RNN,
        ],
        lambda g, n=gates: [
            g.each(1, 3, g.a),
            g.each(1, 1, g.b),
            [g.each(n * g.b, g.a), g.each(n * g.b, g.b)],
            *RNN,
        ],
    )
case(
    "lstm.input",
    lambda g: [g.each(3, 1, g.a), [g.each(2, 1, g.b), g.each(2, 1, g.b)],
               [g.same(1, 4 * g.b, *more) for _ in range(2) for more in ((g.a,), (g.b,), (), ())],
               True, 1, 0.0, True, True, False],
)  # fmt: skip

# entered for programs of other versions of torch, their arguments are those of another entry; and made of zeros
SPARE = {"aten._reshape_alias.default", "aten.to.device"} | {
    f"aten.{name}" for name in ("empty_like.default", "empty.memory_format", "new_empty.default")
}


def of_patient(arg: Any, i: int) -> Any:
    if isinstance(arg, Tensor):
        return arg[i if len(arg) > 1 else 0]
    return [of_patient(a, i) for a in arg] if isinstance(arg, list) else arg


def plainly(name: str, args: list[Any]) -> Any:
    """The operation itself, on one patient's values."""
    op = TABLE[name][0]
    skipped = {"layout", "device", "pin_memory", "memory_format", "generator", "out"}
    schema = [a for a in op._schema.arguments if a.name not in skipped]
    split = sum(not a.kwarg_only for a in schema)
    if any(a.name in skipped and not a.kwarg_only for a in op._schema.arguments):
        return op(**dict(zip((a.name for a in schema), args, strict=True)))
    return op(*args[:split], **{a.name: v for a, v in zip(schema[split:], args[split:], strict=True)})


def tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


@pytest.mark.parametrize("name", sorted(CASES))
@settings(max_examples=2, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), a=st.integers(1, 4), b=st.integers(1, 4), c=st.integers(1, 3))
def test_each_patient_gets_what_the_operation_gives_alone(
    name: str, seed: int, a: int, b: int, c: int
) -> None:
    """A rule on a batch equals its operation on every patient, in values and in dtype."""
    for build in CASES[name]:
        args = build(Given(seed, a, b, c))
        out = tensors(TABLE[name][1](*args))
        for i in range(PATIENTS):
            alone = tensors(plainly(name, of_patient(args, i)))
            for whole, one in zip(out, alone, strict=False):
                mine = whole[i if len(whole) > 1 else 0]
                torch.testing.assert_close(mine, one, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("bad", [float("nan"), 1e300])
def test_no_patient_moves_another(name: str, bad: float) -> None:
    """Whatever one patient's values become, nothing raises and every other patient's result keeps its bits."""
    for build in CASES[name]:
        args = build(Given(1, 3, 2, 2))
        before = tensors(TABLE[name][1](*args))
        after = tensors(TABLE[name][1](*[spoiled(arg, bad) for arg in args]))
        for x, y in zip(before, after, strict=True):
            assert x.shape == y.shape
            assert torch.equal(bits(x[1:]), bits(y[1:]))


def spoiled(arg: Any, bad: float) -> Any:
    """The argument with the first patient's values replaced; indices by ones far out of range."""
    if isinstance(arg, list):
        return [spoiled(a, bad) for a in arg]
    if not isinstance(arg, Tensor) or len(arg) == 1:
        return arg
    arg = arg.clone()
    if arg.dtype.is_floating_point:
        arg[0] = bad
    else:
        arg[0] = ~arg[0] if arg.dtype == torch.bool else 10**12 * (1 if bad == bad else -1)
    return arg


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8) if t.dim() else t


def test_every_entry_of_the_table_is_tried() -> None:
    """No operation is allowed that these tests do not try."""
    assert set(TABLE) - set(CASES) == SPARE | DRAWN  # those are tried in test_draws
