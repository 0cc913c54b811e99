"""A release: a differentially private answer with its error bar, its price and its receipt.

It is what a session gets for a question, what a notebook shows, and what an output checker reads.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping
from itertools import pairwise, product
from typing import Any

import msgspec
import rfc8785

from rapha_lab.protocol.messages import JUDGES

__all__ = ["MIME", "Release", "Row", "canonical", "output_statement", "statement"]

MIME = "application/vnd.rapha.release+json"


def canonical(value: Any) -> bytes:
    """`value` as canonical JSON (RFC 8785): the same bytes on every machine and after every browser."""
    return rfc8785.dumps(msgspec.to_builtins(value))


def statement(release: Mapping[str, Any]) -> bytes:
    """What the log's entry of a release names by its SHA-256: what was asked, its guarantee, and the answer.

    So nobody can hold up a receipt beside a smaller epsilon than the one that was paid for it.
    """
    named = "op", "dataset", "split", "epsilon", "delta", "values", "tensors"
    return canonical({name: release[name] for name in named})


def output_statement(data: dict[str, Any], signed: dict[str, Any]) -> bytes:
    """What a site signs of one output, so that it can be told from a forged, edited or moved one.

    Args:
        data: the output's MIME bundle.
        signed: site, job, notebook cell and index, as they stand in the output's metadata.
    """
    named = {name: signed[name] for name in ("site", "job", "cell", "index")}
    return b"rapha-lab/output/v1" + canonical(named | {"digest": hashlib.sha256(canonical(data)).hexdigest()})


class Row(msgspec.Struct, frozen=True):
    """One released figure: its value, standard error and 95 % interval where it has them."""

    name: str
    value: float
    error: float | None = None
    interval: tuple[float, float] | None = None

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __str__(self) -> str:
        low, high = self.interval or (None, None)
        return f"{self.value:.4g}" + ("" if low is None else f" (95 % {low:.4g} to {high:.4g})")

    # so that a loop can keep the best model, or stop: if row < best
    def __lt__(self, other: Any) -> bool:
        return self.value < float(other)

    def __gt__(self, other: Any) -> bool:
        return self.value > float(other)

    def __le__(self, other: Any) -> bool:
        return self.value <= float(other)

    def __ge__(self, other: Any) -> bool:
        return self.value >= float(other)


class Release(msgspec.Struct, kw_only=True):
    """A private answer.

    Attributes:
        job: the number under which the site's log and ledger know it.
        op: what was asked, as in protocol/messages.py.
        values: the answer as the curator gave it, with a random `nonce` that hides it behind its hash in the log.
        tensors: SHA-256 of the tensors that came with it, in hex.
        epsilon, delta: its own guarantee; `unit` says for whom.
        receipt: the log's entry with its proof and the signed checkpoint.
        repeated: whether it is the answer to the same question as before, given again at no price.
    """

    job: str
    op: str
    dataset: str
    split: str
    site: str
    epsilon: float
    delta: float
    unit: str = "patient"
    values: dict[str, Any] = {}
    tensors: str = ""
    receipt: dict[str, Any] = {}
    simulated: bool = False
    repeated: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """Whose patients were looked at and charged: a selection's are those who scored it too."""
        return (self.split, JUDGES) if self.values.get("selection") else (self.split,)

    @property
    def title(self) -> str:
        """What was asked, in a few words."""
        told = self.values
        kind, column = told.get("kind", self.op), told.get("column", "")
        among = f" where {told['among']}" if told.get("among") else ""
        by = f" by {' and '.join(told['by'])}" if told.get("by") else ""
        of = {
            "count": "Rows",
            "patients": "Patients with rows",
            "sum": f"Sum of {column}",
            "mean": f"Mean of {column}",
        }
        words = {
            "count": "Number of patients",
            "counts": f"Patients{by}",
            "sum": f"Sum of {column}{by}",
            "mean": f"Mean of {column}{by}",
            "variance": f"Spread of {column}{by}",
            "histogram": f"Patients by {column}",
            "quantiles": f"Quantiles of {column}",
            "correlation": f"Correlation of {', '.join(told.get('columns', ()))}",
            "survival": f"Without {told.get('event')} by {told.get('time')}{by}",
            "missing": "Not known",
            "description": "Patients described",
            "rows": f"{of.get(told.get('of', ''), 'Rows')} in {told.get('table')}{by}{among}",
            "discovered": f"Patients{by} in {told.get('table')}{among}",
            "evaluation": f"How well {told.get('target', 'the target')} is predicted on {self.split}",
            "shards": f"{told.get('function', '')} of patients, averaged over {told.get('shards')} shards",
            "fit": f"Trained on {self.split}: {told.get('steps')} private steps{_chosen(told.get('selection'))}"
            + (", Adam's second moment corrected" if told.get("corrected") else ""),
            "review": f"{told.get('function', '')}, released by custodians",
        }
        unit, where = told.get("unit"), told.get("where")
        shown = bool(column) or kind in ("survival", "missing")
        return (
            words.get(kind, kind)
            + (f" ({unit})" if unit and shown else "")
            + (f" where {_bare(where)}" if where else "")
        )

    @property
    def rows(self) -> list[Row]:
        """The released figures in order."""
        told = self.values
        kind = told.get("kind", self.op)
        if "figures" in told:
            return [_row(figure["name"], figure) for figure in told["figures"]]
        if kind in ("count", "sum", "mean", "rows"):
            return [_row(told.get("column", told.get("table", "patients")), told)]
        if kind == "histogram":
            names = told.get("categories") or _bins(told["edges"])
            each = zip(names, told["counts"], told["intervals"], strict=True)
            rows = [Row(name, value, told["error"], tuple(ends)) for name, value, ends in each]
            return rows + ([_row("missing", told["missing"])] if told.get("missing") else [])
        if kind == "shards":
            names = _entries(told["function"], told["shape"])
            figures = zip(names, told["estimates"], told["errors"], told["intervals"], strict=True)
            return [Row(name, value, error, tuple(ends)) for name, value, error, ends in figures]
        if kind == "fit":
            rows = [Row(words, told[name]) for name, words in _RECIPE.items() if name in told]
            return rows + _selected(told.get("selection"))
        return [_row(name, figure) for name, figure in told.get("metrics", {}).items()]

    def __getattr__(self, name: str) -> Any:
        """What else was released with the figures: edges and counts, curves, a training's settings."""
        if not name.startswith("_") and name in self.values:
            return self.values[name]
        raise AttributeError(f"This release has no {name!r}; it has {', '.join(self.values)}.")

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is not among {', '.join(row.name for row in self.rows)}")

    @property
    def _only(self) -> Row:
        if len(self.rows) != 1:
            raise TypeError(
                f"This release holds {len(self.rows)} figures; name one: release['{self.rows[0].name}']."
            )
        return self.rows[0]

    @property
    def value(self) -> float:
        """The one figure of this release."""
        return self._only.value

    @property
    def error(self) -> float | None:
        """Standard error of the one figure."""
        return self._only.error

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the one figure."""
        return self._only.interval

    def __float__(self) -> float:
        return self.value

    def _price(self) -> str:
        number = self.receipt.get("index")
        again = " · asked before, so free" if self.repeated else ""
        receipt = f" · receipt {number}{again}" if number is not None else ""
        simulated = " · simulated enclave" if self.simulated else ""
        where = f"{self.dataset}, {' and '.join(self.splits)}{receipt}{simulated}"
        if self.op == "review":
            return f"no ε: outside every privacy guarantee · {where}"
        return f"ε {self.epsilon:g}, δ {self.delta:g} per {self.unit} · {where}"

    def __repr__(self) -> str:
        wide = max([24, *(len(row.name) for row in self.rows[:40])])
        rows = "\n".join(f"  {row.name:<{wide}} {_shown(row):>12}{_bar(row)}" for row in self.rows[:40])
        more = f"\n  ... {len(self.rows) - 40} more" if len(self.rows) > 40 else ""
        return (
            f"{self.title}\n{rows}{more}\n  {self._price()}"
            if self.rows
            else f"{self.title}\n  {self._price()}"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td style="text-align:left">{html.escape(row.name)}</td>'
            f'<td style="text-align:right;font-variant-numeric:tabular-nums">{_shown(row)}</td>'
            f'<td style="text-align:left;opacity:.75">{html.escape(_bar(row).strip())}</td>'
            f"<td>{_line(row, self.rows)}</td></tr>"
            for row in self.rows[:60]
        )
        return (
            '<div style="border-left:3px solid #2f7d6d;padding:.35em .9em;margin:.3em 0">'
            f"<b>{html.escape(self.title)}</b><table>{rows}</table>"
            f'<small style="opacity:.8">{html.escape(self._price())}</small></div>'
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        drawn = {"title": self.title, "rows": msgspec.to_builtins(self.rows), "splits": list(self.splits)}
        card = msgspec.to_builtins(self) | drawn
        return {MIME: card, "text/html": self._repr_html_(), "text/plain": repr(self)}


_RECIPE = {
    "steps": "steps",
    "batch": "expected patients a step",
    "noise": "noise multiplier",
    "clip": "clipping norm",
    "clip_quantile": "quantile that the clipping norm followed",
    "last_clip": "clipping norm in the end",
    "bands": "bands of noise",
    "average": "average of the weights, decay",
}


def _chosen(selection: dict[str, Any] | None) -> str:
    """Which of several settings it was trained with, in words."""
    if selection is None:
        return ""
    if selection["chosen"] is None:
        return f", none of which counted among {selection['candidates']} candidates: the weights are the starting ones"
    return f", the best found of {selection['candidates']} candidates"


def _selected(selection: dict[str, Any] | None) -> list[Row]:
    """How the best of several settings was found: its score, its settings, and what looking for it cost."""
    if selection is None:
        return []
    score = "Brier score" if selection["bound"] is None else "loss"
    best = [_row(f"{score} on validation", selection["score"])] if selection["score"] else []
    best += [Row(f"chosen {name}", value) for name, value in selection["settings"].items()]
    names = {
        "noise_alone": "noise multiplier of one training",
        "mean": "runs that count, on average",
        "runs": "runs computed",
    }
    return best + [Row(words, selection[name]) for name, words in names.items()]


def _row(name: str, told: dict[str, Any]) -> Row:
    return Row(
        name, told["value"], told.get("error"), tuple(told["interval"]) if told.get("interval") else None
    )


def _bins(edges: list[float]) -> list[str]:
    return [f"{low:.4g} to {high:.4g}" for low, high in pairwise(edges)]


def _entries(name: str, shape: list[int]) -> list[str]:
    places = product(*map(range, shape))
    return [f"{name}[{', '.join(map(str, place))}]" if place else name for place in places]


def _bare(words: str) -> str:
    """Words without the brackets that hold all of them."""
    depth = 0
    for place, each in enumerate(words):
        depth += (each == "(") - (each == ")")
        if depth == 0:
            return words[1:-1] if words[:1] == "(" and place == len(words) - 1 else words
    return words


def _figure(value: float, places: int = 0) -> str:
    return f"{value:,.{places}f}" if abs(value) >= 1000 else f"{value:.4g}"


def _places(row: Row) -> int:
    """Decimals of a large figure whose interval would else have no width to see."""
    return 2 if row.interval is not None and 0 < row.interval[1] - row.interval[0] < 4 else 0


def _shown(row: Row) -> str:
    return _figure(row.value, _places(row))


def _bar(row: Row) -> str:
    if row.interval is not None:
        low, high = (_figure(end, _places(row)) for end in row.interval)
        return f"  95 % {low} to {high}"
    return f"  ± {_figure(row.error)}" if row.error is not None else ""


def _line(row: Row, rows: list[Row]) -> str:
    """The figure as a dot and its interval as a line, on the scale of all rows."""
    spans = [each.interval or (each.value, each.value) for each in rows]
    low, high = min(0.0, *(s[0] for s in spans)), max(0.0, *(s[1] for s in spans))
    if row.interval is None or not high > low:
        return ""
    x = [round(4 + 152 * (v - low) / (high - low), 1) for v in (row.interval[0], row.value, row.interval[1])]
    return (
        '<svg width="160" height="12" role="img" aria-hidden="true">'
        f'<line x1="{x[0]}" x2="{x[2]}" y1="6" y2="6" stroke="currentColor" stroke-opacity=".5" stroke-width="2"/>'
        f'<circle cx="{x[1]}" cy="6" r="4" fill="#2f7d6d"/></svg>'
    )
