"""The batches of one training loop, as a cell goes through them."""

from __future__ import annotations

import weakref
from collections.abc import Generator

from rapha_lab.protocol.errors import RequestError
from rapha_lab.session.sealed import Batch

__all__ = ["Batches", "close_open", "refuse_other"]

_open: weakref.WeakSet[Batches] = weakref.WeakSet()


class Batches:
    """Batches that are gone through once, since each is paid for; their number is public.

    Args:
        batches: gives them, and ends the loop at the site when it is closed.
        steps: how many they are.
    """

    def __init__(self, batches: Generator[Batch], steps: int) -> None:
        self._batches, self._steps, self._over = batches, steps, False

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Batches:
        if self._over:
            raise RequestError(
                "These batches were gone through before.", "A loop and its ε are for as many batches as were opened.",
                "Open all epochs as one loop, batches(epochs=30, ...), or call batches(...) anew in each, which pays anew.",
                field="epochs",
            )  # fmt: skip
        return self

    def __next__(self) -> Batch:
        _open.add(self)
        try:
            return next(self._batches)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the loop: what was not used is refunded."""
        self._over = True
        _open.discard(self)
        self._batches.close()


def close_open() -> None:
    """End the loops that a cell leaves open, so that their releases are given while it is there to show them."""
    for batches in list(_open):
        batches.close()


def refuse_other(taken: int, given: int) -> None:
    """Refuse, in the rehearsal already, a loop without a step, and one whose steps would be used up before its batches are."""
    if not taken:
        raise RequestError(
            "No loss of this loop was computed from patients.",
            "backward() was never called on a sealed tensor; Variable(x) takes made-up numbers out of one.",
            "Compute the loss from batch[...] as it is, and call backward() on it.",
            field="loss",
        )
    if taken > given:
        raise RequestError(
            f"backward() was called {taken} times on {given} batches.",
            "Each is a step of its own, and a loop pays for one a batch: at the site it would end half-way.",
            "Add the losses and call backward() once. Where it takes two, take two batches: "
            "loop = patients.train.batches(...); for first, second in zip(loop, loop).",
            field="epochs",
        )
