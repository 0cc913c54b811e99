"""A custodian is walked from tables to a schema; nothing of the records gets into it unless they say so."""

import json
import os
import pty
import subprocess
import sys
import tomllib

import polars as pl
import pytest

from rapha_lab.cli import main
from rapha_lab.custodian.add import add
from rapha_lab.custodian.answers import File
from rapha_lab.custodian.columns import COPIED
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import Schema

CANARY = 4711.25
ANSWERS = {
    "table": "ward.parquet", "patient": "pid", "name": "ward", "title": "A ward", "patients": "40",
    "ward.age.meaning": "Age on admission.",
    "ward.marker.meaning": "A marker.", "ward.marker.bounds": "0, 50", "ward.marker.unit": "U/L",
    "ward.marker.public": "The analyser's range.",
    "ward.sex.type": "category", "ward.sex.categories": "f; m", "ward.sex.meaning": "Sex.",
    "ward.sex.public": "As the form has it.",
    "ward.died.meaning": "Died.", "ward.died.missing": "never",
    "labs.add": "yes", "labs.time": "taken", "labs.meaning": "A sample.", "labs.most": "8",
    "labs.value.bounds": "0, 10", "labs.value.meaning": "Result.", "labs.value.public": "The analyser's range.",
}  # fmt: skip


def ward(folder, shift=0.0, name="ward.parquet"):
    """Forty patients and some of their blood samples; `shift` moves every value."""
    numbers = range(40)
    pl.DataFrame(
        {
            "pid": [f"p{n}-{shift:g}" for n in numbers],
            "age": [20.0 + n + shift / 100 for n in numbers],
            "marker": [CANARY + shift if n == 3 else float(n) for n in numbers],
            "sex": [("f", "m", "secret" if shift else None)[n % 3] for n in numbers],
            "died": [n % 2 == 0 for n in numbers],
            "note": [f"note {n} {shift}" for n in numbers],
        }
    ).write_parquet(folder / name)
    rows = pl.DataFrame(
        {"pid": [f"p{n % 9}-{shift:g}" for n in numbers], "value": [n / 4 + shift for n in numbers]}
    )
    days = pl.date_range(pl.date(2020, 1, 1), pl.date(2020, 2, 9), eager=True)
    rows.with_columns(taken=days).write_parquet(folder / "labs.parquet")
    return folder


def answers(path, *without, **changes):
    """A file of answers."""
    given = {key: value for key, value in ANSWERS.items() if key not in without}
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    path.write_text("".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in given.items()))
    return path


def drafted(folder, file):
    """The draft from a folder and answers, and what the custodian was shown."""
    shown = []
    return add(folder, File(file, shown.append))[1], "\n".join(shown)


class TestDraft:
    def test_answers_become_a_schema_that_opens(self, tmp_path, capsys):
        """Types as stored, bounds of a common name from public knowledge, the rest as answered; then tried."""
        ward(tmp_path)
        assert main(["data", "add", str(tmp_path), "--answers", str(answers(tmp_path / "a.toml"))]) == 0
        schema = Schema.load(tmp_path / "ward.toml")
        assert [column.name for column in schema.columns] == ["age", "marker", "sex", "died"]
        assert schema.column("age").bounds == (0, 120)
        assert schema.column("sex").categories == ("f", "m")
        assert (schema.table("labs").most, schema.table("labs").time) == (8, "taken")
        said = capsys.readouterr().out
        assert "FOR CUSTODIANS ALONE" in said
        assert "marker: 1 outside the bounds" in said

    def test_other_records_with_the_same_answers_give_the_same_schema(self, tmp_path):
        """Nothing of a record is in it, not even by a guessed type."""
        file = answers(tmp_path / "a.toml")
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        here, shown = drafted(ward(tmp_path / "one"), file)
        there, _ = drafted(ward(tmp_path / "two", shift=1000.0), file)
        assert here == there
        assert str(CANARY) not in here + shown

    def test_only_what_the_custodian_copies_is_from_the_records_and_says_so(self, tmp_path):
        """`copy` is an answer to one item; its reason tells that it was read off."""
        ward(tmp_path)
        file = answers(tmp_path / "a.toml", "ward.marker.public", ward__marker__bounds="copy")
        text, shown = drafted(tmp_path, file)
        fields = tomllib.loads(text)
        marker = next(column for column in fields["columns"] if column["name"] == "marker")
        assert marker["bounds"] == [0, CANARY]
        assert marker["public"].startswith(COPIED[:15])
        assert "COPIED FROM THE RECORDS" in text
        assert str(CANARY) not in shown

    def test_what_is_not_answered_is_to_be_set_and_no_schema(self, tmp_path, capsys):
        """The draft says where, and `data check` refuses it by line."""
        ward(tmp_path)
        file = answers(tmp_path / "a.toml", "ward.marker.bounds", "ward.marker.public", "title", "labs.most")
        assert main(["data", "add", str(tmp_path), "--answers", str(file)]) == 0
        said = capsys.readouterr().out
        for line in ("bounds = TO BE SET", "title = TO BE SET", "most = TO BE SET"):
            assert line in said
        assert main(["data", "check", str(tmp_path / "ward.toml")]) == 1
        assert "4 items of ward.toml are to be set" in capsys.readouterr().err

    def test_a_schema_that_is_there_is_not_written_over(self, tmp_path, capsys):
        """Somebody may have signed it."""
        ward(tmp_path)
        (tmp_path / "ward.toml").write_text("mine")
        assert main(["data", "add", str(tmp_path), "--answers", str(answers(tmp_path / "a.toml"))]) == 1
        assert (tmp_path / "ward.toml").read_text() == "mine"
        assert "exists" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("ward.age.bounds", "young"),
            ("ward.sex.type", "text or so"),
            ("ward.died.missing", "sometimes"),
            ("patient", "nobody"),
            ("patient", "age"),
            ("patient", "died"),
            ("table", "nothing.csv"),
            ("labs.most", "many"),
            ("labs.time", "value2"),
            ("name", "a b"),
            ("ward.agee.bounds", "1, 2"),
        ],
    )
    def test_an_answer_that_does_not_fit_is_named_and_nothing_written(self, tmp_path, capsys, key, value):
        """Bounds, types, identifiers that are floats or not unique, and answers that nothing asked for."""
        ward(tmp_path)
        file = answers(tmp_path / "a.toml")
        lines = [line for line in file.read_text().splitlines() if not line.startswith(f'"{key}"')]
        file.write_text("\n".join([*lines, f"{json.dumps(key)} = {json.dumps(value)}"]))
        assert main(["data", "add", str(tmp_path), "--answers", str(file)]) == 1
        said = capsys.readouterr().err
        assert key in said or (key == "patient" and "identify patients" in said)
        assert not (tmp_path / "ward.toml").exists()

    def test_a_folder_without_tables_is_told(self, tmp_path):
        """With what was looked for."""
        with pytest.raises(RequestError, match="no table"):
            drafted(tmp_path, answers(tmp_path / "a.toml"))

    def test_a_schema_without_a_column_is_not_written(self, tmp_path, capsys):
        """It would be none; an answers file may forget all of a CSV's types."""
        pl.DataFrame({"pid": ["a", "b"], "x": ["1", "2"]}).write_csv(tmp_path / "c.csv")
        (tmp_path / "a.toml").write_text('title = "C"\n')
        assert main(["data", "add", str(tmp_path), "--answers", str(tmp_path / "a.toml")]) == 1
        said = capsys.readouterr()
        assert "No column of c.csv was described" in said.err
        assert "Written" not in said.out
        assert not (tmp_path / "c.toml").exists()

    def test_no_table_and_no_identifier_is_guessed_but_by_its_name(self, tmp_path):
        """The first by the alphabet is as wrong as any; a number, a name, or what is called patients will do."""
        ward(tmp_path)
        with pytest.raises(RequestError, match="no answer to table"):
            drafted(tmp_path, answers(tmp_path / "a.toml", "table"))
        for given in ("2", "ward"):
            assert drafted(tmp_path, answers(tmp_path / "a.toml", table=given))[0].count("[[tables]]") == 1
        (tmp_path / "ward.parquet").rename(tmp_path / "cdm.person.parquet")
        assert 'source = "cdm.person.parquet"' in drafted(tmp_path, answers(tmp_path / "a.toml", "table"))[0]
        frame = pl.read_parquet(tmp_path / "labs.parquet").rename({"pid": "who"})
        frame.write_parquet(tmp_path / "labs.parquet")
        with pytest.raises(RequestError, match=r"no answer to labs\.patient"):
            drafted(tmp_path, answers(tmp_path / "a.toml", "table"))


class TestTidy:
    AWKWARD = (
        'Patient No.;Größe;Größe!;HbA1c %;"Notes; free";Visit\n'
        '007; 1,80;x;"5,5";"said; ""hi""";31.12.2021\n008;n/a;y;;two\u00a0words;01.02.2022\n009;1,75;;9;;\n'
        "010;1,6;;7,5;;\n"
    )

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
    def test_a_spreadsheets_csv_becomes_a_table_that_a_schema_can_name(self, tmp_path, capsys, encoding):
        """Separator, encoding, names, decimal commas, dates and words for nothing; identifiers keep their zeros."""
        (tmp_path / "list (final).csv").write_text(self.AWKWARD, encoding=encoding)
        command = ["data", "tidy", str(tmp_path / "list (final).csv"), "--dates", "%d.%m.%Y"]
        assert main([*command, "--missing", "n/a; ?"]) == 0
        found = pl.read_parquet(tmp_path / "list_final.parquet")
        assert found.columns == ["Patient_No", "Grosse", "Grosse_2", "HbA1c", "Notes_free", "Visit"]
        assert found.row(0) == ("007", "1.80", "x", "5.5", 'said; "hi"', "2021-12-31")
        assert found.row(1) == ("008", None, "y", None, "two\u00a0words", "2022-02-01")
        assert "'Patient No.' is now Patient_No" in capsys.readouterr().out
        assert main(command) == 1
        assert "Nothing is written over" in capsys.readouterr().err

    def test_names_that_were_apart_stay_apart(self, tmp_path, capsys):
        """A name that ends in a number is none that was made."""
        (tmp_path / "c.csv").write_text("pid,hdl_2,hdl,h dl,h_dl\n1,2,3,4,5\n")
        assert main(["data", "tidy", str(tmp_path / "c.csv")]) == 0
        found = pl.read_parquet(tmp_path / "c.parquet")
        assert found.columns == ["pid", "hdl_2", "hdl", "h_dl", "h_dl_2"]
        assert found.row(0) == ("1", "2", "3", "4", "5")

    def test_what_is_unclear_is_left_and_told(self, tmp_path, capsys):
        """A guess would change values without a word."""
        rows = "".join(f"{n},{n},0{n % 9 + 1}/02/2022\n" for n in range(9))
        (tmp_path / "c.csv").write_text(f"pid,n,day\n{rows}9,n/a,03/02/2022\n")
        assert main(["data", "tidy", str(tmp_path / "c.csv")]) == 0
        said = capsys.readouterr().out
        assert "mostly numbers, but also 'n/a' (1)" in said
        assert "say how they are written" in said
        assert pl.read_parquet(tmp_path / "c.parquet")["day"][0] == "01/02/2022"

    def test_a_table_whose_names_no_cell_can_write_is_pointed_out(self, tmp_path):
        """Before any question is asked; such a column cannot get into a schema, which would be none."""
        pl.DataFrame({"pid": ["a", "b"], "Age (y)": ["1", "2"], "n": ["1", "2"]}).write_csv(
            tmp_path / "c.csv"
        )
        (tmp_path / "a.toml").write_text('title = "C"\n"c.n.type" = "number"\n')
        text, shown = drafted(tmp_path, tmp_path / "a.toml")
        assert "rapha-lab data tidy" in shown
        assert "Age" not in text
        (tmp_path / "a.toml").write_text('title = "C"\npatient = "Age (y)"\n')
        with pytest.raises(RequestError, match="a schema cannot hold"):
            drafted(tmp_path, tmp_path / "a.toml")

    @pytest.mark.parametrize("content", [b"a,b\n1,2,3\n", b"", b"\xff\xfea"])
    def test_what_is_no_table_is_refused_without_a_word_of_it(self, tmp_path, capsys, content):
        """And nothing is written."""
        (tmp_path / "c.csv").write_bytes(content)
        assert main(["data", "tidy", str(tmp_path / "c.csv")]) in (0, 1)
        assert "Traceback" not in capsys.readouterr().err


class TestSources:
    def test_a_csv_speaks_of_no_type_and_a_database_of_each(self, tmp_path):
        """A column of a CSV is passed over unless the custodian says what it is."""
        duckdb = pytest.importorskip("duckdb")
        pl.DataFrame({"pid": ["a", "b"], "age": [1.5, 2.5], "x": [1, 2]}).write_csv(tmp_path / "c.csv")
        with duckdb.connect(str(tmp_path / "d.duckdb")) as connection:
            connection.execute("CREATE TABLE people AS SELECT 1 AS pid, 2.5 AS age, true AS died")
        file = tmp_path / "a.toml"
        file.write_text('table = "c.csv"\n"c.age.type" = "number"\n')
        text, shown = drafted(tmp_path, file)
        assert text.count("[[columns]]") == 1
        assert "d.duckdb/people: pid (whole number)" in shown
        file.write_text('table = "d.duckdb/people"\nname = "d"\n')
        text, _ = drafted(tmp_path, file)
        assert text.count("[[columns]]") == 2

    def test_a_meds_folder_gives_columns_by_their_codes(self, tmp_path):
        """One folder is the patients and a table of visits."""
        data = tmp_path / "events" / "data"
        data.mkdir(parents=True)
        (tmp_path / "events" / "metadata").mkdir()
        (tmp_path / "events" / "metadata" / "dataset.json").write_text("{}")
        events = {
            "subject_id": [1, 1],
            "time": [None, "2020-01-01"],
            "code": ["SEX//F", "LAB//HDL"],
            "numeric_value": [None, 5.0],
        }
        frame = pl.DataFrame(events).with_columns(pl.col("time").str.to_datetime(time_unit="us"))
        frame.write_parquet(data / "0.parquet")
        file = tmp_path / "a.toml"
        given = {
            "name": "events", "title": "t", "events.codes": "sex = SEX//", "events.sex.type": "category",
            "events.sex.categories": "F; M", "events.sex.meaning": "Sex.", "events.sex.public": "The form.",
            "events.add": "yes", "events.name": "visits", "visits.meaning": "A day.", "visits.most": "3",
            "visits.codes": "hdl = LAB//HDL", "visits.hdl.type": "number", "visits.hdl.bounds": "0, 9",
            "visits.hdl.meaning": "HDL.", "visits.hdl.public": "The assay.",
        }  # fmt: skip
        file.write_text("".join(f"{json.dumps(k)} = {json.dumps(v)}\n" for k, v in given.items()))
        assert main(["data", "add", str(tmp_path), "--answers", str(file)]) == 0
        schema = Schema.load(tmp_path / "events.toml")
        _, shown = drafted(tmp_path / "events", file)
        assert "./: subject_id" in shown  # the folder itself may be named, too
        assert (schema.patient, schema.source, schema.table("visits").time) == (
            "subject_id",
            "events/",
            "time",
        )


class TestTerminal:
    def test_a_custodian_at_a_terminal_is_asked_and_can_look(self, tmp_path):
        """Return takes what is proposed, a bad answer is asked again, `look` keeps the records out of the schema."""
        pl.DataFrame({"pid": ["a", "b"], "age": [4711.0, 1.0]}).write_parquet(tmp_path / "w.parquet")
        lines = [
            "",
            "",
            "a b",
            "w",
            "A ward",
            "",
            "",
            "",
            "look",
            "numbr",
            "number",
            "Age.",
            "look",
            "9, 1",
            "",
            "",
            "never",
        ]
        said = _at_terminal(tmp_path, lines)
        assert "4711" in said
        for bad in ("'a b' is no answer", "'numbr' is no answer", "'9, 1' is no answer"):
            assert bad in said
        assert "Written:" in said
        assert "4711" not in (tmp_path / "w.toml").read_text()
        assert Schema.load(tmp_path / "w.toml").column("age").bounds == (0, 120)

    def test_back_asks_the_question_before_once_more(self, tmp_path):
        """As often as one likes, after a look too; what was answered before stays, and the schema is of the last word."""
        ward(tmp_path)
        lines = ["1", "back", "ward", "pid", "w", "A wrod", "back", "A ward", "", "", "", "number", "Age.", "look",
                 "back", "Age on admission.", "", "", "", "skip", "skip", "skip", "skip", "no"]  # fmt: skip
        said = _at_terminal(tmp_path, lines)
        assert "Written:" in said
        found = tomllib.loads((tmp_path / "w.toml").read_text())
        assert (found["source"], found["title"]) == ("ward.parquet", "A ward")
        assert [column["meaning"] for column in found["columns"]] == ["Age on admission."]
        assert said.count("Tables found") == 2  # it was said again with the first question alone

    def test_an_end_of_input_writes_nothing(self, tmp_path):
        """Half a conversation is no schema."""
        ward(tmp_path)
        ended = subprocess.run(
            [sys.executable, "-m", "rapha_lab.cli", "data", "add", str(tmp_path)],
            input="ward.parquet\n\n", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 1
        assert "input ended at the question" in ended.stderr
        assert list(tmp_path.glob("*.toml")) == []


def _at_terminal(folder, lines):
    """What `data add` shows a custodian who types these lines."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "rapha_lab.cli", "data", "add", str(folder)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True) as process:
        os.close(theirs)
        os.write(ours, "".join(f"{line}\n" for line in lines).encode())
        said = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the terminal ends with the process
                break
            if not part:
                break
            said += part
        assert process.wait(30) == 0, said.decode()
    os.close(ours)
    return said.decode()
