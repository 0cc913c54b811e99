"""Mends a list of opt-outs that closed its dataset: `rapha-lab optout mend`. Nobody comes back in by it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from rapha_lab.curator.columns import identifiers
from rapha_lab.curator.optouts import Version, alone, fault, following, signed
from rapha_lab.curator.sources import Reader
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.schema import Schema

__all__ = ["kept", "mend", "strangers"]


def kept(ledger: str | Path) -> list[Version]:
    """The versions that the site with this ledger has taken, whatever became of the file; none if it never ran."""
    try:
        db = sqlite3.connect(f"{Path(ledger).resolve().as_uri()}?mode=ro", uri=True)
        with contextlib.closing(db):
            lines = db.execute("SELECT line FROM opt_out ORDER BY number").fetchall()
    except sqlite3.OperationalError:
        return []
    return [msgspec.json.decode(line, type=Version) for (line,) in lines]


def strangers(schema: Schema, folder: Path, people: Collection[str]) -> list[str]:
    """Those of the identifiers that the records do not hold now; for the custodian who typed them alone.

    Raises:
        RequestError, OSError: the records cannot be read.
    """
    found = Reader(folder).read(schema.source, schema.patient, ())
    known = set(identifiers(schema.patient, found[schema.patient]))
    return [person for person in people if person not in known]


def mend(path: Path, key: PrivateKey, custodians: Collection[str], taken: Iterable[Version]) -> list[str]:
    """Set aside what does not hold, and add anew whom it left out if a custodian had signed that; says what it did.

    Args:
        path: the list.
        key: the custodian's who mends it, and signs the new version.
        custodians: the public keys of the policy in force.
        taken: what the site has taken: it stays, whatever is in the file.
    """
    with alone(path):
        lines = path.read_bytes().splitlines() if path.exists() else []
        stay = {version.digest: version for version in taken}
        last = {version.dataset: version for version in stay.values()}
        told, aside, saved = list[str](), list[bytes](), dict[str, set[str]]()
        for number, line in enumerate(lines, 1):
            try:
                version = msgspec.json.decode(line, type=Version)
            except (msgspec.DecodeError, UnicodeDecodeError):
                told.append(f"Line {number} cannot be read: whomever it named has to be added again.")
                aside.append(line)
                continue
            if version.digest in stay:
                continue
            if not (why := fault(version, last.get(version.dataset), custodians)):
                stay[version.digest] = last[version.dataset] = version
                continue
            aside.append(line)
            ours = signed(version, custodians)
            then = "" if ours else " Whom it named is not left out by it."
            told.append(f"Line {number}, version {version.number} of {version.dataset}: {why}{then}")
            saved.setdefault(version.dataset, set()).update(version.added if ours else ())
        for dataset, marks in saved.items():
            if marks:
                made = following(last.get(dataset), dataset, key, sorted(marks), [])
                stay[made.digest] = made
                told.append(
                    f"Version {made.number} of {dataset} leaves out the {len(marks)} patient(s) of such lines "
                    "that a custodian had signed; whom they took back stays out until taken back again."
                )
        if aside:
            _write(Path(f"{path}.aside-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"), aside)
            _write(path, [msgspec.json.encode(version) for version in stay.values()])
    return told


def _write(path: Path, lines: list[bytes]) -> None:
    """Put the lines there, all of them or none."""
    part = Path(f"{path}.part")
    with part.open("wb") as file:
        file.write(b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
