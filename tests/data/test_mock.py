"""Made-up patients have the layout of the real ones and nothing else of them."""

import pytest
from wards import SALT, ward

from rapha_lab.client.mock import mock
from rapha_lab.curator.cohort import Cohort, Findings


class TestMock:
    @pytest.mark.parametrize("n", [0, 1, 2, 500])
    def test_they_open_as_a_cohort_without_a_finding(self, n):
        """Every value fits the schema; code that runs on the mock runs on the records."""
        cohort = Cohort(ward(), mock(ward(), n), SALT)
        assert set(cohort.findings.values()) == {Findings()}
        assert len(cohort.view("all")) == n

    def test_the_same_seed_gives_the_same_patients(self):
        """A rehearsal can be repeated."""
        assert mock(ward(), 50, seed=3).equals(mock(ward(), 50, seed=3))
        assert not mock(ward(), 50, seed=3).equals(mock(ward(), 50, seed=4))

    def test_they_reach_what_code_has_to_bear(self):
        """Both bounds, a missing value where one is possible, none where not, a rare category."""
        frame = mock(ward(), 500)
        assert (frame["crp"].min(), frame["crp"].max()) == (0.1, 1000)
        assert frame["age"].null_count() > 0
        assert frame["died"].null_count() == 0
        counts = frame["site"].drop_nulls().value_counts(sort=True)
        assert counts["site"].to_list() == ["North", "East", "South"]
