"""One shard's process: a function's source and some patients in, some numbers out, nothing else either way."""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import io
import linecache
import textwrap
import traceback
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, BinaryIO

import msgspec
import numpy as np
import polars

from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RequestError
from rapha_lab.session import parcels

__all__ = ["answered", "main", "reviewed", "source_of", "work"]

NAME = "<function on shards>"


def main(reader: BinaryIO, writer: BinaryIO) -> None:
    """Answer one job and end; a job that fails answers nothing."""
    frame = messages.read_frame(reader)
    if frame is not None:
        writer.write(answered(*frame))
        writer.flush()


def answered(header: bytes, blob: bytes) -> bytes:
    """The bytes that answer a job: the numbers of a shard, or a reviewed function's result."""
    if "shape" in msgspec.json.decode(header):
        return work(header, blob).tobytes()
    try:
        told, tensors = reviewed(header, blob)
    except BaseException as error:  # its message may hold a record: not even the custodians are shown it
        told, tensors = {"failed": f"{type(error).__name__} in line {_line(error)}"}, b""
    return _filled(told, tensors)


def reviewed(header: bytes, blob: bytes) -> tuple[dict[str, Any], bytes]:
    """What a function of the review lane returns on the records, as a parcel.

    Raises:
        RequestError: if it returns something that does not travel.
        Exception: whatever the function raises.
    """
    told = msgspec.json.decode(header)
    function, data = _function(told["source"], told["name"]), io.BytesIO(blob)
    frame, *rows = (polars.read_ipc(io.BytesIO(data.read(size))) for size in told["records"])
    inputs = parcels.unpack(told["inputs"], data.read())
    result = function(frame, **dict(zip(told["tables"], rows, strict=True)), **inputs)
    parcel, tensors = parcels.pack({"result": result}, ["result"])
    return {"parcel": parcel}, tensors


def _filled(told: dict[str, Any], tensors: bytes) -> bytes:
    """A frame of always the same length."""
    frame = io.BytesIO()
    messages.write_frame(frame, messages.encode(told), tensors)
    if frame.tell() > messages.REVIEWED:
        return _filled({"failed": f"Its result is larger than {messages.REVIEWED >> 20} MiB"}, b"")
    return frame.getvalue().ljust(messages.REVIEWED, b"\0")


def _line(error: BaseException) -> int:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == NAME]
    return lines[-1] or 0 if lines else 0


def work(header: bytes, records: bytes) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What the function returns on its shard, as float64 of the agreed shape.

    Raises:
        ValueError: if it returns something of another shape.
        Exception: whatever the function raises.
    """
    told = msgspec.json.decode(header)
    function, shape = _function(told["source"], told["name"]), tuple(told["shape"])
    result = np.asarray(function(polars.read_ipc(io.BytesIO(records))), dtype=np.float64)
    if result.shape != shape:
        raise ValueError(f"The function returned the shape {result.shape}, not {shape}.")
    return result.astype("<f8")


def _function(source: str, name: str) -> Callable[..., Any]:
    linecache.cache[NAME] = (len(source), None, source.splitlines(keepends=True), NAME)
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, NAME, "exec"), scope)  # noqa: S102 - running it is what this process is for
    function: Callable[..., Any] = scope[name]
    return function


def source_of(function: Callable[..., Any]) -> str:
    """The source of a function that stands alone, which is all of it that travels.

    Raises:
        RequestError: it is no `def`, or uses a name from outside.
    """
    try:
        source = textwrap.dedent(inspect.getsource(function))
        found = ast.parse(source).body
    except (OSError, TypeError, SyntaxError):
        found = []
    if len(found) != 1 or not isinstance(found[0], ast.FunctionDef) or found[0].name != function.__name__:
        why, instead = "Its source is what travels.", "Write it with def, in the cell."
        raise RequestError("This is no function with a source of its own.", why, instead, field="function")
    outside = sorted({*_globals(function.__code__), *function.__code__.co_freevars} - {function.__name__})
    if outside or found[0].decorator_list:
        what = f"The function uses {', '.join(outside) or 'a decorator'} from outside."
        why = "Its source travels alone to each shard."
        raise RequestError(what, why, "Import and define what it needs inside of it.", field="function")
    return source


def _globals(code: CodeType) -> Iterator[str]:
    """Names the code or a function in it looks up outside and that Python itself does not have."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and not hasattr(builtins, str(step.argval)):
            yield str(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant)
