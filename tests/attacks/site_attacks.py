"""Attacks on a site's own files and doors, through the libraries a worker has; each a function of `v` as in attacks.py.

The site's files are real ones with the canary in them: records as Parquet, DuckDB, MEDS and pictures, a PostgreSQL
snapshot, the ledger, the log, keys, opt-outs, the policy. `lay_out` writes them.
What a session has loaded is imported here too: else a missing module would pass for a wall.
"""

# ruff: noqa: SIM115

import asyncio
import contextlib
import ctypes
import http.client
import mmap
import multiprocessing.pool
import multiprocessing.queues
import multiprocessing.shared_memory
import os
import socket
import sqlite3
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars._utils.parquet
import torch
import torch.utils.serialization
from attacks import LIBC, RefusedError, attack, call, simple

LIBRARY = "/lib/x86_64-linux-gnu/libresolv.so.2"
PICTURE = bytes.fromhex("89504e470d0a1a0a")


def lay_out(folder: str, canary: str) -> str:
    """A site's folder below `folder`; gives its path."""
    site = Path(folder) / "site"
    for name in ("meds/data", "images", "notes", "state/opt-outs", "snapshot"):
        (site / name).mkdir(parents=True)
    records = pl.DataFrame({"patient": ["p1"], "note": [canary]})
    for name in ("records.parquet", "meds/data/0.parquet", "snapshot/person.parquet"):
        records.write_parquet(site / name)
    records.write_csv(site / "records.csv")
    (site / "images" / "p1.png").write_bytes(PICTURE + canary.encode())
    (site / "notes" / "p1.txt").write_text(canary)
    for name in ("site.key", "split.salt", "opt-outs/flchain.json"):
        (site / "state" / name).write_text(canary)
    (site / "policy.toml").write_text(canary)
    np.save(site / "array.npy", np.frombuffer(canary.encode(), np.uint8))
    torch.save({"canary": torch.tensor(list(canary.encode()))}, site / "weights.pt")
    for name in ("ledger.sqlite", "log.sqlite"):
        with contextlib.closing(sqlite3.connect(site / "state" / name)) as db:
            db.execute("create table entry (said text)")
            db.execute("insert into entry values (?)", (canary,))
            db.commit()
    with contextlib.suppress(ImportError):
        import duckdb

        with duckdb.connect(str(site / "records.duckdb")) as base:
            base.execute("create table record as select ? as note", [canary])
    return str(site)


def _at(v: dict[str, Any], name: str) -> str:
    return f"{v['site']}/{name}"


# ---- a site's files ----


def _reads(group: str, name: str, path: str) -> None:
    """An attack that reads a file: of the site, or of the machine if the path begins with /."""

    def read(v: dict[str, Any]) -> bytes:
        with open(path if path.startswith("/") else _at(v, path), "rb", buffering=0) as file:
            return file.read(200)

    read.__name__ = name
    attack(group)(read)


for _name, _path in (
    ("read_the_signing_key", "state/site.key"),
    ("read_the_salt_of_splits", "state/split.salt"),
    ("read_the_opt_outs", "state/opt-outs/flchain.json"),
    ("read_the_ledger_as_bytes", "state/ledger.sqlite"),
    ("read_the_log_as_bytes", "state/log.sqlite"),
    ("read_the_policy", "policy.toml"),
    ("read_records_in_csv", "records.csv"),
    ("read_records_in_duckdb_as_bytes", "records.duckdb"),
    ("read_an_image", "images/p1.png"),
    ("read_a_note", "notes/p1.txt"),
    ("read_a_snapshot_of_postgresql", "snapshot/person.parquet"),
):
    _reads("a site's files", _name, _path)


@attack("a site's files")
def names_of_the_state_folder(v):
    return os.listdir(_at(v, "state"))


@attack("a site's files")
def walk_the_images(v):
    if not (found := list(Path(_at(v, "images")).glob("*.png"))):
        raise RefusedError("none")
    return found


@attack("a site's files")
def age_of_the_ledger(v):
    return os.stat(_at(v, "state/ledger.sqlite")).st_mtime


def _sql(v: dict[str, Any], path: str, *words: str) -> list[Any]:
    try:
        with contextlib.closing(sqlite3.connect(_at(v, path))) as base:
            rows = [base.execute(word).fetchall() for word in words]
            base.commit()
            return rows
    except sqlite3.OperationalError as error:
        raise RefusedError(str(error)) from error


@attack("a site's files")
def query_the_ledger(v):
    return _sql(v, "state/ledger.sqlite", "select * from entry")


@attack("a site's files")
def query_the_log(v):
    return _sql(v, "state/log.sqlite", "select * from entry")


@attack("a site's files")
def add_to_the_ledger(v):
    return _sql(v, "state/ledger.sqlite", "insert into entry values ('mine')")


@attack("a site's files")
def attach_the_ledger_to_a_base_in_memory(v):
    try:
        with contextlib.closing(sqlite3.connect(":memory:")) as base:
            base.execute("attach ? as theirs", (_at(v, "state/ledger.sqlite"),))
            return base.execute("select * from theirs.entry").fetchall()
    except sqlite3.OperationalError as error:
        raise RefusedError(str(error)) from error


@attack("a site's files")
def roll_the_ledger_back(v):
    os.rename(_at(v, "state/ledger.sqlite"), _at(v, "state/old"))
    os.rename(_at(v, "state/old"), _at(v, "state/ledger.sqlite"))


@attack("a site's files")
def another_policy(v):
    with open(_at(v, "policy.toml"), "a") as file:
        return file.write("# mine\n")


@attack("a site's files")
def another_signing_key(v):
    return os.replace(_at(v, "state/split.salt"), _at(v, "state/split.salt"))


# ---- libraries ----


@attack("libraries")
def polars_reads_parquet(v):
    return pl.read_parquet(_at(v, "records.parquet")).rows()


@attack("libraries")
def polars_scans_meds(v):
    return pl.scan_parquet(_at(v, "meds/data/*.parquet")).collect().rows()


@attack("libraries")
def polars_reads_csv(v):
    return pl.read_csv(_at(v, "records.csv")).rows()


@attack("libraries")
def polars_reads_a_url(v):
    return pl.read_csv(f"http://127.0.0.1:{v['web']}/records.csv").rows()


@attack("libraries")
def polars_queries_a_path(v):
    with pl.SQLContext() as context:
        return context.execute(f"select * from read_csv('{_at(v, 'records.csv')}')").collect().rows()


@attack("libraries")
def polars_writes_a_file(v):
    return pl.DataFrame({"a": [1]}).write_csv(_at(v, "mine.csv"))


@attack("libraries")
def polars_sinks_a_file(v):
    return pl.LazyFrame({"a": [1]}).sink_parquet(_at(v, "mine.parquet"))


@attack("libraries")
def duckdb_reads_records(v):
    import duckdb

    return duckdb.connect(_at(v, "records.duckdb"), read_only=True).execute("from record").fetchall()


@attack("libraries")
def pyarrow_reads_parquet(v):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(_at(v, "records.parquet")).to_pylist()


@attack("libraries")
def numpy_loads_a_file(v):
    return bytes(np.load(_at(v, "array.npy")))


@attack("libraries")
def numpy_maps_a_file(v):
    return bytes(np.memmap(_at(v, "notes/p1.txt"), mode="r"))


@attack("libraries")
def numpy_maps_my_own_memory(v):
    return np.memmap("/proc/self/mem", mode="r", offset=0, shape=(1,)).shape


@attack("libraries")
def numpy_writes_a_file(v):
    return np.save(_at(v, "mine.npy"), np.zeros(3))


@attack("libraries")
def torch_loads_weights(v):
    return bytes(torch.load(_at(v, "weights.pt"))["canary"].tolist())


@attack("libraries")
def torch_maps_weights(v):
    return torch.load(_at(v, "weights.pt"), mmap=True)


@attack("libraries")
def torch_maps_a_file(v):
    path = _at(v, "notes/p1.txt")
    return bytes(torch.from_file(path, size=len(v["mark"]), dtype=torch.uint8).tolist())


@attack("libraries")
def torch_writes_weights(v):
    return torch.save({}, _at(v, "mine.pt"))


@attack("libraries")
def torch_shares_a_tensor(v):
    return torch.zeros(3).share_memory_().is_shared()


@attack("libraries")
def python_shares_memory(v):
    held = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
    held.close()
    held.unlink()


@attack("libraries")
def python_maps_a_file(v):
    with open(_at(v, "notes/p1.txt"), "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)[:]


@attack("libraries")
def a_pool_of_processes(v):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(abs, [-1])


@attack("libraries")
def a_shell_of_subprocess(v):
    return subprocess.run(["/bin/true"], check=True).returncode


@attack("libraries")
def an_event_loop_of_asyncio(v):
    """Where it opens, it opens a pair of sockets."""

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", v["web"])
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        return await reader.read(200)

    return asyncio.run(ask())


@attack("libraries")
def a_library_that_i_wrote(v):
    with open(LIBRARY, "rb") as source, open(path := _at(v, "mine.so"), "wb") as target:
        target.write(source.read())
    return ctypes.CDLL(path)._name


@attack("libraries")
def a_library_in_memory(v):
    return os.close(os.memfd_create("library"))


# ---- a site's doors ----


def _fetch(v: dict[str, Any], path: str) -> bytes:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", v["web"], timeout=3)) as door:
        door.request("GET", path)
        return door.getresponse().read()


@attack("a site's doors")
def ask_the_gateway_for_evidence(v):
    return _fetch(v, "/evidence?nonce=" + "0" * 64)


@attack("a site's doors")
def open_the_console(v):
    return _fetch(v, "/console")


@attack("a site's doors")
def send_an_envelope(v):
    door = http.client.HTTPConnection("127.0.0.1", v["web"], timeout=3)
    door.request("POST", "/open", b"RPS1")
    return door.getresponse().read()


@attack("a site's doors")
def fetch_a_page(v):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{v['web']}/", timeout=3).read()
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else error from error


@attack("a site's doors")
def pass_a_descriptor_to_the_victim(v):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(v["unix"])
        return socket.send_fds(sock, [b"x"], [0])


@attack("a site's doors")
def pass_a_descriptor_through_my_pipe(v):
    """sendmsg on a descriptor that one has: outside, on a socket; inside there is only a pipe."""
    message = (ctypes.c_uint64 * 7)()
    if v.get("inside"):
        return call(46, 4, message, 0)
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return socket.send_fds(ends[0], [b"x"], [0])


@attack("a site's doors")
def open_a_pipe_of_the_victim(v):
    names = os.listdir(f"/proc/{v['pid']}/fd")
    return [os.readlink(f"/proc/{v['pid']}/fd/{name}") for name in names]


@attack("a site's doors")
def open_my_own_pipe_anew(v):
    return os.close(os.open(f"/proc/self/fd/{v.get('pipe', 3)}", os.O_RDONLY | os.O_NONBLOCK))


# ---- more of the kernel ----

for _name, _number, _arguments in (
    ("timer_as_a_file", 283, (1, 0)),
    ("signals_as_a_file", 289, (-1, b"\0" * 8, 8, 0)),
    ("filesystem_context", 431, (-1, 0, 0, 0, 0)),
    ("mount_of_a_context", 432, (-1, 0, 0)),
    ("pick_a_filesystem", 433, (-100, b"/", 0)),
    ("move_a_mount", 429, (-100, b"/tmp", -100, b"/tmp", 0)),
    ("attributes_of_a_mount", 442, (-100, b"/", 0, b"\0" * 32, 32)),
    ("look_at_mounts", 457, (b"\x18" + b"\0" * 7 + b"\x01" + b"\0" * 15, b"\0" * 512, 512, 0)),
    ("list_mounts", 458, (b"\x18" + b"\0" * 7 + b"\xff" * 8 + b"\0" * 8, b"\0" * 512, 64, 0)),
    ("watch_all_files", 301, (-1, 1, 8, -100, b"/")),
    ("bpf_program", 321, (5, b"\0" * 72, 72)),
    ("advise_the_victims_memory", 440, (-1, 0, 0, 0, 0)),
    ("reap_the_victims_memory", 448, (-1, 0)),
    ("signal_by_handle", 424, (-1, 0, 0, 0)),
    ("cached_pages_by_file", 451, (0, b"\0" * 16, b"\0" * 40, 0)),
    ("shadow_stack", 453, (0, 4096, 0)),
    ("security_attributes", 459, (100, 0, b"\0" * 4, 0)),
    ("list_security_modules", 461, (b"\0" * 64, b"\x40\0\0\0", 0)),
    ("seal_my_memory", 462, (0, 0, 0)),
    ("wait_for_several_futexes", 449, (0, 0, 0, 0, 0)),
    ("new_futex_wake", 454, (0, 0, 0, 0)),
    ("priority_of_io", 251, (1, 0, 0)),
    ("splice_pipes", 275, (3, 0, 4, 0, 0, 0)),
    ("give_pages_to_a_pipe", 278, (4, 0, 0, 0)),
    ("tee_pipes", 276, (3, 4, 0, 0)),
    ("send_a_file", 40, (1, 0, 0, 0)),
    ("copy_between_files", 326, (0, 0, 0, 0, 0, 0)),
    ("read_at_an_offset_beyond_a_pipe", 295, (0, 0, 0, 0, 0)),
    ("write_one_file_back", 74, (0,)),
    ("reserve_a_file", 285, (1, 0, 0, 1)),
    ("lengthen_a_file", 77, (1, 0)),
    ("owner_of_a_file", 93, (1, -1, -1)),
    ("mode_of_a_file", 91, (1, 0o600)),
    ("statistics_of_an_open_file", 5, (0, b"\0" * 256)),
    ("free_space_by_an_open_file", 138, (0, b"\0" * 256)),
    ("seal_of_a_file", 72, (0, 1034, 0)),
    ("owner_of_signals_of_a_file", 72, (3, 8, 0)),
    ("signal_on_input", 72, (3, 10, 0)),
    ("mask_of_new_files", 95, (0o22,)),
    ("group_of_filesystem_access", 123, (0,)),
    ("user_of_filesystem_access", 122, (0,)),
    ("scheduling_attributes", 315, (0, b"\0" * 64, 56, 0)),
    ("scheduling_attributes_of_my_own", 314, (0, b"\x30" + b"\0" * 47, 0)),
    ("set_an_interval_timer", 38, (0, 0, 0)),
    ("discipline_the_clock", 159, (b"\0" * 208,)),
    ("leave_the_processor_pinning", 203, (0, 8, b"\xff\0\0\0\0\0\0\0")),
    ("migrate_my_pages", 256, (0, 0, 0, 0)),
    ("fault_pages_in_beforehand", 187, (0, 0, 0)),
    ("new_protection_keys", 330, (0, 0)),
    ("remap_file_pages", 216, (0, 0, 0, 0, 0)),
    ("old_dir_entries", 78, (0, b"\0" * 64, 64)),
    ("swap_off", 168, (b"/dev/null",)),
    ("load_a_module_from_a_file", 313, (0, b"", 0)),
    ("unload_a_module", 176, (b"none", 0)),
    ("load_a_kernel_from_a_file", 320, (0, 0, 0, b"", 0)),
    ("domain_of_the_machine", 171, (b"x", 1)),
    ("disassociate_the_tables", 272, (0x400,)),
    ("own_filesystem_view", 272, (0x200,)),
    ("new_ipc_namespace", 272, (0x8000000,)),
    ("new_time_namespace", 272, (0x80,)),
    ("new_cgroup_namespace", 272, (0x2000000,)),
    ("prctl_memory_map", 157, (35, 14, 0, 0, 0)),
    ("prctl_let_anybody_trace_me", 157, (0x59616D61, -1, 0, 0, 0)),
    ("prctl_core_scheduling", 157, (62, 0, 0, 0, 0)),
    ("prctl_time_stamp_counter", 157, (25, b"\0" * 8, 0, 0, 0)),
    ("prctl_speculation", 157, (53, 0, 2, 0, 0)),
    ("prctl_ambient_capability", 157, (47, 4, 0, 0, 0)),
    ("prctl_dispatch_of_calls", 157, (59, 0, 0, 0, 0)),
    ("prctl_timer_slack", 157, (29, 1, 0, 0, 0)),
    ("prctl_huge_pages", 157, (41, 1, 0, 0, 0)),
    ("prctl_keep_capabilities", 157, (8, 1, 0, 0, 0)),
    ("prctl_secure_bits", 157, (28, 0, 0, 0, 0)),
    ("prctl_my_death_signal", 157, (2, b"\0" * 8, 0, 0, 0)),
    ("prctl_name_of_a_mapping", 157, (0x53564D41, 0, 0, 0, 0)),
    ("prctl_control_of_io_errors", 157, (57, 1, 0, 0, 0)),
    ("prctl_merge_all_my_pages", 157, (67, 1, 0, 0, 0)),
):
    simple("more of the kernel", _name, _number, *_arguments)


@attack("more of the kernel")
def system_call_from_another_thread(v):
    """A filter that holds for one thread only would let a second one out."""
    found: list[Any] = []

    def out() -> None:
        try:
            found.append(open(v["file"]).read())
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=out)
    thread.start()
    thread.join()
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]


@attack("more of the kernel")
def system_call_in_a_race_of_threads(v):
    """Paths that change under the kernel's eyes: the filter looks at none."""
    path, got, over = ctypes.create_string_buffer(b"/nowhere/at/all".ljust(200, b"\0")), [], threading.Event()

    def swap() -> None:
        while not over.is_set():
            path.value = v["file"].encode()
            path.value = b"/nowhere"

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(3000):
            if (fd := LIBC.open(path, 0)) >= 0:
                got.append(os.read(fd, 100))
                os.close(fd)
                break
    finally:
        over.set()
        thread.join()
    if not got:
        raise RefusedError("not once in 3,000")
    return got


@attack("more of the kernel")
def call_by_another_convention(v):
    """A system call whose number is right in its low half only."""
    return call((1 << 32) + 257, -100, v["file"].encode(), 0)


for _where in (
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/random/boot_id",
    "/proc/self/mountinfo",
    "/proc/self/cgroup",
    "/proc/self/attr/current",
    "/proc/kallsyms",
    "/proc/interrupts",
    "/proc/schedstat",
    "/proc/pressure/cpu",
    "/proc/vmstat",
    "/sys/class/net/lo/statistics/rx_bytes",
    "/sys/devices/system/cpu/online",
    "/dev/urandom",
    "/dev/zero",
    "/dev/null",
    "/dev/full",
):
    _reads("more of the kernel", "open" + _where.replace("/", "_"), _where)


@attack("more of the kernel")
def write_how_memory_is_overcommitted(v):
    return os.close(os.open("/proc/self/oom_score_adj", os.O_WRONLY))


@attack("more of the kernel")
def stop_myself(v):
    """A stopped worker would keep its place for ever; outside, signal 0 shows that it may."""
    return os.kill(os.getpid(), 0)


@attack("more of the kernel")
def stop_my_thread(v):
    return call(234, os.getpid(), threading.get_native_id(), 0)


# ---- more bombs ----


@attack("bombs")
def sparse_file_of_a_terabyte(v):
    path = "/tmp/rapha-attack-sparse"
    with open(path, "wb") as file:
        os.unlink(path)
        return file.truncate(1 << 40)


@attack("bombs")
def a_thousand_small_files(v):
    for number in range(1000):
        path = f"/tmp/rapha-attack-{number}"
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        os.unlink(path)


@attack("bombs")
def a_million_watches(v):
    return [os.close(call(294, 0)) for _ in range(50)]


@attack("bombs")
def twenty_gigabytes_of_python(v):
    """Asked for as zeros, which outside are had for nothing until they are touched."""
    return len(np.zeros(20 << 30, np.uint8))


@attack("bombs")
def twenty_gigabytes_of_torch(v):
    return torch.empty(20 << 30, dtype=torch.uint8).numel()


@attack("bombs")
def set_my_priority(v):
    """To keep it is a try at the same call, which outside anybody may."""
    return call(141, 0, 0, 19)
