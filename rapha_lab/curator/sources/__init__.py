"""Reads records where they are, by patient: Parquet, CSV, DuckDB, MEDS, and the images and notes that cells name.

A source is a relative path. Which kind it is shows in its spelling:

    ward.parquet             a file; also .csv
    omop.duckdb/person       a table or view of a DuckDB file
    omop.snapshot/person.parquet   a table of a snapshot of PostgreSQL, made by `rapha-lab data snapshot`
    nafld/                   a MEDS folder: events, of which columns name their `code`

Messages name files and columns and never hold a value, so nothing of a library's own error is passed on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from rapha_lab.curator.sources import attached, database, files, meds
from rapha_lab.protocol.columns import Column

__all__ = ["Reader"]


class Reader:
    """Reads a dataset's sources out of one folder and remembers what it read.

    Attributes:
        unreadable: by column, how many cells name an image or a note that cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._hash, self._files = hashlib.sha256(), dict[Path, bytes]()
        self.unreadable: dict[str, int] = {}

    def read(
        self, source: str, patient: str, columns: Sequence[Column], *, time: str = "", table: str = ""
    ) -> pl.DataFrame:
        """The rows of a source with the identifier, the time and these columns, as far as it has them.

        Args:
            source: as in a schema.
            patient: its column that identifies patients.
            columns: what is wanted of it; no more is read.
            time: its column with a row's time.
            table: the name of the table it is for; "" for the one with a row a patient.

        Raises:
            RequestError: if it is none of its kind, or a package to read it with is not installed.
            OSError: if it is not there.
        """
        path = self._folder / source
        names = list(
            dict.fromkeys([patient, *([time] if time else []), *(column.name for column in columns)])
        )
        if source.endswith("/"):
            frame = meds.read(path, columns, patient, time, per_patient=not table, seen=self._seen)
        elif path.parent.suffix == ".duckdb":
            frame = database.read(path.parent, path.name, names, self._seen)
        else:
            frame = files.read(path, names, self._seen)
        for column in columns:
            if column.name in frame.columns and attached.names_files(column, frame[column.name]):
                series, bad = attached.contents(self._folder, column, frame[column.name], self._seen)
                frame = frame.with_columns(series)
                self.unreadable[f"{table}.{column.name}" if table else column.name] = bad
        return frame

    def _seen(self, path: Path) -> bytes:
        """The hash of a file, taken once however many tables are in it."""
        if path not in self._files:
            self._files[path] = files.digest_of(path)
            self._hash.update(self._files[path])
        return self._files[path]

    @property
    def digest(self) -> bytes:
        """SHA-256 of all that was read so far, for the custodians: who guesses the records can confirm it by this."""
        return self._hash.digest()
