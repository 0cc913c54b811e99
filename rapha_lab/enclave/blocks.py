"""Memory that one session and the curator share, so that a large model's numbers need not pass through pipes at each step.

A block is without a name, its size never changes, and it is empty when a session gets it. What a session writes there
is as untrusted as what it writes to its pipe: the curator copies it before it looks.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from dataclasses import dataclass

from rapha_lab.protocol.messages import BLOCK

__all__ = ["Block", "Blocks", "affordable"]

COUNT = 64
"""Most blocks of a site, each at most for one session at a time; who gets none uses its pipes. Unused ones take no memory."""


@dataclass(frozen=True)
class Block:
    """One block: its number, by which the curator knows it, and its descriptor here."""

    number: int
    fd: int


class Blocks:
    """All blocks of a site."""

    def __init__(self, count: int = COUNT) -> None:
        self._lock = threading.Lock()
        self.fds = [_made() for _ in range(count)]
        self._free = [*range(count)]
        self._taken = dict[int, Block]()

    def take(self) -> Block | None:
        """A block that nobody has, of zeros; None if there is none."""
        with self._lock:
            if not self._free:
                return None
            number = self._free.pop()
            _wipe(self.fds[number])  # whoever had it may have written with its last breath
            block = self._taken[number] = Block(number, self.fds[number])
            return block

    def give_back(self, block: Block | None) -> None:
        """Free a block whose session is gone and for which the curator does nothing any more; the second time, nothing."""
        with self._lock:
            if block is None or self._taken.get(block.number) is not block:
                return
            _wipe(block.fd)
            del self._taken[block.number]
            self._free.append(block.number)

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            self._free.clear()
            self._taken.clear()
            while self.fds:
                os.close(self.fds.pop())


def affordable(memory: int) -> int:
    """How many blocks a machine of so many bytes has: a sixteenth of it at most."""
    return min(COUNT, memory // (16 * BLOCK))


def _made() -> int:
    """A file of BLOCK zeros without a name, whose size nobody can change: who touched what is cut off would die of it."""
    fd = os.memfd_create("rapha-block", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, BLOCK)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def _wipe(fd: int) -> None:
    with mmap.mmap(fd, BLOCK) as memory:
        memory.madvise(mmap.MADV_REMOVE)  # frees its pages: what is read afterwards is zeros
