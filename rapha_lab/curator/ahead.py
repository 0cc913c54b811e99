"""Noise that is drawn while nobody waits: a training loop's next step finds it ready.

Between two steps the curator has nothing to do for a loop. It draws then what the next step will ask for, which is what
the last two asked for: the Poisson sample, the patients' slots, the Gaussian noise, from the same generator in the same
order. Noise that is given out when it is asked for and noise that was drawn before have one distribution, since it is
independent of all that a session knows until the step's answer. So this changes no proof, as long as each number is used
once, which holds here whatever a step asks for: what does not fit is thrown away, never kept. How long the drawing takes
follows from the amounts alone, as it does within a step. What depends on anything else is no part of it: who opted out,
the policy and the funds are looked at when the step is taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rapha_lab.curator.noise import Noise

__all__ = ["MOST", "Ahead", "Idle"]

Idle = Callable[[Callable[[], bool]], None]
"""What a thread does while nobody needs it, in short pieces: given what says that somebody does."""

MOST = 1 << 20
"""Numbers that are kept ready for a loop at most."""

_Call = tuple[Any, ...]


class Ahead:
    """A generator's noise, some of it drawn beforehand; used by one thread at a time.

    Args:
        noise: where it comes from.
    """

    def __init__(self, noise: Noise) -> None:
        self._noise = noise
        self._asked, self._before = list[_Call](), list[_Call]()
        self._ready = deque[tuple[_Call, Tensor]]()

    def gaussian(self, n: int) -> Tensor:
        """As `Noise.gaussian`."""
        return self._given("gaussian", n)

    def uniform(self, n: int) -> Tensor:
        """As `Noise.uniform`."""
        return self._given("uniform", n)

    def order(self, n: int) -> Tensor:
        """As `Noise.order`."""
        return self._given("order", n)

    def sample(self, n: int, rate: float) -> Tensor:
        """As `Noise.sample`."""
        return self._given("sample", n, rate)

    def begin(self) -> None:
        """A step begins."""
        self._before, self._asked = self._asked, []

    def draw(self, wanted: Callable[[], bool] = lambda: False) -> None:
        """Draw for the next step what the last two asked for, if that was the same; until the thread is `wanted`."""
        if self._asked != self._before:
            return
        room = MOST - sum(call[1] for call, _ in self._ready)
        for call in self._asked[len(self._ready) :]:
            room -= call[1]
            if room < 0 or wanted():
                return
            self._ready.append((call, self._drawn(*call)))

    def _given(self, *call: Any) -> Tensor:
        self._asked.append(call)
        if self._ready:
            found, numbers = self._ready.popleft()
            if found == call:
                return numbers
            self._ready.clear()
        return self._drawn(*call)

    def _drawn(self, name: str, *amounts: Any) -> Tensor:
        drawn: Tensor = getattr(self._noise, name)(*amounts)
        return drawn
