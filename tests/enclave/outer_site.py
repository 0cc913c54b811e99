"""A hospital's site wherever this is run: prints what it says of its tier, and which attacks on its workers get through."""

import base64
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "end_to_end"), str(ROOT / "tests" / "attacks")]

import hospital  # noqa: E402
import suite  # noqa: E402
import ward  # noqa: E402
from attacks import ATTACKS  # noqa: E402

from rapha_lab.enclave.sandbox import Zygote  # noqa: E402
from rapha_lab.protocol.errors import RaphaError  # noqa: E402

SENT = ("network", "files", "processes", "kernel")


def says() -> dict[str, str]:
    """The tier as card, evidence and receipt have it, of a site that has answered a question."""
    with tempfile.TemporaryDirectory() as name:
        config, key = hospital.prepare(Path(name), ward.SCHEMA, ward.frame(), "ward")
        with hospital.running(config) as (site, url):
            connected = hospital.connected(url, key)
            (release,) = connected.run("patients.count(epsilon=0.5)", "ward").wait().releases
            card = connected.card()
            log = json.dumps(site._curator.look_up("log", start=0))
            claims = json.dumps(_text(site.evidence(bytes(32))))
            told = {
                "card": card["tier"],
                "why": card["reasons"],
                "release": bool(release),
            }
            return told | {"log": log, "evidence": claims}


def _text(evidence: object) -> list[str]:
    """All bytes of the evidence as text, encoded ones decoded."""
    import msgspec

    found = list[str]()
    for value in msgspec.to_builtins(evidence).values():
        if isinstance(value, str):
            found += [value, base64.b64decode(value + "==", validate=False).decode("latin-1")]
    return found


def attacked() -> tuple[str, int, list[str]]:
    """Tier, how many attacks were tried, and which got through; the victim is this process."""
    with tempfile.TemporaryDirectory() as name:
        path = f"{name}/shard"
        Path(path).write_text("a record")
        facts = dict.fromkeys(("file", "scratch", "link"), path) | {"folder": name, "pid": os.getpid()}
        facts |= dict.fromkeys(("tcp", "tcp6", "udp", "web"), 1) | {
            "unix": path,
            "abstract": "a",
            "site": name,
        }
        facts |= {"abstract_datagram": "b", "address": 4096, "size": 8, "mark": "MARK", "canary_hash": 0}
        results = suite.Results("MARK", facts, {})
        for attack in [name for name, (group, _) in ATTACKS.items() if group not in SENT]:
            del ATTACKS[attack]
        preload = ("attacks", "site_attacks", "outside")
        with Zygote("attack_cell:main", preload, bare=True) as zygote:
            suite.assault(results, zygote)
            return zygote.tier, len(ATTACKS), results.open_at(zygote.tier)


if __name__ == "__main__":
    try:
        told = {"user": os.geteuid(), "attacks": attacked(), "says": says()}
    except RaphaError as error:
        told = {"user": os.geteuid(), "refused": error.to_wire()}
    print(json.dumps(told))
