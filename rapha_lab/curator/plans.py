"""Which mechanism answers which request."""

from __future__ import annotations

from rapha_lab.curator.mechanisms import Plan, aggregate, evaluate, train
from rapha_lab.curator.noise import Noise
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Count, Histogram, Mean
from rapha_lab.protocol.schema import Schema

__all__ = ["plan_of"]


def plan_of(ask: messages.ASKS, tensors: bytes, schema: Schema, delta: float, noise: Noise) -> Plan:
    """What answering `ask` would do and cost; no record is touched.

    Raises:
        RequestError, ProgramError: naming the field at fault and the fix.
    """
    if isinstance(ask, messages.Fit):
        return train.plan(ask, tensors, schema, delta, noise)
    if isinstance(ask, messages.Evaluate):
        return evaluate.plan(ask, tensors, schema, delta)
    if isinstance(ask, Count | Mean | Histogram):
        return aggregate.plan(ask, schema, delta)
    raise RequestError("A loop is opened, stepped and closed.", "It is no single question.", field="op")
