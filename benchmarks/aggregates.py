"""A grouped count of distinct patients over a table with many rows each: ours, and OpenDP's polars context.

    python benchmarks/aggregates.py [--patients 100000] [--rows 1000000] [--rounds 5] [--peer PYTHON]

Both count distinct patients by ward with every patient in any of ten wards, from a frame in memory, in interleaved
rounds; the peer, whose polars is older than ours, runs in an environment of its own (`pip install "opendp[polars]"`).
Theirs is timed with a privacy budget, as it is used, and once more with its noise given, which spares it the search
for the scale. Wall and CPU time; a busy machine spoils the first. Ours is timed whole: plan, view, rows, noise.
Writes build/bench/aggregates.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

WARDS = [f"ward{n}" for n in range(10)]


def records(patients: int, rows: int, path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = rng.choice(10, rows, p=np.arange(10, 0, -1) / 55)
    frame = {"pid": rng.integers(0, patients, rows), "ward": [WARDS[code] for code in codes]}
    pl.DataFrame(frame | {"los": rng.gamma(2.0, 3.0, rows)}).write_parquet(path)


class Ours:
    def __init__(self, path: Path, patients: int) -> None:
        from rapha_lab.curator.cohort import Cohort
        from rapha_lab.protocol.schema import Schema

        told = {"meaning": "Made up.", "public": "Made up."}
        stay = {
            "name": "stays",
            "meaning": "A stay.",
            "patient": "pid",
            "source": "stays.parquet",
            "most": 10_000,
        }
        stay["columns"] = [
            {"name": "ward", "type": "category", "categories": WARDS, **told},
            {"name": "los", "type": "number", "bounds": [0, 30], **told},
        ]
        names = dict.fromkeys(("title", "citation", "licence"), "Made up.")
        age = {"name": "age", "type": "number", "bounds": [0, 100], **told}
        schema = {
            "name": "h",
            **names,
            "patient": "pid",
            "source": "h.parquet",
            "columns": [age],
            "tables": [stay],
        }
        self.schema = Schema.from_dict(schema)
        frame = pl.DataFrame({"pid": np.arange(patients), "age": np.full(patients, 50.0)})
        self.cohort = Cohort(self.schema, frame, bytes(16), tables={"stays": pl.read_parquet(path)})

    def run(self, of: str = "patients") -> tuple[float, float]:
        from rapha_lab.curator.plans import plan_of
        from rapha_lab.protocol import messages

        column = None if of == "patients" else "los"
        started = time.perf_counter(), time.process_time()
        ask = messages.Rows(dataset="h", epsilon=0.5, table="stays", of=of, by="ward", column=column, cap=10)
        plan = plan_of(messages.decode(messages.encode(ask)), b"", self.schema, 1e-6, None)
        plan.run(self.cohort.view("all"), lambda *_: None)
        return time.perf_counter() - started[0], time.process_time() - started[1]


def peer(path: Path, scale: float | None) -> tuple[float, float]:
    import opendp.prelude as dp

    dp.enable_features("contrib")
    frame = pl.read_parquet(path).lazy()
    started = time.perf_counter(), time.process_time()
    context = dp.Context.compositor(
        data=frame,
        privacy_unit=dp.unit_of(contributions=1, identifier=pl.col("pid")),
        privacy_loss=dp.loss_of(rho=0.5, delta=1e-6),
        margins=[dp.polars.Margin(max_length=10_000_000)],
    )
    keys = pl.LazyFrame({"ward": WARDS})
    query = (
        context.query(rho=0.01, delta=0.0)
        .truncate_per_group(1, by=["ward"])
        .truncate_num_groups(10, by=["ward"], keep="first")
        .group_by("ward")
        .agg(dp.len(scale=scale, signed=True) if scale else dp.len(signed=True))
        .with_keys(keys)
    )
    query.release().collect()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def main() -> None:
    line = argparse.ArgumentParser()
    line.add_argument("--patients", type=int, default=100_000)
    line.add_argument("--rows", type=int, default=1_000_000)
    line.add_argument("--rounds", type=int, default=5)
    line.add_argument("--peer", help="a Python with opendp[polars]")
    line.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    line.add_argument("--scale", type=float, help=argparse.SUPPRESS)
    args = line.parse_args()
    if args.as_peer:
        print(*peer(args.as_peer, args.scale))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stays.parquet"
        records(args.patients, args.rows, path)
        ours, times = (
            Ours(path, args.patients),
            {"ours": [], "ours, mean": [], "opendp": [], "opendp, scale given": []},
        )
        for _ in range(args.rounds):
            times["ours"].append(ours.run())
            times["ours, mean"].append(ours.run("mean"))
            for name, scale in (("opendp", None), ("opendp, scale given", 22.4)) if args.peer else ():
                command = [args.peer, __file__, "--as-peer", str(path)] + (
                    ["--scale", str(scale)] if scale else []
                )
                told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                times[name].append(tuple(map(float, told.split()[-2:])))
    wall, cpu = (
        {name: statistics.median(pair[which] for pair in each) for name, each in times.items() if each}
        for which in (0, 1)
    )
    ratios = {name: {"wall": wall[name] / wall["ours"], "cpu": cpu[name] / cpu["ours"]} for name in wall}
    out = Path("build/bench/aggregates.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"seconds": wall, "cpu": cpu, "ratio": ratios}, indent=1))
    for name, ratio in ratios.items():
        spent = f"{wall[name]:8.3f} s, {cpu[name]:8.3f} s of CPU"
        print(
            f"{name:<22} {spent}   {ratio['wall']:6.1f} and {ratio['cpu']:6.1f} times ours", file=sys.stderr
        )


if __name__ == "__main__":
    main()
