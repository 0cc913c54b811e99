"""A ledger on disk, and the losses that its tests spend."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.curator.ledger import Ledger

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture
def key() -> Ed25519PrivateKey:
    """The log's key, the same in every test."""
    return KEY


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: a killed process loses nothing it wrote there either."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the ledger is kept."""
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path, key: Ed25519PrivateKey) -> Iterator[Ledger]:
    """A ledger with two accounts of ε = 1, δ = 1e-6: flchain's train and test."""
    ledger = Ledger(path, key)
    for split in ("train", "test"):
        ledger.open_account("risk", "flchain", split, 1.0, 1e-6)
    yield ledger
    ledger.close()
