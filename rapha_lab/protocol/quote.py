"""What a question would cost and how exact its answer would be: asked and answered before anything is spent.

Nothing in a quote depends on a record. It is made of the schema, the policy, and what the project has spent;
asking for one touches no patient, reserves nothing, is not logged, and may be repeated at will.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rapha_lab.protocol.messages import Metric, Name, Positive, Split

__all__ = ["Inquiries", "Inquiry", "Kind", "Quote", "Standing"]

Kind = Literal[
    "count", "sum", "mean", "variance", "histogram", "quantiles", "correlation", "survival", "missing", "describe",
    "rows", "discover", "fit", "evaluate", "shards",
]  # fmt: skip


class Inquiry(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A question to be quoted, by the public figures that its price and its error follow from.

    Attributes:
        epsilon: its own (ε, δ) guarantee; or
        error: the standard error wished, of which the quote says the ε.
        column: of a question about one.
        fields: further fields of an aggregate's request, as in {"by": ["sex"]}.
        steps, batch, clip: of a fit or of a training loop.
        runs: of a fit's candidates, how many trainings count on average.
        size: the model's numbers to train, or those that a function on shards returns.
        metrics: of an evaluation.
        prevalence, auroc: what to assume of the patients and the model to be evaluated.
        patients: another number of patients than the declared one, for planning.
    """

    kind: Kind
    split: Split = "all"
    epsilon: Positive | None = None
    error: Positive | None = None
    column: Name | None = None
    bins: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    fields: dict[str, Any] = {}
    steps: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    batch: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    clip: Positive = 2.0
    runs: Annotated[float, Meta(ge=1.0, le=20.0)] | None = None
    size: Annotated[int, Meta(ge=0, le=10**12)] = 0
    metrics: Annotated[tuple[Metric, ...], Meta(min_length=1, max_length=16)] = ("auroc",)
    prevalence: Annotated[float, Meta(ge=0.001, le=0.999)] = 0.2
    auroc: Annotated[float, Meta(ge=0.5, le=0.999)] = 0.8
    patients: Annotated[int, Meta(ge=1, le=10**9)] | None = None


class Inquiries(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Several questions about one dataset, each quoted as if it were the next and only one."""

    dataset: Name
    project: Annotated[str, Meta(max_length=64)] = ""
    asks: Annotated[list[Inquiry], Meta(min_length=1, max_length=16)]


class Standing(msgspec.Struct, kw_only=True, frozen=True):
    """Where one split's account would stand after a request; every ε at the policy's δ, per patient.

    Attributes:
        epsilon: the budget.
        before: spent or reserved now.
        fits: whether the request would be admitted now.
        spent, left, room: what the statement would say after it; what it says now, if it does not fit.
        largest: if it does not fit, the largest ε with which the same request would, 0 if none.
        discovery: the δ that would be left for discovered keys.
    """

    epsilon: float
    before: float
    fits: bool
    spent: float
    left: float
    room: float
    largest: float | None = None
    discovery: float = 0.0


class Quote(msgspec.Struct, kw_only=True, frozen=True):
    """The price of a question and the error to expect, from public figures alone.

    Attributes:
        epsilon, delta: the guarantee that the answer would have on its own.
        noise: standard deviation of the noise over what one patient can move, for a fit in each step.
        error: expected standard error of the answer in `unit`s; None where no public figure defines it.
        figures: further expected figures by name.
        accounts: where the account of each split that would be looked at would stand.
        notes: what the figures assume.
        hypothetical: whether they are for another number of patients than the declared one.
    """

    kind: Kind
    split: str
    epsilon: float
    delta: float
    noise: float
    error: float | None = None
    unit: str = ""
    column: str = ""
    figures: dict[str, float] = {}
    accounts: dict[str, Standing]
    patients: int | None = None
    notes: list[str] = []
    hypothetical: bool = False

    @property
    def fits(self) -> bool:
        """Whether every account it would be charged to has room for it."""
        return all(account.fits for account in self.accounts.values())

    @property
    def spent(self) -> float:
        """Of the account that would have least left: what would be spent then."""
        return self._tightest.spent

    @property
    def left(self) -> float:
        """Of the account that would have least left: what that is."""
        return self._tightest.left

    @property
    def room(self) -> float:
        """Of the account that would have least left: the largest ε of one further Gaussian answer."""
        return self._tightest.room

    @property
    def largest(self) -> float | None:
        """If it does not fit, the largest ε with which the same request would, 0 if none."""
        return min((a.largest for a in self.accounts.values() if a.largest is not None), default=None)

    @property
    def _tightest(self) -> Standing:
        return min(self.accounts.values(), key=lambda account: account.left)
