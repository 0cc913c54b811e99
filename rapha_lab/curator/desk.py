"""The one way out: decode, policy, price, reserve, run, charge, log, release. No other path leads to a reply.

Everything that depends on a patient passes through `Desk.answer`, once, priced and logged.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol, get_args

import msgspec

from rapha_lab.curator import checks, clock
from rapha_lab.curator.accounting import epsilon_of
from rapha_lab.curator.ahead import Idle
from rapha_lab.curator.airlock import Airlock
from rapha_lab.curator.cohort import Cohort, View
from rapha_lab.curator.expressions import chosen
from rapha_lab.curator.funds import fund
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.mechanisms import Answer, Plan, aggregate, loop, review
from rapha_lab.curator.mechanisms.loop import Loop
from rapha_lab.curator.mechanisms.select import judged_by
from rapha_lab.curator.mechanisms.shards import Workers
from rapha_lab.curator.noise import Noise
from rapha_lab.curator.optouts import OptOuts
from rapha_lab.curator.plans import plan_of, words
from rapha_lab.protocol import messages
from rapha_lab.protocol.checkpoint import Receipt
from rapha_lab.protocol.errors import PolicyError, RaphaError, RefusedError, RequestError
from rapha_lab.protocol.messages import Ask
from rapha_lab.protocol.policy import Policy
from rapha_lab.protocol.policy import Release as Mode
from rapha_lab.protocol.program import Program
from rapha_lab.protocol.release import Release, canonical, statement
from rapha_lab.protocol.schema import Schema

__all__ = ["Caller", "Cancelled", "Desk", "permit"]


class OnStep(Protocol):
    """Told how far a request is, before each block of steps."""

    def __call__(self, done: int, planned: int, spent: float, doing: str = "", /) -> None:
        """Say the steps done and planned, and ε once the next block has run; or what is done before it.

        Raises to cancel.
        """
        ...


LANES = {"review": "review", "fit": "train", "open": "train", "evaluate": "evaluate", "shards": "shards"}

MOST_LOOPS = 8
"""Training loops that a researcher may have open at once."""


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


@dataclass
class _Opened:
    """A training loop that is open: whose, its mechanism, at which δ, on whom, and the policy that last let it go on."""

    owner: Caller
    loop: Loop
    delta: float
    view: View
    policy: Policy | None = None


class Desk:
    """Answers requests about the cohorts of one site.

    Args:
        policy: gives the custodians' policy as it stands; raises PolicyError if it is not in force.
        ledger: where budgets are kept and the log is written.
        cohorts: the records by dataset.
        noise: the cryptographic generator.
        site: the site's name, for the release.
        workers: where functions meet their shards.
        airlock: where answers wait for the custodians whom the policy names for their lane.
        reviews: the environment in which reviewed functions run, for custodians to approve; None where none may.
        opt_outs: who is left out; asked whenever a cohort is, before each block of steps too.
    """

    def __init__(
        self,
        policy: Callable[[], Policy],
        ledger: Ledger,
        cohorts: Mapping[str, Cohort],
        noise: Noise,
        site: str,
        workers: Workers | None = None,
        *,
        simulated: bool,
        airlock: Airlock | None = None,
        reviews: str | None = None,
        opt_outs: OptOuts | None = None,
    ) -> None:
        self._policy, self._ledger, self._cohorts, self._noise = policy, ledger, cohorts, noise
        self._site, self._workers, self._simulated = site, workers, simulated
        self._airlock, self._reviews, self._opt_outs = airlock or Airlock(ledger), reviews, opt_outs
        self._loops: dict[str, _Opened] = {}
        self._opening = threading.Lock()  # held by whoever opens a loop or takes one away

    def answer(
        self,
        caller: Caller,
        request: bytes,
        tensors: bytes,
        on_step: OnStep,
        later: Callable[[Idle], None] = lambda work: None,
        shared: loop.Read | None = None,
    ) -> tuple[Release | dict[str, Any], bytes]:
        """Answer one untrusted request.

        Args:
            request, tensors: as a session sent them.
            on_step: told how far it is.
            later: given what may be done once the answer is on its way, while nobody needs the thread.
            shared: gives the tensors of a loop's step that are in memory shared with its session.

        Raises:
            RequestError, ProgramError, PolicyError, BudgetError: nothing was touched, nothing spent.
            Cancelled, RefusedError: it stopped on the way; the steps that ran stay charged.
            WaitingError: it is computed, charged and logged, and waits for custodians; ask the same again.
        """
        ask = messages.decode(request)
        if isinstance(ask, messages.Review):
            ask = review.as_shown(ask)
        if isinstance(ask, messages.Gradient):
            return self._gradient(caller, ask, shared or (lambda most: tensors), on_step, later)
        if shared is not None:
            raise RequestError(
                "Only a step's tensors may be in shared memory.",
                instead="Send these with the request.",
                field="shared",
            )
        if isinstance(ask, messages.Close):
            return self._close(caller, ask)
        policy = self._policy()
        if isinstance(ask, messages.Price):
            self._permit(policy, caller, ask.ask)
            delta, schema = (
                policy.project(caller.project).delta,
                chosen(self._cohort(ask.ask.dataset), ask.ask).schema,
            )
            return {"epsilon": aggregate.epsilon_for(ask.ask, schema, delta, ask.error)}, b""
        mode = self._permit(policy, caller, ask)
        account, cohort = policy.project(caller.project), chosen(self._cohort(ask.dataset), ask)
        question = _question(caller, request, tensors)
        basis = _basis(policy, self._cohort(ask.dataset))
        if isinstance(ask, messages.Open):
            _at_once(mode)
            return self._open(caller, ask, cohort, policy, question)
        if (before := self._ledger.settled(question, basis, caller.job)) is not None:
            body, blob, receipt = (
                before  # it was asked before, or its reply was lost on the way: it is paid for
            )
            answer = Answer(msgspec.json.decode(body)["values"], blob)
            return self._release(
                receipt.job, ask, account.delta, answer, receipt, repeated=receipt.job != caller.job
            )
        plan = plan_of(
            ask,
            tensors,
            cohort.schema,
            account.delta,
            self._noise,
            self._workers,
            account.discovery_delta,
        )
        if isinstance(ask, messages.Review):
            self._approved(caller, ask, tensors, mode, policy)
        if mode != "auto":
            self._airlock.room(caller.researcher)
        fund(self._ledger, policy, caller.project, ask.dataset, plan.touches)
        self._ledger.reserve(
            caller.job, caller.project, ask.dataset, plan.touches, plan.loss, question, basis
        )

        funded = policy

        def told(done: int, planned: int, ran: int, doing: str) -> None:
            nonlocal funded
            now = self._policy()
            self._permit(now, caller, ask)  # a veto or a revocation holds from the next step on
            if now is not funded:  # and so does a smaller budget
                fund(self._ledger, now, caller.project, ask.dataset, plan.touches)
                funded = now
            on_step(done, planned, epsilon_of(plan.loss.part(ran), account.delta), doing)

        hold = self._hold(caller, ask, mode, account.delta)
        tell = partial(_told, caller.job, ask, account.delta)
        answer, receipt = self._run(caller.job, plan, cohort, ask.split, told, mode, tell, hold)
        return self._release(caller.job, ask, account.delta, answer, receipt)

    # -- a training loop: reserved when it opens, charged step by step, logged when it closes ---------------

    def _open(
        self, caller: Caller, ask: messages.Open, cohort: Cohort, policy: Policy, question: bytes
    ) -> tuple[dict[str, Any], bytes]:
        delta = policy.project(caller.project).delta
        found = loop.plan(ask, cohort.schema, delta, self._noise)
        with self._opening:
            if self._open_loops(caller.researcher) >= MOST_LOOPS:
                raise RequestError(
                    "You have too many training loops open.",
                    f"Each holds a part of the budget; {MOST_LOOPS} are the most.",
                    "Run one to its end, or leave its for loop.",
                    field="op",
                )
            fund(self._ledger, policy, caller.project, ask.dataset, found.touches)
            self._ledger.reserve(caller.job, caller.project, ask.dataset, found.touches, found.loss, question)
            self._loops[caller.job] = _Opened(caller, found, delta, cohort.view(ask.split))
        return {"loop": caller.job, "noise": found.sigma, "rate": found.rate}, b""

    def _open_loops(self, researcher: str) -> int:
        """How many loops a researcher has open; those that the ledger has ended, whose turn it was for too long, are none."""
        self._loops = {job: kept for job, kept in self._loops.items() if self._ledger.is_open(job)}
        return sum(kept.owner.researcher == researcher for kept in self._loops.values())

    def _gradient(
        self,
        caller: Caller,
        ask: messages.Gradient,
        read: loop.Read,
        on_step: OnStep,
        later: Callable[[Idle], None],
    ) -> tuple[dict[str, Any], bytes]:
        kept, policy = self._loop(caller, ask.loop), self._policy()
        found, delta, view = kept.loop, kept.delta, kept.view
        self._cohort(found.ask.dataset)  # who opted out since the last step is in none any more
        if kept.policy is not policy or ask.program is not None:
            for program in [ask.program, *(found.programs if kept.policy is not policy else ())]:
                _at_once(self._permit(policy, caller, found.ask, program=program))
            if kept.policy is not policy:
                fund(self._ledger, policy, caller.project, found.ask.dataset, found.touches)
            kept.policy = policy

        def progress(steps: int, doing: str = "") -> None:
            if not steps:
                return on_step(found.done, 0, 0.0, doing)  # of a block that was announced
            ran = min(found.done + steps, found.ask.steps)
            on_step(found.done, found.ask.steps, epsilon_of(found.loss.part(ran), delta))
            self._ledger.touch(ask.loop, steps)

        try:
            given = found.gradient(ask, read, view, progress).tensors
        except RaphaError:
            raise
        except BaseException as error:
            print(f"job {caller.job}: {type(error).__name__}", file=sys.stderr)
            raise _failed(caller.job) from None
        later(found.work_ahead)
        return {}, given

    def _close(self, caller: Caller, ask: messages.Close) -> tuple[Release | dict[str, Any], bytes]:
        with self._opening:
            kept = self._loop(caller, ask.loop)
            del self._loops[ask.loop]
        found, delta, opened = kept.loop, kept.delta, kept.loop.ask
        if not found.done:
            self._ledger.abandon(ask.loop, "no step was taken")
            return {}, b""
        values = {"kind": "fit", "steps": found.done, "noise": found.sigma, "clip": opened.clip}
        values |= {"rate": found.rate, "batch": opened.batch, "engine": found.engine}
        answer = Answer(values | words(opened))
        receipt = self._ledger.settle(
            ask.loop,
            statement(_told(ask.loop, opened, delta, answer)),
            about=self._about("auto", opened.dataset, ask.loop),
        )
        return self._release(ask.loop, opened, delta, answer, receipt)

    def _loop(self, caller: Caller, job: str) -> _Opened:
        kept = self._loops.get(job)
        if kept is None or replace(kept.owner, job=caller.job) != caller:
            raise RequestError(
                "There is no such loop.",
                "It was closed, waited for too long between two steps, or is another's.",
                "Open one.",
                field="loop",
            )
        return kept

    def sweep(self, cell: str) -> None:
        """Close the loops that a cell left open; the steps that ran stay charged."""
        with self._opening:
            left = [job for job in self._loops if job.startswith(f"{cell}-")]
            for job in left:
                del self._loops[job]
        for job in left:
            with contextlib.suppress(RequestError):  # it timed out before
                self._ledger.abandon(job, "left open")

    # -- what both ways share ------------------------------------------------------------------------------

    def _release(
        self, job: str, ask: Ask, delta: float, answer: Answer, receipt: Receipt, *, repeated: bool = False
    ) -> tuple[Release, bytes]:
        self._airlock.pass_answer(job)
        told = _told(job, ask, delta, answer) | {"repeated": repeated}
        site = {"site": self._site, "simulated": self._simulated, "receipt": msgspec.to_builtins(receipt)}
        return msgspec.convert(told | site, Release), answer.tensors

    def collect(self, caller: Caller, subject: str) -> tuple[Release, bytes]:
        """An answer that waited in the airlock, once it may leave, for whom the session is gone that asked for it.

        Raises:
            PolicyError: the policy would not let it be asked any more.
            WaitingError, RefusedError: the custodians have not approved it.
        """
        held = self._airlock.answer(caller.researcher, subject)
        self._policy().allows(caller.researcher, held.project, held.dataset, held.lane)
        self._airlock.pass_answer(held.job)
        kept = self._ledger.kept(held.job)
        if kept is None:
            raise RequestError("The answer is not there.", field="subject")
        told = msgspec.json.decode(held.document)["release"]
        site = {"site": self._site, "simulated": self._simulated, "receipt": msgspec.to_builtins(kept[1])}
        return msgspec.convert(told | site, Release), kept[0]

    def _approved(
        self, caller: Caller, ask: messages.Review, tensors: bytes, mode: Mode, policy: Policy
    ) -> None:
        """Return if custodians approved this very function, with its inputs, here and under this policy.

        Raises:
            WaitingError, RefusedError: they did not, or not yet; nothing ran.
        """
        if self._reviews is None:
            raise RefusedError(
                "No function is reviewed here.",
                "It would run on records, which needs all walls around it, and this site's sandbox is not of tier S3.",
                "Ask for something else, or ask the site's operator.",
            )
        asks = msgspec.to_builtins(ask) | {"tensors": hashlib.sha256(tensors).hexdigest()}
        about = {"researcher": caller.researcher, "project": caller.project, "dataset": ask.dataset}
        where = {
            "site": self._site,
            "environment": self._reviews,
            "policy": policy.hash.hex(),
            "split": ask.split,
        }
        document = canonical({"kind": "function", "asks": asks, "mode": mode, **about, **where})
        found = checks.source(ask.source)
        self._airlock.propose(
            document, tensors, findings=found, job=caller.job, lane="review", mode=mode, **about
        )
        self._airlock.pass_function(document)

    def _hold(self, caller: Caller, ask: Ask, mode: Mode, delta: float) -> Callable[[Answer, Any], None]:
        """What lets an answer wait, in the transaction that charges it; nothing where none has to."""
        lane = _lane(ask)
        about = {"researcher": caller.researcher, "project": caller.project, "dataset": ask.dataset}

        def hold(answer: Answer, db: Any) -> None:
            if mode != "auto":
                told = {"release": _told(caller.job, ask, delta, answer), "lane": lane, "mode": mode}
                document = canonical({"kind": "answer", **about, **told})
                found = [*answer.findings, *checks.tensors(answer.tensors)]
                waits = {"job": caller.job, "lane": lane, "mode": mode, "findings": found}
                self._airlock.hold(db, "answer", document, **about, **waits)

        return hold

    def _cohort(self, dataset: str) -> Cohort:
        if dataset not in self._cohorts:
            known = ", ".join(sorted(self._cohorts)) or "none"
            raise RequestError(
                f"There is no dataset {dataset!r} here.",
                f"This site has: {known}.",
                "Name one of them.",
                field="dataset",
            )
        cohort = self._cohorts[dataset]
        if self._opt_outs is not None:
            self._opt_outs.apply(cohort)
        return cohort

    def _about(self, mode: Mode, dataset: str, job: str) -> dict[str, str]:
        """Labels of a charge: who released it, and which list of opt-outs was in force, for who holds the key."""
        listed = {"opt-outs": self._opt_outs.label(dataset, job)} if self._opt_outs is not None else {}
        return {"mode": mode} | listed

    def _permit(self, policy: Policy, caller: Caller, ask: Ask, program: Program | None = None) -> Mode:
        schema, metrics = self._cohort(ask.dataset).schema, getattr(ask, "metrics", ())
        mode = permit(policy, caller, _lane(ask), schema, ask.split, metrics)
        if isinstance(ask, messages.Fit) and ask.selection is not None:
            # beside weights its answer has a metric of the judges: the stricter of both lanes' rules holds
            judged = permit(policy, caller, "evaluate", schema, messages.JUDGES, [judged_by(ask.selection)])
            mode = max(mode, judged, key=get_args(Mode).index)
        program = ask.program if isinstance(ask, messages.Fit) else program
        if program is not None:
            policy.project(caller.project).within_size(program)
        return mode

    def _run(
        self,
        job: str,
        plan: Plan,
        cohort: Cohort,
        split: str,
        told: Callable[[int, int, int, str], None],
        mode: Mode,
        tell: Callable[[Answer], dict[str, Any]],
        hold: Callable[[Answer, Any], None],
    ) -> tuple[Answer, Receipt]:
        done = beats = 0

        def progress(steps: int, doing: str = "") -> None:
            nonlocal done, beats
            told(done + beats, plan.steps + plan.beats, done + steps, doing)
            if steps:
                self._ledger.touch(job, steps)
            done, beats = done + steps, beats + (not steps and not doing)

        began = clock.now()
        try:
            try:
                answer = plan.run(cohort.view(split), progress)
            finally:
                clock.wait(began)  # else the log's order would tell which of two jobs was done first
            answer = _blinded(answer)
            about = self._about(mode, cohort.schema.name, job)
            said, wait = statement(tell(answer)), partial(hold, answer)
            return answer, self._ledger.settle(job, said, answer.tensors, about=about, also=wait)
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
            raise _failed(job) from None


def _question(caller: Caller, request: bytes, tensors: bytes) -> bytes:
    """A digest of who asked what: only to the same, of the same records, is a settled answer given again."""
    parts = caller.researcher.encode(), caller.project.encode(), request, tensors
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def _basis(policy: Policy, cohort: Cohort) -> bytes:
    """A digest of what else makes it the same question: the page, the records as this process read them, and the day.

    It tells neither whether records changed from one start to the next nor when somebody opted out: what is given
    again is what its reader had before, and from the next day on it is asked anew, of those who are left.
    """
    return hashlib.sha256(policy.hash + cohort.snapshot + _today().encode()).digest()


def _today() -> str:
    return str(datetime.now(UTC).date())


def permit(
    policy: Policy, caller: Caller, lane: str, schema: Schema, split: str, metrics: Iterable[str]
) -> Mode:
    """Who releases the answer, if the policy lets the caller's questions of this lane be answered.

    Raises:
        PolicyError: it does not.
    """
    mode = policy.allows(caller.researcher, caller.project, schema.name, lane, metrics=metrics)
    smallest, expected = policy.project(caller.project).smallest_cohort, schema.expected(split)
    if expected is not None and expected < smallest:
        raise PolicyError(
            f"The split {split} of {schema.name} is too small.",
            f"About {expected:.0f} patients are expected; the policy asks for {smallest} or more.",
            "Ask about a larger split.",
            field="split",
        )
    return mode


def _at_once(mode: Mode) -> None:
    """A loop's gradients leave step by step: nobody could look at each."""
    if mode != "auto":
        raise PolicyError(
            f"Answers of the lane train are released here by {mode}.",
            "A training loop of your own gets a private gradient at every step, and none of them can wait.",
            "Use patients.train.fit(...), whose one answer can.",
        )


def _blinded(answer: Answer) -> Answer:
    """The answer with a random number, so that nobody finds out what it is by trying answers against its hash.

    The log is for everybody's eyes, and has the hash before custodians have said that the answer may leave.
    """
    return replace(answer, values=answer.values | {"nonce": os.urandom(16).hex()})


def _told(job: str, ask: Ask, delta: float, answer: Answer) -> dict[str, Any]:
    """The release of an answer as the curator knows it: all but the site's name and the receipt."""
    fields = {name: getattr(ask, name) for name in ("dataset", "split", "epsilon")}
    tensors = hashlib.sha256(answer.tensors).hexdigest()
    if isinstance(ask, messages.Discover):
        delta += answer.values["discovery_delta"]
    return {"job": job, "op": _op(ask), "delta": delta, "values": answer.values, "tensors": tensors, **fields}


def _failed(job: str) -> RefusedError:
    return RefusedError(
        "The answer could not be computed.",
        "An internal error ended it; the steps that had run stay charged.",
        f"Tell the site's custodian the job's number {job}.",
    )


def _lane(ask: Ask) -> str:
    return LANES.get(_op(ask), "aggregate")


def _op(ask: Ask) -> str:
    return str(type(ask).__struct_config__.tag)
