"""Cohorts and aggregates as a cell writes them, in polars' words; each question becomes one request."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import msgspec

from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.expression import Call, Col, Expression, Lit, Over, check_rows, extended
from rapha_lab.protocol.messages import Split
from rapha_lab.protocol.release import Release
from rapha_lab.protocol.schema import Schema
from rapha_lab.session import expressions

__all__ = ["Ask", "Groups", "PerPatient", "Questions", "Table", "made", "positive"]

Ask = Callable[[messages.ASKS, bytes], tuple[dict[str, Any], bytes]]
Names = str | Sequence[str]

PIVOTED = ("mean", "min", "max", "sum", "first", "last", "std", "count")


class Questions:
    """Some patients of a dataset, sealed: which ones, with which further columns, and what can be asked of them.

    Args:
        schema: the dataset's public description.
        ask: sends a request with its tensors to the curator, gives the release and its tensors.
        epsilon: the cell's `--epsilon`, used once by a request that names none.
        released: told of each release as it is given.
        split: the patients meant.
    """

    def __init__(
        self,
        schema: Schema,
        ask: Ask,
        *,
        epsilon: float | None = None,
        released: Callable[[Release], None] = lambda release: None,
        split: Split = "all",
    ) -> None:
        self.schema = self._whole = schema
        self._ask, self._released, self._split = ask, released, split
        self._cell_epsilon: list[float] = [epsilon] if epsilon is not None else []
        self._derive: dict[str, Expression] = {}
        self._where: Expression | None = None

    def _copy(self) -> Self:
        """A handle on the same patients, to be changed."""
        raise NotImplementedError

    def _chosen(self, derive: Mapping[str, Expression], where: Expression | None) -> Self:
        """These patients with further columns, and of them those for whom `where` holds."""
        whole = extended(self._whole, derive, where)
        part = self._copy()
        seen = {column.name for column in self.schema.columns} | set(derive)
        part._whole = whole
        part.schema = msgspec.structs.replace(
            whole, columns=tuple(column for column in whole.columns if column.name in seen)
        )
        part._derive = {**self._derive, **derive}
        part._where = _both(self._where, where)
        return part

    # -- which patients, and with which columns --------------------------------------------------------

    def where(self, *conditions: Any) -> Self:
        """Those patients for whom polars expressions hold, as in patients.where(pl.col("age") > 60).

        Expressions are of one patient's own columns. The others contribute nothing to any answer; how many are
        left is as little public as how many there are.
        """
        if not conditions:
            raise RequestError(
                "where() of what?", instead='Say where(pl.col("age") > 60), say.', field="where"
            )
        found = self
        for condition in conditions:
            found = found._chosen({}, expressions.translate(condition))
        return found

    filter = where

    def with_columns(self, *columns: Any, **named: Any) -> Self:
        """The same patients with derived columns, as in with_columns(old=pl.col("age") > 80).

        A derived column's type, bounds and categories follow from the public ones; it can be asked about, an
        input of a model, or its target.
        """
        found = self
        for name, expression in expressions.named(columns, named).items():
            found = found._chosen({name: expressions.translate(expression)}, None)
        return found

    def select(self, *columns: Any, **named: Any) -> Self:
        """The same patients with these columns alone, by name or as polars expressions."""
        names = [name for name in columns if isinstance(name, str)]
        made = expressions.named(tuple(c for c in columns if not isinstance(c, str)), named)
        plain = [name for name, e in made.items() if expressions.translate(e) == Col(name)]
        found = self.with_columns(**{name: e for name, e in made.items() if name not in plain})
        kept = [found.schema.column(name) for name in [*names, *made]]
        part = found._copy()
        part.schema = msgspec.structs.replace(found.schema, columns=tuple(kept))
        return part

    def table(self, name: str) -> Table:
        """The rows of one of the dataset's tables with many rows a patient."""
        self.schema.table(name)
        return Table(self, name, None)

    def join(
        self,
        other: PerPatient | Table,
        on: Any = None,
        how: Literal["left", "inner", "semi", "anti"] = "left",
    ) -> Self:
        """Take in what a table says of each patient: patients.join(labs.group_by("patient").agg(...)).

        Args:
            other: columns aggregated by patient; or a table's rows, for how="semi" or "anti".
            on: always the patient, and need not be given.
            how: "left" keeps everybody, "inner" and "semi" those who have such rows, "anti" the others.
        """
        if not isinstance(other, PerPatient | Table) or (
            isinstance(other, Table) and how in ("left", "inner")
        ):
            what = "Patients are joined with one row a patient."
            instead = (
                'Aggregate first: patients.join(labs.group_by("patient").agg(hdl=pl.col("value").mean())).'
            )
            raise RequestError(what, "A table has many.", instead, field="other")
        if how not in ("left", "inner", "semi", "anti"):
            raise RequestError(f"how is {how!r:.20}.", "It is left, inner, semi or anti.", field="how")
        columns = other.columns if isinstance(other, PerPatient) and how in ("left", "inner") else {}
        found = self
        for name, expression in columns.items():
            found = found._chosen({name: expression}, None)
        rows = other.table if isinstance(other, PerPatient) else other
        there: Expression = Call("gt", [Over(rows.name, "len", None, rows.rows), Lit(0)])
        if how == "left":
            return found
        return found._chosen({}, there if how != "anti" else Call("not", [there]))

    def group_by(self, *columns: str) -> Groups:
        """Answers by the public values of up to three columns: patients.group_by("sex").mean("age", epsilon=0.1)."""
        for name in columns:
            self.schema.column(name)
        return Groups(self, list(columns))

    # -- questions --------------------------------------------------------------------------------------

    def count(self, *, epsilon: float | None = None, error: float | None = None) -> Release:
        """How many patients there are, with noise of ε; or say the standard error wished, and ε follows."""
        return self._answer(messages.Count, epsilon, error)

    def sum(self, column: str, *, epsilon: float | None = None, error: float | None = None) -> Release:
        """The sum of a numeric or boolean column; a patient in whom it is not known adds 0."""
        return self._answer(messages.Sum, epsilon, error, column=self._named(column))

    def mean(self, column: str, *, epsilon: float | None = None, error: float | None = None) -> Release:
        """The mean of a numeric or boolean column over the patients in whom it is known."""
        return self._answer(messages.Mean, epsilon, error, column=self._named(column))

    def var(self, column: str, *, epsilon: float | None = None, error: float | None = None) -> Release:
        """Mean, standard deviation and variance of a numeric column over the patients in whom it is known."""
        return self._answer(messages.Variance, epsilon, error, column=self._named(column))

    std = var

    def quantile(
        self,
        column: str,
        at: float | Sequence[float] = (0.25, 0.5, 0.75),
        *,
        bins: int = 64,
        epsilon: float | None = None,
        error: float | None = None,
    ) -> Release:
        """Quantiles of a numeric column, as many as one likes at one price: all come from one noisy histogram."""
        shares = [float(at)] if isinstance(at, (int, float)) else [float(q) for q in at]
        for share in shares:
            if not 0 < share < 1:
                raise RequestError(
                    f"at is {share:g}.", "Quantiles are between 0 and 1, both left out.",
                    "Say at=0.5 for the median, at=0.95 for the 95th percentile.", field="at",
                )  # fmt: skip
        positive("bins", bins, whole=True)
        return self._answer(
            messages.Quantiles, epsilon, error, column=self._named(column), at=shares, bins=bins
        )

    def median(self, column: str, *, epsilon: float | None = None, error: float | None = None) -> Release:
        """The median of a numeric column."""
        return self.quantile(column, 0.5, epsilon=epsilon, error=error)

    def histogram(
        self, column: str, *, bins: int = 20, epsilon: float | None = None, error: float | None = None
    ) -> Release:
        """Patients per bin of a number's public bounds, or per public category."""
        positive("bins", bins, whole=True)
        return self._answer(messages.Histogram, epsilon, error, column=self._named(column), bins=bins)

    def contingency(
        self, first: str, second: str, *, epsilon: float | None = None, error: float | None = None
    ) -> Release:
        """Patients by the values of two columns; each patient is in one cell."""
        return self.group_by(first, second).count(epsilon=epsilon, error=error)

    def corr(
        self, columns: Sequence[str], *, epsilon: float | None = None, error: float | None = None
    ) -> Release:
        """Pearson's correlation of each two of several numeric columns."""
        return self._answer(messages.Correlation, epsilon, error, columns=self._several(columns))

    def survival(
        self,
        time: str,
        event: str,
        *,
        by: str | None = None,
        bins: int = 40,
        epsilon: float | None = None,
        error: float | None = None,
    ) -> Release:
        """The share of patients without the event by time (Kaplan and Meier 1958), one curve for each value of `by`."""
        fields = {"time": self._named(time), "event": self._named(event), "bins": bins}
        return self._answer(messages.Survival, epsilon, error, by=[self._named(by)] if by else [], **fields)

    def missing(
        self, columns: Names | None = None, *, epsilon: float | None = None, error: float | None = None
    ) -> Release:
        """In how many patients each column is not known; those that can be missing if not given."""
        if columns is None:
            columns = [column.name for column in self.schema.columns if column.missing == "possible"]
            if not columns:
                raise RequestError(
                    "No column can be missing.", "The schema says so, free of charge.", field="columns"
                )
        return self._answer(messages.Missing, epsilon, error, columns=self._several(columns))

    def describe(
        self, columns: Names | None = None, *, epsilon: float | None = None, error: float | None = None
    ) -> Release:
        """Table 1 of a paper at once, at one joint price: means and deviations, shares of categories, what is missing."""
        if columns is None:
            plain = ("number", "integer", "boolean", "category")
            columns = [column.name for column in self.schema.columns if column.type in plain]
        return self._answer(messages.Describe, epsilon, error, columns=self._several(columns))

    # -- what they need ---------------------------------------------------------------------------------

    def _named(self, column: str) -> str:
        return self.schema.column(column).name

    def _several(self, columns: Names) -> list[str]:
        return [self._named(name) for name in ([columns] if isinstance(columns, str) else columns)]

    def _answer(
        self,
        kind: type[messages.Aggregate | messages.Discover],
        epsilon: float | None,
        error: float | None,
        **fields: Any,
    ) -> Release:
        if error is None:
            return self._release(made(kind, **fields, **self._common(epsilon)))
        if epsilon is not None:
            raise RequestError(
                "Both epsilon and error are given.", instead="Give one of them.", field="error"
            )
        ask = made(kind, **fields, **self._common(1.0))
        wished = positive("error", error)
        found = self._ask(made(messages.Price, ask=ask, error=wished), b"")[0]["epsilon"]
        print(f"A standard error of {wished:g} costs ε {found:g}.")
        return self._release(msgspec.structs.replace(ask, epsilon=found))

    def _common(self, epsilon: float | None) -> dict[str, Any]:
        if epsilon is None:
            if not self._cell_epsilon:
                raise RequestError(
                    "No ε was given.",
                    "Every look at patients has a price, and this cell's --epsilon is absent or already used.",
                    "Say epsilon=0.1, say, in the call.",
                    field="epsilon",
                )
            epsilon = self._cell_epsilon.pop()
        common = {"dataset": self.schema.name, "split": self._split, "epsilon": positive("epsilon", epsilon)}
        return common | {"derive": self._derive, "where": self._where}

    def _release(self, request: messages.ASKS, tensors: bytes = b"") -> Release:
        return self._given(self._ask(request, tensors)[0])

    def _given(self, wire: dict[str, Any]) -> Release:
        release = msgspec.convert(wire, Release)
        self._released(release)
        return release


class Groups:
    """Patients by the public values of some columns; one patient is in one group, so all groups cost one price."""

    def __init__(self, patients: Questions, by: list[str]) -> None:
        self._patients, self._by = patients, by

    def count(self, *, epsilon: float | None = None, error: float | None = None) -> Release:
        """How many patients are in each group."""
        return self._patients._answer(messages.Count, epsilon, error, by=self._by)

    len = count

    def sum(self, column: str, *, epsilon: float | None = None, error: float | None = None) -> Release:
        """The sum of a column in each group."""
        return self._of(messages.Sum, column, epsilon, error)

    def mean(self, column: str, *, epsilon: float | None = None, error: float | None = None) -> Release:
        """The mean of a column in each group."""
        return self._of(messages.Mean, column, epsilon, error)

    def var(self, column: str, *, epsilon: float | None = None, error: float | None = None) -> Release:
        """Mean, standard deviation and variance of a column in each group."""
        return self._of(messages.Variance, column, epsilon, error)

    std = var

    def _of(
        self, kind: type[messages.Aggregate], column: str, epsilon: float | None, error: float | None
    ) -> Release:
        name = self._patients._named(column)
        return self._patients._answer(kind, epsilon, error, column=name, by=self._by)


class Table:
    """A table's rows, many a patient: choose among them, aggregate them by patient, or ask about them at once.

    Attributes:
        name: of the table.
        rows: which rows are meant.
    """

    def __init__(self, patients: Questions, name: str, rows: Expression | None) -> None:
        self._patients, self.name, self.rows = patients, name, rows
        self._table = patients._whole.table(name)

    def where(self, *conditions: Any) -> Table:
        """Those rows for which polars expressions hold; names are the table's columns, its time, or the patients'."""
        rows = self.rows
        for condition in conditions:
            rows = _both(rows, expressions.translate(condition))
        check_rows(rows, self._table, self._patients._whole)
        return Table(self._patients, self.name, rows)

    filter = where

    def before(self, index: str, days: float | None = None) -> Table:
        """Rows before a patient's `index` date, a column in days since 1970; at most `days` before it."""
        return self._window(index, days, -1)

    def after(self, index: str, days: float | None = None) -> Table:
        """Rows at or after a patient's `index` date, a column in days since 1970; less than `days` after it."""
        return self._window(index, days, 1)

    def _window(self, index: str, days: float | None, side: int) -> Table:
        if not self._table.time:
            raise RequestError(
                f"The table {self.name} has no time.", "So nothing is before or after.", field="table"
            )
        self._patients._whole.column(index)
        time = Col(self._table.time)
        rows: Expression = Call("lt" if side < 0 else "ge", [time, Col(index)])
        if days is not None:
            edge = Call("add", [Col(index), Lit(side * positive("days", days))])
            rows = Call("and", [rows, Call("ge" if side < 0 else "lt", [time, edge])])
        rows = Call("and", [self.rows, rows]) if self.rows is not None else rows
        check_rows(rows, self._table, self._patients._whole)
        return Table(self._patients, self.name, rows)

    def group_by(self, *columns: Any) -> ByPatient | RowGroups:
        """By "patient", to aggregate each one's own rows; or by a column with public values, to ask about."""
        flat = [name for each in columns for name in (each if isinstance(each, (list, tuple)) else [each])]
        if len(flat) != 1:
            what, instead = (
                f"Rows are grouped by one column, not {len(flat)}.",
                'pivot("code", values="value"), say.',
            )
            raise RequestError(
                what, "For one value a patient and code, say pivot.", instead, field="group_by"
            )
        (column,) = flat
        if column in ("patient", self._table.patient, self._patients._whole.patient):
            return ByPatient(self)
        return RowGroups(self, column)

    def pivot(
        self,
        on: str,
        *,
        values: str,
        index: str = "patient",
        on_columns: Sequence[Any] | None = None,
        aggregate_function: str = "mean",
    ) -> PerPatient:
        """One column a patient for each value of `on`, such as a code: its rows' `values`, aggregated; to be joined.

        Args:
            on: a category; or any plain column, where `on_columns` lists values.
            values: the column that is aggregated.
            index: the patient: there is one value for each.
            on_columns: the values of `on` that become columns, named `on_value`; all of a category's if not given.
            aggregate_function: mean, min, max, sum, first, last, std or count.
        """
        column = self._table.find(on)
        wanted = list(on_columns or (column.categories if column is not None else ()))
        if column is None or not wanted:
            what = (
                f"{on} has no public list of values."
                if column
                else f"There is no column {on!r} in {self.name}."
            )
            raise RequestError(what, instead="Name a category, or list values: on_columns=[...].", field=on)
        if aggregate_function not in PIVOTED:
            what = f"{aggregate_function!r:.40} is no aggregation."
            raise RequestError(what, f"There are {', '.join(PIVOTED)}.", field="aggregate_function")
        if not isinstance(self.group_by(index), ByPatient):
            raise RequestError("A pivot is by patient.", instead='Say index="patient".', field="index")
        found: dict[str, Expression] = {}
        for value in wanted:
            name = re.sub(r"\W", "_", f"{on}_{value}")[:64]
            if name in found:
                what = f"Two values of {on} give a column {name}."
                raise RequestError(what, instead="Leave one out of on_columns.", field=on)
            is_it = _both(self.rows, Call("eq", [Col(on), Lit(value)]))
            fn: Any = aggregate_function
            found[name] = Over(self.name, fn, Col(values), is_it)
        extended(self._patients._whole, found)
        return PerPatient(self, found)

    def count(self, **options: Any) -> Release:
        """How many rows there are; give epsilon or error, and `cap`, the most rows of one patient that count."""
        return self._ask("count", **options)

    def patients(self, **options: Any) -> Release:
        """How many distinct patients have such a row."""
        return self._ask("patients", **options)

    def sum(self, column: str, **options: Any) -> Release:
        """The sum of a column over rows."""
        return self._ask("sum", column=column, **options)

    def mean(self, column: str, **options: Any) -> Release:
        """The mean of a column over rows, so that a patient with more of them weighs more."""
        return self._ask("mean", column=column, **options)

    def discover(
        self, column: str, *, keys: int = 1, delta: float | None = None, epsilon: float | None = None
    ) -> Release:
        """How many distinct patients have each key of a text column, such as a code, of those that enough of them have.

        Args:
            keys: for how many keys one patient counts at most; the noise grows with its root.
            delta: what it spends of the policy's `discovery_delta`; a tenth of it if not given.
        """
        delta = None if delta is None else positive("delta", delta)
        fields = {"table": self.name, "column": column, "rows": self.rows, "keys": keys, "delta": delta}
        return self._patients._answer(messages.Discover, epsilon, None, **fields)

    def _ask(
        self,
        of: str,
        *,
        column: str | None = None,
        by: str | None = None,
        cap: int | None = None,
        epsilon: float | None = None,
        error: float | None = None,
    ) -> Release:
        for name in filter(None, (column, by)):
            if self._table.find(name) is None or name == "time":
                known = ", ".join(each.name for each in self._table.columns)
                raise RequestError(
                    f"The table {self.name} has no column {name!r}.", f"It has {known}.", field=name
                )
        fields = {"table": self.name, "of": of, "column": column, "by": by, "rows": self.rows, "cap": cap}
        return self._patients._answer(messages.Rows, epsilon, error, **fields)

    def __repr__(self) -> str:
        return f"<rows of {self.name}: sealed; choose with where, reduce with group_by('patient').agg(...)>"


class RowGroups:
    """A table's rows by the public values of one of its columns."""

    def __init__(self, table: Table, by: str) -> None:
        self._table, self._by = table, by

    def count(self, **options: Any) -> Release:
        """How many rows are in each group."""
        return self._table._ask("count", by=self._by, **options)

    len = count

    def patients(self, **options: Any) -> Release:
        """How many distinct patients have a row in each group."""
        return self._table._ask("patients", by=self._by, **options)

    def sum(self, column: str, **options: Any) -> Release:
        """The sum of a column over the rows of each group."""
        return self._table._ask("sum", column=column, by=self._by, **options)

    def mean(self, column: str, **options: Any) -> Release:
        """The mean of a column over the rows of each group."""
        return self._table._ask("mean", column=column, by=self._by, **options)


class ByPatient:
    """A table's rows by patient, to be aggregated."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def agg(self, *columns: Any, **named: Any) -> PerPatient:
        """One value a patient for each polars aggregation: agg(hdl=pl.col("value").mean(), n=pl.len())."""
        found = {
            name: expressions.over(expression, self._table.name, self._table.rows)
            for name, expression in expressions.named(columns, named).items()
        }
        extended(self._table._patients._whole, found)
        return PerPatient(self._table, found)


class PerPatient:
    """Columns of one value a patient, to be joined to patients."""

    def __init__(self, table: Table, columns: dict[str, Expression]) -> None:
        self.table, self.columns = table, columns


def _both(first: Expression | None, second: Expression | None) -> Expression | None:
    if first is None or second is None:
        return second if first is None else first
    return Call("and", [first, second])


def positive(field: str, value: Any, *, whole: bool = False) -> Any:
    """The value as a finite number above 0.

    Raises:
        RequestError: naming the field, if it is none.
    """
    good = isinstance(value, int) if whole else isinstance(value, (int, float))
    if not good or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        kind = "a whole number above 0" if whole else "a finite number above 0"
        example = f"Say {field}={1 if whole else 0.5}, for instance."
        raise RequestError(f"{field} is {value!r}.", f"It must be {kind}.", example, field=field)
    return value if whole else float(value)


def made(kind: type[msgspec.Struct], **fields: Any) -> Any:
    """A request checked as the curator will check it, so that a slip costs no round trip."""
    return messages.decode(messages.encode(kind(**fields)))
