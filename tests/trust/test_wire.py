"""Real sockets of strangers who are slow, or many: none of them keeps the site from others."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from test_gateway import NONCE, Door, seal

from rapha_lab.enclave import wire
from rapha_lab.enclave.limits import Limits
from rapha_lab.enclave.site import Config, http
from rapha_lab.enclave.wire import Bodies, connections
from rapha_lab.protocol.errors import RequestError, SiteError, from_wire

CONFIG = Config(name="site", state="", policy="", datasets=[])


@contextlib.contextmanager
def served(door: Door, config: Config = CONFIG, **limits: Any) -> Iterator[str]:
    """The door at a port of its own, as a site serves it."""
    made = http(config, door.gateway.app())
    made.http = connections(config.trusted_proxies, **limits)
    server = uvicorn.Server(made)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def opened(url: str, sent: bytes = b"") -> socket.socket:
    """A connection with some bytes sent."""
    host, _, port = url.removeprefix("http://").partition(":")
    made = socket.create_connection((host, int(port)), timeout=20)
    made.sendall(sent)
    return made


def ended(connection: socket.socket, drip: bytes = b"") -> bytes:
    """What came before the other side ended the connection, while it is dripped at; fails if it never ends."""
    got, until = b"", time.monotonic() + 20
    connection.settimeout(0.05)
    while time.monotonic() < until:
        try:
            if drip:
                connection.sendall(drip)
            part = connection.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return got
        if not part:
            return got
        got += part
    raise AssertionError("The connection was held for ever.")


@pytest.fixture
def door() -> Door:
    """A door whose patience is short."""
    made = Door()
    made.gateway.bodies = Bodies(4 << 20, at_once=4, all_at_once=6, grace=0.4, pace=1 << 20)
    return made


POST = b"POST %s HTTP/1.1\r\nHost: site\r\nContent-Length: 1000\r\n\r\n"


class TestHeads:
    def test_who_says_nothing_or_half_a_head_is_hung_up_on(self, door: Door) -> None:
        """However it drips."""
        with served(door, head=0.4) as url:
            for sent, drip in ((b"", b""), (b"GET /evidence HTTP/1.1\r\nX: ", b"a"), (b"GET /evi", b"")):
                assert ended(opened(url, sent), drip) == b""

    def test_a_second_head_has_no_more_time_than_the_first(self, door: Door) -> None:
        """A connection that was useful once is not a licence."""
        with served(door, head=0.4) as url:
            good = f"GET /evidence?nonce={NONCE['nonce']} HTTP/1.1\r\nHost: site\r\n\r\n".encode()
            assert ended(opened(url, good + b"GET /evidence"), b"a").startswith(b"HTTP/1.1 200")

    def test_a_slow_answer_is_not_a_slow_head(self, door: Door) -> None:
        """Who waits for the site is not hung up on."""
        door.evidence = lambda nonce: time.sleep(1) or {"late": True}
        with served(door, head=0.3) as url:
            assert httpx.get(url + "/evidence", params=NONCE, trust_env=False).json() == {"late": True}


class TestBodies:
    def test_slow_bodies_are_given_up(self, door: Door) -> None:
        """With a word why, and then the connection ends; nothing of them is held."""
        with served(door, head=0.4) as url:
            told = ended(opened(url, POST % b"/open"), b"a")
        assert b" 429 " in told
        assert b"too slowly" in told
        assert not door.gateway.bodies.held
        assert not door.gateway.bodies.coming

    def test_what_was_sent_fast_buys_no_time(self, door: Door) -> None:
        """A megabyte at once, then nothing: else whoever fills the room first could keep it."""
        head = b"POST /open HTTP/1.1\r\nHost: site\r\nContent-Length: 90000000\r\n\r\n"
        with served(door, head=0.4) as url:
            begun = time.monotonic()
            assert b"too slowly" in ended(opened(url, head + bytes(1 << 20)))
            assert (
                time.monotonic() - begun < 15
            )  # not the seconds that a megabyte buys, of which there were none

    def test_those_on_their_way_are_few_and_others_are_served(self, door: Door) -> None:
        """Four of one address at most; a fifth is told that the site is busy, and evidence goes on."""
        door.gateway.bodies.grace = 3
        with served(door, head=5) as url:
            slow = [opened(url, POST % b"/open") for _ in range(4)]
            until = time.monotonic() + 5
            while door.gateway.bodies.coming.total() < 4 and time.monotonic() < until:
                time.sleep(0.01)
            busy = httpx.post(url + "/open", content=b"x", trust_env=False)
            assert (busy.status_code, from_wire(busy.json()).what) == (429, "The site is busy.")
            assert httpx.get(url + "/evidence", params=NONCE, trust_env=False).status_code == 200
            for each in slow:
                each.close()
            while door.gateway.bodies.coming and time.monotonic() < until + 5:
                time.sleep(0.01)
            assert httpx.post(url + "/open", content=seal("card", {}), trust_env=False).status_code == 200

    def test_one_address_has_half_of_the_room(self, door: Door) -> None:
        """Two megabytes of four: an honest one from elsewhere finds the rest."""
        (answer,) = door.send(("POST", "/open", {"content": bytes(3 << 20)}))
        assert (answer.status_code, from_wire(answer.json()).what) == (429, "The site is busy.")


class TestConnections:
    def test_one_address_has_a_quarter(self, door: Door) -> None:
        """What is beyond is hung up on at once, and a place that is left is free again."""
        with served(door, most=12, head=10) as url:
            first = [opened(url) for _ in range(3)]
            time.sleep(0.2)
            assert ended(opened(url, b"GET / HTTP/1.1\r\nHost: s\r\n\r\n")) == b""
            for each in first:
                each.close()
            time.sleep(0.2)
            assert httpx.get(url + "/evidence", params=NONCE, trust_env=False).status_code == 200

    def test_a_named_proxy_is_many(self, door: Door) -> None:
        """It is not counted as one."""
        named = Config(name="s", state="", policy="", datasets=[], trusted_proxies=["127.0.0.0/8"])
        with served(door, named, most=12, head=10) as url:
            held = [opened(url) for _ in range(6)]
            time.sleep(0.1)
            assert httpx.get(url + "/evidence", params=NONCE, trust_env=False).status_code == 200
            assert len(held) == 6


class TestProxies:
    def seen(self, door: Door, config: Config) -> set[str]:
        """The addresses by which a sender who names another one is counted."""
        with served(door, config) as url:
            httpx.get(
                url + "/evidence", params=NONCE, headers={"X-Forwarded-For": "192.0.2.77"}, trust_env=False
            )
        return set(door.gateway.strangers._buckets)

    def test_nobody_names_their_own_address(self, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not from this machine either, whatever the server's environment says; a named proxy's word counts."""
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
        assert self.seen(door, CONFIG) == {"127.0.0.1"}
        named = Config(name="s", state="", policy="", datasets=[], trusted_proxies=["127.0.0.1"])
        assert self.seen(Door(), named) == {"192.0.2.77"}
        other = Config(name="s", state="", policy="", datasets=[], trusted_proxies=["10.0.0.0/8"])
        assert self.seen(Door(), other) == {"127.0.0.1"}

    @pytest.mark.parametrize("wrong", ["*", "0.0.0.0/0", "::/0", "proxy.example", "10.0.0.1/8", ""])
    def test_what_is_no_proxy_is_refused_when_the_site_starts(self, tmp_path: Path, wrong: str) -> None:
        """By the name of the field."""
        path = tmp_path / "site.toml"
        path.write_text(
            f'name = "s"\nstate = "s"\npolicy = "p"\ndatasets = []\ntrusted_proxies = ["{wrong}"]\n'
        )
        with pytest.raises(RequestError) as caught:
            Config.load(path)
        assert caught.value.field == "trusted_proxies"


def test_the_console_does_not_wait_for_slow_strangers_either(door: Door) -> None:
    """Its pages receive bodies as the door does."""
    from rapha_lab.enclave.console import Console

    def pages(admit: Any, body: Any) -> Any:
        return Console("s", lambda *_: {}, lambda: "", lambda key: False, admit, body).routes()

    door.gateway._pages = pages
    with served(door, head=0.4) as url:
        for name in (b"/console/challenge", b"/console/login", b"/console/items"):
            assert b"too slowly" in ended(opened(url, POST % name), b"a")
        large = httpx.post(url + "/console/login", content=bytes(1 << 17), trust_env=False)
        assert large.status_code == 413
        door.gateway.strangers = Limits(0.001, 5)
        for _ in range(8):
            refused = httpx.post(url + "/console/items", content=b"{}", trust_env=False)
        assert isinstance(from_wire(refused.json()), SiteError)


def test_mutant_without_the_deadline_a_slow_head_is_held(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch is what ends it."""
    with served(door, head=1e6) as url:
        held = opened(url, b"GET /evidence HTTP/1.1\r\nX: ")
        held.settimeout(1)
        with pytest.raises(TimeoutError):
            held.recv(1)
        held.close()
    assert wire.HEAD < 60
