"""A quote as a picture: the error or noise over ε, the figures beside it, and what each account would have left."""

from __future__ import annotations

import math
from html import escape
from itertools import groupby

from rapha_lab.client import cards
from rapha_lab.client.quotes import Quote
from rapha_lab.protocol.errors import RaphaError

__all__ = ["picture", "problem"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 190, 64, 34, 24


def picture(quote: Quote, curve: list[Quote]) -> str:
    """The curve over ε, the figures beside it, and below them each account as a bar."""
    rows = "".join(
        f'<tr><th scope="row" style="text-align:left;font-weight:normal;padding:.1em 1em .1em 0">{escape(name)}</th>'
        f'<td style="text-align:right;font-variant-numeric:tabular-nums">{escape(value)}</td></tr>'
        for name, value in [("ε of this request", f"{quote.epsilon:.4g}"), *cards.quote_figures(quote)]
    )
    bars = "".join(
        f'<tr><th scope="row" style="text-align:left;font-weight:normal;padding-right:1em">{escape(split)}</th>'
        f'<td style="text-align:left">{cards.gauge_after(account)}</td></tr>'
        for split, account in quote.accounts.items()
    )
    verdict = "✓ It fits the budget." if quote.fits else "✗ It does not fit the budget."
    notes = ["Nothing is spent by planning; no record is looked at.", *cards.quote_notes(quote)]
    return (
        '<div style="line-height:1.4;max-width:62em;color:inherit">'
        f"<div><b>{escape(cards.quote_title(quote))}</b> · {verdict}</div>"
        '<div style="display:flex;flex-wrap:wrap;gap:1.5em;align-items:center">'
        f"{_curve(quote, curve)}<table>{rows}</table></div>"
        f"<table>{bars}</table>"
        + "".join(f'<div style="opacity:.75">{escape(note)}</div>' for note in notes)
        + "</div>"
    )


def _curve(quote: Quote, curve: list[Quote]) -> str:
    """What is to be expected over ε on logarithmic scales; dashed where it would not fit the budget."""
    name = "noise multiplier" if quote.error is None else f"standard error ({quote.unit})"
    points = sorted([*curve, quote], key=lambda each: each.epsilon)
    points = [each for each in points if _height(each) > 0]
    if len(points) < 2:
        return ""
    heights, ends = [_height(each) for each in points], (points[0].epsilon, points[-1].epsilon)
    low, high = min(heights), max(max(heights), min(heights) * 1.001)

    def x(epsilon: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 12) * math.log(epsilon / ends[0]) / math.log(ends[1] / ends[0])

    def y(height: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * math.log(high / height) / math.log(high / low)

    at = x(quote.epsilon), y(_height(quote))
    label = f"ε {quote.epsilon:.3g}: {_height(quote):.3g}"
    # a falling curve leaves room above to the right, and below to the left
    side, right, down = ("start", 8, -8) if at[0] < _WIDTH - 110 else ("end", -10, 16)
    said = (
        f"{name} over ε, falling from {high:.3g} at ε {ends[0]:g} to {low:.3g} at ε {ends[1]:g}; now {label}"
    )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(said)}" style="font-size:11px;max-width:100%" fill="currentColor">'
        f'<text x="0" y="12">{escape(name)}</text>'
        f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - 12}" fill="none" stroke="currentColor" stroke-opacity=".5"/>'
        + "".join(
            f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
            for tick in (low, high)
        )
        + "".join(
            f'<text x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{tick:g}</text>'
            for tick in (0.01, 0.1, 1, 10)
            if ends[0] <= tick <= ends[1]
        )
        + f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">'
        "ε of this request (dashed: beyond the budget)</text>"
        + _lines([(x(each.epsilon), y(_height(each)), each.fits) for each in points])
        + f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="5" fill="{cards.TEAL}" stroke="currentColor"/>'
        f'<text x="{at[0] + right:.1f}" y="{max(at[1] + down, 12):.1f}" text-anchor="{side}" font-weight="600">{label}</text>'
        "</svg>"
    )


def _lines(points: list[tuple[float, float, bool]]) -> str:
    """The curve: a solid line through what fits, a dashed one from there on."""
    drawn, last = "", ""
    for fits, part in groupby(points, key=lambda point: point[2]):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in part)
        dash = "" if fits else ' stroke-dasharray="5 4"'
        drawn += (
            f'<polyline points="{last} {path}" fill="none" stroke="currentColor" stroke-width="1.5"{dash}/>'
        )
        last = path.split(" ")[-1]
    return drawn


def _height(quote: Quote) -> float:
    return quote.noise if quote.error is None else quote.error


def problem(error: RaphaError) -> str:
    """Why there is no quote for the settings as they are now."""
    return (
        f'<div role="status" style="border-left:4px solid {cards.AMBER};padding:.2em .8em;margin:.4em 0">'
        f"⚠ {escape(str(error))} The figures above are those of the settings before.</div>"
    )
