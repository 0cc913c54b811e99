"""The custodians' tutorial runs from top to bottom, at a site of its own."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIAL = Path(__file__).parents[2] / "notebooks" / "05-for-custodians.ipynb"


def test_the_tutorial_plays_every_role(tmp_path):
    """Signing, releasing, refusing, dossier, verified log, opt-out and veto: each says what it should."""
    pytest.importorskip("sksurv")
    notebook = nbformat.read(TUTORIAL, as_version=4)
    client = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    client.extra_arguments = ["--log-level=40"]
    home = {"RAPHA_LAB_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    client.execute(env={**os.environ, **home})
    shown = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    for said in (
        "Missing: Cy Roe (General Counsel)",
        "+ Project study, lane aggregate: released at once",
        "waits for a custodian",
        "Mean of creatinine",
        "approves: waiting",
        "approves: approved",
        "exactly the released weights",
        "DOES NOT HOLD  computed in attested hardware",
        "entries of the log st-elsewhere hold",
        "The ethics approval lapsed.",
    ):
        assert said in shown, said
    assert shown.count("DOES NOT HOLD  ") == 1
