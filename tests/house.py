"""A curator in this process: real desk, ledger, cohort and noise, asked by a session's own handle; only walls are missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import polars
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.curator.ahead import Idle
from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.desk import Caller, Desk
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.noise import Noise, SystemNoise
from rapha_lab.protocol import messages
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import Policy
from rapha_lab.protocol.release import Release
from rapha_lab.protocol.schema import Schema
from rapha_lab.session.patients import Patients

DELTA = 1e-5


class House:
    """Records with a budget; `patients` is what a cell would hold.

    Attributes:
        releases: every answer that was given.
        steps: of each announcement of steps, how many.
        works_ahead: whether a loop's steps are prepared.
    """

    def __init__(
        self,
        folder: Path,
        schema: dict[str, Any],
        frame: polars.DataFrame,
        *,
        epsilon: float = 100.0,
        noise: Noise | None = None,
        largest_model: int = 1_000_000,
        tables: Mapping[str, polars.DataFrame] = MappingProxyType({}),
        discovery: float = 0.0,
        metrics: Sequence[str] = ("auroc", "brier"),
    ) -> None:
        self.schema, self.releases, self.steps = Schema.from_dict(schema), list[Release](), list[int]()
        self.key, self._numbers = str(PrivateKey.create().public), count(1)
        self.policy = _policy(self.key, self.schema.name, epsilon, largest_model, discovery, metrics)
        self.ledger = Ledger(folder / "ledger.sqlite", Ed25519PrivateKey.generate())
        self.cohort = Cohort(self.schema, frame, salt=bytes(range(16)), tables=tables)
        cohorts = {self.schema.name: self.cohort}
        self.desk = Desk(
            lambda: self.policy, self.ledger, cohorts, noise or SystemNoise(), "house", simulated=True
        )
        self.told: list[tuple[Any, ...]] = []
        self.works_ahead = True
        touch = self.ledger.touch

        def noted(job: str, steps: int) -> None:
            touch(job, steps)
            self.steps.append(steps)

        self.ledger.touch = noted  # type: ignore[method-assign]

    @property
    def patients(self) -> Patients:
        """A new handle."""
        return Patients(self.schema, self.ask, released=self.releases.append)

    def ask(self, request: messages.ASKS, tensors: bytes) -> tuple[dict[str, Any], bytes]:
        """One request, as the session's pipe would carry it."""
        caller = Caller(self.key, "p", f"c-{next(self._numbers)}")
        idle = list[Idle]()
        answer, blob = self.desk.answer(
            caller, messages.encode(request), tensors, lambda *far: self.told.append(far), idle.append
        )
        for work in idle:  # as a thread of the curator's does that nobody needs
            work(lambda: not self.works_ahead)
        return (msgspec.to_builtins(answer) if isinstance(answer, Release) else answer), blob

    def spent(self, split: str = "train") -> float:
        """The ε of all that was charged to the split so far."""
        return self.ledger.statement("p", self.schema.name, split).spent


def _policy(
    key: str, dataset: str, epsilon: float, largest: int, discovery: float, metrics: Sequence[str]
) -> Policy:
    lanes = "\n".join(f'lanes.{lane}.release = "auto"' for lane in ("aggregate", "train", "evaluate"))
    return Policy.parse(f"""
[policy]
name = "House rules"
version = 1
purpose = ["DUO:0000042"]
expires = 2099-01-01
quorum = 1
[[custodians]]
name = "C"
role = "Guardian"
key = "{PrivateKey.create().public}"
[[datasets]]
name = "{dataset}"
measurements = ["any simulated"]
sandbox = "S1"
delta = {DELTA}
[[projects]]
name = "p"
researchers = ["{key}"]
datasets = ["{dataset}"]
epsilon = {epsilon}
delta = {DELTA}
discovery_delta = {discovery}
largest_model = {largest}
smallest_cohort = 10
metrics = {json.dumps(list(metrics))}
{lanes}
""")


def numbers(name: str, columns: int, patients: int, *, outcome: bool = True) -> dict[str, Any]:
    """A schema of `columns` numbers within ±1, called x0, x1, ..., and a boolean `y`."""
    found: list[dict[str, Any]] = [
        {"name": f"x{k}", "type": "number", "bounds": [-1, 1], "meaning": "A number.", "public": "By design."}
        for k in range(columns)
    ]
    if outcome:
        found.append({"name": "y", "type": "boolean", "meaning": "Yes or no.", "public": "By design."})
    about = {"title": name, "citation": "none", "licence": "none", "source": f"{name}.parquet"}
    return {"name": name, "patient": "pid", "patients": patients, "columns": found, **about}
