"""What will train, what will not, and the line to change: said before anything is asked of anybody's patients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rapha_lab.protocol.errors import PolicyError, ProgramError, RequestError
from rapha_lab.protocol.program import Program
from rapha_lab.protocol.program import within as in_bounds
from rapha_lab.session import layers, losses, recipe, tracing

__all__ = ["Finding", "Findings", "check", "fix", "untrainable", "within"]

LARGE = 1 << 14
"""Numbers from which on a copy of a parameter for each patient makes a step slow."""

PATHS = {
    "outer": "a patient's gradient is clipped without being written out, as fast as it gets",
    "rows": "a patient's gradient is kept for the rows of the table that the patient uses",
    "stored": "a patient's gradient is written out, clipped and added up",
    "copy": "each patient gets a copy of the parameter, which is slow where it is large",
}
"""What the site's ways to a parameter's gradient mean."""

Lift = Callable[[Program], Mapping[str, str]]
"""The site's table on a program: how each parameter is differentiated, or ProgramError."""


@dataclass(frozen=True)
class Finding:
    """One thing to know of a model.

    Attributes:
        stops: whether the model cannot train until it is changed.
        where: the module, parameter or field.
        what, why, instead: what is the case, the reason, and what to write instead.
        line: of the cell, where one is at fault.
    """

    stops: bool
    where: str
    what: str
    why: str = ""
    instead: str = ""
    line: int | None = None

    def __str__(self) -> str:
        mark = "change" if self.stops else "  note"
        place = f" (line {self.line})" if self.line else ""
        return f"{mark}  {' '.join(part for part in (self.what, self.why, self.instead) if part)}{place}"


class Findings(list[Finding]):
    """What was found; in a notebook it shows as a list, and as a condition it is whether the model trains.

    Attributes:
        paths: by parameter, how the site will compute its gradient and why so.
    """

    paths: Mapping[str, str] = {}

    def __bool__(self) -> bool:
        return not any(finding.stops for finding in self)

    def __repr__(self) -> str:
        head = "This model trains." if self else "This model does not train yet."
        alike: dict[str, list[str]] = {}
        for name, path in self.paths.items():
            alike.setdefault(path, []).append(name)
        trains = [f"trains  {', '.join(names)}: {path}" for path, names in alike.items()]
        taken = {path.partition(":")[0] for path in alike}
        means = [f"        {way}: {meaning}." for way, meaning in PATHS.items() if way in taken]
        return "\n".join([head, *map(str, self), *trains, *means])


def check(
    model: nn.Module,
    loss: Callable[..., Tensor] | None,
    inputs: Any,
    target: Any,
    *,
    of: Any = None,
    lift: Lift | None = None,
) -> Findings:
    """What a training of `model` will meet at a site, from the model alone.

    Args:
        model: what is to be trained.
        loss: of (prediction, target), a mean or a sum over patients; the usual one of the target if None.
        inputs: columns as for `fit`, or a batch of made-up patients: a tensor, or tensors by argument.
        target: a column, or a tensor of made-up targets.
        of: the dataset, or `patients`, whose columns are meant.
        lift: the site's table.

    Raises:
        RequestError: an argument is malformed.
    """
    examples, goal, loss = _examples(model, loss, inputs, target, of)
    found = Findings(_layers(model))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        names = ", ".join(frozen[:4]) + (", ..." if len(frozen) > 4 else "")
        found.append(Finding(False, frozen[0], f"{names} will not train.", "requires_grad is False."))
    if not found:
        return found
    try:
        within(model, getattr(of, "largest_model", None))
        losses.refuse_target(loss, of.schema.find(target)[0] if isinstance(target, str) else None)
        program = tracing.loss_program(model, loss, examples, goal).program
        found.paths = lift(program) if lift else {}
    except (PolicyError, ProgramError) as error:
        found.append(Finding(True, error.field or "model", error.what, error.why, error.instead, error.line))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for name in [name for name, path in found.paths.items() if path.startswith("copy")]:
        if sizes.get(name, 0) >= LARGE:
            found.append(
                Finding(
                    False,
                    name,
                    f"{name} trains slowly.",
                    f"Each patient of a batch gets a copy of its {sizes[name]:,} numbers.",
                    "As the weight itself of nn.Linear, a convolution, nn.Embedding or a recurrent layer it would not.",
                )
            )
    for name in [name for name, path in found.paths.items() if path.startswith("none")]:
        found.append(
            Finding(
                False,
                name,
                f"{name} will not move.",
                "The loss does not depend on it, or detach() cuts it off.",
            )
        )
    return found


def within(model: nn.Module, largest: int | None) -> None:
    """Raise PolicyError if the model has more numbers to train than the policy lets; before it is traced for long."""
    if largest is not None:
        in_bounds(sum(p.numel() for p in model.parameters() if p.requires_grad), largest)


def fix(model: nn.Module) -> nn.Module:
    """A copy of `model` without layers that mix patients or write in place; untrained where it was changed.

    BatchNorm becomes GroupNorm of as many channels, InstanceNorm forgets its running statistics, activations with
    `inplace=True` make new tensors, and a spectral norm is left off. Weights and scales are kept.
    """
    if not isinstance(model, nn.Module):
        raise RequestError(
            f"The model is a {type(model).__name__}.",
            "It must be an nn.Module.",
            "Say rapha.fix(model).",
            field="model",
        )
    held = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    # what a norm of the older way computed last, which deepcopy would refuse
    fixed = copy.deepcopy(model, {id(t): t.detach().clone() for t in held if not t.is_leaf})
    for name, module in list(fixed.named_modules()):
        layers.leave_off_spectral(module)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parent, _, last = name.rpartition(".")
            new = _group_norm(module)
            if not name:
                return new
            setattr(fixed.get_submodule(parent), last, new)
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
        elif getattr(module, "inplace", False):
            module.inplace = False
    return fixed


def _group_norm(old: nn.modules.batchnorm._BatchNorm) -> nn.GroupNorm:
    new = nn.GroupNorm(layers.groups(old.num_features), old.num_features, old.eps, old.affine)
    if old.affine:
        new.load_state_dict({"weight": old.weight.detach(), "bias": old.bias.detach()})
    return new.train(old.training)


def untrainable(model: nn.Module) -> list[ProgramError]:
    """What each layer says that cannot be trained patient by patient."""
    found = []
    for name, module in model.named_modules():
        try:
            layers.refuse_layer(name, module)
        except ProgramError as error:
            found.append(error)
    return found


def _layers(model: nn.Module) -> list[Finding]:
    """A finding for each layer that cannot be trained, the way out with its name."""
    return [
        Finding(True, error.field or "model", error.what, error.why, error.instead)
        for error in untrainable(model)
    ]


def _examples(
    model: Any, loss: Any, inputs: Any, target: Any, of: Any
) -> tuple[dict[str, Tensor], Tensor, Callable[..., Tensor]]:
    """One patient's inputs and target, and the loss."""
    if not isinstance(model, nn.Module):
        raise RequestError(
            f"The model is a {type(model).__name__}.", "It must be an nn.Module.", field="model"
        )
    named = dict(inputs) if isinstance(inputs, Mapping) else {"x": inputs}

    if of is not None and not hasattr(of, "schema"):
        raise RequestError(
            f"of is a {type(of).__name__}.",
            "It must be the dataset whose columns are meant, or patients.",
            'Say of=cohort, where cohort = site.dataset("flchain") for instance.',
            field="of",
        )

    def example(field: str, value: Any) -> Tensor:
        if isinstance(value, Tensor) and value.dim():
            return value[0].detach()
        if of is None or isinstance(value, Tensor):
            raise RequestError(
                f"{field} is no batch of made-up patients.",
                "It must be a tensor with patients in front, or columns of a dataset.",
                "Say check(model, loss, FEATURES, 'death', of=cohort), say.",
                field=field,
            )
        shape, dtype = of.schema.layout(value)
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    if loss is None:
        if not isinstance(target, str) or of is None:
            raise RequestError("There is no loss.", "A tensor has no usual one.", "Give one.", field="loss")
        loss = recipe.loss_for(of.schema.column(target))
    return {name: example("inputs", value) for name, value in named.items()}, example("target", target), loss
