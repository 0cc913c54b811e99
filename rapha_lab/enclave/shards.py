"""Gives the curator fresh workers for shards; while they run, every session stands still.

A session is the same researcher's code as a function on shards. It could time what a shard does to the
processor and tell it on, past every noise. So all sessions are stopped before the first shard gets a record
and go on once the last has ended.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from rapha_lab.enclave import cores
from rapha_lab.enclave.sandbox import Limits, Worker, Zygote
from rapha_lab.protocol.errors import RaphaError, SiteError

__all__ = ["ShardWorkers"]


class ShardWorkers:
    """Serves one curator after another over a channel each.

    Args:
        sessions: the zygote of the sessions, asked when it is needed.
        tier: at most this sandbox tier.
    """

    def __init__(self, sessions: Callable[[], Zygote], tier: str | None = None) -> None:
        self._sessions, self._tier = sessions, tier
        self._zygote: Zygote | None = None
        self._pool = ThreadPoolExecutor(len(cores.ALL), thread_name_prefix="shard")
        self._lock, self._wave, self._workers = threading.Lock(), 0, list[Worker]()

    def connect(self) -> socket.socket:
        """A new channel; the returned end is the curator's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threading.Thread(target=self._serve, args=(ours,), daemon=True).start()
        return theirs

    def _serve(self, channel: socket.socket) -> None:
        """Obey until the curator is gone, however it went."""
        with channel, contextlib.ExitStack() as still:
            with contextlib.suppress(OSError):
                while packet := channel.recv(1 << 12):
                    self._obey(json.loads(packet), channel, still)
            self._clear()

    def _obey(self, message: dict[str, object], channel: socket.socket, still: contextlib.ExitStack) -> None:
        if message["do"] == "open":
            channel.send(json.dumps(self._open(still)).encode())
        elif message["do"] == "spawn":
            with self._lock:
                self._wave = wave = int(str(message["wave"]))
            # one shard at a time runs on each core: it can keep no other's waiting
            for core in cores.ALL[: int(str(message["count"]))]:
                self._pool.submit(self._spawn, wave, core, channel)
        else:
            self._clear()
            if message["do"] == "close":
                still.close()

    def _open(self, still: contextlib.ExitStack) -> dict[str, object]:
        try:
            zygote = self._ready()
            if zygote.tier < self._sessions().tier:
                raise SiteError("The sandbox for shards is weaker than the site's.", f"It is {zygote.tier}.")
            still.enter_context(self._sessions().standing_still())
        except RaphaError as error:
            return {"error": error.to_wire()}
        return {"open": True}

    def _ready(self) -> Zygote:
        """The shards' own zygote, started when first asked for: most sites' days pass without."""
        if self._zygote is None:
            self._zygote = Zygote("rapha_lab.session.shard:main", tier=self._tier, gives_way=False)
        self._zygote.revive()
        return self._zygote

    def _spawn(self, wave: int, core: int, channel: socket.socket) -> None:
        assert self._zygote is not None
        with contextlib.suppress(RaphaError, OSError):
            worker = self._zygote.spawn(replace(Limits.shard(), cores=(core,)))
            with self._lock:
                if wave != self._wave:
                    return worker.close()
                self._workers.append(worker)
                with worker.reader, worker.writer:
                    ends = [worker.reader.fileno(), worker.writer.fileno()]
                    socket.send_fds(channel, [json.dumps({"wave": wave}).encode()], ends)
        return None

    def _clear(self) -> None:
        with self._lock:
            workers, self._workers, self._wave = self._workers, [], 0
        for worker in workers:
            worker.close()

    def close(self) -> None:
        """End the shards' zygote."""
        self._pool.shutdown(cancel_futures=True)
        if self._zygote is not None:
            self._zygote.close()
