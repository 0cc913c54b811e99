"""The positive control: a victim, and every attack on it from a process that no wall surrounds.

Run as a program: prints what is known of the victim and how each attack went as one line of JSON, then keeps
the victim alive until its standard input closes. Started by root, both become an ordinary user first.
"""

import contextlib
import ctypes
import json
import os
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
from attacks import ATTACKS, call, hash_of

MARK = "RAPHA-CANARY"
USER = 12345


def become_ordinary() -> None:
    """An ordinary user that debuggers of the same user may look at, as any program is."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    call(157, 4, 1, 0, 0, 0)


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
        self.facts: dict[str, Any] = {
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
        while select.select(self.datagrams, [], []):
            _, sender = self.datagrams[0].recvfrom(100)
            self.datagrams[0].sendto(self.canary, sender)

    def _stream(self, sock: socket.socket) -> None:
        while True:
            guest, _ = sock.accept()
            guest.send(self.canary)
            guest.close()


def attempt(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """One attack: whether it came to its end, and what it got or what stopped it."""
    try:
        return {"open": True, "how": repr(ATTACKS[name][1](facts))[:2000]}
    except OSError as error:
        return {"open": False, "how": attacks.errno.errorcode.get(error.errno or 0, type(error).__name__)}
    except (attacks.RefusedError, ImportError, MemoryError, RuntimeError) as error:
        return {"open": False, "how": str(error) or type(error).__name__}
    except Exception as error:
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
    secret = {"secret": sys.argv[1]}
    os.environ["SECRET"] = secret["secret"]
    ours, theirs = os.pipe()
    if os.fork() == 0:
        call(157, 1, signal.SIGKILL, 0, 0, 0)
        become_ordinary()
        call(157, 1, signal.SIGKILL, 0, 0, 0)
        victim = Victim(secret["secret"])
        os.write(theirs, json.dumps(victim.facts).encode())
        victim.serve()
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
