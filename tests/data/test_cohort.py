"""Records become tensors of a public shape; splits are for ever; what is wrong is told without a value."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wards import NASTY, SALT, cohort_of, rows, ward

from rapha_lab.client.mock import mock
from rapha_lab.curator import columns as module
from rapha_lab.curator.cohort import Cohort, split_of
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import SPLITS

CANARY = "4711-CANARY-0815"
NAMES = [column.name for column in ward().columns]


class TestTensors:
    @given(rows(), st.sampled_from(("all", *SPLITS)))
    def test_any_records_give_the_public_layout_within_bounds(self, patients, split):
        """Whatever is in the records, shape, dtype and range are those of the schema."""
        view = cohort_of(patients).view(split)
        for columns in [*NAMES, *(f"{name}.missing" for name in NAMES), NAMES, [NAMES[0]], []]:
            shape, dtype = ward().layout(columns)
            tensor = view.tensor(columns)
            assert tensor.shape == (len(view), *shape)
            assert str(tensor.dtype) == f"torch.{dtype}"
            assert tensor.isfinite().all()
            assert (tensor.abs() <= (2 if dtype == "int64" else 1)).all()

    def test_a_missing_value_is_0_and_says_so_in_its_own_column(self):
        """Missing is the middle of every scale; the mask tells it from a real 0."""
        view = cohort_of([dict.fromkeys(NAMES)]).view("all")
        assert (view.tensor(NAMES) == 0).all()
        assert (view.tensor([f"{name}.missing" for name in NAMES]) == 1).all()
        assert all(view.tensor(name).item() == 0 for name in NAMES)

    def test_values_are_scaled_by_public_bounds(self):
        """Linear and logarithmic, outside counts as the bound, the middle is 0."""
        patients = [{"age": a, "crp": c} for a, c in [(0, 0.1), (50, 10), (100, 1000), (250, 1e9), (-9, -9)]]
        view = cohort_of([dict.fromkeys(NAMES) | p for p in patients]).view("all")
        assert view.tensor("age").tolist() == [-1, 0, 1, 1, -1]
        assert view.tensor("crp").tolist() == pytest.approx([-1, 0, 1, 1, -1], abs=1e-6)

    def test_categories_and_booleans_follow_the_public_order(self):
        """Two values are -1 and 1, three are one-hot; alone they are codes."""
        patients = [{"sex": "M", "site": "South", "died": True}, {"sex": "F", "site": "North", "died": False}]
        view = cohort_of([dict.fromkeys(NAMES) | p for p in patients]).view("all")
        assert view.tensor(["sex", "site", "died"]).tolist() == [[1, 0, 0, 1, 1], [-1, 1, 0, 0, -1]]
        assert view.tensor("site").tolist() == [2, 0]
        assert view.tensor("died").tolist() == [1.0, 0.0]

    def test_a_mutant_that_does_not_clamp_is_caught(self, mutant):
        """Without the clamp a value outside reaches a sum."""
        broken = mutant(module, "np.clip(np.where(known, raw, low), low, high)", "np.where(known, raw, low)")
        age, far = ward().column("age"), pl.Series([1e6])
        assert module.bounded(age, far)[0].values.max() == 100
        assert broken.bounded(age, far)[0].values.max() == 1e6


class TestSplits:
    def test_splits_are_disjoint_and_cover_everybody(self):
        """Each patient is in one split; sizes are near the shares."""
        cohort = Cohort(ward(), mock(ward(), 2000), SALT)
        parts = [set(cohort.view(split)._rows.tolist()) for split in SPLITS]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(cohort.view("all")) == 2000
        assert [len(part) / 2000 for part in parts] == pytest.approx([0.7, 0.1, 0.2], abs=0.04)

    @given(st.integers(1, 60), st.integers(0, 3))
    def test_a_patient_stays_whoever_joins_or_leaves(self, others, seed):
        """The split is a function of the identifier and the salt alone."""
        frame = mock(ward(), 60).sample(fraction=1, shuffle=True, seed=seed)
        everybody, some = Cohort(ward(), frame, SALT), Cohort(ward(), frame.head(others), SALT)
        for split in SPLITS:
            rows = everybody.view(split)._rows
            assert rows[rows < others].tolist() == some.view(split)._rows.tolist()

    def test_a_snapshot_as_csv_keeps_every_patient_in_place(self, tmp_path):
        """Integers and their text are the same identifiers, in any order of rows."""
        frame = mock(ward(), 100).with_columns(id=pl.int_range(100))
        frame.write_parquet(tmp_path / "ward.parquet")
        frame.reverse().write_csv(tmp_path / "ward.csv")
        first = Cohort.open(ward(), tmp_path, SALT)
        again = Cohort.open(ward(source="ward.csv"), tmp_path, SALT)
        for split in SPLITS:
            a, b = first.view(split).tensor(NAMES), again.view(split).tensor(NAMES)
            torch.testing.assert_close(a, b.flip(0))

    def test_another_salt_is_another_split(self):
        """Who knows an identifier does not know the split."""
        patients = [f"p{n}" for n in range(50)]
        assert [split_of(p, SALT, ward()) for p in patients] != [
            split_of(p, SALT[::-1], ward()) for p in patients
        ]

    def test_opted_out_patients_are_gone_before_anything(self):
        """Neither a view nor a finding knows of them."""
        frame = mock(ward(), 100).with_columns(age=pl.lit(1e6))
        cohort = Cohort(ward(), frame, SALT, opt_outs={frame["id"][0], "nobody"})
        assert len(cohort.view("all")) == 99
        assert cohort.findings["age"].clamped == 99


class TestOpening:
    def test_columns_are_given_up_as_they_are_held_but_a_callers_own_stay(self):
        """What a source gave is left with its identifiers alone, so that opening takes little more than is held."""
        mine, read = mock(ward(), 20), mock(ward(), 20)
        held = Cohort(ward(), mine, SALT).view("all").tensor(NAMES)
        assert torch.equal(Cohort(ward(), lambda: read, SALT).view("all").tensor(NAMES), held)
        assert read.columns == [ward().patient]
        assert mine.equals(mock(ward(), 20))

    def test_the_custodian_learns_what_was_mended(self):
        """Clamped, unlisted and unexpectedly missing values are counted by column."""
        patients = [dict.fromkeys(NAMES) | {"crp": 1e9, "site": "Nowhere"}, dict.fromkeys(NAMES)]
        found = cohort_of(patients).findings
        assert (found["crp"].clamped, found["crp"].missing) == (1, 1)
        assert (found["site"].unlisted, found["site"].missing) == (1, 0)

    @pytest.mark.parametrize(
        ("column", "change"),
        [
            ("id", pl.lit(CANARY)),
            ("id", pl.lit(None, pl.String)),
            ("id", pl.int_range(pl.len()).cast(pl.Float64)),
            ("id", pl.int_range(pl.len()).cast(pl.String) + ".0"),
            ("age", pl.lit(CANARY)),
            ("age", pl.lit(True)),
            ("visits", pl.lit(4711.5)),
            ("died", pl.lit(CANARY)),
            ("died", pl.lit(4711)),
            ("died", pl.lit(0.5)),
            ("site", pl.lit(4711.5)),
            ("age", pl.lit([1, 2])),
        ],
    )
    def test_a_column_of_another_kind_is_refused_by_name_without_a_value(self, column, change):
        """The message may travel; the records may not."""
        frame = mock(ward(), 80).with_columns(change.alias(column))
        with pytest.raises(RequestError) as error:
            Cohort(ward(), frame, SALT)
        assert error.value.field == column
        assert "4711" not in str(error.value) + repr(error.value.__cause__)
        assert error.value.__context__ is None or error.value.__suppress_context__

    def test_a_column_that_is_not_there_is_named(self):
        """The schema and the file have to agree."""
        with pytest.raises(RequestError, match="no column crp"):
            Cohort(ward(), mock(ward(), 9).drop("crp"), SALT)

    @pytest.mark.parametrize("true", [20, 400])
    def test_a_declared_figure_far_from_the_truth_is_refused(self, tmp_path, true):
        """Sampling rates rest on it."""
        mock(ward(), true).write_parquet(tmp_path / "ward.parquet")
        with pytest.raises(RequestError, match="declares 100 patients") as error:
            Cohort.open(ward(), tmp_path, SALT)
        assert str(true) not in str(error.value)

    @pytest.mark.parametrize("name", ["ward.parquet", "ward.csv"])
    def test_a_damaged_file_is_refused_without_quoting_it(self, tmp_path, name):
        """A parser's error quotes the line it could not read."""
        (tmp_path / name).write_bytes(b'id,age\n"' + CANARY.encode() + b",\xff\xfe")
        with pytest.raises(RequestError) as error:
            Cohort.open(ward(source=name), tmp_path, SALT)
        assert CANARY not in str(error.value)

    def test_a_short_salt_is_refused(self):
        """It is a key."""
        with pytest.raises(RequestError, match="salt"):
            Cohort(ward(), mock(ward(), 9), b"short")

    def test_dtypes_hospitals_use_are_read(self):
        """Categoricals, small integers, 0 and 1, decimals as text, all-null columns."""
        frame = mock(ward(), 40).with_columns(
            pl.col("site").cast(pl.Categorical),
            pl.col("visits").cast(pl.UInt8),
            pl.col("died").cast(pl.Int8),
            pl.col("crp").cast(pl.String),
            age=pl.lit(None),
            smoker=pl.lit("Yes"),
        )
        view = Cohort(ward(), frame, SALT).view("all")
        plain = Cohort(ward(), mock(ward(), 40), SALT).view("all")
        for name in ("site", "visits", "died", "crp"):
            torch.testing.assert_close(view.tensor(name), plain.tensor(name))
        assert not view.known("age").any()
        assert view.tensor("smoker").all()

    def test_nasty_floats_are_known_or_missing_but_never_an_error(self):
        """NaN is missing, infinities are outside."""
        view = cohort_of([dict.fromkeys(NAMES) | {"age": value} for value in NASTY]).view("all")
        lacking = [value is None or np.isnan(value) for value in NASTY]
        assert (~view.known("age")).tolist() == lacking
