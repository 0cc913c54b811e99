"""Expressions mean what polars means, speak of one patient only, stay within public bounds and never raise."""

import math
import os
import subprocess
import sys
from itertools import product

import msgspec
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wards import FIELDS, SALT, TABLES, cohort_of, hospital, rows, ward

from rapha_lab.client.mock import mock, mock_tables
from rapha_lab.client.rehearsal import Rehearsal
from rapha_lab.curator import expressions as module
from rapha_lab.curator.cohort import Cohort, mark_of
from rapha_lab.curator.expressions import Chosen
from rapha_lab.curator.mechanisms import aggregate
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.expression import FUNCTIONS, Call, Col, Lit, Over, extended, scope_of, text, typed
from rapha_lab.session.expressions import over, translate

age, crp, visits, sex, site, smoker, died = map(
    pl.col, ("age", "crp", "visits", "sex", "site", "smoker", "died")
)
NUMBERS = [
    age * 2 + 1,
    age / crp,
    (age - 50) ** 2,
    -age,
    abs(age - 50),
    crp.log(),
    crp.log(10),
    crp.log1p(),
    (age / 100).exp(),
    age.sqrt(),
    age.floor(),
    age.ceil(),
    crp.round(1),
    age.clip(20, 60),
    pl.max_horizontal("age", "crp"),
    pl.min_horizontal(age, visits * 10),
    age.fill_null(40),
    pl.coalesce(age, crp),
    pl.when(age > 50).then(crp).otherwise(visits),
    pl.when(smoker).then(1).otherwise(0),
    visits // 2,
    visits.cast(pl.Float64) / 3,
    age.cast(pl.Int64),
    died.cast(pl.Int64) * 10 + visits,
]
TRUTHS = [
    age > 60,
    age.is_between(20, 60, closed="left"),
    (age > 60) & (sex == "F"),
    (age > 60) | smoker,
    ~smoker,
    smoker ^ died,
    age.is_null(),
    sex.is_not_null(),
    site.is_in(["North", "South"]),
    visits.is_in([1, 2, 9]),
    sex != "M",
    pl.all_horizontal(smoker, died),
    pl.any_horizontal(smoker, died),
]
CATEGORIES = [
    age.bin_intervals([40, 60], labels=["young", "middle", "old"]),
    pl.when(sex == "F")
    .then(pl.lit("woman"))
    .when(sex == "M")
    .then(pl.lit("man"))
    .otherwise(pl.lit("unknown")),
    pl.when(age > 50).then(site).otherwise(pl.lit("East")),
    site.fill_null("nowhere"),
]
HOSTILE = [
    Call("div", [Lit(1), Call("sub", [Col("visits"), Col("visits")])]),
    Call("log", [Call("sub", [Col("age"), Lit(50)])]),
    Call("exp", [Call("mul", [Col("age"), Lit(1e9)])]),
    Call(
        "sub",
        [
            Call("exp", [Call("mul", [Col("age"), Lit(1e9)])]),
            Call("exp", [Call("mul", [Col("age"), Lit(1e9)])]),
        ],
    ),
    Call("sqrt", [Call("sub", [Lit(50), Col("age")])]),
    Call("pow", [Call("mul", [Col("age"), Lit(1e15)]), Lit(8)]),
]


DEEP = """
import resource
from rapha_lab.client.mock import mock
from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.expressions import Chosen
from rapha_lab.protocol.expression import Call, Col, Lit
from wards import SALT, ward
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
cohort = Cohort(ward(), mock(ward(), 20), SALT)
for fn, more in (("fill_null", [Lit(1)]), ("add", [Lit(1)]), ("integer", []), ("is_in", [Lit(1), Lit(0)])):
    deep = Col("age")
    for _ in range(38):
        deep = Call(fn, [deep, *more])
    assert len(Chosen(cohort, {"deep": deep}, None).view("all").numbers("deep")) == 20
"""


def clipped(expression):
    """The expression with public bounds."""
    return Call("clip", [expression, Lit(-1000), Lit(1000)])


def derived(expression, cohort, where=None):
    """The view of a cohort with one column more."""
    return Chosen(cohort, {"new": expression}, where).view("all")


class TestMeaning:
    @pytest.mark.parametrize("expression", [*NUMBERS, *TRUTHS, *CATEGORIES], ids=str)
    def test_they_give_what_polars_gives(self, expression):
        """On made-up patients with missing values: the same known values, and null where polars has null."""
        frame = mock(ward(), 300)
        expected = frame.select(expression.alias("new"))["new"]
        column = derived(translate(expression), Cohort(ward(), frame, SALT)).frame(["new"])["new"]
        if expected.dtype == pl.Categorical or expected.dtype == pl.Enum:
            expected = expected.cast(pl.String)
        assert column.is_null().to_list() == expected.is_null().to_list()
        known = expected.is_not_null()
        if expected.dtype == pl.String or expected.dtype == pl.Boolean:
            assert column.filter(known).to_list() == expected.filter(known).to_list()
        else:
            assert column.filter(known).cast(float).to_list() == pytest.approx(
                expected.filter(known).cast(float).to_list(), rel=1e-12, abs=1e-9
            )

    def test_where_keeps_those_for_whom_it_is_true(self):
        """Neither false nor unknown; shards and splits are parts of the same patients."""
        frame = mock(ward(), 300)
        cohort = Chosen(Cohort(ward(), frame, SALT), {}, translate(age > 50))
        assert len(cohort.view("all")) == len(frame.filter(age > 50))
        assert sum(len(cohort.view(split)) for split in ("train", "validation", "test")) == len(
            frame.filter(age > 50)
        )
        assert sum(len(shard) for shard in cohort.view("train").shards(7)) == len(cohort.view("train"))

    @pytest.mark.parametrize(
        ("expression", "expected"),
        [
            (pl.len(), pl.len()),
            (pl.col("value").count(), pl.col("value").count()),
            (pl.col("value").sum(), pl.col("value").sum()),
            (pl.col("value").mean(), pl.col("value").mean()),
            (pl.col("value").std(), pl.col("value").std()),
            (pl.col("value").max() - pl.col("value").min(), pl.col("value").max() - pl.col("value").min()),
            (
                pl.col("value").filter(pl.col("code") == "a").max(),
                pl.col("value").filter(pl.col("code") == "a").max(),
            ),
            (pl.col("code").n_unique(), pl.col("code").drop_nulls().n_unique()),
            (pl.col("value").last(), pl.col("value").drop_nulls().last()),
            ((pl.col("value") > 6).any(), (pl.col("value") > 6).any()),
            (pl.col("urgent").all(), pl.col("urgent").all()),
        ],
        ids=str,
    )
    def test_aggregations_over_a_patients_rows_give_what_polars_gives(self, expression, expected):
        """Of the rows that count, in order of time."""
        schema = hospital()
        cohort = Cohort(schema, mock(schema, 80), SALT, tables=mock_tables(schema, 80))
        found = derived(clipped_if_number(over(expression, "labs", None), schema), cohort).frame(["new"])[
            "new"
        ]
        groups = cohort.view("all").table("labs").group_by("__patient").agg(expected.alias("new"))
        wanted = dict(groups.iter_rows())
        for patient, value in enumerate(found.cast(float)):
            want = wanted.get(patient)
            if patient not in wanted and value is not None:
                want = {"all": 1.0}.get(str(expression).rsplit(".", 1)[-1][:3], 0.0)
            assert (value is None) == (want is None), (patient, value, want)
            assert value is None or value == pytest.approx(float(want), abs=2e-5)

    @pytest.mark.parametrize(
        "condition",
        [
            pl.col("text") == "I50",
            pl.col("text") != "I50",
            pl.lit("I50") == pl.col("text"),
            pl.col("text").is_in(["I50", "x y", ""]),
            pl.col("text").is_null() | (pl.col("text") == "x y"),
        ],
        ids=str,
    )
    def test_a_text_is_compared_with_words(self, condition):
        """As polars does, but for the spaces around it; null stays neither."""
        schema, written = hospital(), ["I50", " I50 ", "i50", "I50.1", "x y", "", None, "a\0b", "é"]
        tables = mock_tables(schema, 9)
        notes = pl.DataFrame({"pid": mock(schema, 9)[schema.patient], "text": written, "scan": None})
        tables["notes"] = notes.with_columns(scan=pl.lit(None, tables["notes"]["scan"].dtype))
        cohort = Cohort(schema, mock(schema, 9), SALT, tables=tables)
        found = (
            Chosen(cohort, {"n": over(pl.len(), "notes", translate(condition))}, None)
            .view("all")
            .numbers("n")
        )
        wanted = notes.select(pl.col("pid"), pl.col("text").str.strip_chars(" ")).filter(condition)["pid"]
        assert [pid for pid, n in zip(notes["pid"], found, strict=True) if n] == wanted.to_list()

    @pytest.mark.parametrize("fn", FUNCTIONS)
    def test_whatever_else_is_made_of_a_text_is_refused_or_computed(self, fn):
        """No text makes a function raise at the curator, such as a cast of words to a number would."""
        schema = hospital(columns=[*FIELDS["columns"], TABLES[1]["columns"][0]])
        frame = mock(schema, 6).with_columns(text=pl.Series(["1.5", "x", "", None, "inf", "true"]))
        cohort = Cohort(schema, frame, SALT, tables=mock_tables(schema, 6))
        nothing = Call("when", [Lit(True), Lit(None), Lit(None)])
        parts = [Col("text"), Lit("x"), Lit(None), Lit(1), Lit(True), Col("sex"), nothing]
        fewest, most, _ = FUNCTIONS[fn]
        for count in range(fewest, min(most, 3) + 1):
            for of in product(parts, repeat=count):
                expression = Call("is_null", [Call(fn, list(of))])
                if Col("text") not in of:
                    continue
                try:
                    typed(expression, schema)
                except RequestError:
                    continue
                Chosen(cohort, {}, expression).view("all").known("age")

    def test_windows_before_and_after_an_index_date(self):
        """Rows are told apart by a date that is each patient's own."""
        schema = hospital()
        tables = mock_tables(schema, 60)
        cohort = Cohort(schema, mock(schema, 60), SALT, tables=tables)
        first = over(pl.col("taken").min(), "labs", None)
        later = Call("gt", [Col("taken"), Col("index")])
        view = Chosen(cohort, {"index": first, "later": Over("labs", "len", None, later)}, None).view("all")
        count, known = view.numbers("later"), view.known("index")
        labs = view.table("labs").with_columns(first=pl.col("taken").min().over("__patient"))
        wanted = labs.filter(pl.col("taken") > pl.col("first")).group_by("__patient").len()
        assert {n: int(count[n]) for n in range(60) if count[n]} == dict(wanted.iter_rows())
        assert known.sum() == labs["__patient"].n_unique()


def clipped_if_number(expression, schema):
    """With bounds, if it needs them."""
    return expression if typed(expression, schema).type == "boolean" else clipped(expression)


class TestTotal:
    @given(
        rows(), st.sampled_from([*map(clipped, HOSTILE), *map(translate, [*NUMBERS, *TRUTHS, *CATEGORIES])])
    )
    @settings(max_examples=60)
    def test_no_record_makes_one_raise_or_leave_its_public_bounds(self, patients, expression):
        """NaN, infinities, zeros to divide by, logarithms of nothing: a bound or a missing value."""
        view = derived(expression, cohort_of(patients))
        column = view.schema.column("new")
        values = view.numbers("new") if column.type != "category" else view.codes("new").double()
        low, high = column.limits if column.type != "category" else (0, len(column.categories) - 1)
        assert values.isfinite().all()
        assert ((values >= low) & (values <= high)).all()
        assert (view.tensor(["new"]).abs() <= 1).all()

    @pytest.mark.parametrize("expression", [*NUMBERS, *TRUTHS], ids=str)
    def test_public_bounds_hold_without_the_clamp(self, expression):
        """Interval arithmetic is right: what is computed lies within, so that the clamp takes nothing away."""
        frame = mock(ward(), 500, seed=3)
        ours = translate(expression)
        found = typed(ours, ward())
        cohort = Cohort(ward(), frame, SALT)
        raw = Chosen(cohort, {}, None)._evaluated(ours, cohort._columns).cast(float).drop_nulls()
        assert raw.min() >= found.low - 1e-9 * abs(found.low)
        assert raw.max() <= found.high + 1e-9 * abs(found.high)

    def test_without_the_clamp_a_value_would_escape(self, mutant):
        """The clamp is what privacy rests on: bounds that were wrong would not matter."""
        broken = mutant(module, "np.clip(np.where(known, raw, low), low, high)", "np.where(known, raw, low)")
        column = extended(ward(), {"new": translate(age * 2)}).column("new")
        wild = pl.Series([1e9, None, math.nan, -math.inf])
        held = module._held(column, wild)
        assert held.values.tolist() == [200.0, 0.0, 0.0, 0.0]
        assert held.known.tolist() == [True, False, False, True]
        assert broken._held(column, wild).values.max() == 1e9

    @pytest.mark.parametrize("patients", [0, 1, 20])
    @pytest.mark.parametrize("of", [Lit(True), Lit("a"), Lit(None), Call("lt", [Lit(1), Lit(2)])], ids=str)
    def test_what_is_made_of_literals_has_a_value_for_everybody(self, of, patients):
        """One row for all would raise an error if there are more patients than one, and tell that there are."""
        whole = Cohort(ward(), mock(ward(), 20)[:patients], SALT)
        expression = Call("fill_null", [of, Lit(True)]) if of == Lit(None) else of
        view = derived(expression, whole)
        assert len(view.codes("new")) == patients
        assert bool(view.known("new").all())
        if of not in (Lit("a"), Lit(None)):
            assert len(Chosen(whole, {}, of).view("all")) == patients

    def test_a_question_looks_into_tables_so_often_and_no_more(self):
        """However many columns it makes."""
        many = Call("max", [Over("labs", "len") for _ in range(101)])
        assert extended(hospital(), {"one": many})
        with pytest.raises(RequestError, match="too often"):
            extended(hospital(), {"one": many, "two": many})

    def test_too_many_categories_are_refused_before_anything_is_spent(self):
        """To compare two columns takes the categories of both."""
        columns = [
            {"name": name, "type": "category", "categories": [f"{name}{n}" for n in range(600)]}
            | {"meaning": "Made up.", "public": "Made up."}
            for name in ("a", "b")
        ]
        with pytest.raises(RequestError, match="1200 categories"):
            extended(ward(columns=columns), {}, Call("eq", [Col("a"), Col("b")]))

    def test_work_and_memory_do_not_double_with_every_level(self):
        """The deepest expressions, in a process that has 8 GiB: each part is computed once."""
        path = ":".join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", DEEP], env={**os.environ, "PYTHONPATH": path}, timeout=300
        )
        assert done.returncode == 0

    def test_every_function_is_computed(self):
        """The list of functions and their meanings have the same names."""
        assert set(FUNCTIONS) == set(module._ALIKE) | set(module._NUMERIC)


class TestSessions:
    def test_a_researcher_writes_polars_and_gets_what_polars_would_give(self):
        """where, with_columns, select, table, join and group_by, through the very requests that are sent."""
        schema = hospital(patients=2000)
        tables, frame = mock_tables(schema, 400, seed=0), mock(schema, 400, seed=0)
        rehearsal, released = Rehearsal(), {}
        cell = """
import polars as pl
labs = patients.table("labs").where(pl.col("code") == "a")
joined = patients.join(labs.group_by("patient").agg(worst=pl.col("value").max(), n=pl.len()))
sick = joined.where(pl.col("n") > 0, pl.col("age") > 40).with_columns(band=pl.col("worst") > 5)
a = sick.group_by("band").count(epsilon=1e4)
b = sick.select("worst").mean("worst", epsilon=1e4)
c = labs.group_by("urgent").patients(epsilon=1e4)
d = patients.join(labs, how="anti").count(error=0.01)
e = joined.where(pl.col("n") > 0).table("labs").where(pl.col("age") > 40).count(epsilon=1e4)
"""
        rehearsal.run(cell, schema, epsilon=None)
        released = rehearsal.namespace
        cohort = Cohort(schema, frame, bytes(16), tables=tables)
        labs = cohort.view("all").table("labs").filter(pl.col("code") == "a")
        people = cohort.view("all").frame(["age"]).with_row_index("__patient")
        worst = labs.group_by("__patient").agg(pl.col("value").max(), n=pl.len())
        sick = people.join(worst, on="__patient").filter(pl.col("age") > 40)
        band = sick.select((pl.col("value") > 5).alias("band"))["band"]
        assert [row.value for row in released["a"].rows] == [
            band.eq(False).sum(), band.eq(True).sum(), band.null_count()
        ]  # fmt: skip
        assert released["b"].value == pytest.approx(sick["value"].mean(), abs=0.02)
        urgent = labs.unique(["__patient", "urgent"])["urgent"]
        assert [row.value for row in released["c"].rows] == [(~urgent).sum(), urgent.sum()]
        assert released["d"].value == 400 - worst.height
        older = people.filter(pl.col("age") > 40)["__patient"].implode()
        mine = (
            cohort.view("all")
            .table("labs")
            .filter(
                pl.col("__patient").is_in(older) & pl.col("__patient").is_in(worst["__patient"].implode())
            )
        )
        assert released["e"].value == mine.height
        assert "where" in released["a"].values

    def test_a_pivot_gives_a_column_a_code_as_polars_does(self):
        """The mean of each patient's values with a code, missing where there is none."""
        schema = hospital(patients=2000)
        rehearsal = Rehearsal()
        cell = """
wide = patients.table("labs").where(pl.col("value") > 1).pivot("code", index="patient", values="value")
only = patients.table("labs").pivot("code", on_columns=["b"], values="value", aggregate_function="max")
"""
        rehearsal.run(f"import polars as pl{cell}", schema, epsilon=None)
        tables, frame = mock_tables(schema, 400, seed=0), mock(schema, 400, seed=0)
        cohort = Cohort(schema, frame, bytes(16), tables=tables)
        view = Chosen(cohort, rehearsal.namespace["wide"].columns, None).view("all")
        labs = cohort.view("all").table("labs").filter(pl.col("value") > 1)
        polars = labs.pivot("code", index="__patient", values="value", aggregate_function="mean")
        for code in ("a", "b", "c"):
            wanted = dict(polars.select("__patient", code).drop_nulls().iter_rows())
            known, found = view.known(f"code_{code}").tolist(), view.numbers(f"code_{code}").tolist()
            assert {n for n, is_known in enumerate(known) if is_known} == {*wanted}
            assert all(found[n] == pytest.approx(value, abs=2e-5) for n, value in wanted.items())
        assert list(rehearsal.namespace["only"].columns) == ["code_b"]

    @pytest.mark.parametrize(
        ("call", "field"),
        [
            ('pivot("code", values="valu")', "valu"),
            ('pivot("cod", values="value")', "cod"),
            ('pivot("value", values="value")', "value"),
            ('pivot("code", values="value", aggregate_function="median")', "aggregate_function"),
            ('pivot("code", values="value", on_columns=["z"])', "code"),
            ('pivot("code", values="value", index="code")', "index"),
            ('group_by("patient", "code")', "group_by"),
            ('where(pl.col("text") < "b")', "lt"),
        ],
    )
    def test_a_pivot_or_group_that_cannot_be_is_told(self, call, field):
        """Naming what does not fit."""
        table = "notes" if "text" in call else "labs"
        with pytest.raises(RequestError) as caught:
            Rehearsal().run(
                f'import polars as pl\npatients.table("{table}").{call}', hospital(), epsilon=None
            )
        assert caught.value.field == field

    def test_a_selection_reaches_training_evaluation_and_shards(self):
        """Derived columns are inputs and targets, and patients who are left out contribute nothing."""
        schema = ward(patients=6000)
        cell = """
import polars as pl, torch
some = patients.with_columns(old=pl.col("age") > 60, lcrp=pl.col("crp").log()).where(pl.col("sex") == "F")
model = torch.nn.Linear(2, 1)
some.train.fit(model, inputs=["age", "lcrp"], target="old", epsilon=5, epochs=1)
judged = some.test.evaluate(model, ["auroc"], epsilon=1)
for batch in some.train.batches(size=100, epochs=0.1, epsilon=5):
    torch.nn.functional.mse_loss(model(batch[["age", "lcrp"]]).squeeze(-1), batch["old"]).backward()
def only(frame):
    assert set(frame["sex"].drop_nulls()) <= {"F"} and not frame["sex"].null_count() and "old" in frame.columns
    return frame["lcrp"].mean()
mean = some.shards(only, bounds=(-3, 7), columns=["sex", "old", "lcrp"], epsilon=10, seconds=20)
"""
        rehearsal = Rehearsal()
        rehearsal.run(cell, schema, epsilon=None)
        assert rehearsal.namespace["judged"].values["where"] == "(sex = F)"
        assert set(rehearsal.namespace["mean"].values["derived"]) == {"old", "lcrp"}


class TestOnePatient:
    @pytest.mark.parametrize("expression", [*NUMBERS, *TRUTHS, *CATEGORIES], ids=str)
    def test_nobodys_value_depends_on_the_others(self, expression):
        """Without the first patient everybody else's is bitwise the same."""
        frame = mock(ward(), 200)
        one, other = (derived(translate(expression), Cohort(ward(), f, SALT)) for f in (frame, frame[1:]))
        assert torch.equal(
            one.codes("new")[1:] if one.schema.column("new").type == "category" else one.numbers("new")[1:],
            other.codes("new") if one.schema.column("new").type == "category" else other.numbers("new"),
        )

    @pytest.mark.parametrize("fn", ["sum", "mean", "std", "max", "last", "len"])
    def test_nobodys_rows_add_up_differently_in_other_company(self, fn):
        """Sums over rows are of integers, so that no order or block of rows moves a last digit."""
        schema = hospital()
        tables, frame = mock_tables(schema, 300), mock(schema, 300)
        node = clipped(Over("labs", fn, Call("mul", [Col("value"), Lit(1 / 3)]) if fn != "len" else None))
        one, other = (
            derived(node, Cohort(schema, f, SALT, tables=tables)).numbers("new") for f in (frame, frame[1:])
        )
        assert torch.equal(one[1:], other)

    @given(rows(), st.data())
    @settings(max_examples=25)
    def test_one_patient_moves_no_question_about_a_cohort_further_than_stated(self, patients, data):
        """With derived columns and a filter the same bounds hold on the very integers."""
        patients.append(
            {"age": 90.0, "crp": 1e9, "visits": 9.0, "smoker": True, "died": True, "sex": "F", "site": "East"}
        )
        without = data.draw(st.integers(0, len(patients) - 1))
        group = [patients, patients[:without] + patients[without + 1 :]]
        derive = {"ratio": clipped(HOSTILE[0]), "band": translate(CATEGORIES[0]), "old": translate(age > 60)}
        where = data.draw(st.sampled_from([None, *map(translate, TRUTHS)]))
        views = [Chosen(cohort_of(each), derive, where).view("all") for each in group]
        base = {"dataset": "ward", "epsilon": 1.0}
        for ask in (
            messages.Count(by=["band", "old"], **base),
            messages.Mean(column="ratio", by=["old"], **base),
            messages.Describe(columns=["ratio", "band", "age"], **base),
        ):
            asked = aggregate.question(ask, views[0].schema)
            a, b = (asked.exact(view).astype(float) for view in views)
            assert np.linalg.norm(a - b) <= asked.sensitivity

    def test_who_opted_out_is_in_no_chosen_cohort(self):
        """Neither in a new one, nor present in a step of an older one."""
        cohort = Cohort(ward(), mock(ward(), 50), SALT)
        where = Call("not", [Call("is_null", [Col("visits")])])
        older = Chosen(cohort, {}, where).view("all")
        assert (len(older), int(older.present().sum())) == (50, 50)
        cohort.leave_out(frozenset({mark_of("mock-000003", SALT)}))
        assert len(Chosen(cohort, {}, where).view("all")) == 49
        assert (len(older), older.present().tolist().index(False)) == (50, 3)

    def test_nothing_is_computed_before_the_view_is_used(self, monkeypatch):
        """So that no record is touched before the ledger knows of it."""
        cohort = Cohort(ward(), mock(ward(), 50), SALT)
        monkeypatch.setattr(Chosen, "_evaluated", lambda *_: pytest.fail("touched"))
        Chosen(cohort, {"new": translate(age * 2)}, translate(age > 50)).view("train")


class TestRefused:
    @pytest.mark.parametrize(
        ("expression", "match"),
        [
            (age.map_elements(lambda x: x, return_dtype=pl.Float64), "AnonymousFunction"),
            (age.mean(), "many rows"),
            (age.rank(), "Rank"),
            (age.shift(1), "Shift"),
            (age.over("sex"), "Over|Window"),
            (age.cum_sum(), "CumSum"),
            (age.sort(), "Sort"),
            (sex.str.contains("F"), "StringExpr|Contains"),
            (pl.len(), "many rows"),
            (pl.int_range(pl.len()), "Range|len|many"),
            (age.sample(3), "Random|Sample"),
        ],
        ids=str,
    )
    def test_what_mixes_patients_or_runs_code_has_no_counterpart(self, expression, match):
        """It is refused by name, where it is written."""
        with pytest.raises(RequestError, match=match):
            translate(expression)

    @pytest.mark.parametrize(
        ("expression", "match"),
        [
            (Call("system", [Lit("rm -rf /")]), "no function"),
            (Col("agee"), "Did you mean age"),
            (Call("eq", [Col("sex"), Lit("X")]), "never 'X'"),
            (Call("gt", [Col("sex"), Lit(1)]), "cannot be compared"),
            (Call("and", [Col("age"), Col("smoker")]), "neither true nor false"),
            (Call("div", [Col("age"), Col("visits")]), "Nothing public bounds"),
            (Call("add", [Col("sex"), Lit(1)]), "is a category"),
            (Call("when", [Col("smoker"), Col("age"), Lit("x")]), "must be one of them"),
            (Call("clip", [Col("age"), Col("crp"), Lit(9)]), "two numbers"),
            (Call("clip", [Col("age"), Lit(9), Lit(1)]), "two numbers"),
            (Call("pow", [Col("age"), Col("visits")]), "whole number"),
            (Lit(3), "always 3"),
            (Lit(None), "always missing"),
            (Over("labs", "len"), "no table"),
            (Call("not", [Col("smoker"), Col("died")]), "does not take 2"),
            (Lit(1e300), "too large"),
            (Lit(10**400), "too large"),
            (Call("mul", [Col("age"), Call("exp", [Lit(700)])]), "Nothing public bounds"),
        ],
        ids=lambda value: value if isinstance(value, str) else text(value)[:60],
    )
    def test_what_has_no_type_or_bounds_is_refused_from_the_schema_alone(self, expression, match):
        """By name, and with the way out."""
        with pytest.raises(RequestError, match=match):
            extended(ward(), {"new": expression})

    @pytest.mark.parametrize("name", ["age", "id", "labs.value", "__over1"])
    def test_a_derived_column_cannot_take_anothers_place(self, name):
        """Nor that of an identifier or of what the curator needs itself."""
        with pytest.raises(RequestError) as error:
            extended(ward(), {name: translate(age * 2)})
        assert error.value.field == name

    def test_neither_depth_nor_length_exhausts_the_curator(self):
        """Nested or long beyond measure: a typed error, at once."""
        deep = Col("age")
        for _ in range(300):
            deep = Call("abs", [deep])
        long = Call("max", [Call("max", [Col("age")] * 400)] * 400)
        for expression, match in ((deep, "too deep"), (long, "too long")):
            with pytest.raises(RequestError, match=match):
                extended(ward(), {"new": expression})
        bomb = b'{"is":"call","fn":"abs","of":[' * 5000 + b'{"is":"col","name":"age"}' + b"]}" * 5000
        with pytest.raises(RequestError):
            messages.decode(b'{"op":"count","dataset":"ward","epsilon":1,"where":' + bomb + b"}")

    def test_requests_carry_expressions_as_json_alone(self):
        """What is sent decodes to itself, and an unknown part is refused."""
        ask = messages.Count(
            dataset="ward", epsilon=1.0, derive={"new": translate(CATEGORIES[0])}, where=translate(TRUTHS[2])
        )
        assert messages.decode(messages.encode(ask)) == ask
        with pytest.raises(RequestError):
            messages.decode(b'{"op":"count","dataset":"ward","epsilon":1,"where":{"is":"sql","text":"1=1"}}')
        assert msgspec.json.encode(ask.where).startswith(b'{"is":"call"')

    def test_a_derived_column_is_as_public_as_the_ones_it_is_made_of(self):
        """Type, unit of bounds, categories and missingness need no record."""
        made = extended(
            ward(),
            {
                "double": translate(age * 2),
                "band": translate(CATEGORIES[0]),
                "filled": translate(age.fill_null(0)),
                "whole": translate(visits * 2 + 1),
            },
        )
        assert made.column("double").bounds == (0.0, 200.0)
        assert made.column("double").missing == "possible"
        assert made.column("band").categories == ("young", "middle", "old")
        assert made.column("filled").missing == "never"
        assert (made.column("whole").type, made.column("whole").bounds) == ("integer", (1.0, 19.0))
        assert scope_of(made)["whole"].type == "integer"
