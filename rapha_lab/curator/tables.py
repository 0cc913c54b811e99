"""A table with many rows a patient: the rows that count, by patient, and their padded tensors."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rapha_lab.curator.columns import Findings, Records, Values, bounded, identifiers, own, present, taken
from rapha_lab.protocol.columns import TIME, Table
from rapha_lab.protocol.errors import RequestError

__all__ = ["PATIENT", "Rows"]

PATIENT = "__patient"
"""The column of a view's table that holds the patient's position in the view."""

DAY = 86_400_000_000


class Rows:
    """A table's rows in order of patient and time, at most `most` of each, chosen among that patient's own alone.

    Args:
        table: what is public about them.
        frame: the rows, in any order, with the table's columns; or what reads them.
        patients: identifiers of the cohort's patients, as text.
        opt_outs: identifiers of those who are left out before anything else.

    Raises:
        RequestError: for the custodian alone, naming the column that does not fit its description.
    """

    def __init__(
        self, table: Table, frame: Records, patients: pl.Series, opt_outs: Collection[str] = ()
    ) -> None:
        self.table = table
        where, frame = f"The table {table.name} has", own(frame)
        names = identifiers(f"{table.name}.{table.patient}", present(frame, table.patient, where))
        kept = ~names.is_in(list(opt_outs))
        names, frame = names.filter(kept), frame.filter(kept)
        known = pl.DataFrame({"id": patients, "place": pl.int_range(len(patients), eager=True)})
        place = names.alias("id").to_frame().join(known, on="id", how="left", maintain_order="left")["place"]
        times = _times(table, present(frame, table.time, where)) if table.time else None
        order = pl.DataFrame({"row": pl.int_range(len(frame), eager=True), "place": place})
        order = order.with_columns(time=times if times is not None else pl.lit(0))
        order = order.filter(pl.col("place").is_not_null())
        strangers = len(frame) - len(order)
        order = order.sort("place", "time", nulls_last=False, maintain_order=True)
        places = order["place"].to_numpy()
        ends = np.bincount(places, minlength=len(patients)).cumsum()
        late = ends[places] - 1 - np.arange(len(order)) < table.most
        order = order.filter(late)
        self._counts = torch.tensor(np.bincount(places[late], minlength=len(patients)))
        self._starts = self._counts.cumsum(0) - self._counts
        self.times = None if times is None else times.gather(order["row"])
        self._columns: dict[str, Values] = {}
        self.findings = {table.name: Findings(beyond=int((~late).sum()), strangers=strangers)}
        for column in table.columns:
            name = f"{table.name}.{column.name}"
            series = present(frame, column.name, where).gather(order["row"])
            self._columns[column.name], self.findings[name] = bounded(column, series, name)
            frame.drop_in_place(column.name)
        if self.times is not None:
            self._columns[TIME] = self._before(order["place"])

    def _before(self, place: pl.Series) -> Values:
        """Days before the patient's last row, within the table's span."""
        assert self.times is not None
        when = pl.DataFrame({"place": place, "time": self.times})
        days = when.select((pl.col("time").max().over("place") - pl.col("time")) / DAY).to_series()
        column = self.table.find(TIME)
        assert column is not None
        return bounded(column, days)[0]

    def of(self, patients: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of these patients, one patient after the other, and whose each is by position in `patients`."""
        counts, starts = (taken(each, patients).numpy() for each in (self._counts, self._starts))
        owner = np.arange(len(patients)).repeat(counts)
        first = (starts - (counts.cumsum() - counts)).repeat(counts)
        return torch.from_numpy(first + np.arange(len(owner))), torch.from_numpy(owner)

    def frame(self, patients: Tensor) -> pl.DataFrame:
        """The rows of these patients with their positions, times and columns, null where not known."""
        rows, owner = self.of(patients)
        series = [pl.Series(PATIENT, owner.numpy(), dtype=pl.UInt32)]
        if self.times is not None:
            series.append(self.times.gather(rows.numpy()).cast(pl.Datetime("us")).alias(self.table.time))
        columns = (column.name for column in self.table.columns)
        return pl.DataFrame(series + [self._columns[name].of(rows).series() for name in columns])

    def values(self, column: str, rows: Tensor) -> Values:
        """A column's values, or the `time`, in some rows."""
        return self._columns[column].of(rows)

    def padded(self, encoded: Tensor, owner: Tensor, patients: Tensor) -> Tensor:
        """(rows, *shape) as (patients, most, *shape): each patient's last row last, zeros before."""
        most, shape = self.table.most, encoded.shape[1:]
        counts = self._counts[patients]
        within = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
        places = owner * most + most - counts[owner] + within
        padded = encoded.new_zeros(len(patients) * most, *shape)
        padded[places] = encoded
        return padded.view(len(patients), most, *shape)


def _times(table: Table, series: pl.Series) -> pl.Series:
    """Times in microseconds since 1970, UTC where a zone is given; null where there is none.

    Raises:
        RequestError: if they are no times, or some have a zone and others none.
    """
    name = f"{table.name}.{table.time}"

    def fail(why: str, instead: str) -> RequestError:
        return RequestError(f"The column {name} does not hold times.", why, instead, field=name)

    if series.dtype in (pl.String, pl.Categorical, pl.Enum):
        series = series.cast(pl.String).str.strip_chars()
        zoned = series.str.contains(r"\d(Z|[+-]\d\d:?\d\d)$")
        if zoned.any() and not zoned.all():
            raise fail("Some have a time zone and others none.", "Write all of them with one, or none.")
        parsed = _zoned_times(series) if zoned.any() else _plain_times(series)
        if parsed.null_count() > series.null_count():
            raise fail(
                "Some are written in no usual way.", "Write them as 2026-01-31 or 2026-01-31 12:00:00."
            )
        series = parsed
    if series.dtype == pl.Null:
        return series.cast(pl.Int64)
    if not isinstance(series.dtype, pl.Datetime) and series.dtype != pl.Date:
        raise fail(f"It holds {series.dtype}.", "Store dates or times.")
    return series.cast(pl.Datetime("us", getattr(series.dtype, "time_zone", None))).dt.epoch("us")


def _zoned_times(series: pl.Series) -> pl.Series:
    return series.str.to_datetime(time_unit="us", time_zone="UTC", strict=False)


def _plain_times(series: pl.Series) -> pl.Series:
    """Dates and times without a zone, in ISO 8601's usual forms; null for any other."""
    forms = ("%Y-%m-%d", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S%.f")
    tried = [
        series.str.to_datetime(form, time_unit="us", strict=False)
        if "%H" in form
        else series.str.to_date(form, strict=False).cast(pl.Datetime("us"))
        for form in forms
    ]
    return pl.select(pl.coalesce(tried)).to_series()
