"""Distinct patients by keys that nobody listed beforehand, such as the diagnosis codes of a table's rows.

Each patient counts for at most g = `ask.keys` of the keys in their own rows, chosen by a hash of patient and key alone,
so that in L2 one patient moves the counts by √g. Every key gets discrete Gaussian noise, and only those whose noisy
count reaches a threshold leave, in alphabetical order. The threshold is such that the keys that one patient alone has
pass it with a probability of δ' at most, which is charged beside ε (Wilson, Zhang, Lam, Desfontaines, Simmons-Marengo
and Gipson 2020; Desfontaines, Voss, Gipson and Mandayam 2022). The proof: docs/accounting.md, "Discovered keys".
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from scipy.special import ndtri

from rapha_lab.curator.accounting import (
    DELTA_UNIT,
    Gaussian,
    Thresholded,
    delta_budget,
    delta_price,
    noise_for,
)
from rapha_lab.curator.cohort import View
from rapha_lab.curator.expressions import rows_where
from rapha_lab.curator.mechanisms import Answer, Plan, Progress
from rapha_lab.curator.mechanisms.question import counted, gaussian, root, touched
from rapha_lab.curator.tables import PATIENT
from rapha_lab.protocol.errors import PolicyError, RequestError
from rapha_lab.protocol.expression import check_rows, text
from rapha_lab.protocol.messages import Discover
from rapha_lab.protocol.schema import Schema

__all__ = ["expect", "kept", "plan", "price", "threshold"]

KEY = r"^[ -~]{1,64}$"
"""What can be a key: 1 to 64 printable characters of ASCII, without spaces around. Anything else in a row is none."""


def plan(ask: Discover, schema: Schema, delta: float, discovery: float) -> Plan:
    """How keys will be discovered at the asked (epsilon, delta + δ').

    Args:
        delta: the policy's δ.
        discovery: the policy's total of δ for discovered keys.

    Raises:
        RequestError: naming the table or column that has no keys, or a δ' out of range.
        PolicyError: the policy lets no keys be discovered.
    """
    loss = price(ask, schema, delta, discovery)
    sd = loss.noise * root(ask.keys)
    least = threshold(sd, ask.keys, loss.delta)
    add_noise = gaussian(sd)

    def run(view: View, progress: Progress) -> Answer:
        progress(1)
        counts = Counter(key for _, key in kept(view, ask))
        names = sorted(counts)
        exact = np.array([counts[name] for name in names], dtype=np.int64)
        noisy = add_noise(exact) if names else []
        figures = [
            {"name": name} | counted(value, sd)
            for name, value in zip(names, noisy, strict=True)
            if value >= least
        ]
        among = {"among": text(ask.rows)} if ask.rows is not None else {}
        told = {"kind": "discovered", "unit": "patients", "table": ask.table, "by": [ask.column], **among}
        priced = {"cap": ask.keys, "threshold": least, "discovery_delta": loss.delta / DELTA_UNIT}
        return Answer(told | priced | {"figures": figures, "error": sd, "note": _note(ask.keys, least)})

    return Plan(loss, 1, touched(ask.split), run)


def price(ask: Discover, schema: Schema, delta: float, discovery: float) -> Thresholded:
    """The privacy loss of the discovery, the δ' it spends included: a tenth of the policy's total if not given.

    Raises:
        RequestError, PolicyError: as for `plan`.
    """
    table = schema.table(ask.table)
    check_rows(ask.rows, table, schema)
    column = next((each for each in table.columns if each.name == ask.column), None)
    if column is None or column.type != "text":
        names = ", ".join(each.name for each in table.columns if each.type == "text") or "none"
        what = f"The table {table.name} has no text column {ask.column!r}."
        instead = "Group by a column with public values; that takes no delta."
        raise RequestError(what, f"Keys are discovered in texts: {names}.", instead, field="column")
    if not delta_budget(discovery):
        raise PolicyError(
            "The policy lets no keys be discovered.",
            "A key that is not public leaves by a threshold, which takes a share of delta, and the project's "
            "discovery_delta is 0.",
            "Group by public values, or ask the custodians to sign a discovery_delta, such as 1e-6.",
            field="discovery_delta",
        )
    share = delta_budget(discovery) // 10 if ask.delta is None else delta_price(ask.delta)
    if not 0 < share <= delta_budget(discovery):
        what = f"A delta of {ask.delta or 0:g} is out of range."
        raise RequestError(
            what,
            f"The policy's discovery_delta is {discovery:g} in all.",
            "Give a smaller one.",
            field="delta",
        )
    return Thresholded(noise_for(Gaussian, ask.epsilon, delta), share)


def threshold(sd: float, keys: int, delta: int) -> int:
    """The least noisy count that leaves: 1 + noise reaches it in none of `keys` keys but for a chance of `delta`.

    Discrete Gaussian noise reaches k with a probability below that with which a normal one of the same `sd` reaches
    k - 1 (docs/accounting.md); the union bound over the keys.

    Args:
        delta: in units of 10^-18.
    """
    tail = delta / DELTA_UNIT / keys * (1 - 1e-9)  # less than its rounding and that of ndtri
    return 2 + max(0, math.ceil(-sd * float(ndtri(tail))))


def kept(view: View, ask: Discover) -> list[tuple[int, str]]:
    """Each patient's keys that count, at most `ask.keys` of a patient, as pairs of patient and key."""
    rows = rows_where(view, ask.table, {ask.column}, ask.rows)
    key = pl.col(ask.column).str.strip_chars()
    pairs = rows.select(PATIENT, key.alias("key")).filter(pl.col("key").str.contains(KEY)).unique()
    points = view.points().tolist()
    own: dict[int, list[str]] = {}
    for patient, name in pairs.iter_rows():
        own.setdefault(patient, []).append(name)
    for patient, names in own.items():
        if len(names) > ask.keys:
            names.sort(key=partial(_rank, points[patient]))
    return [(patient, name) for patient, names in own.items() for name in names[: ask.keys]]


def expect(ask: Discover, loss: Thresholded) -> dict[str, Any]:
    """The error of each count that leaves, and the threshold, before anything is asked."""
    sd = loss.noise * root(ask.keys)
    least = threshold(sd, ask.keys, loss.delta)
    figures = {"threshold, patients": float(least), "discovery delta": loss.delta / DELTA_UNIT}
    return {
        "noise": loss.noise,
        "error": sd,
        "unit": "patients",
        "figures": figures,
        "notes": [_note(ask.keys, least)],
    }


def _rank(point: int, name: str) -> bytes:
    return hashlib.blake2b(name.encode(), key=point.to_bytes(8), digest_size=16).digest()


def _note(keys: int, least: int) -> str:
    return (
        f"A patient counts for {keys} of their keys at most, so counts may be too small; keys of fewer than about {least} "
        "patients are mostly left out, and counts close to that are more often too large, which no interval shows."
    )
