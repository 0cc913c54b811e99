"""How often one may ask, and how much at once: so that nobody keeps the site from the others, or from its hardware."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from rapha_lab.protocol.errors import SiteError

__all__ = ["Amounts", "Limits", "Queue", "Turns", "neighbourhood"]


@dataclass
class _Bucket:
    left: float
    since: float
    refused: int = 0
    locked: float = 0.0


class Limits:
    """A bucket for each name, refilled steadily; who goes on asking an empty one is locked out for a while.

    Args:
        rate: how much is refilled a second.
        burst: how much a full bucket holds.
        lock: seconds of the lockout, which begins when `burst` requests in a row were refused.
        names: how many names are remembered; beyond, strangers are refused until others have been quiet.
    """

    def __init__(self, rate: float, burst: int, *, lock: float = 60.0, names: int = 10_000) -> None:
        self._rate, self._burst, self._lock_for, self._names = rate, burst, lock, names
        self._buckets: dict[str, _Bucket] = {}
        self._lock = threading.Lock()

    def admit(self, name: str, *, cost: float = 1.0, now: float | None = None) -> None:
        """Take `cost` out of the bucket of `name`; 0 asks only whether anything is left.

        Raises:
            SiteError: the bucket is empty, or `name` is locked out.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            bucket = self._bucket(name, now)
            bucket.left = min(self._burst, bucket.left + (now - bucket.since) * self._rate)
            bucket.since = now
            if now < bucket.locked:
                raise _too_many(f"You are locked out for {bucket.locked - now:.0f} s.")
            if bucket.left >= 1.0:  # a large request may leave a debt
                bucket.left, bucket.refused = bucket.left - cost, 0
                return
            bucket.refused += 1
            if bucket.refused >= self._burst:
                bucket.locked, bucket.refused = now + self._lock_for, 0
            raise _too_many(f"The limit is {self._rate:g} a second.")

    def _bucket(self, name: str, now: float) -> _Bucket:
        found = self._buckets.get(name)
        if found is None:
            if len(self._buckets) >= self._names:
                quiet = now - self._burst / self._rate
                self._buckets = {n: b for n, b in self._buckets.items() if b.since > quiet or b.locked > now}
            if len(self._buckets) >= self._names:
                raise _too_many("Too many others ask at this moment.")
            found = self._buckets[name] = _Bucket(self._burst, now)
        return found


class Turns:
    """How much is done at once, for each name and for all."""

    def __init__(self, each: int, together: int) -> None:
        self._each, self._together = each, together
        self._taken, self._lock = Counter[str](), threading.Lock()

    @contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """A turn for `name` until the context ends; False if it has all of its own, or there is none left."""
        with self._lock:
            free = self._taken[name] < self._each and self._taken.total() < self._together
            self._taken[name] += free
        try:
            yield free
        finally:
            with self._lock:
                self._taken[name] -= free
                if not self._taken[name]:
                    del self._taken[name]


class Amounts:
    """How much there is of something for each name, told by any thread."""

    def __init__(self) -> None:
        self._amounts, self._lock = Counter[str](), threading.Lock()

    def of(self, name: str) -> int:
        """How much there is for `name`."""
        with self._lock:
            return self._amounts[name]

    def add(self, name: str, amount: int) -> None:
        """So much more, or less."""
        with self._lock:
            self._amounts[name] += amount
            if not self._amounts[name]:
                del self._amounts[name]


class Queue:
    """One thing at a time for each name; whoever has more waits, and nobody else does."""

    def __init__(self) -> None:
        self._busy, self._changed = set[str](), threading.Condition()

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Wait until nothing else is done for `name`, and be it until the context ends."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._busy)
            self._busy.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._busy.discard(name)
                self._changed.notify_all()


def neighbourhood(address: str) -> str:
    """What counts as one stranger: an IPv4 address, however it is written, or the 48 bits that one may get of IPv6."""
    try:
        found = ip_address(address)
    except ValueError:
        return "unknown"
    if found.version == 6:
        found = found.ipv4_mapped or found  # as a proxy on a socket for both writes it
    return str(found if found.version == 4 else ip_network((found, 48), strict=False))


def _too_many(why: str) -> SiteError:
    return SiteError("Too many requests.", why, "Wait a little, then go on.")
