"""Values that cross between a notebook and a session: modules as weights, tensors, arrays, tables, numbers.

A parcel is a JSON description beside one safetensors blob. There is no pickle in either direction: a
module travels as its weights and is loaded into the module object that is already there.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import polars
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.release import Release, Row

__all__ = ["pack", "unpack"]

Spec = dict[str, Any]
_DEPTH = 16


def pack(namespace: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], bytes]:
    """The named values as {"values": {name: description}} and one blob.

    Raises:
        RequestError: if a name is not defined, or its value is of a kind that does not travel.
    """
    tensors: dict[str, torch.Tensor] = {}
    specs = {}
    for name in names:
        if name not in namespace:
            why, instead = "It was asked for by -o or -i.", "Define it or take it off the list."
            raise RequestError(f"{name} is not defined.", why, instead, field=name)
        specs[name] = _pack(namespace[name], name, tensors, 0)
    return {"values": specs}, save(tensors) if tensors else b""


def _pack(value: Any, path: str, tensors: dict[str, torch.Tensor], depth: int) -> Spec:
    if depth > _DEPTH:
        raise RequestError(f"{path} is nested too deeply.", f"The limit is {_DEPTH} levels.", field=path)
    if isinstance(value, torch.nn.Module):
        state = {key: _pack(v, f"{path}/{key}", tensors, depth + 1) for key, v in value.state_dict().items()}
        return {"kind": "module", "state": state}
    if isinstance(value, Release):
        return {"kind": "release", "value": value}
    if isinstance(value, (torch.Tensor, numpy.ndarray, numpy.generic)):
        return _pack_array(value, path, tensors)
    if type(value).__module__.startswith("pandas") and hasattr(value, "columns"):
        value = _from_pandas(value)
    if isinstance(value, polars.DataFrame):
        return _pack_table(value, path, tensors, depth)
    if hasattr(value, "savefig"):
        from rapha_lab.session.interpreter import picture

        return {"kind": "figure", "png": picture(value)["image/png"]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        items = {key: _pack(v, f"{path}/{key}", tensors, depth + 1) for key, v in value.items()}
        return {"kind": "dict", "items": items}
    if isinstance(value, (list, tuple)):
        each = [_pack(v, f"{path}/{k}", tensors, depth + 1) for k, v in enumerate(value)]
        return {"kind": "tuple" if isinstance(value, tuple) else "list", "items": each}
    if isinstance(value, Row):
        value = float(value)
    if isinstance(value, float) and (not math.isfinite(value) or value == int(value)):
        # in what custodians are shown, and in what is signed, 1.0 were 1
        return {"kind": "float", "value": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"kind": "plain", "value": value}
    raise RequestError(
        f"{path} does not travel.",
        f"A {type(value).__name__} would have to be pickled, and a pickle can run code.",
        "Modules, tensors, arrays, data frames, figures, numbers, strings, lists and dicts of them do.",
        field=path,
    )


def _pack_array(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Spec:
    kind = "tensor" if isinstance(value, torch.Tensor) else "array"
    if kind == "array" and numpy.asarray(value).dtype.kind in "US":
        return {"kind": "strings", "value": numpy.asarray(value).tolist()}
    try:
        tensor = (
            value.detach()
            if isinstance(value, torch.Tensor)
            else torch.from_numpy(numpy.array(value, order="C"))
        )
    except TypeError:
        why = f"Its dtype is {numpy.asarray(value).dtype}."
        raise RequestError(f"{path} does not travel.", why, "Make it numeric.", field=path) from None
    key = str(len(tensors))  # a path would name two: {"a/b": ...} and {"a": {"b": ...}}
    tensors[key] = tensor.reshape(value.shape).contiguous().clone()
    grad = bool(kind == "tensor" and value.requires_grad)
    return {"kind": kind, "tensor": key, "grad": grad}


def _pack_table(frame: polars.DataFrame, path: str, tensors: dict[str, torch.Tensor], depth: int) -> Spec:
    columns: dict[str, Spec] = {}
    for name in frame.columns:
        column = frame[name]
        if column.dtype.is_numeric() and not column.null_count():
            columns[name] = _pack(column.to_numpy(), f"{path}/{name}", tensors, depth + 1)
        else:
            columns[name] = _pack(column.to_list(), f"{path}/{name}", tensors, depth + 1)
    return {"kind": "table", "columns": columns}


def _from_pandas(frame: Any) -> polars.DataFrame:
    """A pandas frame as a polars one, as which it arrives; polars itself asks for pyarrow if there are strings."""
    columns = {}
    for name, column in frame.items():
        values = zip(column.tolist(), column.isna().tolist(), strict=True)
        columns[str(name)] = [None if missing else value for value, missing in values]
    return polars.DataFrame(columns, strict=False)


def unpack(parcel: Mapping[str, Any], blob: bytes, into: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values of a parcel by name; modules are loaded into those of the same name in `into`.

    Where there is no such module its weights are given as a dict of tensors.

    Raises:
        RequestError: if the parcel is malformed, or weights do not fit the module.
    """
    try:
        tensors = load(blob) if blob else {}
        return {
            name: _unpack(s, name, tensors, into or {}, 0) for name, s in parcel.get("values", {}).items()
        }
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise RequestError(
            "The values sent are malformed.", type(error).__name__, "Send them again."
        ) from None


def _unpack(
    spec: Spec, path: str, tensors: dict[str, torch.Tensor], into: Mapping[str, Any], depth: int
) -> Any:
    if depth > _DEPTH:
        raise ValueError("too deep")

    def inner(each: Spec) -> Any:
        return _unpack(each, path, tensors, {}, depth + 1)

    kind = spec["kind"]
    if kind == "module":
        state = {key: inner(value) for key, value in spec["state"].items()}
        module = into.get(path)
        return _load(module, state, path) if isinstance(module, torch.nn.Module) else state
    if kind in ("tensor", "array"):
        tensor = tensors[spec["tensor"]]
        return tensor.requires_grad_(bool(spec.get("grad"))) if kind == "tensor" else tensor.numpy()
    if kind == "table":
        return polars.DataFrame({name: inner(column) for name, column in spec["columns"].items()})
    if kind == "release":
        import msgspec

        return msgspec.convert(spec["value"], Release)
    if kind == "figure":
        from IPython.display import Image

        return Image(base64.b64decode(spec["png"]))
    if kind == "dict":
        return {key: inner(value) for key, value in spec["items"].items()}
    if kind in ("list", "tuple"):
        return (tuple if kind == "tuple" else list)(inner(value) for value in spec["items"])
    if kind == "float":
        return float(spec["value"])
    if kind in ("plain", "strings"):
        return spec["value"]
    raise ValueError("unknown kind")


def _load(module: torch.nn.Module, state: dict[str, torch.Tensor], path: str) -> torch.nn.Module:
    try:
        module.load_state_dict(state)
    except RuntimeError:
        raise RequestError(
            f"The weights of {path} do not fit the module of that name.",
            "Their names or shapes differ.",
            "Run the cell that defines it again, or take the weights under another name.",
            field=path,
        ) from None
    return module
