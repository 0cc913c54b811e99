"""Which mechanism answers which request."""

from __future__ import annotations

from rapha_lab.curator.mechanisms import Plan, aggregate, evaluate, shards, train
from rapha_lab.curator.mechanisms.shards import Workers
from rapha_lab.curator.noise import Noise
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RefusedError, RequestError
from rapha_lab.protocol.messages import Count, Histogram, Mean
from rapha_lab.protocol.schema import Schema

__all__ = ["plan_of"]


def plan_of(
    ask: messages.ASKS,
    tensors: bytes,
    schema: Schema,
    delta: float,
    noise: Noise,
    workers: Workers | None = None,
) -> Plan:
    """What answering `ask` would do and cost; no record is touched.

    Raises:
        RequestError, ProgramError: naming the field at fault and the fix.
        RefusedError: a function on shards is asked where there are no workers for it.
    """
    if isinstance(ask, messages.Fit):
        return train.plan(ask, tensors, schema, delta, noise)
    if isinstance(ask, messages.Evaluate):
        return evaluate.plan(ask, tensors, schema, delta)
    if isinstance(ask, Count | Mean | Histogram):
        return aggregate.plan(ask, schema, delta)
    if isinstance(ask, messages.Shards):
        if workers is None:
            raise RefusedError("No functions on shards run here.")
        return shards.plan(ask, schema, delta, workers)
    raise RequestError("A loop is opened, stepped and closed.", "It is no single question.", field="op")
