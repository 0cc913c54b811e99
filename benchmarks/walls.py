"""The walls' price: spawn times, memory of a session, training inside and outside, a neighbour's bombs, 200 shards.

`OMP_NUM_THREADS=1 python benchmarks/walls.py` prints one JSON object; times are seconds.
"""

import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).parent))

from neighbours import BOMB

STEPS, ROUNDS = 150, 7


def train() -> tuple[float, float]:
    """Wall and processor seconds of some Adam steps."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    optimizer, x, y = torch.optim.Adam(model.parameters()), torch.randn(512, 64), torch.randint(2, (512,))
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return time.perf_counter() - wall, time.process_time() - cpu


def main(reader: BinaryIO, writer: BinaryIO) -> None:
    """A worker's entry: train at each line, or run the source in it."""
    for line in reader:
        if line.strip():
            exec(json.loads(line), {})
        writer.write(json.dumps(train()).encode() + b"\n")
        writer.flush()


def trained_inside(worker: Any) -> tuple[float, float]:
    """One training behind the walls."""
    worker.writer.write(b"\n")
    worker.writer.flush()
    wall, cpu = json.loads(worker.reader.readline())
    return wall, cpu


def private_memory(pid: int) -> float:
    """MB that only this process has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def times(action: Callable[[], Any], n: int) -> dict[str, float]:
    """Least and median."""
    found = []
    for _ in range(n):
        begun = time.perf_counter()
        action()
        found.append(time.perf_counter() - begun)
    return {"least": round(min(found), 4), "median": round(statistics.median(found), 4)}


def sessions(zygote: Any) -> dict[str, Any]:
    """Spawning, memory, the ratio of training, and a neighbour's bombs."""
    from rapha_lab.enclave.sandbox import Limits

    told: dict[str, Any] = {"tier": zygote.tier, "spawn": times(lambda: zygote.spawn().close(), 20)}
    with zygote.spawn() as worker, zygote.spawn() as second:
        runs = [(train(), trained_inside(worker)) for _ in range(ROUNDS)]
        for number, kind in enumerate(("wall", "processor")):
            outside, inside = ([run[side][number] for run in runs] for side in (0, 1))
            ratio = min(inside) / min(outside)
            told[f"training, {kind}"] = {
                "outside": min(outside),
                "inside": min(inside),
                "ratio": round(ratio, 3),
            }
        trained_inside(second)
        told["private MB of a second session"] = round(private_memory(second.pid), 1)
        alone = min(train()[0] for _ in range(ROUNDS))
        with zygote.spawn(Limits(wall_seconds=120)) as bomber:
            bomber.writer.write(json.dumps(BOMB).encode() + b"\n")
            bomber.writer.flush()
            time.sleep(1)
            beside = min(train()[0] for _ in range(ROUNDS))
            told["beside bombs"] = {"alone": alone, "beside": beside, "ratio": round(beside / alone, 3)}
    told["200 sessions"] = times(lambda: [zygote.spawn().close() for _ in range(200)], 1)["least"]
    return told


def on_shards(zygote: Any) -> dict[str, Any]:
    """200 shards of a trivial function from start to release."""
    import polars

    from rapha_lab.curator.workers import EnclaveWorkers
    from rapha_lab.enclave.sandbox import Limits
    from rapha_lab.enclave.shards import CORES, ShardWorkers
    from rapha_lab.protocol import messages

    records, frame = io.BytesIO(), io.BytesIO()
    polars.DataFrame({"age": [float(age) for age in range(40)]}).write_ipc(records)
    header = {"source": "def f(frame):\n    return frame['age'].mean()\n", "name": "f", "shape": []}
    messages.write_frame(frame, messages.encode(header), records.getvalue())
    giver = ShardWorkers(lambda: zygote)
    told: dict[str, Any] = {"start the zygote": times(giver._ready, 1)["least"]}
    assert giver._zygote is not None
    told["spawn"] = times(lambda: giver._zygote.spawn(replace(Limits.shard(), core=CORES[0])).close(), 20)
    workers = EnclaveWorkers(giver.connect().detach(), len(CORES))
    begun = time.perf_counter()
    answers = workers.answers((frame.getvalue() for _ in range(200)), 200, 8, 0.2, lambda: None, lambda: None)
    told["200 shards"] = round(time.perf_counter() - begun, 2)
    told["answered"] = sum(len(answer) == 8 for answer in answers)
    giver.close()
    return told


if __name__ == "__main__":
    from rapha_lab.enclave.sandbox import Zygote

    begun = time.perf_counter()
    with Zygote("walls:main") as zygote:
        report = {"start the zygote": round(time.perf_counter() - begun, 2), "sessions": sessions(zygote)}
        report["shards"] = on_shards(zygote)
    print(json.dumps(report, indent=1))
