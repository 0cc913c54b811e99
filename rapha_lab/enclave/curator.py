"""Keeps the curator's process alive and carries requests to it; the only way from the gateway to records."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from rapha_lab.enclave.cores import CURATOR
from rapha_lab.enclave.sandbox import widen
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RaphaError, SiteError, from_wire

__all__ = ["Curator", "CuratorLost"]

Progress = Callable[[int, int, float, str], None]


THREADS = {"OMP_NUM_THREADS": str(len(CURATOR))}
"""Threads of one step, where the operator sets none. They wait for each other by spinning: with more than it has cores,
a small step takes twice the processor time and, once anything else runs, twice as long."""


Reply = tuple[dict[str, Any], bytes]


class _Waiting:
    """A call that waits for its replies, and the process that has them: "read" says to read, None that it is lost."""

    def __init__(self) -> None:
        self.replies: queue.SimpleQueue[Reply | Literal["read"] | None] = queue.SimpleQueue()
        self.process: subprocess.Popen[bytes] | None = None


class Curator:
    """A curator subprocess on two pipes, started again if it dies.

    It loads its libraries from the start; `open` gives it its configuration and waits until it is ready.

    Args:
        workers: gives a channel over which it may ask for workers, one for each process.
        blocks: descriptors of the memory that it shares with sessions.
    """

    def __init__(self, workers: Callable[[], socket.socket], blocks: Sequence[int] = ()) -> None:
        self._workers, self._blocks = workers, list(blocks)
        self._config: dict[str, Any] = {}
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[str, _Waiting] = {}
        self._closed = False
        self._process = self._launch()

    def open(self, config: dict[str, Any]) -> None:
        """Have it open the records and the ledger.

        Args:
            config: policy, ledger, datasets, keys: see `rapha_lab.curator.__main__.Config`.

        Raises:
            RaphaError: what is wrong with them.
        """
        self._config = config
        self._configure(self._process)

    def _launch(self) -> subprocess.Popen[bytes]:
        # -I: nothing of the working directory or the environment's PYTHON* is imported
        command = [sys.executable, "-I", "-m", "rapha_lab.curator"]
        with self._workers() as channel:
            self._channel = channel.fileno()
            process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[channel.fileno(), *self._blocks],
                bufsize=messages.BUFFER,
                env=THREADS | os.environ,
            )
        os.sched_setaffinity(process.pid, CURATOR)  # before it has threads, which inherit it
        widen(process.stdin.fileno(), process.stdout.fileno())  # type: ignore[union-attr]
        return process

    def _configure(self, process: subprocess.Popen[bytes]) -> None:
        try:
            config = self._config | {"workers": self._channel, "blocks": self._blocks}
            messages.write_frame(process.stdin, messages.encode(config))  # type: ignore[arg-type]
            first = messages.read_frame(process.stdout)  # type: ignore[arg-type]
        except (OSError, messages.RequestError):
            first = None
        if first is None:
            process.wait()
            raise SiteError(
                "The curator did not start.", "Its process ended at once.", "See what it wrote above."
            )
        ready = msgspec.json.decode(first[0])
        if "error" in ready:
            process.wait()
            raise from_wire(ready["error"])

    @property
    def pid(self) -> int:
        """The process id, for the site's operator."""
        return self._process.pid

    def _reply(self, mine: _Waiting) -> Reply | None:
        """The next reply to a call, None if its process died.

        One of those that wait reads for all, so that no thread is woken where only one waits.
        """
        while True:
            if mine.replies.empty() and self._reading.acquire(blocking=False):
                try:
                    while mine.replies.empty():
                        self._read(mine.process)  # type: ignore[arg-type]
                finally:
                    self._reading.release()
            if (reply := mine.replies.get()) != "read":
                return reply

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on the next reply, or its end, to whom it concerns."""
        try:
            frame = messages.read_frame(process.stdout)  # type: ignore[arg-type]
        except (messages.RequestError, MemoryError):
            frame = None  # killed in the middle of one; or what follows in the pipe is none
        if frame is None:
            process.kill()
            process.wait()
            with self._lock:
                self._lose(process)
            return
        header = msgspec.json.decode(frame[0])
        with self._lock:
            waiting = self._waiting.get(header["id"])
        if waiting is not None:
            waiting.replies.put((header, frame[1]))

    def _lose(self, process: subprocess.Popen[bytes]) -> None:
        for waiting in self._waiting.values():
            if waiting.process is process:
                waiting.replies.put(None)

    def _leave(self, number: str) -> None:
        """End a call; whoever else waits has to read now, if nobody does."""
        with self._lock:
            self._waiting.pop(number, None)
            other = next(iter(self._waiting.values()), None)
        if other is not None and not self._reading.locked():
            other.replies.put("read")

    def _send(self, header: dict[str, Any], *request: bytes, waiting: _Waiting | None = None) -> None:
        """Write a frame, and a request and its tensors as a second one: a session's bytes are in no header of ours."""
        with self._lock:
            if self._closed:
                raise SiteError("The site is stopping.")
            if self._process.poll() is not None:
                self._lose(self._process)  # who reads now reads another's pipe
                self._process = self._launch()
                self._configure(self._process)
            if waiting is not None:
                waiting.process = self._process
                self._waiting[header["id"]] = waiting
            try:
                messages.write_frame(self._process.stdin, messages.encode(header), more=bool(request))  # type: ignore[arg-type]
                if request:
                    messages.write_frame(self._process.stdin, *request)  # type: ignore[arg-type]
            except BrokenPipeError:
                raise _lost() from None
            except BaseException:
                self._process.kill()  # it would take what comes next for the rest, and a session's bytes for ours
                raise

    def ask(
        self,
        job: str,
        researcher: str,
        project: str,
        request: bytes,
        tensors: bytes,
        on_step: Progress,
        block: int = -1,
        shared: int = 0,
    ) -> tuple[dict[str, Any], bytes]:
        """Carry one request; gives the release as JSON and its tensors.

        Args:
            block: the number of the memory that its session shares, for the tensors of a loop's step.
            shared: how many bytes of tensors are there already.

        Raises:
            RaphaError: the curator's refusal; CuratorLost if its process died.
        """
        who = {"id": job, "researcher": researcher, "project": project}
        header = {"do": "ask", **who, "block": block, "shared": shared}
        return self._call(header, on_step, request, tensors)

    def look_up(self, what: str, **fields: Any) -> Any:
        """Ask for something that costs nothing: the catalog, the log."""
        return self.fetch(what, **fields)[0]

    def fetch(self, what: str, **fields: Any) -> tuple[Any, bytes]:
        """As `look_up`, with the tensors that come with it."""
        number = f"look-up-{next(self._numbers)}"
        return self._call({"do": what, "id": number, **fields}, lambda *_: None)

    def _call(
        self, header: dict[str, Any], on_step: Progress, *request: bytes
    ) -> tuple[dict[str, Any], bytes]:
        mine = _Waiting()
        try:
            self._send(header, *request, waiting=mine)
            while (reply := self._reply(mine)) is not None:
                said, blob = reply
                if "step" in said:
                    on_step(said["step"], said["steps"], said["spent"], said["doing"])
                elif "error" in said:
                    raise from_wire(said["error"])
                else:
                    return said["release"] if "release" in said else said["result"], blob
            raise _lost()
        finally:
            self._leave(header["id"])

    def collect(self, researcher: str, subject: str) -> tuple[dict[str, Any], bytes]:
        """An approved answer of the researcher's that waited in the airlock, as `ask` gives it."""
        number = f"collect-{next(self._numbers)}"
        header = {"do": "collect", "id": number, "researcher": researcher, "text": subject}
        return self._call(header, lambda *_: None)

    def cancel(self, job: str) -> None:
        """Stop a job before its next step; does nothing if it has ended."""
        self._send({"do": "cancel", "id": job})

    def sweep(self, cell: str) -> None:
        """Close what a cell that ended left open."""
        with contextlib.suppress(RaphaError):
            self._send({"do": "sweep", "id": cell})

    def close(self) -> None:
        """End the process; a running job keeps what it had spent."""
        with self._lock:
            self._closed = True
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class CuratorLost(SiteError):
    """The curator's process died before it answered."""


def _lost() -> CuratorLost:
    return CuratorLost(
        "The curator's process ended while it worked.",
        "It has been started again; the steps that had run stay charged.",
        "Run the cell again.",
    )
