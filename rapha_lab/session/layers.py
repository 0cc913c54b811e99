"""Layers that cannot be trained patient by patient, and hooks that would not be called: each refused with its way out."""

from __future__ import annotations

from torch import nn

from rapha_lab.protocol.errors import ProgramError

__all__ = ["HOOK", "groups", "leave_off_spectral", "refuse_hooks", "refuse_layer", "refuse_modules"]

HOOK = (
    "A module has a hook for the backward pass.",
    "Gradients are derived at the site from the forward pass, so that it would not be called.",
    "Leave it out. In a loop of your own a hook of a parameter is called with its private gradient: p.register_hook(...).",
)

_FIX = (
    "or write model = rapha.fix(model) before (import rapha_lab as rapha), which does it for the whole model."
)


def refuse_modules(model: nn.Module, training: bool = True) -> None:
    """Raise ProgramError if `model` holds a layer whose training looks across patients."""
    for name, module in model.named_modules():
        refuse_layer(name, module, training)


def refuse_layer(name: str, module: nn.Module, training: bool = True) -> None:
    """Raise ProgramError if a module's own training looks across patients."""
    it = f"{name or 'The model'} is a {type(module).__name__}"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (training or module.running_mean is None):
        channels = module.num_features
        raise ProgramError(
            f"{it}, which mixes patients.",
            "It normalises each patient by the others of the batch, so no gradient is one patient's own.",
            f"Replace it by nn.GroupNorm({groups(channels)}, {channels}) or nn.LayerNorm, {_FIX}", field=name or "model",
        )  # fmt: skip
    if training and _spectral(module):
        raise ProgramError(
            f"{it} with spectral_norm, which changes vectors of its own while it computes.",
            "A patient's program changes nothing.",
            "Use nn.utils.parametrizations.weight_norm, or no norm (clipped gradients move the weights little), "
            f"{_FIX}",
            field=name or "model",
        )  # fmt: skip
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and training and module.track_running_stats:
        raise ProgramError(
            f"{it} with running statistics, which mix patients.", "It keeps means over all that it has seen.",
            f"Make it with track_running_stats=False, {_FIX}", field=name or "model",
        )  # fmt: skip


def _spectral(module: nn.Module) -> bool:
    """Whether one of its weights is under a spectral norm, in the newer or the older way."""
    chains = getattr(module, "parametrizations", {}).values()
    held = [*(each for chain in chains for each in chain), *module._forward_pre_hooks.values()]
    return any(type(each).__name__ in ("_SpectralNorm", "SpectralNorm") for each in held)


def leave_off_spectral(module: nn.Module) -> None:
    """Take spectral norms off a module's weights, which stay as large as they were under them."""
    for name in list(getattr(module, "parametrizations", {})) if _spectral(module) else ():
        nn.utils.parametrize.remove_parametrizations(module, name)
    for hook in list(module._forward_pre_hooks.values()):
        if type(hook).__name__ == "SpectralNorm":
            nn.utils.remove_spectral_norm(module, hook.name)  # type: ignore[attr-defined]


def groups(channels: int) -> int:
    """A usual number of groups for a GroupNorm of so many channels."""
    return next(g for g in (32, 16, 8, 4, 3, 2, 1) if channels % g == 0 and g < max(channels, 2))


def refuse_hooks(both: nn.Module) -> None:
    """Raise ProgramError for hooks that a fit, whose steps are taken at the site, would never call."""
    of_modules = any(module._backward_hooks or module._backward_pre_hooks for module in both.modules())
    if of_modules:
        raise ProgramError(*HOOK, field="model")
    for name, p in both.named_parameters():
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise ProgramError(
                f"{name.removeprefix('model.')} has a hook.", "The steps are taken at the site, where it would not be called.",
                "Leave it out, or write a loop of your own, in which it is called with the private gradient.", field="model",
            )  # fmt: skip
