"""Operations whose usual kernels take longer for some numbers than for others, computed evenly instead.

Libraries branch on what a number is: a logarithm of NaN takes ten times as long as another, a choice five times if
nobody could foretell it. A step's time would tell of the numbers of the patients in it. So what a lifted program
computes, forward and backward, is written here in operations that take as long whatever they are given; special results
come of themselves by the rules of floating point. Measured by `benchmarks/evenness.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["EVEN", "FEW", "WORDS", "Evenly", "even", "selected", "tanh", "tracing"]

aten = torch.ops.aten
EVEN: dict[Any, Callable[..., Any]] = {}
"""Operation → what computes it evenly; NotImplemented where the operation does."""

FEW = 16
"""Numbers of a patient up to which a program's uneven operations are left as they are: 2 µs for the worst of them."""


class Evenly(TorchDispatchMode):
    """While it is entered, operations are computed evenly, those of backward passes too.

    Attributes:
        numbers: how many went through operations that would not have been.
    """

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = EVEN[func](*args, **(kwargs or {})) if func in EVEN else NotImplemented
        if out is NotImplemented:
            return func(*args, **(kwargs or {}))
        self.numbers += max(t.numel() for t in args if isinstance(t, Tensor))
        return out


def even(operation: Any, *, compiled: bool = False) -> Callable[[Any], Any]:
    """Enter what computes an operation, in a compiler's code too if that is said."""

    def enter(function: Any) -> Any:
        def computed(*args: Any, **kwargs: Any) -> Any:
            return (function if compiled or not tracing() else operation)(*args, **kwargs)

        EVEN[operation] = computed
        return computed

    return enter


def of_floats(operation: Any, *, compiled: bool = False) -> Callable[[Any], Any]:
    """The same for an operation that makes floats of integers first."""

    def enter(function: Any) -> Any:
        return even(operation, compiled=compiled)(lambda *args, **kw: function(*map(_float, args), **kw))

    return enter


def tracing() -> bool:
    """Whether a compiler looks on."""
    return get_proxy_mode() is not None


def _float(x: Any) -> Any:
    return x.to(torch.get_default_dtype()) if isinstance(x, Tensor) and not x.is_floating_point() else x


# Choices


WORDS = {1: torch.int8, 4: torch.int32, 8: torch.int64}
"""Integers of so many bytes."""


def selected(condition: Tensor, ours: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Of each pair, whose dtypes are of one size, ours where the condition holds: by bits, since torch.where branches."""
    if tracing():
        return [torch.where(condition, a, b) for a, b in zip(ours, others, strict=True)]
    word = WORDS[ours[0].dtype.itemsize]
    mask, found = condition.to(word).neg(), []
    for a, b in zip(ours, others, strict=True):
        found.append((b.view(word) ^ ((a.view(word) ^ b.view(word)) & mask)).view(b.dtype))
    return found


@even(aten.where.self)
def select(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.result_type(a, b)
    return selected(condition, [a.to(dtype)], [b.to(dtype)])[0]


@even(aten.masked_fill.Scalar)
def masked_fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return select(mask, x.new_full((), value), x)


@even(aten.masked_fill_.Scalar)
def masked_fill_(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return x.copy_(masked_fill(x, mask, value))


@even(aten.heaviside.default)
def heaviside(x: Tensor, at_zero: Tensor) -> Tensor:
    return select(x == 0, at_zero, (x > 0).to(x.dtype))


def _best(best: Any, x: Tensor, d: int, keep: bool = False) -> tuple[Tensor, Tensor]:
    """The first of the best, or of what is no number."""
    value, length = best(x, d, True), x.shape[d]
    places = torch.arange(length, device=x.device, dtype=torch.int32)
    places = places.view(-1, *[1] * (x.dim() - 1 - d % x.dim()))
    place = (places + ((x != value) & (x == x)).int() * length).amin(d, keep)
    return value if keep else value.squeeze(d), place.long()


def _least(x: Tensor, which: Any = (), keep: bool = False) -> Tensor:
    """Of long integers the kernel for the least branches, that for the largest does not."""
    return ~(~x).amax(which, keep) if x.dtype == torch.int64 else x.amin(which, keep)


@even(aten.amin.default)
def amin(x: Tensor, which: Any = (), keep: bool = False) -> Any:
    return _least(x, which, keep) if x.dtype == torch.int64 else NotImplemented


even(aten.max.dim, compiled=True)(lambda *args: _best(torch.amax, *args))
even(aten.min.dim, compiled=True)(lambda *args: _best(_least, *args))
even(aten.argmax.default)(lambda *args: _best(torch.amax, *args)[1])
even(aten.argmin.default)(lambda *args: _best(_least, *args)[1])


even(aten.any.dim)(lambda x, d, keep=False: (x != 0).to(torch.uint8).amax(d, keep).bool())
even(aten.all.dim)(lambda x, d, keep=False: (x != 0).to(torch.uint8).amin(d, keep).bool())


# Roots, exponentials and logarithms


@of_floats(aten.sqrt.default)
def sqrt(x: Tensor) -> Tensor:
    return x.rsqrt().reciprocal()


def _power(x: Tensor, exponent: float) -> Tensor:
    return sqrt(x) if exponent == 0.5 else x.pow(exponent)


@even(aten.pow.Tensor_Scalar)
def power(x: Tensor, exponent: float) -> Any:
    return sqrt(x) if exponent == 0.5 and x.is_floating_point() else NotImplemented


@even(aten.pow_.Scalar)
def power_(x: Tensor, exponent: float) -> Any:
    return x.copy_(sqrt(x)) if exponent == 0.5 and x.is_floating_point() else NotImplemented


@of_floats(aten.exp.default)
def exp(x: Tensor) -> Tensor:
    return x.sigmoid() / x.neg().sigmoid()


_ROOT = {torch.float32: (torch.int32, 23, 0x3F3504F3), torch.float64: (torch.int64, 52, 0x3FE6A09E667F3BCD)}
"""Words, how many of their bits are a fraction's, and the word of the root of 1/2."""


def _logarithm(x: Tensor, of_two: float) -> Tensor:
    """To the base in which `of_two` is that of 2: x = 2^e m, with m between the roots of 1/2 and 2."""
    word, bits, root = _ROOT[x.dtype]
    e = (x.view(word) - root) >> bits
    m = (x.view(word) - (e << bits)).view(x.dtype)
    usual = e.to(x.dtype) * of_two + (m - 1).log1p() * (of_two / math.log(2))
    r = (x + 0.0).rsqrt()  # NaN below zero, infinite at zero
    return usual + _special(r.reciprocal() - r)


def _special(x: Tensor) -> Tensor:
    """Zeros but for NaN and infinities."""
    return F.hardshrink(x, torch.finfo(x.dtype).max)


@of_floats(aten.log.default)
def log(x: Tensor) -> Tensor:
    return _logarithm(x, math.log(2))


of_floats(aten.log2.default)(lambda x: _logarithm(x, 1.0))
of_floats(aten.log10.default)(lambda x: _logarithm(x, math.log10(2)))


@of_floats(aten.log1p.default, compiled=True)
def log1p(x: Tensor) -> Tensor:
    # of such numbers its kernel is even; the largest floats count as 9e37
    known = torch.where(x == x, x, 0.0) if tracing() else x.nan_to_num(0.0)
    return known.clamp(-2, 9e37).log1p() + _special(x)


def _softly(x: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + exp(-|x|)), and exp(-|x|)."""
    e = exp(x.abs().neg())
    return log1p(e), e


@even(aten.softplus.default, compiled=True)
def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    z = x * beta
    return select(z > threshold, x, (z.relu() + _softly(z)[0]) / beta)


@even(aten.log_sigmoid_forward.default, compiled=True)
def log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    more, e = _softly(x)
    return x.clamp_max(0) - more, e


@even(aten.binary_cross_entropy_with_logits.default, compiled=True)
def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    positive: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    assert reduction == 0
    known = log_sigmoid(x)[0] if positive is None else log_sigmoid(x)[0] * ((positive - 1) * target + 1)
    loss = (1 - target) * x - known
    return loss if weight is None else loss * weight


@of_floats(aten.logaddexp.default, compiled=True)
def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    return select(a == b, a + math.log(2), torch.maximum(a, b) + _softly(a - b)[0])


of_floats(aten.logaddexp2.default, compiled=True)(
    lambda a, b: logaddexp(a * math.log(2), b * math.log(2)) / math.log(2)
)


@of_floats(aten.logsumexp.default)
def logsumexp(x: Tensor, which: list[int], keep: bool = False) -> Tensor:
    top = x.amax(which, True).nan_to_num(0.0, 0.0, 0.0)
    out = log(exp(x - top).sum(which, True)) + top
    return out if keep else out.squeeze(which)


@of_floats(aten.logit.default)
def logit(x: Tensor, eps: float | None = None) -> Tensor:
    x = x if eps is None else x.clamp(eps, 1 - eps)
    return log(x / (1 - x))


@of_floats(aten.xlogy.Tensor)
def xlogy(x: Tensor, y: Tensor) -> Tensor:
    product = x * log(y)
    return select((x == 0) & (y == y), torch.zeros_like(product), product)


of_floats(aten.xlogy.Scalar_Other)(lambda x, y: xlogy(x, x.new_full((), y)))
of_floats(aten.xlogy.Scalar_Self)(lambda x, y: xlogy(y.new_full((), x), y))


@even(aten.elu.default)
def elu(x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return x.relu() * scale + (x.clamp_max(0) * input_scale).expm1() * (alpha * scale)


even(aten.celu.default)(lambda x, alpha=1.0: elu(x, alpha, 1.0, 1 / alpha))


@even(aten.linalg_vector_norm.default)
def norm(x: Tensor, p: float = 2, which: Any = None, keep: bool = False, dtype: Any = None) -> Any:
    if p in (1, 2, math.inf, -math.inf):
        return NotImplemented
    x = x if dtype is None else x.to(dtype)
    if p == 0:
        return (x != 0).to(x.dtype).sum(which, keep)
    return _power(_power(x.abs(), p).sum(which, keep), 1 / p)


@of_floats(aten.erfc.default)
def erfc(x: Tensor) -> Tensor:
    return (1 - x.double().erf()).to(x.dtype)


@even(aten.gelu.default)
def gelu(x: Tensor, *, approximate: str = "none") -> Any:
    if x.dtype == torch.float32 or approximate != "none":
        return NotImplemented
    return x * ((x * math.sqrt(0.5)).erf() + 1) / 2


@even(aten.gelu_backward.default)
def gelu_backward(grad: Tensor, x: Tensor, *, approximate: str = "none") -> Any:
    if x.dtype == torch.float32 or approximate != "none":
        return NotImplemented
    slope = x * exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return grad * (((x * math.sqrt(0.5)).erf() + 1) / 2 + slope)


# Angles


_NEAR = math.floor(math.pi * 2**28) / 2**28
_FAR = math.pi - _NEAR
_SERIES = [(-1) ** k / math.factorial(2 * k + 1) for k in range(12)]


def _sine(x: Tensor, quarters: int) -> Tensor:
    """Of x plus so many right angles: by its series within a right angle of the nearest multiple of pi."""
    turns = ((x.double() + quarters * math.pi / 2) / math.pi).round()
    r = (x.double() - turns * _NEAR - turns * _FAR + quarters * math.pi / 2).clamp(-2, 2).to(x.dtype)
    terms = _SERIES[: 8 if x.dtype == torch.float32 else None]
    square, sine = r * r, torch.full_like(r, terms[-1])
    for term in reversed(terms[:-1]):
        sine = sine * square + term if tracing() else sine.mul_(square).add_(term)
    return sine * r * (1 - 2 * (turns - 2 * (turns / 2).floor())).to(x.dtype)


of_floats(aten.sin.default, compiled=True)(lambda x: _sine(x, 0))
of_floats(aten.cos.default, compiled=True)(lambda x: _sine(x, 1))
of_floats(aten.tan.default, compiled=True)(lambda x: _sine(x, 0) / _sine(x, 1))


of_floats(aten.atan.default)(lambda x: torch.atan2(x, x.new_ones(())))
of_floats(aten.asin.default)(lambda x: torch.atan2(x, sqrt((1 - x) * (1 + x))))
of_floats(aten.acos.default)(lambda x: torch.atan2(sqrt((1 - x) * (1 + x)), x))


@of_floats(aten.asinh.default, compiled=True)
def asinh(x: Tensor) -> Tensor:
    a = x.double().abs()
    return torch.copysign(log(a + torch.hypot(a, a.new_ones(()))).to(x.dtype), x)


@of_floats(aten.acosh.default)
def acosh(x: Tensor) -> Tensor:
    a = x.double()
    return log(a + sqrt(a - 1) * sqrt(a + 1)).to(x.dtype)


def tanh(x: Tensor) -> Tensor:
    """Of floats, by -2|x|, so that nothing cancels."""
    e = x.abs().mul_(-2).expm1_()
    return torch.copysign(e.div_(e + 2), x)


of_floats(aten.tanh.default)(tanh)


@of_floats(aten.sinc.default, compiled=True)
def sinc(x: Tensor) -> Tensor:
    wide = x.double() * math.pi
    return select(x == 0, x.new_ones(()), (_sine(wide, 0) / wide).to(x.dtype))


# Remainders


@even(aten.trunc.default)
def trunc(x: Tensor) -> Any:
    return torch.copysign(x.abs().floor(), x) if x.is_floating_point() else NotImplemented


def _divided(a: Any, b: Any, down: bool) -> tuple[Tensor, Tensor]:
    """The whole quotient, towards zero unless `down`, and what is left, as accurate as that is."""
    dtype = torch.result_type(a, b)
    if not dtype.is_floating_point:
        whole, left = _divided_integers(a.long(), b, down)
        return whole.to(dtype), left.to(dtype)
    like = a if isinstance(a, Tensor) else b
    a, b = (torch.as_tensor(t, dtype=dtype, device=like.device).double() for t in (a, b))
    whole = (a / b).floor() if down else trunc(a / b)
    size = b.abs()
    return whole.to(dtype), (a - whole * b).clamp(-size, size).to(dtype)


def _divided_integers(a: Tensor, b: Any, down: bool) -> tuple[Tensor, Tensor]:
    """By floats, whose quotient of large ones is off by little, which the second round divides."""
    whole, left = torch.zeros_like(a), a
    for _ in range(2):
        more = (left.double() / b).floor().long()
        whole, left = whole + more, left - more * b
    up = torch.zeros_like(a) if down else ((left > 0) & (a < 0)).long()
    return whole + up, left - up * b


def _quotient(a: Any, b: Any, *, rounding_mode: str | None = "floor") -> Any:
    floats = torch.result_type(a, b).is_floating_point
    if rounding_mode is None or (floats and rounding_mode == "trunc"):
        return NotImplemented
    return _divided(a, b, rounding_mode == "floor")[0]


for _op in (aten.fmod.Tensor, aten.fmod.Scalar):
    even(_op, compiled=True)(lambda a, b: _divided(a, b, False)[1])
for _op in (aten.remainder.Tensor, aten.remainder.Scalar):
    even(_op, compiled=True)(lambda a, b: _divided(a, b, True)[1])
for _op in (aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode):
    even(_op)(_quotient)


# The gamma function


def _shifted(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Below 8, the numbers 8 steps up, where series are exact; the steps; and where it is so."""
    below = (x < 8).double()
    steps = x.double().clamp_max(8).unsqueeze(-1) + torch.arange(8.0, device=x.device)
    return x.double() + 8 * below, steps, below


@of_floats(aten.lgamma.default, compiled=True)
def lgamma(x: Tensor) -> Tensor:
    z, steps, below = _shifted(x)
    r = 1 / (z * z)
    series = (1 / 12 - r * (1 / 360 - r * (1 / 1260 - r * (1 / 1680 - r / 1188)))) / z
    usual = (z - 0.5) * (log(z) - 1) + (math.log(2 * math.pi) - 1) / 2 + series
    return (usual - below * log(steps.prod(-1).abs())).to(x.dtype)


@of_floats(aten.digamma.default, compiled=True)
def digamma(x: Tensor) -> Tensor:
    z, steps, below = _shifted(x)
    r = 1 / (z * z)
    series = r * (1 / 12 - r * (1 / 120 - r * (1 / 252 - r * (1 / 240 - r / 132))))
    return (log(z) - 0.5 / z - series - below * steps.reciprocal().sum(-1)).to(x.dtype)


@even(aten.polygamma.default, compiled=True)
def polygamma(n: int, x: Tensor) -> Any:
    """Of the first order, by which a digamma function is differentiated."""
    if n != 1:
        return NotImplemented
    z, steps, below = _shifted(x)
    r = 1 / (z * z)
    series = r * (1 / 6 - r * (1 / 30 - r * (1 / 42 - r * (1 / 30 - r * 5 / 66))))
    return ((1 + series) / z + 0.5 * r + below * (steps * steps).reciprocal().sum(-1)).to(x.dtype)


# Places


@even(aten.scatter_add.default, compiled=True)
def scatter_add(x: Tensor, d: int, index: Tensor, source: Tensor) -> Any:
    """As along a dimension that is not the last: the kernel then goes from patient to patient, place by place.

    Along the last it adds one patient's numbers in a row, and waits for each sum if all of them go to one place.
    """
    if d % x.dim() < x.dim() - 1:
        return NotImplemented
    return aten.scatter_add(x.unsqueeze(-1), d % x.dim(), index.unsqueeze(-1), source.unsqueeze(-1)).squeeze(
        -1
    )
