"""Patients who opted out: lists of keyed hashes, each version signed by a custodian, applied before anything is asked.

A version adds or takes back patients of one dataset and names the one before it, so that none can be dropped or
put between. Once taken it is kept in the ledger's database: a line that vanishes from the file changes nothing.

When somebody opts out, and how many did, is nobody's business. So a receipt names the version in force by a keyed
hash that differs from job to job, and the log commits to the list once a day, whether or not it changed: only
the holder of the site's key can tell which version it was, and prove it to a regulator.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from rapha_lab.curator.cohort import Cohort, mark_of
from rapha_lab.curator.ledger import Ledger
from rapha_lab.protocol.errors import PolicyError, RequestError
from rapha_lab.protocol.keys import PrivateKey, PublicKey
from rapha_lab.protocol.policy import Policy

__all__ = ["OptOuts", "Version", "add", "alone", "fault", "following", "label", "signed", "versions"]

MEND = "A custodian mends it with rapha-lab optout mend."

Mark = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS opt_out (number INTEGER PRIMARY KEY, line BLOB NOT NULL UNIQUE) STRICT",
    "CREATE TABLE IF NOT EXISTS opt_out_day (dataset TEXT, day TEXT, PRIMARY KEY (dataset, day)) STRICT, WITHOUT ROWID",
)


class Version(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One version of a dataset's list: who was added and who taken back since the one before it."""

    dataset: str
    number: Annotated[int, Meta(ge=1)]
    before: str
    added: list[Mark]
    returned: list[Mark]
    key: str
    time: int
    signature: bytes = b""

    def signed_bytes(self) -> bytes:
        """What the signature is over."""
        return b"rapha-lab/opt-outs/v1\0" + msgspec.json.encode(msgspec.structs.replace(self, signature=b""))

    @property
    def digest(self) -> str:
        """What the next version names it by."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


def versions(path: str | Path) -> list[Version]:
    """The versions in a file, one JSON object a line, oldest first; none if there is no such file.

    Raises:
        RequestError: a line does not read.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
        return [msgspec.json.decode(line, type=Version) for line in lines]
    except FileNotFoundError:
        return []
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise RequestError(
            "The list of opt-outs cannot be read.", "A line of it is damaged.", MEND, field="opt-outs"
        ) from None


@contextlib.contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Only one process writes a list at a time: of two versions with one number, the second would close the dataset."""
    with Path(f"{path}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def add(
    path: str | Path,
    dataset: str,
    key: PrivateKey,
    salt: bytes,
    added: Iterable[str],
    returned: Iterable[str] = (),
    taken: Iterable[Version] = (),
) -> Version:
    """Append a version signed by `key`.

    Args:
        path: the file.
        dataset: of which dataset.
        key: a custodian's.
        salt: the site's secret, with which identifiers are hashed.
        added, returned: patients' identifiers.
        taken: what the site has taken already, which the file may have lost.
    """
    come, back = (sorted({mark_of(patient, salt) for patient in people}) for people in (added, returned))
    with alone(path):
        known = [v for v in (*versions(path), *taken) if v.dataset == dataset]
        version = following(max(known, key=lambda v: v.number, default=None), dataset, key, come, back)
        before = Path(path).read_bytes() if Path(path).exists() else b""
        with Path(path).open("ab") as file:
            # a last line whose end an editor took reads as a version: two in one line would be none
            file.write(b"\n" * (before[-1:] not in (b"", b"\n")) + msgspec.json.encode(version) + b"\n")
    return version


def following(
    last: Version | None, dataset: str, key: PrivateKey, come: list[str], back: list[str]
) -> Version:
    """The version after `last`, signed by `key`, that adds and takes back these marks."""
    number, before = (last.number + 1, last.digest) if last else (1, "")
    bare = Version(dataset, number, before, come, back, str(key.public), int(time.time()))
    return msgspec.structs.replace(bare, signature=key.sign(bare.signed_bytes()))


def fault(version: Version, last: Version | None, custodians: Collection[str]) -> str:
    """Why a version that comes after `last` does not hold; nothing if it does."""
    if (version.number, version.before) != ((last.number + 1, last.digest) if last else (1, "")):
        return "It does not follow the one before it."
    return "" if signed(version, custodians) else "No custodian signed it."


def signed(version: Version, custodians: Collection[str]) -> bool:
    """Whether one of these custodians' keys signed it."""
    return version.key in custodians and PublicKey.parse(version.key).verifies(
        version.signature, version.signed_bytes()
    )


def label(salt: bytes, dataset: str, number: int, of: str) -> str:
    """A version's name in one receipt, or in the log on one day: without the salt it tells nothing."""
    return hmac.digest(salt, f"rapha opt-outs\0{dataset}\0{number}\0{of}".encode(), hashlib.sha256)[:16].hex()


class OptOuts:
    """The lists in force.

    Args:
        path: the file in which custodians' versions come.
        ledger: keeps what was taken.
        policy: the policy in force, whose custodians may sign.
        salt: the site's secret.
    """

    def __init__(self, path: str | Path, ledger: Ledger, policy: Callable[[], Policy], salt: bytes) -> None:
        self._path, self._ledger, self._policy, self._salt = Path(path), ledger, policy, salt
        self._lock, self._seen = threading.Lock(), (-1, -1)
        self._last: dict[str, Version] = {}
        self._marks: dict[str, frozenset[str]] = {}
        self._taken = set[str]()
        self._days = set[tuple[str, str]]()
        with ledger.transaction() as db:
            for line in SCHEMA:
                db.execute(line)
            kept = db.execute("SELECT line FROM opt_out ORDER BY number").fetchall()
        for (line,) in kept:
            self._take(msgspec.json.decode(line, type=Version))

    def apply(self, cohort: Cohort) -> None:
        """Leave out of a cohort whoever opted out by now, and commit to the list in the log once a day.

        Raises:
            PolicyError, RequestError: a version does not hold; nothing may be asked until that is settled.
        """
        with self._lock:
            self._read()
            cohort.leave_out(self._marks.get(cohort.schema.name, frozenset()))
            self._commit(cohort.schema.name)

    def label(self, dataset: str, of: str) -> str:
        """The name of the version in force, for one receipt."""
        return label(self._salt, dataset, self._number(dataset), of)

    def _number(self, dataset: str) -> int:
        return self._last[dataset].number if dataset in self._last else 0

    def _read(self) -> None:
        """Take the versions that came since."""
        try:
            told = self._path.stat()
        except FileNotFoundError:
            return
        if self._seen == (seen := (told.st_mtime_ns, told.st_size)):
            return
        for version in versions(self._path):
            if version.digest in self._taken:
                continue
            self._check(version, self._last.get(version.dataset))
            with self._ledger.transaction() as db:
                db.execute("INSERT INTO opt_out VALUES (NULL, ?)", (msgspec.json.encode(version),))
            self._take(version)
        self._seen = seen

    def _check(self, version: Version, last: Version | None) -> None:
        if why := fault(version, last, {c.key for c in self._policy().custodians}):
            what = f"A version of the list of opt-outs of {version.dataset} does not hold."
            raise PolicyError(what, why, f"Until the custodians mend it nothing is answered. {MEND}")

    def _take(self, version: Version) -> None:
        marks = self._marks.get(version.dataset, frozenset())
        self._marks[version.dataset] = (marks | frozenset(version.added)) - frozenset(version.returned)
        self._last[version.dataset] = version
        self._taken.add(version.digest)

    def _commit(self, dataset: str) -> None:
        day = str(datetime.now(UTC).date())
        if self._committed(dataset, day):
            return
        with self._ledger.transaction() as db:
            db.execute("INSERT OR IGNORE INTO opt_out_day VALUES (?, ?)", (dataset, day))
            name = label(self._salt, dataset, self._number(dataset), day)
            self._ledger.log.append(db, "opt-outs", {"dataset": dataset, "day": day, "list": name})
        self._days.add((dataset, day))

    def _committed(self, dataset: str, day: str) -> bool:
        if (dataset, day) not in self._days:
            with self._ledger.reading() as db:
                rows = db.execute("SELECT dataset, day FROM opt_out_day").fetchall()
            self._days = set(rows)
        return (dataset, day) in self._days
