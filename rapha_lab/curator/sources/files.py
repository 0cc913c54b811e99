"""Parquet and CSV files; one in a snapshot is checked against the hash that the snapshot was closed with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import polars as pl

from rapha_lab.protocol.errors import RequestError

__all__ = ["BROKEN", "MANIFEST", "Seen", "columns", "digest_of", "read"]

MANIFEST = "snapshot.json"

Seen = Callable[[Path], bytes]
"""Takes note of a file that is read, and gives its SHA-256."""

# polars quotes what it could not parse, and panics on some damaged files
BROKEN = (pl.exceptions.PolarsError, pl.exceptions.PanicException)


def columns(path: Path) -> dict[str, pl.DataType]:
    """The names and stored types of a file's columns; those of a CSV are all text.

    Raises:
        RequestError: if it is none of its kind.
    """
    try:
        if path.suffix == ".parquet":
            return dict(pl.read_parquet_schema(path))
        return dict(pl.read_csv(path, infer_schema=False, glob=False, n_rows=0).schema)
    except BROKEN:
        what = f"The file {path.name} cannot be read as {path.suffix[1:]}."
        raise RequestError(what, instead="Write it again.", field="source") from None


def digest_of(path: Path) -> bytes:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read(path: Path, names: list[str], seen: Seen = digest_of) -> pl.DataFrame:
    """Those of the named columns that a file has.

    Raises:
        RequestError: if it is none of its kind, or not what its snapshot holds.
        OSError: if there is no such file.
    """
    _check_snapshot(path, seen(path))
    there = columns(path)
    wanted = [name for name in names if name in there]
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path, glob=False, columns=wanted)
        return pl.read_csv(path, infer_schema=False, glob=False, columns=wanted)
    except BROKEN:
        what = f"The file {path.name} cannot be read as {path.suffix[1:]}."
        raise RequestError(what, instead="Write it again.", field="source") from None


def _check_snapshot(path: Path, digest: bytes) -> None:
    manifest = path.parent / MANIFEST
    if path.parent.suffix != ".snapshot" and not manifest.exists():
        return
    try:
        held = msgspec.json.decode(manifest.read_bytes())["files"][path.name]["sha256"]
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        held = ""
    if held != digest.hex():
        what = f"The file {path.name} is not what its snapshot was closed with."
        why = "It, or the snapshot's own list, was changed or cut short since."
        raise RequestError(what, why, "Take the snapshot again: rapha-lab data snapshot.", field="source")
