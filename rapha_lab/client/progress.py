"""One line that says what is being waited for, where somebody waits: in a notebook, or in a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Progress", "if_slow"]

QUICK, USUAL = 1.0, 3.0
"""Seconds for which nothing is said; and of what takes about as long anywhere."""


@contextmanager
def if_slow(seconds: float, call: Callable[..., None], *args: Any) -> Iterator[None]:
    """While a block runs: `call(*args)` once it has taken so long; not after it."""
    timer = threading.Timer(seconds, call, args)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


class Progress:
    """Says what goes on, in one line that is updated; nothing if all of it is quick."""

    def __init__(self) -> None:
        self._begun, self._said = time.monotonic(), ""
        self._line: Callable[..., None] | None = None

    def say(self, what: str) -> None:
        """What goes on now; to be called again as it lasts."""
        seconds = time.monotonic() - self._begun
        text = f"{what} … {seconds:.0f} s"
        if seconds >= QUICK and text != self._said:
            self._said, self._line = text, self._line or _line()
            self._line(text)

    @contextmanager
    def during(self, what: str, done: str) -> Iterator[None]:
        """While a block runs that cannot call `say` itself: what goes on if it is slow, and then what it came to."""
        with if_slow(USUAL, self.say, what):
            yield
        self.end(done)

    def end(self, what: str) -> None:
        """What it came to, in the place of what was said; nothing if nothing was."""
        if self._line is not None:
            self._line(f"{what} after {time.monotonic() - self._begun:.0f} s.", last=True)
            self._line = None


def _line() -> Callable[..., None]:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return _Output().put if hasattr(shell, "kernel") else _in_terminal


class _Output:
    """An output of a notebook's cell, replaced by each text."""

    def __init__(self) -> None:
        self._shown: Any = None

    def put(self, text: str, last: bool = False) -> None:
        from IPython.display import display

        data = {"text/plain": text}
        if self._shown is None:
            self._shown = display(data, raw=True, display_id=True)
        else:
            self._shown.update(data, raw=True)


def _in_terminal(text: str, last: bool = False) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if last else ""))
        sys.stderr.flush()
