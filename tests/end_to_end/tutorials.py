"""Tutorials as a user runs them: with the package installed from its wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parents[2]
FRONT_END = Path("rapha_lab/labextension/package.json")
RELEASE = "application/vnd.rapha.release+json"

_EXECUTE = """
import sys, nbformat, rapha_lab
from nbclient import NotebookClient
assert rapha_lab.__file__.startswith(sys.prefix), rapha_lab.__file__
notebook = nbformat.read(sys.argv[1], as_version=4)
client = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": "."}})
client.extra_arguments = ["--log-level=40"]
client.execute()
nbformat.write(notebook, "done.ipynb")
"""


def install(folder: Path) -> Path:
    """The Python of an environment that has our wheel, and everything else from the environment of the tests."""
    source = ROOT
    if not (ROOT / FRONT_END).exists():  # where there is no node; tutorials need no front end
        source = folder / "source"
        shutil.copytree(
            ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist", "node_modules")
        )
        (source / FRONT_END).parent.mkdir()
        (source / FRONT_END).write_text("{}")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(folder),
        str(source),
    ]
    subprocess.run(build, check=True, env={**os.environ, "HATCH_JUPYTER_BUILDER_SKIP_NPM": "1"})
    home = folder / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    (wheel,) = folder.glob("rapha_lab-*.whl")
    subprocess.run(
        [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True
    )
    # its .pth files are not read, so that the clone, installed editable there, is not found
    (site,) = home.glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "others.pth").write_text("\n".join(others))
    return python


def run(python: Path, tutorial: str, folder: Path) -> nbformat.NotebookNode:
    """The tutorial of that name, executed from top to bottom against sites of its own in the folder."""
    home = {"RAPHA_LAB_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    command = [str(python), "-c", _EXECUTE, str(ROOT / "notebooks" / tutorial)]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **home}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return nbformat.read(folder / "done.ipynb", as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> list[Any]:
    """What its cells showed."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def released(notebook: nbformat.NotebookNode) -> list[Any]:
    """The values of the releases among them."""
    return [o["data"][RELEASE]["values"] for o in outputs(notebook) if RELEASE in o.get("data", {})]
