"""A pool of threads of which the one that worked last works next: what a job needs is still in its processor's caches."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from rapha_lab.curator.ahead import Idle

__all__ = ["Pool"]


class _Job(NamedTuple):
    owner: str
    name: str
    run: Callable[[], Idle | None]
    long: bool


class Pool:
    """Runs jobs in up to `size` threads; the others wait their turn, and one owner's never take the last thread.

    Nor do the long ones of all owners together: one thread is left to short questions, and of the long ones' threads
    one to other owners.

    A `concurrent.futures` pool gives each job to the thread that has rested longest, so that the steps of one
    training loop wander from processor to processor.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size, self._name, self._lock = size, name, threading.Lock()
        self._idle: list[queue.SimpleQueue[_Job | None]] = []
        self._threads: list[threading.Thread] = []
        self._waiting: deque[_Job] = deque()
        self._running, self._long = Counter[str](), Counter[str]()
        self._over = False

    def submit(
        self,
        owner: str,
        function: Callable[..., Idle | None],
        *args: object,
        name: str = "",
        long: bool = False,
    ) -> None:
        """Run `function(*args)`, which raises nothing, once a thread is free and the owner leaves one to others.

        What it gives is done by the thread once it is free, until it gets another job.
        """
        with self._lock:
            self._waiting.append(_Job(owner, name, partial(function, *args), long))
            if (self._idle or self._one_more()) and (job := self._next()) is not None:
                self._idle.pop().put(job)

    def drop(self, name: str) -> bool:
        """Forget the job of this name; false if it does not wait."""
        with self._lock:
            found = [job for job in self._waiting if job.name == name]
            for job in found:
                self._waiting.remove(job)
            return bool(found)

    def close(self) -> None:
        """Drop what waits, and return once what runs has ended."""
        with self._lock:
            self._over = True
            self._waiting.clear()
            for inbox in self._idle:
                inbox.put(None)
        for thread in self._threads:
            thread.join()

    def _one_more(self) -> bool:
        """Begin another, idle thread, if there may be one and the machine gives it."""
        if len(self._threads) == self._size:
            return False
        inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        thread = threading.Thread(target=self._work, args=(inbox,), name=f"{self._name}-{len(self._threads)}")
        try:
            thread.start()
        except RuntimeError:
            if not self._threads:
                raise  # nobody would ever do it
            return False
        self._threads.append(thread)
        self._idle.append(inbox)
        return True

    def _next(self) -> _Job | None:
        """The first that waits and may run now, counted as running."""
        for place, job in enumerate(self._waiting):
            if self._fits(job):
                del self._waiting[place]
                self._running[job.owner] += 1
                self._long[job.owner] += job.long
                return job
        return None

    def _fits(self, job: _Job) -> bool:
        most = max(1, self._size - 1)
        if self._running[job.owner] >= most:
            return False
        return not job.long or (self._long.total() < most and self._long[job.owner] < max(1, most - 1))

    def _work(self, inbox: queue.SimpleQueue[_Job | None]) -> None:
        job = inbox.get()
        while job is not None:
            idle = self._safely(job.run)
            with self._lock:
                self._running[job.owner] -= 1
                self._long[job.owner] -= job.long
                if self._over:
                    return
                job = self._next()
                if job is None:
                    self._idle.append(inbox)
                while self._idle and job is not None and (other := self._next()) is not None:
                    self._idle.pop().put(other)  # an end may make room for an owner's and for a long one
            if job is None and idle is not None:
                self._safely(partial(idle, lambda: not inbox.empty()))
            idle = None  # else a loop that is closed would stay in memory until this thread's next job
            job = job or inbox.get()

    def _safely(self, run: Callable[[], Idle | None]) -> Idle | None:
        try:
            return run()
        except BaseException as error:  # a thread that ended would be one fewer for ever
            with contextlib.suppress(Exception):
                print(f"{self._name}: {type(error).__name__}", file=sys.stderr)
            return None
