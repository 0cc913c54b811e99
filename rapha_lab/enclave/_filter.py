"""The system calls a worker may make: an allow-list, compiled to BPF by libseccomp in the launcher.

Everything a worker needs is loaded before it is locked, so every call that takes a path, makes a socket,
a process, a file or a mapping shared with anybody is absent. What is absent fails with EPERM; what no honest
program tries kills the worker, which its launcher sees as a violation.
"""

from __future__ import annotations

import errno
import tempfile

__all__ = ["compile_filter"]

_FREE = """
    read write readv writev lseek close poll ppoll select pselect6 getcwd
    epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2
    brk mremap munmap mprotect membarrier
    futex rseq set_robust_list set_tid_address sched_yield getcpu exit exit_group
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending sigaltstack restart_syscall pause
    nanosleep gettimeofday time times getrusage
    getpid gettid getppid getuid geteuid getgid getegid getresuid getresgid getrandom
""".split()

_FATAL = """
    ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd
    bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
    add_key request_key keyctl mount umount2 pivot_root move_mount open_tree fsopen fsmount mount_setattr
    unshare setns open_by_handle_at init_module finit_module delete_module kexec_load kexec_file_load
    reboot swapon swapoff acct quotactl iopl ioperm modify_ldt lookup_dcookie vhangup syslog
""".split()

_MAP_PRIVATE, _MAP_TYPE, _MAP_GROWSDOWN, _MAP_HUGETLB = 0x02, 0x0F, 0x0100, 0x40000
_THREAD = 0x100 | 0x800 | 0x10000  # CLONE_VM | CLONE_SIGHAND | CLONE_THREAD
_NAMESPACES = 0x7E020000 | 0x80 | 0x2000 | 0x4000  # CLONE_NEW*, CLONE_PTRACE, CLONE_VFORK
_MADVISE = (0, 1, 2, 3, 4, 8, 14, 15, 16, 17, 18, 19)  # not MADV_MERGEABLE: equal pages would show
_IOCTL = (0x5401, 0x541B, 0x5450, 0x5451)  # TCGETS, FIONREAD, FIONCLEX, FIOCLEX
_FCNTL = (0, 1030, 1, 2, 3)  # F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL
_PRCTL = (15, 16)  # PR_SET_NAME, PR_GET_NAME


def compile_filter() -> bytes:
    """The allow-list as BPF instructions for PR_SET_SECCOMP.

    Raises:
        RuntimeError, OSError: where libseccomp is missing or does not know this processor.
    """
    import pyseccomp as seccomp

    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    for name in _FREE:
        _add(rules, seccomp.ALLOW, name)
    for name in _FATAL:
        _add(rules, seccomp.KILL_PROCESS, name)
    _add(rules, seccomp.ERRNO(errno.ENOSYS), "clone3")
    for name, arguments in _checked(seccomp):
        _add(rules, seccomp.ALLOW, name, *arguments)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _checked(seccomp):  # type: ignore[no-untyped-def]
    """Calls allowed for certain arguments only."""
    where, equal, masked = seccomp.Arg, seccomp.EQ, seccomp.MASKED_EQ
    yield "clone", [where(0, masked, _THREAD | _NAMESPACES, _THREAD)]
    yield "mmap", [where(3, masked, _MAP_TYPE | _MAP_GROWSDOWN | _MAP_HUGETLB, _MAP_PRIVATE)]
    yield "sched_getaffinity", [where(0, equal, 0)]
    yield "prlimit64", [where(0, equal, 0), where(2, equal, 0)]
    for call in ("clock_gettime", "clock_getres", "clock_nanosleep"):
        yield call, [where(0, seccomp.LE, 11)]  # above: the processor time of any other process
    for call, position, values in (
        ("madvise", 2, _MADVISE),
        ("ioctl", 1, _IOCTL),
        ("fcntl", 1, _FCNTL),
        ("prctl", 0, _PRCTL),
    ):
        for value in values:
            yield call, [where(position, equal, value)]


def _add(rules, action: int, name: str, *arguments) -> None:  # type: ignore[no-untyped-def]
    import pyseccomp as seccomp

    number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)
    if number >= 0:  # negative: this processor or this libseccomp has no such call
        rules.add_rule(action, number, *arguments)
