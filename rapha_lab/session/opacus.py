"""Scripts written for Opacus: `PrivacyEngine().make_private(...)` in a cell makes their loop a loop on sealed tensors.

Only the loader changes, `patients.train.loader(inputs, target, ...)` for a `DataLoader`, since there are no records
here to load. Clipping, noise and sampling are the curator's, and so is the accounting; module and optimizer come
back as they were given.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from rapha_lab.protocol.errors import RequestError
from rapha_lab.session.loops import Batches
from rapha_lab.session.sealed import SealedTensor

__all__ = ["Loader", "PrivacyEngine", "recognised"]


@dataclass
class Loader:
    """Goes through batches of patients, `(inputs, target)` sealed, once `make_private` has said at what price.

    Attributes:
        open: begins a loop of `epochs` at an ε and a clipping norm; gives its batches.
        inputs, target: the columns of a batch.
        steps: how many batches an epoch has, a public number.
        epochs: how often it can be gone through.
    """

    open: Callable[[float, float, float], Batches]
    inputs: Any
    target: str
    steps: int
    epochs: float
    epsilon: float | None = None
    clip: float = 1.0
    _batches: Batches | None = None
    _left: int = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[SealedTensor, SealedTensor]]:
        """One epoch; the loop closes, and its release is given, with the last."""
        if self.epsilon is None:
            raise RequestError(
                "This loader is not private yet.", "Nobody has said what going through it may cost.",
                "Give it to PrivacyEngine().make_private(...), or write a loop over patients.train.batches(...).",
                field="data_loader",
            )  # fmt: skip
        if self._batches is None:
            self._batches = self.open(self.epochs, self.epsilon, self.clip)
            self._left = math.ceil(self.epochs * self.steps)
        for _ in range(min(self.steps, self._left)):
            batch = next(self._batches, None)
            if batch is None:
                return
            self._left -= 1
            yield batch[self.inputs], batch[self.target]
        if not self._left:
            self._batches.close()


class PrivacyEngine:
    """Stands in a cell for Opacus' class of the same name."""

    def __init__(self, **settings: Any) -> None:
        """Accountants and secure modes are the curator's; `settings` are not looked at."""
        self._epsilon = 0.0

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
        **settings: Any,
    ) -> tuple[Any, Any, Loader]:
        """The module, the optimizer, and a loader of sealed batches.

        Args:
            module, optimizer: of any kind; they are given back.
            data_loader: of `patients.train.loader`.
            max_grad_norm: the most one patient's gradient may weigh.
            noise_multiplier: the noise wished, whose ε is found by asking what an ε's noise would be.
            target_epsilon: the ε of all epochs; exactly one of the two is given.
            epochs: how often the loader is gone through, if it does not say so itself.
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
        loader.epsilon = target_epsilon if noise_multiplier is None else _epsilon(loader, noise_multiplier)
        self._epsilon = float(loader.epsilon or 0.0)
        return module, optimizer, loader

    def make_private_with_epsilon(
        self, *, target_epsilon: float, epochs: float, target_delta: float | None = None, **rest: Any
    ) -> tuple[Any, Any, Loader]:
        """As `make_private`; δ is the policy's, whatever `target_delta` says."""
        return self.make_private(target_epsilon=target_epsilon, epochs=epochs, **rest)

    def get_epsilon(self, delta: float | None = None) -> float:
        """The ε of all the loader's epochs at the policy's δ; `cohort.budget` says what is left."""
        return self._epsilon


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


def _epsilon(loader: Loader, wished: float) -> float:
    """The ε whose noise is the one wished, to 1 %: loops are opened and closed again unused, which is free."""
    epsilon = 0.5
    for _ in range(20):
        batches = loader.open(loader.epochs, epsilon, loader.clip)
        batch = next(batches)
        batches.close()
        noise = batch.noise * batch.expected / loader.clip
        if wished <= noise <= 1.01 * wished:
            break
        epsilon *= min(2.0, max(0.5, noise / (1.005 * wished)))
    return epsilon


@contextmanager
def recognised(source: str) -> Iterator[None]:
    """While a cell runs that speaks of Opacus, its PrivacyEngine is the one above."""
    if "opacus" not in source:
        yield
        return
    try:
        import opacus
    except ModuleNotFoundError:  # at the site, where a session has no use for the rest of it
        sys.modules["opacus"] = opacus = ModuleType("opacus")
        opacus.PrivacyEngine = PrivacyEngine  # type: ignore[attr-defined]
    before, opacus.PrivacyEngine = opacus.PrivacyEngine, PrivacyEngine
    try:
        yield
    finally:
        opacus.PrivacyEngine = before
