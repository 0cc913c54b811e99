"""An attested, sealed connection: evidence is verified before anything is sealed to the key it binds."""

from __future__ import annotations

import io
import os
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from rapha_lab.client.appraisal import AppraisalPolicy, Endorsements, Verdict, Verifier, appraise
from rapha_lab.client.builds import logged_build
from rapha_lab.protocol import messages, sealing
from rapha_lab.protocol.builds import Build
from rapha_lab.protocol.checkpoint import Checkpoint
from rapha_lab.protocol.errors import EvidenceError, RaphaError, SealError, SiteError, from_wire
from rapha_lab.protocol.evidence import Binding, Evidence, key_hash
from rapha_lab.protocol.keys import PrivateKey, PublicKey

__all__ = ["Channel"]


@dataclass(frozen=True)
class Attested:
    """An enclave as it was appraised: its evidence, verdict and keys, its build, and the head of its log with its note."""

    evidence: Evidence
    at: float
    verdict: Verdict
    binding: Binding
    build: Build
    head: Checkpoint
    note: str


class Channel:
    """Sends sealed requests to one site and opens its replies.

    Args:
        url: of the site's gateway.
        key: the researcher's Ed25519 key.
        policy: what evidence is accepted.
        endorsements: the vendor's collateral, for hardware that needs it.
        policy_hash: of the custodians' policy, if the researcher has read one and wants no other.

    Raises:
        EvidenceError: the enclave is not to be trusted; nothing was sent.
        SiteError: the site cannot be reached.

    Attributes:
        seen: every enclave of this site that was appraised: it has another one after each restart or new policy.
    """

    def __init__(
        self,
        url: str,
        key: PrivateKey,
        policy: AppraisalPolicy,
        endorsements: Endorsements | None = None,
        policy_hash: bytes | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.key, self.policy, self._endorsements, self.policy_hash = key, policy, endorsements, policy_hash
        # proxies of the environment are for the internet; a site is inside, often under a hospital's own authority
        context = ssl.create_default_context()
        self._http = httpx.Client(timeout=httpx.Timeout(30, read=600), trust_env=False, verify=context)
        self._attesting, self.seen = threading.Lock(), list[Attested]()
        self.attested = self._attest()
        self._reply_key = PrivateKey.create(self.binding.suite)

    def _attest(self) -> Attested:
        nonce = os.urandom(32)
        response = self._send("GET", "/evidence", params={"nonce": nonce.hex()})
        evidence = Evidence.decode(response.content)
        if evidence.binding.nonce != nonce:
            raise EvidenceError(
                "The evidence is not fresh.", "It is bound to another nonce.", "Connect again."
            )
        _check_tls(response, evidence.binding.tls_key_hash)
        if self._endorsements is not None:
            evidence = msgspec.structs.replace(evidence, endorsements=self._endorsements)
        claims, (build, head) = Verifier().verify(evidence), logged_build(evidence)
        bound, read = evidence.binding, self.policy_hash
        verdict = appraise(claims, bound, self.policy, build=build, nonce=nonce, policy_hash=read).require()
        note = evidence.build.checkpoint  # type: ignore[union-attr]
        found = Attested(evidence, time.time(), verdict, evidence.binding, build, head, note)
        self.seen = [*self.seen[-99:], found]
        return found

    @property
    def verdict(self) -> Verdict:
        """What was found of the evidence."""
        return self.attested.verdict

    @property
    def binding(self) -> Binding:
        """What the evidence binds."""
        return self.attested.binding

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
                fresh = self._attest()
                if fresh.binding.signing_key != self.binding.signing_key:
                    raise EvidenceError(
                        "The site signs with another key than before.",
                        "It was set up anew, or is another site.",
                        "Connect again if its custodians confirm it.",
                    ) from None
                self.attested = fresh
        try:
            return self._call(kind, header, blob)
        except _OtherEvidence as error:
            raise SealError(error.what, error.why, error.instead) from None

    def _call(self, kind: str, header: Any, blob: bytes) -> tuple[Any, bytes]:
        to = PublicKey.parse(self.binding.sealing_key)
        frame = io.BytesIO()
        messages.write_frame(frame, messages.encode(header), blob)
        envelope = sealing.seal_request(
            kind,
            frame.getvalue(),
            to=to,
            evidence_hash=self.binding.identity(),
            researcher=self.key,
            reply_to=self._reply_key.public,
        )
        sealed = self._send("POST", "/open", content=envelope).content
        reply = sealing.open_reply(sealed, request=envelope, to=to, key=self._reply_key, site=self.site_key)
        answer = messages.read_frame(io.BytesIO(reply.body))
        if answer is None:
            raise SealError("The reply is empty.")
        said = msgspec.json.decode(answer[0])
        if said.get("error") is not None:
            raise from_wire(said["error"])
        return said["result"], answer[1]

    def _send(self, method: str, path: str, **what: Any) -> httpx.Response:
        try:
            response = self._http.request(method, self.url + path, **what)
        except httpx.HTTPError as error:
            raise SiteError(
                f"The site at {self.url} cannot be reached.",
                f"{type(error).__name__}.",
                "Is it running, and is the address right?",
            ) from None
        if response.status_code == 200:
            return response
        raise _refusal(response)

    def hurry(self, seconds: float) -> None:
        """Wait for this long at most from now on."""
        self._http.timeout = httpx.Timeout(seconds)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()


def _check_tls(response: httpx.Response, bound: bytes) -> None:
    """Where the evidence binds a TLS key, the connection it came over must end at that key."""
    if bound == bytes(32):
        return  # a proxy ends TLS; what is secret is sealed to the enclave's own key
    stream = response.extensions["network_stream"].get_extra_info("ssl_object")
    certificate = stream.getpeercert(True) if stream else None
    if certificate is None or key_hash(certificate) != bound:
        raise EvidenceError(
            "The connection does not end in the enclave.",
            "Its TLS key is not the one that the evidence binds.",
            "Somebody stands between, or the site's tls_certificate is not the one its proxy shows.",
        )


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
