"""Made-up patients have the layout of the real ones and nothing else of them."""

import copy

import polars as pl
import pytest
from wards import FIELDS, SALT, hospital, ward

from rapha_lab.client.mock import mock, mock_tables
from rapha_lab.curator.cohort import Cohort, Findings
from rapha_lab.protocol.errors import RequestError


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

    def test_columns_go_together_only_as_the_schema_says(self):
        """A custodian may write down what the literature says; everything else is independent."""
        columns = copy.deepcopy(FIELDS["columns"])
        by = {column["name"]: column for column in columns}
        by["crp"]["correlates"] = [["age", 0.6]]
        by["died"]["correlates"] = [["age", 0.5], ["crp", -0.5]]
        frame = mock(ward(columns=columns), 4000)
        assert frame.select(pl.corr("age", "crp", method="spearman")).item() == pytest.approx(0.58, abs=0.05)
        assert frame.select(pl.corr("age", pl.col("died").cast(float), method="spearman")).item() > 0.1
        assert abs(frame.select(pl.corr("age", "visits", method="spearman")).item()) < 0.05
        plain = mock(ward(), 4000)
        assert abs(plain.select(pl.corr("age", "crp", method="spearman")).item()) < 0.05

    @pytest.mark.parametrize(
        ("correlates", "match"),
        [
            ([["died", 0.5]], "stand before them"),
            ([["crp", 0.5]], "stand before them"),
            ([["age", 1.1]], "too closely"),
            ([["age", float("nan")]], "too closely"),
            ([["age", 0.8], ["age", 0.8]], "too closely"),
        ],
    )
    def test_an_impossible_correlation_is_refused(self, correlates, match):
        """With a later column, with itself, or beyond 1."""
        columns = copy.deepcopy(FIELDS["columns"])
        columns[1]["correlates"] = correlates
        with pytest.raises(RequestError, match=match):
            ward(columns=columns)

    def test_counts_are_often_zero_and_rows_stand_in_order_of_time(self):
        """As code has to bear them."""
        assert (mock(ward(), 1000)["visits"] == 0).mean() > 0.2
        rows = mock_tables(hospital(), 50)["labs"]
        assert rows.equals(rows.sort("pid", "taken"))
        assert rows.equals(mock_tables(hospital(), 50)["labs"])
