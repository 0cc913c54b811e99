"""AMD SEV-SNP: a report (SEV-SNP ABI 56860, attestation) signed by the chip's VCEK or the cloud's VLEK.

The certificate must say the same chip and the same firmware as the report (KDS specification 57230), and lead
by ASK or ASVK to AMD's root for Milan, Genoa or Turin. A revocation list, if given, must be that root's and
current; the appraisal demands one. AMD does not say which firmware is current: the appraisal's minimum does.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from cryptography import x509

from rapha_lab.client.verifiers import Endorsements, refuse
from rapha_lab.client.verifiers.certificates import chain, der, pem, signed
from rapha_lab.protocol.evidence import Claims

__all__ = ["ROOTS", "verify"]

# SHA-256 of AMD's self-signed root certificates (ARK), as published by its key distribution service
ROOTS = {
    "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd": "ARK-Milan",
    "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1": "ARK-Genoa",
    "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a": "ARK-Turin",
}
_SIZE, _SIGNED = 0x4A0, 0x2A0
_DEBUG, _MIGRATION = 1 << 19, 1 << 18
_OID = "1.3.6.1.4.1.3704.1."
_SVN = {"bootloader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8", "fmc": "3.9"}
_OLD = {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7}
_TURIN = {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7}


def verify(payload: bytes, endorsements: Endorsements, now: datetime) -> Claims:
    """The claims of an attestation report of 1,184 bytes.

    Raises:
        EvidenceError: naming what does not hold.
    """
    if len(payload) != _SIZE or int.from_bytes(payload[:4], "little") not in (2, 3, 4, 5):
        refuse("The SEV-SNP report is malformed.", "It is not 1,184 bytes of version 2 to 5.")
    if not endorsements.leaf:
        refuse(
            "The SEV-SNP report has no certificate.",
            "The VCEK or VLEK is missing.",
            "Give it as endorsement.",
        )
    leaf, issuers = der(endorsements.leaf), pem(endorsements.chain)
    if len(issuers) != 2:
        refuse("The certificates are not AMD's chain.", "It is the ASK or ASVK, then the ARK.")
    root = chain([leaf, *issuers], ROOTS, now)
    _signature(payload, leaf)
    tcb = _same_firmware(payload, leaf, _TURIN if root == "ARK-Turin" else _OLD)
    _same_chip(payload, leaf)
    policy = int.from_bytes(payload[8:16], "little")
    return Claims(
        tee="sev-snp",
        measurements={
            "launch": f"sha384:{payload[0x90:0xC0].hex()}",
            "host data": f"sha256:{payload[0xC0:0xE0].hex()}",
        },
        report_data=payload[0x50:0x90],
        debug=bool(policy & _DEBUG),
        tcb=tcb,
        tcb_status="not stated",
        revocation=_revocation(endorsements.crls, [leaf, issuers[0]], issuers[1], now),
        root=root,
        hardware=payload[0x1A0:0x1E0].hex(),
        exposed=("Its policy lets a migration agent of the host's choice move it, and read it.",)
        if policy & _MIGRATION
        else (),
        extra={"vmpl": int.from_bytes(payload[0x30:0x34], "little"), "policy": policy},
    )


def _signature(report: bytes, leaf: x509.Certificate) -> None:
    """r and s are little-endian in 72 bytes each; the rest is reserved and zero, so that every bit counts."""
    r, s, rest = report[_SIGNED : _SIGNED + 72], report[_SIGNED + 72 : _SIGNED + 144], report[_SIGNED + 144 :]
    big = r[:48][::-1] + s[:48][::-1]
    if (
        any(r[48:] + s[48:] + rest)
        or report[0x34:0x38] != b"\1\0\0\0"
        or not signed(leaf, big, report[:_SIGNED])
    ):
        refuse("The SEV-SNP report was altered.", "The chip's signature does not hold.")
    if int.from_bytes(report[0x30:0x34], "little") > 3:
        refuse("The SEV-SNP report is not the guest's.", "The host asked for it.")


def _same_firmware(report: bytes, leaf: x509.Certificate, layout: dict[str, int]) -> dict[str, int]:
    tcb = {part: report[0x180 + at] for part, at in layout.items()}
    if {part: _number(leaf, _SVN[part]) for part in layout} != tcb:
        refuse(
            "The certificate is not of this firmware.", "Its TCB is not the one the report was signed under."
        )
    return tcb


def _same_chip(report: bytes, leaf: x509.Certificate) -> None:
    """A VCEK names the chip, a VLEK the cloud; bits 2 to 4 of the report's key field say which one signed."""
    kind = int.from_bytes(report[0x48:0x4C], "little") >> 2 & 7
    chip = _extension(leaf, "4")
    if kind == 1 and chip is None and _extension(leaf, "5") is not None:
        return
    if kind != 0 or chip is None or report[0x1A0:0x1E0] != chip.ljust(64, b"\0") or not any(chip):
        refuse("The certificate is not of this chip.", "The report names another, or hides it.")


def _revocation(
    crls: Iterable[bytes], certificates: list[x509.Certificate], root: x509.Certificate, now: datetime
) -> str:
    checked = "absent"
    for data in crls:
        try:
            crl = x509.load_der_x509_crl(data)
            genuine = crl.issuer == root.subject and crl.is_signature_valid(root.public_key())  # type: ignore[arg-type]
        except (ValueError, TypeError):
            genuine = False
        if not genuine:
            refuse("The revocation list is not AMD's.", "Its signature does not hold.")
        if crl.last_update_utc > now:
            refuse(
                "The revocation list is from the future.",
                f"It is dated {crl.last_update_utc:%Y-%m-%d %H:%M}.",
            )
        if crl.next_update_utc is None:
            refuse("The revocation list is malformed.", "It does not say when it is due for renewal.")
        if now > crl.next_update_utc:
            refuse(
                "The revocation list has expired.",
                f"It was due for renewal on {crl.next_update_utc:%Y-%m-%d}.",
            )
        if any(crl.get_revoked_certificate_by_serial_number(c.serial_number) for c in certificates):
            refuse("A certificate of the evidence is revoked.", "AMD took it back.")
        checked = "checked"
    return checked


def _extension(leaf: x509.Certificate, oid: str) -> bytes | None:
    for extension in leaf.extensions:
        if extension.oid.dotted_string == _OID + oid:
            return extension.value.public_bytes()
    return None


def _number(leaf: x509.Certificate, oid: str) -> int | None:
    """A DER integer of one byte (two when above 127)."""
    value = _extension(leaf, oid)
    if value is None or value[0] != 2 or len(value) != 2 + value[1] or value[1] not in (1, 2):
        return None
    return int.from_bytes(value[2:], "big")
