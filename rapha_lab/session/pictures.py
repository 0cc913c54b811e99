"""A picture of a release, drawn of what was released alone: bars and points with error bars, curves, heat maps."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rapha_lab.protocol.release import Release, Row

__all__ = ["picture"]

TEAL, GREY = "#2f7d6d", "#444444"
COLOURS = (TEAL, "#b3261e", "#3b5ba5", "#9a6700", "#6a3d9a", "#5f6b6d")
MOST = 40
"""Bars or cells' rows at most: more cannot be read."""


def picture(release: Release) -> Figure | None:
    """A matplotlib figure of a release, or None where a table says all."""
    told = release.values
    draw = _KINDS.get(told.get("kind", ""))
    if draw is None or (not told.get("figures") and told.get("kind") in ("mean", "sum", "rows", "variance")):
        return None
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    if not draw(axes, release):
        return None
    title = fill(f"{release.title}, ε {release.epsilon:g}", int(12 * figure.get_figwidth()) - 8)
    axes.set_title(title, fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _histogram(axes: Axes, release: Release) -> bool:
    told = release.values
    counts, ends = np.array(told["counts"], dtype=float), np.array(told["intervals"], dtype=float)
    bars = np.abs(ends.T - counts)
    if "edges" in told:
        edges = np.array(told["edges"])
        logarithmic = edges[0] > 0 and not np.allclose(np.diff(edges), np.diff(edges)[0])
        centres = np.sqrt(edges[1:] * edges[:-1]) if logarithmic else (edges[1:] + edges[:-1]) / 2
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=TEAL, alpha=0.75, edgecolor="white")
        axes.errorbar(centres, counts, bars, fmt="none", ecolor=GREY, elinewidth=1, capsize=2)
        axes.set_xscale("log" if logarithmic else "linear")
        axes.set_xlabel(f"{told['column']} ({told['unit']})" if told.get("unit") else told["column"])
        axes.set_ylabel("patients")
        return len(counts) > 1
    return _bars(axes, release.rows, "patients")


def _bars(axes: Axes, rows: list[Row], label: str, *, zero: bool = True) -> bool:
    """Rows as bars from 0, or as points where 0 means nothing, from the top down."""
    if not 1 < len(rows) <= MOST:
        return False
    places, values = np.arange(len(rows)), np.array([row.value for row in rows])
    ends = np.array([row.interval or (row.value, row.value) for row in rows])
    bars = np.abs(ends.T - values)
    if zero:
        axes.barh(places, values, color=TEAL, alpha=0.75)
    axes.errorbar(values, places, xerr=bars, fmt="none" if zero else "o", color=TEAL, ecolor=GREY, capsize=2)
    axes.set_yticks(places, [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(label)
    _resize(axes, 7, max(2.2, 0.8 + 0.28 * len(rows)))
    return True


def _resize(axes: Axes, width: float, height: float) -> None:
    figure = axes.get_figure(root=True)
    if figure is not None:
        figure.set_size_inches(width, height)


def _counts(axes: Axes, release: Release) -> bool:
    told = release.values
    if len(told["by"]) != 2:
        return _bars(axes, release.rows, "patients")
    (first, second), counts = told["keys"], [row.value for row in release.rows]
    table = np.array(counts, dtype=float).reshape(len(first), len(second))
    _heat(axes, table, first, second, "{:.0f}", (0.0, max(table.max(), 1.0)), "Greens")
    axes.set(xlabel=told["by"][1], ylabel=told["by"][0])
    return max(table.shape) <= MOST


def _heat(
    axes: Axes,
    table: np.ndarray,
    rows: list[str],
    columns: list[str],
    form: str,
    limits: tuple[float, float],
    map_: str,
) -> None:
    image = axes.imshow(table, cmap=map_, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30 if len(columns) > 5 else 0)
    axes.set_yticks(range(len(rows)), rows)
    axes.figure.colorbar(image, ax=axes)
    if table.size <= 150:
        for (y, x), value in np.ndenumerate(table):
            dark = abs(value) > 0.6 * limits[1]
            axes.text(
                x,
                y,
                form.format(value),
                ha="center",
                va="center",
                color="white" if dark else "black",
                fontsize=8,
            )


def _correlation(axes: Axes, release: Release) -> bool:
    names = release.values["columns"]
    table = np.eye(len(names))
    rows = iter(release.rows)
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            table[i, j] = table[j, i] = next(rows).value
    _heat(axes, table, names, names, "{:.2f}", (-1.0, 1.0), "RdBu_r")
    _resize(axes, min(2.5 + 0.7 * len(names), 9), min(2 + 0.5 * len(names), 7))
    return len(names) > 2


def _survival(axes: Axes, release: Release) -> bool:
    for curve, colour in zip(release.values["curves"], COLOURS, strict=False):
        ends = np.array(curve["intervals"])
        axes.step(curve["at"], curve["survival"], where="post", color=colour, label=curve["name"])
        axes.fill_between(
            curve["at"], ends[:, 0], ends[:, 1], step="post", color=colour, alpha=0.2, linewidth=0
        )
    told = release.values
    axes.set(ylim=(0, 1.02), ylabel=f"without {told['event']}")
    axes.set_xlabel(f"{told['time']} ({told['unit']})" if told.get("unit") else told["time"])
    if len(told["curves"]) > 1:
        axes.legend(frameon=False)
    return True


def _evaluation(axes: Axes, release: Release) -> bool:
    told = release.values
    if "roc" in told:
        axes.plot(told["roc"]["fpr"], told["roc"]["tpr"], color=TEAL)
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
    elif "calibration" in told:
        curve, seen = told["calibration"], np.array(told["calibration"]["observed"])
        bars = np.abs(np.array(curve["interval"]).reshape(-1, 2).T - seen)
        axes.errorbar(curve["predicted"], seen, bars, fmt="o", color=TEAL, ecolor=GREY, capsize=2)
        axes.set(xlabel="predicted", ylabel="observed")
    else:
        return False
    axes.plot([0, 1], [0, 1], color="#999999", linestyle=":")
    _resize(axes, 4.2, 3.6)
    return True


def _points(axes: Axes, release: Release) -> bool:
    unit = release.values.get("unit") or release.values.get("column", "")
    return _bars(axes, release.rows, unit, zero=False)


_KINDS: dict[str, Callable[[Axes, Release], bool]] = {
    "histogram": _histogram,
    "counts": _counts,
    "discovered": _counts,
    "rows": lambda axes, release: _bars(axes, release.rows, release.values["unit"]),
    "sum": lambda axes, release: _bars(axes, release.rows, release.values["unit"]),
    "missing": lambda axes, release: _bars(axes, release.rows, "% of patients"),
    "mean": _points,
    "quantiles": _points,
    "correlation": _correlation,
    "survival": _survival,
    "evaluation": _evaluation,
}
