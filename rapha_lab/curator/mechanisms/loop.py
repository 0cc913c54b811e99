"""A training loop written by the researcher: each `backward()` is one step of DP-SGD (Abadi et al. 2016, Algorithm 1).

The loop's price is that of all its steps and reserved when it opens. A step draws its own Poisson sample, takes
the clipped sum of the gradients of the loss as it then is, and adds noise; parameters, optimiser and even the
loss may change in between, since the sampled Gaussian composes adaptively. Steps are charged in blocks of a
fiftieth of the loop, so that a loop which ends early pays for the block that it is in. What a step draws at random
may have been drawn while the session was busy since the step before, see `curator.ahead`.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rapha_lab.curator.accounting import SampledGaussian
from rapha_lab.curator.ahead import Ahead
from rapha_lab.curator.cohort import View
from rapha_lab.curator.lift import Lifted, Totals, lift
from rapha_lab.curator.mechanisms import Answer, Progress, train
from rapha_lab.curator.noise import Noise
from rapha_lab.protocol.errors import ProgramError
from rapha_lab.protocol.messages import Columns, Gradient, Open
from rapha_lab.protocol.program import Program, digest
from rapha_lab.protocol.schema import ROOM as ROWS
from rapha_lab.protocol.schema import SPLITS, Schema
from rapha_lab.protocol.tensors import header, pack

__all__ = ["Loop", "Read", "plan"]

Read = Callable[[int], bytes]
"""Gives a step's tensors; where they are in shared memory, no more than so many bytes."""

MOST = 16
"""Programs a loop remembers."""
ROOM = 1 << 20
"""Numbers of a program up to which a loop keeps room for its sums: all of its programs' large ones would fill the memory."""


@dataclass(eq=False)
class Loop:
    """An open loop.

    Attributes:
        ask: how it was opened.
        rate, sigma: each patient's chance to be in a step, and the noise multiplier.
        noise: what its steps draw from.
        touches: the splits whose patients are looked at.
        done: steps that ran.
    """

    ask: Open
    schema: Schema
    rate: float
    sigma: float
    touches: tuple[str, ...]
    noise: Ahead
    done: int = 0
    _ahead: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _known: dict[str, _Known] = field(default_factory=dict)
    _rows: dict[str, tuple[dict[str, Tensor], int]] = field(default_factory=dict)

    @property
    def loss(self) -> SampledGaussian:
        """The privacy loss of all its steps."""
        return SampledGaussian(self.rate, self.sigma, self.ask.steps)

    @property
    def programs(self) -> list[Program]:
        """Those that it remembers, which a step may name by their digests."""
        return [known.lifted.program for known in self._known.copy().values()]

    @property
    def engine(self) -> str:
        """Whether the steps of its latest program are compiled, and what that took."""
        return [*self._known.values()][-1].lifted.note

    def gradient(self, ask: Gradient, read: Read, view: View, progress: Progress) -> Answer:
        """One private gradient by parameter; its tensors are read once all else of the step is seen to be in order.

        Raises:
            ProgramError, RequestError: the step is malformed; it was not taken.
        """
        with self._lock:  # one step at a time, however many sessions of its owner ask
            return self._step(ask, read, view, progress)

    def work_ahead(self, wanted: Callable[[], bool]) -> None:
        """Draw what the next step will need, if there will be one, until the thread is `wanted`."""
        if self._lock.acquire(blocking=False):
            try:
                if self.done < self.ask.steps:
                    self.noise.draw(wanted)
            finally:
                self._lock.release()

    def _step(self, ask: Gradient, read: Read, view: View, progress: Progress) -> Answer:
        known, tensors = self._program(ask, read, progress)
        lifted, total = known.lifted, known.total or known.lifted.zeros()
        key = known.columns(ask.inputs, self.schema)
        parameters, constants = lifted.tensors(tensors or read(_bytes(lifted.program)))
        self._announce(progress)
        rows = self._inputs(key, ask.inputs, view)
        self.noise.begin()
        drawn = train.draw(len(view), self.rate, known.slots, self.noise, view.present)
        train.clipped_sum(lifted, parameters, constants, rows, drawn, self.ask.clip, total)
        deviation = self.sigma * self.ask.clip * (1 + train.slack(lifted.microbatch))
        train.private(total, deviation, self.ask.batch if ask.reduction == "mean" else 1, self.noise)
        return Answer({}, known.packed(total))

    def _announce(self, progress: Progress) -> None:
        """One step of those announced is taken; at the first of a block the whole block is announced."""
        ahead = self._ahead
        if not ahead:
            # after the last step there is one too many, which the ledger refuses
            ahead = max(1, min(train.block(self.ask.steps), self.ask.steps - self.done))
        progress(0 if self._ahead else ahead)
        self._ahead = ahead - 1
        self.done += 1

    def _program(self, ask: Gradient, read: Read, progress: Progress) -> tuple[_Known, bytes]:
        """The step's program, and its tensors if they had to be read for it."""
        tensors = b""
        if ask.program is not None and ask.digest not in self._known:
            if digest(ask.program) != ask.digest:
                raise ProgramError("The program is not the one its digest names.", field="digest")
            lifted = lift(ask.program)
            tensors = read(_bytes(ask.program))
            most = train.most(self.ask.batch, self.rate, self.ask.split)
            parts = lifted.for_batches_of(train.capacity(most, 1))
            train.prepare(lifted, *lifted.tensors(tensors), self.ask.steps * parts, progress)
            while len(self._known) >= MOST:
                del self._known[next(iter(self._known))]
            total = lifted.zeros() if ask.program.size <= ROOM else None
            self._known[ask.digest] = _Known(lifted, train.capacity(most, lifted.microbatch), total)
        if ask.digest not in self._known:
            raise ProgramError("The loop does not know this program.", "", "Send it once.", field="program")
        return self._known[ask.digest], tensors

    def _inputs(self, key: str, inputs: dict[str, Columns], view: View) -> dict[str, Tensor]:
        kept = self._rows.get(key)
        if kept is None:
            self._rows = {}  # not beside the new ones
            kept = self._rows[key] = view.rows(inputs), view.held(inputs)
        rows, numbers = kept
        _make_room(self, numbers)
        return rows


_keeping: weakref.WeakKeyDictionary[Loop, int] = weakref.WeakKeyDictionary()
_looking = threading.Lock()


def _make_room(used: Loop, numbers: int) -> None:
    """Have loops that were used longest ago make their rows anew, where all hold more than one question's inputs may have."""
    with _looking:
        _keeping.pop(used, None)
        _keeping[used] = numbers
        total = sum(_keeping.values())
        for other in list(_keeping)[:-1]:
            if total <= ROWS:
                return
            total -= _keeping.pop(other, 0)
            other._rows = {}


@dataclass
class _Known:
    """A program that this loop has had, its slots and, if it is small, room for its sums."""

    lifted: Lifted
    slots: int
    total: Totals | None
    fit: set[str] = field(default_factory=set)
    header: bytes = b""

    def __post_init__(self) -> None:
        parameters = self.lifted.program.parameters
        if all(s.dtype == "float32" for s in parameters):
            self.header = header({s.name: s.shape for s in parameters})

    def columns(self, inputs: dict[str, Columns], schema: Schema) -> str:
        """What these columns are known by, once they fit.

        Raises:
            ProgramError, RequestError: they do not.
        """
        key = repr(sorted(inputs.items()))
        if key not in self.fit:
            train.fits(self.lifted.program, inputs, schema)
            self.fit = {key}
        return key

    def packed(self, total: Totals) -> bytes:
        """The sums, by parameter, as they leave."""
        if self.header:
            numbers: Any = total.flat.float().numpy()
            return b"".join((self.header, numbers))
        return pack(total.cast({s.name: getattr(torch, s.dtype) for s in self.lifted.program.parameters}))


def _bytes(program: Program) -> int:
    """What a program's tensors take at most, with what is said of them."""
    specs = (*program.parameters, *program.constants)
    numbers = sum(math.prod(s.shape) * getattr(torch, s.dtype).itemsize for s in specs)
    return 4096 + numbers + sum(512 + 6 * len(s.name) for s in specs)


def plan(ask: Open, schema: Schema, delta: float, noise: Noise) -> Loop:
    """The loop that `ask` would open, its noise solved from (epsilon, delta).

    Raises:
        RequestError: naming the field that is out of range.
    """
    loss = train.price(ask, schema, delta)
    touches = SPLITS if ask.split == "all" else (ask.split,)
    return Loop(ask, schema, loss.rate, loss.noise, touches, Ahead(noise))
