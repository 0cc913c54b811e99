"""Asking for a price: from what a researcher writes to an inquiry, and how a quote and a budget look."""

from __future__ import annotations

import difflib
from typing import Any, get_args

import msgspec

from rapha_lab.client import cards
from rapha_lab.client.calls import unknown
from rapha_lab.protocol import messages, quote
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Metric, Split
from rapha_lab.protocol.quote import Inquiry
from rapha_lab.protocol.schema import Schema

__all__ = ["Budget", "Quote", "inquiry"]

_SPLITS = {"fit": "train", "evaluate": "test"}


class Quote(quote.Quote, kw_only=True, frozen=True):
    """What a question would cost and how exact its answer would be; nothing was spent for it.

    `float(quote)` is its ε; `fits`, `spent`, `left` and `room` are of the split that would have least left.
    """

    def __float__(self) -> float:
        return self.epsilon

    def __repr__(self) -> str:
        return str(cards.quote(self)["text/plain"])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return cards.quote(self)


class Budget(dict[str, dict[str, dict[str, float]]]):
    """By project and split: epsilon, delta, spent, left, and room for one more answer.

    Shown as gauges; `budget()` gives it too.
    """

    def __call__(self) -> Budget:
        """The same."""
        return self

    def __repr__(self) -> str:
        return str(cards.budget(self)["text/plain"])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return cards.budget(self)


def inquiry(
    schema: Schema,
    what: Any,
    *,
    split: str | None = None,
    epochs: float | None = None,
    batch: int | None = None,
    clip: float | None = None,
    patients: int | None = None,
    **settings: Any,
) -> Inquiry:
    """The question that `what` stands for, with the settings that a cell would choose where none are given.

    Args:
        schema: of the dataset.
        what: "count", "mean:COLUMN", "survival:TIME,EVENT", "discover:TABLE,COLUMN" and so on, "evaluate:METRIC,METRIC",
            "shards:NUMBERS", "fit", or a model.
        split: train for a fit, test for an evaluation, else all patients, if not given.
        epochs, batch, clip: of a fit.
        patients: another number of patients than the declared one.
        settings: other fields of an `Inquiry`, or of the aggregate's request, as in by=["sex"].

    Raises:
        RequestError: naming what is malformed.
    """
    kind, rest = _parsed(what)
    plain = {field.name for field in msgspec.structs.fields(Inquiry)}
    further = {name: value for name, value in (settings | rest).items() if name not in plain}
    fields = (
        {name: value for name, value in (settings | rest).items() if name in plain}
        | ({"fields": further} if further else {})
        | {"kind": kind, "split": split or _SPLITS.get(kind, "all"), "patients": patients}
    )
    if kind in ("fit", "evaluate", "shards") and further:
        names = sorted(plain - {"kind", "fields", "column", "steps"} | {"epochs"})
        raise unknown("A quote", next(iter(further)), names, f"cohort.quote({kind!r}, epsilon=1)")
    _one_of("split", split, (None, *get_args(Split)))
    for metric in rest.get("metrics", ()):
        _one_of("metrics", metric, get_args(Metric))
    if kind == "describe" and "columns" not in further:
        fields["fields"] = further | {
            "columns": [c.name for c in schema.columns if c.type not in ("text", "image")]
        }
    asked = _checked(fields)
    if kind != "fit":
        return asked
    from rapha_lab.client.rehearsal import training

    assumed = schema if patients is None else msgspec.structs.replace(schema, patients=patients)
    return _checked(fields | training(assumed, asked.split, epochs=epochs, batch=batch, clip=clip))


def _parsed(what: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(what, type):
        raise RequestError(
            f"The model is the class {what.__name__}.", "It must be a model.", f"Make one: {what.__name__}(...).", field="what"
        )  # fmt: skip
    if callable(getattr(what, "parameters", None)):
        size = sum(p.numel() for p in what.parameters() if p.requires_grad)
        if not size:
            raise RequestError(
                "The model has nothing to train.", "No parameter requires a gradient.", field="model"
            )
        return "fit", {"size": size}
    kind, _, rest = what.partition(":") if isinstance(what, str) else ("", "", "")
    names = [name.strip() for name in rest.split(",") if name.strip()]
    if kind in ("count", "fit", "describe", "evaluate") and not names:
        return kind, {}
    if kind in ("sum", "mean", "variance", "histogram", "quantiles") and len(names) == 1:
        return kind, {"column": names[0]}
    if kind in ("correlation", "missing", "describe") and names:
        return kind, {"columns": names}
    if kind == "survival" and len(names) == 2:
        return kind, {"time": names[0], "event": names[1]}
    if kind == "shards" and (not names or (len(names) == 1 and names[0].isdecimal())):
        return kind, {"size": int(names[0])} if names else {}
    if kind == "rows" and len(names) == 1:
        return kind, {"table": names[0]}
    if kind == "discover" and len(names) == 2:
        return kind, {"table": names[0], "column": names[1]}
    if kind == "evaluate":
        return kind, {"metrics": names}
    raise RequestError(
        f"{what!r} is no question that has a price.",
        "It is one of count, sum:COLUMN, mean:COLUMN, variance:COLUMN, histogram:COLUMN, quantiles:COLUMN, "
        "correlation:COLUMN,COLUMN, survival:TIME,EVENT, missing:COLUMN, describe, rows:TABLE, "
        "discover:TABLE,COLUMN, evaluate:METRIC, fit, shards:NUMBERS, "
        "or a model to fit.",
        'Say "mean:age", for instance.',
        field="what",
    )


def _one_of(field: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), names := [c for c in choices if c is not None], 1)
        instead = f"Did you mean {near[0]}?" if near else "Name one."
        raise RequestError(f"{field} is {value!r}.", f"There are {', '.join(names)}.", instead, field=field)


def _checked(fields: dict[str, Any]) -> Inquiry:
    try:
        return msgspec.convert({k: v for k, v in fields.items() if v is not None}, Inquiry)
    except msgspec.ValidationError as error:
        raise messages.malformed(error) from None
