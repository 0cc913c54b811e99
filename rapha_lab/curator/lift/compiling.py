"""The lifted step as one compiled graph, kept for later jobs of the same shape; eager computation if that fails.

Only our own lifted code is compiled, from the checked program: nothing a session sends is. The step is traced
with its backward pass, norms and sums into one graph of plain tensor operations, on shapes alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["Step", "compiled"]

Step = Callable[..., dict[str, torch.Tensor]]
_steps: dict[tuple[Any, ...], Step] = {}
_KEPT = 32


def compiled(step: Step, key: tuple[Any, ...], example: tuple[Any, ...], backend: str) -> Step | None:
    """`step` compiled for arguments shaped as in `example`; None if there is no compiler or it fails.

    Args:
        step: a function of dicts of tensors and tensors, without data-dependent control flow.
        key: equal for steps that compute the same.
        example: made-up arguments.
        backend: of torch.compile.
    """
    key = (*key, backend)
    if key not in _steps:
        while len(_steps) >= _KEPT:
            del _steps[next(iter(_steps))]
        try:
            _steps[key] = _compile(step, example, backend)
        except Exception:
            # whatever a compiler stumbles on, the step computes without it
            return None
    return _steps[key]


def _compile(step: Step, example: tuple[Any, ...], backend: str) -> Step:
    import torch._dynamo
    import torch._inductor.config as inductor

    # no pool of worker processes beside the one that holds records, and torch's own random numbers in dropout
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with warnings.catch_warnings(), inductor.patch(compile_threads=1, fallback_random=True):
        warnings.simplefilter("ignore")
        # make_fx counts the arguments of plain functions only
        graph = make_fx(lambda p, c, x, mask, clip: step(p, c, x, mask, clip), tracing_mode="fake")(*example)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        fast: Step = torch.compile(graph, dynamic=False, fullgraph=True, backend=backend)
        fast(*example)
    return fast
