"""Quotes: what a question would cost, and the error to expect, before anything is spent.

No record is touched: what is here is given schemas, the policy and the ledger's accounts, and no cohort. A
price comes from the very function that prices the request when it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from scipy.special import logit, ndtr, ndtri

from rapha_lab.curator.accounting import Gaussian, Loss, Selected, noise_for
from rapha_lab.curator.desk import Caller, permit
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.mechanisms import aggregate, discover, evaluate, metrics, select, shards, train
from rapha_lab.curator.mechanisms.question import touched
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.expression import extended
from rapha_lab.protocol.messages import JUDGES, Aggregate, Discover, Open, Question, malformed
from rapha_lab.protocol.policy import Policy, Project
from rapha_lab.protocol.quote import Inquiries, Inquiry, Quote
from rapha_lab.protocol.schema import Schema

__all__ = ["quote", "quotes"]

LANES = {"fit": "train", "evaluate": "evaluate", "shards": "shards"}

MANY, FEW = 10, 100
"""Numbers from a shard, and patients in it, beyond and below which another lane serves better."""


def quotes(
    asked: Inquiries, policy: Policy, caller: Caller, schemas: Mapping[str, Schema], ledger: Ledger
) -> list[Quote]:
    """A quote for each question, if the policy would let it be answered.

    Raises:
        RequestError, PolicyError: as the desk would of the request itself.
    """
    if asked.dataset not in schemas:
        raise _wrong("dataset", f"There is no dataset {asked.dataset!r} here.", "The site's card lists them.")
    schema, project = schemas[asked.dataset], policy.project(caller.project)
    for each in asked.asks:
        metrics = each.metrics if each.kind == "evaluate" else ()
        permit(policy, caller, LANES.get(each.kind, "aggregate"), schema, each.split, metrics)
        for split in _judges(each):
            permit(policy, caller, "evaluate", schema, split, ())
    return [quote(each, project, schema, ledger) for each in asked.asks]


def quote(asked: Inquiry, project: Project, schema: Schema, ledger: Ledger) -> Quote:
    """Price one question and say what error its answer would have; touches no record, reserves and logs nothing.

    Args:
        asked: the question.
        project: whose budget, and whose δ.
        schema: what is public of the dataset.
        ledger: is read, never written.

    Raises:
        RequestError: naming the field that is missing or out of range.
        PolicyError: the model is too large, or the project has no budget for the dataset.
    """
    assumed = schema if asked.patients is None else msgspec.structs.replace(schema, patients=asked.patients)
    if (asked.epsilon is None) == (asked.error is None):
        raise _wrong("epsilon", "A quote needs either epsilon or error.", "Say epsilon=0.1, or error=0.5.")
    if asked.error is not None:
        asked = msgspec.structs.replace(asked, epsilon=_epsilon_for(asked, assumed, project.delta))
    assert asked.epsilon is not None
    project.within_size(asked)
    if asked.kind == "discover":
        loss, told = _discover(asked, asked.epsilon, assumed, project)
    else:
        loss, told = _KINDS.get(asked.kind, _aggregate)(asked, asked.epsilon, assumed, project.delta)
    splits = (*touched(asked.split), *_judges(asked))
    accounts = {split: ledger.quote(project.name, schema.name, split, loss) for split in splits}
    return Quote(
        kind=asked.kind,
        split=asked.split,
        column=asked.column or "",
        epsilon=asked.epsilon,
        delta=project.delta,
        accounts=accounts,
        patients=assumed.patients,
        hypothetical=assumed.patients != schema.patients,
        **told,
    )


def _judges(asked: Inquiry) -> tuple[str, ...]:
    """The further split that is looked at to choose between candidates."""
    return (JUDGES,) if asked.kind == "fit" and asked.runs is not None else ()


def _aggregate(asked: Inquiry, epsilon: float, schema: Schema, delta: float) -> tuple[Loss, dict[str, Any]]:
    ask: Aggregate = _ask(asked, epsilon, schema, Question)
    schema = extended(schema, ask.derive, ask.where)
    loss = aggregate.price(ask, schema, delta)[1]
    return loss, {"noise": loss.noise, **aggregate.expect(ask, schema, loss.noise)}


def _discover(
    asked: Inquiry, epsilon: float, schema: Schema, project: Project
) -> tuple[Loss, dict[str, Any]]:
    ask: Discover = _ask(asked, epsilon, schema, Discover)
    schema = extended(schema, ask.derive, ask.where)
    loss = discover.price(ask, schema, project.delta, project.discovery_delta)
    return loss, discover.expect(ask, loss)


def _ask(asked: Inquiry, epsilon: float, schema: Schema, kind: Any) -> Any:
    """The request that the question would be."""
    given = {name: value for name in ("column", "bins") if (value := getattr(asked, name)) is not None}
    common = {"op": asked.kind, "dataset": schema.name, "split": asked.split, "epsilon": epsilon}
    try:
        return msgspec.convert({**given, **asked.fields, **common}, kind)
    except msgspec.ValidationError as error:
        raise malformed(error) from None


def _fit(asked: Inquiry, epsilon: float, schema: Schema, delta: float) -> tuple[Loss, dict[str, Any]]:
    if asked.steps is None or asked.batch is None:
        field = "batch" if asked.batch is None else "steps"
        raise _wrong(
            field, "A fit's price depends on its steps and its batch.", f"Say {field}=100, for instance."
        )
    common: dict[str, Any] = {"dataset": schema.name, "split": asked.split, "epsilon": epsilon}
    opened = Open(steps=asked.steps, batch=asked.batch, clip=asked.clip, **common)
    one = train.price(opened, schema, delta)
    loss = one if asked.runs is None else select.loss_of(opened, asked.runs, schema, delta)
    deviation = loss.noise / opened.batch
    figures = {
        "steps": float(one.times),
        "patients expected in a step": float(opened.batch),
        "chance of a patient to be in a step": one.rate,
        "noise in a step's mean gradient, of the clip, per number": deviation,
    }
    if isinstance(loss, Selected):
        figures["runs computed"] = float(loss.runs)
        figures["noise over that of one training at this ε"] = loss.noise / one.noise
    if asked.size:
        figures["numbers to train"] = float(asked.size)
        figures["norm of that noise, of the clip"] = deviation * math.sqrt(asked.size)
        how = "rapha.check(model, loss, inputs, target, of=cohort) says how each parameter trains, and what is slow."
        return loss, {"noise": loss.noise, "figures": figures, "notes": [how]}
    return loss, {"noise": loss.noise, "figures": figures}


def _evaluate(asked: Inquiry, epsilon: float, schema: Schema, delta: float) -> tuple[Loss, dict[str, Any]]:
    expected = schema.expected(asked.split)
    loss, _, scale = evaluate.price(epsilon, expected)
    told: dict[str, Any] = {"noise": metrics.spread(scale), "unit": asked.metrics[0]}
    if expected is None:
        return loss, told | {
            "notes": ["The error depends on the number of patients, which the dataset does not declare."]
        }
    names = tuple(name for name in asked.metrics if name not in ("confusion", "concordance"))
    errors = _expected_errors(names, round(expected), epsilon, asked.prevalence, asked.auroc)
    assumed = f"Simulated on made-up scores: {asked.prevalence:.3g} of the patients positive, AUROC {asked.auroc:g}."
    notes = (
        [assumed, "Sampling of the patients and noise together, as the release will state it."]
        if errors
        else []
    )
    return loss, told | {"error": errors.get(asked.metrics[0]), "figures": errors, "notes": notes}


def _shards(asked: Inquiry, epsilon: float, schema: Schema, delta: float) -> tuple[Loss, dict[str, Any]]:
    size, expected = asked.size or 1, schema.expected(asked.split)
    if size > 100:
        raise _wrong("size", f"{size} numbers are too many.", 'Say "shards:10"; 100 are the most.')
    if expected is None:
        raise _undeclared(schema)
    loss = Gaussian(noise_for(Gaussian, epsilon, delta))
    k = shards.choose(loss.noise, size, shards.LEAST, math.floor(expected / shards.FEWEST))
    part, each = loss.noise * math.sqrt(size) / k, expected / k
    notes = ["Noise alone; what the function returns on so few patients may be biased, which no noise shows."]
    if size > MANY or each < FEW:
        why = f"{size} numbers share the noise" if size > MANY else f"a shard has about {each:.0f} patients"
        notes.append(f"Since {why}, a model trained by fit (DP-SGD) at the same ε is likely to serve better.")
    figures = {"shards": float(k), "patients expected in a shard": each}
    told = {"noise": loss.noise, "error": part, "unit": "of each number's bounds"}
    return loss, told | {"figures": figures, "notes": notes}


_KINDS: Mapping[str, Callable[[Inquiry, float, Schema, float], tuple[Loss, dict[str, Any]]]] = {
    "fit": _fit,
    "evaluate": _evaluate,
    "shards": _shards,
}


@lru_cache(maxsize=1024)
def _expected_errors(
    names: tuple[str, ...], patients: int, epsilon: float, prevalence: float, auroc: float
) -> dict[str, float]:
    """The standard error of each metric of a calibrated model, by the release's own code on expected counts.

    Scores are made up: logits normal in each class with one variance d², their means d² apart, so that the
    AUROC is Φ(d/√2) and a score is its own log odds.
    """
    d = max(math.sqrt(2) * float(ndtri(auroc)), 0.05)
    centre = float(logit(prevalence))

    def below(score: np.ndarray) -> np.ndarray:
        return np.stack([ndtr((score - centre) / d + d / 2), ndtr((score - centre) / d - d / 2)])

    shares = np.array([1 - prevalence, prevalence])
    both = shares @ below(evaluate.CANDIDATES)
    last = len(both) - 1
    low, high = (
        evaluate.CANDIDATES[min(int(np.searchsorted(both, tenths / 10)), last)]
        for tenths in (evaluate.TENTHS, 10 - evaluate.TENTHS)
    )
    edges = evaluate.edges_between(float(low), float(high))
    counts = patients * shares[:, None] * np.diff(below(edges), prepend=0.0, append=1.0, axis=1)
    judged = metrics.judge(counts, edges, evaluate.price(epsilon, float(patients))[2], names)
    return {name: figure["error"] for name, figure in judged["metrics"].items()}


def _epsilon_for(asked: Inquiry, schema: Schema, delta: float) -> float:
    """The ε, rounded up to 4 digits, whose answer has at most the standard error `asked.error`.

    Raises:
        RequestError: if no ε gives it, or the error is not defined by public figures.
    """
    wished = asked.error or 0.0
    if asked.kind == "fit":
        raise _wrong("error", "A training has no standard error.", "Say epsilon=2, for instance.")
    if asked.kind == "shards":
        raise _wrong("error", "A function on shards is quoted by its ε.", "Say epsilon=1, for instance.")
    if asked.kind == "discover":
        raise _wrong("error", "A discovery of keys is quoted by its ε.", "Say epsilon=0.5, for instance.")
    if asked.kind == "evaluate":
        return _epsilon_for_metric(asked, wished, schema)
    ask = _ask(asked, 1.0, schema, Question)
    return aggregate.epsilon_for(ask, extended(schema, ask.derive, ask.where), delta, wished)


def _epsilon_for_metric(asked: Inquiry, wished: float, schema: Schema) -> float:
    expected = schema.expected(asked.split)
    if expected is None:
        raise _undeclared(schema)

    def error(step: int) -> float:
        epsilon = _rounded(10 ** (step / 16))
        names = tuple({*asked.metrics[:1]} - {"confusion", "concordance"})
        found = _expected_errors(names, round(expected), epsilon, asked.prevalence, asked.auroc)
        return found.get(asked.metrics[0], math.inf)

    low, high = -33, 32  # from 0.01 to 100, in steps of 15 %
    if math.isinf(error(high)):
        raise _wrong("error", f"{asked.metrics[0]} is no single figure.", "Say epsilon=1, for instance.")
    if error(high) > wished:
        why = f"With about {expected:.0f} patients it is {error(high):.2g} however little noise there is."
        raise _unreachable(asked, why)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= wished else (middle, high)
    return _rounded(10 ** (high / 16))


def _rounded(epsilon: float) -> float:
    return float(f"{epsilon:.3g}")


def _undeclared(schema: Schema) -> RequestError:
    return RequestError(
        f"{schema.name} declares no public number of patients.",
        "Without one nobody can say which ε gives this error.",
        "Give epsilon instead, or plan for patients=1000, say.",
        field="patients",
    )


def _unreachable(asked: Inquiry, why: str) -> RequestError:
    return RequestError(
        f"No ε gives a standard error of {asked.error:g}.", why, "Ask for a larger error.", field="error"
    )


def _wrong(field: str, what: str, instead: str) -> RequestError:
    return RequestError(what, "", instead, field=field)
