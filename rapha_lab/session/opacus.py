"""Scripts written for Opacus: `PrivacyEngine().make_private(...)` in a cell makes their loop a loop on sealed tensors.

Only the loader changes, `patients.train.loader(inputs, target, ...)` for a `DataLoader`, since there are no records
here to load. Clipping, noise and sampling are the curator's, and so is the accounting; module and optimizer come
back as they were given, with the names that Opacus gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch

from rapha_lab.protocol.errors import RequestError, SealedError
from rapha_lab.session.loops import Batches
from rapha_lab.session.sealed import SealedTensor

__all__ = ["Accountant", "Loader", "PrivacyEngine"]


@dataclass
class Loader:
    """Goes through batches of patients, `(inputs, target)` sealed, once it is said at what price.

    Attributes:
        open: begins a loop of `epochs` at an ε and a clipping norm; gives its batches.
        inputs, target: the columns of a batch.
        batch_size: expected patients in a batch.
        steps: how many batches an epoch has, a public number.
        epochs: how often it can be gone through.
        epsilon: of all epochs; that of the cell if nobody says.
    """

    open: Callable[[float, float | None, float | None], Batches]
    inputs: Any
    target: str
    batch_size: int
    steps: int
    epochs: float
    epsilon: float | None = None
    clip: float | None = None
    _batches: Batches | None = None
    _left: int = 0

    def __len__(self) -> int:
        return self.steps

    @property
    def dataset(self) -> NoReturn:
        """Refused: its length would be the number of patients."""
        raise SealedError(
            "The dataset of a loader would show patients' records.", "No record is here, and their number is secret.",
            "len(loader) is the number of batches, loader.batch_size the public size of each.",
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[SealedTensor, SealedTensor]]:
        """One epoch; the loop closes, and its release is given, with the last."""
        if not torch.is_grad_enabled():
            raise RequestError(
                "A loader was gone through without gradients, as one judges a model.",
                "No value of a patient would come of it; a loader's price is for training.",
                'Ask for figures at once: patients.test.evaluate(model, ["auroc", "logloss"], inputs=FEATURES, '
                'target="death", epsilon=0.1).', field="data_loader",
            )  # fmt: skip
        if self._batches is None:
            self._batches, self._left = self.open(self.epochs, self.epsilon, self.clip), self._whole
        if not self._left:
            raise RequestError(
                f"This loader is gone through more than epochs={self.epochs:g} times.",
                "What is paid for is so many epochs, said before the first.",
                "Say how many they will be, as epochs=10, in loader(...) or make_private(...).", field="epochs",
            )  # fmt: skip
        return self._epoch(self._batches)

    @property
    def _whole(self) -> int:
        return math.ceil(self.epochs * self.steps)

    def _epoch(self, batches: Batches) -> Iterator[tuple[SealedTensor, SealedTensor]]:
        for step in range(steps := min(self.steps, self._left)):
            batch = next(batches, None)
            if batch is None:  # a rehearsal takes a few, as if they were all
                self._left -= steps - step
                return
            self._left -= 1
            yield batch[self.inputs], batch[self.target]
        if not self._left:
            batches.close()


class Accountant:
    """Stands for Opacus' accountants; the books are the curator's, and this says what was asked of them."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.epsilon = 0.0
        self.history: list[tuple[float, float, int]] = []

    def get_epsilon(self, delta: float | None = None, **_: Any) -> float:
        """The ε of all the loader's epochs at the policy's δ."""
        return self.epsilon

    def __len__(self) -> int:
        return len(self.history)


class PrivacyEngine:
    """Stands in a cell for Opacus' class of the same name."""

    def __init__(self, *old: Any, **settings: Any) -> None:
        """Accountants and secure modes are the curator's; `settings` are not looked at."""
        if any(isinstance(it, torch.nn.Module) for it in old) or "module" in settings:
            raise RequestError(
                "PrivacyEngine was given a model, as in the first versions of Opacus.", "There is no attach() any more.",
                "Write model, optimizer, loader = PrivacyEngine().make_private_with_epsilon(module=model, optimizer=optimizer, "
                "data_loader=loader, target_epsilon=1, epochs=10, max_grad_norm=1.0).", field="module",
            )  # fmt: skip
        self.accountant = Accountant()

    def make_private(
        self,
        *,
        module: Any,
        optimizer: Any,
        data_loader: Any,
        max_grad_norm: float,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        epochs: float | None = None,
        criterion: Any = None,
        **settings: Any,
    ) -> tuple[Any, ...]:
        """The module, the optimizer, and a loader of sealed batches; before it the criterion of ghost clipping.

        Args:
            module, optimizer: of any kind; they are given back.
            data_loader: of `patients.train.loader`.
            max_grad_norm: the most one patient's gradient may weigh.
            noise_multiplier: the noise wished, whose ε is found by asking what an ε's noise would be.
            target_epsilon: the ε of all epochs; exactly one of the two is given.
            epochs: how often the loader is gone through, if it does not say so itself.
            criterion: given back, as Opacus does, where `grad_sample_mode` is one of ghost clipping.
            settings: Opacus' others; those that would change the mechanism are refused.

        Raises:
            RequestError: naming the argument that is malformed.
        """
        _check(data_loader, max_grad_norm, settings)
        if (noise_multiplier is None) == (target_epsilon is None):
            why = "ε is what is paid here; noise alone has an ε by the number of steps."
            raise RequestError(
                "Give one of noise_multiplier and target_epsilon.", why, "Say target_epsilon=1, say.",
                field="target_epsilon",
            )  # fmt: skip
        loader = replace(
            data_loader, epochs=epochs or data_loader.epochs, clip=float(max_grad_norm), _batches=None
        )
        loader.epsilon, noise = _priced(loader, target_epsilon, noise_multiplier)
        self.accountant.epsilon = float(loader.epsilon)
        self.accountant.history = [(noise, 1 / loader.steps, loader._whole)]
        as_wrapped(module)
        optimizer.noise_multiplier, optimizer.max_grad_norm = noise, float(max_grad_norm)
        optimizer.expected_batch_size, optimizer.original_optimizer = loader.batch_size, optimizer
        ghost = "ghost" in str(settings.get("grad_sample_mode", "")) and criterion is not None
        return (module, optimizer, criterion, loader) if ghost else (module, optimizer, loader)

    def make_private_with_epsilon(
        self, *, target_epsilon: float, epochs: float, target_delta: float | None = None, **rest: Any
    ) -> tuple[Any, ...]:
        """As `make_private`; δ is the policy's, whatever `target_delta` says."""
        return self.make_private(target_epsilon=target_epsilon, epochs=epochs, **rest)

    def get_epsilon(self, delta: float | None = None) -> float:
        """The ε of all the loader's epochs at the policy's δ; `cohort.budget` says what is left."""
        return self.accountant.epsilon

    def is_compatible(self, *, module: Any, optimizer: Any = None, data_loader: Any = None) -> bool:
        """Whether a model trains patient by patient."""
        from rapha_lab.session.checking import untrainable

        return not untrainable(module)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise RequestError(
            f"PrivacyEngine has no {name} here.",
            "It has make_private, make_private_with_epsilon, get_epsilon, is_compatible and accountant.",
            "Noise for an ε is found by make_private_with_epsilon(...), and is then optimizer.noise_multiplier; "
            "weights come back with -o.", field=name,
        )  # fmt: skip


def as_wrapped(module: Any) -> Any:
    """A model as Opacus wraps one, whose `_module` is the model: here it is itself, and none of its submodules."""
    object.__setattr__(module, "_module", module)
    return module


def _check(loader: Any, norm: Any, settings: dict[str, Any]) -> None:
    if not isinstance(loader, Loader):
        raise RequestError(
            f"data_loader is a {type(loader).__name__}.", "There are no records here that it could load.",
            "Put patients.train.loader(FEATURES, target, batch_size=512, epochs=10) in its place.",
            field="data_loader",
        )  # fmt: skip
    if isinstance(norm, (list, tuple)) or settings.get("clipping", "flat") != "flat":
        raise RequestError(
            "Clipping by layer is not done here.", "A patient's whole gradient is clipped to one norm.",
            "Give max_grad_norm as a number, and leave clipping out.", field="max_grad_norm",
        )  # fmt: skip
    if settings.get("loss_reduction", "mean") != "mean":
        raise RequestError(
            "loss_reduction is recognised by itself.", "A loss is a mean or a sum over patients.",
            "Leave it out.", field="loss_reduction",
        )  # fmt: skip


class _Price(NamedTuple):
    epsilon: float
    noise: float


def _priced(loader: Loader, epsilon: float | None, wished: float | None) -> _Price:
    """The ε, and its noise; or the ε whose noise is the one wished, to 1 %.

    Loops are opened and closed again unused, which is free.
    """
    found = epsilon if epsilon is not None else 0.5
    for _ in range(20):
        batches = loader.open(loader.epochs, found, loader.clip)
        batch = next(batches)
        batches.close()
        noise = batch.noise * batch.expected / (loader.clip or 1.0)
        if wished is None or wished <= noise <= 1.01 * wished:
            break
        found *= min(2.0, max(0.5, noise / (1.005 * wished)))
    return _Price(found, noise)
