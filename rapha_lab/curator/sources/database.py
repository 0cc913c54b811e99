"""Tables and views of a DuckDB file, opened read-only and with no way to any other file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from rapha_lab.curator.sources.files import Seen, digest_of
from rapha_lab.protocol.errors import RequestError

__all__ = ["connect", "needs", "quoted", "read", "tables"]


def needs(package: str) -> RequestError:
    """What to say where an optional package is not installed."""
    return RequestError(
        f"The package {package} is not installed.",
        "The schema names a source that is read with it.",
        "Run: pip install 'rapha-lab[hospital]'",
        field="source",
    )


def connect(path: Path) -> Any:
    """A read-only connection that can reach no file but this one and load no extension.

    Raises:
        RequestError: if it is no DuckDB file, or another program is writing it.
        OSError: if there is no such file.
    """
    try:
        import duckdb
    except ImportError:
        raise needs("duckdb") from None
    with path.open("rb"):
        pass  # a missing file keeps its plain error
    locked: dict[str, Any] = {
        "enable_external_access": "false",
        "autoload_known_extensions": "false",
        "autoinstall_known_extensions": "false",
        "lock_configuration": "true",
    }
    try:
        return duckdb.connect(str(path), read_only=True, config=locked)
    except duckdb.Error:
        why = "It is no DuckDB file of a version that is known here, or another program has it open."
        what = f"The file {path.name} cannot be opened."
        raise RequestError(what, why, "Close it there, or copy it.", field="source") from None


def tables(path: Path) -> dict[str, dict[str, pl.DataType]]:
    """The file's tables and views, each with the names and types of its columns.

    Raises:
        RequestError: if it cannot be opened.
        OSError: if there is no such file.
    """
    connection = connect(path)
    try:
        names = connection.execute("SELECT table_name FROM information_schema.tables ORDER BY 1").fetchall()
        return {name: _types(connection, name) for (name,) in names}
    finally:
        connection.close()


def _types(connection: Any, table: str) -> dict[str, pl.DataType]:
    return dict(pl.DataFrame(connection.sql(f"SELECT * FROM {quoted(table)} LIMIT 0")).schema)  # noqa: S608


def read(path: Path, table: str, names: list[str], seen: Seen = digest_of) -> pl.DataFrame:
    """Those of the named columns that a table or view has; upper and lower case are one.

    Raises:
        RequestError: if it cannot be opened or has no such table.
        OSError: if there is no such file.
    """
    connection = connect(path)
    import duckdb

    try:
        seen(path)
        there = connection.execute(f"SELECT * FROM {quoted(table)} LIMIT 0").description  # noqa: S608
        known = {name.lower() for name, *_ in there}
        wanted = [f'"{name}" AS "{name}"' for name in names if name.lower() in known]
        return pl.DataFrame(connection.sql(f"SELECT {', '.join(wanted) or 1} FROM {quoted(table)}"))  # noqa: S608
    except duckdb.CatalogException:
        what = f"The file {path.name} has no table {table}."
        raise RequestError(what, instead="Correct the source.", field="source") from None
    except duckdb.Error:
        # its text may quote a value
        why = "It is damaged, or a view that needs another file or extension."
        raise RequestError(f"The table {table} of {path.name} cannot be read.", why, field="source") from None
    finally:
        connection.close()


def quoted(table: str) -> str:
    """A table's name, with or without its schema, as an identifier in SQL."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in table.split("."))
