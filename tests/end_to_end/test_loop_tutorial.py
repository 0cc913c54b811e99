"""The tutorial of training loops runs from top to bottom, against a demo site of its own."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIAL = Path(__file__).parents[2] / "notebooks" / "03-training-loop.ipynb"
RELEASE = "application/vnd.rapha.release+json"


def test_the_tutorial_trains_with_a_loop_of_its_own(tmp_path: Path) -> None:
    """Loop and fit learn, the check names what to change, and only the cell that asks for a loss's value is blocked."""
    pytest.importorskip("sksurv", reason="the demonstration data are in the demo extra")
    notebook = nbformat.read(TUTORIAL, as_version=4)
    client = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    client.extra_arguments = ["--log-level=40"]
    client.execute(env={**os.environ, "RAPHA_LAB_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    released = [output["data"][RELEASE]["values"] for output in outputs if RELEASE in output.get("data", {})]
    aurocs = [values["metrics"]["auroc"]["value"] for values in released if values["kind"] == "evaluation"]
    assert len(aurocs) == 3
    assert min(aurocs) > 0.7
    assert [values["steps"] for values in released if values["kind"] == "fit"] == [101, 101]
    shown = "\n".join(str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    assert "nn.GroupNorm(32, 64)" in shown
    assert "This model trains." in shown
    blocked = [cell for cell in notebook.cells if "raises-exception" in cell.metadata.get("tags", [])]
    assert [output["ename"] for cell in blocked for output in cell.outputs if "ename" in output] == [
        "SealedError"
    ]
