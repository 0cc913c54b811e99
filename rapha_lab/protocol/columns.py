"""What everybody may know of one column of the records, or of a table with many rows a patient."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rapha_lab.protocol.errors import RequestError

__all__ = [
    "MISSING",
    "PRESENT",
    "TIME",
    "Category",
    "Column",
    "Dtype",
    "Public",
    "Table",
    "Text",
    "Word",
    "check_column",
    "check_correlations",
    "check_source",
]

Dtype = Literal["float32", "int64"]
Word = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")]
Plain = Annotated[str, Meta(min_length=1, max_length=32, pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$")]
Text = Annotated[str, Meta(min_length=1, max_length=2000)]
Category = Annotated[str, Meta(min_length=1, max_length=200)]

MISSING = ".missing"
"""`name + MISSING` is a column too: 1 for a patient in whom `name` is not known, else 0."""

PRESENT, TIME = "present", "time"
"""`table.present` is 1 for a row and 0 for padding; `table.time` is the row's time before the patient's last."""

SHOWN = 12
"""Categories of a column that are shown to people."""

LONGEST = 64
"""Characters of the longest name that a request may hold."""


class Public(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Fields that everybody may read; an unknown one is an error, so that a typo cannot pass."""


class Column(Public, frozen=True):
    """One column, as publicly known.

    Attributes:
        name: what cells call it.
        type: number, integer, boolean, category, text or image.
        meaning: one sentence for a reader who knows medicine but not this table.
        public: why bounds or categories are public knowledge, and not read off the records.
        unit: of a number, as in "mg/dL".
        bounds: of a number, an integer or an image's pixels; a value outside is treated as the nearest bound.
        scale: how [-1, 1] is spread over the bounds; "log" for quantities spanning orders of magnitude.
        categories: of a category, in the order of their codes.
        missing: "possible" if a patient may lack it. Either way a program sees 0 where it lacks.
        tokens: of a text: how many words of it count, from its beginning.
        vocabulary: of a text: how many token ids there are; words are hashed to them.
        files: of a text: whether cells name text files instead of holding the text.
        shape: of an image, as in [1, 64, 64]: channels, rows, columns. Cells name .npy, .png or .dcm files.
        code: in a MEDS folder, the code of the events it speaks of; of a category, how their codes begin.
        correlates: earlier columns with which it goes together in made-up patients, and how closely (-1 to 1), as in
            [["age", 0.4]]; from the literature, never from the records.
    """

    name: Word
    type: Literal["number", "integer", "boolean", "category", "text", "image"]
    meaning: Text
    public: Text
    unit: str = ""
    bounds: tuple[float, float] | None = None
    scale: Literal["linear", "log"] = "linear"
    categories: tuple[Category, ...] = ()
    missing: Literal["never", "possible"] = "never"
    tokens: Annotated[int, Meta(ge=1, le=4096)] | None = None
    vocabulary: Annotated[int, Meta(ge=16, le=1 << 20)] | None = None
    files: bool = False
    code: Annotated[str, Meta(max_length=200)] = ""
    correlates: Annotated[tuple[tuple[str, float], ...], Meta(max_length=16)] = ()
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=4096)], ...], Meta(max_length=4)] = ()

    @property
    def numeric(self) -> bool:
        """Whether it is one number with bounds and a unit."""
        return self.type in ("number", "integer")

    @property
    def values(self) -> str:
        """The values it may have, for people."""
        if self.tokens:
            return f"{self.tokens} token ids below {self.vocabulary}"
        if self.shape:
            return " × ".join(map(str, self.shape)) + " pixels"
        if self.bounds:
            low, high = self.bounds
            return f"{low:g} to {high:g} {self.unit}".strip() + (" (log)" if self.scale == "log" else "")
        more = ", …" if len(self.categories) > SHOWN else ""
        return ", ".join(self.categories[:SHOWN]) + more or "yes or no"

    @property
    def width(self) -> int:
        """How many entries it fills in a list of columns.

        Raises:
            RequestError: for a text or an image, which stands alone.
        """
        if self.type in ("text", "image"):
            what, instead = f"The column {self.name} cannot be in a list.", f'Name it alone: "{self.name}".'
            raise RequestError(what, f"It is a {self.type}.", instead, field=self.name)
        return len(self.categories) if len(self.categories) > 2 else 1

    @property
    def alone(self) -> tuple[tuple[int, ...], Dtype]:
        """The shape and dtype of one value when it stands alone."""
        if self.type == "text":
            return (self.tokens or 1,), "int64"
        return self.shape, "int64" if self.type == "category" else "float32"

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest value a patient can contribute: the bounds, or 0 and 1 for a boolean.

        Raises:
            RequestError: for a category, a text or an image.
        """
        if self.type == "boolean":
            return 0.0, 1.0
        if self.bounds is None or not self.numeric:
            ask = f'Ask for patients.histogram("{self.name}").' if self.type == "category" else ""
            what = f"The column {self.name} has no bounds." if self.bounds is None else ""
            what = what or f"The column {self.name} is no number."
            raise RequestError(what, f"It is a {self.type}, which has no mean.", ask, field=self.name)
        return self.bounds


class Table(Public, frozen=True):
    """A table with many rows a patient, as publicly known.

    Attributes:
        name: what cells call it; `"name.column"` is one of its columns.
        meaning: one sentence on what a row is.
        patient: its column that identifies the patient; never an input.
        source: where its rows are, as for a `Schema`.
        most: how many rows of a patient count. Of one who has more, the latest; without a time, the last stored.
        columns: what can be asked about a row.
        time: its column that holds the time of a row, if there is one.
        span: days before a patient's last row that `"name.time"` tells apart; what is longer ago counts as that.
    """

    name: Plain
    meaning: Text
    patient: Word
    source: Text
    most: Annotated[int, Meta(ge=1, le=10_000)]
    columns: Annotated[tuple[Column, ...], Meta(min_length=1, max_length=1_000)]
    time: str = ""
    span: Annotated[float, Meta(ge=1, le=100_000)] = 3650.0

    def find(self, name: str) -> Column | None:
        """The column of that name, or the table's own `time`."""
        if name == TIME and self.time:
            meaning, public = "Days before the patient's last row.", "The table's span."
            bounds = (0.0, self.span)
            return Column(
                name=TIME, type="number", unit="days", bounds=bounds, meaning=meaning, public=public
            )
        return next((column for column in self.columns if column.name == name), None)

    def check(self) -> None:
        """Hold every rule that types alone cannot.

        Raises:
            RequestError: naming the table, the field and the way out.
        """
        check_source(self.source, f"{self.name}.source")
        seen = {self.patient, self.time, PRESENT, TIME}
        for column in self.columns:
            field = f"{self.name}.{column.name}"
            if column.name in seen or "." in column.name:
                why = "present, time and the names of patient and time are taken, and none holds a dot."
                what = f"The table {self.name} cannot have a column {column.name} there."
                raise RequestError(what, why, "Give every column its own name.", field=field)
            seen.add(column.name)
            check_column(column, f"{self.name}.")
        check_correlations(self.columns, f"{self.name}.")


def check_source(source: str, field: str) -> None:
    """Hold that a source is a relative path of a kind we read.

    Raises:
        RequestError: naming the field.
    """
    path = PurePosixPath(source)
    known = path.suffix in (".parquet", ".csv") or source.endswith("/") or path.parent.suffix == ".duckdb"
    if path.is_absolute() or ".." in path.parts or not known:
        what = "The source is no relative path of a kind that is read here."
        why = 'There are "records.parquet", "records.csv", "omop.duckdb/person" and "meds/", a MEDS folder.'
        raise RequestError(what, why, "Write one of them.", field=field)


def check_column(column: Column, prefix: str = "") -> None:
    """Hold every rule of a column that types alone cannot.

    Raises:
        RequestError: naming the column, the field and the way out.
    """
    name = f"{prefix}{column.name}"

    def fail(field: str, what: str, instead: str) -> RequestError:
        return RequestError(f"The column {name}: {what}", "", instead, field=f"{name}.{field}")

    if column.name.endswith(MISSING):
        raise fail("name", "its name ends in .missing.", "That ending is reserved; choose another name.")
    if len(name) + len(MISSING) > LONGEST:
        raise fail("name", f"its name is longer than {LONGEST - len(MISSING)} characters.", "Shorten it.")
    bounded = column.numeric or column.type == "image"
    if bounded and column.bounds is None:
        raise fail("bounds", "it has no bounds.", "Write bounds = [smallest, largest] from public knowledge.")
    if not bounded and (column.bounds is not None or column.scale == "log" or column.unit):
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
    for field, kind, example in (
        ("tokens", "text", "256"),
        ("vocabulary", "text", "8192"),
        ("shape", "image", "[1, 64, 64]"),
    ):
        if bool(getattr(column, field)) != (column.type == kind):
            what = f"a {column.type} has no {field}." if column.type != kind else f"it has no {field}."
            raise fail(field, what, f"Write {field} = {example}." if column.type == kind else "Leave it out.")
    if column.files and column.type != "text":
        raise fail("files", "only a text has files.", "Leave it out; an image always has.")
    if column.type == "image" and (column.scale == "log" or math.prod(column.shape) > 1 << 24):
        raise fail("shape", "an image has a linear scale and at most 2^24 pixels.", "Make it smaller.")
    if column.bounds is not None:
        _check_bounds(column, column.bounds, fail)


def check_correlations(columns: tuple[Column, ...], prefix: str = "") -> None:
    """Hold that columns correlate with earlier ones, and no more closely than is possible.

    Raises:
        RequestError: naming the column and the way out.
    """
    earlier: set[str] = set()
    for column in columns:
        field = f"{prefix}{column.name}.correlates"
        for name, _ in column.correlates:
            if name not in earlier or column.type in ("text", "image"):
                what = f"The column {prefix}{column.name} cannot correlate with {name[:64]}."
                why = "Numbers, booleans and categories correlate with such columns that stand before them."
                raise RequestError(what, why, "Change their order, or leave it out.", field=field)
        if not sum(much * much for _, much in column.correlates) <= 1:
            what = f"The column {prefix}{column.name} correlates too closely."
            raise RequestError(what, "The squares add up to more than 1.", "Write smaller ones.", field=field)
        earlier |= {column.name} if column.type not in ("text", "image") else set()


LARGEST = 1e100
"""Bounds lie within this on either side of 0, so that no square of what is told overflows."""


def _check_bounds(column: Column, bounds: tuple[float, float], fail: Callable[..., RequestError]) -> None:
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(high - low)):
        raise fail("bounds", "they are not finite.", "Write two ordinary numbers.")
    if max(abs(low), abs(high)) > LARGEST:
        raise fail("bounds", f"beyond {LARGEST:g} a variance overflows.", "Write bounds that make sense.")
    if low >= high:
        raise fail("bounds", f"{low:g} is not below {high:g}.", "Write the smallest first.")
    if column.scale == "log" and low <= 0:
        raise fail("bounds", f"a log scale cannot begin at {low:g}.", "Raise it above 0 or use a linear one.")
    if column.type == "integer" and not (low.is_integer() and high.is_integer() and high < 2**53):
        raise fail("bounds", "those of an integer are no integers.", "Write whole numbers.")
