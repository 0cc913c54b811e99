"""The one way out: decode, policy, price, reserve, run, charge, log, release. No other path leads to a reply.

Everything that depends on a patient passes through `Desk.answer`, once, priced and logged.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.mechanisms import Answer, Plan
from rapha_lab.curator.noise import Noise
from rapha_lab.curator.plans import plan_of
from rapha_lab.protocol import messages
from rapha_lab.protocol.checkpoint import Receipt
from rapha_lab.protocol.errors import PolicyError, RaphaError, RefusedError, RequestError
from rapha_lab.protocol.messages import Ask
from rapha_lab.protocol.policy import Policy
from rapha_lab.protocol.release import Release, statement

__all__ = ["Caller", "Cancelled", "Desk"]

LANES = {"fit": "train", "gradient": "train", "evaluate": "evaluate"}


class Cancelled(RefusedError):
    """The researcher cancelled; what had run stays charged."""


@dataclass(frozen=True)
class Caller:
    """Who asks, as the gateway authenticated them: a session can't choose these.

    Attributes:
        researcher: their public key.
        project: the policy's project they act for.
        job: the number of this request, never used twice.
    """

    researcher: str
    project: str
    job: str


class Desk:
    """Answers requests about the cohorts of one site.

    Args:
        policy: gives the custodians' policy as it stands; raises PolicyError if it is not in force.
        ledger: where budgets are kept and the log is written.
        cohorts: the records by dataset.
        noise: the cryptographic generator.
        site: the site's name, for the release.
    """

    def __init__(
        self,
        policy: Callable[[], Policy],
        ledger: Ledger,
        cohorts: Mapping[str, Cohort],
        noise: Noise,
        site: str,
        *,
        simulated: bool,
    ) -> None:
        self._policy, self._ledger, self._cohorts, self._noise = policy, ledger, cohorts, noise
        self._site, self._simulated = site, simulated

    def answer(
        self, caller: Caller, request: bytes, tensors: bytes, on_step: Callable[[int, int], None]
    ) -> tuple[Release, bytes]:
        """Answer one untrusted request.

        Args:
            request, tensors: as a session sent them.
            on_step: told (steps done, steps planned) before each block of steps; raises to cancel.

        Raises:
            RequestError, ProgramError, PolicyError, BudgetError: nothing was touched, nothing spent.
            Cancelled, RefusedError: it stopped on the way; the steps that ran stay charged.
        """
        ask = messages.decode(request)
        policy, cohort = self._policy(), self._cohort(ask.dataset)
        self._permit(policy, caller, ask)
        account = policy.project(caller.project)
        question = hashlib.sha256(request + hashlib.sha256(tensors).digest()).digest()
        if (before := self._ledger.settled(caller.job, question)) is not None:
            body, blob, receipt = before  # its reply was lost on the way; it is paid for
            return self._release(caller.job, ask, account.delta, Answer(msgspec.json.decode(body)["values"], blob), receipt)
        plan = plan_of(ask, tensors, cohort.schema, account.delta, self._noise)
        for split in plan.touches:
            self._ledger.open_account(caller.project, ask.dataset, split, account.epsilon, account.delta)
        self._ledger.reserve(caller.job, caller.project, ask.dataset, plan.touches, plan.loss, question)
        answer, receipt = self._run(caller.job, plan, cohort, ask.split, on_step)
        return self._release(caller.job, ask, account.delta, answer, receipt)

    def _release(
        self, job: str, ask: Ask, delta: float, answer: Answer, receipt: Receipt
    ) -> tuple[Release, bytes]:
        fields = {name: getattr(ask, name) for name in ("dataset", "split", "epsilon")}
        release = Release(
            job=job,
            op=_op(ask),
            site=self._site,
            delta=delta,
            values=answer.values,
            tensors=hashlib.sha256(answer.tensors).hexdigest(),
            receipt=msgspec.to_builtins(receipt),
            simulated=self._simulated,
            **fields,
        )
        return release, answer.tensors

    def _cohort(self, dataset: str) -> Cohort:
        if dataset not in self._cohorts:
            known = ", ".join(sorted(self._cohorts)) or "none"
            raise RequestError(
                f"There is no dataset {dataset!r} here.", f"This site has: {known}.", "Name one of them.", field="dataset"
            )
        return self._cohorts[dataset]

    def _permit(self, policy: Policy, caller: Caller, ask: Ask) -> None:
        lane = LANES.get(_op(ask), "aggregate")
        metrics = getattr(ask, "metrics", ())
        release = policy.allows(caller.researcher, caller.project, ask.dataset, lane, metrics=metrics)
        if release != "auto":
            raise PolicyError(
                f"Answers of the lane {lane} are released here by {release}.",
                "This version of the site cannot collect a custodian's release yet, so it does not ask the records.",
                'Ask the custodians to sign release = "auto" for this lane, if they agree to that.',
            )
        if isinstance(ask, messages.Fit):
            policy.project(caller.project).within_size(ask.program)

    def _run(
        self, job: str, plan: Plan, cohort: Cohort, split: str, on_step: Callable[[int, int], None]
    ) -> tuple[Answer, Receipt]:
        done = 0

        def progress(steps: int) -> None:
            nonlocal done
            on_step(done, plan.steps)
            self._ledger.touch(job, steps)
            done += steps

        try:
            answer = plan.run(cohort.view(split), progress)
            receipt = self._ledger.settle(job, statement(answer.values, answer.tensors), answer.tensors)
            return answer, receipt
        except Cancelled as error:
            self._ledger.abandon(job, "cancelled")
            raise error from None
        except RaphaError:
            self._ledger.abandon(job, "refused")
            raise
        except BaseException as error:
            # an unforeseen error may carry a record: only its type is kept, for the custodian alone
            print(f"job {job}: {type(error).__name__}", file=sys.stderr)
            self._ledger.abandon(job, "failed")
            raise RefusedError(
                "The answer could not be computed.",
                "An internal error ended it; the steps that had run stay charged.",
                "Tell the site's custodian the job's number " + job + ".",
            ) from None


def _op(ask: Ask) -> str:
    return str(type(ask).__struct_config__.tag)
