"""Memory that one session and the curator share, so that a large model's numbers need not pass through pipes at each step.

A block is without a name, its size never changes, and it is empty when a session gets it. What a session writes there
is as untrusted as what it writes to its pipe: the curator copies it before it looks.
"""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass

from rapha_lab.protocol.messages import BLOCK

__all__ = ["Block", "Blocks"]

COUNT = 64
"""Blocks of a site, each at most for one session at a time; one that gets none uses its pipes. Those unused take no memory."""


@dataclass(frozen=True)
class Block:
    """One block: its number, by which the curator knows it, and its descriptor here."""

    number: int
    fd: int


class Blocks:
    """All blocks of a site."""

    def __init__(self, count: int = COUNT) -> None:
        self._lock = threading.Lock()
        self.fds = [os.memfd_create("rapha-block", os.MFD_CLOEXEC) for _ in range(count)]
        for fd in self.fds:
            os.ftruncate(fd, BLOCK)
        self._free = [Block(number, fd) for number, fd in enumerate(self.fds)]

    def take(self) -> Block | None:
        """A block that nobody has, of zeros; None if there is none."""
        with self._lock:
            return self._free.pop() if self._free else None

    def give_back(self, block: Block | None) -> None:
        """Wipe a block whose session is gone and for which the curator does nothing any more."""
        with self._lock:
            if block is None or block.fd not in self.fds:  # closed, and the number may be another file's
                return
            with mmap.mmap(block.fd, BLOCK) as memory:
                memory.madvise(mmap.MADV_REMOVE)  # frees its pages: what is read afterwards is zeros
            self._free.append(block)

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            self._free.clear()
            while self.fds:
                os.close(self.fds.pop())
