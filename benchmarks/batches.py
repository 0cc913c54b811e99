"""How CPU time and memory of a compiled step stand to plain training's as the batch grows.

    python benchmarks/batches.py [--workloads mlp256,gru] [--rounds 5]

One process a workload and batch. Rows of workload, batch and both ratios are kept in build/bench/batches.json, which
`trainer.py --write` puts into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from typing import Any

import trainer
from workloads import WORKLOADS

TARGET = trainer.BUILD / "batches.json"
BATCHES = (16, 64, 256, 1024)
NAMES = ("mlp256", "cnn2d", "gru", "lstm", "transformer")


def point(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """CPU time and memory of a step of this many patients, ours compiled over plain's."""
    workload = replace(WORKLOADS[name], batch=batch)
    facts: dict[str, Any] = {}
    steps = {"plain": trainer.plain(workload), "compiled": trainer.ours(workload, "compiled", facts)}
    for step in steps.values():
        step()
    megabytes = {engine: trainer.memory(step) for engine, step in steps.items()}
    trainer.keep_pages()
    seen = trainer.turns(steps, rounds, float("inf"))
    return {
        "workload": name, "batch": batch,
        "cpu_ratio": round(statistics.median(r["compiled"] / r["plain"] for r in seen), 3),
        "memory_ratio": round(megabytes["compiled"] / max(megabytes["plain"], 1.0), 2),
        "plain": round(megabytes["plain"], 1), "megabytes": round(megabytes["compiled"], 1),
    }  # fmt: skip


def main() -> None:
    line = argparse.ArgumentParser()
    line.add_argument("--workloads", default=",".join(NAMES))
    line.add_argument("--batches", default=",".join(map(str, BATCHES)))
    line.add_argument("--rounds", type=int, default=5)
    line.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = line.parse_args()
    batches = [int(batch) for batch in given.batches.split(",")]
    if given.one:
        trainer.torch.set_num_threads(1)
        trainer.warnings.simplefilter("ignore")
        print(json.dumps(point(given.workloads, batches[0], given.rounds)))
        return
    trainer.BUILD.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in given.workloads.split(","):
        for batch in batches:
            one = [sys.executable, __file__, "--one", "--workloads", name, "--batches", str(batch)]
            told = subprocess.run([*one, "--rounds", str(given.rounds)], stdout=subprocess.PIPE, text=True)
            if told.returncode:
                print(f"{name} at {batch}: no figures", flush=True)
                continue
            rows.append(json.loads(told.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            TARGET.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
