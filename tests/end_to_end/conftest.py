"""One hospital for the tests that leave it as they found it; those that hurt theirs start their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hospital
import pytest
import ward

from rapha_lab.client.site import Site as Connected
from rapha_lab.enclave.site import Site
from rapha_lab.protocol.keys import PrivateKey


@dataclass(frozen=True)
class Ward:
    """The running site, and two researchers of one project."""

    site: Site
    url: str
    key: PrivateKey
    other: PrivateKey
    folder: Path

    def connect(self, key: PrivateKey | None = None) -> Connected:
        """A new connection."""
        return hospital.connected(self.url, key or self.key)

    def spent(self) -> dict[str, int]:
        """Of each account, in the ledger's own units."""
        return hospital.spent(self.folder)


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    """A site with the ward's patients and a budget that no test exhausts."""
    folder, other = tmp_path_factory.mktemp("ward"), PrivateKey.create()
    config, key = hospital.prepare(folder, ward.SCHEMA, ward.frame(), "ward", others=[other], epsilon=900.0)
    with hospital.running(config) as (site, url):
        yield Ward(site, url, key, other, folder)
