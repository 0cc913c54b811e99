"""The demo site: a simulated enclave in processes of its own on this machine, alive as long as somebody holds it.

Every kernel that connects holds a lease, a locked file. When the last lease is gone and no cell runs, the
site stops by itself; its ledger goes with it, since its patients are public and its enclave is simulated.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from rapha_lab.client.home import home, read
from rapha_lab.client.progress import Progress
from rapha_lab.protocol.errors import SiteError
from rapha_lab.protocol.keys import PrivateKey

__all__ = ["PASSPHRASE", "folder", "hold", "researcher", "running", "start"]

PASSPHRASE = "demo patients are public"  # noqa: S105 - it guards a key of the simulated site only
_leases: dict[Path, IO[str]] = {}


def folder() -> Path:
    """Where the demo site keeps its state."""
    return home() / "demo"


def running() -> dict[str, Any] | None:
    """What the demo site wrote about itself, if it is alive: {"url", "pid"}."""
    told = read(folder() / "site.json")
    try:
        os.kill(int(told["pid"]), 0)
    except (KeyError, OSError, ValueError):
        return None
    return told


def researcher() -> PrivateKey:
    """The key with which this user is known to the demo site, made at first use."""
    path = folder() / "researcher.key"
    if not path.exists():
        PrivateKey.create().save(path, PASSPHRASE)
    return PrivateKey.load(path, PASSPHRASE)


def hold() -> None:
    """Keep the demo site alive as long as this process lives."""
    path = folder() / "leases" / str(os.getpid())
    if path not in _leases:
        path.parent.mkdir(parents=True, exist_ok=True)
        lease = path.open("w")
        fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _leases[path] = lease


def start(progress: Progress, seconds: float = 300) -> str:
    """Start the demo site unless it runs, hold it, and give its URL; `progress` is told what it does.

    Raises:
        SiteError: it did not come up; says where its output is.
    """
    folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder() / "start.lock").open("w") as lock:
        while not _taken(lock):  # two kernels at once start one site
            progress.say("Another kernel starts the demo's hospital")
            time.sleep(0.05)
        hold()
        told = running()
        if told is None:
            told = _launch(progress, seconds)
    return str(told["url"])


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _launch(progress: Progress, seconds: float) -> dict[str, Any]:
    doing = folder() / "starting"
    for old in (folder() / "site.json", doing):
        old.unlink(missing_ok=True)
    said = folder() / "site.log"
    key = str(researcher().public)
    command = [sys.executable, "-m", "rapha_lab.demo", str(folder()), "--researcher", key]
    with said.open("w") as output:
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        told = running()
        if told is not None:
            return told
        progress.say(f"Starting a simulated hospital on this machine: {_read(doing) or 'its processes'}")
        time.sleep(0.05)
    process.kill()
    progress.end("Given up")
    last = said.read_text().strip().splitlines()[-1:]
    raise SiteError(
        "The demo site did not start.",
        f"It wrote: {last[0] if last else 'nothing'}",
        f"See {said} for the rest.",
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
