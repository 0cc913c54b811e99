"""Runs every attack outside, then inside a worker of each tier; writes the table.

`python tests/attacks/suite.py` writes docs/attacks.md and build/attacks.json.
"""

import fcntl
import io
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars
from attacks import ATTACKS
from outside import MARK

from rapha_lab.enclave.cores import ALL
from rapha_lab.enclave.sandbox import Limits, Worker, Zygote
from rapha_lab.protocol import messages

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LIMITS = Limits(memory=1 << 30, cpu_seconds=60, wall_seconds=120, threads=64)


@dataclass
class Results:
    """How each attack went outside and at each tier, and all bytes that left the workers."""

    canary: str
    facts: dict[str, Any]
    outside: dict[str, dict[str, Any]]
    tiers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    left: bytes = b""

    def open_at(self, tier: str) -> list[str]:
        """The attacks that succeeded at a tier."""
        return [name for name, result in self.tiers[tier].items() if result["open"]]


@contextmanager
def battlefield() -> Iterator[Results]:
    """A live victim and the results of all attacks on it from outside."""
    canary = f"{MARK}-{secrets.token_hex(8)}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])}
    command = [sys.executable, str(HERE / "outside.py"), canary]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        report = json.loads(process.stdout.readline())
        yield Results(canary, report["facts"], report["outside"])
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def assault(results: Results, zygote: Zygote) -> None:
    """Every attack from inside workers of `zygote`; a worker that dies of one is replaced."""
    fd = _inherited(3)
    outcomes: dict[str, dict[str, Any]] = {}
    sibling, worker = zygote.spawn(LIMITS), zygote.spawn(LIMITS)
    facts = {**results.facts, "sibling": sibling.pid, "inherited": fd}
    for name in ATTACKS:
        answer = _try(worker, name, facts)
        results.left += answer
        if answer:
            outcomes[name] = json.loads(answer)
            continue
        outcomes[name] = {"open": False, "how": f"worker ended: {worker.wait(30)}"}
        worker.close()
        worker = zygote.spawn(LIMITS)
    for each in (sibling, worker):
        each.close()
    os.close(fd)
    results.tiers[zygote.tier] = outcomes


SHARD = "S3, a shard"
FUNCTION = """
def attack(frame):
    import json, os, outside
    for name in json.loads({names!r}):
        os.write(4, json.dumps(outside.attempt(name, json.loads({facts!r}))).encode() + b"\\n")
    return 0.0
"""


def assault_from_a_shard(results: Results, zygote: Zygote) -> None:
    """Every attack from a function on a shard, whose records hold the canary of a sibling's; it says how each went."""
    fd = _inherited(500)  # far from the three descriptors of the event loop that polars opens to read a frame
    limits = replace(Limits.shard(), cores=ALL[:1])
    outcomes: dict[str, dict[str, Any]] = {}
    sibling = zygote.spawn(limits)
    _give(sibling, "def attack(frame):\n    import time\n    time.sleep(100)\n", results.canary)
    facts = {**results.facts, "sibling": sibling.pid, "inherited": fd, "inside": True}
    facts["first"] = 8
    while left := [name for name in ATTACKS if name not in outcomes]:
        worker = zygote.spawn(limits)
        _give(worker, FUNCTION.format(names=json.dumps(left), facts=json.dumps(facts)), "nothing")
        told = worker.reader.read()
        results.left += told
        lines = told.split(b"\n")[:-1]
        outcomes |= {name: json.loads(line) for name, line in zip(left, lines, strict=False)}
        if len(lines) < len(left):
            outcomes[left[len(lines)]] = {"open": False, "how": f"worker ended: {worker.wait(30)}"}
        worker.close()
    sibling.close()
    os.close(fd)
    results.tiers[SHARD] = outcomes


def _inherited(least: int) -> int:
    """A file that a careless launcher would pass on."""
    with open(__file__) as file:
        fd = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD, least)
    os.set_inheritable(fd, True)
    return fd


def _give(worker: Worker, source: str, record: str) -> None:
    records = io.BytesIO()
    polars.DataFrame({"record": [record]}).write_ipc(records)
    header = {"source": source, "name": "attack", "shape": []}
    messages.write_frame(worker.writer, messages.encode(header), records.getvalue())


def _try(worker: Worker, name: str, facts: dict[str, Any]) -> bytes:
    worker.writer.write(json.dumps({"name": name, "facts": facts}).encode() + b"\n")
    worker.writer.flush()
    return worker.reader.readline()


def table(results: Results) -> str:
    """The results as a page."""
    tiers = sorted(results.tiers, key=("S3", SHARD, "S2", "S1").index)
    lines = [
        "# Attacks on a worker",
        "",
        "Generated by `python tests/attacks/suite.py`; the tests run the same attacks on every change. Each",
        "is first tried *outside*, by an ordinary user's process: there it either succeeds, or the kernel",
        "refuses it to everybody. Inside a worker the entry is what stopped it: the kernel's error, a limit,",
        "or the end of the worker. *A shard* is a worker that runs a function on patients' records; S3, S2 and",
        "S1 are a session's, at each tier of the sandbox.",
        "",
        "| tier | tried | succeed outside | open inside |",
        "| --- | --- | --- | --- |",
    ]
    succeed = sum(result["open"] for result in results.outside.values())
    lines += [f"| {tier} | {len(ATTACKS)} | {succeed} | {len(results.open_at(tier))} |" for tier in tiers]
    for group in dict.fromkeys(group for group, _ in ATTACKS.values()):
        lines += ["", f"## {group.capitalize()}", "", f"| attack | outside | {' | '.join(tiers)} |"]
        lines += ["| --- " * (2 + len(tiers)) + "|"]
        for name in (name for name, (of, _) in ATTACKS.items() if of == group):
            cells = [_cell(results.outside[name]), *(_cell(results.tiers[tier][name]) for tier in tiers)]
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(result: dict[str, Any]) -> str:
    return "**succeeds**" if result["open"] else result["how"]


def save(results: Results) -> None:
    """Write build/attacks.json: per tier, how many were tried and which are open."""
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    summary = {tier: {"tried": len(ATTACKS), "open": results.open_at(tier)} for tier in results.tiers}
    (build / "attacks.json").write_text(json.dumps(summary, indent=1) + "\n")


def main() -> None:
    """Run all and write both files."""
    with battlefield() as results:
        for tier in ("S3", "S2", "S1"):
            with Zygote(
                "attack_cell:main", ("attacks", "site_attacks", "outside"), tier, bare=True
            ) as zygote:
                assault(results, zygote)
        with Zygote(
            "rapha_lab.session.shard:main", ("attacks", "site_attacks", "outside"), "S3", bare=True
        ) as zygote:
            assault_from_a_shard(results, zygote)
    assert results.canary.encode() not in results.left
    save(results)
    (ROOT / "docs" / "attacks.md").write_text(table(results))
    for tier in results.tiers:
        print(tier, len(ATTACKS), "tried,", "open:", results.open_at(tier))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
