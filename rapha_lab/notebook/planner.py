"""The planner: sliders for ε, epochs, batch and cohort, and what they would cost and give, before anything is spent.

- Every figure is a quote of the site's accountant. None comes from a record, and a quote is free.
- A `Plan` is useful without widgets: `plan.quote`, `plan.move(epsilon=0.5)`, and a picture in its repr.
- With ipywidgets it shows sliders; they only call `move`, a moment after they came to rest.
- `%load_ext rapha_lab` makes `plan` a method of datasets: `cohort.plan(model)`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
from collections.abc import Callable
from typing import Any

from rapha_lab.client.calls import called
from rapha_lab.client.quotes import Quote, inquiry
from rapha_lab.client.site import Dataset
from rapha_lab.notebook.forecast import picture, problem
from rapha_lab.protocol.errors import RaphaError

__all__ = ["Plan", "plan"]

EPSILONS = [round(10 ** (n / 4), 4) for n in range(-6, 5)]
"""Where the curve is computed: 0.03 to 10, in quarters of a decade."""

REST = 0.06
"""Seconds for which a slider has rested before the picture is drawn anew."""

BATCH, RATE = "patients expected in a step", "chance of a patient to be in a step"

LABELS = {"epsilon": "ε", "epochs": "epochs", "batch": "batch size", "patients": "cohort size"}


@called("cohort.plan(model)")
def plan(
    dataset: Dataset,
    what: Any,
    *,
    epsilon: float = 1.0,
    epochs: float | None = None,
    batch: int | None = None,
    patients: int | None = None,
    split: str | None = None,
    widgets: bool = True,
    **settings: Any,
) -> Plan:
    """What a training or a question would cost and how exact it would be, with sliders to try settings.

    Free: every figure comes from the site's accountant, none from a record, and nothing is charged or logged.

    Args:
        dataset: what `site.dataset(...)` gave.
        what: a model to fit, or "count", "mean:COLUMN", "histogram:COLUMN", "evaluate:METRIC", "shards:NUMBERS", "fit".
        epsilon, epochs, batch: to begin with.
        patients: another cohort's size; such figures are marked hypothetical.
        split: train for a fit, test for an evaluation, else all patients, if not given.
        widgets: False for a picture and figures alone.
        settings: further ones of `Dataset.quote`.

    Raises:
        RequestError, PolicyError: as `Dataset.quote`.
    """
    given = {"epochs": epochs, "batch": batch, "patients": patients, "split": split}
    planned = Plan(dataset, what, {"epsilon": epsilon} | given | settings)
    if widgets and importlib.util.find_spec("ipywidgets") is not None:
        planned.widget = _widget(planned)
    return planned


class Plan:
    """Settings and their quote. Its repr is sliders, or a picture, or text, whichever the front end can show.

    Attributes:
        quote: for the settings as they are now.
        curve: quotes for other ε, all else as it is.
        settings: these, as `Dataset.quote` takes them.
        problem: why the last `move` has no quote, if it has none; `quote` is then the one before.
        widget: the sliders and the picture, if there is ipywidgets.
    """

    def __init__(self, dataset: Dataset, what: Any, settings: dict[str, Any]) -> None:
        self._dataset, self._what, self.settings = dataset, what, settings
        self._curves: dict[str, list[Quote]] = {}
        self.widget: Any = None
        self.problem: RaphaError | None = None
        self.curve: list[Quote] = []
        self.quote = self._quotes([settings["epsilon"]])[0]
        self.trace()

    @called("plan.move(epsilon=0.5)")
    def move(self, **settings: Any) -> Plan:
        """Change settings; those without a quote, such as a batch above the cohort, leave it and set `problem`."""
        return self.step(**settings).trace()

    def step(self, **settings: Any) -> Plan:
        """As `move`, and leave the curve as it was, which takes longer to compute."""
        self.settings |= settings
        try:
            self.quote, self.problem = self._quotes([self.settings["epsilon"]])[0], None
        except RaphaError as error:
            self.problem = error
        return self

    def trace(self) -> Plan:
        """Bring `curve` up to the settings; it is kept for when they come back, until something is charged."""
        if self.problem is None:
            shown = {name: value for name, value in self.settings.items() if name != "epsilon"}
            key = repr((sorted(shown.items()), [account.before for account in self.quote.accounts.values()]))
            try:
                if key not in self._curves:
                    self._curves[key] = self._quotes(EPSILONS)
                self.curve = self._curves[key]
            except RaphaError:
                self.curve = []  # the quote stands without it
        return self

    def _quotes(self, epsilons: list[float]) -> list[Quote]:
        schema = self._dataset.schema
        asks = [inquiry(schema, self._what, **self.settings | {"epsilon": each}) for each in epsilons]
        return self._dataset.quotes(asks)

    def to_html(self) -> str:
        """The picture and the figures, in the page's own colours."""
        return picture(self.quote, self.curve) + (problem(self.problem) if self.problem else "")

    def __repr__(self) -> str:
        said = f"\n  {self.problem}" if self.problem else ""
        return f"{self.quote!r}{said}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        shown = self.widget._repr_mimebundle_() if self.widget is not None else {}
        return shown | {"text/html": self.to_html(), "text/plain": repr(self)}


# -- sliders --------------------------------------------------------------------------------------------


def _widget(planned: Plan) -> Any:
    import ipywidgets

    picture_of = ipywidgets.HTML(planned.to_html())
    sliders = _sliders(planned)

    def figures() -> None:
        if "batch" in sliders and planned.quote.patients:
            # a batch is drawn from the cohort, so it ends where that does
            expected = _expected(planned.quote) / planned.quote.patients * sliders["patients"].value
            batch = sliders["batch"]
            batch.value = max(each for _, each in batch.options if each <= max(min(batch.value, expected), 1))
        planned.step(**{name: slider.value for name, slider in sliders.items()})
        picture_of.value = planned.to_html()

    def curve() -> None:
        picture_of.value = planned.trace().to_html()

    rested = _Rested(figures, curve)
    for slider in sliders.values():
        slider.observe(lambda change: rested(), names="value")
    return ipywidgets.VBox([*sliders.values(), picture_of])


def _sliders(planned: Plan) -> dict[str, Any]:
    """One for each setting that has a say in the quote, from where the plan stands."""
    import ipywidgets

    def slider(name: str, value: float, low: float, high: float, tip: str) -> Any:
        choices = _choices(value, low, high)
        return ipywidgets.SelectionSlider(
            options=[(f"{each:,}" if isinstance(each, int) else f"{each:g}", each) for each in choices],
            value=value,
            description=LABELS[name],
            tooltip=tip,
            style={"description_width": "7em"},
            layout={"width": "34em"},
        )

    quote, kind = planned.quote, planned.quote.kind
    made = {
        "epsilon": slider("epsilon", float(quote.epsilon), 0.01, 10, "privacy loss, on a logarithmic scale")
    }
    if kind == "fit":
        size, expected = round(quote.figures[BATCH]), _expected(quote)
        passes = max(1, round(quote.figures["steps"] * size / expected))
        made["epochs"] = slider("epochs", passes, 1, 1000, "passes over the patients")
        made["batch"] = slider("batch", size, 1, max(expected, 2), "patients expected in a step")
    if kind in ("fit", "mean", "evaluate") and quote.patients:
        top = max(100_000, 10 * quote.patients)
        made["patients"] = slider(
            "patients", quote.patients, 10, top, "another than declared is hypothetical"
        )
    return made


def _expected(quote: Quote) -> float:
    """Patients expected in the split that a fit is on."""
    return quote.figures[BATCH] / quote.figures[RATE]


def _choices(value: float, low: float, high: float) -> list[float]:
    """Where a slider may stand: forty places a decade, whole if `value` is, and `value` itself to the digit."""
    places = range(math.floor(40 * math.log10(low)), math.ceil(40 * math.log10(high)) + 1)
    grid = {float(f"{10 ** (n / 40):.3g}") for n in places}
    made = {round(each) for each in grid} if isinstance(value, int) else grid
    return sorted({value, *(each for each in made if low <= each <= high)})


class _Rested:
    """Calls its stages `REST` seconds apart once nothing called it for as long; at once where no event loop runs."""

    def __init__(self, *stages: Callable[[], None]) -> None:
        self._stages = stages
        self._waiting: asyncio.TimerHandle | None = None

    def __call__(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._after(0)

    def _after(self, stage: int) -> None:
        if stage == len(self._stages):
            return
        try:
            self._waiting = asyncio.get_running_loop().call_later(REST, self._run, stage)
        except RuntimeError:
            self._run(stage)

    def _run(self, stage: int) -> None:
        self._stages[stage]()
        self._after(stage + 1)
