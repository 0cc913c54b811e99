"""Bombs in one researcher's sessions while another trains, at a real site: how much longer does the training take?

`python benchmarks/neighbours.py` prints one JSON object; rounds with and without bombs alternate, times are seconds.
`--without` tries it where no control group can be made, so that niceness alone holds. In a round the bomber forks,
starts threads that spin and asks for 20 GB, over and over, in one session and then in as many as one may have.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "end_to_end"))

ROUNDS = 3
TRAIN = """
import torch
from torch import nn
torch.manual_seed({seed})
model = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1))
patients.train.fit(model, nn.BCEWithLogitsLoss(), inputs={features}, target="died", epochs=600, batch=200, epsilon=1)
"""
BOMB = """
import os, threading
print("lit")
started = refused = 0
for _ in range(2000):
    try:
        threading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()
        started += 1
    except RuntimeError:
        break
held = []
while True:
    try:
        os.fork()
    except OSError:
        pass
    for size in (20 << 30, 1 << 28):
        try:
            held.append(bytearray(size))
        except MemoryError:
            held.clear()
"""


def trained(site: Any, seed: int) -> float:
    """Seconds from sending the cell to its release."""
    import ward

    begun = time.perf_counter()
    job = site.run(TRAIN.format(seed=seed, features=ward.FEATURES), "ward").wait()
    assert job.state == "done", job.state
    return time.perf_counter() - begun


@contextlib.contextmanager
def bombs(site: Any, sessions: int) -> Iterator[None]:
    """That many sessions of this researcher go off meanwhile; all of them are still at it in the end."""
    lit = [site.run(BOMB, "ward", session=f"bomb{number}") for number in range(sessions)]
    for job in lit:
        while not job.poll(1.0):
            pass
    time.sleep(1)
    yield
    burnt = [job.state for job in lit if job.poll() is not None and job.state != "running"]
    if burnt:
        print(f"{len(burnt)} of {sessions} bombs had ended before the training did", file=sys.stderr)
    site.end_sessions()


def main() -> None:
    """Rounds of alone, beside one bomb, beside four."""
    import hospital
    import ward

    from rapha_lab.enclave import _cgroup
    from rapha_lab.enclave.cells import MAX_SESSIONS
    from rapha_lab.protocol.keys import PrivateKey

    if "--without" in sys.argv:
        _cgroup.Cgroup.add = lambda self, pid: False  # type: ignore[method-assign]
    other = PrivateKey.create()
    with tempfile.TemporaryDirectory() as name:
        prepared = hospital.prepare(
            Path(name), ward.SCHEMA, ward.frame(), "ward", others=[other], epsilon=900.0
        )
        config, key = prepared
        with hospital.running(config) as (site, url):
            mine, theirs = hospital.connected(url, key), hospital.connected(url, other)
            trained(mine, 0)
            found: dict[int, list[float]] = {0: [], 1: [], MAX_SESSIONS: []}
            for turn in range(ROUNDS):
                for sessions, times in found.items():
                    with bombs(theirs, sessions) if sessions else contextlib.nullcontext():
                        times.append(trained(mine, 1 + 100 * turn + sessions))
            grouped = {"control groups": site._zygote.report.layers["cgroup"]}
    told: dict[str, Any] = {"tier": site.tier, **grouped}
    for sessions, times in found.items():
        ratios = [time / alone for time, alone in zip(times, found[0], strict=True)]
        told[f"{sessions} sessions of bombs"] = {
            "least": round(min(times), 2),
            "median": round(statistics.median(times), 2),
            "ratio of least": round(min(times) / min(found[0]), 3),
            "median of ratios": round(statistics.median(ratios), 3),
        }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
