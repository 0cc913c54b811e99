"""Functions of torch without chance, so that what is computed twice, or of one patient and of several, can be compared."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Settled", "name_of", "settled"]

_DROPOUT = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
_DRAWN = {
    **dict.fromkeys(("rand", "rand_like", "randn", "randn_like", "uniform_", "normal_", "normal"), 0.5),
    **dict.fromkeys(("empty", "empty_like", "new_empty"), 0),
    **dict.fromkeys(("bernoulli", "bernoulli_", "exponential_", "randint"), 1),
}
"""What stands for random numbers, and for those that happen to be in memory."""


@lru_cache(4096)
def name_of(func: Any) -> str:
    """What a function of torch is called."""
    name = getattr(func, "__name__", None) or str(func)
    # properties arrive as the __get__ of their descriptor
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def settled(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function of torch gives the same each time: without dropout, that between recurrent layers included."""
    name = name_of(function)
    if name in _DROPOUT:
        return args[0] if args else kwargs["input"]
    if name == "gumbel_softmax":
        return torch.softmax(args[0] if args else kwargs["logits"], kwargs.get("dim", -1))
    if name in ("gru", "lstm", "rnn_tanh", "rnn_relu") and len(args) == 9:
        args = (*args[:6], False, *args[7:])
    without: dict[str, Any] = {} if name == "batch_norm" else {"training": False, "dropout_p": 0.0}
    out = function(*args, **{k: without.get(k, v) for k, v in kwargs.items()})
    return torch.full_like(out, _DRAWN[name]) if name in _DRAWN else out


class Settled(TorchFunctionMode):
    """While it is entered, torch leaves nothing to chance."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What `func` gives without it."""
        return settled(func, *args, **kwargs or {})
