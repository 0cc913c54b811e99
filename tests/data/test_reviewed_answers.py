"""What a reviewed function's process may write as its answer, and what is left of it before a custodian looks."""

from __future__ import annotations

import io
import json
import math
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pytest
import wards
from safetensors.numpy import load, save

from rapha_lab.client.mock import mock, mock_tables
from rapha_lab.curator import checks
from rapha_lab.curator.cohort import Cohort, View
from rapha_lab.curator.mechanisms import review
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.expression import Call, Col, Lit
from rapha_lab.protocol.release import canonical
from rapha_lab.session import parcels, shard

PATIENT = {"age": 50.0, "crp": 1.0, "visits": 3.0, "smoker": True, "died": False, "sex": "F", "site": "North"}


@pytest.fixture
def view() -> View:
    """Twenty patients."""
    return wards.cohort_of([PATIENT | {"age": 40.0 + n} for n in range(20)]).view("all")


def parcel(spec: Any) -> dict[str, Any]:
    return {"values": {"result": spec}}


def plain(value: Any) -> dict[str, Any]:
    return {"kind": "plain", "value": value}


def array(name: str = "0", **more: Any) -> dict[str, Any]:
    return {"kind": "array", "tensor": name, **more}


BOMBS = {
    "text that numpy would pad": ({"kind": "strings", "value": ["a" * 400_000, *[""] * 200_000]}, {}),
    "one array, many times": (
        {"kind": "list", "items": [array()] * 20_000},
        {"0": np.zeros(90_000, np.uint8)},
    ),
    "complex numbers": (array(), {"0": np.array([1 + 2j], np.complex64)}),
    "a table by a flag": (
        {"kind": "table", "columns": {name: plain(1.0) for name in ("sex", "died", "smoker", "site", "age")}},
        {},
    ),
    "no such array": (array("9"), {}),
    "text that is none": ({"kind": "strings", "value": {"a": 1}}, {}),
    "items that are none": ({"kind": "list", "items": 7}, {}),
    "no kind": ({}, {}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_answer_breaks_the_checks(view: View, name: str) -> None:
    """Else the job failed before anybody released anything, and that it failed would be the answer."""
    spec, arrays = BOMBS[name]
    found = checks.result(parcel(spec), save(arrays) if arrays else b"", view)
    assert found.stopped or found.parcel
    assert checks.tensors(found.blob) is not None


def test_no_panic_of_a_library_breaks_them_either(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no Exception to Python, and would be told at once to the researcher, whom nobody has answered."""

    def panics(*_: Any) -> Any:
        raise pl.exceptions.PanicException("index 4711 out of bounds")

    monkeypatch.setattr(checks, "_counts", panics)
    assert "cannot be looked at" in checks.result(parcel(plain(1)), b"", view).stopped


def test_nothing_leaves_beside_the_values(view: View) -> None:
    """No header, no array that nothing names, no spelling, no field of its own, no bits of what is no number."""
    hidden = np.array([0x7FF8_DEAD_BEEF_CAFE, 0x8000_0000_0000_0000], np.uint64).view(np.float64)
    blob = save({"p4711": hidden, "unnamed": np.arange(7.0)}, metadata={"row": "patient 4711"})
    spec = {
        "kind": "dict",
        "note": "patient 4711",
        "items": {
            "b": array("p4711", grad="patient 4711"),
            "a": {"kind": "float", "value": " nAn ", "row": 4711},
        },
    }
    found = checks.result(parcel(spec), blob, view)
    assert not found.stopped
    assert "4711" not in json.dumps(found.parcel)
    assert b"4711" not in found.blob
    assert found.blob == save({"0": np.array([math.nan, 0.0])})
    assert found.parcel == parcel(
        {
            "kind": "dict",
            "items": {"a": {"kind": "float", "value": "nan"}, "b": array("0", grad=False)},
        }
    )


def test_custodians_see_every_number_that_would_leave(view: View) -> None:
    """Those of arrays too, which are not in the document itself."""
    found = checks.result(parcel(array()), save({"0": np.array([[1.25, 2.5], [3.75, 5.0]])}), view)
    assert "Values of 0: [[1.25, 2.5], [3.75, 5.0]]" in found.prompts
    assert load(found.blob)["0"].tolist() == [[1.25, 2.5], [3.75, 5.0]]


@pytest.mark.parametrize("strange", ["\u200b", "\u202e", "\r", "\x1b", "\ufe01", "\U000e0101", "\u3164"])
def test_what_nobody_sees_is_in_no_answer_and_no_source(view: View, strange: str) -> None:
    """Bits between letters, colours of a terminal, and what turns a line of source around."""
    for spec in (plain(f"a{strange}b"), {"kind": "dict", "items": {f"a{strange}b": plain(1)}}):
        assert "nobody sees" in checks.result(parcel(spec), b"", view).stopped
    asked = {"dataset": "ward", "split": "all", "name": "f", "columns": ["age"]}
    source = f"def f(frame):\n    return 'a{strange}b'\n"
    with pytest.raises(RequestError, match="invisible") as refused:
        review.plan(messages.Review(source=source, **asked), b"", wards.ward(), None)  # type: ignore[arg-type]
    assert refused.value.field == "source"


def test_a_forged_frame_is_read_like_any(view: View) -> None:
    """The worker's process is the function's: it may write the bytes itself."""
    frame = io.BytesIO()
    blob = save({"0": np.array([1 + 1j], np.complex64)})
    messages.write_frame(frame, messages.encode({"parcel": parcel(array())}), blob)
    ask = messages.Review(dataset="ward", split="all", source="pass", name="f", columns=["age"])
    answer = review._answer(ask, frame.getvalue().ljust(messages.REVIEWED, b"\0"), view)
    assert "cannot be checked" in answer.values["failed"]
    assert not answer.tensors


class TestRows:
    """Tables with many rows a patient, in a reviewed function."""

    LABS = """
def labs_of(frame, labs, least):
    import polars as pl
    rows = frame.with_row_index("__patient").join(labs, on="__patient")
    return {"mean": rows["value"].mean(), "people": rows["__patient"].n_unique(), "rows": len(labs), "least": least}
"""

    @pytest.fixture
    def labs(self) -> View:
        """Fifty patients and their tables."""
        schema = wards.hospital()
        made = mock_tables(schema, 50)
        return Cohort(schema, mock(schema, 50), bytes(16), tables=made).view("all")

    def test_a_function_gets_the_rows_that_count_by_patient(self, labs: View) -> None:
        """Each with the place of its patient in the first frame, and its inputs beside."""
        asked = {
            "dataset": "ward",
            "split": "all",
            "source": self.LABS,
            "name": "labs_of",
            "columns": ["age"],
        }
        given, blob = parcels.pack({"least": 3}, ["least"])
        ask = messages.Review(**asked, tables=["labs"], inputs=given)
        header, tensors = messages.read_frame(io.BytesIO(review._job(ask, blob, labs))) or (b"", b"")
        told, arrays = shard.reviewed(header, tensors)
        result = parcels.unpack(told["parcel"], arrays)["result"]
        rows = labs.table("labs")
        assert (result["rows"], result["least"]) == (len(rows), 3)
        assert result["people"] == rows["__patient"].n_unique()
        assert result["mean"] == pytest.approx(rows["value"].mean())
        with pytest.raises(RequestError, match="no table 'lab'"):
            review.plan(messages.Review(**asked, tables=["lab"]), b"", labs.schema, None)  # type: ignore[arg-type]

    def test_the_checks_see_the_rows_it_saw(self, labs: View) -> None:
        """A row's own value is a few patients' own; how many rows a patient has does not make them many."""
        own = float(next(v for v in labs.table("labs")["value"].drop_nulls() if v != int(v)))
        told = checks.result(parcel(plain(own)), b"", labs, ["labs"])
        assert any("Equal to the value of fewer than 10 patients" in line for line in told.prompts)
        assert not any(
            "Equal to the value" in line for line in checks.result(parcel(plain(own)), b"", labs).prompts
        )
        key = next(c.name for c in labs.schema.table("labs").columns if c.type in ("category", "boolean"))
        few = labs.table("labs").filter(pl.col("__patient") < 9)
        rows = pl.concat([few] * 40)  # many rows of nine patients
        spec = {"kind": "table", "columns": {key: plain(1), "value_mean": plain(1.0)}}
        found = list(checks._tables(spec, "result", labs.schema.table("labs").columns, rows))
        assert any("stand for fewer than 10 patients" in line for line in found)


class TestWhatCustodiansRead:
    """It is what runs, all of it, and nothing leaves beside it."""

    ASKED: ClassVar[dict[str, Any]] = {"dataset": "ward", "split": "all", "name": "f", "columns": ["age"]}

    def failed(self, view: View, said: dict[str, Any]) -> str:
        """What is told of a function that failed, whose process wrote this."""
        frame = io.BytesIO()
        messages.write_frame(frame, messages.encode(said))
        ask = messages.Review(source="def f(frame):\n    pass\n", **self.ASKED)
        told = review._answer(ask, frame.getvalue().ljust(messages.REVIEWED, b"\0"), view)
        return str(told.values["failed"])

    @pytest.mark.parametrize(
        "said",
        [
            {"failed": "P4711 is 43"},
            {"failed": "P4711 in line 2"},
            {"failed": "ValueError in line 4711"},
            {"failed": "ValueError\ufe01\ufe02 in line 2"},
            {"failed": ["4711"]},
            {"parcel": {"values": {"result": {"kind": "P4711"}}}},
        ],
    )
    def test_a_failure_says_nothing_of_a_record(self, view: View, said: dict[str, Any]) -> None:
        """The function may name an error, or a kind of value, after a patient."""
        told = self.failed(view, said)
        assert "4711" not in told
        assert told.isascii()

    def test_a_failure_says_where_to_look(self, view: View) -> None:
        """A known error and a line of the source."""
        assert (
            self.failed(view, {"failed": "ColumnNotFoundError in line 2"}) == "ColumnNotFoundError in line 2"
        )
        large = f"Its result is larger than {messages.REVIEWED >> 20} MiB"
        assert self.failed(view, {"failed": large}) == large

    def test_what_runs_is_what_is_read(self) -> None:
        """To custodians 1.0 is 1, -0.0 is 0 and a dict has no order: a function must not be able to tell them apart."""
        given = {"values": {"b": plain(1.0), "a": {"kind": "list", "items": [plain(-0.0), plain(0.5)]}}}
        ask = messages.Review(source="pass", inputs=given, **self.ASKED)
        shown = review.as_shown(ask)
        assert repr(shown.inputs) == repr(json.loads(canonical(ask))["inputs"])
        assert list(shown.inputs["values"]) == ["a", "b"]
        assert repr(shown.inputs["values"]["b"]["value"]) == "1"

    def test_derived_columns_keep_their_order(self) -> None:
        """One may be made of those before it."""
        derive = {"z": Call("add", [Col("age"), Lit(1.0)]), "a": Call("add", [Col("z"), Lit(1)])}
        shown = review.as_shown(messages.Review(source="pass", derive=derive, **self.ASKED))
        assert list(shown.derive) == ["z", "a"]
        assert repr(shown.derive["z"]) == repr(Call("add", [Col("age"), Lit(1)]))

    @pytest.mark.parametrize("value", [2**53, [[[]]] * 2])
    def test_what_cannot_be_read_is_refused(self, value: Any) -> None:
        """A number that a browser shows as another, and nests that end whatever would show them."""
        for _ in range(70 if isinstance(value, list) else 0):
            value = [value]
        with pytest.raises(RequestError) as refused:
            review.as_shown(messages.Review(source="pass", inputs={"values": {"a": value}}, **self.ASKED))
        assert refused.value.field == "inputs"

    def test_what_nobody_could_read_is_refused(self) -> None:
        """Twenty such functions would fill the custodians' page and the curator's memory."""
        given, _ = parcels.pack({"x": "a" * review.MOST_READ}, ["x"])
        with pytest.raises(RequestError, match="too long to be read"):
            review.as_shown(messages.Review(source="pass", inputs=given, **self.ASKED))

    def test_whole_floats_stay_floats(self) -> None:
        """Though JSON that is signed has one kind of number."""
        given, _ = parcels.pack({"x": 2.0, "y": -0.0, "z": 1e300, "n": 2}, ["x", "y", "z", "n"])
        ask = review.as_shown(messages.Review(source="pass", inputs=given, **self.ASKED))
        assert repr(parcels.unpack(ask.inputs, b"")) == "{'n': 2, 'x': 2.0, 'y': -0.0, 'z': 1e+300}"

    def test_what_a_source_hides_is_pointed_out(self) -> None:
        """What stands after blanks, and letters that look like others."""
        told = "\n".join(
            checks.source(
                "def f(frame):\n    x = 1" + " " * 90 + "; y = 2\n" + "\n" * 60 + "    return \u0430\n"
            )
        )
        assert "line 2" in told
        assert "line 63" in told
        assert "U+0430" in told
        assert checks.source("def f(frame):\n    return 1\n" + "\n" * 60) == []
