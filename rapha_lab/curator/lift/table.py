"""The table: what each allowed operation does to a batch of patients, elementwise, shape and reduction rules.

Every tensor has the patient as dimension 0, of size 1 where the value is the same for all; a rule acts on the
other dimensions, which are all that a program's arguments can name. Rules are total: whatever a record holds,
none raises, branches or runs longer (indices are clamped, integers are not divided).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["DRAWN", "INSTEAD", "TABLE", "batch_of", "dims", "raised", "rule"]

Rule = Callable[..., Any]
DRAWN = {"aten.rand_like.default", "aten.randn_like.default"}
"""Random numbers of which each patient gets their own, also where their shape is that of something shared."""
TABLE: dict[str, tuple[Any, Rule]] = {}
"""Overload name → (the ATen operation, whose schema its arguments must fit; its rule)."""


def operation(name: str) -> Any:
    """The ATen overload a name of *this* file means; never called with a name out of a program."""
    namespace, op, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function into the table under these overloads; it gets the schema's arguments in order."""

    def enter(function: Rule) -> Rule:
        TABLE.update({f"aten.{name}": (operation(f"aten.{name}"), function) for name in names})
        return function

    return enter


def dims(tensor: Tensor, which: int | Sequence[int] | None) -> list[int]:
    """Dimensions of one patient's value as dimensions of the lifted tensor; None is all of them."""
    rank = tensor.dim() - 1
    which = range(rank) if which is None else [which] if isinstance(which, int) else which
    for d in which:
        if not -max(rank, 1) <= d < max(rank, 1):
            raise IndexError(f"dimension {d} of a value of {rank} dimensions")
    return [d % rank + 1 for d in which] if rank else []


def some(tensor: Tensor, which: int | Sequence[int] | None) -> list[int]:
    """As `dims`, for operations to which no dimensions mean all of them, the patients' too."""
    if tensor.dim() == 1:
        raise IndexError("a single number has no dimensions")
    return dims(tensor, which)


def dim(tensor: Tensor, which: int) -> int:
    """One dimension, lifted; the value must have it."""
    if tensor.dim() == 1:
        raise IndexError(f"dimension {which} of a single number")
    return dims(tensor, which)[0]


def raised(tensor: Tensor, rank: int) -> Tensor:
    """The value with ones put before a patient's dimensions until there are `rank` of them.

    Raises:
        IndexError: if it has more: beside a value of fewer, its own dimensions would meet the patients.
    """
    missing = rank - (tensor.dim() - 1)
    if missing < 0:
        raise IndexError(f"a value of {tensor.dim() - 1} dimensions where {rank} are the most")
    return tensor.reshape(tensor.shape[0], *[1] * missing, *tensor.shape[1:]) if missing else tensor


def batch_of(*tensors: Tensor) -> int:
    """The number of patients the values are for, 1 if they are all shared."""
    return max(t.shape[0] for t in tensors)


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The values, shared ones repeated (without copying) for every patient."""
    size = batch_of(*tensors)
    return [t.expand(size, *t.shape[1:]) for t in tensors]


def aligned(args: Sequence[Any]) -> list[Any]:
    """Tensor arguments of an elementwise operation, broadcast as one patient's values would be."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    rank = max((t.dim() - 1 for t in tensors), default=0)
    if len({t.dtype for t in tensors}) > 1 and any(t.dim() == 1 for t in tensors) and rank:
        args = _promoted(args, tensors)
    return [raised(a, rank) if isinstance(a, Tensor) else a for a in args]


def _promoted(args: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Single numbers in the dtype torch would give them beside tensors: lifting must not promote them."""
    ones = [torch.empty((1,) * (t.dim() - 1), dtype=t.dtype, device="meta") for t in tensors]
    whole = ones[0]
    for one in ones[1:]:
        kind = torch.result_type(whole, one)
        whole = torch.empty((1,) * max(whole.dim(), one.dim()), dtype=kind, device="meta")
    small = [isinstance(a, Tensor) and a.dim() == 1 and a.dtype.is_floating_point for a in args]
    return [a.to(whole.dtype) if s else a for a, s in zip(args, small, strict=True)]


def elementwise(*names: str) -> None:
    """Enter operations that act on each element alone under themselves."""
    for name in names:
        op = operation(f"aten.{name}")
        TABLE[f"aten.{name}"] = (op, lambda *args, _op=op: _apply(_op, aligned(args)))


def _apply(op: Any, args: list[Any]) -> Any:
    split = sum(not a.kwarg_only for a in op._schema.arguments)
    names = [a.name for a in op._schema.arguments if a.kwarg_only]
    return op(*args[:split], **dict(zip(names, args[split:], strict=False)))


_PLAIN = (
    "abs", "neg", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "sin",
    "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf",
    "erfc", "lgamma", "digamma", "sigmoid", "log_sigmoid", "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu",
    "gelu", "softplus", "elu", "celu", "selu", "leaky_relu", "mish", "square", "reciprocal", "sign",
    "sgn", "positive", "floor", "ceil", "round", "trunc", "frac", "isnan", "isinf", "isfinite",
    "logical_not", "logical_and", "logical_or", "logical_xor", "clamp", "clamp_min", "clamp_max",
    "threshold", "softshrink", "hardshrink", "nan_to_num", "logit", "maximum", "minimum", "atan2",
    "hypot", "logaddexp", "logaddexp2", "addcmul", "addcdiv", "sinc", "deg2rad", "rad2deg",
    "lift_fresh_copy", "alias", "detach", "heaviside",
)  # fmt: skip
_WITH_TENSOR = (
    "add", "sub", "mul", "div", "rsub", "eq", "ne", "lt", "le", "gt", "ge", "xlogy", "clamp",
    "clamp_min", "clamp_max",
)  # fmt: skip
_WITH_NUMBER = (
    "add", "sub", "mul", "div", "rsub", "eq", "ne", "lt", "le", "gt", "ge",
)  # fmt: skip
_BITWISE = ("bitwise_and", "bitwise_or", "bitwise_xor")

elementwise(
    *(f"{name}.default" for name in _PLAIN),
    *(f"{name}.Tensor" for name in (*_WITH_TENSOR, *_BITWISE)),
    *(f"{name}.Scalar" for name in (*_WITH_NUMBER, *_BITWISE)),
    "bitwise_not.default", "lerp.Scalar", "lerp.Tensor", "where.self",
    "where.ScalarOther", "where.ScalarSelf", "where.Scalar", "masked_fill.Scalar", "copysign.Tensor",
    "xlogy.Scalar_Other", "xlogy.Scalar_Self", "special_ndtr.default",
    "max.other", "min.other",
)  # fmt: skip


INSTEAD = {"aten.special_log_ndtr.default": "Write torch.special.ndtr(x).clamp(min=1e-30).log()."}
"""What to write for an operation that would take longer for some numbers than for others."""


def _floats_only(*names: str) -> None:
    """These are for floats, or integers and a positive constant behind.

    Integers divided by a record's zero would raise; to a record's power they take sixty times as long for a large one.
    """
    for name in names:
        op = operation(f"aten.{name}")

        def apply(*args: Any, _op: Any = op) -> Any:
            constant = not isinstance(args[1], Tensor) and args[1] > 0
            if not constant and not any(
                isinstance(a, float) or (isinstance(a, Tensor) and a.dtype.is_floating_point) for a in args
            ):
                raise TypeError("integers; convert them to float first")
            return _apply(_op, aligned(args))

        TABLE[f"aten.{name}"] = (op, apply)


_floats_only(
    "div.Tensor_mode", "div.Scalar_mode", "fmod.Tensor", "fmod.Scalar", "remainder.Tensor",
    "remainder.Scalar", "floor_divide.default", "pow.Tensor_Tensor", "pow.Tensor_Scalar", "pow.Scalar",
)  # fmt: skip


@rule("masked_fill.Tensor")
def masked_fill(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    x, mask, value = aligned([x, mask, value.to(x.dtype)])
    return torch.where(mask, value, x)


@rule("clone.default", "contiguous.default")
def same(x: Tensor) -> Tensor:
    """The value itself: nothing is ever written in place."""
    return x


@rule("_to_copy.default")
def to_copy(x: Tensor, dtype: torch.dtype | None, non_blocking: bool) -> Tensor:
    return x if dtype is None else x.to(dtype)


@rule("to.dtype", "to.device")
def to_dtype(x: Tensor, *args: Any) -> Tensor:
    dtype = next(a for a in args if isinstance(a, torch.dtype))
    return x.to(dtype)


@rule("type_as.default", "to.other")
def type_as(x: Tensor, other: Tensor, *unused: Any) -> Tensor:
    return x.to(other.dtype)


@rule("prelu.default", "_prelu_kernel.default")
def prelu(x: Tensor, weight: Tensor) -> Tensor:
    slope = weight.reshape(weight.shape[0], -1)
    if x.dim() == 1:
        return torch.where(x > 0, x, slope.squeeze(1) * x)
    if x.dim() > 2 and slope.shape[1] > 1:
        slope = slope.reshape(weight.shape[0], 1, -1, *[1] * (x.dim() - 3))
    return torch.where(x > 0, x, raised(slope, x.dim() - 1) * x)
