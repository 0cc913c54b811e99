"""A worker's entry that runs snippets and reports what they say: {"value": ...} or {"error": ...}."""

import json
import traceback
from typing import Any, BinaryIO


def main(reader: BinaryIO, writer: BinaryIO) -> None:
    """For each line, a JSON string of Python, answer one line: its `result` or what it raised."""
    scope: dict[str, Any] = {}
    for line in reader:
        writer.write(json.dumps(answer(json.loads(line), scope)).encode() + b"\n")
        writer.flush()


def sharing(reader: BinaryIO, writer: BinaryIO, block: memoryview) -> None:
    """The same, with `block` in scope."""
    scope: dict[str, Any] = {"block": block}
    for line in reader:
        writer.write(json.dumps(answer(json.loads(line), scope)).encode() + b"\n")
        writer.flush()


def answer(source: str, scope: dict[str, Any]) -> dict[str, Any]:
    """Run `source`; its name `result` is the value."""
    scope["result"] = None
    try:
        exec(source, scope)
        return {"value": scope["result"] if _plain(scope["result"]) else repr(scope["result"])}
    except BaseException as error:
        return {
            "error": type(error).__name__,
            "text": str(error)[:300],
            "trace": traceback.format_exc()[-1500:],
        }


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def greedy(reader: BinaryIO, writer: BinaryIO) -> None:
    """Take memory without end, if there is somebody to take it for."""
    held = []
    while True:
        held.append(bytearray(1 << 24))
