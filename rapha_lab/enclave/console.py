"""A small web page on which custodians see what waits in the airlock. It signs nothing and is given no key.

A page comes from the very site that it is there to control, so it must never hold what can sign: it gives out a
file, `rapha-lab review sign` shows and signs it on the custodian's own machine, and the signed line is pasted
back. To read is let in who signs a challenge with a custodian's key. What the page shows travels by TLS, which may end
outside of the enclave: who wants it sealed to the attested key uses `rapha-lab review`.

    GET  /console            the page, and /console.js, /console.css beside it
    POST /console/challenge  what to sign to be let in
    POST /console/login      the signed challenge; gives a token that is good for half an hour
    POST /console/items, /console/item, /console/decide, /console/state   with the token; as the sealed requests of that name
    POST /console/inputs     with the token; the tensors of a function's inputs, as its researcher sent them
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import threading
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib import resources
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rapha_lab.protocol import messages
from rapha_lab.protocol.decision import Decision, login_bytes
from rapha_lab.protocol.errors import PolicyError, RaphaError, RefusedError
from rapha_lab.protocol.keys import PublicKey

__all__ = ["Console"]

FRESH, GOOD, BODY = 300.0, 1800.0, 1 << 16
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_FILES = {
    "": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}


class Login(msgspec.Struct, forbid_unknown_fields=True):
    """A signed challenge."""

    challenge: str
    key: str
    signature: str


class Word(msgspec.Struct, forbid_unknown_fields=True):
    """Names something, or holds a signed line."""

    text: str = ""


class Console:
    """Serves the page and what it asks.

    Args:
        site: the site's name, which is part of what is signed.
        ask: (what, who, text) -> result and tensors: the curator's answers about the airlock, as for sealed requests.
        policy: hash of the policy in force, in hex, for a veto.
        is_custodian: whether a public key is a custodian's of the policy in force.
        admit: raises SiteError if a stranger of that address asks too often.
        body: receives a request's body, up to a size, in bearable time.
    """

    def __init__(
        self,
        site: str,
        ask: Callable[[str, str, str], tuple[Any, bytes]],
        policy: Callable[[], str],
        is_custodian: Callable[[str], bool],
        admit: Callable[[Request], None],
        body: Callable[[Request, int], AbstractAsyncContextManager[bytes]],
    ) -> None:
        self._site, self._ask, self._policy = site, ask, policy
        self._is_custodian, self._admit, self._body = is_custodian, admit, body
        self._lock = threading.Lock()
        self._secret, self._used = os.urandom(32), dict[str, float]()
        self._tokens: dict[str, tuple[str, float]] = {}

    def routes(self) -> list[Route]:
        """Where it answers."""
        pages = [Route(f"/console{name}", self._file(name)) for name in _FILES]
        calls: dict[str, Callable[[Request, bytes], Any]] = {
            "challenge": self._challenge,
            "login": self._login,
        }
        calls |= {name: self._call(name) for name in ("items", "item", "inputs", "decide", "state")}
        return pages + [
            Route(f"/console/{name}", self._answering(call), methods=["POST"]) for name, call in calls.items()
        ]

    @staticmethod
    def _file(name: str) -> Callable[[Request], Response]:
        text = resources.files("rapha_lab.enclave").joinpath(f"console{name or '.html'}").read_bytes()
        return lambda request: Response(text, media_type=_FILES[name], headers=_HEADERS)

    def _challenge(self, request: Request, body: bytes) -> Any:
        self._admit(request)
        return {
            "sign": "log-in",
            "site": self._site,
            "challenge": self._made(os.urandom(16), time.monotonic()),
        }

    def _made(self, number: bytes, at: float) -> str:
        """A challenge of that moment. None is remembered before it was signed: strangers could fill any list."""
        told = number + struct.pack(">d", at)
        return (told + hmac.digest(self._secret, told, hashlib.sha256)).hex()

    def _fresh(self, challenge: str) -> bool:
        told = _hex(challenge)[:24]
        if len(told) < 24 or not hmac.compare_digest(
            self._made(told[:16], at := struct.unpack(">d", told[16:])[0]).encode(), challenge.encode()
        ):
            return False
        return 0 <= time.monotonic() - at < FRESH

    def _login(self, request: Request, body: bytes) -> Any:
        self._admit(request)
        said = _read(body, Login)
        held = self._fresh(said.challenge) and PublicKey.parse(said.key).verifies(
            _hex(said.signature), login_bytes(self._site, said.challenge)
        )
        if not held or not self._is_custodian(said.key):
            raise PolicyError(
                "You were not let in.", "The line is stale, or signed by no custodian.", "Begin again."
            )
        token = os.urandom(32).hex()
        with self._lock:
            now = time.monotonic()
            self._used = {c: until for c, until in self._used.items() if until > now}
            if said.challenge in self._used:
                raise PolicyError("You were not let in.", "The line was used before.", "Begin again.")
            self._used[said.challenge] = now + FRESH
            self._tokens = {t: (k, until) for t, (k, until) in self._tokens.items() if until > now}
            self._tokens[token] = said.key, now + GOOD
        return {"token": token, "key": said.key, "policy": self._policy()}

    def _call(self, name: str) -> Callable[[Request, bytes], Any]:
        def call(request: Request, body: bytes) -> Any:
            who = self._who(request)
            text = _read(body, Word).text
            if name == "decide" and Decision.decode(text).key != who:
                raise PolicyError(
                    "This line is signed by another key than you logged in with.", "", "Log in with it."
                )
            told, blob = self._ask({"items": "airlock"}.get(name, name), who, text)
            return blob if name == "inputs" else told

        return call

    def _who(self, request: Request) -> str:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        with self._lock:
            key, until = self._tokens.get(token, ("", 0.0))
        if not key:
            self._admit(request)
        if until <= time.monotonic() or not self._is_custodian(key):
            raise PolicyError("You are not logged in.", "A log-in is good for half an hour.", "Log in.")
        return key

    def _answering(self, call: Callable[[Request, bytes], Any]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                async with self._body(request, BODY) as body:
                    told = await run_in_threadpool(call, request, body)
                if isinstance(told, bytes):
                    return Response(told, media_type="application/octet-stream", headers=_HEADERS)
                return Response(messages.encode(told), media_type="application/json", headers=_HEADERS)
            except ClientDisconnect:
                return Response(status_code=400)
            except RaphaError as error:
                return JSONResponse(error.to_wire(), 413 if error.field == "body" else 400, _HEADERS)
            except Exception:
                return JSONResponse(RefusedError("The site met an internal error.").to_wire(), 500, _HEADERS)

        return answer


def _read(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise messages.malformed(error) from None


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""
