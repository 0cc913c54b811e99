"""A desk's mistakes: each changes one thing about the order in which it reserves, runs, charges and releases."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from rapha_lab.curator import desk as desk_module
from rapha_lab.curator.cohort import View
from rapha_lab.curator.desk import Caller, Cancelled, Desk
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.mechanisms import Answer
from rapha_lab.curator.plans import plan_of
from rapha_lab.protocol import messages
from rapha_lab.protocol.checkpoint import Receipt


def noted(ledger: Any, job: str) -> None:
    """Tell a watched ledger's witness whose records are looked at, since the journal is not asked first."""
    if hasattr(ledger, "witness"):
        ledger.witness.job = job


@contextlib.contextmanager
def replaced(of: Any, name: str, by: Any) -> Iterator[None]:
    """With another attribute for a while."""
    own = vars(of).get(name)
    setattr(of, name, by)
    try:
        yield
    finally:
        if own is None:
            delattr(of, name)
        else:
            setattr(of, name, own)


class ChargesAfterTheRelease(Desk):
    """Lets the answer out, then settles."""

    out: Callable[[dict[str, Any], bytes], None]

    def _run(self, *args: Any) -> Any:
        honest = self._ledger.settle

        def settle(job: str, release: bytes, tensors: bytes = b"", **more: Any) -> Any:
            self.out({"id": job, "release": {"values": json.loads(release)["values"]}}, tensors)
            return honest(job, release, tensors, **more)

        self._ledger.settle = settle  # type: ignore[method-assign]
        try:
            return super()._run(*args)
        finally:
            self._ledger.settle = honest  # type: ignore[method-assign]


class RunsBeforeItReserves(Desk):
    """Reserves, touches and settles what it has computed already."""

    def answer(self, caller: Caller, request: bytes, tensors: bytes, *rest: Any) -> Any:
        ask = messages.decode(request)
        if isinstance(ask, messages.Mean | messages.Fit):
            plan = plan_of(ask, tensors, self._cohort(ask.dataset).schema, 1e-5, self._noise)
            noted(self._ledger, caller.job)
            computed = plan.run(self._cohort(ask.dataset).view(ask.split), lambda *_: None)

            def run(view: View, progress: Callable[[int], None]) -> Answer:
                progress(plan.steps)
                return computed

            with replaced(desk_module, "plan_of", lambda *_: dataclasses.replace(plan, run=run)):
                return super().answer(caller, request, tensors, *rest)
        return super().answer(caller, request, tensors, *rest)


class TouchesAfterItRan(Desk):
    """Journals a block when the next begins."""

    def _run(self, *args: Any) -> Any:
        late: list[int] = []
        honest = self._ledger.touch

        def touch(job: str, steps: int) -> None:
            noted(self._ledger, job)
            while late:
                honest(job, late.pop())
            late.append(steps)

        def settle(job: str, *rest: Any, **more: Any) -> Any:
            while late:
                honest(job, late.pop())
            return Ledger.settle(self._ledger, job, *rest, **more)

        with replaced(self._ledger, "touch", touch), replaced(self._ledger, "settle", settle):
            return super()._run(*args)


class AbandonsNothing(Desk):
    """Leaves a job that stopped on the way open."""

    def _run(self, *args: Any) -> Any:
        with replaced(self._ledger, "abandon", lambda job, why: None):
            return super()._run(*args)


class RefundsWhatStopped(Desk):
    """Gives back a cancelled job's whole price."""

    def _run(self, job: str, *rest: Any) -> Any:
        try:
            return super()._run(job, *rest)
        except Cancelled:
            for account, *_ in self._ledger._charges(job):
                db = self._ledger._db
                db.execute("UPDATE charge SET units = 0 WHERE job = ?", (job,))
                spent = db.execute(
                    "SELECT sum(units) FROM charge WHERE account = ?", (account.number,)
                ).fetchone()[0]
                db.execute("UPDATE account SET spent = ? WHERE number = ?", (spent, account.number))
            raise


class SettlesNothing(Desk):
    """Answers and leaves the books as they are."""

    def _run(self, *args: Any) -> Any:
        first = self._ledger.record("cell", source="")

        def settle(job: str, *rest: Any, **more: Any) -> Any:
            return Receipt(job, first, b"", [], self._ledger.log.checkpoint())

        with replaced(self._ledger, "settle", settle):
            return super()._run(*args)


class ForgetsASplit(Desk):
    """Charges one of the splits it looks at."""

    def answer(self, caller: Caller, *rest: Any) -> Any:
        def reserve(job: str, project: str, dataset: str, splits: Any, *more: Any) -> None:
            type(self._ledger).reserve(self._ledger, job, project, dataset, splits[:1], *more)

        with replaced(self._ledger, "reserve", reserve):
            return super().answer(caller, *rest)


class RunsASettledJobAgain(Desk):
    """Computes a settled job's answer anew, at no price."""

    def answer(self, caller: Caller, request: bytes, tensors: bytes, *rest: Any) -> Any:
        ask = messages.decode(request)
        if isinstance(ask, messages.Mean | messages.Fit) and self._ledger.release_of(caller.job) is not None:
            plan = plan_of(ask, tensors, self._cohort(ask.dataset).schema, 1e-5, self._noise)
            answer = plan.run(self._cohort(ask.dataset).view(ask.split), lambda *_: None)
            receipt = self._ledger.receipt_of(caller.job)
            assert receipt is not None
            return self._release(caller.job, ask, 1e-5, answer, receipt)
        return super().answer(caller, request, tensors, *rest)


class GivesAnotherQuestionTheOldAnswer(Desk):
    """Takes a job's number for its question."""

    def answer(self, caller: Caller, request: bytes, tensors: bytes, *rest: Any) -> Any:
        def settled(question: bytes, *rest: Any) -> Any:
            row = self._ledger._db.execute("SELECT request FROM job WHERE name = ?", (caller.job,)).fetchone()
            return Ledger.settled(self._ledger, row[0] if row else question, *rest)

        with replaced(self._ledger, "settled", settled):
            return super().answer(caller, request, tensors, *rest)


class LeavesLoopsOpen(Desk):
    """Does not end what a cell left open."""

    def sweep(self, cell: str) -> None:
        self._loops.clear()


class StepsForFree(Desk):
    """Journals no step of a loop."""

    def _gradient(self, *args: Any) -> Any:
        def touch(job: str, steps: int) -> None:
            noted(self._ledger, job)

        with replaced(self._ledger, "touch", touch):
            return super()._gradient(*args)


MISTAKES: dict[str, type[Desk]] = {
    kind.__name__: kind
    for kind in (
        ChargesAfterTheRelease,
        RunsBeforeItReserves,
        TouchesAfterItRan,
        AbandonsNothing,
        RefundsWhatStopped,
        SettlesNothing,
        ForgetsASplit,
        RunsASettledJobAgain,
        GivesAnotherQuestionTheOldAnswer,
        LeavesLoopsOpen,
        StepsForFree,
    )
}
