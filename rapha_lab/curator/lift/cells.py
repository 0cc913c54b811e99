"""Small functions that a compiled step has in machine code of their own, called in operations that are one to the compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

__all__ = ["Run", "cells_by", "machine_code"]

Run = Callable[[list[Tensor]], Any]
Assemble = Callable[[Callable[..., Any], list[Tensor], bool], Run]
_assemble: ContextVar[Assemble | None] = ContextVar("assemble", default=None)
_fast: dict[Any, Run] = {}
_KEPT = 2048
"""As many as all steps that are kept can have: a step whose cells went would take longer, and round otherwise, for good."""


@contextmanager
def cells_by(assemble: Assemble) -> Iterator[None]:
    """Have cells of compiled steps made machine code of as they are first computed.

    `assemble` is told the function, tensors like those it will get, and whether all is done in one thread.
    """
    token = _assemble.set(assemble)
    try:
        yield
    finally:
        _assemble.reset(token)


def machine_code(
    function: Callable[..., Any], tensors: list[Tensor], fast: bool, in_order: bool = False
) -> Run:
    """The function, which writes into some of the tensors, for tensors like these; as it is unless `fast`."""
    assemble, key = _assemble.get(), (function, *((t.shape, t.stride(), t.dtype) for t in tensors))
    if fast and assemble is not None and key not in _fast:
        while len(_fast) >= _KEPT:
            del _fast[next(iter(_fast))]
        _fast[key] = assemble(lambda *given: function(*given), tensors, in_order)
    plain: Run = lambda tensors: function(*tensors)  # noqa: E731
    return _fast.get(key, plain) if fast else plain
