"""A pool of threads of which the one that worked last works next: what a job needs is still in its processor's caches."""

from __future__ import annotations

import queue
import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

__all__ = ["Pool"]


class Pool:
    """Runs jobs in up to `size` threads; the others wait their turn.

    A `concurrent.futures` pool gives each job to the thread that has rested longest, so that the steps of one
    training loop wander from processor to processor.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size, self._name, self._lock = size, name, threading.Lock()
        self._idle: list[queue.SimpleQueue[Callable[[], None] | None]] = []
        self._threads: list[threading.Thread] = []
        self._waiting: deque[Callable[[], None]] = deque()
        self._over = False

    def submit(self, function: Callable[..., None], *args: object) -> None:
        """Run `function(*args)`, which raises nothing, as soon as a thread is free."""
        job = partial(function, *args)
        with self._lock:
            if self._idle:
                self._idle.pop().put(job)
            elif len(self._threads) < self._size:
                inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
                inbox.put(job)
                name = f"{self._name}-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._work, args=(inbox,), name=name))
                self._threads[-1].start()
            else:
                self._waiting.append(job)

    def close(self) -> None:
        """Drop what waits, and return once what runs has ended."""
        with self._lock:
            self._over = True
            self._waiting.clear()
            for inbox in self._idle:
                inbox.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, inbox: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        job = inbox.get()
        while job is not None:
            try:
                job()
            except BaseException as error:  # a thread that ended would be one fewer for ever
                print(f"{self._name}: {type(error).__name__}", file=sys.stderr)
            with self._lock:
                if self._over:
                    return
                job = self._waiting.popleft() if self._waiting else None
                if job is None:
                    self._idle.append(inbox)
            job = job or inbox.get()
