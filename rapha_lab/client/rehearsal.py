"""Runs a cell here first, on made-up patients and a few steps: a typo costs seconds and no ε.

The same interpreter, mechanisms and checks as at the site, with a cohort drawn from the public schema alone.
"""

from __future__ import annotations

import copy
import io
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import msgspec
import polars
import torch

from rapha_lab.client.calls import called
from rapha_lab.client.mock import mock, mock_tables
from rapha_lab.client.nofiles import without_files
from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.expressions import chosen
from rapha_lab.curator.lift import lift
from rapha_lab.curator.mechanisms import Plan, Progress, aggregate, loop, shards
from rapha_lab.curator.noise import SystemNoise
from rapha_lab.curator.plans import plan_of, words
from rapha_lab.protocol import messages
from rapha_lab.protocol.columns import Column
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.expression import extended
from rapha_lab.protocol.messages import Split
from rapha_lab.protocol.release import Release
from rapha_lab.protocol.schema import Schema
from rapha_lab.session import checking, interpreter, parcels, recipe, shard
from rapha_lab.session.patients import Patients

__all__ = ["Rehearsal", "check", "encoded", "fix", "training"]

PATIENTS, STEPS, BATCH, SHARDS, DELTA = 400, 3, 64, 3, 1e-5

Tell = Callable[[int, int, str], None]


def _nobody(step: int, steps: int, doing: str) -> None:
    """Told by a rehearsal that nobody watches."""


class Rehearsal:
    """A session in this process on made-up patients, as long-lived as the one at the site.

    Attributes:
        namespace: what its cells defined. Nothing of a refused one, which never reaches the site.
        refused: the names that refused cells would have defined.
    """

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {}
        self.refused: set[str] = set()
        self._cohorts: dict[bytes, Cohort] = {}
        self._lock = threading.Lock()
        self._loop: loop.Loop
        self._tell: Tell = _nobody
        self._ran = 0

    def run(
        self,
        source: str,
        schema: Schema,
        *,
        epsilon: float | None,
        inputs: tuple[dict[str, Any], bytes] = ({}, b""),
        outputs: Sequence[str] = (),
        show: Callable[[dict[str, Any]], None] | None = None,
        largest_model: int | None = None,
        tell: Tell | None = None,
    ) -> None:
        """Run a cell with inputs as `send` packed them; what it shows goes to `show`, or nowhere, and `outputs` must travel.

        `tell` is given its step, of how many, and what is done before them.

        Raises:
            RaphaError: what would have failed at the site, before anything was sent.
        """
        with self._lock, self._kept_if_run():
            self._tell = tell or _nobody
            self.namespace.update(parcels.unpack(*inputs, into=self.namespace))
            self.namespace["patients"] = Patients(
                schema,
                partial(self._answer, schema),
                epsilon=epsilon,
                most_steps=STEPS,
                largest_model=largest_model,
            )
            screen = interpreter.Screen(show or (lambda output: None))
            self._ran += 1
            with without_files():
                interpreter.run(source, self.namespace, screen, f"<enclave cell {self._ran}>")
            parcels.pack(self.namespace, outputs)

    @contextmanager
    def _kept_if_run(self) -> Iterator[None]:
        """As at the site, nothing stays of a cell that is refused: else the next cell would be rehearsed on what is not there."""
        before = dict(self.namespace)
        try:
            yield
        except BaseException:
            self.refused |= self.namespace.keys() - before.keys()
            self.namespace.clear()
            self.namespace.update(before)
            raise
        self.refused -= self.namespace.keys()

    def _answer(self, schema: Schema, ask: messages.ASKS, tensors: bytes) -> tuple[dict[str, Any], bytes]:
        request = messages.decode(messages.encode(ask))
        if isinstance(request, messages.Open | messages.Gradient | messages.Close):
            return self._step(schema, request, tensors)
        if isinstance(request, messages.Price):
            full = extended(schema, request.ask.derive, request.ask.where)
            return {"epsilon": aggregate.epsilon_for(request.ask, full, DELTA, request.error)}, b""
        # priced as asked, so that an ε that no noise reaches fails here; then run short
        full = extended(schema, request.derive, request.where)
        whole = plan_of(request, tensors, full, DELTA, SystemNoise(), _Kernel(), DELTA)
        if isinstance(request, messages.Fit):
            steps, batch = min(request.steps, STEPS), min(request.batch, BATCH)
            request = msgspec.structs.replace(request, steps=steps, batch=batch)
        cohort = self._cohort(schema, request)
        small = cohort.schema
        if isinstance(request, messages.Shards):
            plan = _few(request, small, (schema.expected(request.split) or 0) / whole.beats)
        else:
            plan = plan_of(request, tensors, small, DELTA, SystemNoise(), _Kernel(), DELTA)
        answer = plan.run(cohort.view(request.split), self._told(plan.steps + plan.beats))
        release = Release(
            job=uuid.uuid4().hex,
            op=str(type(request).__struct_config__.tag),
            dataset=request.dataset,
            split=request.split,
            site="rehearsal on made-up patients",
            epsilon=request.epsilon,
            delta=DELTA,
            values=answer.values | words(request),
        )
        return msgspec.to_builtins(release), answer.tensors

    def _step(
        self, schema: Schema, request: messages.Open | messages.Gradient | messages.Close, tensors: bytes
    ) -> tuple[dict[str, Any], bytes]:
        """One step of a training loop, with small batches."""
        if isinstance(request, messages.Close):
            return {}, b""
        if isinstance(request, messages.Open):
            loop.plan(request, extended(schema, request.derive, request.where), DELTA, SystemNoise())
            small = msgspec.structs.replace(request, steps=STEPS, batch=min(request.batch, BATCH))
            self._loop = loop.plan(small, self._cohort(schema, request).schema, DELTA, SystemNoise())
            self._tell(0, STEPS, messages.PREPARES)
            return {"loop": "rehearsal", "noise": self._loop.sigma}, b""
        view = self._cohort(schema, self._loop.ask).view(self._loop.ask.split)
        told = self._told(STEPS, self._loop.done)
        return {}, self._loop.gradient(request, lambda most: tensors, view, told).tensors

    def _told(self, steps: int, done: int = 0) -> Progress:
        """Says how far a plan's run is."""
        beats = 0

        def progress(ran: int, doing: str = "", /) -> None:
            nonlocal done, beats
            self._tell(done + beats, steps, doing)
            done, beats = done + ran, beats + (not ran and not doing)

        return progress

    def _cohort(self, schema: Schema, ask: messages.Ask) -> Cohort:
        """A few made-up patients, and of them those that are asked about."""
        schema = msgspec.structs.replace(schema, patients=PATIENTS)
        known = schema.to_json()
        if known not in self._cohorts:
            tables = mock_tables(schema, PATIENTS, seed=0)
            self._cohorts[known] = Cohort(schema, mock(schema, PATIENTS, seed=0), bytes(16), tables=tables)
        return chosen(self._cohorts[known], ask)

    def take(self, values: dict[str, Any], blob: bytes, also: dict[str, Any]) -> dict[str, Any]:
        """The values a job brought back; modules are loaded into copies of the rehearsed ones, else into those of `also`.

        Copies, so that the next rehearsal's few steps on made-up patients leave the notebook's weights alone.
        """
        into = dict(also)
        for name in values.get("values", {}):
            if isinstance(rehearsed := self.namespace.get(name), torch.nn.Module):
                try:
                    into[name] = copy.deepcopy(rehearsed)
                except Exception:  # one that cannot be copied must not keep paid weights away
                    into[name] = rehearsed
        return parcels.unpack(values, blob, into=into)

    @staticmethod
    def send(namespace: dict[str, Any], names: list[str]) -> tuple[dict[str, Any], bytes]:
        """The named values of the notebook, packed for the site.

        Raises:
            RaphaError: a name is not defined, or its value does not travel.
        """
        return parcels.pack(namespace, names)


class _Kernel:
    """Functions meet a few made-up shards in this process: what they print shows, what they raise is raised."""

    def waves(self, k: int) -> int:
        return k

    def answers(
        self,
        jobs: Iterable[bytes],
        k: int,
        size: int,
        seconds: float,
        started: Callable[[], None],
        beat: Callable[[], None],
    ) -> list[bytes]:
        told, times = [], []
        for job in islice(jobs, SHARDS):
            frame, begun = messages.read_frame(io.BytesIO(job)), time.perf_counter()
            assert frame is not None
            told.append(_worked(*frame))
            times.append(time.perf_counter() - begun)
        if min(times) > seconds:
            raise RequestError(
                f"A shard took {min(times):.2g} seconds here.",
                f"At the site it may take {seconds:g}; then the default stands for it, and nobody is told.",
                f"Say seconds={2 * min(times):.1g}, say.",
                field="seconds",
            )
        return [told[number % len(told)] for number in range(k)]


def _worked(header: bytes, blob: bytes) -> bytes:
    """As in a worker, but that what a reviewed function raises is raised here."""
    if "shape" not in msgspec.json.decode(header):
        shard.reviewed(header, blob)
    return shard.answered(header, blob)


def _few(request: messages.Shards, small: Schema, patients: float) -> Plan:
    """The same question on made-up shards of as many patients as at the site."""
    k = max(SHARDS, round((small.expected(request.split) or 0) / patients))
    return shards.plan(msgspec.structs.replace(request, k=k), small, DELTA, _Kernel(), least=1, fewest=1)


fix = called("rapha.fix(model)")(checking.fix)


@called('rapha.check(model, loss, FEATURES, "death", of=cohort)')
def check(model: Any, loss: Any, inputs: Any, target: Any, *, of: Any = None) -> checking.Findings:
    """What will train, what will not, and the line to change; nothing is asked of a site and nothing spent.

    Args:
        model: an `nn.Module`.
        loss: of (prediction, target); the usual one of the target's type if None.
        inputs: columns as for `fit`, or a batch of made-up patients: a tensor, or tensors by argument.
        target: a column, or a tensor of made-up targets.
        of: the dataset, or `patients`, whose columns are meant.

    Returns:
        Findings: printed, they say it; as a condition, they are whether the model trains.

    Raises:
        RequestError: an argument is malformed.
    """
    return checking.check(model, loss, inputs, target, of=of, lift=lambda program: lift(program).paths)


def encoded(schema: Schema, patients: polars.DataFrame, columns: str | list[str]) -> torch.Tensor:
    """Local patients, or their rows in a table, as a program's input, by the very code that does it at the site."""
    if not isinstance(patients, polars.DataFrame):
        raise RequestError(
            f"The patients are a {type(patients).__name__}.", "They are read from a polars.DataFrame.",
            "Say polars.DataFrame({...}), or polars.from_pandas(frame).", field="patients",
        )  # fmt: skip
    schema.layout(columns)
    names = [columns] if isinstance(columns, str) else list(columns)
    _listed(schema, patients, names)
    table = schema.table_of(names[0]) if names else None
    if table is not None:
        people = patients.select(polars.col(table.patient).alias(schema.patient)).unique(maintain_order=True)
        anyone = Column(name="anyone", type="boolean", meaning="A patient.", public="By design.")
        part = msgspec.structs.replace(schema, columns=(anyone,), tables=(table,), patients=None)
        rows = people.with_columns(anyone=True)
        return Cohort(part, rows, bytes(16), tables={table.name: patients}).view("all").tensor(columns)
    asked = tuple({column.name: column for column, _ in map(schema.find, names)}.values())
    rows = patients.with_columns(polars.int_range(polars.len()).alias(schema.patient))
    part = msgspec.structs.replace(schema, columns=asked, tables=(), patients=None)
    return Cohort(part, rows, salt=bytes(16)).view("all").tensor(columns)


def _listed(schema: Schema, patients: polars.DataFrame, names: list[str]) -> None:
    """Refuse a category that the schema does not list: at the site it is missing, here it is a slip of the pen."""
    for column, _ in map(schema.find, names):
        if column.type != "category" or column.name not in patients.columns:
            continue
        unlisted = set(patients[column.name].drop_nulls().cast(polars.String)) - set(column.categories)
        if unlisted:
            raise RequestError(
                f"{column.name} is never {sorted(unlisted)[0]!r}.", "",
                f"There are {', '.join(column.categories)}; say None where it is not known.", field=column.name,
            )  # fmt: skip


def training(
    schema: Schema, split: Split, *, epochs: float | None, batch: int | None, clip: float | None
) -> dict[str, Any]:
    """Steps, batch and clip of a training, as the session at the site would choose what is not given.

    Raises:
        RequestError: naming what is out of range, or if no number of patients is declared.
    """
    part = Patients(schema, lambda ask, tensors: ({}, b""), split=split)
    return recipe.steps(part._expected(), epochs=epochs, batch=batch, clip=clip)
