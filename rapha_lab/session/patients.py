"""`patients`: what a cell holds instead of records. Each question becomes one request to the curator."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn, get_args

import numpy as np
import torch
from safetensors.torch import load

from rapha_lab.protocol import messages
from rapha_lab.protocol.columns import Column
from rapha_lab.protocol.errors import CellError, ProgramError, RequestError, SealedError
from rapha_lab.protocol.messages import Columns, Split
from rapha_lab.protocol.program import Program, digest
from rapha_lab.protocol.release import Release
from rapha_lab.protocol.schema import Schema
from rapha_lab.protocol.tensors import Layout
from rapha_lab.session import checking, losses, parcels, recipe, shard, tracing
from rapha_lab.session.loops import Batches, refuse_other
from rapha_lab.session.opacus import Loader
from rapha_lab.session.questions import Ask, Questions, made
from rapha_lab.session.refusals import ANSWERS, COUNT, LOAD, PANDAS, PUBLIC, ROWS
from rapha_lab.session.sealed import PATIENTS, Batch

__all__ = ["Patients"]

METRICS = get_args(messages.Metric)

# what a model was last fitted on, so that evaluate(model) need not be told again
_fitted: weakref.WeakKeyDictionary[torch.nn.Module, tuple[messages.Inputs, str]] = weakref.WeakKeyDictionary()


class Patients(Questions):
    """A handle on a dataset's patients: it computes on them and never shows one.

    Args:
        schema: the dataset's public description.
        ask: sends a request with its tensors to the curator, gives the release and its tensors.
        epsilon: the cell's `--epsilon`, used once by a request that names none.
        released: told of each release as it is given.
        split: the patients meant; `train`, `validation` and `test` are attributes.
        most_steps: after how many batches a loop ends, for rehearsals.
        largest_model: how many numbers a model may have, where that is known beforehand.
    """

    def __init__(
        self,
        schema: Schema,
        ask: Ask,
        *,
        epsilon: float | None = None,
        released: Callable[[Release], None] = lambda release: None,
        split: Split = "all",
        most_steps: int = 1 << 30,
        largest_model: int | None = None,
    ) -> None:
        super().__init__(schema, ask, epsilon=epsilon, released=released, split=split)
        self._most_steps, self._largest_model = most_steps, largest_model

    @property
    def train(self) -> Patients:
        """The patients to learn from."""
        return self._of("train")

    @property
    def validation(self) -> Patients:
        """The patients to choose between models with."""
        return self._of("validation")

    @property
    def test(self) -> Patients:
        """The held-out patients."""
        return self._of("test")

    def _of(self, split: Split) -> Patients:
        part = self._copy()
        part._split = split
        return part

    def _copy(self) -> Patients:
        part = Patients(self.schema, self._ask, released=self._released, most_steps=self._most_steps)
        part._largest_model = self._largest_model
        part._whole, part._split, part._cell_epsilon = self._whole, self._split, self._cell_epsilon
        part._derive, part._where = self._derive, self._where
        return part

    # -- models ---------------------------------------------------------------------------------------

    def fit(
        self,
        model: torch.nn.Module,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        *,
        inputs: Columns | Mapping[str, Columns],
        target: str,
        epsilon: float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        epochs: float | None = None,
        batch: int | None = None,
        clip: float | None = None,
        clip_quantile: float = 0.0,
        bands: int = 1,
        average: float = 0.0,
        corrected: bool = False,
        candidates: Sequence[Mapping[str, float]] = (),
        runs: float | None = None,
        bound: float | None = None,
    ) -> Release:
        """Train `model` in place by DP-SGD (Abadi et al. 2016) on these patients.

        Starting weights are the model's own: those of a public pre-training cost nothing. docs/methods.md says
        when each of the last options wins.

        Args:
            model: called with one tensor if `inputs` is a column or a list, else with keyword arguments.
            loss: of (prediction, target); binary cross-entropy for a boolean target, cross-entropy for
                a category, squared error for a number if not given.
            inputs: columns of the model's input, or {argument: columns}. A list gives a float vector scaled by public
                bounds, as wide as `schema.layout(inputs)` says; a single category gives its code.
            target: the column to predict.
            epsilon: the training's own (ε, δ) guarantee per patient; the noise is computed from it.
            optimizer: any of torch.optim on the model's parameters; one that works is chosen if not given.
            epochs: passes over the expected number of patients.
            batch: expected patients in a step.
            clip: the most one patient's gradient may weigh.
            clip_quantile: from `clip` on follow this quantile of the patients' gradient norms, 0.9 say (Andrew et al. 2021).
            bands: of noise that later steps take back (Choquette-Choo et al. 2023), for large ε and small batches.
            average: release the average of the weights over the steps with this decay, 0.99 say.
            corrected: Adam without the noise in its second moment (Tang et al. 2023).
            candidates: settings to choose from in private, as in [{"lr": 0.1}, {"lr": 1.0, "clip": 0.5}]: lr, momentum,
                weight_decay, clip, average (Papernot and Steinke 2022). The best by its loss on the validation patients leaves.
            runs: how many trainings with a candidate count on average, 5 if not given; more of them are computed.
            bound: the most that one validation patient's loss weighs in choosing; for a yes or no the Brier score decides.

        Returns:
            The release: settings and price. The model holds the trained weights.

        Raises:
            RequestError: an argument is malformed.
            ProgramError: the model or loss cannot be computed one patient at a time.
            BudgetError, PolicyError: the site refuses; nothing was touched.
        """
        named = self._inputs(inputs)
        _module(model)
        common = self._common(epsilon)
        sizes: dict[str, Any] = {
            "epochs": epochs,
            "batch": batch,
            "clip": clip,
            "follows": bool(clip_quantile),
        }
        chosen = recipe.choose(self._expected(), common["epsilon"], model, optimizer, **sizes)
        column = self.schema.column(target) if isinstance(target, str) else None
        chosen["selection"] = recipe.selection(candidates, runs, bound, loss, None if loss else column)
        loss = loss or recipe.loss_for(self.schema.column(target))
        losses.refuse_target(loss, column)
        checking.within(model, self._largest_model)
        traced = tracing.loss_program(model, loss, self._examples(named), self._example(target))
        options = {"bands": bands, "average": average, "corrected": corrected, "clip_quantile": clip_quantile}
        asked = {"inputs": {**named, "target": target}, **chosen, **common, **options}
        wire, blob = self._ask(made(messages.Fit, program=traced.program, **asked), traced.blob)
        _load(model, load(blob))
        _fitted[model] = (named, target)
        return self._given(wire)

    def batches(
        self,
        size: int | None = None,
        *,
        epochs: float | None = None,
        epsilon: float | None = None,
        clip: float | None = None,
    ) -> Batches:
        """Batches for a training loop of your own; `loss.backward()` puts private gradients into `.grad`.

        `batch["age"]` and `batch[["age", "sex"]]` are sealed tensors: shape, dtype, arithmetic, no values. Numbers are
        scaled: -1 and 1 are the column's public bounds. Every batch is a fresh Poisson sample of patients and pays for
        one `backward()`. What is not used is refunded. `len()` is the number of batches; the loop ends with its cell.

        Args:
            size: expected patients in a batch.
            epochs: passes over the expected number of patients.
            epsilon: the (ε, δ) guarantee of the whole loop.
            clip: the most one patient's gradient may weigh.
        """
        chosen = recipe.steps(self._expected(), epochs=epochs, batch=size, clip=clip)
        return Batches(self._loop(made(messages.Open, **chosen, **self._common(epsilon))), chosen["steps"])

    def _loop(self, ask: messages.Open) -> Generator[Batch]:
        opened = self._ask(ask, b"")[0]
        gradients = _Gradients(self._ask, opened["loop"])
        noise = opened["noise"] * ask.clip / ask.batch
        batch = Batch(self._made_up, gradients, ask.batch, noise, self._number)
        try:
            for _ in range(given := min(ask.steps, self._most_steps)):
                yield batch.next()
            refuse_other(gradients.taken, given)
        finally:
            wire = self._ask(messages.Close(loop=opened["loop"]), b"")[0]
            if "op" in wire:
                self._given(wire)

    def loader(
        self,
        inputs: Columns,
        target: str,
        *,
        batch_size: int | None = None,
        epochs: float = 1,
        epsilon: float | None = None,
        clip: float | None = None,
    ) -> Loader:
        """In place of a `DataLoader`, in a script for Opacus or any: sealed `(inputs, target)`, see docs/methods.md.

        Args:
            inputs, target: columns.
            batch_size: expected patients in a batch.
            epochs: how often it will be gone through.
            epsilon: of all epochs, unless `make_private` says it.
            clip: the most one patient's gradient may weigh.
        """
        size, steps = itemgetter("batch", "steps")(recipe.steps(self._expected(), epochs=1, batch=batch_size))

        def opened(epochs: float, epsilon: float | None, clip: float | None) -> Batches:
            passes = (math.ceil(epochs * steps) - 0.5) * size / self._expected()
            return self.batches(size, epochs=passes, epsilon=epsilon, clip=clip)

        self.schema.layout(inputs)
        self.schema.layout(target)
        return Loader(opened, inputs, target, size, steps, epochs, epsilon, clip)

    def evaluate(
        self,
        model: torch.nn.Module,
        metrics: Sequence[str] = ("auroc",),
        *,
        epsilon: float | None = None,
        inputs: Columns | Mapping[str, Columns] | None = None,
        target: str | None = None,
        threshold: float = 0.5,
        by: str | Sequence[str] = (),
        time: str | None = None,
    ) -> Release:
        """Judge a model's logits on these patients: any metrics from one noisy histogram of scores a class.

        Args:
            model: gives one logit, or one risk score, for each patient.
            metrics: as many as one likes at one price; a "concordance" is asked for alone.
            epsilon: the (ε, δ) guarantee of the answer.
            inputs, target: those of the model's last fit if not given.
            threshold: the probability from which on a score counts as a yes.
            by: columns with public values, to judge each group of patients and their gaps.
            time: of a concordance: when the target was seen, or follow-up ended.
        """
        known = _fitted.get(_module(model))
        if known is None and (inputs is None or target is None):
            raise RequestError(
                "This model was not fitted in this session, so its inputs are not known.",
                "evaluate() takes them from the last fit.",
                "Say evaluate(model, [...], inputs=..., target=..., epsilon=...).",
                field="inputs",
            )
        named = self._inputs(inputs) if inputs is not None else known[0] if known else {}
        goal = target if target is not None else known[1] if known else ""
        self.schema.column(goal)
        metrics = [metrics] if isinstance(metrics, str) else list(metrics)
        if unknown := [metric for metric in metrics if metric not in METRICS]:
            raise RequestError(
                f"{unknown[0]!r:.64} is no metric.", f"There are {', '.join(METRICS)}.", field="metrics"
            )
        traced = tracing.score_program(model, self._examples(named))
        asked = {"inputs": named, "target": goal, "metrics": metrics, **self._common(epsilon)}
        asked |= {"threshold": float(threshold), "by": self._several(by), "time": time}
        return self._release(made(messages.Evaluate, program=traced.program, **asked), traced.blob)

    def shards(
        self,
        function: Callable[..., Any],
        *,
        bounds: tuple[float, float] | Sequence[tuple[float, float]],
        shape: int | Sequence[int] = (),
        columns: str | Sequence[str] | None = None,
        default: float | Sequence[float] | None = None,
        k: int | None = None,
        seconds: float = 0.2,
        epsilon: float | None = None,
    ) -> Release:
        """The noisy average of what any Python function returns on disjoint shards of patients.

        For what no aggregate or loss expresses, and about ten numbers: a fitted Cox model's coefficients, a
        score of your own. Each shard runs alone and for a fixed time; one that fails counts as `default`, and
        nobody learns of it. Sample and aggregate (Smith 2011; GUPT, Mohan et al. 2012).

        Args:
            function: of a polars frame of some patients. Its source travels, so it imports what it needs
                inside (numpy, scipy, polars, sklearn, torch) and uses nothing else from outside.
            bounds: public (low, high) of the result, or one pair for each of its entries.
            shape: of the result; () for a number.
            columns: what the frame holds; all columns if not given.
            default: stands for a shard that fails; the middle of the bounds if not given.
            k: how many shards, at least 200; chosen for little noise if not given.
            seconds: the time of one shard.
            epsilon: the (ε, δ) guarantee of the answer.

        Raises:
            RequestError: an argument is malformed, or there are too few patients for so many shards.
        """
        source = shard.source_of(function)
        names = [c.name for c in self.schema.columns] if columns is None else columns
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            self.schema.column(name)
        pairs = [bounds] if isinstance(bounds[0], (int, float)) else list(bounds)
        if default is not None:
            default = [default] if isinstance(default, (int, float)) else list(default)
        asked: dict[str, Any] = {"source": source, "name": function.__name__, "columns": names}
        asked |= {"bounds": pairs, "default": default}
        asked |= {
            "shape": [shape] if isinstance(shape, int) else list(shape),
            "k": k,
            "seconds": float(seconds),
        }
        return self._release(made(messages.Shards, **asked, **self._common(epsilon)))

    def review(
        self,
        function: Callable[..., Any],
        *,
        columns: str | Sequence[str] | None = None,
        tables: str | Sequence[str] = (),
        inputs: Mapping[str, Any] | None = None,
        seconds: float = 10.0,
    ) -> Any:
        """What a function returns on the records themselves, by the custodians' leave: it has no ε and no guarantee.

        The cell waits twice: until custodians have read and approved the function with its inputs, and until they
        have seen and released what it returned. Any change of either is a new function to approve.

        Args:
            function: of a polars frame of these patients, and of `tables` and `inputs` by name. Its source travels, so it imports
                what it needs inside and uses nothing else from outside.
            columns: what the frame holds; all columns if not given.
            tables: those with many rows a patient: each is a frame of the rows that count, whose column `__patient` is the
                place of the row's patient in the first frame, as in `frame.with_row_index("__patient")`.
            inputs: further arguments: numbers, strings, arrays, tensors, frames, modules as their weights. Dicts and
                frames arrive with their keys in alphabetical order, as custodians read them.
            seconds: the time it has.

        Returns:
            Numbers, strings, arrays, tensors, frames, and lists and dicts of them, a mebibyte at most.

        Raises:
            RefusedError: a custodian refused it; says why.
            CellError: the function failed; only where and with what kind of error is known.
        """
        names = [c.name for c in self.schema.columns] if columns is None else columns
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            self.schema.column(name)
        rows = [tables] if isinstance(tables, str) else list(tables)
        for name in rows:
            self.schema.table(name)
            if name in (inputs or {}):
                what = f"{name} is both a table and an input."
                raise RequestError(what, "", "Name the input differently.", field=name)
        given, blob = parcels.pack(inputs or {}, list(inputs or {}))
        asked: dict[str, Any] = {"source": shard.source_of(function), "name": function.__name__}
        asked |= {"columns": names, "tables": rows, "inputs": given, "seconds": float(seconds)}
        about = {
            "dataset": self.schema.name,
            "split": self._split,
            "derive": self._derive,
            "where": self._where,
        }
        wire, tensors = self._ask(made(messages.Review, **asked, **about), blob)
        told = self._given(wire).values
        if "parcel" not in told:
            raise CellError(
                f"{function.__name__} gave no result.", told["failed"], "Mend it, and propose it again."
            )
        return parcels.unpack(told["parcel"], tensors)["result"]

    # -- what they need -------------------------------------------------------------------------------

    def _expected(self) -> int:
        expected = self.schema.expected(self._split)
        if expected is None:
            raise RequestError(
                f"{self.schema.name} declares no public number of patients.",
                "Steps and sampling rates must not be computed from the true number.",
                "Ask the custodian to declare `patients` in the schema.",
                field="patients",
            )
        return max(1, round(expected))

    def _inputs(self, inputs: Columns | Mapping[str, Columns]) -> dict[str, Columns]:
        named = dict(inputs) if isinstance(inputs, Mapping) else {"x": inputs}
        if not named or not all(isinstance(v, str | list | tuple) and v for v in named.values()):
            raise RequestError(
                f"inputs is {inputs!r:.64}.",
                "It must be a column, a list of columns, or {argument of the model: columns}.",
                'Say inputs=["age"], say.',
                field="inputs",
            )
        named = {key: value if isinstance(value, str) else list(value) for key, value in named.items()}
        for columns in named.values():
            self.schema.layout(columns)
        return named

    def _examples(self, named: Mapping[str, Columns]) -> dict[str, torch.Tensor]:
        return {name: self._example(columns) for name, columns in named.items()}

    def _example(self, columns: Columns) -> torch.Tensor:
        shape, dtype = self.schema.layout(columns)
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    def _made_up(self, columns: Columns) -> torch.Tensor:
        """Made-up values for a sealed tensor, (PATIENTS, *shape)."""
        self.schema.layout(columns)
        example = tracing.made_up(self._example(columns), PATIENTS)
        column, flag = self.schema.find(columns) if isinstance(columns, str) else (None, False)
        if column is not None and example.dtype == torch.int64:
            example = example % (column.vocabulary or len(column.categories))
        elif column is None or (column.type in ("number", "image") and not flag):
            example = example * 2 - 1
        return example

    def _number(self, columns: Columns) -> Column | None:
        column, flag = self.schema.find(columns) if isinstance(columns, str) else (None, True)
        return column if column is not None and column.numeric and not flag else None

    # -- what they refuse -----------------------------------------------------------------------------

    def _sealed(self, what: str, instead: str, suggestion: str | None = None) -> NoReturn:
        first = self.schema.columns[0].name
        raise SealedError(
            f"{what} would show patients' records.",
            "The records stay in the hospital's enclave; this session does not hold them.",
            instead,
            suggestion=suggestion or f'patients.histogram("{first}", epsilon=0.1)',
        )

    def head(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: rows are never shown."""
        self._sealed(
            "patients.head()",
            "Look at made-up ones with cohort.mock(), or ask patients.histogram('age', epsilon=0.1).",
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name in ROWS:
            instead = f"Ask for an aggregate: patients.mean(column, epsilon=0.1), .histogram(...), .count(...). {LOAD}"
            self._sealed(f"patients.{name}", instead)
        hint = " The columns are public: cohort shows them." if name in PUBLIC else PANDAS.get(name, "")
        if name in {column.name for column in self.schema.columns}:
            hint = f' It is a column: pl.col("{name}") names it in where(...) and with_columns(...).'
        raise AttributeError(f"patients has no {name!r}; it answers {ANSWERS}.{hint}")

    def __iter__(self) -> NoReturn:
        self._sealed(
            "Going through patients one by one",
            f"Ask for an aggregate. {LOAD}",
        )

    def __len__(self) -> NoReturn:
        self._sealed(
            "The exact number of patients",
            f"Ask patients.count(epsilon=0.1). {LOAD}",
            COUNT,
        )

    def __bool__(self) -> NoReturn:
        self._sealed("Whether there are patients", "Ask patients.count(epsilon=0.1).", COUNT)

    def __getitem__(self, key: Any) -> NoReturn:
        known = isinstance(key, str) and key in {column.name for column in self.schema.columns}
        code = f'patients.histogram("{key}", epsilon=0.1)' if known else None
        named = f'In where(...) and with_columns(...) it is pl.col("{key}"). ' if known else ""
        self._sealed(
            f"patients[{key!r:.64}]",
            f"Ask patients.mean(...) or .histogram(...) of a column. {named}{LOAD}",
            code,
        )

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self._sealed("An array of patients", f"Ask for an aggregate. {LOAD}")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._sealed("Pickling patients", "Bring back what was released with -o.")

    def __repr__(self) -> str:
        part = "" if self._split == "all" else f", {self._split}"
        return f"<patients of {self.schema.name}{part}: sealed; ask for {ANSWERS}>"


class _Gradients:
    """Asks for one private gradient of an open loop; a program travels once."""

    def __init__(self, ask: Ask, loop: str) -> None:
        self._ask, self._loop = ask, loop
        self._sent: dict[int, _Sent] = {}
        self.taken = 0

    def __call__(
        self, traced: tracing.Traced, columns: dict[str, Columns], reduction: Any
    ) -> dict[str, torch.Tensor]:
        sent = self._sent.get(id(traced.program))
        if sent is not None:
            return self._again(sent, traced, columns, reduction)
        name, blob = digest(traced.program), traced.blob
        asked = messages.Gradient(
            loop=self._loop, inputs=columns, reduction=reduction, digest=name, program=traced.program
        )
        given = self._ask(asked, blob)[1]
        self.taken += 1
        while len(self._sent) >= _PROGRAMS:
            del self._sent[next(iter(self._sent))]
        self._sent[id(traced.program)] = _Sent(traced.program, name, Layout(blob), Layout(given))
        return load(given)

    def _again(
        self, sent: _Sent, traced: tracing.Traced, columns: dict[str, Columns], reduction: Any
    ) -> dict[str, torch.Tensor]:
        there, back, blob = sent.there, sent.back, None
        if there.uniform:
            blob = there.pack(traced.tensors)
        asked = messages.Gradient(loop=self._loop, inputs=columns, reduction=reduction, digest=sent.digest)
        try:
            given = self._ask(asked, blob or traced.blob)[1]
        except ProgramError as error:
            if error.field != "program":
                raise
            # the site remembers the latest programs of a loop, and took no step
            del self._sent[id(traced.program)]
            return self(traced, columns, reduction)
        self.taken += 1
        if not back.uniform or (numbers := back.unpack(given)) is None:
            return load(given)
        parts = back.parts(np.frombuffer(numbers, np.float32))
        return {name: torch.from_numpy(part) for name, part in parts.items()}


_PROGRAMS = 64
"""Programs of a loop that are remembered to be at the site."""


class _Sent(NamedTuple):
    """A program that travelled, and how tensors lie in what goes there and comes back."""

    program: Program  # held, so that no other gets its id
    digest: str
    there: Layout
    back: Layout


def _module(model: Any) -> torch.nn.Module:
    if not isinstance(model, torch.nn.Module):
        raise RequestError(
            f"The model is a {type(model).__name__}.",
            "What is trained or judged is an nn.Module; -i sends weights, not the class of a model of your own.",
            "Define it in an enclave cell; weights that were sent are a dict: model.load_state_dict(...).",
            field="model",
        )
    return model


def _load(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
