"""Start processes that run foreign Python and can reach nothing but two pipes.

    zygote = Zygote("package.module:function", preload=["package.other"])
    worker = zygote.spawn(Limits())          # function(reader, writer) runs behind the walls
    worker.writer.write(b"..."); worker.writer.flush(); worker.reader.read(3)
    worker.wait(10)                          # "ended", "killed", "memory", "time" or "violation"

Walls come in tiers, told from what the kernel refused to a worker that tried, never from configuration:

    S3  own namespaces (bubblewrap), Landlock, seccomp allow-list, limits, no privileges
    S2  the same without namespaces; needs no privilege, so it comes up in containers
    S1  seccomp allow-list, limits, no privileges
    S0  less than that: nothing is started
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from rapha_lab.enclave import _layers
from rapha_lab.enclave._cgroup import Cgroup
from rapha_lab.enclave.blocks import Block
from rapha_lab.protocol.errors import SiteError
from rapha_lab.protocol.messages import BUFFER

__all__ = ["TIERS", "Limits", "Report", "Worker", "Zygote", "probe", "widen"]

PIPE = 1 << 20
"""Bytes that a pipe holds, which any user may ask of Linux."""

TIERS = ("S0", "S1", "S2", "S3")
_NEEDS = {
    "S1": (base := {"privileges", "rlimits", "deadline", "seccomp"}),
    "S2": base | {"threads", "landlock"},
    "S3": base | {"threads", "landlock", "namespaces"},
}
_BOOT = (
    "import sys,json;sys.path[:]=json.loads(sys.argv[1]);from rapha_lab.enclave._zygote import main;main({})"
)


@dataclass(frozen=True)
class Limits:
    """What one worker may use: bytes, seconds, threads, bytes it may send out. Defaults suit a session.

    Attributes:
        share: weight of all its threads together where the processor is short; a process beside it has 100. Where no
            control group weighs them, below 100 each has the least priority there is.
        cores: the processor cores it may run on; any, if none is named.
    """

    memory: int = 2 << 30
    cpu_seconds: float = 4 * 3600
    wall_seconds: float = 6 * 3600
    threads: int = 64
    output: int = 8 << 30
    share: int = 5
    cores: tuple[int, ...] = ()

    @classmethod
    def shard(cls) -> Limits:
        """Limits for one shard of patients: a minute or two, and an answer of about ten numbers."""
        return cls(memory=1 << 30, cpu_seconds=120, wall_seconds=120, threads=64, output=1 << 20, share=100)


@dataclass(frozen=True)
class Report:
    """The tier a worker here reaches, the layers it proved, and why a higher tier is out of reach."""

    tier: str
    layers: dict[str, bool]
    reasons: list[str] = field(default_factory=list)


def tier_of(layers: dict[str, bool]) -> str:
    """The highest tier whose layers all hold."""
    holds = {name for name, on in layers.items() if on}
    return max((tier for tier, needs in _NEEDS.items() if needs <= holds), default="S0")


def probe() -> Report:
    """Ask the kernel what a worker started here cannot do, by starting one and letting it try."""
    try:
        with Zygote("rapha_lab.enclave._zygote:idle", (), bare=True) as zygote:
            return zygote.report
    except SiteError as error:
        return Report("S0", dict.fromkeys(_layers.LAYERS, False), [str(error)])


class Worker:
    """A process behind the walls; `reader` reads what it writes, `writer` writes what it reads."""

    reader: BinaryIO
    writer: BinaryIO

    def __init__(
        self, zygote: Zygote, number: int, limits: Limits, reads: int, writes: int, block: Block | None
    ) -> None:
        self.block = block
        self._zygote, self._number = zygote, number
        self._locked, self._gone = threading.Event(), threading.Event()
        self._outcome = "killed"
        self._group = Cgroup(
            f"rapha-{os.getpid()}-{id(zygote):x}-{number}", limits.memory, limits.threads, limits.share
        )
        self.pid: int | None = None
        self.layers: dict[str, bool] = {}
        self.reader = io.BufferedReader(_Counted(reads, limits.output, self._overflow), BUFFER)
        self.writer = open(writes, "wb", BUFFER)  # noqa: SIM115

    @property
    def tier(self) -> str:
        """The tier this very worker proved before it was handed over."""
        return tier_of(self.layers)

    def interrupt(self) -> None:
        """Send the worker SIGINT."""
        self._zygote._say({"do": "interrupt", "id": self._number})

    def kill(self) -> None:
        """End the worker now."""
        self._zygote._say({"do": "kill", "id": self._number})

    def _overflow(self) -> None:
        self._zygote._say({"do": "kill", "id": self._number, "violation": True})

    def wait(self, timeout: float | None = None) -> str:
        """How the worker ended: "ended", "killed", "memory", "time" or "violation"; nothing else is known.

        Raises:
            TimeoutError: if it still runs after `timeout` seconds.
        """
        if not self._gone.wait(timeout):
            raise TimeoutError("The worker is still running.")
        return self._outcome

    def close(self) -> None:
        """End the worker and close both pipes."""
        self.kill()
        for stream in (self.reader, self.writer):
            with contextlib.suppress(OSError, ValueError):
                stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Counted(io.RawIOBase):
    """The reading end of a pipe that ends its writer once more than `limit` bytes came through it."""

    def __init__(self, fd: int, limit: int, overflow: Callable[[], None]) -> None:
        self._file = io.FileIO(fd, "rb")
        self._left, self._overflow = limit, overflow

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def readinto(self, buffer: Any) -> int | None:
        count = self._file.readinto(buffer)
        self._left -= count or 0
        if self._left < 0:
            self._overflow()
            return 0
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class Zygote:
    """A warm process from which locked workers are forked in well under 100 ms.

    Args:
        entry: "package.module:function"; a worker calls function(reader, writer) over its two pipes.
        preload: modules a worker may import besides the standard and the scientific libraries.
        tier: at most this tier ("S1", "S2", "S3"); None for the highest this machine has.
        bare: load no libraries (for probing).
        gives_way: all its workers together yield to the site's other processes where the processor is short.

    Raises:
        SiteError: not on Linux; the modules cannot be loaded; or no tier above S0 can be proved.
    """

    def __init__(
        self,
        entry: str,
        preload: Sequence[str] = (),
        tier: str | None = None,
        *,
        bare: bool = False,
        gives_way: bool = True,
    ) -> None:
        self._lock, self._workers, self._count = threading.Lock(), dict[int, Worker](), 0
        self._gate, self._still, self._closed = threading.Lock(), threading.Event(), False
        self._reasons: list[str] = []
        self._listener: threading.Thread | None = None
        self._entry, self._preload = entry, list(preload)
        self._config = {
            "entry": entry,
            "preload": self._preload,
            "bare": bare,
            "gives_way": gives_way,
            "filter": _filter().hex(),
            "buffer": BUFFER,
            "landlock": tier != "S1",
            "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in _layers.NAMESPACES},
        }
        self.report = self._start(tier)

    @property
    def tier(self) -> str:
        """The tier that a worker of this zygote proved."""
        return self.report.tier

    def _start(self, tier: str | None) -> Report:
        """Launch behind namespaces; where that does not reach S3, note why and launch without."""
        if tier in (None, "S3"):
            try:
                self._launch(_bubblewrap([self._entry, *self._preload]))
                report = self._prove()
                if report.tier == "S3":
                    return report
                self._end()
                missing = _NEEDS["S3"] - {name for name, on in report.layers.items() if on}
                raise SiteError("Namespaces did not help.", f"Not enforced: {', '.join(sorted(missing))}.")
            except SiteError as error:
                if tier == "S3":
                    raise
                self._reasons.append(str(error))
        self._launch([])
        return self._prove()

    def _launch(self, prefix: list[str]) -> None:
        """Run the zygote behind `prefix`, and wait until it is ready."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._home = tempfile.TemporaryDirectory(prefix="rapha-zygote-")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        home = "/tmp" if prefix else self._home.name  # noqa: S108
        paths = json.dumps([os.path.abspath(path) for path in sys.path if os.path.exists(path or ".")])
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                [*prefix, sys.executable, "-I", "-B", "-c", _BOOT.format(theirs.fileno()), paths],
                env=_environment(home),
                cwd="/",
                umask=0o077,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            self._control.send(json.dumps(self._config).encode())
            first = json.loads(self._control.recv(1 << 16) or b"{}")
        except OSError:
            first = {}
        if first.get("is") != "ready":
            why = self._why(first)
            self._end()
            raise SiteError("The sandbox did not start.", why, "See its message for what is missing.")
        self._listener = threading.Thread(target=self._listen, name="rapha-zygote", daemon=True)
        self._listener.start()

    def _why(self, first: dict[str, str]) -> str:
        self._errors.seek(0)
        text = first.get("why") or self._errors.read().decode(errors="replace")
        return text.strip().splitlines()[-1] if text.strip() else "The process ended without a message."

    def _prove(self) -> Report:
        """Start one worker and see which layers it proves; refuse to go on below S1."""
        try:
            with self._spawn(Limits(wall_seconds=60)) as worker:
                report = Report(worker.tier, worker.layers, self._reasons)
        except SiteError:
            self._end()
            raise
        if report.tier == "S0":
            self._end()
            missing = ", ".join(sorted(name for name in _NEEDS["S1"] if not report.layers[name]))
            raise SiteError(
                "This machine cannot hold foreign code.",
                f"The kernel does not enforce: {missing}.",
                "Run on Linux 5.13 or later with seccomp filters allowed.",
            )
        return report

    def spawn(self, limits: Limits | None = None, block: Block | None = None) -> Worker:
        """A fresh worker, locked and waiting in its entry function; a zygote that died is started again.

        Args:
            block: memory that is its function's third argument.

        Raises:
            SiteError: if a layer that held before does not hold this time, or all workers stand still.
        """
        if not self._gate.acquire(timeout=1):
            raise SiteError(
                "No session can start at this moment.",
                "The site runs a function on shards of patients; every session stands still meanwhile.",
                "Try again in a minute.",
            )
        try:
            self.revive()
            worker = self._spawn(limits or Limits(), block)
        finally:
            self._gate.release()
        if worker.tier < self.tier:
            worker.close()
            raise SiteError("A worker was refused.", "One of its walls did not hold.", "Restart the site.")
        return worker

    def revive(self) -> None:
        """Start the process again if it died; its workers died with it.

        Raises:
            SiteError: if it no longer reaches its tier, or was closed.
        """
        if self._closed:
            raise SiteError("No worker could be started.", "The site is stopping.")
        if not self.alive:
            self._end()
            self.report = self._start(self.tier)

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Stop every worker, and start none, until the block is left.

        Raises:
            SiteError: if they do not stop.
        """
        with self._gate:
            self._still.clear()
            try:
                if self._say({"do": "stop"}) and not self._still.wait(10):
                    raise SiteError("The sessions do not stand still.", "", "Restart the site.")
                yield
            finally:
                self._say({"do": "go on"})

    def _spawn(self, limits: Limits, block: Block | None = None) -> Worker:
        job_out, job_in = os.pipe()
        result_out, result_in = os.pipe()
        widen(job_in, result_out)
        with self._lock:
            self._count += 1
            worker = Worker(self, self._count, limits, result_out, job_in, block)
            self._workers[self._count] = worker
        try:
            ends = [job_out, result_in] + ([] if block is None else [block.fd])
            if not self._say({"do": "spawn", "id": worker._number, "limits": asdict(limits)}, ends):
                self._forget(worker._number)
        finally:
            os.close(job_out)
            os.close(result_in)
        if not worker._locked.wait(30) or not worker.layers:
            worker.close()
            raise SiteError(
                "No worker could be started.", "Its walls did not come to stand.", "Restart the site."
            )
        counted = worker.pid is not None and worker._group.add(worker.pid)
        worker.layers |= {"cgroup": counted, "threads": counted or worker.layers["threads"]}
        if worker._gone.is_set():
            worker._group.close()
        return worker

    def _say(self, message: dict[str, object], fds: Sequence[int] = ()) -> bool:
        """Send the zygote one packet; false if it is gone."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._control.sendmsg([json.dumps(message).encode()], rights)
        except OSError:
            return False
        return True

    def _listen(self) -> None:
        """Take what the zygote and its locked workers report, until it is gone."""
        size = socket.CMSG_SPACE(struct.calcsize("3i"))
        while True:
            try:
                packet, ancillary, _, _ = self._control.recvmsg(1 << 16, size)
            except OSError:
                packet = b""
            if not packet:
                break
            message = json.loads(packet)
            if message["is"] == "stop":
                self._still.set()
            worker = self._workers.get(message.get("id"))
            if worker is None:
                continue
            if message["is"] == "worker":
                worker.layers = message["layers"]
                worker.pid = struct.unpack("3i", ancillary[0][2])[0] if ancillary else None
            else:
                worker._outcome = message["outcome"]
                self._forget(message["id"])
            worker._locked.set()
        self._process.wait()  # its workers are killed when it is gone, and not when it stopped talking
        for number in list(self._workers):
            self._forget(number)

    def _forget(self, number: int) -> None:
        worker = self._workers.pop(number, None)
        if worker is None:
            return
        worker._group.close()
        worker._locked.set()
        worker._gone.set()

    @property
    def alive(self) -> bool:
        """Whether it can still fork workers."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the zygote and every worker of it, for good."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._listener is not None:
            self._listener.join()  # else it would take a new zygote's workers for gone
        self._control.close()
        self._errors.close()
        self._home.cleanup()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def widen(*pipes: int) -> None:
    """Let pipes hold a whole message, where the kernel allows it, so that a step's tensors pass in one turn."""
    for pipe in pipes:
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)


def _filter() -> bytes:
    if not sys.platform.startswith("linux"):
        raise SiteError(
            "A site runs on Linux only.",
            "Its walls are Linux's namespaces, Landlock and seccomp.",
            "Connect to a site elsewhere, or start one in a Linux virtual machine.",
        )
    from rapha_lab.enclave import _filter as source

    try:
        return source.compile_filter()
    except (ImportError, OSError, RuntimeError) as error:
        raise SiteError(
            "The system-call filter could not be built.",
            f"libseccomp says: {error}.",
            "Let programs set seccomp filters, as Docker's default profile does; install libseccomp2 if it is missing.",
        ) from error


def _environment(home: str) -> dict[str, str]:
    """All a zygote gets to know of its surroundings."""
    single = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        **dict.fromkeys(single, "1"),
        **dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "IPYTHONDIR"), home),
        "PATH": "/usr/bin:/bin",
        "LC_ALL": "C.UTF-8",
        "OMP_WAIT_POLICY": "passive",
        "MPLBACKEND": "agg",
        "MPL_IGNORE_SYSTEM_FONTS": "1",
        "POLARS_MAX_THREADS": "2",
        "_RJEM_MALLOC_CONF": "background_thread:false",
    }


def _bubblewrap(modules: Sequence[str]) -> list[str]:
    """The bubblewrap command line: own namespaces, read-only libraries, nothing else of this machine."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SiteError(
            "Namespaces are off.", "bubblewrap is not installed.", "Install it: apt-get install bubblewrap."
        )
    command = [bwrap, "--unshare-user", "--uid", "65534", "--gid", "65534", "--disable-userns"]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--hostname", "site", "--cap-drop", "ALL", "--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib64"):
        command += (
            ["--symlink", os.readlink(name), name] if os.path.islink(name) else ["--ro-bind-try", name, name]
        )
    for name in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
        command += ["--ro-bind-try", name, name]
    command += ["--proc", "/proc", "--dev", "/dev", "--size", str(64 << 20), "--tmpfs", "/tmp"]  # noqa: S108
    # after /tmp, since the project itself may lie there
    for path in sorted(_homes(modules)):
        command += ["--ro-bind", path, path]
    return [*command, "--remount-ro", "/", "--chdir", "/", "--"]


def _homes(modules: Sequence[str]) -> set[str]:
    """The folders outside /usr that hold Python and the top-level packages of `modules`."""
    libraries = {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    homes = {sys.prefix, sys.base_prefix, *libraries}
    for name in {"rapha_lab", *(module.partition(":")[0].partition(".")[0] for module in modules)}:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise SiteError(f"There is no module {name}.", "It is named as an entry or to be preloaded.")
        homes.update(spec.submodule_search_locations or ([spec.origin] if spec.origin else []))
    outside = {str(Path(path).absolute()) for path in homes if os.path.exists(path)}
    return {path for path in outside if not path.startswith("/usr/") and path != "/usr"}
