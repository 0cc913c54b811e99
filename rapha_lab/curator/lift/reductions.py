# ruff: noqa: D103  (a rule does what the operation it is entered under does)
"""The table's rules for reductions, matrix products and tensors made from nothing."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rapha_lab.curator.lift.table import TABLE, dim, dims, operation, raised, rule, together

# Reductions over one patient's dimensions


def reducing(name: str, *overloads: str) -> None:
    """Enter reductions whose second argument is a list of dimensions, all of them if it is missing."""
    for overload in overloads:
        op = operation(f"aten.{name}.{overload}")
        function = getattr(torch, name)
        names = [a.name for a in op._schema.arguments][1:]

        def apply(x: Tensor, *args: Any, _f: Any = function, _names: list[str] = names) -> Tensor:
            given = {k: v for k, v in zip(_names, args, strict=False) if v is not None}
            which = given.pop("dim", None)
            return _reduced(_f, x, which if which != [] else None, **given)

        TABLE[f"aten.{name}.{overload}"] = (op, apply)


def _reduced(function: Any, x: Tensor, which: Any, **given: Any) -> Tensor:
    alone = x.dim() == 1
    out = function(x.unsqueeze(1) if alone else x, dim=[1] if alone else dims(x, which), **given)
    return out.squeeze(1) if alone and given.get("keepdim") else out


reducing("sum", "default", "dim_IntList")
reducing("mean", "default", "dim")
reducing("amax", "default")
reducing("amin", "default")
reducing("var", "correction")
reducing("std", "correction")
reducing("logsumexp", "default")


@rule("var.default", "var.dim")
def var(x: Tensor, *args: Any) -> Tensor:
    return _spread(torch.var, x, args)


@rule("std.default", "std.dim")
def std(x: Tensor, *args: Any) -> Tensor:
    return _spread(torch.std, x, args)


def _spread(function: Any, x: Tensor, args: tuple[Any, ...]) -> Tensor:
    which, unbiased, keep = (None, *args, False) if len(args) == 1 else args
    return _reduced(function, x, which or None, correction=int(unbiased), keepdim=keep)


@rule("max.default")
def max_all(x: Tensor) -> Tensor:
    return x.flatten(1).amax(1) if x.dim() > 1 else x


@rule("min.default")
def min_all(x: Tensor) -> Tensor:
    return x.flatten(1).amin(1) if x.dim() > 1 else x


@rule("max.dim")
def max_dim(x: Tensor, d: int, keep: bool) -> Any:
    return tuple(x.max(dim(x, d), keep))


@rule("min.dim")
def min_dim(x: Tensor, d: int, keep: bool) -> Any:
    return tuple(x.min(dim(x, d), keep))


@rule("argmax.default")
def argmax(x: Tensor, d: int | None, keep: bool) -> Tensor:
    return x.flatten(1).argmax(1) if d is None else x.argmax(dim(x, d), keep)


@rule("argmin.default")
def argmin(x: Tensor, d: int | None, keep: bool) -> Tensor:
    return x.flatten(1).argmin(1) if d is None else x.argmin(dim(x, d), keep)


@rule("any.default")
def any_all(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1).any(1)


@rule("all.default")
def all_all(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1).all(1)


@rule("any.dim")
def any_dim(x: Tensor, d: int, keep: bool) -> Tensor:
    return x.any(dim(x, d), keep)


@rule("all.dim")
def all_dim(x: Tensor, d: int, keep: bool) -> Tensor:
    return x.all(dim(x, d), keep)


@rule("cumsum.default")
def cumsum(x: Tensor, d: int, dtype: torch.dtype | None) -> Tensor:
    return x.cumsum(dim(x, d), dtype=dtype)


@rule("softmax.int")
def softmax(x: Tensor, d: int, dtype: torch.dtype | None) -> Tensor:
    return x.softmax(dim(x, d), dtype=dtype)


@rule("log_softmax.int")
def log_softmax(x: Tensor, d: int, dtype: torch.dtype | None) -> Tensor:
    return x.log_softmax(dim(x, d), dtype=dtype)


@rule("_softmax.default")
def _softmax(x: Tensor, d: int, half: bool) -> Tensor:
    return x.softmax(dim(x, d))


@rule("_log_softmax.default")
def _log_softmax(x: Tensor, d: int, half: bool) -> Tensor:
    return x.log_softmax(dim(x, d))


@rule("linalg_vector_norm.default")
def vector_norm(x: Tensor, order: float, which: Any, keep: bool, dtype: torch.dtype | None) -> Tensor:
    return _reduced(torch.linalg.vector_norm, x, which or None, ord=order, keepdim=keep, dtype=dtype)


@rule("norm.ScalarOpt_dim")
def norm(x: Tensor, p: float | None, which: Any, keep: bool) -> Tensor:
    return _reduced(torch.linalg.vector_norm, x, which or None, ord=2.0 if p is None else p, keepdim=keep)


@rule("norm.Scalar")
def norm_all(x: Tensor, p: float) -> Tensor:
    return _reduced(torch.linalg.vector_norm, x, None, ord=p)


# Matrix products


@rule("matmul.default")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    if min(a.dim(), b.dim()) < 2:
        raise ValueError("a product with a single number")
    left, right = a.dim() == 2, b.dim() == 2
    a = a.unsqueeze(1) if left else a
    b = b.unsqueeze(2) if right else b
    rank = max(a.dim(), b.dim()) - 1
    out = torch.matmul(raised(a, rank), raised(b, rank))
    out = out.squeeze(-2) if left else out
    return out.squeeze(-1) if right else out


@rule("mm.default", "bmm.default", "mv.default", "dot.default")
def mm(a: Tensor, b: Tensor) -> Tensor:
    return matmul(a, b)


@rule("addmm.default", "baddbmm.default", "addmv.default")
def addmm(bias: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    product = alpha * matmul(a, b)
    return raised(bias, product.dim() - 1) * beta + product


@rule("outer.default")
def outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(2) * b.unsqueeze(1)


@rule("einsum.default")
def einsum(equation: str, tensors: Sequence[Tensor], path: Any) -> Tensor:
    equation = equation.replace(" ", "")
    free = next(c for c in string.ascii_letters if c not in equation)
    left, arrow, right = equation.partition("->")
    if not arrow:
        plain = left.replace(",", "").replace("...", "")
        right = ("..." if "..." in left else "") + "".join(
            sorted(c for c in set(plain) if plain.count(c) == 1)
        )
    left = ",".join(free + term for term in left.split(","))
    return torch.einsum(f"{left}->{free}{right}", together(tensors))


# Tensors made from nothing: the same for every patient


def _one(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0)


# what is in memory that nothing was written to is 0
@rule(
    *(f"{name}.default" for name in ("zeros", "new_zeros", "zeros_like", "zero", "new_empty", "empty_like")),
    "empty.memory_format",
)
def zeros(*args: Any) -> Tensor:
    return _made(0, args)


@rule("ones.default", "new_ones.default", "ones_like.default")
def ones(*args: Any) -> Tensor:
    return _made(1, args)


def _made(value: float, args: tuple[Any, ...]) -> Tensor:
    like: Any = args[0] if isinstance(args[0], Tensor) else None
    size = next((a for a in args if isinstance(a, list)), None)
    dtype = next((a for a in args if isinstance(a, torch.dtype)), like.dtype if like is not None else None)
    return torch.full((1, *(like.shape[1:] if size is None else size)), value, dtype=dtype or torch.float32)


@rule("full.default")
def full(size: list[int], value: float, dtype: torch.dtype | None) -> Tensor:
    return torch.full((1, *size), value, dtype=dtype)


@rule("rand_like.default")
def rand_like(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.rand(x.shape, dtype=dtype or x.dtype, device=x.device)


@rule("randn_like.default")
def randn_like(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.randn(x.shape, dtype=dtype or x.dtype, device=x.device)


@rule("fill.Scalar")
def fill(x: Tensor, value: float) -> Tensor:
    return torch.full((1, *x.shape[1:]), value, dtype=x.dtype)


@rule("new_full.default", "full_like.default")
def full_like(x: Tensor, *args: Any) -> Tensor:
    size, value, dtype = args if len(args) == 3 else (list(x.shape[1:]), *args)
    return torch.full((1, *size), value, dtype=dtype or x.dtype)


@rule("scalar_tensor.default")
def scalar_tensor(value: float, dtype: torch.dtype | None) -> Tensor:
    return torch.full((1,), value, dtype=dtype or torch.float32)


@rule("arange.default", "arange.start", "arange.start_step")
def arange(*args: Any) -> Tensor:
    dtype, numbers = args[-1], args[:-1]
    return _one(torch.arange(*numbers, dtype=dtype))


@rule("linspace.default")
def linspace(start: float, end: float, steps: int, dtype: torch.dtype | None) -> Tensor:
    return _one(torch.linspace(start, end, steps, dtype=dtype))


@rule("eye.default", "eye.m")
def eye(*args: Any) -> Tensor:
    *sizes, dtype = args
    return _one(torch.eye(*sizes, dtype=dtype))
