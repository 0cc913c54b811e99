"""Every release with several figures has a picture, drawn of its released values alone."""

import io

import numpy as np
import pytest
from wards import hospital

from rapha_lab.client.rehearsal import Rehearsal
from rapha_lab.session import interpreter, pictures
from rapha_lab.session.pictures import picture

DRAWN = [
    'patients.histogram("age", epsilon=1)',
    'patients.histogram("crp", epsilon=1)',
    'patients.histogram("site", epsilon=1)',
    'patients.group_by("sex").count(epsilon=1)',
    'patients.contingency("sex", "site", epsilon=1)',
    'patients.group_by("site").mean("age", epsilon=1)',
    'patients.group_by("site").sum("age", epsilon=1)',
    'patients.quantile("age", epsilon=1)',
    'patients.corr(["age", "crp", "visits"], epsilon=1)',
    'patients.survival("age", "died", by="sex", epsilon=50)',
    "patients.missing(epsilon=1)",
    'patients.table("labs").group_by("code").count(epsilon=1)',
]
PLAIN = [
    "patients.count(epsilon=1)",
    'patients.mean("age", epsilon=1)',
    "patients.describe(epsilon=1)",
    'patients.table("labs").mean("value", epsilon=1)',
]


@pytest.fixture(scope="module")
def ask():
    """The release of a question about made-up patients."""
    rehearsal = Rehearsal()

    def run(question):
        rehearsal.run(f"release = {question}", hospital(), epsilon=None)
        return rehearsal.namespace["release"]

    return run


class TestPictures:
    @pytest.mark.parametrize("question", DRAWN)
    def test_several_figures_are_drawn(self, ask, question):
        """As a figure with a title that names the question and its price."""
        figure = picture(ask(question))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        assert len(buffer.getvalue()) > 3000
        assert "ε" in figure.axes[0].get_title()

    @pytest.mark.parametrize("question", PLAIN)
    def test_one_figure_or_a_table_is_not(self, ask, question):
        """Its card says all."""
        assert picture(ask(question)) is None

    def test_bars_are_as_long_as_the_released_counts_and_their_intervals(self, ask):
        """Nothing but what was released is on it."""
        release = ask('patients.group_by("sex").count(epsilon=1)')
        axes = picture(release).axes[0]
        assert [bar.get_width() for bar in axes.patches] == [row.value for row in release.rows]
        ends = np.sort([segment[:, 0] for segment in axes.collections[0].get_segments()])
        assert ends == pytest.approx(np.array([row.interval for row in release.rows]))

    def test_a_picture_that_fails_leaves_the_release(self, ask, monkeypatch):
        """It is a courtesy."""
        shown = []
        screen = interpreter.Screen(shown.append)
        release = ask(DRAWN[0])
        screen.release(release)
        assert "image/png" in shown[0]["data"]
        monkeypatch.setattr(pictures, "picture", lambda release: 1 / 0)
        screen.release(release)
        assert len(shown) == 1
        assert screen.released == [release, release]
