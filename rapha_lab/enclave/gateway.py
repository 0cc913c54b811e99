"""The site's HTTP face: evidence for anyone, and one door for sealed envelopes.

    GET  /evidence?nonce=HEX   attestation evidence bound to the nonce and to the site's keys
    POST /open                 a sealed, signed request; the reply is sealed to the sender

Nothing but evidence crosses the wire unsealed. An envelope that cannot be opened is answered with a plain
error that depends on nothing inside the enclave.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

import anyio
import anyio.to_thread
import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rapha_lab.enclave.cell import Order
from rapha_lab.enclave.cells import Cells
from rapha_lab.enclave.identity import Login
from rapha_lab.enclave.limits import Amounts, Limits, Queue, Turns, neighbourhood
from rapha_lab.enclave.wire import Bodies
from rapha_lab.protocol import messages, sealing
from rapha_lab.protocol.errors import (
    EvidenceError,
    PolicyError,
    RaphaError,
    RefusedError,
    RequestError,
    SealError,
    SiteError,
)
from rapha_lab.protocol.keys import PrivateKey, PublicKey
from rapha_lab.protocol.quote import Inquiries

__all__ = ["Gateway"]

MAX_BODY = 256 << 20
GOING = 2 << 30
"""Bytes of answers that may be on their way to one researcher, of which the largest takes a little more than half."""
ROOMS, MINE, WAITING = 64, 16, 8
"""Requests that are answered at once, of all and of one researcher; and how many of these may wait for news of a cell."""

Body = AbstractAsyncContextManager[bytes]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Watch(msgspec.Struct, forbid_unknown_fields=True):
    """Wait for more of a cell: outputs after the first `after`, for at most `wait` seconds."""

    cell: str
    after: int = 0
    wait: float = 0.0
    state: str = ""
    step: int = -1


class Name(msgspec.Struct, forbid_unknown_fields=True):
    """Names a cell."""

    id: str = ""


class End(msgspec.Struct, forbid_unknown_fields=True):
    """Names a session, or all of them, to end: now, or once it has no job."""

    id: str = ""
    idle: bool = False


class Text(msgspec.Struct, forbid_unknown_fields=True):
    """Names something in the airlock, or holds a custodian's signed word on it."""

    text: Annotated[str, msgspec.Meta(max_length=16384)] = ""


class Range(msgspec.Struct, forbid_unknown_fields=True):
    """Asks for a part of the log: from a size on, to another one or to today's."""

    start: Size = 0
    end: Size | None = None


class Token(msgspec.Struct, forbid_unknown_fields=True):
    """An ID token of the hospital's identity provider."""

    token: Annotated[str, msgspec.Meta(max_length=16_384)]


class Gateway:
    """Opens envelopes, knows who sent them, and answers sealed.

    Args:
        cells: runs cells.
        card: what the site says of itself to a researcher, by their public key.
        log: entries of the log from an index on.
        extends: proof that the log of one size, today's if None, begins with that of an earlier size.
        quote: prices questions of a researcher, free, without a record.
        evidence: attestation evidence for a nonce, as JSON.
        sealing_key, signing_key: of this enclave; both are bound in the evidence.
        identity: hash of the binding in the evidence; requests must have been sealed for it.
        known: raises PolicyError for a key that the policy names neither as a researcher's nor as a custodian's.
        in_force: raises PolicyError, with what is wrong, if no policy is; told to known keys alone.
        custody: by kind, what is asked of the airlock: (who, text) -> result and tensors.
        login: where the hospital has an identity provider, who is logged in.
        pages: further routes, given what counts a stranger's requests and what receives their bodies.
    """

    def __init__(
        self,
        cells: Cells,
        *,
        card: Callable[[str], Any],
        log: Callable[[int], Any],
        extends: Callable[[int, int | None], Any],
        quote: Callable[[str, Inquiries], Any],
        evidence: Callable[[bytes], Any],
        sealing_key: PrivateKey,
        signing_key: PrivateKey,
        identity: Callable[[], bytes],
        known: Callable[[str], None],
        custody: Mapping[str, Callable[[str, str], tuple[Any, bytes]]],
        in_force: Callable[[], object] = lambda: None,
        login: Login | None = None,
        pages: Callable[[Callable[[Request], None], Callable[[Request, int], Body]], Sequence[Route]] = (
            lambda admit, body: ()
        ),
    ) -> None:
        self._cells, self._card, self._log, self._evidence, self._known = cells, card, log, evidence, known
        self._sealing, self._signing, self._replay = sealing_key, signing_key, sealing.Replay()
        self._identity, self._login, self._pages, self._in_force = identity, login, pages, in_force
        self.strangers, self.researchers = Limits(10.0, 100), Limits(20.0, 1000)
        self.bodies = Bodies()
        self._turns, self._waits = Turns(MINE, ROOMS), Turns(WAITING, ROOMS - MINE)
        self._orders, self._replies, self._going = Queue(), Queue(), Amounts()
        # strangers wait for each other, never researchers for strangers
        self._hardware, self._rooms = anyio.CapacityLimiter(2), anyio.CapacityLimiter(ROOMS)
        self._kinds: dict[str, Callable[[str, bytes, bytes], tuple[Any, bytes]]] = {
            "card": lambda who, header, blob: (self._card(who), b""),
            "run": self._run,
            "watch": self._watch,
            "cancel": self._cancel,
            "end": self._end,
            "log": lambda who, header, blob: (self._log(_read(header, Range).start), b""),
            "extends": lambda who, header, blob: (extends(*_range(header)), b""),
            "quote": lambda who, header, blob: (quote(who, _read(header, Inquiries)), b""),
            "login": self._enter,
        }
        self._kinds |= {kind: _worded(answer) for kind, answer in custody.items()}

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [Route("/evidence", self._get_evidence), Route("/open", self._post_open, methods=["POST"])]
        pages = self._pages(
            lambda request: self.strangers.admit(_stranger(request)),
            lambda request, limit: self.bodies.read(request, _stranger(request), limit),
        )
        return Starlette(routes=[*routes, *pages])

    async def _get_evidence(self, request: Request) -> Response:
        try:
            nonce = bytes.fromhex(request.query_params.get("nonce", ""))
        except ValueError:
            nonce = b""
        if len(nonce) != 32:
            error = RequestError(
                "The nonce is no 32 bytes in hex.", "", "GET /evidence?nonce=<64 hex digits>", field="nonce"
            )
            return JSONResponse(error.to_wire(), 400)
        try:
            self.strangers.admit(_stranger(request))
            evidence = await anyio.to_thread.run_sync(self._evidence, nonce, limiter=self._hardware)
        except RaphaError as error:  # too many ask, no policy is in force, or the hardware gave nothing
            return JSONResponse(_to_anybody(error).to_wire(), 429 if isinstance(error, SiteError) else 503)
        return Response(messages.encode(evidence), media_type="application/json")

    async def _post_open(self, request: Request) -> Response:
        stranger = _stranger(request)
        try:
            self.strangers.admit(stranger, cost=0)
            async with self.bodies.read(request, stranger, MAX_BODY) as body:
                response = await anyio.to_thread.run_sync(self.answer, body, limiter=self._rooms)
                if response.status_code == 400:  # it did not open, so nobody known sent it
                    self.strangers.admit(stranger, cost=1 + len(body) / (8 << 20))
                return response
        except RequestError as error:
            return JSONResponse(error.to_wire(), 413)
        except SiteError as error:
            return JSONResponse(error.to_wire(), 429)
        except ClientDisconnect:
            return Response(status_code=400)

    def answer(self, envelope: bytes) -> Response:
        """Open one envelope and seal the answer to its sender."""
        try:
            request = sealing.open_request(
                envelope,
                key=self._sealing,
                evidence_hash=self._identity(),
                replay=self._replay,
                known=self._is_known,
            )
        except RaphaError as error:
            return JSONResponse(_to_anybody(error).to_wire(), 400)
        researcher = str(request.researcher)
        try:
            self._in_force()
            self._known(researcher)
            self.researchers.admit(researcher)
            if self._login is not None and request.kind != "login":
                self._login.require(researcher)
            with self._turns.take(researcher) as free:
                if not free:
                    why = f"The site answers {MINE} requests of one researcher at once."
                    raise SiteError("Too many requests.", why, "Wait for their answers, then go on.")
                header, blob = self._dispatch(request.kind, researcher, request.body)
        except RaphaError as error:
            header, blob = {"error": error.to_wire()}, b""
        except Exception:
            header, blob = {"error": RefusedError("The site met an internal error.").to_wire()}, b""
        with self._replies.alone(researcher):
            framed = _frame(header, blob)
            if self._going.of(researcher) + len(framed) > GOING:
                why = f"{self._going.of(researcher) >> 20} MiB of answers to you are on their way."
                busy = SiteError("Too much is on its way to you.", why, "Take what was answered, then go on.")
                framed = _frame({"error": busy.to_wire()}, b"")
            sealed = sealing.seal_reply(request.kind, framed, request=request, site=self._signing)
            return _Reply(sealed, self._going, researcher)

    def _is_known(self, researcher: PublicKey) -> bool:
        try:
            self._known(str(researcher))
        except RaphaError:
            return False
        return True

    def _dispatch(self, kind: str, researcher: str, body: bytes) -> tuple[Any, bytes]:
        if kind not in self._kinds:
            raise RequestError(
                f"{kind!r} is no request of this site.", f"It knows {', '.join(self._kinds)}.", field="kind"
            )
        frame = messages.read_frame(io.BytesIO(body))
        if frame is None:
            raise RequestError("The request is empty.")
        result, blob = self._kinds[kind](researcher, *frame)
        return {"result": result}, blob

    def _enter(self, who: str, header: bytes, blob: bytes) -> tuple[Any, bytes]:
        if self._login is None:
            raise RequestError("This site asks for no login.", "Your key is enough.", field="token")
        return {"until": self._login.enter(who, _read(header, Token).token)}, b""

    def _run(self, who: str, header: bytes, blob: bytes) -> tuple[Any, bytes]:
        with self._orders.alone(who):  # many that begin sessions at once would keep others from beginning one
            return {"cell": self._cells.submit(who, _read(header, Order), blob).id}, b""

    def _watch(self, who: str, header: bytes, blob: bytes) -> tuple[Any, bytes]:
        watch = _read(header, Watch)
        cell = self._cells.get(who, watch.cell)
        with self._waits.take(who) as free:  # where too many wait, one is told soon how things stand
            wait = watch.wait if free else min(watch.wait, 0.1)
            self._cells.watch(cell, watch.after, wait, (watch.state, watch.step))
        outputs = cell.outputs[watch.after :]
        told = cell.summary() | {"outputs": outputs, "error": cell.error, "traceback": cell.traceback}
        return told | {"values": cell.values}, cell.blob

    def _cancel(self, who: str, header: bytes, blob: bytes) -> tuple[Any, bytes]:
        cell = self._cells.get(who, _read(header, Name).id)
        self._cells.cancel(cell)
        return cell.summary(), b""

    def _end(self, who: str, header: bytes, blob: bytes) -> tuple[Any, bytes]:
        asked = _read(header, End)
        self._cells.end(who, asked.id or None, idle=asked.idle)
        return {}, b""


class _Reply(Response):
    """A sealed answer, which counts to its researcher's until it was sent, or cannot be."""

    def __init__(self, sealed: bytes, going: Amounts, researcher: str) -> None:
        super().__init__(sealed, media_type="application/octet-stream")
        self._going, self._researcher = going, researcher
        going.add(researcher, len(sealed))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._going.add(self._researcher, -len(self.body))


def _to_anybody(error: RaphaError) -> RaphaError:
    """An error as it may be told to whom nobody knows: what is wrong with a policy names custodians and is not."""
    if isinstance(error, SiteError | EvidenceError | SealError):
        return error
    return PolicyError(
        "No policy is in force at this site.",
        "Why is told to nobody from outside.",
        "Ask its custodians: rapha-lab policy check says what is missing.",
    )


def _stranger(request: Request) -> str:
    return neighbourhood(request.client.host if request.client else "")


def _range(header: bytes) -> tuple[int, int | None]:
    asked = _read(header, Range)
    return asked.start, asked.end


def _worded(
    answer: Callable[[str, str], tuple[Any, bytes]],
) -> Callable[[str, bytes, bytes], tuple[Any, bytes]]:
    return lambda who, header, blob: answer(who, _read(header, Text).text)


def _read(header: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(header, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise messages.malformed(error) from None


def _frame(header: Any, blob: bytes) -> bytes:
    buffer = io.BytesIO()
    messages.write_frame(buffer, messages.encode(header), blob)
    return buffer.getvalue()
