"""Which processor cores do what: what the curator computes of patients runs on none that a session uses.

Each side keeps what is in its cores' caches, which takes a sixth off the processor time of a training loop's step; and
a session cannot time how busy a core is that it never runs on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["ALL", "CURATOR", "SESSIONS", "halves"]

Cores = tuple[int, ...]


def _siblings(core: int) -> str:
    """What the kernel says of the hardware threads that share a core with this one; else itself."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(core)


def halves(cores: Cores, siblings: Callable[[int], str] = _siblings) -> tuple[Cores, Cores]:
    """The cores in two halves, hardware threads of one core on one side; all of them twice where there is one core."""
    whole = dict[str, list[int]]()
    for core in cores:
        whole.setdefault(siblings(core), []).append(core)
    parts = [*whole.values()]
    first = tuple(core for part in parts[: len(parts) // 2] for core in part)
    second = tuple(core for part in parts[len(parts) // 2 :] for core in part)
    return first or second, second


ALL = tuple(sorted(os.sched_getaffinity(0)))
"""Those that this site may use. A function on shards has one of these to itself, while sessions stand still."""

CURATOR, SESSIONS = halves(ALL)
