"""Automatic checks of what waits in the airlock: prompts for the custodian who decides, never a verdict."""

from __future__ import annotations

from safetensors.torch import load

__all__ = ["tensors"]


def tensors(blob: bytes) -> list[str]:
    """What the tensors are beside an answer: name, kind, shape and range, a line each."""
    lines = []
    for name, tensor in sorted(load(blob).items()) if blob else ():
        kind = str(tensor.dtype).removeprefix("torch.")
        span = f", {float(tensor.min()):.4g} to {float(tensor.max()):.4g}" if tensor.numel() else ""
        lines.append(f"{name}: {kind} {tuple(tensor.shape)}{span}")
    return lines
