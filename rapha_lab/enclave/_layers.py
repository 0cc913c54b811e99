"""What a worker does to itself between the fork and the first foreign byte, and how it proves each layer.

Every layer is tried after it is put on: one that the kernel does not hold is reported as absent, never
assumed. The order matters: changing the user clears the death signal, Landlock opens no file later, seccomp
comes last.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import mmap
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable

__all__ = [
    "LAYERS",
    "NAMESPACES",
    "deadline",
    "drop_privileges",
    "give_way",
    "landlock",
    "limit",
    "seccomp",
    "shared",
]

LAYERS = ("namespaces", "privileges", "rlimits", "deadline", "threads", "landlock", "seccomp", "cgroup")
NAMESPACES = ("user", "pid", "net", "mnt", "ipc", "uts")

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_GIB = 1 << 30


def shared(fd: int) -> memoryview:
    """The whole file behind a descriptor as memory, which stays when the descriptor is closed."""
    size, libc = os.fstat(fd).st_size, ctypes.CDLL(None, use_errno=True)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    # not by the mmap module, which keeps a descriptor
    address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def give_way() -> None:
    """Weigh this process and all it forks, together, at a quarter of another session of the kernel's.

    Where processes are in no control group for the processor, the kernel weighs sessions (setsid) first and niceness
    only within each; a machine that does not has no such file, and niceness alone holds.
    """
    for _ in range(40):
        try:
            with open("/proc/self/autogroup", "w") as file:
                file.write("6")  # 1024 / 1.25^6: a quarter of a process at niceness 0
            return
        except BlockingIOError:  # the kernel lets one process in a tenth of a second, whosever it is
            time.sleep(0.05)
        except OSError:
            return


def drop_privileges(parent: int) -> bool:
    """Become nobody in particular, without capabilities, invisible to debuggers, gone when `parent` goes."""
    if os.geteuid() == 0:
        user = 61184 + secrets.randbelow(
            4336
        )  # systemd's range for passing users: one each, so siblings differ
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if os.getppid() != parent:
        os._exit(1)
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return int(status["CapEff"], 16) == 0 and status["NoNewPrivs"].strip() == "1"


def limit(memory: int, cpu_seconds: float) -> bool:
    """Set the resource limits of this process; true if the kernel then refuses to map more than `memory`."""
    with open("/proc/self/statm") as file:
        pages = [int(field) for field in file.read().split()]
    page = resource.getpagesize()
    seconds = max(1, round(cpu_seconds))
    wanted = {
        resource.RLIMIT_DATA: pages[5] * page + memory,
        resource.RLIMIT_AS: pages[0] * page + memory + 8 * _GIB,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_SIGPENDING: 256,
        **dict.fromkeys(
            (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE),
            0,
        ),
    }
    for which, value in wanted.items():
        _lower(which, value)
    too_much = lambda: mmap.mmap(-1, memory + _GIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # noqa: E731
    return refused(too_much, errno.ENOMEM) and resource.getrlimit(resource.RLIMIT_FSIZE) == (0, 0)


def limit_threads(threads: int) -> bool:
    """Allow `threads` more threads to this user; true if the kernel counts them, as it does not for root."""
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
    try:
        _thread.start_new_thread(int, ())
    except RuntimeError:
        return _lower(resource.RLIMIT_NPROC, _tasks() + threads)
    while len(os.listdir("/proc/self/task")) > 1:  # Landlock and seccomp hold for the calling thread only
        time.sleep(0.001)
    _lower(resource.RLIMIT_NPROC, _tasks() + threads)
    return False


def _lower(which: int, value: int) -> bool:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))
    return resource.getrlimit(which) == (value, value)


def _tasks() -> int:
    """Threads that already count against this user: RLIMIT_NPROC counts per user, not per process."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/status") as file:
            status = dict(line.split(":", 1) for line in file)
            if int(status["Uid"].split()[0]) == os.getuid():
                count += int(status["Threads"])
    return count


class _SigEvent(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("pad", ctypes.c_char * 48),
    ]


def deadline(seconds: float) -> bool:
    """Let the kernel kill this process after `seconds` of wall clock, blocked signals or not."""
    libc = ctypes.CDLL(None, use_errno=True)
    event, timer = _SigEvent(signo=signal.SIGKILL), ctypes.c_void_p()
    if libc.timer_create(7, ctypes.byref(event), ctypes.byref(timer)):  # CLOCK_BOOTTIME
        return False
    whole = int(seconds)
    spec = (ctypes.c_long * 4)(0, 0, whole, int((seconds - whole) * 1e9))
    left = (ctypes.c_long * 4)()
    if libc.timer_settime(timer, 0, ctypes.byref(spec), None) or libc.timer_gettime(
        timer, ctypes.byref(left)
    ):
        return False
    return 0 < left[2] + left[3] / 1e9 <= seconds


def landlock() -> bool:
    """Deny every file, TCP port, abstract socket and outside signal; true if the kernel then does."""
    import landlockpy

    try:
        scope = landlockpy.Scope.ABSTRACT_UNIX_SOCKET | landlockpy.Scope.SIGNAL
        with landlockpy.Ruleset(scoped=scope) as ruleset:
            ruleset.restrict()
    except OSError:
        return False
    return refused(lambda: os.listdir("/"), errno.EACCES) and refused(lambda: open(os.devnull), errno.EACCES)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def seccomp(code: bytes) -> bool:
    """Load the compiled allow-list for this process; true if paths, sockets and processes then fail."""
    program = _Program(len(code) // 8, code)
    _prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program))
    attempts: list[Callable[[], object]] = [
        lambda: os.stat("/"),
        lambda: os.open("/", os.O_RDONLY),
        lambda: os.listdir("/"),
        socket.socket,
        lambda: socket.socket(socket.AF_UNIX),
        os.pipe,
        lambda: os.kill(os.getpid(), 0),
        _fork,
    ]
    return all(refused(attempt, errno.EPERM) for attempt in attempts)


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def refused(attempt: Callable[[], object], code: int) -> bool:
    """True if the kernel answers `attempt` with error `code`."""
    try:
        attempt()
    except OSError as error:
        return error.errno == code
    return False


def _prctl(*arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(*arguments, *(0,) * (5 - len(arguments))):
        print(f"prctl{arguments[0]}: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
