"""Cards: what a site, a dataset, a job or a refusal looks like, as HTML for any front end and as plain text.

JupyterLab with the extension renders the JSON form of each instead.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from typing import Any

import msgspec

from rapha_lab.protocol.columns import Column
from rapha_lab.protocol.quote import Quote, Standing

__all__ = ["BLOCKED", "JOB", "SAID", "blocked", "budget", "dataset", "gauge", "job", "jobs", "quote", "site"]

JOB = "application/vnd.rapha.job+json"
BLOCKED = "application/vnd.rapha.blocked+json"
SITE = "application/vnd.rapha.site+json"
DATASET = "application/vnd.rapha.dataset+json"

_CARD = "border:1px solid #8884;border-left:4px solid {edge};border-radius:4px;padding:.6em 1em;margin:.3em 0;max-width:60em"
_MUTED = "opacity:.75"
TEAL, AMBER, RED = "#2f7d6d", "#9a6700", "#b3261e"
"""Of edges and bars; words keep the page's own colour, which can be read in light and dark themes."""


def _box(edge: str, inner: str) -> str:
    return f'<div style="{_CARD.format(edge=edge)}">{inner}</div>'


def _simulated(card: dict[str, Any]) -> str:
    if not card.get("simulated"):
        return ""
    return (
        f'<div style="background:{AMBER}33;padding:0 .4em;font-weight:600">⚠ Simulated enclave: no hardware protects it. '
        "Whoever owns the machine can read everything.</div>"
    )


def gauge(budget: dict[str, Any]) -> str:
    """A budget as a bar with its figures in words."""
    total, spent = float(budget["epsilon"]), float(budget["spent"])
    share = min(1.0, spent / total) if total else 1.0
    return (
        f'<svg width="140" height="10" role="img" aria-label="{share:.0%} spent" style="vertical-align:middle">'
        '<rect width="140" height="10" rx="3" fill="currentColor" fill-opacity=".15"/>'
        f'<rect width="{140 * share:.1f}" height="10" rx="3" fill="{TEAL if share < 0.9 else AMBER}"/></svg> '
        f"ε {spent:.3g} of {total:g} spent, {budget['left']:.3g} left"
        f"{_room(budget)}{_discovery(budget)}"
    )


def _room(budget: dict[str, Any]) -> str:
    return f", room for ε {budget['room']:.3g} at once" if "room" in budget else ""


def _discovery(budget: dict[str, Any]) -> str:
    if not budget.get("discovery"):
        return ""
    return f"; for discovered keys, δ {budget['discovered']:.3g} of {budget['discovery']:g} spent"


def budget(budgets: dict[str, Any]) -> dict[str, Any]:
    """What is left of a dataset's budget, as a gauge for each project and split."""
    lines = [
        f"{project}, {split}: ε {b['spent']:.3g} of {b['epsilon']:g} spent, {b['left']:.3g} left; "
        f"one more answer, fit or loop may take up to ε {b['room']:.4g} (room){_discovery(b)}"
        for project, splits in budgets.items()
        for split, b in splits.items()
    ]
    none = "No project of yours has a budget here."
    told = f"<div style='{_MUTED}'>{_ROOM}</div>" if lines else f"<div>{none}</div>"
    html = f"<b>Privacy budget, per patient</b>{_budgets(budgets)}{told}"
    return {"text/html": _box(TEAL, html), "text/plain": "\n".join([*lines, _ROOM]) if lines else none}


_ROOM = (
    "left: the budget less the guarantee of all answers together. room: the largest ε of a single one that is admitted next; "
    "after many small answers it is more than what is left, since together they tell less than the sum of their ε."
)


def _budgets(budgets: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><td style="text-align:left">{escape(project)}</td><td style="text-align:left">{escape(split)}</td>'
        f'<td style="text-align:left">{gauge(budget)}</td></tr>'
        for project, splits in budgets.items()
        for split, budget in splits.items()
    )
    return f"<table>{rows}</table>" if rows else ""


def site(card: dict[str, Any]) -> dict[str, Any]:
    """A site's card: verdict, measurement, policy and who signed it, its datasets."""
    policy, verdict = card["policy"], card["verdict"]
    signers = ", ".join(policy["signers"]) or "nobody"
    lines = [
        f"<b>{escape(card['name'])}</b> <code>{escape(card['url'])}</code>",
        _simulated(card),
        f"attestation: <b>{escape(verdict['status'])}</b> · measurement <code>{escape(card['measurement'][:23])}…</code>"
        f" · sandbox tier <b>{escape(card['tier'])}</b>",
        f"policy: <b>{escape(policy['name'])}</b> <code>{escape(policy['hash'][:12])}…</code>, signed by {escape(signers)},"
        f" expires {escape(policy['expires'])}",
        "datasets: "
        + ", ".join(f"<b>{escape(d['name'])}</b> ({escape(d['title'])})" for d in card["datasets"]),
    ]
    edge = AMBER if card.get("simulated") else TEAL
    html = _box(edge, "".join(f"<div>{line}</div>" for line in lines if line))
    simulated = " SIMULATED ENCLAVE: nothing protects it." if card.get("simulated") else ""
    names = ", ".join(d["name"] for d in card["datasets"])
    plain = (
        f"{card['name']} at {card['url']}.{simulated} Attestation: {verdict['status']}. "
        f"Policy {policy['name']} signed by {signers}, expires {policy['expires']}. Datasets: {names}."
    )
    return {SITE: card, "text/html": html, "text/plain": plain}


def dataset(card: dict[str, Any]) -> dict[str, Any]:
    """A dataset's card: columns with public bounds, the privacy unit, and what budget is left."""
    tables = "".join(
        f"<div><b>{escape(t['name'])}</b>: {escape(t['meaning'])} At most {t['most']} rows of a patient count.</div>"
        f"<table>{_described(t['columns'], t['name'] + '.')}</table>"
        for t in card.get("tables", ())
    )
    patients = (
        f"about {card['patients']:,} patients" if card.get("patients") else "number of patients not public"
    )
    html = _box(
        AMBER if card.get("simulated") else TEAL,
        f"<b>{escape(card['name'])}</b>: {escape(card['title'])}"
        f"{_simulated(card)}<div>{patients} · privacy unit: one <b>patient</b> · no row is ever shown</div>"
        f"{_budgets(card['budget'])}<table>{_described(card['columns'])}</table>{tables}"
        f'<small style="{_MUTED}">{escape(card["citation"])} · {escape(card["licence"])}</small>',
    )
    lines = [f"{card['name']}: {card['title']} ({patients}; privacy unit: patient)"]
    lines += [f"  {c['name']:<14} {c['type']:<9} {_range(c)}" for c in card["columns"]]
    for table in card.get("tables", ()):
        lines.append(
            f"  {table['name']}: {table['meaning']} At most {table['most']} rows of a patient count."
        )
        lines += [f"    {table['name']}.{c['name']:<14} {c['type']:<9} {_range(c)}" for c in table["columns"]]
    lines += [
        f"  ε left for {project}, {split}: {b['left']:.3g} of {b['epsilon']:g}"
        for project, splits in card["budget"].items()
        for split, b in splits.items()
    ]
    return {DATASET: card, "text/html": html, "text/plain": "\n".join(lines)}


def _described(columns: list[dict[str, Any]], prefix: str = "") -> str:
    """A table's row for each column."""
    return "".join(
        f'<tr><td style="text-align:left"><b>{escape(prefix + c["name"])}</b></td>'
        f'<td style="text-align:left">{escape(c["type"])}</td>'
        f'<td style="text-align:left">{escape(_range(c))}</td>'
        f'<td style="text-align:left">{"may be missing" if c.get("missing") == "possible" else ""}</td>'
        f'<td style="text-align:left;{_MUTED}">{escape(c["meaning"])}</td></tr>'
        for c in columns
    )


def _range(column: dict[str, Any]) -> str:
    return msgspec.convert(column, Column).values


_STATES = {
    "queued": "queued",
    "rehearsing": "rehearsing on made-up patients",
    "running": "running at the site",
    "waiting": "waits for a custodian",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
    "lost": "lost with its session",
}


def job(card: dict[str, Any]) -> dict[str, Any]:
    """A job's card: state, what is done before its steps, these, ε spent of granted, time left."""
    state = _STATES.get(card["state"], card["state"])
    step, steps = card.get("step") or 0, card.get("steps") or 0
    share = step / steps if steps else 0.0
    left = card.get("seconds_left")
    name = f"job {escape(card['id'][:8])}" if card["id"] else "no job yet"
    words = [f"<b>{escape(state)}</b>"]
    doing = str(card.get("doing") or "") if card["state"] in ("running", "rehearsing") else ""
    if doing:
        words.append(escape(doing))
    if steps:
        words.append(f"step {step} of {steps}")
    if card.get("epsilon"):
        words.append(f"ε {card['spent']:.3g} of {card['epsilon']:.3g} spent")
    if left and card["state"] == "running" and not doing:
        words.append(f"about {left:.0f} s left")
    bar = (
        f'<div style="height:6px;border-radius:3px;background:#8883;max-width:30em" role="progressbar" '
        f'aria-valuenow="{share:.0%}"><div style="height:6px;border-radius:3px;width:{share:.0%};'
        f'background:{TEAL}"></div></div>'
        if steps
        else ""
    )
    html = _box(
        AMBER if card.get("simulated") else TEAL,
        f"{bar}<div>{' · '.join(words)}</div>"
        f'<small style="{_MUTED}">{name} · {escape(card["dataset"])} at {escape(card["site"])}</small>',
    )
    plain = f"{name} at {card['site']}: {state}" + (f", {doing}" if doing else "")
    plain += f", step {step} of {steps}" if steps else ""
    return {JOB: card, "text/html": html, "text/plain": plain}


def jobs(cards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A list of jobs as a table: when, what, how far, and what of its ε was spent."""
    head = ("", "job", "begun", "dataset", "state", "steps", "ε spent", "cell")
    rows = [(str(number), *_told(card)) for number, card in enumerate(cards)]
    cells = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    heads = "".join(f'<th style="text-align:left">{name}</th>' for name in head)
    simulated = any(card.get("simulated") for card in cards)
    html = _box(
        AMBER if simulated else TEAL,
        f"<b>Your jobs</b><table><tr>{heads}</tr>{cells}</table><div style='{_MUTED}'>{escape(_ATTACH)}</div>"
        if rows
        else _NO_JOBS,
    )
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    return {"text/html": html, "text/plain": "\n".join([*lines, _ATTACH]) if rows else _NO_JOBS}


_NO_JOBS = "You have no job at this site."
_ATTACH = 'site.attach(site.jobs()[-1]["id"]) comes back to the last one, site.cancel(...) stops one.'


def _told(card: dict[str, Any]) -> tuple[str, ...]:
    begun = card.get("started")
    return (
        card["id"][:8],
        time.strftime("%d %b %H:%M", time.localtime(begun)) if begun else "",
        card["dataset"],
        _STATES.get(card["state"], card["state"]),
        f"{card.get('step') or 0} of {card['steps']}" if card.get("steps") else "",
        f"{card['spent']:.3g} of {card['epsilon']:.3g}" if card.get("epsilon") else "",
        str(card.get("source_line") or "")[:60],
    )


SAID = "What the rehearsal on made-up patients showed before that:"


def blocked(error: dict[str, Any]) -> dict[str, Any]:
    """A refusal's card: what, why, and what to ask instead."""
    where = f" (line {error['line']} of the cell)" if error.get("line") else ""
    said = error.get("said") or ""
    before = f'<div style="{_MUTED}">{SAID}</div><pre>{escape(said)}</pre>' if said else ""
    html = _box(
        RED,
        f"{before}<div><b>⊘ Blocked.</b> {escape(error['what'])}{escape(where)}</div>"
        f'<div style="{_MUTED}">{escape(error.get("why") or "")}</div>'
        f"<div>{escape(error.get('instead') or '')}</div>",
    )
    parts = [
        f"{SAID}\n{said}" if said else "",
        f"[blocked] {error['what']}{where}",
        error.get("why"),
        error.get("instead"),
    ]
    return {BLOCKED: error, "text/html": html, "text/plain": "\n".join(part for part in parts if part)}


_KINDS = {
    "count": "Number of patients",
    "describe": "Table 1",
    "correlation": "Correlation",
    "survival": "Survival",
    "missing": "What is missing",
    "rows": "A table's rows",
    "fit": "Training",
    "evaluate": "Evaluation",
    "shards": "A function on shards",
}


def quote(quote: Quote) -> dict[str, Any]:
    """A quote's card: the error to expect, the noise, and where the budget would stand."""
    title = quote_title(quote)
    figures = quote_figures(quote)
    notes = quote_notes(quote)
    rows = "".join(
        f'<tr><td style="text-align:left">{escape(name)}</td><td style="text-align:right">{escape(value)}</td></tr>'
        for name, value in figures
    )
    gauges = "".join(
        f'<tr><td style="text-align:left">{escape(split)}</td><td style="text-align:left">{gauge_after(account)}</td></tr>'
        for split, account in quote.accounts.items()
    )
    html = _box(
        TEAL if quote.fits else AMBER,
        f"<b>Quote: {escape(title)}</b> · ε {quote.epsilon:.4g}, δ {quote.delta:g} per patient · nothing was spent"
        f"<table>{rows}</table><table>{gauges}</table>"
        + "".join(f'<div style="{_MUTED}">{escape(note)}</div>' for note in notes),
    )
    plain = [f"Quote: {title} at ε {quote.epsilon:.4g}, δ {quote.delta:g} per patient; nothing was spent"]
    plain += [f"  {name:<60} {value}" for name, value in figures]
    plain += [f"  {split}: {after(account)}" for split, account in quote.accounts.items()]
    return {"text/html": html, "text/plain": "\n".join(plain + [f"  {note}" for note in notes])}


def quote_title(quote: Quote) -> str:
    """What a quote is for, in a few words."""
    title = _KINDS.get(quote.kind) or f"{quote.kind.capitalize()} of {quote.column}"
    return title + (f" on {quote.split}" if quote.split != "all" else "")


def quote_figures(quote: Quote) -> list[tuple[str, str]]:
    """A quote's figures by name, as they are shown."""
    noise = [("noise multiplier", f"{quote.noise:.4g}")]
    if quote.kind == "evaluate":
        return [
            (f"standard error of {name}", f"{value:.4g}") for name, value in quote.figures.items()
        ] + noise
    most = ", at most" if quote.kind == "mean" else ""
    error = f"{quote.error:.4g} {quote.unit}".strip() if quote.error is not None else ""
    figures = [(f"standard error to expect{most}", error)] if error else []
    return figures + noise + [(name, f"{value:,.4g}") for name, value in quote.figures.items()]


def quote_notes(quote: Quote) -> list[str]:
    """What a quote's figures assume, in sentences."""
    if not quote.hypothetical:
        return quote.notes
    return [f"Hypothetical: as if {quote.patients:,} patients were declared.", *quote.notes]


def after(account: Standing) -> str:
    """Where an account would stand after a request, in words."""
    if account.fits:
        return f"fits: ε {account.before:.3g} → {account.spent:.3g} of {account.epsilon:g} spent, {account.left:.3g} left"
    fits = (
        f"it would fit with ε {account.largest:.4g}"
        if account.largest
        else "nothing of this kind fits any more"
    )
    return f"does not fit: ε {account.before:.3g} of {account.epsilon:g} is spent; {fits}"


def gauge_after(account: Standing, width: int = 180) -> str:
    """A budget as a bar: what is spent, and outlined what a request would add."""
    ends = [width * min(1.0, part / account.epsilon) for part in (account.before, account.spent)]
    added = (
        f'<rect x="{ends[0]:.1f}" y="1" width="{max(ends[1] - ends[0], 2):.1f}" height="10" fill="{TEAL}" fill-opacity=".3" '
        f'stroke="currentColor" stroke-dasharray="3 2"/>'
        if account.fits
        else ""
    )
    return (
        f'<svg width="{width}" height="12" role="img" aria-label="{escape(after(account))}" style="vertical-align:middle">'
        f'<rect y="1" width="{width}" height="10" rx="3" fill="currentColor" fill-opacity=".15"/>'
        f'<rect y="1" width="{ends[0]:.1f}" height="10" rx="3" fill="{TEAL}"/>{added}</svg> {escape(after(account))}'
    )
