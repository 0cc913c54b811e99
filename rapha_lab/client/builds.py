"""Reads which build of the enclave a site runs, as its log tells everybody and the evidence binds it."""

from __future__ import annotations

import hashlib

from rapha_lab.protocol.builds import Build
from rapha_lab.protocol.checkpoint import Checkpoint, verify_included
from rapha_lab.protocol.errors import LogError, RequestError
from rapha_lab.protocol.evidence import Evidence
from rapha_lab.protocol.keys import signing_key

__all__ = ["logged_build"]


def logged_build(evidence: Evidence) -> tuple[Build, Checkpoint]:
    """The build that `evidence` proves to be in the site's log, and the log's head that the hardware signed for.

    The log is that of the binding's signing key and checkpoint, both of which the evidence covers.

    Raises:
        LogError: there is no such entry, or its proof does not hold.
    """
    proved, binding = evidence.build, evidence.binding
    if proved is None:
        raise LogError(
            "The site does not show its build in its log.",
            "An enclave that is in no log could be one that was made for you alone.",
            "Nothing was sent. Ask the site's custodians.",
        )
    if hashlib.sha256(proved.checkpoint.encode()).digest() != binding.checkpoint_hash:
        raise LogError("The log shown is not the one that the evidence is bound to.", "", "Connect again.")
    try:
        checkpoint = verify_included(proved, signing_key(binding.signing_key))
    except RequestError:
        raise LogError("The evidence binds no key of a log.", "", "Connect again.") from None
    return Build.logged(proved.entry), checkpoint
