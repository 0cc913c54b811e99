"""Torch's random numbers, by which dropout draws, are the process's: a job that sets them by hand has them alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["DRAWS", "Draws"]


class Draws:
    """Lets many steps draw at once, and none while a test of another job goes through the same draws again and again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._drawing, self._tester = 0, 0

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """A step that may draw; it waits for the test that goes on, unless it is part of it."""
        me = threading.get_ident()
        if self._tester == me:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._tester)
            self._drawing += 1
        try:
            yield
        finally:
            with self._changed:
                self._drawing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A test that sets the numbers by hand; they are as before it afterwards."""
        with self._changed:
            self._changed.wait_for(lambda: not self._tester)
            self._tester = threading.get_ident()
            self._changed.wait_for(lambda: not self._drawing)
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            with self._changed:
                self._tester = 0
                self._changed.notify_all()


DRAWS = Draws()
"""Those of this process."""
