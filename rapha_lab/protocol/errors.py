"""Every error a user can meet, each saying what happened, why, and what to do next.

    RaphaError
    ├── SealedError        somebody asked for a patient's value; nothing was sent and nothing spent
    ├── RequestError       a field of a request is malformed, unknown or out of range
    │   └── ProgramError   a model or loss the curator's table cannot lift to patients
    ├── RefusedError       well-formed, but this site does not answer it
    │   ├── PolicyError    the custodians' policy says no
    │   ├── BudgetError    it would overdraw the privacy budget
    │   └── WaitingError   a custodian has not decided on it yet
    ├── TrustError         evidence, a signature, a seal or the log does not hold
    │   ├── EvidenceError
    │   ├── SealError
    │   └── LogError
    ├── SiteError          the site cannot be reached, is busy, or lost the session
    └── CellError          the cell's own code raised

The three sentences are the three lines of the blocked card. None may hold anything read from a record.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

__all__ = [
    "BudgetError",
    "CellError",
    "EvidenceError",
    "LogError",
    "PolicyError",
    "ProgramError",
    "RaphaError",
    "RefusedError",
    "RequestError",
    "SealError",
    "SealedError",
    "SiteError",
    "TrustError",
    "WaitingError",
    "from_wire",
]

_PACKAGE = str(Path(__file__).parents[1])


class RaphaError(Exception):
    """Something could not be done; `what` happened, `why`, and what to do `instead`.

    Args:
        what: one sentence, what happened.
        why: one sentence, the reason.
        instead: what to do next; a line of code where one helps.
        field: the name of the field or argument at fault.
        line: the line of the cell that asked, counted from 1.
        suggestion: code to ask with instead, if a line of it says it best.
    """

    def __init__(
        self,
        what: str,
        why: str = "",
        instead: str = "",
        *,
        field: str | None = None,
        line: int | None = None,
        suggestion: str | None = None,
    ) -> None:
        super().__init__(what, why, instead)
        self.what, self.why, self.instead = what, why, instead
        self.field, self.line, self.suggestion = field, line, suggestion

    def __str__(self) -> str:
        return " ".join(part for part in (self.what, self.why, self.instead) if part)

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the caller's own lines and the three sentences, no frame of this package."""
        frames = traceback.extract_tb(self.__traceback__)
        own = [
            frame
            for frame in frames
            if not frame.filename.startswith(_PACKAGE) and "IPython" not in frame.filename
        ]
        return [*traceback.format_list(own), f"{type(self).__name__}: {self}"]

    def to_wire(self) -> dict[str, Any]:
        """The error as plain fields, for a reply."""
        fields = {
            key: getattr(self, key) for key in ("what", "why", "instead", "field", "line", "suggestion")
        }
        kind = next(kind.__name__ for kind in type(self).__mro__ if kind.__name__ in _KINDS)
        return {"kind": kind, **fields}


class SealedError(RaphaError):
    """A patient's value was asked for where only computations on it exist."""


class RequestError(RaphaError):
    """A field is malformed, unknown or out of range."""


class ProgramError(RequestError):
    """A model or loss cannot be computed one patient at a time from the allowed operations."""


class RefusedError(RaphaError):
    """The request is well-formed, but this site does not answer it."""


class PolicyError(RefusedError):
    """The custodians' signed policy does not allow it."""


class BudgetError(RefusedError):
    """The answer would cost more privacy budget than is left."""


class WaitingError(RefusedError):
    """It is in the airlock: custodians have to decide on it first. `field` is what they know it by."""


class TrustError(RaphaError):
    """A check of evidence, signature, seal or log failed."""


class EvidenceError(TrustError):
    """The attestation evidence does not show the enclave that was expected."""


class SealError(TrustError):
    """A sealed message could not be opened: altered, truncated, replayed or meant for another key."""


class LogError(TrustError):
    """The transparency log does not extend what was seen of it before."""


class SiteError(RaphaError):
    """The site cannot be reached, is busy, or lost the session."""


class CellError(RaphaError):
    """The cell's own code raised; its traceback is with it."""

    def __init__(
        self, what: str, why: str = "", instead: str = "", *, traceback: list[str] | None = None, **kw: Any
    ):
        super().__init__(what, why, instead, **kw)
        self.traceback = traceback or []

    def _render_traceback_(self) -> list[str]:
        return self.traceback or [str(self)]


_KINDS = {name: globals()[name] for name in __all__ if name != "from_wire"}


def from_wire(fields: dict[str, Any]) -> RaphaError:
    """The error that `to_wire` described; an unknown kind becomes a plain RaphaError."""
    kind = _KINDS.get(str(fields.get("kind")), RaphaError)
    texts = [str(fields.get(key) or "") for key in ("what", "why", "instead")]
    line, suggestion = fields.get("line"), fields.get("suggestion")
    return kind(
        *texts,
        field=fields.get("field"),
        line=line if isinstance(line, int) else None,
        suggestion=suggestion if isinstance(suggestion, str) else None,
    )
