"""What files say, read again once they change: a training loop asks for it thousands of times."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

__all__ = ["Watched"]

T = TypeVar("T")
TICK = 10**9
"""Nanoseconds after a change in which a further one may bear the same time, so that nothing is kept yet."""


class Watched(Generic[T]):
    """Call it for what `read` makes of the files.

    Args:
        read: reads them; what it raises is raised, and nothing kept.
        paths: all the files that it depends on, which need not be there.
    """

    def __init__(self, read: Callable[[], T], *paths: str | Path) -> None:
        self._read, self._paths = read, [os.fspath(path) for path in paths]
        self._kept: tuple[list[tuple[int, ...]], T] | None = None

    def __call__(self) -> T:
        """As it is now: files that were exchanged, written to, came or went since are read."""
        stamps = [_stamp(path) for path in self._paths]
        if (kept := self._kept) is not None and kept[0] == stamps:
            return kept[1]
        now, found = time.time_ns(), self._read()
        settled = all(abs(now - moment) > TICK for stamp in stamps for moment in stamp[2:])
        self._kept = (stamps, found) if settled else None
        return found


def _stamp(path: str) -> tuple[int, ...]:
    try:
        told = os.stat(path)
    except FileNotFoundError:
        return ()
    return told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns
