"""The simulated TEE: checks its form and its public key's signature, and marks the claims as simulated."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from rapha_lab.client.verifiers import Endorsements, refuse
from rapha_lab.protocol.evidence import BANNER, SIMULATED, Claims, simulation_key

__all__ = ["verify"]


class _Said(msgspec.Struct, forbid_unknown_fields=True):
    banner: str
    measurement: str
    report_data: bytes
    issued_at: float
    extra: dict[str, Any]


def verify(payload: bytes, endorsements: Endorsements, now: datetime) -> Claims:
    """The claims of a simulated enclave: anybody can make them, so no appraisal takes them for real."""
    signature, text = payload[:64], payload[64:]
    if not simulation_key().public.verifies(signature, SIMULATED.encode() + b"\0" + text):
        refuse("The simulated evidence was altered.", "Its signature does not hold.")
    try:
        said = msgspec.json.decode(text, type=_Said)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        refuse("The simulated evidence is malformed.", str(error))
    if msgspec.json.encode(said) != text:  # a name given twice is read in two ways by two readers
        refuse("The simulated evidence is malformed.", "It is not in the one form it should have.")
    if said.banner != BANNER:
        refuse("The simulated evidence hides that it is simulated.", "Its banner was changed.")
    return Claims(
        tee="simulated",
        simulated=True,
        debug=True,
        measurements={"launch": said.measurement},
        report_data=said.report_data,
        revocation="none",
        root="the public simulation key",
        issued_at=said.issued_at,
        caveats=(BANNER,),
        extra=said.extra,
    )
