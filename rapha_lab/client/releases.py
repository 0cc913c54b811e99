"""Checks what a notebook holds: that an output was signed by the site it names, and a receipt by its log."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from rapha_lab.client.home import home, read
from rapha_lab.protocol.checkpoint import Receipt, verify_receipt
from rapha_lab.protocol.errors import LogError, RequestError
from rapha_lab.protocol.keys import PublicKey
from rapha_lab.protocol.release import MIME, Release, canonical, output_statement, statement

__all__ = ["verify_output", "verify_release"]


def _keys(site: str) -> list[str]:
    """Keys under which this user has met a site of that name, as attested."""
    found = (read(path) for path in (home() / "sites").glob("*.json"))
    return [told["site_key"] for told in found if told.get("name") == site and "site_key" in told]


def verify_output(data: dict[str, Any], metadata: dict[str, Any]) -> tuple[bool, str]:
    """Whether an output's data is what the site in its metadata signed, and why not.

    Args:
        data: the output's MIME bundle.
        metadata: its metadata, whose "rapha" entry holds site, key, job, cell, index, digest and signature.
    """
    signed = metadata.get("rapha")
    if not isinstance(signed, dict):
        return False, "It carries no signature of a site."
    try:
        key = PublicKey.parse(str(signed["key"]))
        signature = base64.b64decode(str(signed["signature"]), validate=True)
        shown = hashlib.sha256(canonical(data := _joined(data))).hexdigest()
        told = output_statement(data, signed)
    except (KeyError, ValueError, TypeError, RequestError):
        return False, "Its signature is malformed."
    if shown != signed.get("digest"):
        return False, "It was changed after the site signed it."
    if not key.verifies(signature, told):
        return False, "The signature does not hold."
    if str(key) not in _keys(str(signed["site"])):
        return False, f"The key is not one with which {signed['site']} was attested to you."
    if MIME in data:
        return _verify_card(data[MIME], key)
    return True, f"Signed by {signed['site']}."


def _joined(data: dict[str, Any]) -> dict[str, Any]:
    """The bundle as it was signed: notebook files keep text as a list of lines."""
    return {
        kind: "".join(value) if isinstance(value, list) and not kind.endswith("json") else value
        for kind, value in data.items()
    }


def _verify_card(card: dict[str, Any], key: PublicKey) -> tuple[bool, str]:
    fields = {field.name for field in msgspec.structs.fields(Release)}
    try:
        release = msgspec.convert({k: v for k, v in card.items() if k in fields}, Release)
        verify_release(release, key)
    except (msgspec.ValidationError, LogError) as error:
        return False, str(error)
    return True, f"Signed by {release.site}; receipt {release.receipt.get('index')} is in its log."


def verify_release(release: Release, key: PublicKey) -> None:
    """Check that a release's receipt is an entry of the site's log, and of this very job and answer.

    Raises:
        LogError: saying what does not hold.
    """
    try:
        receipt = msgspec.convert(release.receipt, Receipt)
    except msgspec.ValidationError:
        raise LogError("The release carries no receipt.", "Its proof is missing or malformed.") from None
    if receipt.job != release.job:
        raise LogError("The receipt is of another job.", f"It is of {receipt.job}.")
    log_key = Ed25519PublicKey.from_public_bytes(key.raw)
    verify_receipt(receipt, log_key, statement(msgspec.structs.asdict(release)))
