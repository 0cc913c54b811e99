"""Cards: what a site, a dataset, a job or a refusal looks like, as HTML for any front end and as plain text.

JupyterLab with the extension renders the JSON form of each instead.
"""

from __future__ import annotations

from html import escape
from typing import Any

__all__ = ["BLOCKED", "JOB", "blocked", "dataset", "gauge", "job", "site"]

JOB = "application/vnd.rapha.job+json"
BLOCKED = "application/vnd.rapha.blocked+json"
SITE = "application/vnd.rapha.site+json"
DATASET = "application/vnd.rapha.dataset+json"

_CARD = "border:1px solid #8884;border-left:4px solid {edge};border-radius:4px;padding:.6em 1em;margin:.3em 0;max-width:60em"
_MUTED = "opacity:.75"
TEAL, AMBER, RED = "#2f7d6d", "#9a6700", "#b3261e"


def _box(edge: str, inner: str) -> str:
    return f'<div style="{_CARD.format(edge=edge)}">{inner}</div>'


def _simulated(card: dict[str, Any]) -> str:
    if not card.get("simulated"):
        return ""
    return (
        f'<div style="color:{AMBER};font-weight:600">⚠ Simulated enclave: no hardware protects it. '
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
    rows = "".join(
        f'<tr><td style="text-align:left"><b>{escape(c["name"])}</b></td><td style="text-align:left">{escape(c["type"])}</td>'
        f'<td style="text-align:left">{escape(_range(c))}</td>'
        f'<td style="text-align:left">{"may be missing" if c.get("missing") == "possible" else ""}</td>'
        f'<td style="text-align:left;{_MUTED}">{escape(c["meaning"])}</td></tr>'
        for c in card["columns"]
    )
    patients = (
        f"about {card['patients']:,} patients" if card.get("patients") else "number of patients not public"
    )
    html = _box(
        AMBER if card.get("simulated") else TEAL,
        f"<b>{escape(card['name'])}</b>: {escape(card['title'])}"
        f"{_simulated(card)}<div>{patients} · privacy unit: one <b>patient</b> · no row is ever shown</div>"
        f"{_budgets(card['budget'])}<table>{rows}</table>"
        f'<small style="{_MUTED}">{escape(card["citation"])} · {escape(card["licence"])}</small>',
    )
    lines = [f"{card['name']}: {card['title']} ({patients}; privacy unit: patient)"]
    lines += [f"  {c['name']:<14} {c['type']:<9} {_range(c)}" for c in card["columns"]]
    lines += [
        f"  ε left for {project}, {split}: {b['left']:.3g} of {b['epsilon']:g}"
        for project, splits in card["budget"].items()
        for split, b in splits.items()
    ]
    return {DATASET: card, "text/html": html, "text/plain": "\n".join(lines)}


def _range(column: dict[str, Any]) -> str:
    if column.get("bounds"):
        low, high = column["bounds"]
        return f"{low:g} to {high:g} {column.get('unit', '')}".strip() + (
            " (log)" if column.get("scale") == "log" else ""
        )
    if column.get("categories"):
        return ", ".join(column["categories"][:12]) + ("…" if len(column["categories"]) > 12 else "")
    return "yes or no"


_STATES = {
    "queued": "waiting",
    "rehearsing": "rehearsing on made-up patients",
    "running": "running at the site",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
    "lost": "lost with its session",
}


def job(card: dict[str, Any]) -> dict[str, Any]:
    """A job's card: state, steps, ε spent of granted, time left."""
    state = _STATES.get(card["state"], card["state"])
    step, steps = card.get("step") or 0, card.get("steps") or 0
    share = step / steps if steps else 0.0
    left = card.get("seconds_left")
    words = [f"<b>{escape(state)}</b>"]
    if steps:
        words.append(f"step {step} of {steps}")
    if card.get("epsilon"):
        words.append(f"ε {card['spent']:.3g} of {card['epsilon']:.3g} released")
    if left and card["state"] == "running":
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
        f'<small style="{_MUTED}">job {escape(card["id"][:8])} · {escape(card["dataset"])} at {escape(card["site"])}</small>',
    )
    plain = f"job {card['id'][:8]} at {card['site']}: {state}" + (
        f", step {step} of {steps}" if steps else ""
    )
    return {JOB: card, "text/html": html, "text/plain": plain}


def blocked(error: dict[str, Any]) -> dict[str, Any]:
    """A refusal's card: what, why, and what to ask instead."""
    where = f" (line {error['line']} of the cell)" if error.get("line") else ""
    html = _box(
        RED,
        f'<div><span style="color:{RED};font-weight:600">⊘ Blocked.</span> {escape(error["what"])}{escape(where)}</div>'
        f'<div style="{_MUTED}">{escape(error.get("why") or "")}</div>'
        f"<div>{escape(error.get('instead') or '')}</div>",
    )
    parts = [f"[blocked] {error['what']}{where}", error.get("why"), error.get("instead")]
    return {BLOCKED: error, "text/html": html, "text/plain": "\n".join(part for part in parts if part)}
