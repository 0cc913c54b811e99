"""The process workers are forked from: clean environment, one thread, libraries loaded, never any data.

It speaks with its launcher over one Unix socket of whole packets (SOCK_SEQPACKET). From the launcher: first
the configuration, then `spawn` with the two pipe ends of a worker, `kill`, or for all of them `stop` and
`go on`. To the launcher: `ready`, `worker` (written by the worker itself once it is locked, so that the kernel
vouches for its pid), `gone`, `stop` and `go on` once that is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any, BinaryIO

from rapha_lab.enclave import _layers, _preload

__all__ = ["idle", "main"]

_MEMORY = 77


def idle(reader: BinaryIO, writer: BinaryIO) -> None:
    """The entry of a worker that is only there to be probed."""
    reader.read()


def main(control_fd: int) -> None:
    """Configure, preload, then fork workers until the launcher closes its end."""
    control = socket.socket(fileno=control_fd)
    try:
        zygote = _Zygote(control, json.loads(control.recv(1 << 20)))
    except Exception:
        control.send(json.dumps({"is": "failed", "why": traceback.format_exc(limit=-3)[-4000:]}).encode())
        raise
    zygote.serve()


class _Zygote:
    def __init__(self, control: socket.socket, config: dict[str, Any]) -> None:
        self.control = control
        self.code, self.buffer = bytes.fromhex(config["filter"]), config["buffer"]
        self.layers = {"namespaces": self._apart(config["namespaces"])}
        self.use_landlock = bool(config["landlock"])
        self.workers: dict[int, tuple[int, float, dict[str, Any], list[str]]] = {}
        _preload.load(config["preload"], libraries=not config["bare"])
        if self.use_landlock:
            import landlockpy

            landlockpy.supported()  # looks for libc with a child process: not possible once locked
        module, _, name = config["entry"].partition(":")
        self.entry = getattr(importlib.import_module(module), name)
        self.wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.wakeup[1], warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        gc.collect()
        gc.freeze()
        _preload.assert_alone()
        if config["gives_way"]:
            _layers.give_way()
        self._silence()
        self._say({"is": "ready", "layers": self.layers})

    @staticmethod
    def _apart(launcher: dict[str, str]) -> bool:
        """True if this process shares no namespace of `_layers.NAMESPACES` with its launcher."""
        return all(os.readlink(f"/proc/self/ns/{kind}") != launcher[kind] for kind in _layers.NAMESPACES)

    @staticmethod
    def _silence() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)

    def _say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.control.send(json.dumps(message).encode())

    def serve(self) -> None:
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(self.wakeup[0], select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self.wakeup[0]:
                    with contextlib.suppress(BlockingIOError):
                        os.read(fd, 4096)
                elif not self._obey():
                    return
            self._reap()

    def _obey(self) -> bool:
        """Do what the launcher's next packet says; false once it has closed."""
        packet, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 3)
        if not packet:
            return False
        message = json.loads(packet)
        if message["do"] == "spawn":
            self._fork(message["id"], message["limits"], fds)
            for fd in fds:
                os.close(fd)
        elif message["do"] == "interrupt":
            for pid, (number, *_) in self.workers.items():
                if number == message["id"]:
                    os.kill(pid, signal.SIGINT)
        elif message["do"] == "kill":
            for pid, (number, _, _, why) in self.workers.items():
                if number == message["id"]:
                    why.append("violation" if message.get("violation") else "killed")
                    os.kill(pid, signal.SIGKILL)
        else:
            for pid in self.workers:
                os.kill(pid, signal.SIGSTOP if message["do"] == "stop" else signal.SIGCONT)
            self._say({"is": message["do"]})
        return True

    def _fork(self, number: int, limits: dict[str, Any], fds: list[int]) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                self._become_worker(parent, number, limits, *fds)
            except MemoryError:
                os._exit(_MEMORY)
            finally:
                os._exit(1)
        self.workers[pid] = (number, time.monotonic(), limits, [])

    def _become_worker(
        self, parent: int, number: int, limits: dict[str, Any], job: int, result: int, *block: int
    ) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        shared = [_layers.shared(fd) for fd in block]
        # an open /dev/null of its own: file flags on the zygote's would be a channel between siblings
        null = os.open(os.devnull, os.O_RDWR)
        sources = [null, null, null, job, result, self.control.fileno()]
        for target, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in sources]):
            os.dup2(fd, target)
        self.control.detach()
        os.closerange(len(sources), 1 << 16)
        reader, writer = open(3, "rb", self.buffer), open(4, "wb", self.buffer)  # noqa: SIM115
        _preload.reseed()
        if limits["cores"]:
            os.sched_setaffinity(0, limits["cores"])
        if limits["share"] < 100:
            os.nice(19)  # its threads inherit it, and nothing that is left to it raises it again
        layers = dict(self.layers)
        layers["deadline"] = _layers.deadline(limits["wall_seconds"])
        layers["privileges"] = _layers.drop_privileges(parent)
        layers["rlimits"] = _layers.limit(limits["memory"], limits["cpu_seconds"])
        layers["threads"] = _layers.limit_threads(limits["threads"])
        layers["landlock"] = self.use_landlock and _layers.landlock()
        layers["seccomp"] = _layers.seccomp(self.code)
        os.write(5, json.dumps({"is": "worker", "id": number, "layers": layers}).encode())
        os.close(5)
        _preload.seal_imports()
        self.entry(reader, writer, *shared)
        with contextlib.suppress(OSError):
            writer.flush()
        os._exit(0)

    def _reap(self) -> None:
        while self.workers:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                return
            number, started, limits, why = self.workers.pop(pid)
            cpu = usage.ru_utime + usage.ru_stime
            wall = time.monotonic() - started
            late = wall >= limits["wall_seconds"] or cpu >= max(1, round(limits["cpu_seconds"])) - 0.1
            self._say({"is": "gone", "id": number, "outcome": _outcome(status, late, why)})


def _outcome(status: int, late: bool, why: list[str]) -> str:
    """How a worker ended, in one word."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGSYS:
        return "violation"
    if code < 0 and why:
        return why[0]
    if code in (-signal.SIGKILL, -signal.SIGXCPU) and late:
        return "time"
    if code in (_MEMORY, -signal.SIGKILL):
        return "memory"
    return "ended" if code >= 0 else "killed"


if __name__ == "__main__":
    main(int(sys.argv[1]))
