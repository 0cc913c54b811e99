"""One hospital for the tests that leave it as they found it; those that hurt theirs start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hospital
import pytest
import tutorials
import ward
from ward import Ward

from rapha_lab.protocol.keys import PrivateKey


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    """A site with the ward's patients and a budget that no test exhausts."""
    folder, other = tmp_path_factory.mktemp("ward"), PrivateKey.create()
    config, key = hospital.prepare(folder, ward.SCHEMA, ward.frame(), "ward", others=[other], epsilon=900.0)
    with hospital.running(config) as (site, url):
        yield Ward(site, url, key, other, folder)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the package from its wheel, as users have it."""
    return tutorials.install(tmp_path_factory.mktemp("wheel"))
