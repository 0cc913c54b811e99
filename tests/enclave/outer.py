"""Starts a program as an ordinary user behind a filter as containers set it: `python outer.py KIND PROGRAM...`.

docker     what Docker's default profile refuses to a container without capabilities
nothing    no user namespace can be made: max_user_namespaces is 0
unknown    the same as docker on a kernel without Landlock
unfiltered the same, and no filter may be set
"""

import ctypes
import errno
import os
import sys

import pyseccomp as seccomp

USER = 61000
REFUSED = """
    acct add_key bpf delete_module finit_module fsconfig fsmount fsopen fspick init_module io_uring_enter
    io_uring_register io_uring_setup kcmp kexec_file_load kexec_load keyctl lookup_dcookie mount mount_setattr move_mount
    move_pages nfsservctl open_by_handle_at open_tree perf_event_open pivot_root quotactl reboot request_key
    setdomainname sethostname setns settimeofday swapoff swapon sysfs syslog umount2 unshare userfaultfd vhangup
""".split()
LANDLOCK = "landlock_create_ruleset landlock_add_rule landlock_restrict_self".split()
NEW_USER, NEW_ANY = 0x10000000, 0x7E020000


def docker(*more: tuple[int, str]) -> None:
    """Load the filter into this process, with further (error, call) pairs."""
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    pairs = [*((errno.EPERM, name) for name in REFUSED), (errno.ENOSYS, "clone3"), *more]
    for code, name in pairs:
        if (number := seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)) >= 0:
            rules.add_rule(seccomp.ERRNO(code), number)
    for bit in (1 << n for n in range(32) if NEW_ANY & 1 << n):
        rules.add_rule(seccomp.ERRNO(errno.EPERM), "clone", seccomp.Arg(0, seccomp.MASKED_EQ, bit, bit))
    if ("seccomp",) in {(name,) for _, name in more}:
        rules.add_rule(seccomp.ERRNO(errno.EINVAL), "prctl", seccomp.Arg(0, seccomp.EQ, 22))
    rules.load()


def nowhere() -> None:
    """A user namespace of our own in which no further one may be made."""
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_USER):
        raise OSError(ctypes.get_errno(), "unshare")
    for path, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{path}", "w") as file:
            file.write(text)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")


def main(kind: str, *program: str) -> None:
    """Become an ordinary user where one is root, put the filter on, run the program."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # else /proc/self stays root's
    unknown = [(errno.ENOSYS, name) for name in LANDLOCK]
    if kind == "nothing":
        nowhere()
    elif kind == "docker":
        docker()
    elif kind == "unknown":
        docker(*unknown)
    else:
        docker(*unknown, (errno.EPERM, "seccomp"))
    ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # as containers with allowPrivilegeEscalation: false
    os.execv(program[0], program)


if __name__ == "__main__":
    main(*sys.argv[1:])
