"""What patients' privacy was spent on elsewhere, as a custodian signs it: it only ever adds to what is spent.

Statements stand beside the policy, in its path + ".spends", a line of JSON each. Any one custodian of the policy in
force may make one; none can be taken back.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.keys import PrivateKey, PublicKey
from rapha_lab.protocol.policy import Policy

__all__ = ["Spend", "spend", "spends"]

Amount = Annotated[float, Meta(ge=1e-9, le=1000.0)]


class Spend(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A custodian's word that something was released elsewhere of the patients of a split.

    Attributes:
        name: what this statement is called, never used twice.
        project: which of the policy's projects had it; "*" for none of them, which needs a cap on the dataset.
        epsilon: if the release was (epsilon, 0)-private; or
        rho: if it was rho-zCDP.
    """

    name: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    project: Annotated[str, Meta(min_length=1, max_length=64)]
    dataset: Annotated[str, Meta(min_length=1, max_length=64)]
    split: Literal["train", "validation", "test"]
    epsilon: Amount | None = None
    rho: Amount | None = None
    reason: Annotated[str, Meta(min_length=1, max_length=200)]
    key: str
    signature: bytes = b""

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.rho is None):
            raise ValueError("either epsilon or rho says how much was spent")

    @property
    def digest(self) -> bytes:
        """SHA-256 of the statement, for the ledger."""
        return hashlib.sha256(self.signed_bytes()).digest()

    def check(self, policy: Policy) -> None:
        """Raise RequestError unless a custodian of `policy` signed it, of an account that the policy has."""
        named = self.key in {custodian.key for custodian in policy.custodians}
        if not named or not PublicKey.parse(self.key).verifies(self.signature, self.signed_bytes()):
            raise _wrong("no custodian of the policy signed it")
        had = {project.name: project.datasets for project in policy.projects}
        had["*"] = [dataset.name for dataset in policy.datasets if dataset.epsilon is not None]
        if self.dataset not in had.get(self.project, []):
            raise _wrong(f"project {self.project} has no budget for {self.dataset}")

    def signed_bytes(self) -> bytes:
        """What the signature is over."""
        bare = msgspec.structs.replace(self, signature=b"")
        return b"rapha-lab/spend/v1\0" + msgspec.json.encode(bare)


def spend(
    key: PrivateKey,
    project: str,
    dataset: str,
    split: str,
    reason: str,
    *,
    epsilon: float | None = None,
    rho: float | None = None,
) -> Spend:
    """`key`'s statement, to append to the policy's file of spends.

    Raises:
        RequestError: if a field is out of range.
    """
    told = {"project": project, "dataset": dataset, "split": split, "reason": reason}
    named = {"name": secrets.token_hex(16), "key": str(key.public), "epsilon": epsilon, "rho": rho}
    try:
        bare = msgspec.convert(told | named, Spend)
    except msgspec.ValidationError as error:
        raise _wrong(str(error)) from None
    return msgspec.structs.replace(bare, signature=key.sign(bare.signed_bytes()))


def spends(path: str | Path) -> list[Spend]:
    """The statements beside the policy at `path`, as they stand there: `check` says which count.

    Raises:
        RequestError: if a line does not read: what was spent is then not known, so nothing may be answered.
    """
    beside = Path(f"{path}.spends")
    return [_read(line) for line in beside.read_bytes().splitlines()] if beside.exists() else []


def _read(line: bytes) -> Spend:
    try:
        found = msgspec.json.decode(line, type=Spend)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _wrong(str(error)) from None
    if msgspec.json.encode(found) != line:
        raise _wrong("it was rewritten")
    return found


def _wrong(why: str) -> RequestError:
    return RequestError(
        f"A statement of what was spent elsewhere does not hold: {why}.",
        "What is left cannot be known without it.",
        "Make it again with rapha-lab policy spend.",
        field="spends",
    )
