"""Memory shared with sessions, by the gateway's numbers for it: read once, into the curator's own, and written with releases."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import BLOCK

__all__ = ["Blocks"]


class Blocks:
    """The blocks of a site, mapped as they are used.

    Args:
        fds: their descriptors, by number.
    """

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds, self._mapped = fds, dict[int, mmap.mmap]()

    def _block(self, number: int) -> mmap.mmap:
        if number not in self._mapped:
            self._mapped[number] = mmap.mmap(self._fds[number], BLOCK)
        return self._mapped[number]

    def read(self, number: int, size: int, most: int = BLOCK) -> bytes:
        """A copy of the first `size` bytes; the session may write others meanwhile, and they count then.

        Raises:
            RequestError: a block has not so many, or they are more than `most`; nothing is copied.
        """
        if size > most:
            raise RequestError("The tensors do not fit the program.", "They are longer.", field="shared")
        if not 0 <= number < len(self._fds) or not 0 < size <= BLOCK:
            raise RequestError(
                "The tensors are in no shared memory.", f"It has {BLOCK} bytes.", field="shared"
            )
        return self._block(number)[:size]

    def write(self, number: int, data: bytes) -> None:
        """Put `data` there; only what is released at this moment."""
        self._block(number)[: len(data)] = data
