"""Binder's files, run as Binder runs them: no privileges, no user namespaces, a private home, a fresh environment.

Not covered here: the solving of environment.yml and its base image. The packages of the environment that
runs the tests stand in for it, and so does the front end as built in this tree: here the package is installed
without node, as from a wheel or an sdist.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
USER = 1000
MEMORY = 2 << 30
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "node_modules", "build", "dist", "__pycache__", "*.tsbuildinfo", ".*_cache"
)
EXECUTE = """
import nbformat, os
from nbclient import NotebookClient
os.chdir("notebooks")
notebook = nbformat.read("01-first-model.ipynb", as_version=4)
NotebookClient(notebook, timeout=300).execute()
print("executed as", os.getuid())
"""


def _binder(name: str) -> str:
    return (ROOT / "binder" / name).read_text()


def _as_on_binder() -> None:
    """No capability can be regained, and no user namespace entered, whoever runs the tests."""
    import pyseccomp

    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    refuse = pyseccomp.ERRNO(1)
    new_user = 0x10000000
    rules.add_rule(refuse, "unshare")
    rules.add_rule(refuse, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, new_user, new_user))
    rules.add_rule(pyseccomp.ERRNO(38), "clone3")  # ENOSYS: the C library falls back to clone
    rules.load()


class Machine:
    """A copy of the repository and a fresh environment, owned by a user without privileges."""

    def __init__(self, folder: Path, python: str) -> None:
        self.home, self.repository, self.prefix = (
            folder / "home",
            folder / "home" / "repository",
            folder / "env",
        )
        self.home.mkdir()
        shutil.copytree(ROOT, self.repository, ignore=LEFT_OUT)
        subprocess.run([python, "-m", "venv", "--without-pip", self.prefix], check=True)
        site = self.prefix / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        (site / "stands-in-for-the-image.pth").write_text(sysconfig.get_path("purelib") + "\n")
        no_node = self.prefix / "bin" / "node"
        no_node.write_text("#!/bin/sh\nexit 127\n")
        no_node.chmod(0o755)
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, USER, USER, follow_symlinks=False)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command there as that user."""
        drop = (
            f"--reuid={USER} --regid={USER} --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all"
        )
        path = f"{self.prefix}/bin:{os.environ['PATH']}"
        environment = {"HOME": str(self.home), "PATH": path, "LANG": "C.UTF-8"}
        passed = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        return subprocess.run(
            ["setpriv", *drop.split(), *command],
            cwd=self.repository,
            env=environment | passed,
            capture_output=True,
            text=True,
            timeout=280,
            preexec_fn=_as_on_binder,
        )


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """The machine, with postBuild run on it."""
    if os.getuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("Dropping privileges needs root and setpriv.")
    if not (ROOT / "rapha_lab" / "labextension" / "package.json").exists():
        pytest.skip("The extension is not built: cd extensions/rapha-lab && jlpm install && jlpm build")
    python = _readable_python()
    if python is None:
        pytest.skip("Another user than this one may not read this Python or its packages.")
    # not pytest's own folder: its parents are closed to other users
    folder = Path(tempfile.mkdtemp(prefix="rapha-binder-"))
    made = Machine(folder, python)
    built = made.run("binder/postBuild")
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    yield made
    shutil.rmtree(folder, ignore_errors=True)


def test_the_environment_has_the_torch_that_was_tested() -> None:
    """environment.yml, postBuild and constraints.txt name one version."""
    named = [
        re.findall(r"torch(?:-cpu)?==?([\d.]+)", text)
        for text in (_binder("environment.yml"), _binder("postBuild"))
    ]
    tested = re.findall(r"torch==([\d.]+)", (ROOT / "constraints.txt").read_text())
    assert named == [tested, tested]


def test_a_failing_build_fails_the_image_and_start_hands_over() -> None:
    """Binder ignores errors without `set -e`, and waits for ever for a start that does not exec."""
    assert "set -euo pipefail" in _binder("postBuild")
    assert _binder("start").strip().endswith('exec "$@"')
    for name in ("postBuild", "start"):
        assert os.access(ROOT / "binder" / name, os.X_OK)


def test_the_package_is_installed_and_not_just_found_in_the_folder(machine: Machine) -> None:
    """From another folder, in isolated mode, it imports from the fresh environment; its front end is in place."""
    where = machine.run(
        "python", "-I", "-c", "import os; os.chdir('/'); import rapha_lab; print(rapha_lab.__file__)"
    )
    assert where.stdout.startswith(str(machine.prefix)), where.stderr
    assert (machine.prefix / "share/jupyter/labextensions/rapha-lab/static").is_dir()
    assert (machine.prefix / "etc/jupyter/jupyter_server_config.d/rapha_lab.json").is_file()


def test_the_first_tutorial_runs_in_two_gigabytes(machine: Machine) -> None:
    """Every cell, against the simulated enclave, as a user without privileges or namespaces."""
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.5):
            peak = max(peak, _memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = machine.run("binder/start", "python", "-c", EXECUTE)
    over.set()
    watcher.join()
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"executed as {USER}" in done.stdout
    print(f"peak {peak >> 20} MiB")
    assert 0 < peak < MEMORY, f"{peak >> 20} MiB"


def _readable_python() -> str | None:
    """A Python of this version that another user may run, though root's own may lie in a closed home."""
    version = f"python3.{sys.version_info.minor}"
    for path in (os.path.realpath(sys.executable), f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        try:
            check = [
                path,
                "-c",
                "import os, sys, venv; os.listdir(sys.argv[1])",
                sysconfig.get_path("purelib"),
            ]
            if subprocess.run(check, user=USER, capture_output=True).returncode == 0:
                return path
        except OSError:
            continue
    return None


def _memory() -> int:
    """What all processes of the user hold, a shared page counted once among its holders."""
    total = 0
    for process in psutil.process_iter():
        try:
            if process.uids().real == USER:
                total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total
