"""How evenly operations compute: their time on special numbers as a multiple of that on ordinary ones.

    python benchmarks/evenness.py [--plain] [--compiled] [--dtype float64] [--only exp,log] [--above 1.15]

For each operation that a lifted program may bring to the processor, forward and backward, each of its arguments is
filled in turn with numbers that kernels have branches for; the figure is the worst ratio of medians to ordinary numbers,
up or down, of interleaved runs in one thread's CPU time. As the curator computes them, or, with --plain, as torch does.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from rapha_lab.curator.lift.compiling import assembled, flush_denormals, keep_pages
from rapha_lab.curator.lift.even import Evenly

aten = torch.ops.aten
Call = Callable[..., object]
SIZE = 1 << 16
"""Numbers, few enough for the processor's cache: memory's time is no number's."""
ROUNDS = 9


def _named(names: str, overload: str = "default") -> dict[str, Call]:
    return {name: getattr(getattr(aten, name), overload) for name in names.split()}


ONE: dict[str, Call] = {
    **_named(
        "abs neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan asin acos atan sinh cosh tanh asinh "
        "atanh erf erfc lgamma digamma sigmoid log_sigmoid_forward relu hardtanh hardswish hardsigmoid silu gelu "
        "softplus elu celu leaky_relu mish square reciprocal sign sgn floor ceil round trunc frac isnan isinf isfinite "
        "logical_not hardshrink softshrink nan_to_num logit sinc special_ndtr"
    ),
    "acosh": lambda x: aten.acosh(x + 1),
    **{f"pow {e}": lambda x, e=e: aten.pow.Tensor_Scalar(x, e) for e in (0.5, 2, 3, -1, -0.5, 1.5, 7, 100.0)},
    **{f"{e} pow": lambda x, e=e: aten.pow.Scalar(e, x) for e in (0.5, 2, 10.0)},
    "xlogy other": lambda x: aten.xlogy.Scalar_Other(x, 1.5),
    "xlogy self": lambda x: aten.xlogy.Scalar_Self(1.5, x),
    "fmod scalar": lambda x: aten.fmod.Scalar(x, 0.7),
    "remainder scalar": lambda x: aten.remainder.Scalar(x, 0.7),
    "div scalar, floor": lambda x: aten.div.Scalar_mode(x, 0.7, rounding_mode="floor"),
    "div scalar, trunc": lambda x: aten.div.Scalar_mode(x, 0.7, rounding_mode="trunc"),
    "clamp": lambda x: x.clamp(0.2, 0.6),
    "gelu tanh": lambda x: aten.gelu(x, approximate="tanh"),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.0),
    "threshold": lambda x: aten.threshold(x, 0.3, 1.0),
    "to float64": lambda x: x.double(),
    "to int64": lambda x: x.long(),
    "to bool": lambda x: x.bool(),
}
TWO: dict[str, Call] = {
    **_named(
        "maximum minimum atan2 hypot logaddexp logaddexp2 heaviside floor_divide logical_and sigmoid_backward "
        "tanh_backward mish_backward hardswish_backward hardsigmoid_backward silu_backward gelu_backward"
    ),
    **_named("add sub mul div eq lt xlogy fmod remainder copysign clamp_min", "Tensor"),
    "pow": aten.pow.Tensor_Tensor,
    "div, floor": lambda x, y: aten.div.Tensor_mode(x, y, rounding_mode="floor"),
    "div, trunc": lambda x, y: aten.div.Tensor_mode(x, y, rounding_mode="trunc"),
    "where": lambda x, y: torch.where(x > 0.5, x, y),
    "gelu_backward tanh": lambda x, y: aten.gelu_backward(x, y, approximate="tanh"),
    "elu_backward": lambda x, y: aten.elu_backward(x, 1.0, 1.0, 1.0, False, y),
    "softplus_backward": lambda x, y: aten.softplus_backward(x, y, 1.0, 20.0),
    "logit_backward": lambda x, y: aten.logit_backward(x, y),
    "leaky_relu_backward": lambda x, y: aten.leaky_relu_backward(x, y, 0.1, False),
    "threshold_backward": lambda x, y: aten.threshold_backward(x, y, 0.3),
    "log_sigmoid_backward": lambda x, y: aten.log_sigmoid_backward(x, y, y),
    "hardtanh_backward": lambda x, y: aten.hardtanh_backward(x, y, -0.5, 0.5),
    "huber_loss": lambda x, y: aten.huber_loss(x, y, 0, 0.3),
    "huber_loss_backward": lambda x, y: aten.huber_loss_backward(x, x, y, 0, 0.3),
    "smooth_l1_loss": lambda x, y: aten.smooth_l1_loss(x, y, 0, 0.3),
    "smooth_l1_loss_backward": lambda x, y: aten.smooth_l1_loss_backward(x, x, y, 0, 0.3),
    "bce with logits": lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none"),
    "lerp": lambda x, y: aten.lerp.Tensor(x, y, x),
    "addcdiv": lambda x, y: aten.addcdiv(x, x, y),
}


def rows(x: Tensor) -> Tensor:
    """As rows of 128."""
    return x.view(-1, 128)


def images(x: Tensor) -> Tensor:
    """As images of eight channels."""
    return x.view(-1, 8, 16, 16)


def places(x: Tensor) -> Tensor:
    """Made of ordinary numbers, and of special ones, which give few."""
    return (rows(x).nan_to_num(0, 1, 0).clamp(0, 1) * 127).long()


def _layer_norm_backward(x: Tensor, y: Tensor) -> object:
    _, mean, scale = aten.native_layer_norm(rows(y), [128], None, None, 1e-5)
    return aten.native_layer_norm_backward(
        rows(x), rows(y), [128], mean, scale, None, None, [True, False, False]
    )


def _group_norm_backward(x: Tensor, y: Tensor) -> object:
    count = SIZE // 2048
    _, mean, scale = aten.native_group_norm(images(y), None, None, count, 8, 256, 4, 1e-5)
    how = count, 8, 256, 4, [True, False, False]
    return aten.native_group_norm_backward(images(x), images(y), mean, scale, None, *how)


PLACES = F.max_pool2d(images(torch.rand(SIZE)), 2, return_indices=True)[1]


def _pool_backward(x: Tensor, y: Tensor) -> object:
    how = [2, 2], [2, 2], [0, 0], [1, 1], False
    return aten.max_pool2d_with_indices_backward(images(x)[:, :, :8, :8], images(y), *how, PLACES)


ONE |= {
    "softmax": lambda x: aten._softmax(rows(x), 1, False),
    "softmax, inner": lambda x: aten._softmax(x.view(8, 64, -1), 1, False),
    "log_softmax": lambda x: aten._log_softmax(rows(x), 1, False),
    "log_softmax, inner": lambda x: aten._log_softmax(x.view(8, 64, -1), 1, False),
    "logsumexp": lambda x: rows(x).logsumexp(1),
    "sum": lambda x: rows(x).sum(1),
    "amax": lambda x: rows(x).amax(1),
    "amax, inner": lambda x: rows(x).amax(0),
    "max.dim": lambda x: rows(x).max(1),
    "max.dim, inner": lambda x: rows(x).max(0),
    "min.dim": lambda x: rows(x).min(1),
    "argmax": lambda x: rows(x).argmax(1),
    "argmin": lambda x: rows(x).argmin(1),
    "var": lambda x: rows(x).var(1),
    "std": lambda x: rows(x).std(1),
    "cumsum": lambda x: rows(x).cumsum(1),
    "prod": lambda x: rows(x).prod(1),
    "any": lambda x: rows(x).any(1),
    "all": lambda x: rows(x).all(1),
    **{
        f"norm {p}": lambda x, p=p: torch.linalg.vector_norm(rows(x), p, 1)
        for p in (0, 1, 2, 3, 0.5, math.inf, -math.inf, -1)
    },
    "norm 2 in float64": lambda x: torch.linalg.vector_norm(rows(x), dim=1, dtype=torch.float64),
    "layer_norm": lambda x: aten.native_layer_norm(rows(x), [128], None, None, 1e-5),
    "group_norm": lambda x: F.group_norm(images(x), 4),
    "instance_norm": lambda x: F.instance_norm(images(x)),
    "glu": lambda x: aten.glu(rows(x), 1),
    "max_pool2d": lambda x: F.max_pool2d(images(x), 2, return_indices=True),
    "max_pool2d, 3 by 3": lambda x: F.max_pool2d(images(x), 3, 2, 1, return_indices=True),
    "max_pool3d": lambda x: F.max_pool3d(x.view(-1, 8, 8, 8, 8), 2, return_indices=True),
    "adaptive_max_pool2d": lambda x: aten.adaptive_max_pool2d(images(x), [3, 3]),
    "avg_pool2d": lambda x: F.avg_pool2d(images(x), 2),
    "bilinear": lambda x: F.interpolate(images(x), scale_factor=0.7, mode="bilinear"),
}
TWO |= {
    "softmax backward": lambda x, y: aten._softmax_backward_data(rows(x), rows(y), 1, x.dtype),
    "log_softmax backward": lambda x, y: aten._log_softmax_backward_data(rows(x), rows(y), 1, x.dtype),
    "layer_norm backward": _layer_norm_backward,
    "group_norm backward": _group_norm_backward,
    "glu backward": lambda x, y: aten.glu_backward(x[: SIZE // 2].view(-1, 64), rows(y), 1),
    "max_pool2d backward": _pool_backward,
    "mm": lambda x, y: rows(x) @ rows(y).T[:, :64],
    "bmm": lambda x, y: torch.bmm(x.view(16, 64, 64), y.view(16, 64, 64)),
    "conv2d": lambda x, y: F.conv2d(images(x), y[: 8 * 8 * 9].view(8, 8, 3, 3)),
    "scatter_add": lambda x, y: aten.scatter_add(torch.zeros_like(rows(y)), 1, places(x), rows(y)),
    "index": lambda x, y: rows(y).gather(1, places(x)),
}


def fillings(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Special numbers made of ordinary ones in (0.1, 0.9)."""
    huge, tiny = (3e38, 1e-37) if x.dtype == torch.float32 else (1e308, 1e-307)
    for value in (0.0, 1.0, -1.0, 3.0, math.nan, math.inf, -math.inf):
        yield str(value), torch.full_like(x, value)
    for scale in (huge, tiny, tiny / 1e3, 1e-10, 1e-3, 10, 100, 1e4, 1e6):
        yield f"{scale:g}x", x * scale
        yield f"-{scale:g}x", x * -scale
    yield "-x", -x
    yield "x - 0.5", x - 0.5
    yield "in order", x.sort()[0]
    yield "zeros at random", x * (x.roll(1) > 0.5)
    for name, value in (("nan", math.nan), ("inf", math.inf), ("huge", huge)):
        for every in (2, 64):
            mixed = x.clone()
            mixed[::every] = value
            yield f"{name} in {every}", mixed


def ordinary(dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers that all operations are defined for."""
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 0.8 + 0.1


def took(call: Call, arguments: list[Tensor]) -> int:
    """Nanoseconds of one call, after another that has the memory at hand."""
    call(*arguments)
    began = time.thread_time_ns()
    call(*arguments)
    return time.thread_time_ns() - began


def uneven(call: Call, count: int, dtype: torch.dtype) -> tuple[float, float, dict[str, float]]:
    """Microseconds on ordinary numbers, the worst ratio, and all by filling."""
    base = [ordinary(dtype, k) for k in range(count)]
    sets = {"": base, " ": [ordinary(dtype, 7 + k) for k in range(count)]}
    for k in range(count):
        for name, x in fillings(base[k]):
            sets[f"{'second ' * k}{name}"] = [*base[:k], x, *base[k + 1 :]]
    times: dict[str, list[int]] = {name: [] for name in sets}
    for _ in range(ROUNDS):
        for name, arguments in sets.items():
            times[name].append(took(call, arguments))
    usual = statistics.median(times.pop("") + times.pop(" "))
    found = {name: statistics.median(each) / usual for name, each in times.items()}
    return usual / 1e3, max(max(r, 1 / r) for r in found.values()), found


def prepared(call: Call, count: int, dtype: torch.dtype, plain: bool, compiled: bool) -> Call:
    """The operation as the curator computes it, eagerly or compiled."""

    def computed(*arguments: Tensor) -> tuple[object, ...]:
        with nullcontext() if plain else Evenly():
            out = call(*arguments)
        return tuple(out) if isinstance(out, tuple) else (out,)

    if not compiled:
        return computed
    code = assembled(computed, [ordinary(dtype, k) for k in range(count)])
    return lambda *arguments: code([*arguments])


def main() -> None:
    """Measure and print, the most uneven first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="")
    parser.add_argument("--above", type=float, default=1.15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    flush_denormals()
    keep_pages()
    dtype, only = getattr(torch, options.dtype), [n for n in options.only.split(",") if n]
    found = []
    for count, operations in ((1, ONE), (2, TWO)):
        for name, call in operations.items():
            if only and name not in only:
                continue
            try:
                ready = prepared(call, count, dtype, options.plain, options.compiled)
                found.append((name, *uneven(ready, count, dtype)))
            except Exception as error:
                print(f"{name}: not computed: {str(error).partition(chr(10))[0][:90]}")
    for name, usual, worst, ratios in sorted(found, key=lambda row: -row[2]):
        far = sorted(ratios.items(), key=lambda pair: -abs(math.log(pair[1])))
        far = [f"{what} {ratio:.2f}" for what, ratio in far if max(ratio, 1 / ratio) > options.above][:12]
        print(f"{name:26} {worst:7.2f} {usual:8.0f} us  {'; '.join(far)}", flush=True)


if __name__ == "__main__":
    main()
