"""The tutorial of training loops runs from top to bottom, against a demo site of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tutorials


def test_the_tutorial_trains_with_a_loop_of_its_own(installed: Path, tmp_path: Path) -> None:
    """Loop and fit learn, the check names what to change, and only the cell that asks for a loss's value is blocked."""
    pytest.importorskip("sksurv", reason="the demonstration data are in the demo extra")
    notebook = tutorials.run(installed, "03-training-loop.ipynb", tmp_path)
    released = tutorials.released(notebook)
    aurocs = [values["metrics"]["auroc"]["value"] for values in released if values["kind"] == "evaluation"]
    assert len(aurocs) == 3
    assert min(aurocs) > 0.7
    assert [values["steps"] for values in released if values["kind"] == "fit"] == [101, 101]
    shown = "\n".join(
        str(output.get("data", {}).get("text/plain", "")) for output in tutorials.outputs(notebook)
    )
    assert "nn.GroupNorm(32, 64)" in shown
    assert "This model trains." in shown
    blocked = [cell for cell in notebook.cells if "raises-exception" in cell.metadata.get("tags", [])]
    assert [output["ename"] for cell in blocked for output in cell.outputs if "ename" in output] == [
        "SealedError"
    ]
