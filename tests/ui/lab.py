"""A JupyterLab of its own and a browser page on it, for tests and screenshots."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "rapha_lab" / "labextension"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --force-color-profile=srgb"
)
WAIT = 60_000
"""Milliseconds; only a failing test waits as long, on a busy machine too."""

PASSPHRASE = "of the user of this Lab"
CONNECT = 'import rapha_lab as rapha\n%load_ext rapha_lab\nsite = rapha.connect("demo")\ncohort = site.dataset("flchain")'
MEAN = '%%enclave flchain\npatients.mean("age", epsilon=0.01)'
FIT = """%%enclave flchain --epsilon 0.05 -o model
import torch
from torch import nn
model = nn.Linear(2, 1)
patients.train.fit(model, nn.BCEWithLogitsLoss(), inputs=["age", "creatinine"], target="death",
                   batch=256, epochs={epochs})
"""
OVERRIDES = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


def chromium() -> str:
    """The path of Chromium.

    Raises:
        RuntimeError: it is not installed; says how to install it.
    """
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        raise RuntimeError(
            "No Chromium was found. On Debian or Ubuntu: apt-get install -y chromium fonts-dejavu-core. "
            "Elsewhere, set CHROMIUM to its path."
        )
    return found


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium with a profile of its own."""
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=FLAGS.split())
        try:
            yield opened
        finally:
            opened.close()


class Server:
    """A Jupyter server with the built extension, its own folders and its own idea of which sites are known."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, folder / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "RAPHA_LAB_HOME": str(folder / "rapha"),
            "RAPHA_LAB_PASSPHRASE": PASSPHRASE,
            "IPYTHONDIR": str(folder / "ipython"),
        }
        for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
            self.environment[f"JUPYTER_{name}"] = str(folder / name.lower())
        for name in ("SETTINGS_DIR", "WORKSPACES_DIR"):
            self.environment[f"JUPYTERLAB_{name}"] = str(folder / name.lower())
        for plugin, settings in OVERRIDES.items():
            package, name = plugin.split(":")
            path = folder / "settings_dir" / package / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings))
        # Before whatever is installed, so that it is this tree's build that is looked at.
        self.environment["JUPYTER_PATH"] = str(folder / "share")
        extensions = folder / "share" / "labextensions"
        extensions.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (extensions / "rapha-lab").symlink_to(BUILT)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        arguments = [
            f"--port={self.port}",
            f"--ServerApp.root_dir={self.files}",
            "--ServerApp.jpserver_extensions={'rapha_lab.notebook.server': True}",
            *[
                "--no-browser",
                "--allow-root",
                "--ip=127.0.0.1",
                "--ServerApp.port_retries=0",
                "--IdentityProvider.token=",
            ],
            *["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"],
        ]
        with (self.folder / "lab.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", *arguments],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/api"):
                return
            time.sleep(0.1)
        raise RuntimeError(f"JupyterLab did not start:\n{(self.folder / 'lab.log').read_text()[-4000:]}")

    def stop(self) -> None:
        """Stop it with its kernels."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Lab:
    """One browser page on a server: opens notebooks, runs cells, reads what is shown."""

    def __init__(self, server: Server, page: Page) -> None:
        self.server, self.page = server, page
        self.kernel: str | None = None
        page.set_default_timeout(WAIT)
        expect.set_options(timeout=WAIT)

    def load(self) -> None:
        """Load Lab with an empty workspace."""
        self.page.goto(f"{self.server.url}/lab?reset")
        self.wait_for_lab()

    def reload(self) -> None:
        """Reload the page as it is."""
        self.page.reload()
        self.wait_for_lab()

    def wait_for_lab(self) -> None:
        """Wait until the front end has started."""
        self.page.wait_for_function("window.jupyterapp !== undefined")
        self.page.evaluate("async () => { await window.jupyterapp.restored; }")

    def command(self, name: str, **args: Any) -> None:
        """Start a command of the front end; does not wait for its end, which may wait for the user."""
        self.page.evaluate(
            "([id, args]) => { void window.jupyterapp.commands.execute(id, args); }", [name, args]
        )

    def theme(self, name: str) -> None:
        """Change to a theme and wait until it is drawn."""
        self.page.evaluate(
            "name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name
        )
        light = "true" if "Light" in name else "false"
        self.page.wait_for_selector(f"body[data-jp-theme-light='{light}']", state="attached")

    def write(self, name: str, *cells: str | dict[str, Any]) -> Path:
        """A notebook file with these cells: a text is a code cell."""
        made = []
        for cell in cells:
            given = nbformat.from_dict({"source": cell} if isinstance(cell, str) else cell)
            make = (
                nbformat.v4.new_markdown_cell
                if given.get("cell_type") == "markdown"
                else nbformat.v4.new_code_cell
            )
            made.append(make(**given))
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        notebook = nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel})
        path = self.server.files / name
        nbformat.write(notebook, path)
        return path

    def open(self, name: str, *, kernel: bool = True) -> Locator:
        """Open a notebook, on the page's shared kernel unless told not to; waits until it can run."""
        args: dict[str, Any] = {"path": name, "factory": "Notebook"}
        if self.kernel:
            args["kernel"] = {"id": self.kernel}
        self.command("docmanager:open", **args)
        self.page.wait_for_function(
            "name => window.jupyterapp.shell.currentWidget?.context?.path === name", arg=name
        )
        self.page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.context.ready; }")
        if kernel:
            self.kernel = self.page.evaluate("""async () => {
                const { sessionContext } = window.jupyterapp.shell.currentWidget;
                await sessionContext.ready;
                await sessionContext.session.kernel.info;
                return sessionContext.session.kernel.id;
            }""")
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    def connect(self) -> None:
        """Give the page a new shared kernel, connected to the demo site; sessions of kernels that are gone end."""
        self.kernel = None
        self.write("connect.ipynb", f"{CONNECT}\nsite.end_sessions()", MEAN)
        self.open("connect.ipynb")
        self.run(0)

    def save(self) -> None:
        """Save the current notebook and wait until it is on disk."""
        self.page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.context.save(); }")

    def close_all(self) -> None:
        """Close every document without asking."""
        self.page.evaluate("""() => {
            document.querySelectorAll('.jp-Dialog-close-button').forEach(button => button.click());
            for (const widget of Array.from(window.jupyterapp.shell.widgets('main'))) {
                if (widget.context) { widget.context.model.dirty = false; }
                widget.close();
            }
        }""")

    def cell(self, index: int) -> Locator:
        """The drawn cell at a place in the current notebook."""
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell").nth(index)

    def cell_id(self, index: int) -> str:
        """Its id."""
        return self.page.evaluate(
            "index => window.jupyterapp.shell.currentWidget.content.widgets[index].model.id", index
        )

    def select(self, index: int) -> None:
        """Make a cell the active one."""
        self.page.evaluate(
            "index => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = index; }", index
        )

    def run(self, index: int, *, wait: bool = True) -> None:
        """Run a cell; unless told not to, wait until the kernel has answered."""
        before = self.page.evaluate(
            "index => window.jupyterapp.shell.currentWidget.content.widgets[index].model.executionCount",
            index,
        )
        self.select(index)
        self.command("notebook:run-cell")
        if wait:
            self.page.wait_for_function(
                """([index, before]) => {
                    const { model } = window.jupyterapp.shell.currentWidget.content.widgets[index];
                    return model.executionCount !== null && model.executionCount !== before;
                }""",
                arg=[index, before],
                timeout=90_000,
            )
