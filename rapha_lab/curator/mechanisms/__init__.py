"""One file a mechanism; each turns a request into a `Plan` without touching a record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from rapha_lab.curator.accounting import Loss
from rapha_lab.curator.cohort import View

__all__ = ["Answer", "Plan", "Progress"]


class Progress(Protocol):
    """Called before further steps touch a record."""

    def __call__(self, steps: int, doing: str = "", /) -> None:
        """Say how many steps are about to run, or 0 for a beat of the public clock between, or for what else is done.

        Raises to stop.
        """
        ...


@dataclass(frozen=True)
class Answer:
    """An answer: plain JSON values, tensors by name as safetensors bytes, and findings for custodians alone."""

    values: dict[str, Any]
    tensors: bytes = b""
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a request would do: its privacy loss, in how many steps, and the function that does it.

    Attributes:
        loss: privacy loss of one run of all `steps`; `loss.part(k)` is that of the first k steps.
        steps: how many steps `run` will announce through `Progress`, 1 for a single look.
        touches: the splits whose patients are looked at, each of which is charged.
        run: computes the answer; called at most once.
        beats: how many times besides the steps it reports, at times that no record moves.
    """

    loss: Loss
    steps: int
    touches: tuple[str, ...]
    run: Callable[[View, Progress], Answer]
    beats: int = 0
