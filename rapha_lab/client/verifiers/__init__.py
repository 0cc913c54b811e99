"""One file a kind of TEE; each turns evidence into claims, or says which check failed.

A verifier reports facts and decides on authenticity alone; `client/appraisal.py` says what is good enough.
Roots are pinned by digest in the code; endorsements (certificates, lists, collateral) come from anywhere:
they are signed.
"""

from __future__ import annotations

from datetime import datetime
from typing import NoReturn, Protocol

from rapha_lab.protocol.errors import EvidenceError
from rapha_lab.protocol.evidence import Claims, Endorsements

__all__ = ["Endorsements", "Verify", "refuse"]


class Verify(Protocol):
    """What each file of this folder offers."""

    def __call__(self, payload: bytes, endorsements: Endorsements, now: datetime) -> Claims:
        """The claims of `payload`, or EvidenceError."""
        ...


def refuse(what: str, why: str, instead: str = "Do not connect; tell the site's custodians.") -> NoReturn:
    """Raise EvidenceError with the three sentences."""
    raise EvidenceError(what, why, instead)
