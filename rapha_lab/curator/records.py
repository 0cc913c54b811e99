"""Puts into the log which records a site serves, without telling anybody who does not hold them what they are.

The log is for everybody's eyes. Who knows all records but one could try values of the last against a plain hash; so
the log gets a commitment, the hash of a fresh random number and of the records' digest. It differs at every start,
so that not even a change of the records shows. The random number stays with the site's custodians, who open it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from rapha_lab.curator.ledger import Ledger

__all__ = ["commit", "commitment"]


def commitment(nonce: bytes, digest: bytes) -> str:
    """What the log holds of records with this digest."""
    return hashlib.sha256(b"rapha records\0" + nonce + digest).hexdigest()


def commit(ledger: Ledger, kept: Path, dataset: str, digest: bytes) -> None:
    """Log a commitment to a dataset's records, and keep for the custodians what opens it.

    Args:
        ledger: whose log it goes into.
        kept: a file for the site's own eyes, a line for each start.
        dataset: whose records they are.
        digest: `Cohort.digest`.
    """
    nonce = os.urandom(32)
    said = commitment(nonce, digest)
    number = ledger.record("records", dataset=dataset, commitment=said)
    line = {
        "dataset": dataset,
        "digest": digest.hex(),
        "nonce": nonce.hex(),
        "commitment": said,
        "entry": number,
    }
    with os.fdopen(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as file:
        file.write(msgspec.json.encode(line) + b"\n")
