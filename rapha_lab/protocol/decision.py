"""A custodian's signed word on what waits in a site's airlock: approve it, or refuse it with a reason.

What is decided on is a document in canonical JSON; its SHA-256 is the `subject`. A custodian's client computes
it from the very document it shows, so that nobody signs what they did not see. With the reason's hash in its
place, a decision stands in the site's log, where anybody can check the signature and nobody reads the reason.
"""

from __future__ import annotations

import hashlib
import time
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.keys import PrivateKey, PublicKey

__all__ = ["Act", "Decision", "decide", "login_bytes", "signed_login", "subject_of"]

Act = Literal["approve", "refuse"]
Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One custodian's decision on one subject, under one version of the policy."""

    act: Act
    subject: Hash
    policy: Hash
    key: str
    time: int
    reason: Annotated[str, Meta(max_length=2000)] = ""
    signature: bytes = b""

    @classmethod
    def decode(cls, text: bytes | str) -> Decision:
        """The decision in a line of JSON, or RequestError."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(
                f"This is no decision: {error}.", "", "Have `rapha-lab review` make it.", field="decision"
            ) from None

    def signed_bytes(self) -> bytes:
        """What the signature is over: everything, with the reason's SHA-256 for the reason."""
        return b"rapha-lab/decision/v1\0" + msgspec.json.encode(self._labels(), order="sorted")

    def _labels(self) -> dict[str, object]:
        reason = hashlib.sha256(self.reason.encode()).hexdigest() if self.reason else ""
        told = {name: getattr(self, name) for name in ("act", "subject", "policy", "key", "time")}
        return told | {"reason": reason}

    def holds(self) -> bool:
        """Whether its signature is its key's; RequestError if its key is none."""
        return PublicKey.parse(self.key).verifies(self.signature, self.signed_bytes())

    def logged(self) -> dict[str, object]:
        """The decision as labels for the log, from which `signed_bytes` can be made again."""
        return self._labels() | {"signature": self.signature.hex()}


def subject_of(document: bytes) -> str:
    """What a document is known by."""
    return hashlib.sha256(document).hexdigest()


def decide(act: Act, document: bytes, policy: str, key: PrivateKey, reason: str = "") -> Decision:
    """`key`'s decision on this very document.

    Args:
        act: "approve" or "refuse".
        document: as the site showed it.
        policy: hash of the policy in force, in hex.
        key: the custodian's.
        reason: for the researcher to read, and for nobody else.
    """
    bare = Decision(act, subject_of(document), policy, str(key.public), int(time.time()), reason)
    return msgspec.structs.replace(bare, signature=key.sign(bare.signed_bytes()))


def login_bytes(site: str, challenge: str) -> bytes:
    """What a custodian signs to be let into the console of `site`."""
    return b"rapha-lab/console/v1\0" + msgspec.json.encode([site, challenge])


def signed_login(site: str, challenge: str, key: PrivateKey) -> str:
    """A custodian's answer to a console's challenge, as a line of JSON."""
    signature = key.sign(login_bytes(site, challenge)).hex()
    return msgspec.json.encode(
        {"challenge": challenge, "key": str(key.public), "signature": signature}
    ).decode()
