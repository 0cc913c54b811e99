"""Records are read where they are; what is wrong with a source is told without a value."""

import contextlib
import json
import os
import sys
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
import torch
from wards import SALT, hospital, ward

from rapha_lab.client.mock import mock, mock_tables
from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.sources import database
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import Schema

duckdb = pytest.importorskip("duckdb")
FLIPS = 2000 if os.environ.get("RAPHA_LAB_DEEP") else 60
CANARY = "4711-CANARY-0815"
NAMES = [column.name for column in ward().columns]
LABS = [f"labs.{name}" for name in ("value", "code", "urgent", "time")]


def about(**fields):
    """A column or table with words that a test does not look at."""
    return {"meaning": "Made up.", "public": "Made up.", **fields}


def written(folder, n=100):
    """The ward's mock patients as Parquet files, and as a DuckDB file in upper case."""
    frame, tables = mock(ward(), n), mock_tables(hospital(), n)
    frame.write_parquet(folder / "ward.parquet")
    tables["labs"].write_parquet(folder / "labs.parquet")
    with duckdb.connect(str(folder / "ward.duckdb")) as connection:
        for name, file in (("patients", "ward"), ("LABS", "labs")):
            connection.execute(
                f"CREATE TABLE {name} AS SELECT * FROM read_parquet('{folder}/{file}.parquet')"
            )
        connection.execute('ALTER TABLE patients RENAME "crp" TO "CRP"')
        connection.execute("CREATE VIEW adults AS SELECT * FROM patients WHERE age >= 18")
        connection.execute(f"CREATE VIEW outside AS SELECT * FROM read_parquet('{folder}/ward.parquet')")
    return frame, tables


def tables(source):
    """The ward with its table of blood samples there."""
    whole = json.loads(hospital().to_json())
    return [whole["tables"][0] | {"source": source}]


class TestDuckDB:
    def test_a_table_and_its_rows_give_the_same_tensors_as_files(self, tmp_path):
        """Names in any case; patients stay in their splits."""
        written(tmp_path)
        files = Cohort.open(ward(tables=tables("labs.parquet")), tmp_path, SALT)
        base = Cohort.open(
            ward(source="ward.duckdb/patients", tables=tables("ward.duckdb/labs")), tmp_path, SALT
        )
        for split in ("train", "test"):
            for columns in (NAMES, LABS):
                assert torch.equal(files.view(split).tensor(columns), base.view(split).tensor(columns))

    def test_a_view_is_read_like_a_table(self, tmp_path):
        """Custodians flatten with SQL of their own, in their own database."""
        frame, _ = written(tmp_path)
        cohort = Cohort.open(ward(source="ward.duckdb/main.adults", patients=None), tmp_path, SALT)
        assert len(cohort.view("all")) == frame.filter(pl.col("age") >= 18).height

    def test_nothing_else_can_be_reached_from_it(self, tmp_path):
        """No other file, no extension, no change of the settings, no write."""
        written(tmp_path)
        connection = database.connect(tmp_path / "ward.duckdb")
        for query in (
            f"SELECT * FROM read_csv('{tmp_path}/x.csv')",
            f"COPY patients TO '{tmp_path}/out.csv'",
            f"ATTACH '{tmp_path}/other.duckdb'",
            "INSTALL httpfs",
            "SET enable_external_access=true",
            "DELETE FROM patients",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(query)
        with pytest.raises(RequestError, match="needs another file") as error:
            Cohort.open(ward(source="ward.duckdb/outside"), tmp_path, SALT)
        assert error.value.field == "source"

    @pytest.mark.parametrize(
        ("source", "match"),
        [
            ("ward.duckdb/nothing", "no table nothing"),
            ('ward.duckdb/a"b', "no table"),
            ("x.duckdb/y", "opened"),
        ],
    )
    def test_what_is_not_there_is_named(self, tmp_path, source, match):
        """A table, a name with a quotation mark, a file that is no database."""
        written(tmp_path)
        (tmp_path / "x.duckdb").write_text(CANARY)
        with pytest.raises(RequestError, match=match) as error:
            Cohort.open(ward(source=source), tmp_path, SALT)
        assert CANARY not in str(error.value)

    def test_a_file_that_another_program_writes_is_told(self, tmp_path):
        """A lock is no crash."""
        import subprocess

        written(tmp_path)
        hold = f"import duckdb,sys; c=duckdb.connect({str(tmp_path / 'ward.duckdb')!r}); print(1,flush=True); sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as writer:
            writer.stdout.readline()
            with pytest.raises(RequestError, match="another program has it open"):
                Cohort.open(ward(source="ward.duckdb/patients"), tmp_path, SALT)
            writer.stdin.close()

    def test_a_view_that_fails_on_a_value_does_not_quote_it(self, tmp_path):
        """The database's own message holds the value it could not convert."""
        written(tmp_path)
        with duckdb.connect(str(tmp_path / "ward.duckdb")) as connection:
            connection.execute(
                f"CREATE VIEW bad AS SELECT id, CAST('{CANARY}' || id AS INTEGER) AS age FROM patients"
            )
        with pytest.raises(RequestError) as error:
            Cohort.open(ward(source="ward.duckdb/bad"), tmp_path, SALT)
        assert CANARY not in str(error.value)

    def test_without_the_package_it_says_what_to_install(self, tmp_path, monkeypatch):
        """It is an optional dependency."""
        written(tmp_path)
        monkeypatch.setitem(sys.modules, "duckdb", None)
        with pytest.raises(RequestError, match=r"rapha-lab\[hospital\]"):
            Cohort.open(ward(source="ward.duckdb/patients"), tmp_path, SALT)


def meds(folder, *rows):
    """A MEDS data set in two files."""
    names = ("subject_id", "time", "code", "numeric_value")
    frame = pl.DataFrame(
        rows,
        schema=dict(zip(names, (pl.Int64, pl.Datetime("us"), pl.String, pl.Float32), strict=True)),
        orient="row",
    )
    (folder / "meds" / "data" / "train").mkdir(parents=True)
    (folder / "meds" / "data" / "held_out").mkdir()
    frame.filter(pl.col("subject_id") < 3).write_parquet(folder / "meds/data/train/0.parquet")
    frame.filter(pl.col("subject_id") >= 3).write_parquet(folder / "meds/data/held_out/0.parquet")


def event(day):
    """A time."""
    return datetime(2020, 1, 1) + timedelta(days=day)


EVENTS = [
    (1, None, "SEX//F", None),
    (1, event(3), "LAB//HDL", 50.0),
    (1, event(1), "LAB//HDL", 40.0),
    (1, event(3), "LAB//SBP", 120.0),
    (1, event(9), "MEDS_DEATH", None),
    (2, None, "SEX//M", None),
    (2, event(5), "LAB//SBP", 140.0),
    (4, event(1), "OTHER", 1.0),
]
COHORT = {
    "name": "events", "title": "t", "citation": "c", "licence": "l", "patient": "subject_id", "source": "meds/",
    "columns": [
        about(name="sex", type="category", categories=["F", "M"], code="SEX//", missing="possible"),
        about(name="died", type="boolean", code="MEDS_DEATH"),
        about(name="hdl", type="number", bounds=[0, 100], code="LAB//HDL", missing="possible"),
    ],
    "tables": [
        {
            "name": "visits", "meaning": "m", "patient": "subject_id", "source": "meds/", "time": "time", "most": 3,
            "columns": [
                about(name="hdl", type="number", bounds=[0, 100], code="LAB//HDL", missing="possible"),
                about(name="sbp", type="number", bounds=[0, 300], code="LAB//SBP", missing="possible"),
            ],
        },
        {
            "name": "events", "meaning": "m", "patient": "subject_id", "source": "meds/", "time": "time", "most": 5,
            "columns": [about(name="code", type="category", categories=["LAB//HDL", "LAB//SBP"], missing="possible")],
        },
    ],
}  # fmt: skip


class TestMeds:
    def test_events_become_patients_visits_and_rows(self, tmp_path):
        """Columns name codes; the latest counts for a patient, one time is one visit."""
        meds(tmp_path, *EVENTS)
        view = Cohort.open(Schema.from_dict(COHORT), tmp_path, SALT).view("all")
        patients = view.frame(["sex", "died", "hdl"])
        assert patients["sex"].to_list() == ["F", "M", None]
        assert patients["died"].to_list() == [True, False, False]
        assert patients["hdl"].to_list() == [50, None, None]
        visits = view.table("visits")
        assert visits["__patient"].to_list() == [0, 0, 1]
        assert visits["hdl"].to_list() == [40, 50, None]
        assert visits["sbp"].to_list() == [None, 120, 140]
        assert view.table("events")["code"].to_list() == ["LAB//HDL", "LAB//HDL", "LAB//SBP", "LAB//SBP"]

    @pytest.mark.parametrize("data", [b"", b"PAR1" + CANARY.encode()])
    def test_what_is_no_meds_is_named(self, tmp_path, data):
        """An empty folder, a damaged file."""
        (tmp_path / "meds" / "data").mkdir(parents=True)
        if data:
            (tmp_path / "meds" / "data" / "0.parquet").write_bytes(data)
        with pytest.raises(RequestError, match=r"no MEDS data set|none of MEDS") as error:
            Cohort.open(Schema.from_dict(COHORT), tmp_path, SALT)
        assert CANARY not in str(error.value)

    def test_float_subjects_are_refused(self, tmp_path):
        """They round and merge patients."""
        (tmp_path / "meds" / "data").mkdir(parents=True)
        frame = pl.DataFrame({"subject_id": [1.5], "time": [event(0)], "code": ["A"], "numeric_value": [1.0]})
        frame.write_parquet(tmp_path / "meds" / "data" / "0.parquet")
        with pytest.raises(RequestError, match="none of MEDS"):
            Cohort.open(Schema.from_dict(COHORT), tmp_path, SALT)


def pictures(folder):
    """Files of each kind, and a table whose cells name them."""
    png = pytest.importorskip("PIL.Image")
    dicom = pytest.importorskip("pydicom")
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 50
    np.save(folder / "a.npy", grey)
    png.fromarray(grey).save(folder / "b.png")
    png.fromarray(np.kron(grey, np.ones((4, 4), dtype=np.uint8))).save(folder / "large.png")
    (folder / "damaged.png").write_bytes(b"\x89PNG" + CANARY.encode())
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    scan = dicom.Dataset()
    scan.file_meta = dicom.dataset.FileMetaDataset()
    scan.file_meta.TransferSyntaxUID = dicom.uid.ExplicitVRLittleEndian
    scan.Rows, scan.Columns, scan.SamplesPerPixel, scan.PhotometricInterpretation = 2, 3, 1, "MONOCHROME2"
    scan.BitsAllocated, scan.BitsStored, scan.HighBit, scan.PixelRepresentation = 16, 16, 15, 0
    scan.RescaleSlope, scan.RescaleIntercept = 50, 0
    scan.SOPClassUID = scan.file_meta.MediaStorageSOPClassUID = dicom.uid.CTImageStorage
    scan.SOPInstanceUID = scan.file_meta.MediaStorageSOPInstanceUID = dicom.uid.generate_uid()
    scan.PixelData = np.arange(6, dtype=np.uint16).tobytes()
    scan.save_as(folder / "c.dcm", enforce_file_format=True)
    (folder / "note.txt").write_text("No fever.")
    cells = [
        "a.npy",
        "b.png",
        "c.dcm",
        "large.png",
        None,
        "damaged.png",
        "objects.npy",
        "no.png",
        "../up.png",
    ]
    notes = ["note.txt", None, "no.txt", *[None] * 6]
    frame = pl.DataFrame({"id": [f"p{n}" for n in range(9)], "scan": cells, "note": notes})
    frame.write_parquet(folder / "ward.parquet")
    return ward(
        patients=None,
        columns=[
            about(name="scan", type="image", shape=[1, 2, 3], bounds=[0, 250], missing="possible"),
            about(name="note", type="text", tokens=4, vocabulary=64, files=True, missing="possible"),
        ],
    )


class TestFilesInCells:
    def test_numpy_png_and_dicom_give_the_same_pixels(self, tmp_path):
        """Scaled by public bounds; DICOM in the scanner's units; another size is resized."""
        cohort = Cohort.open(pictures(tmp_path), tmp_path, SALT)
        scans = cohort.view("all").tensor("scan")
        want = torch.linspace(-1, 1, 6).view(1, 2, 3)
        for place in range(3):
            torch.testing.assert_close(scans[place], want)
        assert (scans[3].flatten().diff() > 0).all()
        assert cohort.view("all").known("scan").tolist() == [True] * 4 + [False] * 5

    def test_what_cannot_be_read_is_missing_and_counted(self, tmp_path):
        """Damaged, with pickled objects, absent, outside the folder; a note that is absent."""
        cohort = Cohort.open(pictures(tmp_path), tmp_path, SALT)
        assert cohort.findings["scan"].unreadable == 4
        assert cohort.findings["note"].unreadable == 1
        assert cohort.view("all").frame(["note"])["note"][0] == "No fever."

    @pytest.mark.parametrize("package", ["PIL", "pydicom"])
    def test_without_a_decoder_it_says_what_to_install(self, tmp_path, monkeypatch, package):
        """They are optional dependencies."""
        schema = pictures(tmp_path)
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(RequestError, match=r"rapha-lab\[hospital\]"):
            Cohort.open(schema, tmp_path, SALT)


class TestDamage:
    @pytest.mark.parametrize("source", ["ward.parquet", "ward.csv", "meds/"])
    def test_a_file_with_flipped_bits_opens_or_is_refused(self, tmp_path, source):
        """No other error, however the reader fails on it."""
        frame = mock(ward(), 100)
        if source == "meds/":
            meds(tmp_path, *EVENTS)
            schema, path = Schema.from_dict(COHORT), tmp_path / "meds" / "data" / "train" / "0.parquet"
        else:
            schema, path = ward(source=source), tmp_path / source
            frame.write_csv(path) if source == "ward.csv" else frame.write_parquet(path)
        whole, rng = path.read_bytes(), np.random.default_rng(2)
        for _ in range(FLIPS):
            damaged = bytearray(whole)
            for place in rng.integers(len(whole), size=rng.integers(1, 4)):
                damaged[place] ^= 1 << rng.integers(8)
            path.write_bytes(damaged[: rng.integers(len(whole))] if rng.random() < 0.2 else damaged)
            with contextlib.suppress(RequestError):
                Cohort.open(schema, tmp_path, SALT)


class TestDigest:
    def test_the_digest_is_that_of_what_was_read(self, tmp_path):
        """The same sources give the same digest; one value changed gives another."""
        frame, _ = written(tmp_path)
        schema = ward(tables=tables("labs.parquet"))
        first = Cohort.open(schema, tmp_path, SALT).digest
        assert Cohort.open(schema, tmp_path, SALT).digest == first
        frame.with_columns(age=pl.lit(5.0)).write_parquet(tmp_path / "ward.parquet")
        assert Cohort.open(schema, tmp_path, SALT).digest != first

    def test_only_the_columns_of_the_schema_are_read(self, tmp_path):
        """What nobody may ask about never comes into memory."""
        frame, _ = written(tmp_path)
        frame.with_columns(secret=pl.lit(CANARY)).write_parquet(tmp_path / "ward.parquet")
        from rapha_lab.curator.sources import Reader

        read = Reader(tmp_path).read("ward.parquet", "id", ward().columns)
        assert set(read.columns) == {"id", *NAMES}
