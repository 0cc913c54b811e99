"""The walls: what the kernel says of a worker, how workers end, and that a site outlives them."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from snippets import Cell

from rapha_lab.enclave import _filter, sandbox
from rapha_lab.enclave.sandbox import Limits, Zygote, probe, tier_of
from rapha_lab.protocol.errors import SiteError

BOMB = "import mmap\nheld = [bytearray(1 << 28) for _ in range(80)]"
ROOT = str(Path(__file__).parent.parent.parent)


def bare(tier=None, entry="sandbox_cell:main", preload=()):
    """A zygote without the libraries: quick to start."""
    return Zygote(entry, preload, tier, bare=True)


class TestWhatTheKernelSays:
    def test_a_worker_is_filtered_and_has_no_privilege(self, zygote, cell):
        """Read from outside: a seccomp filter, no new privileges, no capability, not root's user in S2."""
        status = Path(f"/proc/{cell.worker.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert (fields["Seccomp"], fields["NoNewPrivs"], int(fields["CapEff"], 16)) == ("2", "1", 0)
        assert int(fields["CapBnd"], 16) == 0 or zygote.tier != "S3"

    def test_a_worker_holds_two_pipes_and_three_empty_files(self, cell):
        """Five descriptors and no more; none of them shared with a sibling."""
        folder = Path(f"/proc/{cell.worker.pid}/fd")
        if not os.access(folder, os.R_OK):
            pytest.skip("only root may look")
        cell.run("result = 1")  # by now it has told its launcher all it may
        targets = [os.readlink(folder / name) for name in sorted(os.listdir(folder))]
        assert targets[:3] == ["/dev/null"] * 3
        assert [target.split(":")[0] for target in targets[3:]] == ["pipe", "pipe"]

    def test_a_worker_knows_nothing_of_the_launcher(self, cell, monkeypatch):
        """Its environment is the same few names, whatever the launcher's holds."""
        names = cell.run("import os\nresult = sorted(os.environ)")
        assert set(names) <= {
            *sandbox._environment(""),
            "PWD",
            "LC_CTYPE",
            "_RJEM_MALLOC_CONF",
            *_set_by_torch(),
        }
        assert cell.run("result = os.getcwd()") == "/"

    def test_limits_stand_as_asked(self, zygote):
        """No file, no core, few descriptors, the processor seconds asked for."""
        with zygote.spawn(Limits(cpu_seconds=77)) as worker:
            limits = Cell(worker).run("""
import resource as r
result = [r.getrlimit(which)[1] for which in (r.RLIMIT_FSIZE, r.RLIMIT_CORE, r.RLIMIT_NOFILE, r.RLIMIT_CPU)]
""")
        assert limits == [0, 0, 64, 77]

    def test_a_session_gives_way_to_the_site(self, zygote, cell):
        """Every thread has the least priority and cannot raise it; all of them weigh a quarter of the site together."""
        cell.run(
            "import threading\ngate = threading.Event()\nthreading.Thread(target=gate.wait, daemon=True).start()"
        )
        pid = cell.worker.pid
        tasks = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        assert len(tasks) >= 2
        assert {os.getpriority(os.PRIO_PROCESS, task) for task in tasks} == {19}
        for raising in (
            "os.setpriority(0, 0, 0)",
            "os.nice(-19)",
            "os.sched_setscheduler(0, 0, os.sched_param(0))",
        ):
            assert cell.error(f"import os\n{raising}")[0] == "PermissionError"
        if (together := Path(f"/proc/{zygote._process.pid}/autogroup")).exists() and _own(zygote):
            assert together.read_text().split()[-2:] == ["nice", "6"]

    def test_a_session_has_a_twentieth_of_a_processs_weight_where_it_is_counted_apart(self, cell):
        """And threads and memory of its own, in a control group."""
        found = {
            Path(group).parent: Path(group) for group in _groups() if str(cell.worker.pid) in _inside(group)
        }
        if not found:
            pytest.skip("no control groups here")
        said = {
            path.name: path.read_text().strip()
            for group in found.values()
            for path in group.iterdir()
            if path.name in ("cpu.shares", "cpu.weight", "pids.max", "memory.max", "memory.limit_in_bytes")
        }
        assert said["pids.max"] == str(Limits().threads)
        assert {said.get("cpu.shares", "51"), said.get("cpu.weight", "5")} == {"51", "5"}
        assert int(said.get("memory.max") or said["memory.limit_in_bytes"]) <= Limits().memory + (256 << 20)

    @pytest.mark.skipif(
        not (Path("/proc/self/autogroup").exists() and shutil.which("unshare")),
        reason="the kernel has no such weights",
    )
    def test_sessions_that_start_at_once_all_give_way(self):
        """The kernel turns down all but one in a tenth of a second."""
        code = "from rapha_lab.enclave import _layers; _layers.give_way(); print(open('/proc/self/autogroup').read())"
        command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code]
        starting = [
            subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        told = [process.communicate(timeout=60)[0].split()[-2:] for process in starting]
        if any(process.returncode for process in starting):
            pytest.skip("the machine lets nobody make a user namespace")
        assert told == [["nice", "6"]] * 4

    def test_a_shard_does_not_give_way(self):
        """Its time is counted by the clock, and all sessions stand still meanwhile."""
        waiting = Zygote("sandbox_cell:main", (), bare=True, gives_way=False)
        with waiting as zygote, zygote.spawn(Limits.shard()) as worker:
            assert os.getpriority(os.PRIO_PROCESS, worker.pid) == os.getpriority(os.PRIO_PROCESS, 0)


def _own(zygote):
    """Whether its processes are weighed by sessions of the kernel's: they are in no control group for the processor."""
    lines = Path(f"/proc/{zygote._process.pid}/cgroup").read_text().splitlines()
    return not any("cpu" in line.split(":")[1].split(",") and line.split(":")[2] != "/" for line in lines)


def _set_by_torch():
    return {
        "TORCHINDUCTOR_CACHE_DIR",
        "KMP_DUPLICATE_LIB_OK",
        "KMP_INIT_AT_FORK",
        "TORCH_SHOW_CPP_STACKTRACES",
    }


class TestHowWorkersEnd:
    def test_closing_the_pipe_ends_it(self, zygote):
        """An entry that returns is `ended`."""
        with zygote.spawn() as worker:
            worker.writer.close()
            assert worker.wait(10) == "ended"

    def test_killing_it(self, cell):
        """`kill` ends a worker that does not listen."""
        cell.tell("while True: pass")
        cell.worker.kill()
        assert cell.worker.wait(10) == "killed"

    def test_waiting_has_a_limit(self, cell):
        """A worker that still runs is a TimeoutError, not an outcome."""
        with pytest.raises(TimeoutError):
            cell.worker.wait(0.01)

    def test_a_wall_clock_holds_against_blocked_signals(self, zygote):
        """The deadline needs no launcher and no consent."""
        with zygote.spawn(Limits(wall_seconds=1)) as worker:
            Cell(worker).tell("""
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: time.sleep(1)
""")
            assert worker.wait(20) == "time"

    def test_processor_time_is_limited(self, zygote):
        """A spinning worker is ended after its seconds, SIGXCPU ignored."""
        with zygote.spawn(Limits(cpu_seconds=1)) as worker:
            Cell(worker).tell(
                "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
            )
            assert worker.wait(60) == "time"

    def test_what_no_program_tries_is_a_violation(self, cell):
        """ptrace, bpf and their like end the worker."""
        cell.tell("import ctypes\nctypes.CDLL(None).ptrace(16, 1, 0, 0)")
        assert cell.worker.wait(10) == "violation"

    def test_talking_without_end_is_a_violation(self, zygote):
        """Bytes that leave a worker are counted."""
        with zygote.spawn(Limits(output=1000)) as worker:
            cell = Cell(worker)
            cell.tell("result = 'x' * 5000")
            assert len(worker.reader.read()) < 1000
            assert worker.wait(10) == "violation"

    def test_no_outcome_tells_more_than_one_word(self, cell):
        """However it exits, with whatever code, it has `ended`."""
        cell.tell("import os\nos._exit(42)")
        assert cell.worker.wait(10) == "ended"


class TestTheSiteGoesOn:
    def test_a_memory_bomb_is_refused_and_the_cell_can_go_on(self, cell):
        """Twenty gigabytes are a MemoryError; the worker lives."""
        assert cell.error(BOMB)[0] == "MemoryError"
        assert cell.run("held = None\nresult = 2 + 2") == 4

    def test_a_tensor_of_twenty_gigabytes_is_refused(self, cell):
        """torch says it cannot allocate."""
        kind, text = cell.error("import torch\ntorch.ones(5 * 2**30)")
        assert kind == "RuntimeError"
        assert "memory" in text

    def test_a_shared_mapping_is_refused(self, cell):
        """What the limit on private memory does not count cannot be had."""
        assert cell.error("import mmap\nmmap.mmap(-1, 1 << 20)")[0] in ("PermissionError", "OSError")

    def test_an_entry_out_of_memory_reports_that(self):
        """A MemoryError nobody caught is the outcome `memory`."""
        with bare(entry="sandbox_cell:greedy") as zygote, zygote.spawn(Limits(memory=1 << 28)) as worker:
            assert worker.wait(20) == "memory"

    def test_fork_bombs_do_not_fork(self, cell):
        """No process comes of it; the same worker goes on."""
        assert cell.error("import os\nwhile True: os.fork()") == (
            "PermissionError",
            "[Errno 1] Operation not permitted",
        )
        assert cell.error("import subprocess\nsubprocess.run(['true'])")[0] in ("PermissionError", "OSError")
        assert cell.run("result = 1") == 1

    def test_a_neighbour_finishes_while_bombs_go_off(self, zygote, cell):
        """Two bombs, one honest worker."""
        with zygote.spawn(Limits(memory=1 << 28)) as memory, zygote.spawn(Limits(threads=32)) as threads:
            Cell(memory).tell(BOMB)
            Cell(threads).tell("""
import threading
gate = threading.Event()
while True: threading.Thread(target=gate.wait, daemon=True).start()
""")
            assert cell.run(
                "import torch\na = torch.randn(300, 300)\nresult = bool(torch.isfinite(a @ a).all())"
            )
            assert Cell(threads).answer()["error"] == "RuntimeError"
            assert Cell(memory).answer()["error"] == "MemoryError"

    def test_two_hundred_workers_leave_nothing_behind(self):
        """No descriptor, no zombie, no control group, and the zygote still forks."""
        with bare() as zygote:
            before, groups = len(os.listdir("/proc/self/fd")), _groups()
            for _ in range(200):
                with zygote.spawn(Limits(wall_seconds=60)) as worker:
                    pass
                assert worker.wait(10) in ("ended", "killed")
            assert len(os.listdir("/proc/self/fd")) == before
            assert set(_groups()) <= set(groups)
            assert not _zombies_below(zygote._process.pid)
            with zygote.spawn() as worker:
                assert Cell(worker).run("result = 1") == 1

    def test_closing_the_zygote_ends_its_workers(self):
        """No worker outlives it."""
        with bare() as zygote:
            worker = zygote.spawn()
        assert worker.wait(5) == "killed"
        assert not os.path.exists(f"/proc/{worker.pid}")
        worker.close()
        with pytest.raises(SiteError, match="No worker"):
            zygote.spawn()

    def test_a_launcher_that_is_killed_takes_everything_with_it(self):
        """SIGKILL to the launcher: its zygote and workers are gone soon after."""
        source = (
            f"import sys; sys.path[:0] = [{ROOT!r}, {str(Path(__file__).parent)!r}]\n"
            "from rapha_lab.enclave.sandbox import *\n"
            "zygote = Zygote('sandbox_cell:main', (), bare=True); worker = zygote.spawn()\n"
            "print(worker.pid, flush=True); worker.wait()"
        )
        launcher = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        launcher.kill()
        launcher.wait()
        launcher.stdout.close()
        assert _gone(pid)


def _gone(pid):
    for _ in range(500):
        if not os.path.exists(f"/proc/{pid}"):
            return True
        time.sleep(0.01)
    return False


def _groups():
    """Control groups of this process's workers; those of others may go while one looks."""
    folders = (folder for folder, _, _ in os.walk("/sys/fs/cgroup"))
    return sorted(folder for folder in folders if Path(folder).name.startswith(f"rapha-{os.getpid()}-"))


def _inside(group):
    with contextlib.suppress(OSError):
        return Path(group, "cgroup.procs").read_text().split()
    return []


def _zombies_below(zygote_pid):
    """Zombies below the zygote's process."""
    family, zombies = {zygote_pid}, []
    for name in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) in family:
            family.add(int(name))
            zombies += [name] if fields[0] == "Z" else []
    return zombies


class TestTiersAreProved:
    def test_a_tier_is_the_layers_that_hold(self):
        """One layer less is one tier less, and below S1 nothing runs."""
        layers = dict.fromkeys(
            ("privileges", "rlimits", "deadline", "seccomp", "threads", "landlock", "namespaces"), True
        )
        assert tier_of(layers) == "S3"
        assert tier_of(layers | {"namespaces": False}) == "S2"
        assert tier_of(layers | {"landlock": False, "namespaces": False}) == "S1"
        assert all(tier_of(layers | {name: False}) == "S0" for name in ("seccomp", "rlimits", "privileges"))

    def test_the_probe_reports_what_this_machine_has(self):
        """With bubblewrap S3 where namespaces may be made, and a reason wherever it is less."""
        report = probe()
        assert report.tier in ("S1", "S2", "S3")
        assert report.reasons or report.tier == "S3"

    def test_without_bubblewrap_it_is_s2_and_says_why(self, monkeypatch):
        """Nothing else is needed."""
        monkeypatch.setattr(shutil, "which", lambda name: None)
        report = probe()
        assert report.tier == "S2"
        assert not report.layers["namespaces"]
        assert "bubblewrap is not installed" in report.reasons[0]

    def test_where_a_container_forbids_namespaces_it_is_s2(self):
        """An outer filter as container runtimes set it is found out by trying."""
        source = f"""
import errno, sys
sys.path[:0] = [{ROOT!r}]
import pyseccomp as s
rules = s.SyscallFilter(s.ALLOW)
for name in ("unshare", "mount", "setns", "pivot_root", "keyctl"):
    rules.add_rule(s.ERRNO(errno.EPERM), name)
rules.add_rule(s.ERRNO(errno.EPERM), "clone", s.Arg(0, s.MASKED_EQ, 0x10000000, 0x10000000))
rules.add_rule(s.ERRNO(errno.ENOSYS), "clone3")
rules.load()
from rapha_lab.enclave.sandbox import probe
report = probe()
print(report.tier, len(report.reasons))
"""
        output = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, check=True
        ).stdout
        assert output.split() == ["S2", "1"]

    @pytest.mark.parametrize("hole", ["openat", "newfstatat", "socket", "pipe2", "kill", "clone"])
    def test_a_filter_with_one_hole_is_found_out(self, monkeypatch, hole):
        """A worker tries each kind of call it must not have; one that works and nothing is started."""
        monkeypatch.setattr(_filter, "_FREE", [*_filter._FREE, hole])
        monkeypatch.setattr(_filter, "_THREAD", 0 if hole == "clone" else _filter._THREAD)
        with pytest.raises(SiteError, match="cannot hold foreign code"):
            bare("S1")

    def test_elsewhere_than_on_linux_it_says_so(self, monkeypatch):
        """A clear refusal, not an AttributeError."""
        monkeypatch.setattr(sys, "platform", "darwin")
        with pytest.raises(SiteError, match="Linux only"):
            bare()

    @pytest.mark.parametrize("entry", ["nosuchpackage:main", "sandbox_cell:nosuchfunction"])
    def test_an_entry_that_is_not_there_is_named(self, entry):
        """The message names what is missing."""
        with pytest.raises(SiteError, match="nosuch"):
            bare("S2", entry)

    def test_a_preloaded_module_that_starts_a_thread_is_refused(self, tmp_path, monkeypatch):
        """A lock held by a thread that does not exist after the fork would hang every worker."""
        (tmp_path / "threaded_module.py").write_text(
            "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(SiteError, match="started a thread"):
            bare("S2", "sandbox_cell:main", ["threaded_module"])


def test_an_error_from_the_kernel_is_what_a_denied_call_gives(cell):
    """EPERM everywhere, so that libraries fall back as they do for a file they may not read."""
    assert (
        cell.run("""
import os, socket
def code(attempt):
    try: attempt()
    except OSError as error: return error.errno
result = [code(lambda: open("/etc/passwd")), code(lambda: os.listdir("/")), code(socket.socket)]
""")
        == [errno.EPERM] * 3
    )


def test_interrupting_a_cell_is_possible(cell):
    """The entry can turn a message into KeyboardInterrupt, since SIGINT keeps Python's handler."""
    assert cell.run("import signal\nresult = signal.getsignal(signal.SIGINT) is signal.default_int_handler")
