"""Takes a snapshot of a PostgreSQL database into Parquet files that never change, for a curator that opens no socket.

All tables are read in one transaction, so that they agree; of each only the columns that the schema names. The
files are hashed one by one and together. A new snapshot takes the old one's place at once or not at all, and
changes no account of the ledger: the patients are the same people.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import msgspec
import polars as pl

from rapha_lab.curator.sources.database import needs, quoted
from rapha_lab.curator.sources.files import MANIFEST, digest_of
from rapha_lab.protocol.errors import RequestError, SiteError
from rapha_lab.protocol.schema import Schema

__all__ = ["Snapshot", "column", "tables", "take"]


class Snapshot(msgspec.Struct, frozen=True):
    """What a snapshot is, for the custodians: who guesses the records could confirm it by the hash.

    Attributes:
        made: when, UTC.
        database: host and name, without a user or password.
        files: of each its table, columns, rows and SHA-256.
        hash: of all of them.
    """

    made: str
    database: str
    files: dict[str, dict[str, Any]]
    hash: str


def take(schema: Schema, database: str, folder: Path) -> Snapshot:
    """Read what the schema's sources in a `.snapshot` folder are, and put them there.

    Args:
        schema: with sources as in "omop.snapshot/person.parquet", of the table `person`; a table in a schema
            of the database is "omop.snapshot/cdm.person.parquet".
        database: "postgresql://user@host/name"; a password comes from PGPASSWORD or ~/.pgpass.
        folder: the data folder.

    Raises:
        RequestError: naming a table or column that is not there, or if the schema names no snapshot.
        SiteError: if the database cannot be reached, or goes away; the snapshot before stays as it was.
    """
    name, wanted = _wanted(schema)
    target = folder / name
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    part.mkdir(mode=0o700)
    try:
        with _connection(database) as cursor:
            files = {
                file: _fetch(cursor, table, patient, time, names, part / file)
                for file, (table, patient, time, names) in wanted.items()
            }
        where = urlsplit(database)
        told = Snapshot(
            datetime.now(UTC).isoformat(timespec="microseconds"),
            f"{where.hostname or 'this machine'}{where.path}",
            files,
            hashlib.sha256(msgspec.json.encode(files, order="sorted")).hexdigest(),
        )
        (part / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(told)))
        for path in part.iterdir():
            path.chmod(0o400)
        _exchange(part, target, told)
        return told
    finally:
        shutil.rmtree(part, ignore_errors=True)


def tables(database: str) -> dict[str, dict[str, str]]:
    """The tables and views that the database lets this user read, each with its columns' names and types.

    Raises:
        SiteError: if the database cannot be reached, or goes away.
    """
    found: dict[str, dict[str, str]] = {}
    with _connection(database) as cursor:
        cursor.execute(_READABLE)
        for schema, table, column, kind in cursor.fetchall():
            found.setdefault(table if schema == "public" else f"{schema}.{table}", {})[column] = kind
    return found


def column(database: str, table: str, name: str) -> pl.Series:
    """One column of a table, for a custodian to look at.

    Raises:
        SiteError: if the database cannot be reached, or goes away.
    """
    with _connection(database) as cursor:
        cursor.execute(f"SELECT {quoted(name)}::text AS value FROM {quoted(table)}")  # noqa: S608
        batches = list(_read(cursor.fetch_record_batch()))
    return (
        pl.concat([pl.DataFrame(batch)["value"] for batch in batches])
        if batches
        else pl.Series("value", [], pl.String)
    )


def _wanted(schema: Schema) -> tuple[str, dict[str, tuple[str, str, str, list[str]]]]:
    """The snapshot's name, and by file the table, its patient and time, and its columns."""
    sources = [(schema.source, schema.patient, "", schema.columns)]
    sources += [(table.source, table.patient, table.time, table.columns) for table in schema.tables]
    found: dict[str, tuple[str, str, str, list[str]]] = {}
    names = set()
    for source, patient, time, columns in sources:
        path = PurePosixPath(source)
        if path.parent.suffix == ".snapshot" and path.suffix == ".parquet":
            names.add(str(path.parent))
            before = found[path.name][3] if path.name in found else []
            every = dict.fromkeys([*before, patient, *([time] if time else []), *(c.name for c in columns)])
            found[path.name] = (path.stem, patient, time, list(every))
    if len(names) != 1:
        what = "The schema names no snapshot." if not names else "The schema names several snapshots."
        instead = 'Write source = "omop.snapshot/person.parquet" for the table person, and so on.'
        raise RequestError(what, "A snapshot is one folder.", instead, field="source")
    return names.pop(), found


@contextmanager
def _connection(database: str) -> Iterator[Any]:
    """A cursor in one read-only transaction that sees one state of the database."""
    try:
        from adbc_driver_postgresql import dbapi
    except ImportError:
        raise needs("adbc-driver-postgresql") from None
    try:
        connection = dbapi.connect(database)
    except dbapi.Error as error:
        # nothing was read yet: the driver's words are of the connection alone
        raise SiteError("The database cannot be reached.", str(error).splitlines()[0][:300]) from None
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield cursor
    except dbapi.Error:
        raise _gone() from None


_TYPES = """SELECT attname::text, typname::text FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped"""

_READABLE = """SELECT c.table_schema::text, c.table_name::text, c.column_name::text, c.udt_name::text
FROM information_schema.columns c WHERE c.table_schema NOT IN ('pg_catalog', 'information_schema')
AND has_table_privilege(format('%I.%I', c.table_schema, c.table_name), 'SELECT')
ORDER BY c.table_schema, c.table_name, c.ordinal_position"""

# what is not one of these, such as numeric, uuid or an enumeration, is read as text, which loses nothing
_PLAIN = frozenset(
    "bool int2 int4 int8 float4 float8 text varchar date timestamp timestamptz _float4 _float8".split()
)


def _fetch(cursor: Any, table: str, patient: str, time: str, names: list[str], path: Path) -> dict[str, Any]:
    """Write a table's columns to a file, in an order that is the same for the same rows."""
    from pyarrow.parquet import ParquetWriter

    cursor.execute(_TYPES, (quoted(table),))
    there = dict(cursor.fetchall())
    if not there:
        raise RequestError(f"The database has no table {table}.", field="source")
    if absent := [name for name in names if name not in there]:
        what = f"The table {table} has no column {absent[0]}."
        raise RequestError(what, "The schema names it.", "Rename one of the two.", field=absent[0])
    columns = [
        quoted(name) if there[name] in _PLAIN else f"{quoted(name)}::text AS {quoted(name)}" for name in names
    ]
    order = dict.fromkeys([patient, *([time] if time else []), *names])
    by = ", ".join(f"{quoted(table)}.{quoted(name)}" for name in order)
    cursor.execute(f"SELECT {', '.join(columns)} FROM {quoted(table)} ORDER BY {by}")  # noqa: S608
    batches = cursor.fetch_record_batch()
    rows = 0
    with ParquetWriter(path, batches.schema, compression="zstd") as writer:
        for batch in _read(batches):
            rows += batch.num_rows
            writer.write_batch(batch)
    return {"table": table, "columns": names, "rows": rows, "sha256": digest_of(path).hex()}


def _read(batches: Any) -> Iterator[Any]:
    from pyarrow import ArrowException

    while True:
        try:
            batch = batches.read_next_batch()
        except StopIteration:
            return
        except (ArrowException, OSError):
            raise _gone() from None
        yield batch


def _gone() -> SiteError:
    # the database's own words may quote a value
    why = "It went away, or reported an error; nothing was changed here, and the last snapshot stays."
    return SiteError("The database did not answer to the end.", why, "Take it again.")


def _exchange(part: Path, name: Path, told: Snapshot) -> None:
    """Let `name` point at the new files; whoever opens it finds the old ones or the new ones, never a mixture."""
    stamp = told.made[:26].replace(":", "-")
    final = name.with_name(f"{name.name}.{stamp}.{told.hash[:12]}")
    part.rename(final)
    final.chmod(0o500)
    link = name.with_name(f".{name.name}.link-{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(final.name, target_is_directory=True)
    if name.is_dir() and not name.is_symlink():
        link.unlink()
        what = f"{name.name} is a folder that no snapshot made."
        raise RequestError(what, "", "Move it away.", field="source")
    link.replace(name)
