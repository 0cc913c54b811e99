"""What everybody may know of a dataset: its columns, their public bounds and categories, and its splits.

A schema is written by the custodians and holds nothing computed from a record. It fixes, for every
program's input, a shape and a dtype that are the same whoever the patients are.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rapha_lab.protocol.errors import RequestError

__all__ = ["MISSING", "SPLITS", "Column", "Dtype", "Schema", "Shares"]

Dtype = Literal["float32", "int64"]
Word = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")]
Text = Annotated[str, Meta(min_length=1, max_length=2000)]
Category = Annotated[str, Meta(min_length=1, max_length=200)]

SPLITS = ("train", "validation", "test")
MISSING = ".missing"
"""`name + MISSING` is a column too: 1 for a patient in whom `name` is not known, else 0."""


class _Public(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Fields that everybody may read; an unknown one is an error, so that a typo cannot pass."""


class Column(_Public, frozen=True):
    """One column, as publicly known.

    Attributes:
        name: what cells call it.
        type: number, integer, boolean or category.
        meaning: one sentence for a reader who knows medicine but not this table.
        public: why bounds or categories are public knowledge, and not read off the records.
        unit: of a number, as in "mg/dL".
        bounds: of a number or integer; a value outside is treated as the nearest bound.
        scale: how [-1, 1] is spread over the bounds; "log" for quantities spanning orders of magnitude.
        categories: of a category, in the order of their codes.
        missing: "possible" if a patient may lack it. Either way a program sees 0 where it lacks.
    """

    name: Word
    type: Literal["number", "integer", "boolean", "category"]
    meaning: Text
    public: Text
    unit: str = ""
    bounds: tuple[float, float] | None = None
    scale: Literal["linear", "log"] = "linear"
    categories: tuple[Category, ...] = ()
    missing: Literal["never", "possible"] = "never"

    @property
    def numeric(self) -> bool:
        """Whether it has bounds and a unit."""
        return self.type in ("number", "integer")

    @property
    def width(self) -> int:
        """How many entries it fills in a list of columns."""
        return len(self.categories) if len(self.categories) > 2 else 1

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest value a patient can contribute: the bounds, or 0 and 1 for a boolean.

        Raises:
            RequestError: for a category.
        """
        if self.type == "boolean":
            return 0.0, 1.0
        if self.bounds is None:
            raise RequestError(
                f"The column {self.name} has no bounds.",
                "It holds categories, which have no mean.",
                f'Ask for patients.histogram("{self.name}").',
                field=self.name,
            )
        return self.bounds


class Shares(_Public, frozen=True):
    """Which part of the patients each split gets; they add up to 1."""

    train: Annotated[float, Meta(ge=0, le=1)] = 0.7
    validation: Annotated[float, Meta(ge=0, le=1)] = 0.1
    test: Annotated[float, Meta(ge=0, le=1)] = 0.2


class Schema(_Public, frozen=True):
    """A dataset's public description.

    Attributes:
        name: what requests call it.
        title: one line for people.
        citation: the paper to cite.
        licence: under which the data may be used.
        patient: the column that identifies a patient; never an input.
        source: the file with the records, relative to the data folder (.parquet or .csv).
        columns: what can be asked about.
        patients: a number of patients the custodians declare public, if they do.
        splits: shares of the patients in train, validation and test.
    """

    name: Word
    title: Text
    citation: Text
    licence: Text
    patient: Word
    source: Text
    columns: Annotated[tuple[Column, ...], Meta(min_length=1, max_length=10_000)]
    patients: Annotated[int, Meta(ge=1, le=10**10)] | None = None
    splits: Shares = Shares()

    @classmethod
    def load(cls, path: str | Path) -> Schema:
        """Read and check a schema from a TOML file.

        Raises:
            RequestError: naming the field that is wrong and how to mend it.
            OSError: if the file cannot be read.
        """
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text("utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"The schema {Path(path).name} is no TOML: {error}.") from None

    @classmethod
    def from_dict(cls, fields: Any) -> Schema:
        """Check a schema given as plain fields.

        Raises:
            RequestError: as for `load`.
        """
        try:
            schema = msgspec.convert(fields, cls)
        except msgspec.ValidationError as error:
            raise _malformed(error, fields) from None
        schema.check()
        return schema

    @classmethod
    def from_json(cls, data: bytes) -> Schema:
        """Read and check a schema off the wire.

        Raises:
            RequestError: as for `load`.
        """
        try:
            return cls.from_dict(msgspec.json.decode(data))
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise RequestError(f"The schema is no JSON: {error}.") from None

    def to_json(self) -> bytes:
        """The schema for the wire; the same schema always gives the same bytes."""
        return msgspec.json.encode(self)

    def check(self) -> None:
        """Hold every rule that types alone cannot.

        Raises:
            RequestError: naming the column, the field and the way out.
        """
        seen = {self.patient}
        for column in self.columns:
            if column.name in seen:
                what = f"The name {column.name} is used twice."
                raise RequestError(what, instead="Give every column its own name.", field=column.name)
            seen.add(column.name)
        shares = (self.splits.train, self.splits.validation, self.splits.test)
        if abs(math.fsum(shares) - 1) > 1e-9:
            what = f"The splits add up to {math.fsum(shares):g}."
            raise RequestError(what, instead="Let train, validation and test add up to 1.", field="splits")
        path = PurePosixPath(self.source)
        if path.is_absolute() or ".." in path.parts or path.suffix not in (".parquet", ".csv"):
            what = "The source is no relative path of a .parquet or .csv file."
            raise RequestError(what, instead='Write source = "records.parquet".', field="source")
        for column in self.columns:
            _check_column(column)

    @property
    def _by_name(self) -> dict[str, Column]:
        return _index(self.columns)

    def column(self, name: str) -> Column:
        """The column of that name.

        Raises:
            RequestError: if there is none; names what was probably meant.
        """
        if not isinstance(name, str):
            raise RequestError(f"{name!r:.64} is no column.", "A column is named by a text.", field="column")
        if name in self._by_name:
            return self._by_name[name]
        near = difflib.get_close_matches(name[:64], self._by_name, n=3, cutoff=0.5)
        why = f"{self.patient} identifies patients and is never an input." if name == self.patient else ""
        instead = f"Did you mean {' or '.join(near)}?" if near else "The dataset's card lists its columns."
        what = f"The dataset {self.name} has no column {name[:64]!r}."
        raise RequestError(what, why, instead, field=name[:64])

    def layout(self, columns: str | Iterable[str]) -> tuple[tuple[int, ...], Dtype]:
        """The shape and dtype of one patient's `columns` as a tensor.

        A list of columns is a float32 vector. In it a number fills one entry, scaled by its public bounds to
        [-1, 1]; a boolean one, -1 or 1; a category of two values one, -1 or 1; of more, one-hot as many.
        Where a value is missing all its entries are 0; `"name.missing"` is one entry, 0 or 1.

        A single name is a scalar: a scaled number or a boolean as 0 or 1 in float32, a category's code in
        int64. Where the value is missing it is 0.

        Raises:
            RequestError: for an unknown column.
        """
        if isinstance(columns, str):
            column, missing = self.find(columns)
            return (), "int64" if column.type == "category" and not missing else "float32"
        return (
            sum(1 if missing else column.width for column, missing in map(self.find, columns)),
        ), "float32"

    def feature_names(self, columns: str | Iterable[str]) -> list[str]:
        """A name for each entry of the vector that `layout` describes, as in "age" or "chapter=Skin"."""
        names: list[str] = []
        for name in [columns] if isinstance(columns, str) else columns:
            column, missing = self.find(name)
            one_hot = not missing and column.width > 1
            names += [f"{name}={category}" for category in column.categories] if one_hot else [name]
        return names

    def find(self, name: str) -> tuple[Column, bool]:
        """The column that `name` speaks of, and whether it asks only if that column is missing.

        Raises:
            RequestError: as for `column`.
        """
        if isinstance(name, str) and name.endswith(MISSING):
            return self.column(name.removesuffix(MISSING)), True
        return self.column(name), False

    def expected(self, split: str) -> float | None:
        """How many patients a split has in expectation, from the declared figure; None without one."""
        share = 1.0 if split == "all" else float(getattr(self.splits, split))
        return None if self.patients is None else self.patients * share


@lru_cache(maxsize=64)
def _index(columns: tuple[Column, ...]) -> dict[str, Column]:
    return {column.name: column for column in columns}


def _check_column(column: Column) -> None:
    def fail(field: str, what: str, instead: str) -> RequestError:
        return RequestError(f"The column {column.name}: {what}", "", instead, field=f"{column.name}.{field}")

    if column.name.endswith(MISSING):
        raise fail("name", "its name ends in .missing.", "That ending is reserved; choose another name.")
    if column.numeric and column.bounds is None:
        raise fail("bounds", "it has no bounds.", "Write bounds = [smallest, largest] from public knowledge.")
    if not column.numeric and (column.bounds is not None or column.scale == "log" or column.unit):
        raise fail("bounds", f"a {column.type} has no bounds, scale or unit.", "Leave them out.")
    if column.type == "category":
        if len(column.categories) < 2:
            raise fail("categories", "it needs two categories or more.", "List all that are possible.")
        if len(set(column.categories)) < len(column.categories):
            raise fail("categories", "a category is listed twice.", "List each once.")
    elif column.categories:
        raise fail(
            "categories", f"a {column.type} has no categories.", 'Leave them out or set type = "category".'
        )
    if column.bounds is not None:
        low, high = column.bounds
        if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(high - low)):
            raise fail("bounds", "they are not finite.", "Write two ordinary numbers.")
        if low >= high:
            raise fail("bounds", f"{low:g} is not below {high:g}.", "Write the smallest first.")
        if column.scale == "log" and low <= 0:
            raise fail(
                "bounds", f"a log scale cannot begin at {low:g}.", "Raise it above 0 or use a linear one."
            )
        if column.type == "integer" and not (low.is_integer() and high.is_integer() and high < 2**53):
            raise fail("bounds", "those of an integer are no integers.", "Write whole numbers.")


def _malformed(error: msgspec.ValidationError, fields: Any) -> RequestError:
    what, _, path = str(error).partition(" - at `$")
    path = path.strip("`.")
    what = what.replace("Object missing", "it lacks the").replace("Object contains", "it contains an")
    if path.startswith("columns[") and isinstance(fields, dict):
        index = int(path[len("columns[") : path.index("]")])
        column = fields["columns"][index]
        if isinstance(column, dict) and "name" in column:
            path = path.replace(f"columns[{index}]", str(column["name"])[:64], 1)
    if "unknown field" in what:
        unknown = what.split("`")[-2]
        known = {field.name for kind in (Schema, Column, Shares) for field in msgspec.structs.fields(kind)}
        near = difflib.get_close_matches(unknown, known, n=1)
        path = f"{path}.{unknown}".strip(".")
        instead = f"Did you mean {near[0]}?" if near else "Leave it out."
    else:
        instead = "Write it as documented in rapha_lab/protocol/schema.py."
    at = f" (at {path})" if path else ""
    return RequestError(f"The schema is malformed{at}: {what}.", "", instead, field=path or None)
