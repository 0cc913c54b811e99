"""AWS Nitro Enclaves: a COSE_Sign1 document (RFC 9052, ES384) under AWS's root.

The leaf lives three hours, so the chain is judged at the document's own signed time; freshness is the nonce's
to show. See aws/aws-nitro-enclaves-nsm-api, docs/attestation_process.md.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import cbor2

from rapha_lab.client.verifiers import Endorsements, refuse
from rapha_lab.client.verifiers.certificates import chain, der, signed
from rapha_lab.protocol.evidence import Claims

__all__ = ["ROOTS", "verify"]

ROOTS = {"641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b": "aws.nitro-enclaves"}
_ES384 = b"\xa1\x01\x38\x22"
_SKEW = 300


def verify(payload: bytes, endorsements: Endorsements, now: datetime) -> Claims:
    """The claims of an attestation document.

    Raises:
        EvidenceError: naming what does not hold.
    """
    protected, body, signature, document = _parse(payload)
    at = datetime.fromtimestamp(document["timestamp"] / 1000, UTC)
    if (at - now).total_seconds() > _SKEW:
        refuse(
            "The Nitro document is from the future.", f"It is dated {at:%Y-%m-%d %H:%M}.", "Set your clock."
        )
    certificates = [der(c) for c in (document["certificate"], *reversed(document["cabundle"]))]
    root = chain(certificates, ROOTS, at)
    if not signed(certificates[0], signature, cbor2.dumps(["Signature1", protected, b"", body])):
        refuse("The Nitro document was altered.", "Its signature does not hold.")
    pcrs = document["pcrs"]
    return Claims(
        tee="nitro",
        measurements={
            "launch": f"sha384:{pcrs[0].hex()}",
            **{f"pcr{i}": f"sha384:{v.hex()}" for i, v in pcrs.items()},
        },
        report_data=document["user_data"] or b"",
        debug=not any(pcrs[0] + pcrs[1] + pcrs[2]),
        revocation="none",
        root=root,
        hardware=document["module_id"],
        issued_at=at.timestamp(),
    )


def _parse(payload: bytes) -> tuple[bytes, bytes, bytes, dict[str, Any]]:
    """The parts of a COSE_Sign1; one byte that does not count would be one that can be changed."""
    try:
        outer = cbor2.loads(payload)
        outer = outer.value if isinstance(outer, cbor2.CBORTag) and outer.tag == 18 else outer
        protected, unprotected, body, signature = outer
        document = cbor2.loads(body)
        exact = payload.removeprefix(b"\xd2") == cbor2.dumps([protected, {}, body, signature])
        if not exact or protected != _ES384 or unprotected or document["digest"] != "SHA384":
            raise ValueError("not a COSE_Sign1 with ES384 and nothing else")
        for field, kind in _FIELDS.items():
            if not isinstance(document[field], kind):
                raise ValueError(f"{field} is of the wrong type")
        if not all(isinstance(document["pcrs"][i], bytes) for i in (0, 1, 2)):
            raise ValueError("a PCR is missing")
    except (ValueError, TypeError, KeyError, cbor2.CBORError, RecursionError, OverflowError) as error:
        refuse("The Nitro document is malformed.", str(error)[:100])
    return protected, body, signature, document


_FIELDS: dict[str, Any] = {
    "module_id": str,
    "timestamp": int,
    "pcrs": dict,
    "certificate": bytes,
    "cabundle": list,
    "user_data": bytes | None,
}
