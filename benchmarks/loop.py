"""What a training loop costs over `fit`: seconds a step of the same model on one real site, interleaved rounds.

    python benchmarks/loop.py [--rounds 5] [--steps 400] [--models NAME ...]

Both train an MLP from a cell; a loop's step is a forward pass on sealed tensors in the session, one request through
the gateway, and torch's own optimiser. Starting is not counted: each figure is the difference of a long and a short
run. CPU time of all the site's processes, and wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "end_to_end"))
import hospital

PATIENTS, WIDTH = 8000, 30
MODELS = {
    "MLP 8-128-128-1": (8, 128, 1, 512, 1),
    "MLP 30-128-128-2": (30, 128, 2, 256, 1),
    "MLP 8-256-256-1": (8, 256, 1, 2048, 5),
    "MLP 8-1024-1024-1": (8, 1024, 1, 256, 5),
}
"""Inputs, hidden width, outputs, expected batch, and by how much fewer steps are enough."""
NAMES = [f"f{k}" for k in range(WIDTH)]
COLUMN = (
    '[[columns]]\nname = "{0}"\ntype = "number"\nbounds = [-3, 3]\nmeaning = "Made up."\npublic = "Yes."\n'
)
SCHEMA = f"""
name = "bench"
title = "Made-up patients"
citation = "none"
licence = "none"
patient = "pid"
patients = {PATIENTS}
source = "bench.parquet"
{"".join(COLUMN.format(name) for name in NAMES)}
[[columns]]
name = "dead"
type = "boolean"
meaning = "Made up."
public = "Yes."
[[columns]]
name = "kind"
type = "category"
categories = ["a", "b"]
meaning = "Made up."
public = "Yes."
"""

MODEL = f"""
import torch, torch.nn.functional as F
from torch import nn
torch.manual_seed(0)
X = {NAMES!r}[:INPUTS]
model = nn.Sequential(
    nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
"""
FIT = (
    MODEL
    + """
loss, target = (nn.BCEWithLogitsLoss(), "dead") if OUTPUTS == 1 else (nn.CrossEntropyLoss(), "kind")
patients.train.fit(model, loss, inputs=X, target=target, optimizer=optimizer, epsilon=0.5, batch=BATCH, epochs=EPOCHS);
"""
)
LOOP = (
    MODEL
    + """
for batch in patients.train.batches(size=BATCH, epochs=EPOCHS, epsilon=0.5):
    if OUTPUTS == 1:
        loss = F.binary_cross_entropy_with_logits(model(batch[X]).squeeze(-1), batch["dead"])
    else:
        loss = F.cross_entropy(model(batch[X]), batch["kind"])
    optimizer.zero_grad(); loss.backward(); optimizer.step()
"""
)


def cpu() -> float:
    """Seconds of processor that this process and its children have used."""
    me = psutil.Process()
    found = [me, *me.children(recursive=True)]
    return sum(sum(p.cpu_times()[:2]) for p in found if p.is_running())


def run(site: object, source: str, model: str, steps: int) -> tuple[float, float]:
    """CPU and wall-clock seconds of a cell."""
    *sizes, batch, _ = MODELS[model]
    values = *sizes, batch, steps * batch / (0.7 * PATIENTS) - 1e-6
    for name, value in zip(("INPUTS", "HIDDEN", "OUTPUTS", "BATCH", "EPOCHS"), values, strict=True):
        source = source.replace(name, repr(value))
    began = time.perf_counter(), cpu()
    job = site.run(source, "bench", session="bench")  # type: ignore[attr-defined]
    for _ in job.follow():
        pass
    assert job.state == "done", job.told
    return cpu() - began[1], time.perf_counter() - began[0]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=400)
    arguments.add_argument("--models", nargs="*", default=[*MODELS])
    given = arguments.parse_args()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(PATIENTS, WIDTH)).clip(-3, 3)
    dead = rng.random(PATIENTS) < 1 / (1 + np.exp(-x[:, :8].sum(1)))
    columns = {
        "pid": [f"p{n}" for n in range(PATIENTS)],
        **{n: x[:, k] for k, n in enumerate(NAMES)},
        "dead": dead,
        "kind": np.where(dead, "b", "a"),
    }
    with tempfile.TemporaryDirectory() as folder:
        config, key = hospital.prepare(
            Path(folder), SCHEMA, polars.DataFrame(columns), "bench", epsilon=1000.0, largest_model=10**7
        )
        with hospital.running(config) as (_, url):
            site = hospital.connected(url, key)
            rows = [compare(site, name, given.rounds, given.steps) for name in given.models]
    target = Path("build/bench/loop.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(rows, indent=1))


def compare(site: object, name: str, count: int, steps: int) -> dict[str, object]:
    """The cost of a loop's step over that of fit's, for one model."""
    *_, batch, fewer = MODELS[name]
    steps = max(10, steps // fewer)
    for source in (FIT, LOOP):
        run(site, source, name, 5)
    rounds = []
    for number in range(1, count + 1):
        spent = {}
        for way, source in (("fit", FIT), ("loop", LOOP)):
            # other starting weights, since the same question is answered again without being computed
            source = source.replace("manual_seed(0)", f"manual_seed({number})")
            long, short = (run(site, source, name, n) for n in (steps + 5, 5))
            spent[way] = [(a - b) / steps for a, b in zip(long, short, strict=True)]
        rounds.append(spent)
        told = (f"{w} cpu {s[0] * 1e3:.2f} ms wall {s[1] * 1e3:.2f} ms" for w, s in spent.items())
        print(name, *told, sep="   ", flush=True)
    ratios, told = {}, []
    for k, kind in enumerate(("cpu", "wall")):
        found = sorted(r["loop"][k] / r["fit"][k] for r in rounds)
        ratios[f"{kind}_ratio"] = round(statistics.median(found), 3)
        told.append(f"{kind} {statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})")
    print(f"{name}: a loop's step over fit's, median and range of {count} rounds:", *told, flush=True)
    return {"workload": f"{name}, batch {batch:,}", "engine": "loop over fit", **ratios}


if __name__ == "__main__":
    main()
