"""When it may show that a piece of work is done: at whole multiples of a quantum after it began."""

from __future__ import annotations

import math
import time

__all__ = ["QUANTUM", "now", "wait"]

QUANTUM = 0.05
"""Seconds; how long work took tells only in which multiple of it the work was done."""


def now() -> float:
    """Seconds by a clock that nobody sets."""
    return time.monotonic()


def wait(began: float) -> None:
    """Return at the next whole multiple of the quantum after `began`."""
    quanta = math.ceil((now() - began) / QUANTUM)
    time.sleep(max(0.0, began + quanta * QUANTUM - now()))
