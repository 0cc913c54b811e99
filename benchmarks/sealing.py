"""Sealing and opening 100 MB on one core, as a ratio to AES-256-GCM alone over the same bytes in the same run.

    python benchmarks/sealing.py [MEGABYTES]

Each time is the least of several interleaved runs, in seconds of this process's own processor time.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from rapha_lab.protocol import sealing
from rapha_lab.protocol.keys import PrivateKey

ROUNDS = 7


def least(tasks: dict[str, Callable[[], object]]) -> dict[str, float]:
    best = dict.fromkeys(tasks, float("inf"))
    for _ in range(ROUNDS):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    body, raw = os.urandom(size * 10**6), AESGCM(AESGCM.generate_key(256))
    raw_sealed = raw.encrypt(bytes(12), body, b"")
    tasks: dict[str, Callable[[], object]] = {
        "AES-256-GCM seal": lambda: raw.encrypt(bytes(12), body, b""),
        "AES-256-GCM open": lambda: raw.decrypt(bytes(12), raw_sealed, b""),
    }
    for suite in ("x-wing", "x25519"):
        key = PrivateKey.create(suite)
        sealed = sealing.seal(body, key.public, b"benchmark")
        tasks[f"{suite} seal"] = lambda key=key: sealing.seal(body, key.public, b"benchmark")
        tasks[f"{suite} open"] = lambda key=key, sealed=sealed: sealing.open_sealed(sealed, key, b"benchmark")
    site, researcher = PrivateKey.create("x-wing"), PrivateKey.create()
    given = {"to": site.public, "evidence_hash": bytes(32), "researcher": researcher, "reply_to": site.public}
    request = sealing.seal_request("run", body, **given)
    tasks["signed request, x-wing seal"] = lambda: sealing.seal_request("run", body, **given)
    tasks["signed request, x-wing open"] = lambda: sealing.open_request(
        request, key=site, evidence_hash=bytes(32), replay=sealing.Replay()
    )
    best = least(tasks)
    print(f"| {size} MB, one core | MB/s | times AES-256-GCM alone |\n| --- | --- | --- |")
    for name, seconds in best.items():
        alone = best["AES-256-GCM " + name.rsplit(" ", 1)[1]]
        print(f"| {name} | {size / seconds:,.0f} | {seconds / alone:.2f} |")


if __name__ == "__main__":
    main()
