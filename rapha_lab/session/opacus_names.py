"""The names of Opacus that scripts use besides its PrivacyEngine: the same in a rehearsal and at a site that has no Opacus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from torch import nn

from rapha_lab.protocol.errors import ProgramError, RequestError
from rapha_lab.session import checking
from rapha_lab.session.opacus import Accountant, PrivacyEngine, as_wrapped
from rapha_lab.session.standins import standing_in

__all__ = ["recognised"]


class ModuleValidator:
    """Stands for Opacus' class: what does not train patient by patient is found, and mended, as by `rapha.fix`."""

    @staticmethod
    def fix(module: nn.Module, **_: Any) -> nn.Module:
        """A copy of `module` without layers that mix patients."""
        return checking.fix(module)

    @staticmethod
    def validate(module: nn.Module, *, strict: bool = False) -> list[ProgramError]:
        """What does not train; raised if `strict`."""
        errors = checking.untrainable(module)
        if strict and errors:
            raise errors[0]
        return errors

    @staticmethod
    def is_valid(module: nn.Module) -> bool:
        """Whether it trains as it is."""
        return not checking.untrainable(module)

    @classmethod
    def fix_and_validate(cls, module: nn.Module, **_: Any) -> nn.Module:
        """The mended copy, or what still does not train."""
        fixed = cls.fix(module)
        cls.validate(fixed, strict=True)
        return fixed


class BatchMemoryManager:
    """Stands for Opacus' class: batches are computed in parts that fit at the site, so it gives the loader back."""

    def __init__(self, *, data_loader: Any, max_physical_batch_size: int = 0, optimizer: Any = None) -> None:
        self._loader = data_loader

    def __enter__(self) -> Any:
        return self._loader

    def __exit__(self, *_: Any) -> None:
        pass


class _Wrapped(type):
    def __instancecheck__(cls, it: Any) -> bool:
        return isinstance(it, nn.Module) and "_module" in vars(it)

    def __call__(cls, module: nn.Module, *_: Any, **__: Any) -> Any:
        return as_wrapped(module)


class GradSampleModule(metaclass=_Wrapped):
    """Stands for Opacus' class: a model is wrapped as it is."""


class _Private(type):
    def __instancecheck__(cls, it: Any) -> bool:
        return hasattr(it, "noise_multiplier")

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        _refuse("opacus.optimizers", "DPOptimizer")


class DPOptimizer(metaclass=_Private):
    """Stands for Opacus' class where it is a type; make_private gives one."""


_OPTIMIZER = (
    "The optimizer is torch's own; clipping and noise are the curator's, as make_private(...) asks for them."
)
_NOISE = (
    "Give make_private_with_epsilon(..., target_epsilon=3, epochs=10) in place of a noise_multiplier; the noise found is then "
    "optimizer.noise_multiplier. Before a cell, cohort.plan(model) shows both."
)
_BATCHES = "The curator samples patients: patients.train.loader(FEATURES, target, batch_size=512, epochs=10) is the loader."
_INSTEAD = {
    "opacus.optimizers": _OPTIMIZER,
    "opacus.accountants": _NOISE,
    "opacus.accountants.utils": _NOISE,
    "opacus.schedulers": "Noise follows from ε and stays as it is; patients.train.fit(..., clip_quantile=0.9) follows a norm.",
    "opacus.data_loader": _BATCHES,
    "opacus.utils.uniform_sampler": _BATCHES,
    "opacus.distributed": "Leave it out: where and how a batch is computed is the site's.",
    "opacus.grad_sample": "Per-patient gradients stay at the site; what it cannot derive it says by itself: rapha.check(...).",
}


def _refuse(module: str, name: str) -> NoReturn:
    raise RequestError(
        f"{module} has no {name} here.",
        "Of Opacus a cell has what a script needs around its loop; the rest is the curator's.",
        _INSTEAD.get(module, "Leave it out; docs/methods.md says what there is."), field=name,
    )  # fmt: skip


def _noise(*_: Any, **__: Any) -> NoReturn:
    _refuse("opacus.accountants.utils", "get_noise_multiplier")


_ACCOUNTANTS = dict.fromkeys(
    ("IAccountant", "RDPAccountant", "PRVAccountant", "GaussianAccountant"), Accountant
)
_VALIDATORS = {"ModuleValidator": ModuleValidator}
_WRAPPED = {"GradSampleModule": GradSampleModule, "GradSampleModuleFastGradientClipping": GradSampleModule}
_LAYERS = {
    "DPRNN": nn.RNN,
    "DPGRU": nn.GRU,
    "DPLSTM": nn.LSTM,
    "DPMultiheadAttention": nn.MultiheadAttention,
    "SequenceBias": nn.Identity,
}
_ERRORS = dict.fromkeys(
    ("UnsupportedModuleError", "ShouldReplaceModuleError", "IllegalModuleConfigurationError"), ProgramError
)
_NAMES: dict[str, dict[str, Any]] = {
    "opacus": {"PrivacyEngine": PrivacyEngine, **_WRAPPED},
    "opacus.privacy_engine": {"PrivacyEngine": PrivacyEngine},
    "opacus.validators": _VALIDATORS,
    "opacus.validators.module_validator": _VALIDATORS,
    "opacus.validators.errors": _ERRORS,
    "opacus.utils": {},
    "opacus.utils.batch_memory_manager": {
        "BatchMemoryManager": BatchMemoryManager,
        "wrap_data_loader": lambda *, data_loader, **_: data_loader,
    },
    "opacus.utils.module_modification": {"convert_batchnorm_modules": checking.fix},
    "opacus.utils.uniform_sampler": {},
    "opacus.optimizers": {"DPOptimizer": DPOptimizer},
    "opacus.optimizers.optimizer": {"DPOptimizer": DPOptimizer},
    "opacus.grad_sample": _WRAPPED,
    "opacus.grad_sample.grad_sample_module": _WRAPPED,
    "opacus.layers": _LAYERS,
    "opacus.layers.dp_rnn": _LAYERS,
    "opacus.layers.dp_multihead_attention": _LAYERS,
    "opacus.accountants": _ACCOUNTANTS,
    "opacus.accountants.utils": {"get_noise_multiplier": _noise},
    "opacus.schedulers": {},
    "opacus.data_loader": {},
    "opacus.distributed": {},
}


@contextmanager
def recognised(source: str) -> Iterator[None]:
    """While a cell runs that speaks of Opacus, its names are the above."""
    if "opacus" not in source:
        yield
        return
    with suppress(ModuleNotFoundError):  # in a rehearsal the curator counts by the real one
        import opacus.accountants.analysis.rdp  # noqa: F401
    with standing_in(_NAMES, _refuse):
        yield
