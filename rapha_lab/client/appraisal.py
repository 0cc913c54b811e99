"""Decides whether an enclave may be trusted with a request: evidence, to claims, to a verdict (RFC 9334).

    claims = Verifier().verify(evidence, endorsements, now)                  who signed it, what it says
    build, _ = logged_build(evidence)                                        what the log says it is
    appraise(claims, evidence.binding, policy, build=build, nonce=nonce).require()   whether that will do

Verdicts are in the terms of AR4SI (draft-ietf-rats-ar4si): affirming 2, warning 32, contraindicated 96, as
the worst of four parts of its trustworthiness vector.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rapha_lab.protocol.builds import Build
from rapha_lab.protocol.errors import EvidenceError
from rapha_lab.protocol.evidence import (
    BANNER,
    NITRO,
    NVIDIA,
    SGX,
    SIMULATED,
    SNP,
    TDX,
    Binding,
    Claims,
    Endorsements,
    Evidence,
)

__all__ = ["AppraisalPolicy", "Endorsements", "Verdict", "Verifier", "appraise"]

_VERIFIERS = {
    SNP: "sev_snp",
    TDX: "intel",
    SGX: "intel",
    NITRO: "nitro",
    NVIDIA: "nvidia",
    SIMULATED: "simulated",
}
_PARTS = ("hardware", "instance-identity", "configuration", "executables")
AFFIRMING, WARNING, CONTRAINDICATED = 2, 32, 96
_WORDS = {AFFIRMING: "affirming", WARNING: "warning", CONTRAINDICATED: "contraindicated"}


class Verifier:
    """Verifies evidence of each known kind of TEE, offline."""

    def verify(
        self, evidence: Evidence, endorsements: Endorsements | None = None, now: datetime | None = None
    ) -> Claims:
        """The claims of `evidence` whose vendor's signature holds at the time `now`.

        Args:
            evidence: as the site sent it.
            endorsements: the vendor's, if held; else those that the site mirrors, which are signed as well.
            now: the time; the clock's, if None.

        Raises:
            EvidenceError: naming the check that failed.
        """
        name = _VERIFIERS.get(evidence.media_type)
        if name is None:
            raise EvidenceError(
                "The evidence is of an unknown kind.",
                evidence.media_type[:80],
                "Update rapha-lab, or ask the site.",
            )
        try:
            module = importlib.import_module(f"rapha_lab.client.verifiers.{name}")
        except ModuleNotFoundError as error:
            raise EvidenceError(
                f"Evidence of this kind needs the package {error.name}.",
                "It is optional.",
                "pip install 'rapha-lab[tee]'",
            ) from None
        try:
            claims: Claims = module.verify(
                evidence.payload, endorsements or evidence.endorsements, now or datetime.now(UTC)
            )
        except EvidenceError:
            raise
        except Exception as error:  # certificates are parsed lazily, and bad ones raise from anywhere
            why = f"{type(error).__name__}: {str(error)[:100]}"
            raise EvidenceError("The evidence is malformed.", why, "Do not connect.") from None
        return claims


@dataclass(frozen=True)
class AppraisalPolicy:
    """What a researcher, or the hospital for them, accepts.

    A build that is in the site's log is accepted if it is one of `measurements` or a pinned key signed it.

    Attributes:
        measurements: launch measurements of known builds.
        signers: release keys, in text form; with neither of the two, no real TEE is accepted.
        allow_simulated: accept a simulated enclave, as a warning.
        minimum_tcb: lowest security version of each named part of a SEV-SNP platform.
        tcb_statuses: what the vendor may say of the platform's patch level for an affirming verdict.
        tcb_warnings: what it may say for a warning.
    """

    measurements: frozenset[str] = frozenset()
    signers: frozenset[str] = frozenset()
    allow_simulated: bool = False
    minimum_tcb: Mapping[str, int] = field(default_factory=dict)
    tcb_statuses: frozenset[str] = frozenset({"up to date"})
    tcb_warnings: frozenset[str] = frozenset({"SWHardeningNeeded"})


@dataclass(frozen=True)
class Verdict:
    """An appraisal's result: `status`, the four parts it is the worst of, and the reasons in plain words."""

    vector: dict[str, int]
    reasons: tuple[str, ...]
    claims: Claims

    @property
    def status(self) -> str:
        """`affirming`, `warning` or `contraindicated`."""
        return _WORDS[max(self.vector.values())]

    def require(self) -> Verdict:
        """Itself, unless contraindicated.

        Raises:
            EvidenceError: with the first reason.
        """
        if self.status == "contraindicated":
            raise EvidenceError(
                "The enclave is not to be trusted.",
                " ".join(self.reasons),
                "Nothing was sent. Ask the site's custodians.",
            )
        return self


def appraise(
    claims: Claims,
    offered: Binding,
    policy: AppraisalPolicy | None = None,
    *,
    build: Build | None = None,
    nonce: bytes | None = None,
    policy_hash: bytes | None = None,
    beside: Verdict | None = None,
) -> Verdict:
    """Whether `claims` are those of an enclave that `policy` accepts, and that holds the keys `offered`.

    Args:
        claims: what the verifier read in the evidence.
        offered: the binding that came with it, whose keys are about to be used.
        policy: what is accepted; by default no simulated enclave and no measurement.
        build: what the site's log says of the enclave, from `logged_build`.
        nonce: the client's own challenge.
        policy_hash: SHA-256 of the custodians' policy that the client has read.
        beside: of a GPU, the verdict on the processor that uses it; a GPU's evidence is nothing without.
    """
    policy = policy or AppraisalPolicy()
    vector, reasons = dict.fromkeys(_PARTS, AFFIRMING), list[str]()

    def lower(part: str, to: int, reason: str) -> None:
        vector[part] = max(vector[part], to)
        reasons.append(reason)

    bound = offered.report_data()
    if claims.report_data != (bound[:32] if claims.tee == "nvidia" else bound):
        lower(
            "instance-identity",
            CONTRAINDICATED,
            "The keys offered are not those that the evidence is bound to.",
        )
    if nonce is not None and offered.nonce != nonce:
        lower("instance-identity", CONTRAINDICATED, "The evidence is stale: it answers another nonce.")
    if policy_hash is not None and offered.policy_hash != policy_hash:
        lower("configuration", CONTRAINDICATED, "The enclave runs another policy than the one shown.")
    _appraise_platform(claims, policy, lower)
    if claims.tee == "nvidia":
        _appraise_gpu(bound, beside, vector, lower)
    else:
        _appraise_build(claims, policy, build, lower)
    return Verdict(vector, tuple(reasons), claims)


def _appraise_build(
    claims: Claims, policy: AppraisalPolicy, build: Build | None, lower: Callable[[str, int, str], None]
) -> None:
    short = f"{claims.measurement[:23]}…"
    if build is None or claims.measurement not in build.measurements:
        lower("executables", CONTRAINDICATED, f"The site's log has no release that measures {short}.")
        return
    anything = claims.simulated and not policy.measurements and not policy.signers
    known = claims.measurement in policy.measurements or build.signed_by(policy.signers)
    if not known and not anything:
        lower(
            "executables",
            CONTRAINDICATED,
            f"No known release measures {short}: it is none that you named, and no release key you named signed it.",
        )


def _appraise_gpu(
    bound: bytes, beside: Verdict | None, vector: dict[str, int], lower: Callable[[str, int, str], None]
) -> None:
    """Whoever has a GPU gets evidence of it for any nonce; only the processor's says what code uses it."""
    if beside is None or beside.claims.tee == "nvidia" or beside.claims.report_data != bound:
        why = "A GPU's evidence says nothing of the code: it counts only beside that of its processor."
        lower("executables", CONTRAINDICATED, why)
        return
    for part, status in beside.vector.items():
        if status > AFFIRMING:
            lower(part, status, f"The processor's evidence beside the GPU's is {_WORDS[status]} in {part}.")


def _appraise_platform(
    claims: Claims, policy: AppraisalPolicy, lower: Callable[[str, int, str], None]
) -> None:
    if claims.simulated:
        to = WARNING if policy.allow_simulated else CONTRAINDICATED
        lower(
            "hardware",
            to,
            BANNER if policy.allow_simulated else f"{BANNER} (allow_simulated=True accepts it.)",
        )
        return
    if claims.debug:
        lower("configuration", CONTRAINDICATED, "The enclave is in debug mode: its host can read its memory.")
    for way in claims.exposed:
        lower("configuration", CONTRAINDICATED, way)
    if claims.tcb_status == "not stated":
        if not policy.minimum_tcb:
            lower("hardware", WARNING, "Nobody says whether the platform's TCB is current: set a minimum.")
    elif claims.tcb_status in policy.tcb_warnings:
        lower(
            "hardware", WARNING, f"The platform's TCB is {claims.tcb_status}: {', '.join(claims.advisories)}."
        )
    elif claims.tcb_status not in policy.tcb_statuses:
        lower(
            "hardware",
            CONTRAINDICATED,
            f"The platform's TCB is {claims.tcb_status}: {', '.join(claims.advisories)}.",
        )
    for part, least in policy.minimum_tcb.items() if claims.tee == "sev-snp" else ():
        if claims.tcb.get(part, -1) < least:
            lower(
                "hardware",
                CONTRAINDICATED,
                f"The TCB is too old: {part} {claims.tcb.get(part)}, {least} is needed.",
            )
    if claims.revocation == "absent":
        lower(
            "hardware",
            CONTRAINDICATED,
            "No revocation list was given, so the chip's certificate may be revoked.",
        )
    for caveat in claims.caveats:
        lower("executables", WARNING, caveat)
