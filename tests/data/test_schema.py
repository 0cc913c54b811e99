"""A schema is public, complete and says clearly what is wrong with it."""

import copy

import pytest
from wards import FIELDS, ward

from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.schema import Schema


class TestLayout:
    @pytest.mark.parametrize(
        ("columns", "shape", "dtype"),
        [
            ("age", (), "float32"),
            ("visits", (), "float32"),
            ("died", (), "float32"),
            ("sex", (), "int64"),
            ("site", (), "int64"),
            ("site.missing", (), "float32"),
            (["age"], (1,), "float32"),
            (["died"], (1,), "float32"),
            (["sex"], (1,), "float32"),
            (["site"], (3,), "float32"),
            (["age", "site", "sex", "age.missing"], (6,), "float32"),
        ],
    )
    def test_every_kind_of_column_has_a_public_shape_and_dtype(self, columns, shape, dtype):
        """Scalars by name, float32 vectors by list, one-hot for three categories or more."""
        assert ward().layout(columns) == (shape, dtype)

    def test_every_entry_of_a_vector_has_a_name(self):
        """Names say which entry is which category."""
        names = ward().feature_names(["age", "site", "age.missing"])
        assert names == ["age", "site=North", "site=East", "site=South", "age.missing"]

    def test_an_unknown_column_is_an_error_that_names_what_was_meant(self):
        """A typo costs one reading."""
        with pytest.raises(RequestError, match="Did you mean visits") as error:
            ward().layout(["visit"])
        assert error.value.field == "visit"

    def test_the_patient_is_no_input(self):
        """An identifier is never a feature."""
        with pytest.raises(RequestError, match="identifies patients"):
            ward().layout("id")


class TestWire:
    def test_a_schema_survives_the_wire(self):
        """JSON and back is the same schema and the same bytes."""
        schema = ward()
        assert Schema.from_json(schema.to_json()) == schema
        assert Schema.from_json(schema.to_json()).to_json() == schema.to_json()

    @pytest.mark.parametrize("data", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"name": 1}'])
    def test_rubbish_is_a_request_error(self, data):
        """Whatever arrives, the error is typed."""
        with pytest.raises(RequestError):
            Schema.from_json(data)

    def test_the_expected_size_of_a_split_comes_from_the_declared_figure(self):
        """No true count is needed to plan."""
        assert ward().expected("test") == pytest.approx(20)
        assert ward().expected("all") == 100
        assert ward(patients=None).expected("train") is None


BROKEN = [
    ("age.bounds", "smallest first", {"bounds": [100, 0]}),
    ("age.bounds", "smallest first", {"bounds": [5, 5]}),
    ("age.bounds", "a variance overflows", {"bounds": [0, 1e160]}),
    ("age.bounds", "a variance overflows", {"bounds": [-2e100, 0]}),
    ("age.bounds", "from public knowledge", {"bounds": None}),
    ("age.bounds", "above 0", {"scale": "log"}),
    ("age.bounds[0]", "Expected `float`", {"bounds": ["a", 1]}),
    ("age.bound", "Did you mean bounds", {"bound": [0, 1]}),
    ("age.type", "Invalid enum value", {"type": "float"}),
    ("age.categories", "Leave them out", {"categories": ["a", "b"]}),
    ("a b.name", "Expected `str` matching regex", {"name": "a b"}),
    ("age.missing.name", "reserved", {"name": "age.missing"}),
    ("age.bounds", "Leave them out", {"type": "boolean"}),
    ("age.meaning", "length >= 1", {"meaning": ""}),
]


class TestWords:
    """What a schema shows of itself."""

    def test_each_column_is_a_line_with_its_values(self):
        """As cells call it; a long list of categories is cut."""
        long = FIELDS["columns"][6] | {"name": "long", "categories": [f"category {n}" for n in range(40)]}
        shown = repr(ward(columns=[FIELDS["columns"][0], long])).splitlines()
        assert shown[0].startswith(f"{FIELDS['name']}: ")
        assert FIELDS["columns"][0]["name"] in shown[1]
        assert f"{FIELDS['columns'][0]['bounds'][0]:g} to " in shown[1]
        assert "…" in shown[2]
        assert "category 20" not in shown[2]

    def test_of_many_columns_some_are_shown(self):
        """A wall of text says nothing."""
        many = [FIELDS["columns"][0] | {"name": f"c{n}"} for n in range(300)]
        assert repr(ward(columns=many)).endswith("and 240 more")


class TestErrors:
    @pytest.mark.parametrize(("field", "fix", "change"), BROKEN)
    def test_a_broken_column_is_named_with_the_way_out(self, field, fix, change):
        """The error's field is where the custodian has to look."""
        fields = copy.deepcopy(FIELDS)
        fields["columns"][0].update(change)
        with pytest.raises(RequestError) as error:
            Schema.from_dict(fields)
        assert error.value.field == field
        assert fix in str(error.value)

    @pytest.mark.parametrize(
        ("field", "change"),
        [
            ("splits", {"splits": {"train": 0.5, "validation": 0.1, "test": 0.1}}),
            ("splits.train", {"splits": {"train": -1}}),
            ("source", {"source": "/etc/passwd.csv"}),
            ("source", {"source": "../records.csv"}),
            ("source", {"source": "records.pickle"}),
            ("age", {"patient": "age"}),
            ("patients", {"patients": 0}),
            ("pateints", {"pateints": 5}),
            ("columns", {"columns": []}),
        ],
    )
    def test_a_broken_dataset_is_named_too(self, field, change):
        """Shares, paths, names and figures are all held."""
        with pytest.raises(RequestError) as error:
            ward(**change)
        assert error.value.field == field

    def test_a_name_used_twice_is_refused(self):
        """Which of the two would a request mean?"""
        with pytest.raises(RequestError, match="twice"):
            ward(columns=[FIELDS["columns"][0]] * 2)

    @pytest.mark.parametrize("categories", [[], ["one"], ["a", "a"]])
    def test_a_category_needs_different_values(self, categories):
        """One value is no information, two equal ones no code."""
        with pytest.raises(RequestError, match="categor"):
            ward(columns=[FIELDS["columns"][6] | {"categories": categories}])

    def test_a_file_that_is_no_toml_says_where(self, tmp_path):
        """The parser's line and column are passed on."""
        path = tmp_path / "x.toml"
        path.write_text("name = \n")
        with pytest.raises(RequestError, match=r"x\.toml is no TOML.*line 1"):
            Schema.load(path)
