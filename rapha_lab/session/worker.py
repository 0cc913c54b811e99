"""The session's process: takes cells one at a time, asks the curator through its pipe, says what it shows.

Frames to the worker:   {"do": "run", ...}  {"do": "answer", "number", ...}
Frames from the worker: {"say": "begun"}  {"say": "output", ...}  {"say": "ask", "number", ...}  {"say": "done", ...}
The tensors of a loop's step, unless they are few, are in memory that the curator shares: {"shared": bytes}.
SIGINT interrupts the cell that has begun; while it waits for the curator, once the answer is there.
"""

from __future__ import annotations

import itertools
import queue
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, TypeVar

import msgspec

from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import CellError, RaphaError, from_wire
from rapha_lab.protocol.schema import Schema
from rapha_lab.session import (
    checking as checking,  # loaded for rapha.check, as a locked session imports nothing
)
from rapha_lab.session import interpreter, parcels
from rapha_lab.session.patients import Patients

__all__ = ["main"]

T = TypeVar("T")
_Frame = tuple[dict[str, Any], bytes]
_Inbox = queue.SimpleQueue[_Frame | str | None]
"""Frames that were read; "read" for who waits there to read further ones itself, None at the end of them."""


def main(reader: BinaryIO, writer: BinaryIO, block: memoryview | None = None) -> None:
    """Serve cells until the pipe closes; `block` is memory that the curator shares."""
    Worker(reader, writer, block).serve()


class Worker:
    """One researcher's session: a namespace that lives from cell to cell."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO, block: memoryview | None = None) -> None:
        self._reader, self._writer, self._block = reader, writer, block
        self._write_lock, self._ask_lock, self._reading = (threading.Lock() for _ in range(3))
        self._cells, self._answers = _Inbox(), _Inbox()
        self._numbers = itertools.count(1)
        self._busy = self._in_frame = self._late = False
        self.namespace: dict[str, Any] = {}
        self.screen = interpreter.Screen(lambda output: self._say({"say": "output", "output": output}))

    def serve(self) -> None:
        signal.signal(signal.SIGINT, self._interrupted)
        sys.unraisablehook = self._uncaught
        while (cell := self._next(self._cells)) is not None:
            self._run(*cell)

    def _next(self, inbox: _Inbox) -> _Frame | None:
        """The next frame for those who wait at an inbox, None if the pipe is closed.

        One of those that wait reads for all, so that no thread is woken where only one waits: for a cell the main thread,
        for an answer whichever has asked.
        """
        while True:
            if inbox.empty() and self._reading.acquire(blocking=False):
                try:
                    while inbox.empty():
                        self._read()
                finally:
                    self._reading.release()
                    other = self._cells if inbox is self._answers else self._answers
                    if other.empty():
                        other.put("read")
            if not isinstance(found := inbox.get(), str):
                return found

    def _read(self) -> None:
        frame = messages.read_frame(self._reader)
        if frame is None:
            self._cells.put(None)
            return self._answers.put(None)
        header = msgspec.json.decode(frame[0])
        (self._cells if header["do"] == "run" else self._answers).put((header, frame[1]))

    def _wholly(self, work: Callable[[], T]) -> T:
        """Write or read whole frames: half a one would end the session, so that an interrupt waits for the rest."""
        if threading.current_thread() is not threading.main_thread():
            return work()
        before, self._in_frame = self._in_frame, True
        try:
            return work()
        finally:
            self._in_frame = before
            if self._late and not before:
                self._late = False
                raise KeyboardInterrupt

    def _interrupted(self, *_: Any) -> None:
        self._late = self._busy and self._in_frame
        if self._busy and not self._in_frame:
            raise KeyboardInterrupt

    def _uncaught(self, told: Any) -> None:
        """Say in a line what was refused where nothing can catch it, as in a loop that is given up; an interrupt waits."""
        try:
            if issubclass(told.exc_type, RaphaError):
                print(told.exc_value, file=sys.stderr)
            elif issubclass(told.exc_type, KeyboardInterrupt):
                self._late = self._busy
            else:
                sys.__unraisablehook__(told)
        except KeyboardInterrupt:
            self._late = self._busy

    def _say(self, header: dict[str, Any], tensors: bytes = b"") -> None:
        self._wholly(partial(self._write, header, tensors))

    def _write(self, header: dict[str, Any], tensors: bytes) -> None:
        with self._write_lock:
            messages.write_frame(self._writer, messages.encode(header), tensors)

    def ask(self, request: messages.ASKS, tensors: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Send one request to the curator and wait for its release.

        Raises:
            RaphaError: the curator's refusal.
        """
        with self._ask_lock:
            self.screen.settle()
            asked = {
                "say": "ask",
                "number": next(self._numbers),
                "ask": msgspec.Raw(messages.encode(request)),
            }
            if self._shares(request, tensors):
                asked, tensors = asked | {"shared": len(tensors)}, b""
            header, blob = self._wholly(partial(self._answered, asked, tensors))
            if header.get("error") is not None:
                raise from_wire(header["error"])
            if (there := header["release"].get("shared")) is not None:
                assert self._block is not None
                blob = bytes(self._block[:there])
        return header["release"], blob

    def _answered(self, asked: dict[str, Any], tensors: bytes) -> _Frame:
        """What comes back for a question, which is waited for in any case: there is no other's answer on its way."""
        self._write(asked, tensors)
        while (found := self._next(self._answers)) is not None:
            if found[0]["number"] == asked["number"]:
                return found
        raise EOFError("The site has closed the session.")

    def _shares(self, request: messages.ASKS, tensors: bytes) -> bool:
        """Put a step's tensors into the shared memory; false if they are others, or too few or too many for it."""
        fits = messages.PIPED < len(tensors) <= messages.BLOCK and isinstance(request, messages.Gradient)
        if self._block is None or not fits:
            return False
        self._block[: len(tensors)] = tensors
        return True

    def _run(self, header: dict[str, Any], tensors: bytes) -> None:
        try:
            done, blob = self._outcome(header, tensors)
        except KeyboardInterrupt:  # it came just as the cell ended
            done, blob = {"error": CellError("The cell was interrupted.").to_wire()}, b""
        self._busy = self._late = False
        self._say({"say": "done", **done}, blob)

    def _outcome(self, header: dict[str, Any], tensors: bytes) -> tuple[dict[str, Any], bytes]:
        self._busy = True
        try:
            self._say({"say": "begun"})
            return self._cell(header, tensors)
        except CellError as error:
            return {"error": error.to_wire(), "traceback": error.traceback}, b""
        except RaphaError as error:
            return {"error": error.to_wire()}, b""
        except KeyboardInterrupt:
            return {"error": CellError("The cell was interrupted.").to_wire()}, b""
        except BaseException as error:  # of a value that was to travel
            failed = interpreter.cell_error(error, header["name"])
            return {"error": failed.to_wire(), "traceback": failed.traceback}, b""
        finally:
            self._busy = False

    def _cell(self, header: dict[str, Any], tensors: bytes) -> tuple[dict[str, Any], bytes]:
        schema = Schema.from_dict(header["schema"])
        self.namespace.update(parcels.unpack(header["inputs"], tensors, into=self.namespace))
        released = self.screen.release
        self.namespace["patients"] = Patients(schema, self.ask, epsilon=header["epsilon"], released=released)
        interpreter.run(header["source"], self.namespace, self.screen, header["name"])
        return parcels.pack(self.namespace, header["outputs"])
