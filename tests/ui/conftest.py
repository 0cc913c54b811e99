"""One JupyterLab, one browser page and one kernel for the whole folder, on the real demo site."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import BUILT, Lab, Server, browser, chromium
from playwright.sync_api import Browser

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / name) for name in ("review", "end_to_end")]  # the clinic with its custodians


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the browser's tests last: its event loop stays, and tests that bring their own cannot follow."""
    items.sort(key=lambda item: item.path.parent == HERE)


@pytest.fixture(scope="session")
def opened() -> Iterator[Browser]:
    """A headless Chromium; without one the folder is skipped, and the reason says how to get it."""
    try:
        chromium()
    except RuntimeError as error:
        pytest.skip(str(error))
    with browser() as made:
        yield made


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """JupyterLab with the extension of this tree."""
    if not (BUILT / "package.json").exists():
        pytest.skip("The extension is not built: cd extensions/rapha-lab && jlpm install && jlpm build")
    running = Server(tmp_path_factory.mktemp("lab"))
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def page_of_the_run(server: Server, opened: Browser) -> Lab:
    """The page, with a kernel that is connected to the demo site."""
    lab = Lab(server, opened.new_page(viewport={"width": 1280, "height": 800}))
    lab.load()
    lab.connect()
    lab.run(1)
    lab.save()
    return lab


@pytest.fixture
def lab(page_of_the_run: Lab) -> Lab:
    """The page with nothing open, in the light theme."""
    page_of_the_run.close_all()
    return page_of_the_run


@pytest.fixture
def executed(page_of_the_run: Lab, server: Server) -> Path:
    """A saved notebook whose second cell holds one release, signed by the demo site."""
    return server.files / "connect.ipynb"
