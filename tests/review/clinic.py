"""A hospital whose custodians look at answers before they leave: real site, real keys, made-up patients."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hospital
import msgspec
import ward

from rapha_lab.client.custodian import Custodian
from rapha_lab.client.site import ENDED, Job
from rapha_lab.client.site import Site as Connected
from rapha_lab.enclave.site import Config, Dataset, Site
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import Policy, state

ROLES = ("Caldicott Guardian", "Data Protection Officer", "General Counsel")
LANES = {
    "aggregate": "one custodian",
    "train": "two custodians",
    "evaluate": "auto",
    "shards": "auto",
    "review": "one custodian",
}


@dataclass
class Clinic:
    """The running site, its people and their keys."""

    folder: Path
    config: Config
    site: Site
    url: str
    researcher: PrivateKey
    custodians: list[PrivateKey]

    def connect(self, key: PrivateKey | None = None) -> Connected:
        """A new connection, the researcher's if no key is given."""
        return hospital.connected(self.url, key or self.researcher)

    def custodian(self, number: int = 0) -> Custodian:
        """One of the custodians, connected."""
        key = self.custodians[number]
        return Custodian(self.connect(key), key)


def page(researcher: PrivateKey, custodians: list[PrivateKey], *, version: int = 1, **lanes: str) -> Policy:
    """The clinic's policy, not yet signed."""
    text = hospital.policy([researcher], custodians, ["ward"], epsilon=900.0, lanes=()).text
    for number, role in enumerate(ROLES):
        text = text.replace(f'name = "C{number}"\nrole = "Guardian"', f'name = "C{number}"\nrole = "{role}"')
    text = text.replace("version = 1", f"version = {version}")
    modes = (LANES | lanes).items()
    return Policy.parse(text + "".join(f'lanes.{lane}.release = "{mode}"\n' for lane, mode in modes))


def write(folder: Path, policy: Policy, keys: list[PrivateKey]) -> None:
    """Put the page and these signatures where the site reads them."""
    (folder / "policy.toml").write_text(policy.text)
    said = [msgspec.json.encode(state("sign", policy, key)) for key in keys]
    (folder / "policy.toml.signatures").write_bytes(b"\n".join(said) + b"\n")


def prepare(folder: Path, **lanes: str) -> tuple[Config, PrivateKey, list[PrivateKey]]:
    """Records, schema, signed policy and configuration in `folder`."""
    researcher, custodians = PrivateKey.create(), [PrivateKey.create() for _ in ROLES]
    (folder / "ward.toml").write_text(ward.SCHEMA)
    ward.frame().write_parquet(folder / "ward.parquet")
    write(folder, page(researcher, custodians, **lanes), custodians)
    paths = str(folder / "state"), str(folder / "policy.toml")
    dataset = Dataset(str(folder / "ward.toml"), str(folder))
    return Config("clinic", *paths, [dataset], listen="127.0.0.1:0"), researcher, custodians


@contextlib.contextmanager
def open_clinic(folder: Path, **lanes: str) -> Iterator[Clinic]:
    """The clinic, serving."""
    config, researcher, custodians = prepare(folder, **lanes)
    with hospital.running(config) as (site, url):
        yield Clinic(folder, config, site, url, researcher, custodians)


def until(job: Job, state: str, seconds: float = 60) -> Job:
    """Follow the job until it is in that state."""
    end = time.monotonic() + seconds
    while job.state != state:
        assert job.state not in ENDED, f"the job is {job.state}: {job.told.get('error')}"
        assert time.monotonic() < end, f"the job stays {job.state}: {job.told.get('error')}"
        job.poll(0.5)
    return job


def newest(
    custodian: Custodian, kind: str = "", job: Job | None = None, seconds: float = 60
) -> dict[str, Any]:
    """What came into the airlock last, of this kind and this job, once something has."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        waiting = [told for told in custodian.waiting() if told["kind"].startswith(kind)]
        if found := [told for told in waiting if job is None or told["job"].startswith(job.id)]:
            return found[-1]
        time.sleep(0.1)
    raise AssertionError(f"No {kind or 'thing'} came into the airlock.")
