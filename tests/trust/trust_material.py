"""What the tests of trust are made of: fixed keys, a policy's page, and where recorded evidence lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.protocol.keys import PrivateKey

VECTORS = Path(os.environ.get("RAPHA_LAB_VECTORS") or Path(__file__).parents[3] / "shared" / "vectors")
DEEP = os.environ.get("RAPHA_LAB_DEEP") == "1"  # the full counts that docs/trust.md states

PAGE = """\
# The policy of a made-up hospital.
[policy]
name = "Light chains and survival"
version = 3
purpose = ["DUO:0000042"]
expires = 2030-06-30
quorum = 2

{custodians}
[[datasets]]
name = "flchain"
measurements = ["any simulated", "sha384:{zeros}"]
sandbox = "S2"
delta = 1e-5

[[projects]]
name = "risk"
researchers = ["{researcher}"]
datasets = ["flchain"]
epsilon = 4.0
delta = 1e-6
largest_model = 1_000_000
smallest_cohort = 100
metrics = ["auroc", "brier"]

[projects.lanes]
aggregate = {{ release = "auto" }}
train = {{}}
"""
CUSTODIAN = '[[custodians]]\nname = "{name}"\nrole = "{role}"\nkey = "{key}"\n'
PEOPLE = [
    ("Ada Lim", "Caldicott Guardian"),
    ("Bo Ek", "data protection officer"),
    ("Cy Roe", "general counsel"),
]


def fixed(number: int) -> PrivateKey:
    """A signing key that is the same in every run."""
    return PrivateKey("ed25519", (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32),))


CUSTODIANS = [fixed(n) for n in (1, 2, 3)]
RESEARCHER = fixed(4)


def page() -> str:
    """The policy's text."""
    custodians = "\n".join(
        CUSTODIAN.format(name=name, role=role, key=key.public)
        for (name, role), key in zip(PEOPLE, CUSTODIANS, strict=True)
    )
    return PAGE.format(custodians=custodians, researcher=RESEARCHER.public, zeros="0" * 96)


def vector(name: str) -> bytes:
    """A file of real evidence; the test is skipped where the recordings are not at hand."""
    path = VECTORS / name
    if not path.exists():
        pytest.skip(f"{name} is not there: recorded evidence of real hardware is not part of this repository")
    data = path.read_bytes()
    return bytes.fromhex(data.decode()) if name.endswith(".hex") else data
