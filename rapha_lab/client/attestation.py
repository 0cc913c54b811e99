"""The attestation of a kept model, appraised anew by whoever reads its dossier: at the training's time, and now.

Of what the researcher's file says of the enclave only the evidence is taken, with its nonce and what its vendor signed;
status, measurement, keys and reasons are read out of it here. It must be bound to the key that signed the training's receipt
and to the policy's page, be of a build which that page admits, and, as far as the site's log was kept, of the
build that ran when the training was charged. That its nonce was fresh only the one who chose it knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

import msgspec

from rapha_lab.client.appraisal import AppraisalPolicy, Endorsements, Verdict, Verifier, appraise
from rapha_lab.client.builds import logged_build
from rapha_lab.protocol.builds import KIND, Build
from rapha_lab.protocol.checkpoint import open_checkpoint
from rapha_lab.protocol.errors import EvidenceError, LogError, RequestError, TrustError
from rapha_lab.protocol.evidence import BANNER, Claims, Evidence
from rapha_lab.protocol.keys import signing_key
from rapha_lab.protocol.policy import Policy
from rapha_lab.protocol.release import Release

__all__ = ["Attestation", "charged_at", "reappraise"]

_SKEW = 600
_INSTEAD = "Do not rely on this model; ask its researcher, and show both to the site's custodians."


class Attestation(msgspec.Struct, frozen=True):
    """What is kept beside a model of the enclave that trained it.

    Attributes:
        evidence: as the site sent it, with the endorsements that it was appraised with.
        at: when the researcher's client appraised it, in Unix seconds.
        minimum_tcb: the lowest firmware versions that it accepted.
    """

    evidence: Evidence
    at: float
    minimum_tcb: dict[str, int] = {}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Attestation:
        """That in a kept model's file.

        Raises:
            EvidenceError: there is none.
        """
        try:
            return msgspec.convert(told["attestation"], cls)
        except (KeyError, msgspec.ValidationError) as error:
            why = "It was kept without the site's evidence." if isinstance(error, KeyError) else str(error)
            raise EvidenceError("The model's file holds no evidence.", why, "Keep it anew.") from None

    @property
    def key(self) -> str:
        """The key that the evidence says signs the site's receipts and log."""
        return self.evidence.binding.signing_key


def reappraise(
    kept: Attestation,
    training: Release,
    policy: Policy,
    entries: Sequence[Mapping[str, Any]] = (),
    *,
    endorsements: Endorsements | None = None,
    minimum_tcb: Mapping[str, int] | None = None,
    now: datetime | None = None,
) -> dict[str, Any]:
    """What the evidence shows of the enclave that gave `training`, as of then and as of `now`.

    Args:
        kept: the evidence.
        training: the release whose receipt it must belong to.
        policy: the page it must be bound to; whose custodians said which measurements may open the dataset.
        entries: of the verified log, if it was kept.
        endorsements: newer ones of the vendor, to judge by now.
        minimum_tcb: lowest firmware versions to accept now, instead of those that the researcher accepted.
        now: the time; the clock's, if None.

    Raises:
        EvidenceError: it was altered, or is of another key, policy, build or time than the training.
    """
    now, then = now or datetime.now(UTC), _time(kept.at)
    _belongs(kept, training, policy)
    verdict = _judge(kept.evidence, policy, training.dataset, kept.minimum_tcb, None, then)
    if verdict.status == "contraindicated":
        _refuse("The enclave that trained the model is not to be trusted.", " ".join(verdict.reasons))
    claims = verdict.claims
    _dated(then, claims, now)
    ran = _ran(claims, training, entries)
    try:
        least = kept.minimum_tcb if minimum_tcb is None else minimum_tcb
        today = _judge(kept.evidence, policy, training.dataset, least, endorsements, now)
        status, reasons = today.status, list(today.reasons)
    except TrustError as error:
        status, reasons = "contraindicated", [str(error)]
    return {
        "site key": kept.key,
        "tee": claims.tee,
        "simulated": claims.simulated,
        "warning": BANNER if claims.simulated else "",
        "measurement": claims.measurement,
        "signed under": claims.root,
        "sandbox": str(claims.extra.get("tier", "not in the evidence")),
        "at training": _said(then, verdict.status, verdict.reasons),
        "now": _said(now, status, reasons),
        "its build ran when the training was charged": ran,
        "nonce": kept.evidence.binding.nonce.hex(),
        "least firmware accepted": dict(kept.minimum_tcb),
        "evidence": msgspec.to_builtins(kept.evidence),
    }


def _said(when: datetime, status: str, reasons: Sequence[str]) -> dict[str, Any]:
    return {"when": when.isoformat(timespec="seconds"), "status": status, "reasons": list(reasons)}


def _time(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        raise EvidenceError("The time of the evidence is none.", f"It is {seconds}.", _INSTEAD) from None


def _belongs(kept: Attestation, training: Release, policy: Policy) -> None:
    binding = kept.evidence.binding
    if binding.policy_hash != policy.hash:
        _refuse("The evidence is bound to another policy than the page kept with the model.")
    try:
        open_checkpoint(str(training.receipt.get("checkpoint", "")), signing_key(kept.key))
    except (LogError, RequestError) as error:
        _refuse(
            "The evidence is bound to another key than the one that signed the training's receipt.",
            str(error),
        )


def _judge(
    evidence: Evidence,
    policy: Policy,
    dataset: str,
    minimum_tcb: Mapping[str, int],
    endorsements: Endorsements | None,
    when: datetime,
) -> Verdict:
    claims, (build, _) = Verifier().verify(evidence, endorsements, when), logged_build(evidence)
    admitted = {each for each in policy.dataset(dataset).measurements if ":" in each}
    if claims.simulated and "any simulated" in policy.dataset(dataset).measurements:
        admitted.add(claims.measurement)
    terms = AppraisalPolicy(frozenset(admitted), allow_simulated=True, minimum_tcb=minimum_tcb)
    return appraise(claims, evidence.binding, terms, build=build, nonce=evidence.binding.nonce)


def _dated(then: datetime, claims: Claims, now: datetime) -> None:
    if (then - now).total_seconds() > _SKEW:
        _refuse("The evidence is said to have been appraised in the future.", f"On {then:%Y-%m-%d}.")
    if claims.issued_at is not None and abs(then.timestamp() - claims.issued_at) > _SKEW:
        issued = _time(claims.issued_at)
        why = f"It was issued on {issued:%Y-%m-%d %H:%M}, and is said to have been appraised on {then:%Y-%m-%d %H:%M}."
        _refuse("The evidence is of another time than the file says.", why)


def charged_at(training: Release, entries: Sequence[Mapping[str, Any]]) -> int | None:
    """Which entry of the log is the training's charge; None if the log ends before, as an older copy of it does."""
    index = training.receipt.get("index")
    if not isinstance(index, int) or not 0 <= index < len(entries):
        return None
    told = entries[index].get("kind"), entries[index].get("job")
    return index if told == ("charge", training.job) else None


def _ran(claims: Claims, training: Release, entries: Sequence[Mapping[str, Any]]) -> bool | None:
    """Whether the last build that the log names before the training's charge is the one attested; None if it names no charge."""
    charged = charged_at(training, entries)
    if charged is None:
        return None
    before = entries[:charged]
    builds = [entry for entry in before if entry.get("kind") == KIND]
    if not builds or claims.measurement not in Build.logged(msgspec.json.encode(builds[-1])).measurements:
        _refuse(
            "The evidence is of another build than the one that ran when the training was charged.",
            "So the site's log says.",
        )
    return True


def _refuse(what: str, why: str = "") -> NoReturn:
    raise EvidenceError(what, why, _INSTEAD)
