"""Attacks on the walls of a worker, each a function of `v`, what is known of the victim.

An attack that comes to its end has succeeded and returns what it got; one that is refused raises. They use
only what is imported here, so that each can also run outside, where most of them must succeed.
"""

# ruff: noqa: SIM115  (an attack is named after what it tries; a file it opens is closed with its worker)

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

ATTACKS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {}
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
AT_FDCWD, GIB, SCRATCH = -100, 1 << 30, 1 << 12
X32 = 0x40000000


class RefusedError(Exception):
    """The attack ran and got nothing."""


def attack(group: str) -> Callable[[Any], Any]:
    """Register the function below under its name."""

    def register(function: Any) -> Any:
        ATTACKS[function.__name__] = (group, function)
        return function

    return register


def call(number: int, *arguments: Any) -> int:
    """A system call by its x86-64 number; raises OSError as Python's own do."""
    plain = [
        ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_long(a) if isinstance(a, int) else a
        for a in arguments
    ]
    value = LIBC.syscall(ctypes.c_long(number), *plain)
    if value == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(value)


def simple(group: str, name: str, number: int, *arguments: Any) -> None:
    """An attack that is one system call with fixed arguments."""
    ATTACKS[name] = (group, lambda v: call(number, *(v[a[1:]] if _of_victim(a) else a for a in arguments)))


def _of_victim(argument: Any) -> bool:
    return isinstance(argument, str) and argument.startswith("$")


def buffer(size: int = SCRATCH) -> Any:
    """Room for the kernel to write to."""
    return ctypes.create_string_buffer(size)


# ---- network ----


def _connect(family: int, kind: int, address: Any, message: bytes = b"hello") -> bytes:
    with socket.socket(family, kind) as sock:
        sock.settimeout(2)
        sock.connect(address)
        sock.send(message)
        return sock.recv(100)


@attack("network")
def tcp_to_loopback(v):
    return _connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", v["tcp"]))


@attack("network")
def tcp_over_ipv6(v):
    return _connect(socket.AF_INET6, socket.SOCK_STREAM, ("::1", v["tcp6"]))


@attack("network")
def udp_to_loopback(v):
    return _connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", v["udp"]))


@attack("network")
def unix_socket_by_path(v):
    return _connect(socket.AF_UNIX, socket.SOCK_STREAM, v["unix"])


@attack("network")
def unix_socket_by_abstract_name(v):
    return _connect(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + v["abstract"])


@attack("network")
def unix_datagram_by_abstract_name(v):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        return sock.sendto(b"hello", "\0" + v["abstract_datagram"])


@attack("network")
def listen_on_all_interfaces(v):
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
        return sock.getsockname()


@attack("network")
def listen_on_an_abstract_name(v):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("\0rapha-attack")
        sock.listen()


@attack("network")
def resolve_a_name(v):
    return socket.getaddrinfo(b"localhost", 80)


@attack("network")
def interface_addresses_by_ioctl(v):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return fcntl.ioctl(sock.fileno(), 0x8915, struct.pack("256s", b"lo"))


@attack("network")
def netlink_routes(v):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.bind((0, 0))
        sock.settimeout(2)
        sock.send(struct.pack("IHHIIB", 20, 18, 0x301, 1, 0, 0) + b"\0\0\0")
        return sock.recv(4096)


for _name, _family, _kind, _protocol in (
    ("netlink_audit_socket", 16, 3, 9),
    ("netlink_uevent_socket", 16, 3, 15),
    ("vsock_socket", 40, 1, 0),
    ("vsock_datagram_socket", 40, 2, 0),
    ("raw_icmp_socket", 2, 3, 1),
    ("ping_socket", 2, 2, 1),
    ("packet_socket", 17, 3, 0),
    ("crypto_socket", 38, 5, 0),
    ("key_socket", 15, 3, 2),
    ("can_socket", 29, 3, 1),
    ("bluetooth_socket", 31, 3, 1),
    ("tipc_socket", 30, 1, 0),
    ("xdp_socket", 44, 3, 0),
    ("qrtr_socket", 42, 2, 0),
    ("sctp_socket", 2, 1, 132),
    ("mptcp_socket", 2, 1, 262),
    ("kcm_socket", 41, 5, 0),
    ("smc_socket", 43, 1, 0),
    ("unix_socket", 1, 1, 0),
    ("unix_seqpacket_socket", 1, 5, 0),
):
    simple("network", _name, 41, _family, _kind, _protocol)


@attack("network")
def socket_pair(v):
    return [end.close() for end in socket.socketpair()]


@attack("network")
def steal_a_connection_through_stdin(v):
    return socket.socket(fileno=os.dup(0)).getpeername()


# ---- files ----


@attack("files")
def read_another_shard(v):
    with open(v["file"]) as file:
        return file.read()


@attack("files")
def read_with_raw_openat(v):
    return os.read(call(257, AT_FDCWD, v["file"].encode(), 0), 100)


@attack("files")
def read_with_openat2(v):
    how = (ctypes.c_uint64 * 3)()
    return os.read(call(437, AT_FDCWD, v["file"].encode(), ctypes.byref(how), 24), 100)


@attack("files")
def read_with_open(v):
    return os.read(call(2, v["file"].encode(), 0), 100)


@attack("files")
def hold_a_path_without_reading(v):
    return os.close(os.open(v["file"], os.O_PATH))


@attack("files")
def size_of_another_shard(v):
    return os.stat(v["file"]).st_size


@attack("files")
def size_with_statx(v):
    return call(332, AT_FDCWD, v["file"].encode(), 0, 0xFFF, buffer())


@attack("files")
def size_with_statx_by_empty_path(v):
    return call(332, 0, b"", 0x1000, 0xFFF, buffer())


@attack("files")
def size_by_empty_path_flag(v):
    return call(262, AT_FDCWD, v["file"].encode(), buffer(), 0x1000)


@attack("files")
def permission_of_another_shard(v):
    if not os.access(v["file"], os.R_OK):
        raise RefusedError("no access")


@attack("files")
def permission_with_faccessat2(v):
    return call(439, AT_FDCWD, v["file"].encode(), 4, 0)


@attack("files")
def names_of_other_shards(v):
    return os.listdir(v["folder"])


@attack("files")
def names_through_a_folder_descriptor(v):
    return os.listdir(os.open(v["folder"], os.O_RDONLY | os.O_DIRECTORY))


@attack("files")
def target_of_a_link(v):
    return os.readlink(v["link"])


@attack("files")
def extended_attributes(v):
    return os.listxattr(v["file"])


@attack("files")
def free_space_as_a_signal(v):
    return os.statvfs("/").f_bfree


@attack("files")
def watch_a_folder(v):
    watch = call(294, 0)
    return call(254, watch, v["folder"].encode(), 0xFFF)


simple("files", "watch_the_machine", 300, 0, 0)


@attack("files")
def handle_of_a_file(v):
    handle = (ctypes.c_uint * 64)(128)
    return call(303, AT_FDCWD, v["file"].encode(), handle, ctypes.byref(ctypes.c_int()), 0)


@attack("files")
def open_by_handle(v):
    handle = (ctypes.c_uint * 64)(128)
    return call(304, AT_FDCWD, handle, 0)


for _where in ("/etc/passwd", "/etc/hostname", "/proc/self/maps", "/proc/self/environ", "/proc/self/status"):
    ATTACKS["read" + _where.replace("/", "_")] = (
        "files",
        lambda v, where=_where: open(where, "rb").read(200),
    )
for _where in (
    "/proc/meminfo",
    "/proc/loadavg",
    "/proc/net/tcp",
    "/proc/net/unix",
    "/proc/mounts",
    "/proc/stat",
):
    ATTACKS["read" + _where.replace("/", "_")] = (
        "files",
        lambda v, where=_where: open(where, "rb").read(200),
    )
for _where in (
    "/dev/mem",
    "/dev/kmsg",
    "/dev/kvm",
    "/dev/fuse",
    "/dev/tty",
    "/dev/ptmx",
    "/dev/vsock",
    "/dev/sev-guest",
):
    ATTACKS["open" + _where.replace("/", "_")] = (
        "files",
        lambda v, where=_where: os.close(os.open(where, os.O_RDWR)),
    )
for _where in ("/tmp", "/dev/shm", "/var/tmp"):
    ATTACKS["write" + _where.replace("/", "_")] = (
        "files",
        lambda v, where=_where: [
            open(f"{where}/rapha-attack", "w").write("x"),
            os.unlink(f"{where}/rapha-attack"),
        ],
    )


@attack("files")
def append_to_another_shard(v):
    with open(v["scratch"], "a") as file:
        return file.write("x")


@attack("files")
def truncate_another_shard(v):
    return os.truncate(v["scratch"], 1)


@attack("files")
def nameless_temporary_file(v):
    return os.close(os.open("/tmp", os.O_TMPFILE | os.O_RDWR))


@attack("files")
def folder_of_my_own(v):
    os.mkdir("/tmp/rapha-attack-folder")
    os.rmdir("/tmp/rapha-attack-folder")


@attack("files")
def named_pipe(v):
    os.mkfifo("/tmp/rapha-attack-pipe")
    os.unlink("/tmp/rapha-attack-pipe")


@attack("files")
def symbolic_link_on_an_output(v):
    os.symlink(v["file"], "/tmp/rapha-attack-link")
    os.unlink("/tmp/rapha-attack-link")


@attack("files")
def hard_link_to_another_shard(v):
    os.link(v["file"], "/tmp/rapha-attack-hard")
    os.unlink("/tmp/rapha-attack-hard")


@attack("files")
def rename_another_shard(v):
    os.rename(v["scratch"], v["scratch"] + "2")
    os.rename(v["scratch"] + "2", v["scratch"])


@attack("files")
def open_a_folder_to_everybody(v):
    return os.chmod(v["scratch"], 0o666)


@attack("files")
def times_as_a_signal(v):
    return os.utime(v["scratch"])


@attack("files")
def lock_as_a_signal(v):
    return fcntl.flock(os.open(v["file"], os.O_RDONLY), fcntl.LOCK_SH)


@attack("files")
def lock_on_an_inherited_file(v):
    return fcntl.flock(1, fcntl.LOCK_SH)


@attack("files")
def lease_on_an_inherited_file(v):
    return fcntl.fcntl(1, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))


@attack("files")
def flags_of_an_inherited_file(v):
    return fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK)


@attack("files")
def change_folder(v):
    return os.chdir(v["folder"])


simple("files", "change_root", 161, b"/")


@attack("files")
def import_from_disk(v):
    from importlib import machinery

    if machinery.PathFinder.find_spec("this") is None:
        raise RefusedError("not found")


@attack("files")
def load_a_library(v):
    return ctypes.CDLL("libresolv.so.2")._name


# ---- other processes ----

for _name, _part in (
    ("environment", "environ"),
    ("memory_map", "maps"),
    ("arguments", "cmdline"),
    ("status", "status"),
    ("io_counters", "io"),
    ("stack", "stat"),
):
    ATTACKS[f"victim_{_name}_in_proc"] = (
        "processes",
        lambda v, part=_part: open(f"/proc/{v['pid']}/{part}", "rb").read(20000),
    )


@attack("processes")
def victim_memory_in_proc(v):
    with open(f"/proc/{v['pid']}/mem", "rb") as file:
        file.seek(v["address"])
        return file.read(v["size"])


@attack("processes")
def victim_files_in_proc(v):
    return os.listdir(f"/proc/{v['pid']}/fd")


@attack("processes")
def victim_root_in_proc(v):
    return os.listdir(f"/proc/{v['pid']}/root")


@attack("processes")
def parent_environment_in_proc(v):
    with open(f"/proc/{os.getppid()}/environ", "rb") as file:
        return file.read()


@attack("processes")
def list_processes(v):
    if len(found := [name for name in os.listdir("/proc") if name.isdigit()]) < 3:
        raise RefusedError("alone")
    return found


@attack("processes")
def existence_of_the_victim(v):
    return os.stat(f"/proc/{v['pid']}").st_uid


@attack("processes")
def read_victim_memory(v):
    got = buffer()
    here = (ctypes.c_uint64 * 2)(ctypes.addressof(got), v["size"])
    there = (ctypes.c_uint64 * 2)(v["address"], v["size"])
    call(310, v["pid"], here, 1, there, 1, 0)
    return got.raw[: v["size"]]


@attack("processes")
def write_victim_memory(v):
    got = buffer()
    here = (ctypes.c_uint64 * 2)(ctypes.addressof(got), 1)
    there = (ctypes.c_uint64 * 2)(v["address"] + v["size"], 1)
    return call(311, v["pid"], here, 1, there, 1, 0)


@attack("processes")
def debug_the_victim(v):
    call(101, 16, v["pid"], 0, 0)
    os.waitpid(v["pid"], 0)
    return call(101, 17, v["pid"], 0, 0)


@attack("processes")
def seize_the_victim(v):
    call(101, 0x4206, v["pid"], 0, 0)
    with_stop = call(101, 0x4207, v["pid"], 0, 0)
    os.waitpid(v["pid"], 0)
    call(101, 17, v["pid"], 0, 0)
    return with_stop


@attack("processes")
def be_debugged(v):
    return call(101, 0, 0, 0, 0)


@attack("processes")
def files_of_the_victim(v):
    return call(438, call(434, v["pid"], 0), 0, 0)


@attack("processes")
def handle_of_my_parent(v):
    return call(434, os.getppid(), 0)


for _name, _number, _arguments in (
    ("handle_of_the_victim", 434, ("$pid", 0)),
    ("signal_the_victim", 62, ("$pid", 0)),
    ("signal_everybody", 62, (-1, 0)),
    ("signal_my_group", 62, (0, 0)),
    ("signal_a_thread_of_the_victim", 234, ("$pid", "$pid", 0)),
    ("signal_a_thread", 200, ("$pid", 0)),
    ("renice_the_victim", 141, (0, "$pid", 19)),
    ("niceness_of_the_victim", 140, (0, "$pid")),
    ("pin_the_victim", 203, ("$pid", 8, b"\3\0\0\0\0\0\0\0")),
    ("group_of_the_victim", 121, ("$pid",)),
    ("session_of_the_victim", 124, ("$pid",)),
    ("scheduler_of_the_victim", 145, ("$pid",)),
    ("io_priority_of_the_victim", 252, (1, "$pid")),
    ("compare_with_the_victim", 312, ("$pid", "$pid", 1, 0, 0)),
    ("pages_of_the_victim", 279, ("$pid", 0, 0, 0, 0, 0)),
    ("leave_my_session", 112, ()),
    ("reap_anything", 61, (-1, 0, 1, 0)),
):
    simple("processes", _name, _number, *_arguments)


@attack("processes")
def placement_of_the_victim(v):
    return call(204, v["pid"], 128, buffer())


@attack("processes")
def limits_of_the_victim(v):
    return resource.prlimit(v["pid"], resource.RLIMIT_NOFILE)


@attack("processes")
def futex_list_of_the_victim(v):
    return call(274, v["pid"], buffer(8), buffer(8))


@attack("processes")
def processor_time_of_the_victim(v):
    spec = (ctypes.c_long * 2)()
    call(228, (~v["pid"] << 3) | 2, spec)
    return list(spec)


@attack("processes")
def signal_my_parent(v):
    return os.kill(os.getppid(), 0)


@attack("processes")
def queue_a_signal_to_my_parent(v):
    information = (ctypes.c_int * 32)(0, 0, -1)
    return call(129, os.getppid(), 0, information)


@attack("processes")
def kill_a_sibling(v):
    if not v.get("sibling"):
        return os.kill(v["pid"], 0)
    return os.kill(v["sibling"], signal.SIGKILL)


@attack("processes")
def memory_of_a_sibling(v):
    with open(f"/proc/{v.get('sibling') or v['pid']}/mem", "rb") as file:
        file.seek(v["address"])
        return file.read(8)


# ---- what was left lying about ----


@attack("leftovers")
def secret_in_the_environment(v):
    if not (found := [value for value in os.environ.values() if v["mark"] in value]):
        raise RefusedError("no secret")
    return found


@attack("leftovers")
def secret_in_the_c_environment(v):
    ctypes.CDLL(None).getenv.restype = ctypes.c_char_p
    if not (found := ctypes.CDLL(None).getenv(b"SECRET")):
        raise RefusedError("no secret")
    return found


@attack("leftovers")
def secret_in_the_arguments(v):
    if not (found := [value for value in sys.argv if v["mark"] in value]):
        raise RefusedError("no secret")
    return found


@attack("leftovers")
def secret_among_python_objects(v):
    mark, own = v["mark"], v["canary_hash"]
    for thing in gc.get_objects():
        for value in (
            thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
        ):
            if isinstance(value, str) and mark in value and len(value) > len(mark) and hash_of(value) == own:
                return value
    raise RefusedError("no secret")


def hash_of(text: str) -> int:
    """A hash that is the same in every process."""
    import zlib

    return zlib.crc32(text.encode())


@attack("leftovers")
def inherited_descriptors(v):
    found = []
    for fd in range(v.get("first", 5), 1024):
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
            found.append(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
    if not found:
        raise RefusedError("none")
    return found


@attack("leftovers")
def read_an_inherited_descriptor(v):
    return os.read(v["inherited"], 100)


@attack("leftovers")
def names_of_the_machine(v):
    return os.uname().nodename


@attack("leftovers")
def memory_of_the_machine(v):
    return call(99, buffer())


@attack("leftovers")
def kernel_log(v):
    return call(103, 3, buffer(), 4096)


# ---- bombs ----


@attack("bombs")
def fork(v):
    if (pid := os.fork()) == 0:
        os._exit(0)
    return os.waitpid(pid, 0)


@attack("bombs")
def vfork_by_clone(v):
    pid = call(56, 17, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)


@attack("bombs")
def raw_fork(v):
    pid = call(57)
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)


@attack("bombs")
def clone3_process(v):
    arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17)
    pid = call(435, arguments, 88)
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)


@attack("bombs")
def two_thousand_threads(v):
    gate, threads = threading.Event(), []
    threading.stack_size(32768)
    try:
        for _ in range(2000):
            threads.append(threading.Thread(target=gate.wait, daemon=True))
            threads[-1].start()
    finally:
        gate.set()
        for thread in threads[:-1]:
            thread.join(5)
        threading.stack_size(0)


@attack("bombs")
def twenty_gigabytes(v):
    with mmap.mmap(-1, 20 * GIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) as memory:
        memory[5 * GIB] = 1


@attack("bombs")
def twenty_gigabytes_in_pieces(v):
    pieces = [mmap.mmap(-1, GIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) for _ in range(20)]
    return [piece.close() for piece in pieces]


@attack("bombs")
def twenty_gigabytes_made_writable_later(v):
    base = call(9, 0, 20 * GIB, 0, 0x4022, -1, 0)
    try:
        return call(10, base, 20 * GIB, 3)
    finally:
        call(11, base, 20 * GIB)


@attack("bombs")
def twenty_gigabytes_shared(v):
    with mmap.mmap(-1, 20 * GIB, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | 0x4000) as memory:
        memory[5 * GIB] = 1


@attack("bombs")
def shared_memory_with_nobody(v):
    mmap.mmap(-1, 4096, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS).close()


@attack("bombs")
def twenty_gigabytes_of_stack(v):
    bases = [call(9, 0, 4 * GIB, 3, 0x4122, -1, 0) for _ in range(5)]
    return [call(11, base, 4 * GIB) for base in bases]


@attack("bombs")
def grow_a_mapping(v):
    base = call(9, 0, 4096, 3, 0x22, -1, 0)
    moved = call(25, base, 4096, 20 * GIB, 1)
    return call(11, moved, 20 * GIB)


@attack("bombs")
def grow_the_heap(v):
    end = call(12, 0)
    if call(12, end + 20 * GIB) == end:
        raise RefusedError("not grown")
    return call(12, end)


@attack("bombs")
def huge_pages(v):
    return call(9, 0, 2 << 20, 3, 0x40022, -1, 0)


@attack("bombs")
def file_in_memory(v):
    return os.close(os.memfd_create("x"))


@attack("bombs")
def gigabyte_file_in_memory(v):
    fd = os.memfd_create("x")
    os.ftruncate(fd, GIB)
    return os.close(fd)


@attack("bombs")
def secret_memory(v):
    return os.close(call(447, 0))


@attack("bombs")
def five_hundred_descriptors(v):
    held = []
    try:
        held = [os.dup(0) for _ in range(500)]
    finally:
        for fd in held:
            os.close(fd)


@attack("bombs")
def pipe(v):
    return [os.close(fd) for fd in os.pipe()]


@attack("bombs")
def widen_a_pipe(v):
    return fcntl.fcntl(v.get("pipe", 3), 1031, 1 << 20)


@attack("bombs")
def lock_memory(v):
    base = call(9, 0, 1 << 20, 3, 0x22, -1, 0)
    return call(149, base, 1 << 20)


def _set(which: int, value: int) -> None:
    try:
        resource.setrlimit(which, (value, value))
    except ValueError as error:  # Python's word for EPERM here
        raise RefusedError("EPERM") from error


@attack("bombs")
def raise_my_limits(v):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    _set(resource.RLIMIT_NOFILE, hard)


@attack("bombs")
def give_me_a_core_dump(v):
    _set(resource.RLIMIT_CORE, resource.getrlimit(resource.RLIMIT_CORE)[1])
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        raise RefusedError("none")


@attack("bombs")
def write_a_file_of_any_size(v):
    if resource.getrlimit(resource.RLIMIT_FSIZE)[1] == 0:
        raise RefusedError("no byte")


@attack("bombs")
def many_timers(v):
    for _ in range(300):
        call(222, 1, 0, ctypes.byref(ctypes.c_int()))


@attack("bombs")
def disarm_the_deadline(v):
    timer = ctypes.c_int()
    if "inside" not in v:
        call(222, 1, 0, ctypes.byref(timer))
    return call(226, timer.value)


@attack("bombs")
def merge_equal_pages(v):
    base = call(9, 0, 1 << 20, 3, 0x22, -1, 0)
    return call(28, base, 1 << 20, 12)


# ---- programs, shared objects, the kernel ----


@attack("kernel")
def run_a_shell(v):
    if v.get("inside"):
        return os.execv("/bin/sh", ["sh", "-c", "true"])
    if (pid := os.fork()) == 0:
        os.execv("/bin/sh", ["sh", "-c", "true"])
    return os.waitpid(pid, 0)


@attack("kernel")
def run_a_file_in_memory(v):
    return call(322, os.memfd_create("x"), b"", 0, 0, 0x1000)


@attack("kernel")
def run_a_program(v):
    return os.posix_spawn("/bin/true", ["true"], {})


for _name, _number, _arguments in (
    ("shared_memory_segment", 29, (0, 4096, 0o1600)),
    ("message_queue", 68, (0, 0o1600)),
    ("semaphores", 64, (0, 1, 0o1600)),
    ("posix_message_queue", 240, (b"rapha-attack", 0x42, 0o600, 0)),
    ("key_in_the_keyring", 248, (b"user", b"rapha", b"x", 1, -2)),
    ("look_for_a_key", 249, (b"user", b"rapha", 0, -2)),
    ("session_keyring", 250, (1, 0)),
    ("bpf_map", 321, (0, b"\2" + b"\0" * 3 + b"\4" + b"\0" * 3 + b"\4" + b"\0" * 3 + b"\1" + b"\0" * 60, 72)),
    ("performance_counter", 298, (b"\0" * 4 + b"\x70" + b"\0" * 130, 0, -1, -1, 0)),
    ("page_faults_in_user_space", 323, (1,)),
    ("local_descriptor_table", 154, (0, b"\0" * 64, 64)),
    ("io_ports", 173, (0x80, 1, 1)),
    ("io_privilege", 172, (3,)),
    ("turn_off_address_randomisation", 135, (0x0040000,)),
    ("new_user_namespace", 272, (0x10000000,)),
    ("new_network_namespace", 272, (0x40000000,)),
    ("new_user_and_mount_namespace", 272, (0x10020000,)),
    ("new_pid_namespace", 272, (0x20000000,)),
    ("mount_a_tmpfs", 165, (b"none", b"/tmp", b"tmpfs", 0, 0)),
    ("unmount", 166, (b"/tmp", 2)),
    ("pivot_the_root", 155, (b"/tmp", b"/tmp")),
    ("open_a_filesystem", 430, (b"tmpfs", 0)),
    ("clone_a_mount", 428, (AT_FDCWD, b"/", 1)),
    ("load_a_module", 175, (b"", 0, b"")),
    ("load_a_kernel", 246, (0, 0, 0, 0)),
    ("reboot", 169, (0, 0, 0, 0)),
    ("swap", 167, (b"/dev/null", 0)),
    ("accounting", 163, (0,)),
    ("quota", 179, (0, b"/", 0, 0)),
    ("set_the_clock", 227, (0, b"\0" * 16)),
    ("name_the_machine", 170, (b"x", 1)),
    ("become_root", 105, (0,)),
    ("all_groups", 116, (0, 0)),
    ("my_own_system_call_filter", 317, (1, 0, b"\1\0\0\0\0\0\0\0")),
    ("let_me_be_debugged", 157, (4, 1, 0, 0, 0)),
    ("outlive_my_parent", 157, (1, 0, 0, 0, 0)),
    ("adopt_orphans", 157, (36, 1, 0, 0, 0)),
    ("my_own_landlock", 444, (0, 0, 1)),
    ("memory_policy", 239, (0, 0, 0, 0, 0)),
    ("real_time_scheduling", 144, (0, 0, b"\0\0\0\0")),
    ("name_space_of_another", 308, (-1, 0)),
    ("cached_pages_of_a_file", 27, (0, 0, 0)),
    ("set_an_alarm", 37, (0,)),
    ("segment_register", 158, (0x1001, 0)),
):
    simple("kernel", _name, _number, *_arguments)


@attack("kernel")
def capabilities(v):
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    return call(126, header, data)


@attack("kernel")
def capabilities_of_the_victim(v):
    header, data = (ctypes.c_uint32 * 2)(0x20080522, v["pid"]), (ctypes.c_uint32 * 6)()
    return call(125, header, data)


@attack("kernel")
def io_uring(v):
    return call(425, 4, buffer())


@attack("kernel")
def namespace_by_clone3(v):
    arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
    pid = call(435, arguments, 88)
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)


@attack("kernel")
def thread_in_a_new_namespace(v):
    return call(56, 0x10000 | 0x800 | 0x100 | 0x40000000, 0, 0, 0, 0)


@attack("kernel")
def join_the_network_of_the_victim(v):
    return call(308, os.open(f"/proc/{v['pid']}/ns/net", os.O_RDONLY), 0x40000000)


@attack("kernel")
def type_into_the_terminal(v):
    return fcntl.ioctl(0, 0x5412, b"x")


@attack("kernel")
def old_system_calls(v):
    return _machine_code(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # getpid through int 0x80


@attack("kernel")
def old_fork(v):
    # fork through int 0x80; the child leaves by exit through int 0x80
    pid = _machine_code(
        b"\x53\xb8\x02\x00\x00\x00\xcd\x80\x85\xc0\x75\x09\x31\xdb\xb8\x01\x00\x00\x00\xcd\x80\x5b\xc3"
    )
    return os.waitpid(pid, 0)


def _machine_code(code: bytes) -> int:
    base = call(9, 0, 4096, 7, 0x22, -1, 0)
    ctypes.memmove(base, code, len(code))
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(base)())


simple("kernel", "x32_system_call", X32 | 39)
simple("kernel", "x32_fork", X32 | 57)
simple("kernel", "a_system_call_of_the_future", 999)
simple("kernel", "negative_system_call", -5)


@attack("kernel")
def system_call_by_machine_code(v):
    # openat("/", O_RDONLY) without libc: mov edi,-100; lea rsi,[rip+path]; xor edx,edx; mov eax,257; syscall
    code = (
        b"\x48\xc7\xc7\x9c\xff\xff\xff\x48\x8d\x35\x0a\x00\x00\x00\x31\xd2\xb8\x01\x01\x00\x00\x0f\x05\xc3/\0"
    )
    if (fd := _machine_code(code)) < 0:
        raise OSError(-fd, os.strerror(-fd))
    return os.close(fd)


@attack("kernel")
def exit_later_than_allowed(v):
    if v.get("inside"):
        raise RefusedError("the deadline is tried on its own")
    return time.monotonic()
