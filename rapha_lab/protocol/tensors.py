"""Tensors by name as safetensors bytes, in the ways that they are packed at every step of a training loop."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import TensorSpec, serialize

__all__ = ["Layout", "header", "pack"]


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


def header(shapes: Mapping[str, Sequence[int]]) -> bytes:
    """What makes safetensors bytes of the float32 numbers of these tensors, one after another, if it stands before them."""
    told, start = dict[str, Any](), 0
    for name, shape in shapes.items():
        end = start + 4 * math.prod(shape)
        told[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Layout:
    """Where the tensors are in safetensors bytes, for others of the same names and shapes: one copy in place of many.

    Args:
        like: well-formed bytes, as they follow again and again.

    Attributes:
        uniform: whether there are numbers and all float32, which is all that it is for.
        names: of the tensors, in the order of their bytes.
    """

    def __init__(self, like: bytes) -> None:
        start = 8 + int.from_bytes(like[:8], "little")
        self._header, self._size = like[:start], len(like)
        told = json.loads(like[8:start])
        told.pop("__metadata__", None)
        self.uniform = len(like) > start and all(spec["dtype"] == "F32" for spec in told.values())
        self.names = sorted(told, key=lambda name: told[name]["data_offsets"])
        self._parts, end = list[tuple[str, slice, tuple[int, ...]]](), 0
        for name in self.names:
            shape, start = tuple(told[name]["shape"]), end
            end += math.prod(shape)
            self._parts.append((name, slice(start, end), shape))

    def pack(self, tensors: Mapping[str, Any]) -> bytes:
        """The bytes of float32 tensors by name, in one copy."""
        numbers = [tensors[name].numpy(force=True) for name in self.names]
        return b"".join((self._header, *[n if n.flags.c_contiguous else n.copy() for n in numbers]))

    def unpack(self, data: bytes) -> bytearray | None:
        """The float32 numbers of bytes like these, to be read as one array; None if they are others."""
        if len(data) != self._size or not data.startswith(self._header):
            return None
        return bytearray(memoryview(data)[len(self._header) :])

    def parts(self, flat: Any) -> dict[str, Any]:
        """The arrays by name, as views of a flat one of all their numbers."""
        return {name: flat[part].reshape(shape) for name, part, shape in self._parts}
