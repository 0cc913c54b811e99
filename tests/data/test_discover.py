"""Keys that nobody listed, discovered in the texts of a table's rows: what one patient can change, and what leaks."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from house import DELTA, House
from hypothesis import given, settings
from hypothesis import strategies as st
from wards import SALT, hospital

from rapha_lab.client.mock import mock
from rapha_lab.curator.accounting import DELTA_UNIT, Gaussian, Thresholded
from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.mechanisms import discover
from rapha_lab.curator.quotes import quote
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import BudgetError, PolicyError, RaphaError, RequestError
from rapha_lab.protocol.expression import Call, Col, Lit
from rapha_lab.protocol.messages import Discover
from rapha_lab.protocol.quote import Inquiry

WORDS = {"meaning": "Made up.", "public": "Made up."}
SCHEMA: dict[str, Any] = {
    "name": "clinic",
    "title": "A made-up clinic",
    "citation": "None.",
    "licence": "CC0",
    "patient": "id",
    "source": "clinic.parquet",
    "patients": 400,
    "columns": [{"name": "age", "type": "number", "bounds": [0, 100], **WORDS}],
    "tables": [
        {
            "name": "stays",
            "patient": "id",
            "source": "stays.parquet",
            "most": 50,
            "meaning": "A row a diagnosis.",
            "columns": [
                {
                    "name": "icd",
                    "type": "text",
                    "tokens": 1,
                    "vocabulary": 16,
                    "missing": "possible",
                    **WORDS,
                },
                {"name": "main", "type": "boolean", **WORDS},
            ],
        }
    ],
}
PATIENTS = 400


def stays() -> pl.DataFrame:
    """Everybody has I10, a quarter E11.9 too; two have J45, and one patient forty codes of their own."""
    rows = [(f"p{n}", "I10", True) for n in range(PATIENTS)]
    rows += [(f"p{n}", " E11.9 ", False) for n in range(0, PATIENTS, 4)] * 2
    rows += [("p1", "J45", True), ("p2", "J45", True)]
    rows += [("p7", f"Z{n:02}", False) for n in range(40)]
    return pl.DataFrame(rows, ["id", "icd", "main"], orient="row")


def clinic(folder, discovery: float = 1e-6, epsilon: float = 50.0) -> House:
    """Its patients, with a budget for discovered keys."""
    frame = pl.DataFrame({"id": [f"p{n}" for n in range(PATIENTS)], "age": [50.0] * PATIENTS})
    return House(folder, SCHEMA, frame, epsilon=epsilon, tables={"stays": stays()}, discovery=discovery)


class TestAnswers:
    @pytest.fixture
    def house(self, tmp_path) -> House:
        """With ten discoveries to make."""
        return clinic(tmp_path)

    def test_common_codes_leave_and_rare_ones_do_not(self, house):
        """In the order of the alphabet, each with its error; neither of two patients' codes nor of one's."""
        found = house.patients.table("stays").discover("icd", keys=2, epsilon=2)
        assert [row.name for row in found.rows] == ["E11.9", "I10"]
        assert found["I10"].value == pytest.approx(PATIENTS, abs=6 * found.values["error"])
        assert (found.values["discovery_delta"], found.delta) == (1e-7, DELTA + 1e-7)
        told = house.ledger.statement("p", "clinic", "train")
        assert (told.discovered, told.discovery) == (1e-7, 1e-6)

    def test_rows_are_chosen_as_for_any_question(self, house):
        """By an expression over the table's columns and the patient's."""
        rows = house.patients.where(pl.col("age") < 60).table("stays").where(~pl.col("main"))
        assert [row.name for row in rows.discover("icd", epsilon=2).rows] == ["E11.9"]
        nobody = house.patients.where(pl.col("age") < 40).table("stays")
        assert nobody.discover("icd", epsilon=2).rows == []

    def test_each_split_looked_at_spends_its_delta(self, house):
        """Once the total is spent, discoveries end and other questions go on."""
        rows = house.patients.train.table("stays")
        for number in range(10):
            rows.discover("icd", epsilon=0.5 + number / 100)
        with pytest.raises(BudgetError, match="discovery_delta"):
            rows.discover("icd", epsilon=1)
        house.patients.train.count(epsilon=0.5)
        house.patients.test.table("stays").discover("icd", epsilon=0.5)
        assert house.ledger.statement("p", "clinic", "test").discovered == 1e-7
        house.patients.train.table("stays").discover("icd", epsilon=0.5)  # the same as the first, at no price

    def test_without_a_signed_delta_none_are_discovered(self, tmp_path):
        """The refusal says what to do, and nothing is spent."""
        house = clinic(tmp_path, 0.0)
        with pytest.raises(PolicyError, match="lets no keys be discovered") as error:
            house.patients.table("stays").discover("icd", epsilon=1)
        assert "public values" in str(error.value)

    def test_an_unfunded_cap_of_all_projects_refuses_too(self, house):
        """The dataset's own budget holds beside the project's."""
        page = msgspec.structs.replace(house.policy.datasets[0], epsilon=50.0)
        object.__setattr__(house.policy, "datasets", (page,))
        with pytest.raises(BudgetError, match="all projects together"):
            house.patients.table("stays").discover("icd", epsilon=1)

    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ({"column": "main"}, "column"),
            ({"column": "nothing"}, "column"),
            ({"keys": 0}, "keys"),
            ({"keys": 101}, "keys"),
            ({"delta": 0.0}, "delta"),
            ({"delta": -1e-7}, "delta"),
            ({"delta": 2e-6}, "delta"),
            ({"delta": float("nan")}, "delta"),
            ({"epsilon": 1e-9}, "epsilon"),
        ],
    )
    def test_bad_input_is_told_by_its_field(self, house, fields, field):
        """Before anything is touched."""
        asked = {"column": "icd", "epsilon": 1.0} | fields
        with pytest.raises(RaphaError) as error:
            house.patients.table("stays").discover(asked.pop("column"), **asked)
        assert error.value.field == field
        assert house.steps == []

    def test_a_quote_is_the_price_and_the_threshold(self, house):
        """From the function that prices the request."""
        house.patients.table("stays").discover("icd", epsilon=1)
        inquiry = Inquiry(kind="discover", epsilon=1.5, fields={"table": "stays", "column": "icd", "keys": 4})
        told = quote(inquiry, house.policy.project("p"), house.schema, house.ledger)
        found = house.patients.table("stays").discover("icd", keys=4, epsilon=1.5)
        assert told.error == found.values["error"]
        assert told.figures["threshold, patients"] == found.values["threshold"]
        after = house.ledger.statement("p", "clinic", "train")
        assert told.accounts["train"].discovery == pytest.approx(after.discovery - after.discovered)
        assert told.spent == pytest.approx(after.spent, rel=1e-9)


codes = st.sampled_from(["A", "B", "C", " A", "", "é", "x" * 65, "a\nb", None])
people = st.lists(st.lists(codes, max_size=5), min_size=1, max_size=6)


def cohort(rows: list[list[str | None]], first: int = 0) -> Cohort:
    """Patients by their notes."""
    schema = hospital(patients=None)
    names = [f"n{first + number}" for number in range(len(rows))]
    frame = mock(schema, len(rows), seed=0).with_columns(pl.Series("id", names, dtype=pl.String))
    notes = [(name, text) for name, texts in zip(names, rows, strict=True) for text in texts]
    table = pl.DataFrame(notes, {"pid": pl.String, "text": pl.String}, orient="row")
    table = table.with_columns(scan=pl.lit(None, dtype=pl.List(pl.Float32)))
    labs = pl.DataFrame(
        schema={
            "pid": pl.String,
            "taken": pl.Datetime,
            "value": pl.Float64,
            "code": pl.String,
            "urgent": pl.Boolean,
        }
    )
    return Cohort(schema, frame, SALT, tables={"notes": table, "labs": labs})


def pairs(of: Any, rows: list[list[str | None]], keys: int, first: int = 0) -> list[tuple[int, str]]:
    """Whose keys count, by the patient's number."""
    ask = Discover(dataset="ward", epsilon=1.0, table="notes", column="text", keys=keys)
    return sorted((first + patient, key) for patient, key in of.kept(cohort(rows, first).view("all"), ask))


class TestOnePatient:
    @given(people, st.integers(1, 3))
    @settings(max_examples=40)
    def test_nobody_else_counts_differently_without_the_first(self, rows, keys):
        """And each patient counts for so many keys at most: counts move by the root of that, in L2."""
        whole = pairs(discover, rows, keys)
        without = pairs(discover, rows[1:], keys, first=1)
        assert [pair for pair in whole if pair[0] != 0] == without
        assert all(sum(patient == n for patient, _ in whole) <= keys for n in range(len(rows)))
        assert len(set(whole)) == len(whole)
        assert {key for _, key in whole} <= {"A", "B", "C"}

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("names[: ask.keys]]", "names[: ask.keys + 1]]"),
            ("partial(_rank, points[patient])", "partial(_rank, len(own))"),
            ('.filter(pl.col("key").str.contains(KEY)).unique()', '.filter(pl.col("key").str.contains(KEY))'),
        ],
    )
    def test_mutants_are_caught(self, mutant, old, new):
        """One key too many, a choice that depends on others, and a key counted twice."""
        broken = mutant(discover, old, new)
        assert not self.faults(discover)
        assert self.faults(broken)

    def faults(self, module) -> bool:
        """Whether one patient moves more than so many counts by one."""
        rows = [[f"{letter}{n}" for n in range(2)] for letter in "ABCDEF"] + [["A0", "A0"]]
        twice = pairs(module, rows, 2)
        whole = pairs(module, rows, 1)
        moved = [pair for pair in whole if pair[0] != 0] != pairs(module, rows[1:], 1, first=1)
        many = any(sum(patient == n for patient, _ in whole) > 1 for n in range(len(rows)))
        return moved or many or len(set(twice)) != len(twice)


def passes(sd: float, least: int) -> float:
    """The exact probability that 1 + discrete Gaussian noise reaches the threshold."""
    reach = math.ceil(45 * sd) + least
    weights = np.exp(-(np.arange(-reach, reach + 1, dtype=float) ** 2) / (2 * sd**2))
    return float(weights[np.arange(-reach, reach + 1) >= least - 1].sum() / weights.sum())


def lone(sd: float, keys: int, least: int) -> float:
    """The exact probability that any of a lone patient's keys passes."""
    return -math.expm1(keys * math.log1p(-passes(sd, least)))


class TestThreshold:
    @pytest.mark.parametrize("sd", [0.3, 0.5, 1.0, 3.7, 40.0, 2000.0])
    @pytest.mark.parametrize("keys", [1, 3, 100])
    @pytest.mark.parametrize("delta", [1e-12, 1e-7, 1e-3])
    def test_a_lone_patient_passes_with_delta_at_most(self, sd, keys, delta):
        """Computed exactly, and not wastefully: two patients fewer would be too few."""
        least = discover.threshold(sd, keys, round(delta * DELTA_UNIT))
        assert lone(sd, keys, least) <= delta
        assert lone(sd, keys, least - 3) > delta or least <= 3

    def test_a_lower_threshold_is_caught(self, mutant):
        """By the same computation: one without the union bound, and one at the mean's own height."""
        for old, new in (("DELTA_UNIT / keys *", "DELTA_UNIT *"), ("return 2 + max", "return -1 + max")):
            broken = mutant(discover, old, new)
            assert lone(3.7, 20, broken.threshold(3.7, 20, DELTA_UNIT // 1000)) > 1e-3

    @pytest.mark.parametrize("delta", [0.2, 0.02])
    def test_by_simulation_a_lone_patient_shows_that_often_at_most(self, delta):
        """Run as it runs at a site; the number that shows is within what chance allows around the exact figure."""
        schema = hospital(patients=None)
        ask = Discover(dataset="ward", epsilon=3.0, table="notes", column="text", keys=2, delta=delta / 4)
        runs, view = 1000, cohort([["A", "B"]]).view("all")
        plan = discover.plan(ask, schema, 1e-5, 0.099)
        shown = sum(bool(plan.run(view, lambda *_: None).values["figures"]) for _ in range(runs))
        told = plan.run(view, lambda *_: None).values
        expected = lone(told["error"], 2, told["threshold"])
        assert expected <= delta / 4
        assert abs(shown - runs * expected) < 5 * math.sqrt(runs * expected + 1)

    def test_the_noise_is_of_the_stated_size(self):
        """A key of everybody is off by sd = noise * √keys."""
        schema = hospital(patients=None)
        ask = Discover(dataset="ward", epsilon=2.0, table="notes", column="text", keys=2, delta=1e-2)
        plan = discover.plan(ask, schema, 1e-5, 0.05)
        assert isinstance(plan.loss, Thresholded)
        view = cohort([["A"]] * 60).view("all")
        drawn = [plan.run(view, lambda *_: None).values for _ in range(300)]
        values = [each["figures"][0]["value"] for each in drawn if each["figures"]]
        assert len(values) > 290
        assert np.std(values) == pytest.approx(plan.loss.noise * math.sqrt(2), rel=0.22)
        assert plan.loss.rdp(8) == Gaussian(plan.loss.noise).rdp(8)


def test_requests_over_the_wire_keep_their_fields():
    """Decoded as they were encoded; the rows' expression included."""
    ask = Discover(
        dataset="d",
        epsilon=1.0,
        table="t",
        column="c",
        keys=3,
        delta=1e-8,
        rows=Call("gt", [Col("x"), Lit(1.0)]),
    )
    assert messages.decode(messages.encode(ask)) == ask
    with pytest.raises(RequestError):
        messages.decode(b'{"op":"discover","dataset":"d","epsilon":1,"table":"t","column":"c","by":[]}')
