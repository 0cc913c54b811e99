"""How a release reads: its figures in line, its condition in few brackets, and its picture."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rapha_lab.protocol.release import MIME, Release
from rapha_lab.session.pictures import picture

SELECTION = {
    "candidates": 2, "mean": 5.0, "runs": 14, "bound": None, "noise_alone": 8.0,
    "chosen": 0, "settings": {"lr": 0.1}, "score": {"value": 0.1, "error": 0.01},
}  # fmt: skip


def release(**values: Any) -> Release:
    """One with these values."""
    return Release(
        job="1", op="describe", dataset="d", split="all", site="s", epsilon=1.0, delta=1e-5, values=values
    )


def figures(**named: float) -> list[dict[str, Any]]:
    """Figures by name, each known to one half."""
    return [{"name": n, "value": v, "error": 0.25, "interval": [v - 0.5, v + 0.5]} for n, v in named.items()]


def test_figures_stand_in_line_however_long_a_name_is() -> None:
    """Intervals begin in one column."""
    shown = repr(release(kind="description", figures=figures(a=1, **{"a name of more than 24 letters": 2})))
    lines = shown.splitlines()[1:3]
    assert len({line.index("95 %") for line in lines}) == 1


def test_a_large_figure_with_a_small_interval_shows_the_interval() -> None:
    """A mean of years is not from 1,997 to 1,997."""
    shown = repr(release(kind="description", figures=figures(year=1997.0)))
    assert "95 % 1,996.50 to 1,997.50" in shown
    wide = release(kind="count", value=7870, error=10.0, interval=[7850, 7890])
    assert "95 % 7,850 to 7,890" in repr(wide)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("(age > 70)", "age > 70"),
        ("((age > 70) and (sex = F))", "(age > 70) and (sex = F)"),
        ("not(old)", "not(old)"),
        ("(a) or (b)", "(a) or (b)"),
        ("(cut off", "(cut off"),
        ('(a > ")")', '(a > ")")'),
        ("old", "old"),
    ],
)
def test_a_condition_has_no_brackets_around_all_of_it(where: str, words: str) -> None:
    """Others stay."""
    assert release(kind="count", value=1, where=where).title == f"Number of patients where {words}"


def test_points_keep_clear_of_the_frame_and_titles_of_the_edge() -> None:
    """The first and the last point are wholly seen; a long title takes a second line."""
    told = release(
        kind="quantiles", column="x", where="w" * 60 + " " + "w" * 60, figures=figures(low=1, high=2)
    )
    drawn = picture(told)
    assert drawn is not None
    bottom, top = drawn.axes[0].get_ylim()
    assert bottom > 1.3
    assert top < -0.3
    assert "\n" in drawn.axes[0].get_title()


def test_a_selection_says_whose_patients_it_looked_at() -> None:
    """Those who scored it are charged like those who were trained on."""
    chosen = release(kind="fit", steps=1, selection=SELECTION)
    chosen = msgspec.structs.replace(chosen, split="train")
    assert chosen.splits == ("train", "validation")
    assert "d, train and validation" in repr(chosen).splitlines()[-1]
    assert chosen._repr_mimebundle_()[MIME]["splits"] == ["train", "validation"]
    alone = msgspec.structs.replace(release(kind="fit", steps=1, selection=None), split="train")
    assert alone.splits == ("train",)
