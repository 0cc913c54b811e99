"""A clinic of its own for the tests of what custodians sign, see and decide."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))

import clinic
from clinic import Clinic


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    """A site where two custodians release what is trained, one what is counted; budgets that no test exhausts."""
    with clinic.open_clinic(tmp_path_factory.mktemp("clinic")) as opened:
        yield opened
