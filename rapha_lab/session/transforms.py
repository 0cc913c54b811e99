"""torch.func's transforms, refused where they would look beneath a sealed tensor: only made-up numbers are there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch._functorch.eager_transforms as derivatives
import torch._functorch.vmap as batches

from rapha_lab.protocol.errors import SealedError
from rapha_lab.session import tracing
from rapha_lab.session.refusals import TRANSFORMS
from rapha_lab.session.sealed import SealedTensor

__all__ = ["untransformed"]

with warnings.catch_warnings(action="ignore"):  # torch would load it within a cell, where scripts are none
    import torch._decomp.decompositions_for_jvp  # noqa: F401


def _refusing(enter: Callable[..., Any]) -> Callable[..., Any]:
    """How a tensor enters a transform, which a sealed one does not."""

    def either(it: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(it, SealedTensor):
            raise SealedError(*TRANSFORMS, line=tracing.cell_line())
        return enter(it, *args, **kwargs)

    return either


_ENTERED = [
    (where, name, _refusing(getattr(where, name)))
    for where, name in ((derivatives, "_wrap_tensor_for_grad"), (batches, "_add_batch_dim"))
]


@contextmanager
def untransformed() -> Iterator[None]:
    """While a cell runs, no transform takes a sealed tensor."""
    with ExitStack() as stack:
        for where, name, either in _ENTERED:
            stack.enter_context(patch.object(where, name, either))
        yield
