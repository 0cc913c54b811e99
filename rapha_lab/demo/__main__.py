"""`python -m rapha_lab.demo FOLDER --researcher KEY`: a simulated hospital with public patients.

Three made-up custodians sign a policy for the one researcher; the site runs as long as a lease is held.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import msgspec

from rapha_lab.demo.build import build, built
from rapha_lab.enclave.site import Config, Dataset, Site, serve
from rapha_lab.protocol.errors import RaphaError
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.messages import Metric
from rapha_lab.protocol.policy import Policy, state

__all__ = ["main", "policy"]

LINGER = 3.0
"""Seconds the site outlives its last lease, so that a restarted kernel finds it."""

CUSTODIANS = (
    ("Ada Example", "Caldicott Guardian"),
    ("Ben Example", "Data Protection Officer"),
    ("Cy Example", "General Counsel"),
)


def policy(researcher: str, keys: list[PrivateKey], datasets: list[str]) -> Policy:
    """The demo's policy: one page, as custodians would sign it."""
    expires = (datetime.now(UTC) + timedelta(days=90)).date()
    names = json.dumps(datasets)
    page = [
        "# The policy of the demo site. Its patients are public and its custodians made up.",
        "[policy]",
        'name = "Demo policy"',
        "version = 1",
        'purpose = ["DUO:0000042"]',
        f"expires = {expires}",
        "quorum = 3",
    ]
    for (name, role), key in zip(CUSTODIANS, keys, strict=True):
        page += ["", "[[custodians]]", f'name = "{name}"', f'role = "{role}"', f'key = "{key.public}"']
    for dataset in datasets:
        page += ["", "[[datasets]]", f'name = "{dataset}"', 'measurements = ["any simulated"]']
        page += ['sandbox = "S1"', "delta = 1e-5"]
    page += [
        "",
        "[[projects]]",
        'name = "tutorial"',
        f'researchers = ["{researcher}"]',
        f"datasets = {names}",
        "epsilon = 4.0",
        "delta = 1e-5",
        "largest_model = 5_000_000",
        "smallest_cohort = 100",
        "metrics = " + json.dumps(METRICS),
        *(f'lanes.{lane}.release = "auto"' for lane in ("aggregate", "train", "evaluate", "shards")),
    ]
    return Policy.parse("\n".join(page) + "\n")


METRICS = list(get_args(Metric))


def main() -> None:
    """Prepare the demo site in a folder and serve it until nobody holds it."""
    line = argparse.ArgumentParser(prog="python -m rapha_lab.demo")
    line.add_argument("folder", type=Path)
    line.add_argument("--researcher", required=True)
    args = line.parse_args()
    try:
        _doing(args.folder, "its patients' data")
        config = _prepare(args.folder, args.researcher)
        _doing(args.folder, "its curator, who reads the records, and its sandbox")
        site = Site(config)
    except RaphaError as error:
        sys.exit(str(error))
    try:
        serve(site, lambda url: _tell(args.folder, url), _Leases(args.folder, site).all_gone)
    except BaseException:
        (args.folder / "site.json").unlink(missing_ok=True)
        raise


def _prepare(folder: Path, researcher: str) -> Config:
    build(folder / "data")
    schemas = built(folder / "data")
    for old in folder.glob("state/ledger.sqlite*"):
        old.unlink()  # public patients of a simulated site: each start is a new ledger
    keys = [PrivateKey.create() for _ in CUSTODIANS]
    page = policy(researcher, keys, [schema.stem for schema in schemas])
    path = folder / "policy.toml"
    path.write_text(page.text)
    lines = [msgspec.json.encode(state("sign", page, key)) for key in keys]
    Path(f"{path}.signatures").write_bytes(b"\n".join(lines) + b"\n")
    datasets = [Dataset(str(schema), str(schema.parent)) for schema in schemas]
    # a new ledger is a new log, and has a name of its own
    name = f"demo-{os.urandom(8).hex()}"
    return Config("demo", str(folder / "state"), str(path), datasets, listen="127.0.0.1:0", log=name)


def _doing(folder: Path, what: str) -> None:
    """Say what is being started, for those who wait."""
    part = folder / "starting.part"
    part.write_text(what)
    part.replace(folder / "starting")


def _tell(folder: Path, url: str) -> None:
    part = folder / "site.json.part"
    part.write_text(json.dumps({"url": url, "pid": os.getpid()}))
    part.replace(folder / "site.json")


class _Leases:
    """Who holds the site: each holder keeps a file locked as long as it lives."""

    def __init__(self, folder: Path, site: Site) -> None:
        self._folder, self._site, self._since = folder, site, time.monotonic()

    def all_gone(self) -> bool:
        """Whether nobody has held the site for a while and nothing runs in it; from then on it is not to be found."""
        if self._held():
            self._since = time.monotonic()
        if time.monotonic() - self._since <= LINGER:
            return False
        with (self._folder / "start.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # whoever connects now either holds a lease or starts a new site
            if self._held():
                return False
            (self._folder / "site.json").unlink(missing_ok=True)
            return True

    def _held(self) -> bool:
        return self._site.cells.busy() or any(_locked(path) for path in (self._folder / "leases").glob("*"))


def _locked(path: Path) -> bool:
    try:
        with path.open("r+") as lease:
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


if __name__ == "__main__":
    main()
