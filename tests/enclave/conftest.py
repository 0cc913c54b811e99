"""One warm zygote per tier for all tests here: loading the libraries takes seconds, a worker none."""

from collections.abc import Iterator

import pytest
from snippets import Cell

from rapha_lab.enclave.sandbox import Limits, Zygote
from rapha_lab.protocol.errors import SiteError


@pytest.fixture(scope="session", params=["S3", "S2"])
def zygote(request: pytest.FixtureRequest) -> Iterator[Zygote]:
    """A warm zygote of each tier this machine has."""
    try:
        warm = Zygote("sandbox_cell:main", (), request.param)
    except SiteError as error:
        if request.param == "S3":
            pytest.skip(f"no S3 here: {error}")
        raise
    with warm:
        assert warm.tier == request.param
        yield warm


@pytest.fixture
def cell(zygote: Zygote) -> Iterator[Cell]:
    """A fresh worker."""
    with zygote.spawn(Limits(cpu_seconds=120, wall_seconds=120)) as worker:
        yield Cell(worker)
