"""Any function on the records themselves: no mechanism protects the patients here, two looks of the custodians do.

Before anything runs they approve the function by the hash of its source, its inputs, the environment and the
policy; what it answers waits in the airlock, with the findings of automatic checks, until they release it. It
runs in a fresh process behind the walls, with the time of one shard and nothing to reach; what it prints or
raises is gone. It has no privacy loss that could be stated, so its price is nought and its release says so.
"""

from __future__ import annotations

import builtins
import io
import re
from typing import Any

import msgspec
import polars.exceptions

from rapha_lab.curator import checks
from rapha_lab.curator.accounting import Reviewed
from rapha_lab.curator.cohort import View
from rapha_lab.curator.mechanisms import Answer, Plan, Progress
from rapha_lab.curator.mechanisms.aggregate import touched
from rapha_lab.curator.mechanisms.shards import Workers
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RaphaError, RequestError
from rapha_lab.protocol.messages import REVIEWED, Review
from rapha_lab.protocol.policy import unseen
from rapha_lab.protocol.release import canonical
from rapha_lab.protocol.schema import Schema

__all__ = ["as_shown", "plan"]

MOST_INPUTS, MOST_READ = 64 << 20, 1 << 20
"""Bytes of tensors, and of all that custodians read: more would neither be read nor fit a page, or the curator's memory."""

DEEPEST = 64
"""Levels of the description of its inputs; values that travel have half as many."""

_FAILED = re.compile(r"([A-Za-z]+) in line ([0-9]{1,6})")
_KINDS = {*vars(builtins), *vars(polars.exceptions), "LinAlgError", "RequestError"}
_LARGE = f"Its result is larger than {REVIEWED >> 20} MiB"


def as_shown(ask: Review) -> Review:
    """The request as custodians read it, which is what runs: to them 1.0 is 1, -0.0 is 0, and keys have no order.

    Raises:
        RequestError: it has a number that they would read as another, or is too long or nested too deeply to be read.
    """
    if len(messages.encode(ask)) > MOST_READ:
        raise RequestError(
            "The function and its inputs are too long to be read.",
            f"Custodians read all but tensors; the limit is {MOST_READ >> 20} MiB.",
            "Give numbers as arrays or tensors, and fewer texts.",
            field="inputs",
        )
    try:
        _hold_flat(ask.inputs, 0)
        shown = msgspec.json.decode(canonical(ask), type=Review)
        return msgspec.structs.replace(shown, derive={name: shown.derive[name] for name in ask.derive})
    except ValueError:
        raise RequestError(
            "The request has a whole number too large to be shown.",
            "Custodians would read another number than the function gets.",
            "Give it as a string, or in a tensor.",
            field="inputs",
        ) from None


def _hold_flat(part: Any, depth: int) -> None:
    if depth > DEEPEST:
        raise RequestError(
            "The inputs are nested too deeply.", f"The limit is {DEEPEST} levels.", field="inputs"
        )
    for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _hold_flat(each, depth + 1)


def plan(ask: Review, tensors: bytes, schema: Schema, workers: Workers) -> Plan:
    """How the function will be run.

    Raises:
        RequestError: naming the field that is out of range.
    """
    for name in ask.columns:
        schema.column(name)
    for name in ask.tables:
        schema.table(name)
    if strange := unseen(ask.source):
        raise RequestError(
            f"The source has an invisible character, U+{ord(strange[0]):04X}.",
            "Whoever approves it would read another program than the one that runs.",
            "Write it as an escape, or take it out.",
            field="source",
        )
    if len(tensors) > MOST_INPUTS:
        raise RequestError(
            "The inputs are too large.", f"The limit is {MOST_INPUTS >> 20} MiB.", field="inputs"
        )

    def run(view: View, progress: Progress) -> Answer:
        jobs = [_job(ask, tensors, view)]
        told = workers.answers(jobs, 1, REVIEWED, ask.seconds, lambda: progress(1), lambda: progress(0))
        return _answer(ask, told[0], view)

    return Plan(Reviewed(), 1, touched(ask.split), run, workers.waves(1))


def _job(ask: Review, tensors: bytes, view: View) -> bytes:
    """All that the worker is given: source, inputs, and the columns asked for."""
    records, sizes, frame = io.BytesIO(), list[int](), io.BytesIO()
    for part in (view.frame(ask.columns), *map(view.table, ask.tables)):
        begins = records.tell()
        part.write_ipc(records)
        sizes.append(records.tell() - begins)
    header = {
        "source": ask.source,
        "name": ask.name,
        "inputs": ask.inputs,
        "records": sizes,
        "tables": ask.tables,
    }
    messages.write_frame(frame, messages.encode(header), records.getvalue() + tensors)
    return frame.getvalue()


def _answer(ask: Review, told: bytes, view: View) -> Answer:
    """What the worker wrote, if it is a result in our own words; anything at all may have been written."""
    parcel, blob, failed = None, b"", "It gave no answer in its time, or ended in another way."
    try:
        frame = messages.read_frame(io.BytesIO(told), max_header=REVIEWED, max_tensors=REVIEWED)
        if frame is not None:
            said = msgspec.json.decode(frame[0], type=dict)
            parcel, blob, failed = said.get("parcel"), frame[1], _failure(said.get("failed"), ask.source)
            canonical(parcel)
    except (RaphaError, msgspec.DecodeError, ValueError, TypeError, RecursionError, UnicodeDecodeError):
        parcel, blob, failed = None, b"", "What it answered cannot be read."
    values: dict[str, Any] = {"kind": "review", "function": ask.name}
    if parcel is None:
        return Answer(values | {"failed": failed}, findings=("The function failed: there is no result.",))
    found = checks.result(parcel, blob, view, ask.tables)
    if found.stopped:
        return Answer(values | {"failed": f"It was stopped: {found.stopped}"}, findings=tuple(found.prompts))
    return Answer(values | {"parcel": found.parcel}, found.blob, tuple(found.prompts))


def _failure(said: Any, source: str) -> str:
    """How it failed, in one of few words: the function could have made an error whose name is a patient's."""
    found = _FAILED.fullmatch(said) if isinstance(said, str) else None
    if found and found[1] in _KINDS and int(found[2]) <= source.count("\n") + 1:
        return f"{found[1]} in line {int(found[2])}"
    return _LARGE if said == _LARGE else "It raised an error of its own, or ended in another way."
