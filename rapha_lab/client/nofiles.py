"""Files as a cell meets them at the site, where there are none: what opens one fails in the rehearsal too.

Else a figure that is saved at the end of a cell would pass here, and fail there after steps that are paid for. This is
help, no wall: the site's are in `enclave`. Libraries that are imported, and what is computed for the cell, read their own.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["without_files"]

_OURS = str(Path(__file__).parents[1])
_CELL = "<enclave cell"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = {"open", "os.mkdir", "os.listdir", "os.remove", "os.rename", "os.rmdir"}
_within = threading.local()


@contextmanager
def without_files() -> Iterator[None]:
    """While a cell runs in this thread, it has no files."""
    _hooked()
    _within.cell = True
    try:
        yield
    finally:
        _within.cell = False


@cache
def _hooked() -> None:
    """Look at what opens files, from now on: Python has no way back from it."""
    sys.addaudithook(_look)


def _look(event: str, args: tuple[Any, ...]) -> None:
    if event not in _EVENTS or not getattr(_within, "cell", False):
        return
    path = args[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return
    mode, flags = args[1:3] if event == "open" else ("w", 0)
    writes = any(letter in (mode or "") for letter in "wax+") or bool((flags or 0) & _WRITING)
    if (writes or not _of_a_library(os.fsdecode(path))) and _by_the_cell():
        raise PermissionError(1, "Operation not permitted", os.fsdecode(path))


def _of_a_library(path: str) -> bool:
    path = os.path.abspath(path)
    return path.startswith(_libraries()) or any(part.startswith(".") for part in Path(path).parts[1:])


@cache
def _libraries() -> tuple[str, ...]:
    return (
        sys.prefix,
        sys.base_prefix,
        *sysconfig.get_paths().values(),
        "/usr",
        "/etc",
        "/proc",
        "/sys",
        "/dev",
    )


def _by_the_cell() -> bool:
    """Whether the cell's own call opens it, and no import and none of our own modules on its behalf."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_CELL):
            return True
        if name.startswith(("<frozen importlib", _OURS)) or name.endswith(f"{os.sep}linecache.py"):
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False
