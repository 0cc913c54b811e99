"""Losses of torch on targets that they are not made for: torch says so of tensors, or not at all."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from rapha_lab.protocol.columns import Column
from rapha_lab.protocol.errors import ProgramError
from rapha_lab.session import scaled, tracing

__all__ = ["refuse_column", "refuse_shapes", "refuse_target"]

YES_OR_NO = ("binary_cross_entropy_with_logits", "binary_cross_entropy")
CLASSES = ("cross_entropy", "nll_loss")
PAIRED = (*YES_OR_NO, "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")


def refuse_shapes(name: str, prediction: tuple[int, ...], target: tuple[int, ...], real: bool) -> None:
    """Raise ProgramError for shapes that would compare each patient's prediction with others' targets, or that do not fit.

    Args:
        name: of torch's function.
        prediction, target: their shapes, patients in front.
        real: whether the target is a tensor of floats.
    """
    if name in PAIRED and len(prediction) != len(target) and min(len(prediction), len(target)) > 0:
        raise ProgramError(
            f"{name} has a prediction of shape {prediction} and a target of shape {target}.",
            "Either has an entry for each patient, and they stand in different dimensions.",
            'Write model(batch[FEATURES]).squeeze(-1), or batch["death"].unsqueeze(1).', line=tracing.cell_line(),
        )  # fmt: skip
    if name in CLASSES and real and len(prediction) == len(target) + 1:
        raise ProgramError(
            f"{name} has a target of floats.", "It takes classes by their numbers, and a yes or no is 0.0 or 1.0.",
            'Write batch["death"].long(), or with one logit F.binary_cross_entropy_with_logits.',
            line=tracing.cell_line(),
        )  # fmt: skip


def refuse_column(name: str, target: Column) -> None:
    """Raise ProgramError for a loss of yes or no whose target is a number, or one of several categories."""
    if (
        name not in YES_OR_NO
        or target.type == "boolean"
        or (not target.numeric and len(target.categories) < 3)
    ):
        return
    if target.numeric:
        is_a, why = "a number", f"It is scaled: {scaled.words(target)}."
        instead = (
            "Use nn.MSELoss() or nn.HuberLoss(), or ask a yes or no: "
            f'patients.with_columns(high=pl.col("{target.name}") > {sum(target.limits) / 2:g}), target "high".'
        )
    else:
        is_a, why = f"one of {len(target.categories)} categories", "It comes as its category's number."
        instead = f"Use nn.CrossEntropyLoss() and a model with {len(target.categories)} outputs."
    raise ProgramError(
        f"{name} takes a yes or no, and {target.name} is {is_a}.",
        why,
        instead,
        field="loss",
        line=tracing.cell_line(),
    )


def refuse_target(loss: Any, target: Column | None) -> None:
    """The same for a loss that is called, a module or a function, on a column; one of the cell's own is its own affair."""
    modules = {nn.BCEWithLogitsLoss: YES_OR_NO[0], nn.BCELoss: YES_OR_NO[1]}
    functions = {F.binary_cross_entropy_with_logits: YES_OR_NO[0], F.binary_cross_entropy: YES_OR_NO[1]}
    name = modules.get(type(loss)) or next((name for f, name in functions.items() if f is loss), "")
    if target is not None:
        refuse_column(name, target)
