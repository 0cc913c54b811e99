"""The demonstration data are built from the package that carries them, once, whole, and fit their schema."""

import sys

import polars as pl
import pytest
from wards import SALT

from rapha_lab.curator.cohort import Cohort
from rapha_lab.demo import build as module
from rapha_lab.demo.build import build
from rapha_lab.protocol.errors import SiteError
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
