"""Processes for shards, as the curator gets them: two pipe ends each, over a channel it was started with.

The curator opens no socket and starts no process: the enclave does, and passes the ends of a fresh worker's
pipes over the channel. What happens on them is read here, and only here.

The clock is public. How long a worker takes to start and end is tried out before any record is touched; then
waves of as many workers as there are cores begin at fixed times, each worker is ended when its time is up, and
`answers` returns when the last wave's time is up, never before.

    out  {"do": "open"}  {"do": "spawn", "wave", "count"}  {"do": "clear"}  {"do": "close"}
    in   {"open": true} or {"error"}      {"wave"} with the two ends of one worker
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from rapha_lab.protocol.errors import SiteError, from_wire

__all__ = ["EnclaveWorkers", "converse"]

TRIALS, TIMES, LEAST, MOST = 2, 2, 0.15, 5.0
"""A wave is given so many times the slowest trial to start and end its workers, within so many seconds."""

_TAIL = 0.02
"""Seconds at the end of a wave to end them."""

Pipes = tuple[int, int]


class EnclaveWorkers:
    """Fresh workers of this site.

    Args:
        fd: the channel to the enclave, inherited.
        cores: how many workers may run at once.
    """

    def __init__(self, fd: int, cores: int) -> None:
        self._channel, self._cores = socket.socket(fileno=fd), cores
        self._one_at_a_time = threading.Lock()

    def waves(self, k: int) -> int:
        """In how many waves `k` shards are done."""
        return math.ceil(k / self._cores)

    def answers(
        self,
        jobs: Iterable[bytes],
        k: int,
        size: int,
        seconds: float,
        started: Callable[[], None],
        beat: Callable[[], None],
    ) -> list[bytes]:
        """What each job's worker wrote, b"" if it was not exactly `size` bytes in time; one request at a time.

        Raises:
            SiteError: before `started`, if there are no workers to be had.
        """
        with self._one_at_a_time, self._opened():
            slot = self._pace() + seconds + _TAIL
            started()
            told, waiting = list[bytes](), iter(jobs)
            now = list(islice(waiting, self._cores))
            begun = time.monotonic()
            for wave in range(1, self.waves(k) + 1):
                beat()
                ends = begun + wave * slot
                told += self._wave(now, wave, size, ends - _TAIL)
                self._say({"do": "clear"})
                now = list(islice(waiting, self._cores))
                time.sleep(max(0.0, ends - time.monotonic()))
            return told

    def _pace(self) -> float:
        """Seconds a wave needs besides its work, tried with workers that are given nothing.

        Raises:
            SiteError: if they do not come, or take too long for anything to be answered.
        """
        slowest = 0.0
        for trial in range(1, TRIALS + 1):
            begun = time.monotonic()
            self._wave([b""] * self._cores, -trial, 0, begun + MOST)
            self._say({"do": "clear"})
            slowest = max(slowest, time.monotonic() - begun)
        if TIMES * slowest > MOST:
            why = "Its shards would run out of time and count as the default."
            raise SiteError("The site is too busy for a function on shards.", why, "Try again later.")
        return max(TIMES * slowest, LEAST)

    def _wave(self, jobs: list[bytes], wave: int, size: int, until: float) -> list[bytes]:
        self._say({"do": "spawn", "wave": wave, "count": len(jobs)})
        return converse(jobs, self._channel.fileno(), lambda: self._worker(wave), size, until)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        self._say({"do": "open"})
        self._channel.settimeout(None)
        reply = json.loads(self._channel.recv(1 << 16) or b"{}")
        while "wave" in reply:
            reply = json.loads(self._channel.recv(1 << 16) or b"{}")
        if "open" not in reply:
            raise from_wire(reply["error"]) if "error" in reply else SiteError("The site is stopping.")
        try:
            yield
        finally:
            self._say({"do": "close"})

    def _worker(self, wave: int) -> Pipes | None:
        """The worker that has just come; None if it comes late, for a wave that is over."""
        packet, fds, _, _ = socket.recv_fds(self._channel, 1 << 12, 2)
        if not packet:
            raise SiteError("The site is stopping.")
        if len(fds) == 2 and json.loads(packet).get("wave") == wave:
            return fds[0], fds[1]
        for fd in fds:
            os.close(fd)
        return None

    def _say(self, message: dict[str, object]) -> None:
        try:
            self._channel.settimeout(None)
            self._channel.send(json.dumps(message).encode())
        except OSError:
            raise SiteError("The site is stopping.") from None


def converse(
    jobs: list[bytes], arrivals: int, worker: Callable[[], Pipes | None], size: int, until: float
) -> list[bytes]:
    """Give each job to a worker and collect exactly `size` bytes and an end from each, until the time is up.

    Args:
        jobs: what is written, by job; each begins when a worker for it comes.
        arrivals: a descriptor that is readable when one has come.
        worker: gives its (reading, writing) pipe ends, or None for none of ours.
        size: bytes that an answer has; more, fewer or none give b"".
        until: on the monotonic clock.
    """
    talks, by_fd, poll = list[_Talk](), dict[int, _Talk](), select.poll()
    poll.register(arrivals, select.POLLIN)
    try:
        while (left := until - time.monotonic()) > 0 and (len(talks) < len(jobs) or by_fd):
            for fd, _ in poll.poll(left * 1000):
                if fd != arrivals:
                    by_fd[fd].step(fd)
                elif len(talks) < len(jobs) and (pipes := worker()) is not None:
                    talks.append(_Talk(*pipes, memoryview(jobs[len(talks)]), size))
                    for fd in pipes:
                        by_fd[fd] = talks[-1]
                        poll.register(fd, select.POLLIN if fd == pipes[0] else select.POLLOUT)
            for fd in [fd for fd, talk in by_fd.items() if fd in talk.over]:
                poll.unregister(fd)
                del by_fd[fd]
                os.close(fd)
    finally:
        for fd in by_fd:
            os.close(fd)
    told = [talk.told if talk.reads in talk.over and len(talk.told) == size else b"" for talk in talks]
    return told + [b""] * (len(jobs) - len(told))


class _Talk:
    """One job given to one worker, as far as it has come."""

    def __init__(self, reads: int, writes: int, job: memoryview, size: int) -> None:
        self.reads, self._job, self._size = reads, job, size
        self.told, self.over = b"", set[int]()
        for fd in (reads, writes):
            os.set_blocking(fd, False)

    def step(self, fd: int) -> None:
        """Read or write some; `over` holds the ends that are done with."""
        try:
            if fd == self.reads:
                part = os.read(fd, self._size + 1 - len(self.told))
                self.told += part
                done = not part or len(self.told) > self._size
            else:
                self._job = self._job[os.write(fd, self._job[: 1 << 16]) :]
                done = not self._job
        except BlockingIOError:
            return
        except OSError:
            done = True
        if done:
            self.over.add(fd)
