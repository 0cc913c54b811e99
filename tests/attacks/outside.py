"""The positive control: a victim, and every attack on it from a process that no wall surrounds.

Run as a program: prints what is known of the victim and how each attack went as one line of JSON, then keeps
the victim alive until its standard input closes. Started by root, both become an ordinary user first.
"""

import contextlib
import ctypes
import encodings.idna
import http.server
import importlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
from typing import Any

import attacks
import polars
import site_attacks
from attacks import ATTACKS, call, hash_of

MARK = "RAPHA-CANARY"
USER = 12345
PATH = re.compile(r"[<(]?/[^ ]+")  # of this machine, or a random name


def become_ordinary() -> None:
    """An ordinary user that debuggers of the same user may look at, as any program is."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    call(157, 4, 1, 0, 0, 0)


def load() -> None:
    """Import what attacks use while one may still read root's Python."""
    for name in ("duckdb", "pyarrow.parquet", "idna", "multiprocessing.popen_fork"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert encodings.idna


class Victim:
    """Holds the canary in memory, files and behind sockets, and answers whoever comes."""

    def __init__(self, canary: str) -> None:
        self.canary = canary.encode()
        self.folder = tempfile.mkdtemp(prefix="rapha-victim-")
        self.memory = ctypes.create_string_buffer(self.canary + b"\0" * 16)
        for name in ("shard", "scratch"):
            with open(f"{self.folder}/{name}", "wb") as file:
                file.write(self.canary)
        os.symlink(f"{self.folder}/shard", f"{self.folder}/link")
        self.streams = [socket.create_server(("127.0.0.1", 0)), self._six(), *self._local()]
        self.datagrams = [
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        ]
        self.datagrams[0].bind(("127.0.0.1", 0))
        self.datagrams[1].bind("\0" + (name := f"rapha-{secrets.token_hex(4)}"))
        self.web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _page(self.canary))
        self.facts: dict[str, Any] = {
            "site": site_attacks.lay_out(self.folder, canary),
            "web": self.web.server_address[1],
            "pid": os.getpid(),
            "address": ctypes.addressof(self.memory),
            "size": len(self.canary),
            "folder": self.folder,
            "file": f"{self.folder}/shard",
            "scratch": f"{self.folder}/scratch",
            "link": f"{self.folder}/link",
            "tcp": self.streams[0].getsockname()[1],
            "tcp6": self.streams[1].getsockname()[1] if self.streams[1].family == socket.AF_INET6 else 1,
            "unix": self.streams[2].getsockname(),
            "abstract": self.streams[3].getsockname()[1:].decode(),
            "udp": self.datagrams[0].getsockname()[1],
            "abstract_datagram": name,
            "mark": MARK,
            "canary_hash": hash_of(canary),
        }

    def _six(self) -> socket.socket:
        with contextlib.suppress(OSError):
            return socket.create_server(("::1", 0), family=socket.AF_INET6)
        return socket.create_server(("127.0.0.1", 0))

    def _local(self) -> list[socket.socket]:
        by_path, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        by_path.bind(f"{self.folder}/socket")
        abstract.bind(f"\0rapha-{secrets.token_hex(4)}")
        for sock in (by_path, abstract):
            sock.listen()
        return [by_path, abstract]

    def serve(self) -> None:
        """Answer with the canary until the parent goes."""
        for sock in self.streams:
            threading.Thread(target=self._stream, args=(sock,), daemon=True).start()
        threading.Thread(target=self.web.serve_forever, daemon=True).start()
        while select.select(self.datagrams, [], []):
            _, sender = self.datagrams[0].recvfrom(100)
            self.datagrams[0].sendto(self.canary, sender)

    def _stream(self, sock: socket.socket) -> None:
        while True:
            guest, _ = sock.accept()
            guest.send(self.canary)
            guest.close()


def _page(canary: bytes) -> type[http.server.BaseHTTPRequestHandler]:
    """Answers everything with the canary as a table of one column."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"note\n" + canary + b"\n"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    return Page


def attempt(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """One attack: whether it came to its end, and what it got or what stopped it."""
    try:
        return {"open": True, "how": repr(ATTACKS[name][1](facts))[:2000]}
    except OSError as error:
        return {"open": False, "how": attacks.errno.errorcode.get(error.errno or 0, type(error).__name__)}
    except ModuleNotFoundError as error:
        return {"open": False, "how": f"no module {error.name} is loaded"}
    except (attacks.RefusedError, ImportError, MemoryError, RuntimeError) as error:
        return {"open": False, "how": PATH.sub("…", str(error)) or type(error).__name__}
    except polars.exceptions.PolarsError as error:
        return {"open": False, "how": type(error).__name__}
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # polars, where it may start no runtime
            return {"open": False, "how": "panic"}
        return {"open": False, "how": f"mistake in the attack: {error!r}"}


def in_a_child(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """One attack in a process of its own, so that none disturbs the next."""
    ours, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        signal.alarm(20)
        try:
            os.write(theirs, json.dumps(attempt(name, facts)).encode()[:60000])
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as stream:
        text = stream.read()
    status = os.waitpid(pid, 0)[1]
    return json.loads(text) if text else {"open": False, "how": f"wait status {status}"}


def main() -> None:
    """Victim, attacks, report, wait."""
    load()
    secret = {"secret": sys.argv[1]}
    os.environ["SECRET"] = secret["secret"]
    ours, theirs = os.pipe()
    if os.fork() == 0:
        call(157, 1, signal.SIGKILL, 0, 0, 0)
        become_ordinary()
        call(157, 1, signal.SIGKILL, 0, 0, 0)
        os.close(ours)
        victim = Victim(secret["secret"])
        os.write(theirs, json.dumps(victim.facts).encode())
        victim.serve()
    os.close(theirs)
    facts = json.loads(os.read(ours, 1 << 16))
    results = in_order(facts)
    print(json.dumps({"facts": facts, "outside": results}), flush=True)
    sys.stdin.read()
    shutil.rmtree(facts["folder"], ignore_errors=True)


def in_order(facts: dict[str, Any]) -> dict[str, Any]:
    """Every attack, from an ordinary user's process."""
    ours, theirs = os.pipe()
    if os.fork() == 0:
        become_ordinary()
        inherited = os.open(facts["file"], os.O_RDONLY)
        pipe = os.pipe()[0]
        known = {**facts, "inherited": inherited, "pipe": pipe}
        with open(theirs, "w") as stream:
            json.dump({name: in_a_child(name, known) for name in ATTACKS}, stream)
        os._exit(0)
    os.close(theirs)
    with open(ours) as stream:
        return json.load(stream)


if __name__ == "__main__":
    main()
