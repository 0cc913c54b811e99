"""NVIDIA GPUs in confidential mode: SPDM measurements (DMTF DSP0274 1.1) signed by each GPU.

A GPU signs 32 bytes of nonce, so it is bound through the CPU's evidence: its nonce is the first half of the
binding's report data. Measurements are read and shown, but not compared with NVIDIA's reference manifests,
and claims say so.
"""

from __future__ import annotations

import base64
import binascii
import struct
from datetime import datetime

import msgspec

from rapha_lab.client.verifiers import Endorsements, refuse
from rapha_lab.client.verifiers.certificates import chain, pem, signed
from rapha_lab.protocol.evidence import Claims

__all__ = ["ROOTS", "verify"]

ROOTS = {"102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48": "NVIDIA Device Identity CA"}
_REQUEST, _SIGNATURE, _NONCE = 37, 96, 32
_DRIVER, _VBIOS = 3, 6


class _Gpu(msgspec.Struct, forbid_unknown_fields=True):
    """One GPU as NVIDIA's tools write it; `evidence` is the SPDM request and response."""

    arch: str
    certificate: str
    driver_version: str
    evidence: str
    nonce: str
    vbios_version: str
    version: str


def verify(payload: bytes, endorsements: Endorsements, now: datetime) -> Claims:
    """The claims of a JSON list of GPUs.

    Raises:
        EvidenceError: naming what does not hold, and of which GPU.
    """
    try:
        gpus = msgspec.json.decode(payload, type=list[_Gpu])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        refuse("The GPU evidence is malformed.", str(error))
    if not gpus or len({gpu.nonce for gpu in gpus}) != 1:
        refuse("The GPU evidence is malformed.", "There is no GPU, or they answer different nonces.")
    measurements, serials, root = dict[str, str](), list[str](), ""
    for number, gpu in enumerate(gpus):
        root, serial, blocks = _one(gpu, number, now)
        serials.append(serial)
        measurements |= {f"gpu{number} {index}": value for index, value in blocks.items()}
    if len(set(serials)) < len(serials):
        refuse("The GPU evidence shows one GPU twice.", "Two entries have the same certificate.")
    return Claims(
        tee="nvidia",
        measurements=measurements,
        report_data=bytes.fromhex(gpus[0].nonce),
        revocation="none",
        root=root,
        hardware=", ".join(serials),
        caveats=(
            "GPU measurements were not compared with NVIDIA's reference values, nor was revocation checked.",
        ),
        extra={"driver": gpus[0].driver_version, "vbios": gpus[0].vbios_version, "gpus": len(gpus)},
    )


def _one(gpu: _Gpu, number: int, now: datetime) -> tuple[str, str, dict[int, str]]:
    report, certificates = _exact(gpu.evidence), pem(_exact(gpu.certificate))
    root = chain(certificates, ROOTS, now)
    if "GH100 " not in certificates[0].subject.rfc4514_string():
        refuse(f"The evidence of GPU {number} is another device's.", "Its certificate is not of a Hopper.")
    if not signed(certificates[0], report[-_SIGNATURE:], report[:-_SIGNATURE]):
        refuse(f"The evidence of GPU {number} was altered.", "Its signature does not hold.")
    try:
        request, response = report[:_REQUEST], report[_REQUEST:]
        (size,) = struct.unpack("<I", response[5:8] + b"\0")
        blocks = _blocks(response[8 : 8 + size], response[4])
        at = 8 + size + _NONCE
        (extra,) = struct.unpack_from("<H", response, at)
        opaque = _opaque(response[at + 2 : at + 2 + extra])
        exact = len(response) == at + 2 + extra + _SIGNATURE and request[:2] == b"\x11\xe0"
    except (struct.error, IndexError):
        exact = False
    if not exact:
        refuse(f"The evidence of GPU {number} is malformed.", "It is no SPDM 1.1 measurement.")
    said = request[4:36].hex(), opaque.get(_DRIVER), opaque.get(_VBIOS), gpu.arch, gpu.version
    if said != (gpu.nonce, gpu.driver_version, gpu.vbios_version, "HOPPER", "1.0"):
        refuse(
            f"What is said of GPU {number} is not what it signed.", "Nonce, driver, firmware or kind differ."
        )
    return root, f"{certificates[0].serial_number:x}", blocks


def _blocks(record: bytes, count: int) -> dict[int, str]:
    """The digests by index (DSP0274, table 44)."""
    found, at = dict[int, str](), 0
    for _ in range(count):
        index, _, size = struct.unpack_from("<BBH", record, at)
        found[index] = f"sha384:{record[at + 7 : at + 4 + size].hex()}"
        at += 4 + size
    return found


def _opaque(data: bytes) -> dict[int, str]:
    """NVIDIA's triples of type, length and value; a VBIOS version is a number, texts end in a zero."""
    found, at = dict[int, str](), 0
    while at < len(data):
        kind, size = struct.unpack_from("<HH", data, at)
        value = data[at + 4 : at + 4 + size]
        version = ".".join(f"{byte:02X}" for byte in (*value[3::-1], *value[4:5]))
        found[kind] = version if kind == _VBIOS else value.rstrip(b"\0").decode("latin-1")
        at += 4 + size
    return found


def _exact(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if base64.b64encode(data).decode() != text or not data:
        refuse("The GPU evidence is malformed.", "A field is no base64.")
    return data
