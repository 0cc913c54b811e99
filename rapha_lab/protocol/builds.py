"""A build of the enclave: its version and what it measures to, signed by who made it.

A build is an entry of each site's log where it runs. The log shows everybody the same list, so that nobody
gets an enclave of his own; but a site writes its own log, so an entry counts only with the signature of a
release key that the client pins. That key is neither the site's nor the custodians': it says what the bytes are,
the custodians' policy says which of them may open their data, and the hardware says which of them runs.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from rapha_lab.protocol.errors import LogError, RequestError
from rapha_lab.protocol.keys import PrivateKey, PublicKey

__all__ = ["KIND", "Build"]

KIND: Final = "release-of-enclave"

Digest = Annotated[str, Meta(pattern=r"^sha(256:[0-9a-f]{64}|384:[0-9a-f]{96})\Z")]
Line = Annotated[str, Meta(max_length=200, pattern=r"^[!-~]*\Z")]


class Build(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One release of the enclave.

    Attributes:
        version: of rapha-lab.
        measurements: all that it may measure to, for instance by number of virtual processors.
        signer: the release key, or empty where nobody vouches for it.
        signature: by that key, in base64.
    """

    version: Annotated[Line, Meta(min_length=1)]
    measurements: Annotated[list[Digest], Meta(min_length=1, max_length=64)]
    signer: Line = ""
    signature: Line = ""

    @classmethod
    def sign(cls, version: str, measurements: list[str], key: PrivateKey) -> Build:
        """A build that `key` vouches for."""
        bare = cls(version=version, measurements=measurements, signer=str(key.public))
        return msgspec.structs.replace(bare, signature=base64.b64encode(key.sign(bare.said())).decode())

    def said(self) -> bytes:
        """What is signed."""
        bare = msgspec.structs.replace(self, signature="")
        return b"rapha-lab/build/v1\0" + msgspec.json.encode(bare)

    def signed_by(self, keys: frozenset[str]) -> bool:
        """Whether one of `keys` vouches for it, and its signature holds."""
        try:
            key, signature = PublicKey.parse(self.signer), base64.b64decode(self.signature, validate=True)
        except (RequestError, ValueError):
            return False
        return self.signer in keys and key.verifies(signature, self.said())

    @classmethod
    def load(cls, path: str | Path) -> Build:
        """The build in a file.

        Raises:
            RequestError: if it is none.
        """
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(
                f"{path} describes no build of the enclave.", str(error)[:200], "rapha-lab measure --sign"
            ) from None

    @classmethod
    def logged(cls, entry: bytes) -> Build:
        """The build in an entry of a log.

        Raises:
            LogError: if the entry is of another kind.
        """
        try:
            return msgspec.json.decode(entry, type=_Entry).build()
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise LogError(
                "The entry is no release of an enclave.", str(error)[:200], "Tell the site's custodians."
            ) from None


class _Entry(Build, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag=KIND):
    def build(self) -> Build:
        return Build(**{name: getattr(self, name) for name in Build.__struct_fields__})
