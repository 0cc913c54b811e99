"""The dossier's page: names that others chose are text on it, in tables and in pictures."""

from __future__ import annotations

from rapha_lab.client.page import _evaluation, _table

FOREIGN = "<img src=x onerror=alert(1)> $\\frac{$"


def test_a_name_is_neither_markup_nor_mathematics() -> None:
    """A metric's name with half a formula in it broke the picture, and with it the dossier."""
    figure = {"name": FOREIGN, "value": 0.8, "95 % interval": [0.7, 0.9]}
    told = _evaluation({"title": FOREIGN, "figures": [figure]})
    assert "<img src=x" not in told
    assert "data:image/png" in told


def test_a_table_says_yes_and_lists_in_words() -> None:
    """It is for a reader of English."""
    assert _table([("simulated", True), ("reasons", ["One.", "Two."])]).count("<td>") == 4
    assert "<td>yes</td>" in _table([("simulated", True)])
    assert "<td>One. Two.</td>" in _table([("reasons", ["One.", "Two."])])
