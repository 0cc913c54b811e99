"""Many rows a patient become padded tensors of a public shape; one patient's rows never move another's."""

import copy
import json
from datetime import datetime, timedelta

import msgspec
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wards import FIELDS, SALT, TABLES, hospital, ward

from rapha_lab.client.mock import mock, mock_tables
from rapha_lab.client.rehearsal import encoded
from rapha_lab.curator import tables as module
from rapha_lab.curator.cohort import Cohort, View
from rapha_lab.curator.mechanisms import aggregate
from rapha_lab.curator.mechanisms.train import fits
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Histogram, Mean
from rapha_lab.protocol.program import Program, TensorSpec
from rapha_lab.protocol.schema import SPLITS
from rapha_lab.protocol.tokenizer import token_ids

CANARY = "4711-CANARY-0815"
DAY = timedelta(days=1)
NEW_YEAR = datetime(2020, 1, 1)
NOTES = mock_tables(hospital(), 4)["notes"].head(0)
NOTES_SCAN = {"type": "image", "shape": [1, 2, 3], "bounds": [0, 255]}
LISTS = (["labs.value", "labs.code", "labs.value.missing"], ["labs.present", "labs.time", "labs.urgent"])
ALONE = (
    "labs.value",
    "labs.code",
    "labs.time",
    "labs.present",
    "labs.code.missing",
    "notes.text",
    "notes.scan",
)


def labs(*rows: tuple) -> pl.DataFrame:
    """Blood samples: (patient, day, value), and code and urgency as they come."""
    return pl.DataFrame(
        {
            "pid": [row[0] for row in rows],
            "taken": [None if row[1] is None else NEW_YEAR + row[1] * DAY for row in rows],
            "value": [row[2] for row in rows],
            "code": ["abc"[n % 3] for n in range(len(rows))],
            "urgent": [n % 2 == 0 for n in range(len(rows))],
        },
        schema={
            "pid": pl.String, "taken": pl.Datetime("us"), "value": pl.Float64, "code": pl.String, "urgent": pl.Boolean,
        },
    )  # fmt: skip


def view(*rows: tuple, patients: int = 3, opt_outs: tuple[str, ...] = ()) -> View:
    """All of the first few patients p0, p1, ... with these blood samples."""
    return cohort(labs(*rows), patients, opt_outs).view("all")


def cohort(samples: pl.DataFrame, patients: int = 3, opt_outs: tuple[str, ...] = ()) -> Cohort:
    frame = mock(hospital(), patients).with_columns(
        id=pl.Series([f"p{n}" for n in range(patients)], dtype=pl.String)
    )
    return Cohort(hospital(), frame, SALT, opt_outs, {"labs": samples, "notes": NOTES})


samples = st.lists(
    st.tuples(
        st.sampled_from([f"p{n}" for n in range(5)]),
        st.none() | st.integers(-400_000, 400_000),
        st.none() | st.sampled_from([float("nan"), float("inf"), -1e300, 5e-324]) | st.floats(-5, 15),
    ),
    max_size=30,
)


class TestTensors:
    @settings(max_examples=40)
    @given(samples, st.sampled_from(("all", *SPLITS)))
    def test_any_rows_give_the_public_layout_within_bounds(self, rows, split):
        """None, some, too many, at any time and with any value: shape, dtype and range are the schema's."""
        part = cohort(labs(*rows)).view(split)
        for columns in (*LISTS, *ALONE):
            shape, dtype = hospital().layout(columns)
            tensor = part.tensor(columns)
            assert tensor.shape == (len(part), *shape)
            assert str(tensor.dtype) == f"torch.{dtype}"
            assert tensor.isfinite().all()
            assert (tensor.abs() <= (63 if dtype == "int64" else 1)).all()

    def test_a_split_without_patients_has_the_layout_too(self):
        """Nobody is a cohort as well."""
        for part in (
            cohort(labs(), patients=0).view("all"),
            cohort(labs(("p0", 1, 1.0)), patients=0).view("test"),
        ):
            for columns in (*LISTS, *ALONE, "age", ["age", "site"]):
                assert part.tensor(columns).shape == (0, *hospital().layout(columns)[0])
            assert part.table("labs").height == 0

    @settings(max_examples=40)
    @given(samples, st.sampled_from(["p0", "p1", "p2"]))
    def test_without_one_patients_rows_the_others_are_the_same_bit_for_bit(self, rows, gone):
        """One patient is one unit, whatever is in their rows."""
        everything = labs(*rows)
        with_them = cohort(everything).view("all")
        without = cohort(everything.filter(pl.col("pid") != gone)).view("all")
        others = [n for n in range(3) if f"p{n}" != gone]
        for columns in (LISTS[0], "labs.value", "labs.present"):
            assert torch.equal(with_them.tensor(columns)[others], without.tensor(columns)[others])

    def test_the_latest_rows_count_in_order_of_time_and_zeros_come_before(self):
        """Six samples in no order: the last four of them, oldest first."""
        rows = [("p1", day, float(day)) for day in (5, 1, 3, 0, 4, 2)] + [("p2", 9, 10.0)]
        part = view(*rows)
        assert ((part.tensor("labs.value") + 1) * 5)[1].tolist() == pytest.approx([2, 3, 4, 5], abs=1e-6)
        assert part.tensor("labs.present").tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]
        assert part.tensor("labs.value")[2].tolist() == [0, 0, 0, 1]
        assert part.tensor("labs.value")[0].tolist() == [0, 0, 0, 0]

    def test_time_is_days_before_the_patients_last_row_within_the_span(self):
        """The last row is at -1, the span and anything before it at 1; unknown times are 0 and come first."""
        part = view(("p0", 400, 1.0), ("p0", 350, 1.0), ("p0", 0, 1.0), ("p0", None, 1.0))
        assert part.tensor("labs.time")[0].tolist() == [0, 1, 0, -1]
        assert part.tensor("labs.time.missing")[0].tolist() == [1, 0, 0, 0]

    def test_a_list_has_an_entry_for_each_number_and_category(self):
        """As for the patients' own columns, once a row."""
        part = view(("p0", 1, 10.0), ("p0", 2, None))
        assert part.tensor(["labs.value", "labs.code", "labs.value.missing"])[0].tolist() == [
            [0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 0, 1, 0, 1],
        ]
        names = ["labs.value", "labs.code=a", "labs.code=b", "labs.code=c"]
        assert hospital().feature_names(["labs.value", "labs.code"]) == names

    def test_a_table_without_times_keeps_the_last_rows_as_stored(self):
        """Texts become token ids, images their pixels between -1 and 1."""
        notes = pl.DataFrame(
            {
                "pid": ["p0"] * 3,
                "text": ["dropped", "Fever, no COUGH", None],
                "scan": [[0.0] * 6, [0.0, 255.0, 127.5, 999.0, -5.0, float("nan")], [1.0]],
            }
        )
        frame = mock(hospital(), 1).with_columns(id=pl.lit("p0"))
        part = Cohort(hospital(), frame, SALT, (), {"labs": labs(), "notes": notes})
        assert part.view("all").tensor("notes.text")[0].tolist() == [
            token_ids("fever , no cough", 5, 64),
            [0] * 5,
        ]
        scans = part.view("all").tensor("notes.scan")[0]
        assert scans[0].flatten().tolist() == [-1, 1, 0, 1, -1, 0]
        assert (scans[1] == 0).all()
        assert (part.findings["notes.scan"].clamped, part.findings["notes.scan"].unlisted) == (1, 1)

    def test_shards_have_their_own_patients_rows(self):
        """A shard's table is that of its patients, by their positions in the shard."""
        part = view(*((f"p{n % 20}", n, n / 10) for n in range(90)), patients=20)
        whole = part.tensor("labs.value")
        for shard in part.shards(3):
            assert torch.equal(shard.tensor("labs.value"), whole[shard._rows])
            owners = shard.table("labs")["__patient"]
            assert sorted(owners.unique()) == list(range(len(shard)))


class TestViews:
    def test_a_views_table_has_positions_times_and_bounded_values(self):
        """Typed as the schema says, null where not known, a patient's rows together and in order."""
        part = view(("p2", 2, 99.0), ("p0", 1, float("nan")), ("p2", 1, -3.0), ("nobody", 1, 1.0))
        table = part.table("labs")
        assert table.columns == ["__patient", "taken", "value", "code", "urgent"]
        assert table.schema["__patient"] == pl.UInt32
        assert table.schema["taken"] == pl.Datetime("us")
        assert table["__patient"].to_list() == [0, 2, 2]
        assert table["value"].to_list() == [None, 0, 10]
        assert table["code"].to_list() == ["b", "c", "a"]

    def test_at_most_the_public_number_of_rows_a_patient(self):
        """The cap is held before anything is computed."""
        part = view(*(("p0", n, 1.0) for n in range(50)))
        assert part.table("labs").height == 4
        assert part._cohort.findings["labs"].beyond == 46

    def test_a_mutant_that_keeps_every_row_is_caught(self, mutant):
        """A patient with more rows than the cap would weigh more than any other."""
        broken = mutant(module, "< table.most", "< 10**9")
        patients, table = pl.Series(["p0"]), hospital().tables[0]
        rows = labs(*(("p0", n, 1.0) for n in range(9)))
        assert module.Rows(table, rows, patients).frame(torch.arange(1)).height == 4
        assert broken.Rows(table, rows, patients).frame(torch.arange(1)).height == 9

    def test_rows_of_opted_out_patients_are_gone_before_anything(self):
        """Neither a view nor a finding knows of them."""
        part = view(("p0", 1, 99.0), ("p1", 1, 1.0), opt_outs=("p0",))
        assert part.table("labs").height == 1
        assert part._cohort.findings["labs"].strangers == 0
        assert part._cohort.findings["labs.value"].clamped == 0

    def test_made_up_patients_have_made_up_rows(self):
        """They open without a finding but too many rows; one has none, one too many."""
        frame, tables = mock(hospital(), 50), mock_tables(hospital(), 50)
        made_up = Cohort(hospital(), frame, SALT, tables=tables)
        assert all(
            not (f.clamped or f.unlisted or f.missing or f.strangers) for f in made_up.findings.values()
        )
        present = made_up.view("all").tensor("labs.present").sum(1)
        assert (present[0], present[1], made_up.findings["labs"].beyond > 0) == (0, 4, True)

    def test_rows_of_ones_own_are_encoded_as_the_site_does_it(self):
        """Patients come in the order in which they appear."""
        rows = labs(("p2", 1, 1.0), ("p0", 3, 2.0), ("p2", 2, 3.0))
        own, there = encoded(hospital(), rows, LISTS[0]), view(("p0", 3, 2.0), ("p2", 1, 1.0), ("p2", 2, 3.0))
        assert torch.equal(own[:, :, 0], there.tensor(LISTS[0])[[2, 0], :, 0])


class TestTimes:
    @pytest.mark.parametrize(
        "times",
        [
            pl.Series([NEW_YEAR, NEW_YEAR + DAY], dtype=pl.Datetime("ms")),
            pl.Series([NEW_YEAR.date(), (NEW_YEAR + DAY).date()]),
            pl.Series(["2020-01-01", "2020-01-02 00:00"]),
            pl.Series(["2020-01-01T01:00:00+01:00", "2020-01-02T00:00:00Z"]),
            pl.Series([NEW_YEAR, NEW_YEAR + DAY], dtype=pl.Datetime("ns", "UTC")),
        ],
    )
    def test_times_as_hospitals_store_them_are_read(self, times):
        """With or without a zone, as dates or texts: days are days."""
        table = (
            cohort(labs(("p0", 0, 1.0), ("p0", 1, 1.0)).with_columns(taken=times)).view("all").table("labs")
        )
        assert table["taken"].to_list() == [NEW_YEAR, NEW_YEAR + DAY]

    @pytest.mark.parametrize(
        "times",
        [
            pl.Series([CANARY, "2020-01-01"]),
            pl.Series(["2020-01-01 10:00:00", "2020-01-01T10:00:00Z"]),
            pl.Series([4711.0, 4712.0]),
        ],
    )
    def test_what_is_no_time_or_mixes_zones_is_refused_by_name(self, times):
        """The message names the column and holds no value."""
        with pytest.raises(RequestError) as error:
            cohort(labs(("p0", 0, 1.0), ("p0", 1, 1.0)).with_columns(taken=times))
        assert error.value.field == "labs.taken"
        assert "4711" not in str(error.value)

    def test_outlandish_times_are_no_error(self):
        """The year 1 and the year 9999 are as long ago as the span."""
        rows = labs(("p0", 0, 1.0), ("p0", 1, 1.0))
        times = pl.Series([datetime(1, 1, 1), datetime(9999, 12, 31)])
        part = cohort(rows.with_columns(taken=times)).view("all")
        assert part.tensor("labs.time")[0].tolist() == [0, 0, 1, -1]


class TestErrors:
    @pytest.mark.parametrize(
        ("field", "change"),
        [
            ("labs.source", {"source": "../labs.csv"}),
            ("labs.present", {"columns": [TABLES[0]["columns"][0] | {"name": "present"}]}),
            ("labs.pid", {"columns": [TABLES[0]["columns"][0] | {"name": "pid"}]}),
            ("labs.taken", {"columns": [TABLES[0]["columns"][0] | {"name": "taken"}]}),
            ("labs.value.bounds", {"columns": [TABLES[0]["columns"][0] | {"bounds": [3, 2]}]}),
            (
                "labs.text.tokens",
                {"columns": [{"name": "text", "type": "text", "meaning": "m", "public": "p"}]},
            ),
            ("age", {"name": "age"}),
            ("tables[0].most", {"most": 0}),
            ("tables[0].moist", {"moist": 0}),
        ],
    )
    def test_a_broken_table_is_named_with_the_way_out(self, field, change):
        """Sources, names, bounds and caps are held as for the patients' columns."""
        table = msgspec.json.decode(msgspec.json.encode(TABLES[0])) | change
        with pytest.raises(RequestError) as error:
            ward(tables=[table])
        assert error.value.field == field

    def test_more_than_memory_is_sure_to_hold_is_refused_by_public_figures(self):
        """Before anything runs, and whoever the patients are."""
        wide = json.loads(hospital().to_json())["tables"][0] | {"most": 10_000}
        with pytest.raises(RequestError, match="are held at once"):
            ward(tables=[wide], patients=10**6).layout("labs.value")
        assert ward(tables=[wide], patients=1000).layout("labs.value") == ((10_000,), "float32")

    def test_inputs_that_are_too_much_together_are_refused_too(self):
        """Each of a program's inputs would be held, however few numbers one of them has."""
        wide = json.loads(hospital().to_json())["tables"][0] | {"most": 10_000}
        schema = ward(tables=[wide], patients=50_000)
        specs = [TensorSpec(f"x{n}", "float32", [10_000]) for n in range(3)]
        for held in (specs[:2], specs):
            program = Program(inputs=held, parameters=[], constants=[], nodes=[], output="x0")
            inputs = {spec.name: "labs.value" for spec in held}
            if len(held) == 2:
                fits(program, inputs, schema)
                continue
            with pytest.raises(RequestError, match="are held at once"):
                fits(program, inputs, schema)

    def test_names_of_several_tables_do_not_mix_in_a_list(self):
        """What would the shape be?"""
        for columns in (["labs.value", "age"], ["labs.value", "notes.text.missing"]):
            with pytest.raises(RequestError, match="not of one table"):
                hospital().layout(columns)

    @pytest.mark.parametrize("name", ["notes.text", "notes.scan"])
    def test_a_text_or_image_stands_alone(self, name):
        """It has a shape of its own."""
        with pytest.raises(RequestError, match="Name it alone"):
            hospital().layout([name])

    @pytest.mark.parametrize("kind", [{"type": "text", "tokens": 5, "vocabulary": 64}, NOTES_SCAN])
    def test_a_text_or_image_has_neither_mean_nor_histogram(self, kind):
        """Refused before anything is priced; its patients are known or not as with any column."""
        column = {"name": "it", "meaning": "m", "public": "p", "missing": "possible", **kind}
        schema = ward(columns=[*copy.deepcopy(FIELDS["columns"]), column])
        with pytest.raises(RequestError, match="no mean"):
            aggregate.plan(Mean(dataset="ward", column="it", epsilon=1.0), schema, 1e-5)
        with pytest.raises(RequestError, match="no histogram"):
            aggregate.plan(Histogram(dataset="ward", column="it", epsilon=1.0), schema, 1e-5)
        view = Cohort(schema, mock(schema, 20), SALT).view("all")
        assert view.tensor("it").shape == (20, *schema.layout("it")[0])
        assert view.frame(["it", "age"])["it"].null_count() == int((~view.known("it")).sum())

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("labs.valeu", "Did you mean labs.value"),
            ("labs.pid", "It has value, code, urgent"),
            ("labs.present.missing", "no column"),
            ("notes.time", "no column"),
            ("lbas.value", "no column"),
        ],
    )
    def test_an_unknown_name_is_an_error_that_names_what_was_meant(self, name, match):
        """As for the patients' columns."""
        with pytest.raises(RequestError, match=match):
            hospital().layout(name)

    def test_a_table_that_is_not_given_is_named(self):
        """The schema and the records have to agree."""
        with pytest.raises(RequestError, match="no table labs"):
            Cohort(hospital(), mock(hospital(), 3), SALT)

    @pytest.mark.parametrize(
        ("column", "change"),
        [
            ("pid", pl.lit(4711.5)),
            ("pid", pl.lit(None, pl.String)),
            ("value", pl.lit(CANARY)),
            ("urgent", pl.lit(CANARY)),
        ],
    )
    def test_a_column_of_another_kind_is_refused_by_name_without_a_value(self, column, change):
        """The message may travel; the records may not."""
        with pytest.raises(RequestError) as error:
            cohort(labs(("p0", 1, 1.0), ("p1", 1, 1.0)).with_columns(change.alias(column)))
        assert error.value.field == f"labs.{column}"
        assert "4711" not in str(error.value)


class TestTokens:
    def test_words_without_case_signs_alone_cut_and_padded(self):
        """The same word is the same id wherever it stands; 0 is nothing."""
        ids = token_ids("No fever. NO cough", 8, 8192)
        assert ids[0] == ids[3] != ids[1]
        assert ids[5:] == [0, 0, 0]
        assert token_ids("a b c d", 2, 64) == token_ids("a b", 2, 64)
        assert token_ids("ﬁve", 1, 8192) == token_ids("FIVE", 1, 8192)

    @given(st.text(max_size=200), st.integers(1, 40), st.integers(16, 999))
    def test_any_text_gives_ids_of_the_public_vocabulary(self, text, tokens, vocabulary):
        """Whatever was written."""
        ids = token_ids(text, tokens, vocabulary)
        assert len(ids) == tokens
        assert all(0 <= each < vocabulary for each in ids)
        assert np.all(np.diff(np.array(ids) == 0).astype(int) >= 0)
