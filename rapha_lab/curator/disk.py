"""The disk under the ledger: one process holds a file, and what fails on it is one kind of error."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from rapha_lab.protocol.errors import SiteError

__all__ = ["hold", "readable", "unusable"]


def hold(path: Path) -> IO[bytes]:
    """An exclusive lock for this process; the kernel gives it back however the process ends.

    Raises:
        SiteError: if another process has it, or there is no place for it.
    """
    try:
        held = Path(f"{path}.lock").open("ab")  # noqa: SIM115
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise SiteError(
            "The ledger is open in another process.",
            "Two curators on one ledger could spend the same budget twice.",
            "Stop the other curator first.",
        ) from None
    except OSError as error:
        raise unusable(str(error)) from None
    return held


@contextmanager
def readable() -> Iterator[None]:
    """Turn what a failing disk or a damaged file makes of a statement into a SiteError."""
    try:
        yield
    except (sqlite3.Error, msgspec.DecodeError) as error:
        raise unusable(str(error)) from error


def unusable(why: str) -> SiteError:
    """The error of a ledger that cannot be used: nothing leaves without it."""
    return SiteError(
        "The ledger cannot be read or written, so nothing was released.",
        f"The system says: {why}.",
        "The site's operator has to look at its disk; what was reserved stays spent until then.",
    )
