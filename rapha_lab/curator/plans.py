"""Which mechanism answers which request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rapha_lab.curator.cohort import View
from rapha_lab.curator.mechanisms import (
    Answer,
    Plan,
    Progress,
    aggregate,
    concordance,
    discover,
    evaluate,
    review,
    select,
    shards,
    train,
)
from rapha_lab.curator.mechanisms.shards import Workers
from rapha_lab.curator.noise import Noise
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RefusedError, RequestError
from rapha_lab.protocol.expression import text
from rapha_lab.protocol.messages import Aggregate, Ask
from rapha_lab.protocol.schema import Schema

__all__ = ["plan_of", "words"]

LONGEST = 1000
"""Characters of an expression that a release repeats."""


def plan_of(
    ask: messages.ASKS,
    tensors: bytes,
    schema: Schema,
    delta: float,
    noise: Noise,
    workers: Workers | None = None,
    discovery: float = 0.0,
) -> Plan:
    """What answering `ask` would do and cost; no record is touched.

    Args:
        delta, discovery: the policy's δ, and its δ for discovered keys.
        schema: what is public of the patients asked about, derived columns included.

    Raises:
        RequestError, ProgramError: naming the field at fault and the fix.
        RefusedError: a function on shards is asked where there are no workers for it.
        PolicyError: keys are asked for where the policy lets none be discovered.
    """
    if not isinstance(ask, Ask):
        raise RequestError("A loop is opened, stepped and closed.", "It is no single question.", field="op")
    if isinstance(ask, messages.Discover):
        plan = discover.plan(ask, schema, delta, discovery)
    else:
        plan = _plan(ask, tensors, schema, delta, noise, workers)

    def run(view: View, progress: Progress) -> Answer:
        answer = plan.run(view, progress)
        return replace(answer, values=answer.values | words(ask))

    return replace(plan, run=run)


def words(ask: Ask) -> dict[str, Any]:
    """What a release says of the patients it is about and of columns made for it."""
    where = {"where": text(ask.where)[:LONGEST]} if ask.where is not None else {}
    derived = {name: text(expression)[:LONGEST] for name, expression in ask.derive.items()}
    return where | ({"derived": derived} if derived else {})


def _plan(
    ask: Ask, tensors: bytes, schema: Schema, delta: float, noise: Noise, workers: Workers | None
) -> Plan:
    if isinstance(ask, messages.Fit):
        return (select if ask.selection else train).plan(ask, tensors, schema, delta, noise)
    if isinstance(ask, messages.Evaluate) and "concordance" in ask.metrics:
        return concordance.plan(ask, tensors, schema)
    if isinstance(ask, messages.Evaluate):
        return evaluate.plan(ask, tensors, schema, delta)
    if isinstance(ask, Aggregate):
        return aggregate.plan(ask, schema, delta)
    if isinstance(ask, messages.Shards | messages.Review):
        if workers is None:
            raise RefusedError("No functions run here.")
        if isinstance(ask, messages.Review):
            return review.plan(ask, tensors, schema, workers)
        return shards.plan(ask, schema, delta, workers)
    raise RequestError("A loop is opened, stepped and closed.", "It is no single question.", field="op")
