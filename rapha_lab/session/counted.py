"""Functions of torch that are given how many patients a batch has: what they make is sealed, so that no made-up number stays.

Models write `token.expand(x.shape[0], -1, -1)` and `torch.zeros(x.size(0), 8)`. In a sealed tensor's shape the number of
patients is a `Count`, of which torch itself sees no more than an int.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._device import _device_constructors

from rapha_lab.protocol.errors import SealedError
from rapha_lab.session import tracing
from rapha_lab.session.refusals import COPIES
from rapha_lab.session.sealed import SealedTensor
from rapha_lab.session.tape import Count, mapped

__all__ = ["counted"]

_TENSOR = torch.tensor
_METHODS = ("expand", "repeat", "tile", "broadcast_to", "new_zeros", "new_ones", "new_full", "new_empty")
_FUNCTIONS = (
    "tensor", "zeros", "ones", "full", "empty", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "normal",
    "tile", "broadcast_to",
)  # fmt: skip
_LEGACY = [f"{kind}Tensor" for kind in "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()]
_TYPE = torch.Tensor.type
_SPARSE = [f"sparse_{kind}_tensor" for kind in ("coo", "csr", "csc", "bsr", "bsc", "compressed")]
_device_constructors()  # which torch.device looks up once, by the functions that it finds then


def _sealing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which gives a sealed tensor for the number of patients."""

    def either(*args: Any, **kwargs: Any) -> Any:
        if function is _TENSOR and args and isinstance(args[0], SealedTensor):
            return args[0].detach()
        if any(map(_counts, args)) or (kwargs and any(map(_counts, kwargs.values()))):
            return SealedTensor.__torch_function__(function, (), args, kwargs)
        return function(*args, **kwargs)

    return either


def _refusing(function: Callable[..., Any], method: bool = False, counts: bool = False) -> Callable[..., Any]:
    """The function, which takes no sealed tensor's numbers: torch would copy the made-up ones, which nothing tells apart."""

    def either(*args: Any, **kwargs: Any) -> Any:
        given: list[Any] = []
        mapped((args[method:], kwargs), SealedTensor, given.append)
        if given or (counts and any(map(_counts, args[method:]))):
            raise SealedError(*COPIES, line=tracing.cell_line())
        return function(*args, **kwargs)

    return either


class _Legacy:
    """One of torch's older types, such as `torch.FloatTensor`: a type for `isinstance` and `x.type(...)`, that copies nothing."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _refusing(self.kind, counts=True)(*args, **kwargs)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, self.kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kind, name)


def _typed(value: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.Tensor.type`, which knows the older types as they are in a cell."""
    return _TYPE(value, *mapped(args, _Legacy, _kind), **mapped(kwargs, _Legacy, _kind))


def _kind(legacy: _Legacy) -> Any:
    return legacy.kind


def _counts(value: Any) -> bool:
    kind = type(value)
    return kind is Count or (kind in (tuple, list, torch.Size) and any(type(n) is Count for n in value))


_SEALING = [
    *((torch.Tensor, name, _sealing(getattr(torch.Tensor, name))) for name in _METHODS),
    *((torch, name, _sealing(getattr(torch, name))) for name in _FUNCTIONS if name != "full"),
    (torch, "full", _refusing(_sealing(torch.full))),
    (torch.Tensor, "new_tensor", _refusing(torch.Tensor.new_tensor, method=True)),
    (torch.nested, "nested_tensor", _refusing(torch.nested.nested_tensor)),
    *((torch, name, _refusing(getattr(torch, name))) for name in _SPARSE),
    (torch.Tensor, "__init__", _refusing(lambda *args, **kwargs: None, method=True, counts=True)),
    (torch.Tensor, "as_subclass", _refusing(torch.Tensor.as_subclass)),
    (torch.Tensor, "type", _typed),
    *((torch, name, _Legacy(getattr(torch, name))) for name in _LEGACY),
]


@contextmanager
def counted() -> Iterator[None]:
    """While a cell runs, torch's makers of tensors know a number of patients."""
    with ExitStack() as stack:
        for where, name, sealing in _SEALING:
            stack.enter_context(patch.object(where, name, sealing))
        yield
