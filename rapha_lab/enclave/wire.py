"""How long, and for how many, the site waits for bytes of whom it does not know yet.

Before an envelope is open its sender is a stranger. A connection that brings no whole head in time is ended; so is
one of an address that has its share of them. A body must come at a pace, and all bodies have a room, of which one
address may fill half. Waiting for bytes holds no thread.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing, asynccontextmanager
from ipaddress import ip_address, ip_network
from typing import Any

import anyio
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from rapha_lab.enclave.limits import neighbourhood
from rapha_lab.protocol.errors import RequestError, SiteError

__all__ = ["Bodies", "connections"]

HEAD = 10.0
"""Seconds within which a request's head must be there, from its first byte or from the connection's beginning."""
UNREAD = 60_000
"""Milliseconds after which a connection ends whose other end takes nothing of what is sent."""


class Bodies:
    """Receives the bodies of requests, as many at once and as slowly as it can bear.

    Args:
        room: bytes of all bodies together, on their way in or being answered; one address may hold half.
        at_once: bodies on their way in from one address; `all_at_once` from all.
        grace: seconds that a body may be behind its pace.
        pace: bytes a second that it must come with.
    """

    def __init__(
        self,
        room: int = 1 << 30,
        *,
        at_once: int = 32,
        all_at_once: int = 256,
        grace: float = 15.0,
        pace: int = 1 << 16,
    ) -> None:
        self.room, self.at_once, self.all_at_once = room, at_once, all_at_once
        self.grace, self.pace = grace, pace
        self.held, self.coming = Counter[str](), Counter[str]()

    @asynccontextmanager
    async def read(self, request: Request, stranger: str, limit: int) -> AsyncIterator[bytes]:
        """The body of a request of `stranger`, held until the context ends.

        Raises:
            RequestError: it is larger than `limit` bytes.
            SiteError: there is no room for it, or it comes too slowly.
        """
        body = bytearray()
        try:
            async with aclosing(self._parts(request, stranger)) as parts:
                async for part in parts:
                    body += part
                    self.held[stranger] += len(part)
                    self._check(stranger, len(body), limit)
            yield bytes(body)
        finally:
            _lessen(self.held, stranger, len(body))

    def _check(self, stranger: str, size: int, limit: int) -> None:
        if size > limit:
            why = f"The limit is {limit >> 20} MiB." if limit >> 20 else f"The limit is {limit >> 10} KiB."
            raise RequestError("The request is too large.", why, field="body")
        if self.held.total() > self.room or self.held[stranger] > self.room // 2:
            raise SiteError("The site is busy.", "Too much is sent to it at once.", "Send it again.")

    async def _parts(self, request: Request, stranger: str) -> AsyncGenerator[bytes, None]:
        if self.coming[stranger] >= self.at_once or self.coming.total() >= self.all_at_once:
            raise SiteError("The site is busy.", "Too many requests are on their way in.", "Send it again.")
        self.coming[stranger] += 1
        parts, until = request.stream(), anyio.current_time() + self.grace
        try:
            while True:
                with anyio.fail_after(until - anyio.current_time()):
                    part = await anext(parts, None)
                if part is None:
                    return
                yield part
                # what comes faster than it must buys no more than the grace
                until = min(until + len(part) / self.pace, anyio.current_time() + self.grace)
        except TimeoutError:
            raise SiteError(
                "The request comes too slowly.",
                f"The site waits for {self.pace >> 10} KiB a second.",
                "Send it again over a faster line.",
            ) from None
        finally:
            _lessen(self.coming, stranger, 1)


def _lessen(counter: Counter[str], name: str, by: int) -> None:
    counter[name] -= by
    if counter[name] <= 0:
        del counter[name]


def connections(proxies: Collection[str] = (), *, head: float = HEAD, most: int = 0) -> type[H11Protocol]:
    """The protocol of a server's connections.

    Args:
        proxies: addresses and networks whose connections are those of many, and are not counted by address.
        head: seconds to wait for a request's head.
        most: connections at once, of which one address may have a quarter; half of the files that this process may open
            if 0.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = most or (1 << 15 if files == resource.RLIM_INFINITY else files // 2)
    networks = [ip_network(each) for each in proxies]
    open_now = Counter[str]()

    class Connection(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _name: str = ""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            _set_timeout(transport.get_extra_info("socket"))
            host = self.client[0] if self.client else ""
            name = neighbourhood(host)
            proxied = name != "unknown" and any(ip_address(host) in network for network in networks)
            if open_now.total() >= most or (open_now[name] >= most // 4 and not proxied):
                transport.abort()
                return
            self._name = name
            open_now[name] += 1
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._name:
                _lessen(open_now, self._name, 1)
            if self._late is not None:
                self._late.cancel()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def _watch(self) -> None:
            """Give a head that is awaited its time; what comes after a whole one has other limits."""
            awaited = self.cycle is None or self.cycle.response_complete
            if self._late is not None and not awaited:
                self._late.cancel()
                self._late = None
            elif self._late is None and awaited:
                self._late = self.loop.call_later(head, self.transport.abort)

    return Connection


def _set_timeout(connection: socket.socket | None) -> None:
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD)
