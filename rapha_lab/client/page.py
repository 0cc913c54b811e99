"""The dossier as one page to print: figures first, then what each rests on. Nothing in it is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

__all__ = ["page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; border-bottom: 3px solid #2f7d6d; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
td, th { border-bottom: 1px solid #ccc; padding: .3rem .5rem; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; }
.yes { color: #1d6b4f; } .no { color: #b3261e; font-weight: 600; } .open { color: #7a4d00; }
.warn { border-left: 5px solid #9a6700; padding: .4rem .8rem; background: #fff6df; }
pre { white-space: pre-wrap; font-size: .8rem; border: 1px solid #ccc; padding: .6rem; }
img { max-width: 100%; }
@media print {
  body { margin: 0; max-width: none; } h2 { break-after: avoid; } table, img { break-inside: avoid; }
}
"""


def page(told: dict[str, Any]) -> str:
    """The page of a dossier."""
    privacy, model, attested = told["privacy"], told["model"], told["attestation"]
    parts = [f"<h1>Dossier of {escape(model['file'])}</h1>", f"<p>Written {escape(told['written'])}.</p>"]
    if attested["simulated"]:
        parts.append(
            '<p class="warn"><b>Simulated enclave.</b> No hardware protected this training: whoever owned the machine '
            "could read everything. What is said of noise, ledger and policy holds all the same.</p>"
        )
    parts += [
        "<h2>Outcome of each criterion</h2>",
        _table([(c["criterion"], _mark(c["holds"]), c["evidence"]) for c in told["criteria"]], raw=1),
        "<h2>Privacy</h2>",
        f"<p>For {escape(privacy['unit'])}: <b>epsilon {privacy['epsilon at most']:.4g}</b>, delta "
        f"{privacy['delta at most']:.3g} at most, all answers of this dossier together. {escape(privacy['accountant'])}</p>",
        _table(
            [
                (a["asked"], a["dataset"], a["split"], f"{a['epsilon']:.4g}", f"{a['delta']:.2g}")
                for a in privacy["answers"]
            ],
            head=("asked", "dataset", "split", "epsilon", "delta"),
        ),
        "<h2>How well it does</h2>",
        *(_evaluation(each) for each in told["evaluation"]),
        "<h2>Attacks</h2>",
        _attacks(told["attacks"]),
        "<h2>How it was trained</h2>",
        _table(_settings(told["training"])),
        "<h2>The model</h2>",
        _table(
            [(name, model[name]) for name in ("sha256", "format", "parameters", "exactly what was released")]
        ),
        "<h2>Attestation</h2>",
        *(_appraised(name, attested[name]) for name in ("at training", "now")),
        _table(
            [(name, value) for name, value in attested.items() if not isinstance(value, dict) and value != ""]
        ),
        "<h2>Policy</h2>",
        f"<p>{escape(told['policy']['name'])}, version {told['policy']['version']}, until {escape(told['policy']['expires'])}. "
        f"{escape(told['policy']['purposes'])}</p>",
        _table(
            [(s["name"], s["role"], s["signed"], s["key"]) for s in told["policy"]["signers"]],
            head=("signer", "role", "signed", "key"),
        ),
        "<h2>Decisions</h2>",
        _table(
            [(d["act"], d["by"], d["when"], _mark(d["signature holds"])) for d in told["decisions"]],
            head=("decision", "by", "when", "signature"),
            raw=3,
        )
        if told["decisions"]
        else "<p>No custodian had to release these answers, or the log was not kept.</p>",
        "<h2>Receipts and log</h2>",
        _table(
            [(r["job"], r["index"], r["released by"], _mark(r["holds"])) for r in told["receipts"]],
            head=("job", "entry", "released by", "proof holds"),
            raw=3,
        ),
        "".join(
            f"<p>{escape(line)}</p>" for line in told["log"].get("says", [told["log"].get("why not", "")])
        ),
        "<h2>The policy's page</h2>",
        f"<pre>{escape(told['policy']['page'])}</pre>",
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Dossier</title>'
        f"<style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def _appraised(name: str, told: dict[str, Any]) -> str:
    loud = "" if told["status"] == "affirming" else ' class="warn"'
    return (
        f"<p{loud}>Appraised <b>{escape(name)}</b> ({escape(told['when'])}): <b>{escape(told['status'])}</b>. "
        f"{escape(' '.join(told['reasons']))}</p>"
    )


def _mark(holds: bool | None) -> str:
    if holds is None:
        return '<span class="open">not tried</span>'
    return '<span class="yes">holds</span>' if holds else '<span class="no">DOES NOT HOLD</span>'


def _settings(training: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What it was trained with, and how that was chosen if it was."""
    found = [(name, value) for name, value in training.items() if not isinstance(value, list | dict | None)]
    chosen = training.get("selection") or {}
    return [
        *found,
        *(
            (f"selection: {name}", value)
            for name, value in chosen.items()
            if not isinstance(value, dict | None)
        ),
        *((f"selection: chosen {name}", value) for name, value in chosen.get("settings", {}).items()),
    ]


def _table(rows: list[tuple[Any, ...]], head: tuple[str, ...] = (), raw: int = -1) -> str:
    """Rows as a table; the cell numbered `raw` is our own markup."""
    top = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    lines = (
        "".join(f"<td>{cell if n == raw else escape(_plain(cell))}</td>" for n, cell in enumerate(row))
        for row in rows
    )
    return f"<table>{top}{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _plain(cell: Any) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return " ".join(map(str, cell)) if isinstance(cell, list) else str(cell)


def _evaluation(each: dict[str, Any]) -> str:
    figures = [f for f in each["figures"] if f["95 % interval"] is not None]
    rows = [
        (
            f["name"],
            f"{f['value']:.4g}",
            "" if f["95 % interval"] is None else "{:.4g} to {:.4g}".format(*f["95 % interval"]),
        )
        for f in each["figures"]
    ]
    title = f"<h3>{escape(each['title'])}</h3>"
    picture = (
        _picture(each["title"], lambda axes: _errors(axes, figures), 0.4 * len(figures) + 1)
        if figures
        else ""
    )
    return title + picture + _table(rows, head=("figure", "value", "95 % interval"))


def _errors(axes: Any, figures: list[dict[str, Any]]) -> None:
    values = [f["value"] for f in figures]
    ends = [f["95 % interval"] for f in figures]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    axes.errorbar(values, range(len(figures)), xerr=[below, above], fmt="o", color="#2f7d6d", capsize=3)
    axes.set_yticks(range(len(figures)), [f["name"] for f in figures], parse_math=False)
    axes.set_xlabel("value with 95 % interval")
    axes.invert_yaxis()


def _attacks(told: dict[str, Any] | None) -> str:
    if told is None:
        return '<p class="open">None was run.</p>'
    canaries, membership = told["canaries"], told["membership"]

    def curves(axes: Any) -> None:
        for name, colour in (("private", "#2f7d6d"), ("plain", "#b3261e")):
            x, y = zip(*membership[name]["curve"], strict=True)
            axes.plot(x, y, color=colour, label=f"{name}: AUC {membership[name]['auc']:.3f}")
        axes.plot([0, 1], [0, 1], ":", color="#777", label="a guess")
        axes.set(xlabel="false positives", ylabel="true positives")
        axes.legend()

    return (
        f"<p>Run by the researcher, on {escape(told['on'])}; not repeated here.</p>"
        f"<p>{canaries['correct']} of {canaries['guesses']} guesses about canaries were right: "
        f"at {canaries['confidence']:.0%} confidence epsilon is {canaries['bound']:.3g} at least; claimed are "
        f"{canaries['epsilon']:.3g}. {_mark(canaries['holds'])}</p>"
        + _picture("Membership inference: the recipe against plain training", curves, 3.2)
    )


def _picture(title: str, draw: Any, height: float) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, height), layout="constrained")
    draw(figure.subplots())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
