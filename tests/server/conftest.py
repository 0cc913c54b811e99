"""A Jupyter server with the extension; its fixtures stay in this folder, away from the browser's event loop."""

import pytest
from pytest_jupyter.jupyter_core import *  # noqa: F403
from pytest_jupyter.jupyter_server import *  # noqa: F403
from pytest_jupyter.pytest_tornasync import *  # noqa: F403


@pytest.fixture
def jp_server_config():
    """Switch the extension on."""
    return {"ServerApp": {"jpserver_extensions": {"rapha_lab.notebook.server": True}}}


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    """No site is known at first, whoever runs the tests."""
    monkeypatch.setenv("RAPHA_LAB_HOME", str(tmp_path / "rapha"))
