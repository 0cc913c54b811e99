"""A control group per worker, where its launcher may make one: threads, memory and time, counted apart.

Resource limits count threads per user and not at all for root; a control group counts them per worker. Both
the unified hierarchy (v2, delegated) and the split one (v1) are tried; an ordinary user usually has neither.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

__all__ = ["Cgroup"]

_ROOT = Path("/sys/fs/cgroup")
_SPARE = 256 << 20  # pages shared with the zygote that a worker writes to become its own


class Cgroup:
    """Limits on one worker; `add` it before it is given anything to do, `close` once it is gone."""

    def __init__(self, name: str, memory: int, threads: int, share: int = 100) -> None:
        self._folders: list[Path] = []
        self._name = name
        self._limits = {"memory": memory + _SPARE, "pids": threads, "cpu": share}

    def add(self, pid: int) -> bool:
        """Put a process under the limits; true if the kernel now counts it there."""
        try:
            for folder, settings in self._plan():
                folder.mkdir()
                self._folders.append(folder)
                for file, value in settings.items():
                    (folder / file).write_text(str(value))
                (folder / "cgroup.procs").write_text(str(pid))
                if str(pid) not in (folder / "cgroup.procs").read_text().split():
                    return False
        except OSError:
            return False
        return bool(self._folders)

    def _plan(self) -> list[tuple[Path, dict[str, int]]]:
        memory, threads = self._limits["memory"], self._limits["pids"]
        paths: dict[str, str] = {}
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths.update(dict.fromkeys(controllers.split(","), path))
        if (_ROOT / "cgroup.controllers").exists():
            base = _ROOT / paths.get("", "/").lstrip("/")
            for wanted in ("+memory +pids", "+cpu"):
                with contextlib.suppress(OSError):
                    (base / "cgroup.subtree_control").write_text(wanted)
            settings = {"memory.max": memory, "memory.swap.max": 0, "pids.max": threads}
            if "cpu" in (base / "cgroup.subtree_control").read_text().split():
                settings["cpu.weight"] = self._limits["cpu"]
            return [(base / self._name, settings)]
        folder = {
            kind: _ROOT / kind / paths.get(kind, "/").lstrip("/") / self._name
            for kind in ("memory", "pids", "cpu")
        }
        plan = [
            (folder["pids"], {"pids.max": threads}),
            (folder["memory"], {"memory.limit_in_bytes": memory}),
        ]
        if "cpu" in paths:
            plan.append((folder["cpu"], {"cpu.shares": self._limits["cpu"] * 1024 // 100}))
        return plan

    def close(self) -> None:
        """Remove the group; waits a moment for the process to leave it."""
        for folder in self._folders:
            for _ in range(50):
                try:
                    os.rmdir(folder)
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.02)
        self._folders.clear()
