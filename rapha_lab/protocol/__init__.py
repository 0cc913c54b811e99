"""Formats and checks shared by everybody; trusted with nothing."""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Iterator

import msgspec


def _structs(kind: type) -> Iterator[type]:
    each: type
    for each in kind.__subclasses__():
        yield each
        yield from _structs(each)


@atexit.register
def _keep_structs() -> None:
    """Let no struct's description be freed while another still points at it: msgspec issue 717, at exit."""
    for kind in {*_structs(msgspec.Struct)}:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kind))
