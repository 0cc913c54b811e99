"""Writes benchmarks/README.md from what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from workloads import WORKLOADS

PAGE = Path(__file__).parent / "README.md"
SCALING, BATCHES = Path("build/bench/scaling.json"), Path("build/bench/batches.json")
COLUMNS = {
    "compiled": "**ours, compiled**", "eager": "ours, no compiler", "opacus hooks": "Opacus hooks",
    "opacus ew": "Opacus ew", "opacus functorch": "Opacus functorch", "opacus ghost": "Opacus ghost", "vmap": "vmap",
    "jax": "JAX",
}  # fmt: skip

OURS = ("compiled", "eager")

HEAD = """# What private training costs

CPU time of one step as a multiple of plain, non-private, eager PyTorch on the same patients. Clipping, noise and update
are included on the private side; our noise is from AES-256 in counter mode, the peers use their own generators. One
process a workload, engines interleaved in rounds, median of the rounds' ratios; the same allocator settings for all.
The aim is at most 1.2 on every row and 1.3 on bags; what is above it is not there yet.

Machine: {machine} `make bench` measures anew; `build/bench/trainer.json` has the rows.

{times}

{mean} {faster}

{bags} vmap is
`torch.compile(vmap(grad))` and JAX `jit(vmap(grad))`, each clipped and noised by hand. fast-DP is in no package registry and was
not run here.

{notes}

**Where it costs more.** On models that this table does not have, tried compiled on a busy machine: 0.5 to 0.9 for
transformers over visits, images or columns, decoders, an MLP-Mixer, graph attention, attention over a GRU's states, GRU-D,
cells of GRUs and LSTMs stepped through by hand, convolutions under a weight norm and a multiple-instance model; 1.0 to 1.3
for U-Nets, InceptionTime, an ECG network, a dilated 1-D CNN and MLPs for survival. But 1.5 to 1.6 for ResNet-18 and a
DenseNet, 1.3 to 1.6 for an LSTM, 2.8 for one at a batch of 32, 1.8 for a dilated 1-D CNN under a weight norm, 1.6 for a
mixture of experts in one tensor: a weight that is used at few places of a patient has a gradient larger than all that it is
made of, and it is written out for each patient, since the norm must be that of the very numbers added. (PyTorch's own LSTM is
one operation of oneDNN, besides, and ours one product and one loop a step.) So is that of a matrix used again, transposed, in
a tied autoencoder (2.9). Steps below a millisecond (1.2 to 1.6 for small MLPs and autoencoders, 1.8 to 2.0 for a logistic
regression or a bag of codes) pay for noise, the draw and the look at each patient's norm.

## Memory, and what is left to say

By how many MB a step raises the resident memory at most. A step of `fit` has a fixed number of slots, more than the
expected batch, so that its shape does not tell how many patients were drawn: it costs the table's ratio times *slots a
patient*. There is room for the tenth and the 40 patients by which records may exceed the declared number (here of a hundred
batches), and for all but 2⁻⁶⁰ of what chance draws beyond that, when a step takes twice the slots. Compiling happens once
for a shape of model, in the curator, when a run is long enough to gain by it; its seconds are elapsed ones, with the machine
as busy as it was.

{memory}
"""

BY_BATCH = """
## By the batch

CPU time and memory of a compiled step as multiples of plain training's at the same batch. Of plain training that takes less
than a megabyte the multiple is of a megabyte: what the allocator gives back is no finer than that.

"""

GROWTH = """
## How it grows

![CPU time of a step by patients, parameters, batch and sessions](pictures/scaling.png)

An MLP 30-128-128-2 at an expected batch of 256 unless the axis says otherwise, without a compiler; the step includes the
Poisson draw and the padding. Patients are read from disk, as the curator maps inputs of more than a gigabyte (31 numbers a
patient, 1.3 GB at ten million): what a step takes for each patient is two bytes of a keystream, and no memory. (The columns
themselves a site holds in memory, 9 bytes a number, 5 a category, 2 a yes or no: to open a million patients with 31 columns
takes 0.47 GB at most from Parquet and 1.3 GB from CSV, of which 0.4 GB stay.) Sessions are trainings
at once in one process on this machine's cores; a site's curator runs four at a time and lets others wait.
They share one interpreter, and the many short operations of a small model's step pass its lock back and forth: that is where
the processor's time goes. A compiled step, which long trainings take, has fewer of them.
The last table is a whole answer of `evaluate` (the patients' rows, the machine's test of itself, the scores, noise and metrics)
beside a plain forward pass on tensors of the same patients: each patient's score is computed in a place of their own by keyed
hash, so that some places stay empty.
"""


HEADS = {
    "sessions": ["steps a second, all", "CPU ms a step", "compiled: steps a second", "compiled: CPU ms"],
    "patients judged": ["CPU ms", "a plain forward pass", "ratio"],
}


def write(rows: list[dict[str, Any]], notes: dict[str, str], machine: str) -> None:
    """The page: ratios, memory, what was not run and why, and how cost grows."""
    by = {(row["workload"], row["engine"]): row for row in rows}
    names = [name for name in WORKLOADS if (name, "plain") in by]
    titles = {name: WORKLOADS[name].title for name in names}
    times = [
        [titles[n], f"{by[n, 'plain']['milliseconds']:.3g}", *(_ratio(by, n, e) for e in COLUMNS)]
        for n in names
    ]
    memory = [
        [titles[n], f"{by[n, 'plain']['megabytes']:.0f}", *(_mb(by, n, e) for e in COLUMNS), *_about(by, n)]
        for n in names
    ]
    page = HEAD.format(
        machine=machine,
        times=_table(["workload", "plain, ms", *COLUMNS.values()], times),
        mean=_mean(by, names),
        faster=_faster(by, names),
        notes=_notes(notes),
        bags=_bags(by),
        memory=_table(["workload", "plain, MB", *COLUMNS.values(), "slots a patient", "compile, s"], memory),
    )
    more = ((BATCHES, _by_batch), (SCALING, _scaling))
    PAGE.write_text(
        page + "".join(told(json.loads(path.read_text())) for path, told in more if path.exists())
    )


def _bags(by: dict[Any, Any]) -> str:
    """What the bags' row is a multiple of, and what it would be of plain training that pads too."""
    row, padded = by.get(("bag", "compiled"), {}), by.get(("bag", "padded"))
    told = "Bags are compared with plain training on packed records; ours computes all 48 places of each."
    if padded is None or "padded_ratio" not in row:
        return told
    return (
        f"{told} Of plain training on the same padded bags, which takes {padded['cpu_ratio']:.2f} times the packed one, "
        f"ours takes **{row['padded_ratio']:.2f}**."
    )


def _notes(notes: dict[str, str]) -> str:
    """Why cells are empty, cells of one reason together."""
    by: dict[str, list[str]] = {}
    for cell, note in notes.items():
        by.setdefault(note, []).append(cell)
    return (
        "\n".join(["Not run:", "", *(f"- {'; '.join(cells)}: {note}." for note, cells in by.items())])
        if by
        else ""
    )


def _about(by: dict[Any, Any], name: str) -> list[str]:
    row = by.get((name, "compiled"), {})
    return [f"{row[key]:.3g}" if key in row else "" for key in ("slots", "seconds")]


def _table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def _ratio(by: dict[Any, Any], name: str, engine: str) -> str:
    row = by.get((name, engine))
    return (
        ""
        if row is None
        else f"**{row['cpu_ratio']:.2f}**"
        if engine == "compiled"
        else f"{row['cpu_ratio']:.2f}"
    )


def _mb(by: dict[Any, Any], name: str, engine: str) -> str:
    row = by.get((name, engine))
    return "" if row is None else f"{row['megabytes']:.0f}"


def _mean(by: dict[Any, Any], names: list[str]) -> str:
    ratios = [
        by[name, "compiled"]["cpu_ratio"] for name in names if (name, "compiled") in by and name != "bag"
    ]
    if not ratios:
        return ""
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"Geometric mean of the compiled figures that are there, without the bags: **{mean:.2f}**, largest {max(ratios):.2f}."


def _faster(by: dict[Any, Any], names: list[str]) -> str:
    """Where a peer takes less time than ours."""
    found, compared = [], False
    for name in (name for name in names if (name, "compiled") in by):
        peers = [
            row for (n, engine), row in by.items() if n == name and engine not in ("plain", "padded", *OURS)
        ]
        best = min(peers, key=lambda row: row["cpu_ratio"], default=None)
        compared |= best is not None
        if best and best["cpu_ratio"] <= by[name, "compiled"]["cpu_ratio"]:
            found.append(f"{COLUMNS[best['engine']]} on {WORKLOADS[name].title} ({best['cpu_ratio']:.2f})")
    return (
        f"Faster than ours: {'; '.join(found)}." if found else "No peer is faster on any row that both ran."
    )


def _by_batch(rows: list[dict[str, Any]]) -> str:
    """Ratios of time and memory, a line for each model."""
    batches = sorted({row["batch"] for row in rows})
    told = {
        (row["workload"], row["batch"]): f"{row['cpu_ratio']:.2f}, {row['memory_ratio']:.2f}" for row in rows
    }
    names = dict.fromkeys(row["workload"] for row in rows)
    body = [
        [WORKLOADS[name].title.split(", batch")[0], *(told.get((name, b), "") for b in batches)]
        for name in names
    ]
    return BY_BATCH + _table(["time, memory", *(f"batch {b:,}" for b in batches)], body) + "\n"


def _scaling(found: dict[str, list[Any]]) -> str:
    parts = [GROWTH]
    for what, rows in found.items():
        head = [what, *HEADS.get(what, ["CPU ms a step", "MB a step", "MB held"])]
        body = [
            [f"{v:,.0f}" if k == 0 or v >= 100 else f"{v:.3g}" for k, v in enumerate(row)] for row in rows
        ]
        parts.append(_table(head, body) + "\n")
    return "\n".join(parts)
