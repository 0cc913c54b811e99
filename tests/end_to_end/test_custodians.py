"""The custodians' tutorial runs from top to bottom, at a site of its own."""

import json

import pytest
import tutorials


def test_the_tutorial_plays_every_role(installed, tmp_path):
    """Signing, releasing, refusing, dossier, verified log, opt-out and veto: each says what it should."""
    pytest.importorskip("sksurv")
    notebook = tutorials.run(installed, "05-for-custodians.ipynb", tmp_path)
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
