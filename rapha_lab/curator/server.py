"""The curator's process: frames in on one pipe, frames out on another. It opens no socket.

in   {"do": "ask", "id", "researcher", "project"}, and the session's request with its tensors as a second frame
     {"do": "cancel", "id"}   {"do": "sweep", "id": cell}   {"do": "catalog", "id", "project"}   {"do": "log", "id", "start"}
out  {"id", "step", "steps", "spent", "doing"}   {"id", "release" | "result" | "error"}
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO

import msgspec

from rapha_lab.curator import clock
from rapha_lab.curator.ahead import Idle
from rapha_lab.curator.blocks import Blocks
from rapha_lab.curator.desk import Caller, Cancelled, Desk
from rapha_lab.curator.pool import Pool
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RaphaError, RefusedError
from rapha_lab.protocol.quote import Inquiries
from rapha_lab.protocol.release import Release

__all__ = ["Server"]

WORKERS = 4

SHORT = 1 << 16
"""Bytes of a request up to which it may be short: longer ones are not even looked at before their turn."""


class Call(msgspec.Struct, forbid_unknown_fields=True):
    """One frame to the curator from the gateway."""

    do: str
    id: str
    researcher: str = ""
    project: str = ""
    start: int = 0
    end: int | None = None
    text: str = ""
    quote: Inquiries | None = None
    block: int = -1
    shared: int = 0


class Server:
    """Serves a desk over a pair of pipes until the first is closed.

    Args:
        desk: answers requests.
        free: what costs nothing because it holds nothing of a patient, by name: (call) -> JSON, or JSON and tensors.
        blocks: memory that sessions share, for the tensors of loops' steps.
    """

    def __init__(
        self,
        desk: Desk,
        free: dict[str, Callable[[Call], Any]],
        reader: BinaryIO,
        writer: BinaryIO,
        blocks: Blocks,
    ) -> None:
        self._blocks = blocks
        self._desk, self._free, self._reader, self._writer = desk, free, reader, writer
        self._lock = threading.Lock()
        self._cancelled: set[str] = set()
        self._pool = Pool(WORKERS, "ask")
        # long trainings must keep nobody from the site's evidence, its log or their budget
        self._quick = ThreadPoolExecutor(1, thread_name_prefix="look-up")
        self._pricing = ThreadPoolExecutor(1, thread_name_prefix="quote")

    def serve(self) -> None:
        """Read frames until the gateway closes the pipe."""
        while (frame := messages.read_frame(self._reader)) is not None:
            try:
                call = msgspec.json.decode(frame[0], type=Call)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                print("a frame of the gateway's did not read", file=sys.stderr)
                continue
            if call.do == "cancel":
                self._cancelled.add(call.id)
                self._drop(call.id)
            elif call.do == "sweep":
                self._quick.submit(self._desk.sweep, call.id)
            elif call.do == "quote":
                self._pricing.submit(self._look_up, call)
            elif call.do == "collect":
                asked = self._desk.collect, clock.now(), call.text
                self._pool.submit(call.researcher, self._reply, call, *asked, name=call.id)
            elif call.do != "ask":
                self._quick.submit(self._look_up, call)
            elif (request := messages.read_frame(self._reader)) is not None:
                long = _long(request[0])
                self._pool.submit(
                    call.researcher, self._answer, call, *request, clock.now(), name=call.id, long=long
                )
                if call.id in self._cancelled:
                    self._drop(call.id)
        self._cancelled.add("*")
        self._pool.close()

    def _say(self, header: dict[str, Any], tensors: bytes = b"") -> None:
        with self._lock:
            messages.write_frame(self._writer, messages.encode(header), tensors)

    def _by_block(self, block: int, header: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        """What to say of a step's answer: with its tensors, or with how many bytes of them its session's memory now has."""
        if block < 0 or not messages.PIPED < len(blob) <= messages.BLOCK:
            return header, blob
        self._blocks.write(block, blob)
        return header | {"release": header["release"] | {"shared": len(blob)}}, b""

    def _leave(self, header: dict[str, Any], tensors: bytes, came: float) -> None:
        """Say an answer or refusal at the next whole quantum after its request came."""
        clock.wait(came)
        self._say(header, tensors)

    def _drop(self, job: str) -> None:
        """Answer a cancelled job that still waits, perhaps for the long ones of its own researcher, and forget it."""
        if self._pool.drop(job):
            self._cancelled.discard(job)
            refusal = Cancelled("The job was cancelled.", "It had not begun.", "Run it again.")
            self._quick.submit(self._say, {"id": job, "error": refusal.to_wire()})

    def _answer(self, call: Call, request: bytes, tensors: bytes, came: float) -> Idle | None:
        later = list[Idle]()

        def on_step(done: int, planned: int, spent: float, doing: str = "") -> None:
            if not self._cancelled.isdisjoint((call.id, "*")):
                raise Cancelled(
                    "The job was cancelled.", "The steps that had run stay charged.", "Run it again."
                )
            if doing or planned > 1:
                told = {"step": done, "steps": planned, "spent": spent, "doing": doing}
                self._say({"id": call.id, **told})

        def answer(caller: Caller) -> tuple[Release | dict[str, Any], bytes]:
            shared = partial(self._blocks.read, call.block, call.shared) if call.shared else None
            return self._desk.answer(caller, request, tensors, on_step, later.append, shared)

        self._reply(call, answer, came)
        return later[0] if later else None

    def _reply(self, call: Call, answer: Callable[..., Any], came: float, *asked: Any) -> None:
        try:
            caller = Caller(call.researcher, call.project, call.id)
            release, blob = answer(caller, *asked)
            # a step of a loop is the same work whoever is drawn, and there are thousands
            leave = (
                self._leave
                if isinstance(release, Release)
                else lambda header, blob, _: self._say(*self._by_block(call.block, header, blob))
            )
            leave({"id": call.id, "release": release}, blob, came)
        except RaphaError as error:
            self._leave({"id": call.id, "error": error.to_wire()}, b"", came)
        except BaseException as error:
            print(f"job {call.id}: {type(error).__name__}", file=sys.stderr)
            refusal = RefusedError("The request could not be answered.", "An internal error ended it.")
            self._leave({"id": call.id, "error": refusal.to_wire()}, b"", came)
        finally:
            self._cancelled.discard(call.id)

    def _look_up(self, call: Call) -> None:
        try:
            told = self._free[call.do](call)
            result, blob = told if isinstance(told, tuple) else (told, b"")
            self._say({"id": call.id, "result": result}, blob)
        except RaphaError as error:
            self._say({"id": call.id, "error": error.to_wire()})
        except Exception as error:
            print(f"{call.do}: {type(error).__name__}", file=sys.stderr)
            refusal = RefusedError(f"{call.do} could not be answered.", "An internal error ended it.")
            self._say({"id": call.id, "error": refusal.to_wire()})


def _long(request: bytes) -> bool:
    """Whether it may take long: a training, an evaluation, functions, or the first step of a program, which is compiled."""
    if len(request) > SHORT:
        return True
    try:
        ask = messages.decode(request)
    except RaphaError:
        return False  # it is refused at once
    if isinstance(ask, messages.Gradient):
        return ask.program is not None
    return isinstance(ask, messages.Fit | messages.Evaluate | messages.Shards | messages.Review)
