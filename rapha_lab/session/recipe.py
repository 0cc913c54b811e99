"""Settings with which a first private training works, from public numbers alone.

Large Poisson batches, since noise is added once a step whatever the batch (De et al. 2022, arXiv:2204.13650);
plain SGD with momentum; and a step size that shrinks with the noise: what noise adds up to over T steps at
learning rate lr is about lr·sqrt(T)·σC·sqrt(d)/L, and σ grows like q·sqrt(T)/ε, which gives the rule below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch.nn import functional as F

from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import Candidate, Optimizer, Selection, malformed
from rapha_lab.protocol.schema import Column

__all__ = ["choose", "loss_for", "selection", "steps"]

SHARE, EPOCHS, CLIP, MOMENTUM = 0.2, 20.0, 2.0, 0.9
"""A step's share of the patients, passes over them, and the clipping norm."""

_NAMES = {
    name.lower(): getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta")
}


def choose(
    expected: int,
    epsilon: float,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    epochs: float | None = None,
    batch: int | None = None,
    clip: float | None = None,
    follows: bool = False,
) -> dict[str, Any]:
    """Steps, batch, clip and optimiser of a fit on `expected` patients, those given kept as they are.

    Args:
        follows: whether the clip follows a quantile: a rate for a low start would be far too fast for where it climbs to.

    Raises:
        RequestError: naming the argument that is out of range.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise RequestError(
            "The model has nothing to train.", "No parameter requires a gradient.", field="model"
        )
    chosen = steps(expected, epochs=epochs, batch=batch, clip=clip)
    if optimizer is not None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise RequestError(
                f"The optimizer is {optimizer!r}."
                if isinstance(optimizer, str)
                else "The optimizer is none yet.",
                "It must be one of torch.optim on the model's parameters.",
                "Say optimizer=torch.optim.Adam(model.parameters(), lr=0.01), for instance.",
                field="optimizer",
            )
        held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if {id(p) for p in held} != {id(p) for p in trained}:
            raise RequestError(
                "The optimizer does not hold the model's parameters.",
                "fit() trains every parameter of the model that requires a gradient, and only those.",
                "Make it from model.parameters(); freeze others with requires_grad_(False).",
                field="optimizer",
            )
        return chosen | {"optimizer": described(optimizer)}
    numbers = sum(p.numel() for p in trained)
    most = max(chosen["clip"], CLIP) if follows else chosen["clip"]
    drowned = 0.25 * epsilon * expected / (chosen["steps"] * most * math.sqrt(numbers))
    lr = min(0.25 / most, drowned)
    return chosen | {"optimizer": Optimizer(name="sgd", settings={"lr": lr, "momentum": MOMENTUM})}


def steps(
    expected: int, *, epochs: float | None = None, batch: int | None = None, clip: float | None = None
) -> dict[str, Any]:
    """Steps, batch and clip of a training on `expected` patients.

    Raises:
        RequestError: naming the argument that is out of range.
    """
    size = _within("batch", batch if batch is not None else max(1, round(SHARE * expected)), 1, expected)
    passes = _within("epochs", epochs if epochs is not None else EPOCHS, 1e-6, 1e6)
    count = max(1, math.ceil(passes * expected / size))
    return {
        "steps": int(_within("epochs", count, 1, 1_000_000)),
        "batch": int(size),
        "clip": float(_within("clip", clip if clip is not None else CLIP, 1e-6, 1e6)),
    }


def _within(field: str, value: float, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise RequestError(f"{field} is {value!r}.", f"It must be between {low:g} and {high:g}.", field=field)
    return value


def described(optimizer: torch.optim.Optimizer) -> Optimizer:
    """A torch optimiser by name and public settings.

    Raises:
        RequestError: if it is of a kind the curator does not run, or has several parameter groups.
    """
    name = next((name for name, kind in _NAMES.items() if type(optimizer) is kind), None)
    if name is not None and len(optimizer.param_groups) != 1:
        raise RequestError(
            f"The optimizer has {len(optimizer.param_groups)} groups of parameters.", "fit() trains all by the same rule.",
            "Give it model.parameters(), or write a loop over patients.train.batches(...), which takes any groups.",
            field="optimizer",
        )  # fmt: skip
    if name is None:
        raise RequestError(
            f"fit() cannot run this {type(optimizer).__name__}.",
            f"It runs {', '.join(_NAMES)}.",
            "Leave optimizer out for one that works, choose one of these, or write a loop over patients.train.batches(...).",
            field="optimizer",
        )
    group = optimizer.param_groups[0]
    implied = ("decoupled_weight_decay",) if name == "adamw" else ()
    kept = {k: v for k, v in group.items() if k not in ("params", *_EXECUTION, *implied) and v is not None}
    settings = {k: [float(x) for x in v] if isinstance(v, (tuple, list)) else v for k, v in kept.items()}
    return Optimizer(name=name, settings=settings)  # type: ignore[arg-type]


# how torch runs an update, not what it computes
_EXECUTION = ("foreach", "fused", "differentiable", "capturable", "initial_lr")


def loss_for(target: Column) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The usual loss for a column of this type."""
    if target.type == "boolean":
        return F.binary_cross_entropy_with_logits
    return F.cross_entropy if target.type == "category" else F.mse_loss


def selection(
    candidates: Sequence[Mapping[str, float]],
    runs: float | None,
    bound: float | None,
    loss: Callable[..., torch.Tensor] | None,
    target: Column | None,
) -> Selection | None:
    """What to choose from, or None if there are no candidates.

    Args:
        runs: that count on average, 5 if not given.
        bound: of one patient's loss in a score; chosen by loss or target if not given.
        loss: if not that of `loss_for`.
        target: the column to predict, if there is no loss.

    Raises:
        RequestError: naming the argument that is malformed.
    """
    listed = isinstance(candidates, Sequence) and all(isinstance(each, Mapping) for each in candidates)
    if not listed:
        raise RequestError(
            "candidates is no list of settings.",
            "Each candidate is a dict of numbers by name.",
            'Say candidates=[{"lr": 0.1}, {"lr": 1.0}], for instance.',
            field="candidates",
        )
    if not candidates:
        for name, given in (("runs", runs), ("bound", bound)):
            if given is not None:
                raise RequestError(
                    f"{name} speaks of candidates, and there are none.",
                    "One training has nothing to choose from.",
                    f'Say candidates=[{{"lr": 0.1}}, {{"lr": 1.0}}] too, or leave {name} out.',
                    field=name,
                )
        return None
    known = Candidate.__struct_fields__
    for number, each in enumerate(candidates):
        if unknown := [name for name in each if name not in known]:
            raise RequestError(
                f"A candidate has no {unknown[0]!r}.",
                "Candidates differ in numbers that leave a run's time alone, since the time is seen.",
                f"There are {', '.join(known)}; all else is the same for all.",
                field=f"candidates[{number}]",
            )
    bound = bound if bound is not None else _bound(loss, target)
    try:
        asked = {"candidates": [dict(each) for each in candidates], "bound": bound}
        return msgspec.convert(asked | ({} if runs is None else {"runs": runs}), Selection)
    except msgspec.ValidationError as error:
        raise malformed(error) from None


def _bound(loss: Callable[..., torch.Tensor] | None, target: Column | None) -> float | None:
    """How much of one patient's loss counts; None, which means the Brier score, where it is a yes or no's log loss."""
    plain = type(loss) is torch.nn.BCEWithLogitsLoss and loss.weight is None and loss.pos_weight is None
    if plain or loss is F.binary_cross_entropy_with_logits or (target and target.type == "boolean"):
        return None
    if target and target.type == "category":
        return max(4.0, 2 * math.log(len(target.categories)))
    raise RequestError(
        "The candidates' scores have no bound.",
        "A score is the mean loss of validation patients, of whom each may add so much at most.",
        "Say bound=2.0, for instance: a few times the loss of a model that knows nothing.",
        field="bound",
    )
