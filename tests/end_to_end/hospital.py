"""A hospital for tests: its own patients, schema, policy signed by two custodians, and site, all real."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import polars

from rapha_lab.client.appraisal import AppraisalPolicy
from rapha_lab.client.channel import Channel
from rapha_lab.client.site import Site as Connected
from rapha_lab.enclave.site import Config, Dataset, Site, serve
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import Policy, state

METRICS = ["auroc", "auprc", "accuracy", "sensitivity", "specificity", "brier", "logloss", "calibration"]


def policy(
    researchers: Sequence[PrivateKey],
    custodians: Sequence[PrivateKey],
    datasets: Sequence[str],
    *,
    epsilon: float = 8.0,
    largest_model: int = 100_000,
    lanes: Sequence[str] = ("aggregate", "train", "evaluate", "shards"),
) -> Policy:
    """One page, not yet signed."""
    page = ["[policy]", 'name = "Test"', "version = 1", 'purpose = ["DUO:0000042"]']
    page += ["expires = 2099-01-01", f"quorum = {len(custodians)}"]
    for number, key in enumerate(custodians):
        page += ["[[custodians]]", f'name = "C{number}"', 'role = "Guardian"', f'key = "{key.public}"']
    for dataset in datasets:
        page += ["[[datasets]]", f'name = "{dataset}"', 'measurements = ["any simulated"]']
        page += ['sandbox = "S1"', "delta = 1e-5"]
    keys = ", ".join(f'"{key.public}"' for key in researchers)
    names = ", ".join(f'"{dataset}"' for dataset in datasets)
    page += ["[[projects]]", 'name = "p"', f"researchers = [{keys}]", f"datasets = [{names}]"]
    page += [
        f"epsilon = {epsilon}",
        "delta = 1e-5",
        f"largest_model = {largest_model}",
        "smallest_cohort = 10",
    ]
    page += [
        f"metrics = {METRICS!r}".replace("'", '"'),
        *(f'lanes.{lane}.release = "auto"' for lane in lanes),
    ]
    return Policy.parse("\n".join(page) + "\n")


def prepare(
    folder: Path,
    schema: str,
    frame: polars.DataFrame,
    name: str,
    *,
    others: Sequence[PrivateKey] = (),
    custodians: Sequence[PrivateKey] = (),
    **terms: Any,
) -> tuple[Config, PrivateKey]:
    """Write schema, records, signed policy and configuration; gives them with the researcher's key.

    Args:
        others: further researchers of the same project.
        custodians: who sign it, if the test needs their keys.
        terms: of the policy.
    """
    researcher, custodians = PrivateKey.create(), custodians or [PrivateKey.create(), PrivateKey.create()]
    (folder / f"{name}.toml").write_text(schema)
    frame.write_parquet(folder / f"{name}.parquet")
    page = policy([researcher, *others], custodians, [name], **terms)
    (folder / "policy.toml").write_text(page.text)
    signed = [msgspec.json.encode(state("sign", page, key)) for key in custodians]
    (folder / "policy.toml.signatures").write_bytes(b"\n".join(signed) + b"\n")
    paths = str(folder / "state"), str(folder / "policy.toml")
    dataset = Dataset(str(folder / f"{name}.toml"), str(folder))
    return Config("test-hospital", *paths, [dataset], listen="127.0.0.1:0"), researcher


@contextmanager
def running(config: Config) -> Iterator[tuple[Site, str]]:
    """The site, serving on a free port in this process (its curator and sessions are processes of their own)."""
    site, urls, stopping = Site(config), list[str](), threading.Event()
    thread = threading.Thread(target=serve, args=(site, urls.append, stopping.is_set), daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not urls and time.monotonic() < until:
        time.sleep(0.02)
    try:
        yield site, urls[0]
    finally:
        stopping.set()
        thread.join(20)


def connected(url: str, key: PrivateKey) -> Connected:
    """A client connected to the site, with no trace of it in the user's home."""
    site = Connected(Channel(url, key, AppraisalPolicy(allow_simulated=True)))
    site.refresh()
    return site


def spent(folder: Path) -> dict[str, int]:
    """What each account of the site prepared in `folder` has spent or reserved, in the ledger's own units."""
    with contextlib.closing(
        sqlite3.connect(f"file:{folder / 'state' / 'ledger.sqlite'}?mode=ro", uri=True)
    ) as db:
        return dict(db.execute("SELECT split, spent FROM account").fetchall())
