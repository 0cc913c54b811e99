"""Intel TDX and SGX quotes, judged by dcap-qvl with Intel's collateral and nothing from the network.

dcap-qvl checks what carries trust; here, on top, every byte is made to count: the chains in the quote and in
the collateral must lead, in one spelling, to Intel's one root, and nothing may hide in types, lengths or
padding.
"""

from __future__ import annotations

import hashlib
import json
import struct
from datetime import datetime
from typing import Any

import dcap_qvl
import msgspec

from rapha_lab.client.verifiers import Endorsements, refuse
from rapha_lab.client.verifiers.certificates import chain, pem
from rapha_lab.protocol.evidence import Claims

__all__ = ["ROOTS", "verify"]

ROOTS = {"44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3": "Intel SGX Root CA"}

_SEPT_VE_DISABLE, _MIGRATABLE = 1 << 28, 1 << 29
_HARMLESS = (
    1 << 27 | 1 << 30 | 1 << 31
)  # LASS, protection keys, key locker: the guest's own use of the processor


class _Collateral(msgspec.Struct, forbid_unknown_fields=True):
    pck_crl_issuer_chain: str
    root_ca_crl: str
    pck_crl: str
    tcb_info_issuer_chain: str
    tcb_info: str
    tcb_info_signature: str
    qe_identity_issuer_chain: str
    qe_identity: str
    qe_identity_signature: str


def verify(payload: bytes, endorsements: Endorsements, now: datetime) -> Claims:
    """The claims of a TDX or SGX quote, judged with the collateral of `endorsements` at `now`.

    Raises:
        EvidenceError: naming what does not hold, such as collateral that has expired.
    """
    collateral = _collateral(endorsements.collateral, now)
    chain(pem(_framed(payload)), ROOTS, now)
    seconds = int(now.timestamp())
    try:
        parsed = dcap_qvl.QuoteCollateralV3.from_json(collateral)
        policy = dcap_qvl.QuotePolicy.claims_only(seconds)
        found = json.loads(
            dcap_qvl.QuoteVerifier().verify_with_policy(payload, parsed, seconds, policy).to_json()
        )
    except ValueError as error:
        if "expired" in str(error).lower():
            refuse("The collateral of the Intel quote has expired.", str(error)[:160], "Fetch it anew.")
        refuse("The Intel quote does not hold.", str(error)[:160])
    (kind, report), *_ = found["report"].items()
    sgx = kind == "SgxEnclave"
    attributes = bytes.fromhex(report["attributes" if sgx else "td_attributes"])
    tcb = found["tcb"]
    return Claims(
        tee="sgx" if sgx else "tdx",
        measurements=_sgx(report) if sgx else _tdx(report),
        report_data=bytes.fromhex(report["report_data"]),
        debug=bool(attributes[0] & 2) if sgx else attributes[0] != 0,
        exposed=() if sgx else _exposed(int.from_bytes(attributes, "little")),
        tcb_status="up to date" if tcb["status"] == "UpToDate" else tcb["status"],
        advisories=tuple(tcb["advisory_ids"]),
        revocation="checked",
        root="Intel SGX Root CA",
        hardware=bytes(found["platform"]["pck"]["ppid"]).hex(),
    )


def _exposed(attributes: int) -> tuple[str, ...]:
    """What a trust domain's attributes leave open to its host (TDX module ABI, TD_ATTRIBUTES); bits 0 to 7 are debugging."""
    found = []
    if not attributes & _SEPT_VE_DISABLE:
        found.append("Its host may take pages of its memory away unnoticed: SEPT_VE_DISABLE is off.")
    if attributes & _MIGRATABLE:
        found.append("A migration domain of the host's choice may move it, and read it.")
    if attributes & ~(0xFF | _SEPT_VE_DISABLE | _MIGRATABLE | _HARMLESS):
        found.append(f"Its attributes {attributes:#x} have bits that this version does not know.")
    return tuple(found)


def _sgx(report: dict[str, Any]) -> dict[str, str]:
    return {"launch": f"sha256:{report['mr_enclave']}", "signer": f"sha256:{report['mr_signer']}"}


def _tdx(report: dict[str, Any]) -> dict[str, str]:
    """MRTD is the firmware, RTMR 0 to 2 what it loaded, 3 is the guest's; `launch` is over the first four."""
    registers = {name: report[name] for name in ("mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3", "mr_seam")}
    loaded = b"".join(bytes.fromhex(registers[name]) for name in ("mr_td", "rt_mr0", "rt_mr1", "rt_mr2"))
    named = {name: f"sha384:{value}" for name, value in registers.items()}
    return {"launch": f"sha384:{hashlib.sha384(loaded).hexdigest()}", **named}


def _collateral(data: bytes, now: datetime) -> str:
    try:
        collateral = msgspec.json.decode(data, type=_Collateral)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        refuse("The Intel quote lacks its collateral.", str(error), "Have the site's custodians fetch it.")
    for name in ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain"):
        chain(pem(getattr(collateral, name).encode()), ROOTS, now, lists=name.startswith("pck_crl"))
    for name in ("root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature"):
        text = getattr(collateral, name)
        if not text or set(text) - set("0123456789abcdef"):
            refuse("The collateral of the Intel quote is malformed.", f"{name} is no hexadecimal number.")
    return msgspec.json.encode(collateral).decode()


def _framed(quote: bytes) -> bytes:
    """The PEM chain in a quote of version 3 or 4 whose types and lengths are exact (DCAP, appendix A)."""
    try:
        version, _, tee = struct.unpack_from("<HHI", quote)
        at = 48 + (384 if tee == 0 else 584)
        if version not in (3, 4):
            raise ValueError("its version is neither 3 nor 4")
        (size,) = struct.unpack_from("<I", quote, at)
        end, at = at + 4 + size, at + 4 + 128
        if version == 4:
            outer, size = struct.unpack_from("<HI", quote, at)
            at += 6
            if outer != 6 or at + size != end:
                raise ValueError("its signature data are not framed as they should be")
        at += 384 + 64
        (size,) = struct.unpack_from("<H", quote, at)
        at += 2 + size
        kind, size = struct.unpack_from("<HI", quote, at)
        if kind != 5 or at + 6 + size != end or any(quote[end:]):
            raise ValueError("its certificates are not framed as they should be")
    except (struct.error, ValueError) as error:
        refuse("The Intel quote is malformed.", str(error))
    return quote[at + 6 : end]
