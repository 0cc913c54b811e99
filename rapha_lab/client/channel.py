"""An attested, sealed connection: evidence is verified before anything is sealed to the key it binds."""

from __future__ import annotations

import io
import os
import threading
from typing import Any

import httpx
import msgspec

from rapha_lab.client.appraisal import AppraisalPolicy, Endorsements, Verdict, Verifier, appraise
from rapha_lab.protocol import messages, sealing
from rapha_lab.protocol.errors import EvidenceError, RaphaError, SealError, SiteError, from_wire
from rapha_lab.protocol.evidence import Binding, Evidence
from rapha_lab.protocol.keys import PrivateKey, PublicKey

__all__ = ["Channel"]


class Channel:
    """Sends sealed requests to one site and opens its replies.

    Args:
        url: of the site's gateway.
        key: the researcher's Ed25519 key.
        policy: what evidence is accepted.
        endorsements: the vendor's collateral, for hardware that needs it.

    Raises:
        EvidenceError: the enclave is not to be trusted; nothing was sent.
        SiteError: the site cannot be reached.
    """

    def __init__(
        self, url: str, key: PrivateKey, policy: AppraisalPolicy, endorsements: Endorsements | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self._key, self._policy, self._endorsements = key, policy, endorsements
        # proxies of the environment are for the internet; a site is inside
        self._http = httpx.Client(timeout=httpx.Timeout(30, read=600), trust_env=False)
        self._reply_key = PrivateKey.create("x-wing")
        self._attesting = threading.Lock()
        self.verdict, self.binding = self._attest()

    def _attest(self) -> tuple[Verdict, Binding]:
        nonce = os.urandom(32)
        evidence = Evidence.decode(self._send("GET", "/evidence", params={"nonce": nonce.hex()}))
        if evidence.binding.nonce != nonce:
            raise EvidenceError(
                "The evidence is not fresh.", "It is bound to another nonce.", "Connect again."
            )
        claims = Verifier().verify(evidence, self._endorsements)
        return appraise(claims, evidence.binding, self._policy, nonce=nonce).require(), evidence.binding

    @property
    def site_key(self) -> PublicKey:
        """The attested key that signs the site's replies, outputs and log."""
        return PublicKey.parse(self.binding.signing_key)

    def call(self, kind: str, header: Any, blob: bytes = b"") -> tuple[Any, bytes]:
        """One sealed round trip: the result as JSON and its tensors.

        If the site restarted since, its new evidence is appraised and the request sealed anew, once.

        Raises:
            RaphaError: the site's refusal, as it was raised there.
            SealError: the reply does not open or is not the attested site's.
        """
        try:
            return self._call(kind, header, blob)
        except _OtherEvidence:
            with self._attesting:
                before = self.binding.signing_key
                self.verdict, self.binding = self._attest()
                if self.binding.signing_key != before:
                    raise EvidenceError(
                        "The site signs with another key than before.",
                        "It was set up anew, or is another site.",
                        "Connect again if its custodians confirm it.",
                    ) from None
            return self._call(kind, header, blob)

    def _call(self, kind: str, header: Any, blob: bytes) -> tuple[Any, bytes]:
        to = PublicKey.parse(self.binding.sealing_key)
        frame = io.BytesIO()
        messages.write_frame(frame, messages.encode(header), blob)
        envelope = sealing.seal_request(
            kind,
            frame.getvalue(),
            to=to,
            evidence_hash=self.binding.identity(),
            researcher=self._key,
            reply_to=self._reply_key.public,
        )
        sealed = self._send("POST", "/open", content=envelope)
        reply = sealing.open_reply(sealed, request=envelope, to=to, key=self._reply_key, site=self.site_key)
        answer = messages.read_frame(io.BytesIO(reply.body))
        if answer is None:
            raise SealError("The reply is empty.")
        said = msgspec.json.decode(answer[0])
        if said.get("error") is not None:
            raise from_wire(said["error"])
        return said["result"], answer[1]

    def _send(self, method: str, path: str, **what: Any) -> bytes:
        try:
            response = self._http.request(method, self.url + path, **what)
        except httpx.HTTPError as error:
            raise SiteError(
                f"The site at {self.url} cannot be reached.",
                f"{type(error).__name__}.",
                "Is it running, and is the address right?",
            ) from None
        if response.status_code == 200:
            return response.content
        raise _refusal(response)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()


class _OtherEvidence(SealError):
    """The site could not open what was sealed for its former keys."""


def _refusal(response: httpx.Response) -> RaphaError:
    try:
        error = from_wire(response.json())
    except (ValueError, AttributeError):
        return SiteError(
            "The site gave no answer of ours.", f"HTTP {response.status_code}.", "Is this its address?"
        )
    if isinstance(error, SealError):
        return _OtherEvidence(error.what, error.why, error.instead)
    return error
