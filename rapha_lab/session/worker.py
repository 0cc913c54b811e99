"""The session's process: takes cells one at a time, asks the curator through its pipe, says what it shows.

Frames to the worker:   {"do": "run", ...}  {"do": "answer", "number", ...}
Frames from the worker: {"say": "begun"}  {"say": "output", ...}  {"say": "ask", "number", ...}  {"say": "done", ...}
The tensors of a loop's step, if they are large, are in memory that the curator shares: {"shared": bytes}.
SIGINT interrupts the cell that has begun.
"""

from __future__ import annotations

import itertools
import queue
import signal
import sys
import threading
from typing import Any, BinaryIO

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


def main(reader: BinaryIO, writer: BinaryIO, block: memoryview | None = None) -> None:
    """Serve cells until the pipe closes; `block` is memory that the curator shares."""
    Worker(reader, writer, block).serve()


class Worker:
    """One researcher's session: a namespace that lives from cell to cell."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO, block: memoryview | None = None) -> None:
        self._reader, self._writer, self._block = reader, writer, block
        self._unanswered = 0
        self._write_lock, self._ask_lock = threading.Lock(), threading.Lock()
        self._cells: queue.SimpleQueue[tuple[dict[str, Any], bytes] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self._busy = self._writing = self._late = False
        self.namespace: dict[str, Any] = {}
        self.screen = interpreter.Screen(lambda output: self._say({"say": "output", "output": output}))

    def serve(self) -> None:
        signal.signal(signal.SIGINT, self._interrupted)
        sys.unraisablehook = self._uncaught
        threading.Thread(target=self._listen, daemon=True).start()
        while (cell := self._cells.get()) is not None:
            self._run(*cell)

    def _listen(self) -> None:
        while (frame := messages.read_frame(self._reader)) is not None:
            header, tensors = msgspec.json.decode(frame[0]), frame[1]
            if header["do"] == "run":
                self._cells.put((header, tensors))
            elif header["do"] == "answer":
                self._answers.put((header, tensors))
        self._cells.put(None)

    def _interrupted(self, *_: Any) -> None:
        self._late = self._busy and self._writing
        if self._busy and not self._writing:
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
        main = threading.current_thread() is threading.main_thread()
        with self._write_lock:
            self._writing = main  # half a frame would end the session: an interrupt waits for the rest
            try:
                messages.write_frame(self._writer, messages.encode(header), tensors)
            finally:
                self._writing = False
        if main and self._late:
            self._late = False
            raise KeyboardInterrupt

    def ask(self, request: messages.ASKS, tensors: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Send one request to the curator and wait for its release.

        Raises:
            RaphaError: the curator's refusal.
        """
        with self._ask_lock:
            self.screen.settle()
            number = next(self._numbers)
            asked = {"say": "ask", "number": number, "ask": msgspec.Raw(messages.encode(request))}
            if shared := self._shares(request, tensors):
                asked, tensors = asked | {"shared": shared}, b""
            self._unanswered += 1
            self._say(asked, tensors)
            header, blob = self._answered()
            while header["number"] != number:  # of a question whose cell was interrupted
                header, blob = self._answered()
            if header.get("error") is not None:
                raise from_wire(header["error"])
            if (there := header["release"].get("shared")) is not None:
                assert self._block is not None
                blob = bytes(self._block[:there])
        return header["release"], blob

    def _answered(self) -> tuple[dict[str, Any], bytes]:
        header, blob = self._answers.get()
        self._unanswered -= 1
        return header, blob

    def _shares(self, request: messages.ASKS, tensors: bytes) -> int:
        """How many bytes of a step's tensors were put into the shared memory.

        None where an answer to an earlier question may still come there, as after an interrupt.
        """
        fits = messages.BUFFER < len(tensors) <= messages.BLOCK and isinstance(request, messages.Gradient)
        if self._block is None or not fits or self._unanswered:
            return 0
        self._block[: len(tensors)] = tensors
        return len(tensors)

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
