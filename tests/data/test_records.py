"""The log says which records were served, to those alone who hold them."""

import json
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from wards import SALT, ward

from rapha_lab.client.mock import mock
from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.records import commit, commitment


@pytest.fixture
def ledger(tmp_path):
    held = Ledger(tmp_path / "ledger.sqlite", Ed25519PrivateKey.generate())
    yield held
    held.close()


def entries(ledger):
    return [json.loads(body) for body in ledger.log.entries(0)]


def test_a_custodian_can_open_what_the_log_holds(ledger, tmp_path):
    """By the number and the digest that the site keeps; the file is for its owner alone."""
    mock(ward(), 100).write_parquet(tmp_path / "ward.parquet")
    digest = Cohort.open(ward(), tmp_path, SALT).digest
    commit(ledger, tmp_path / "records.jsonl", "ward", digest)
    kept = json.loads((tmp_path / "records.jsonl").read_text())
    logged = entries(ledger)[kept["entry"]]
    assert logged["commitment"] == commitment(bytes.fromhex(kept["nonce"]), digest)
    assert stat.S_IMODE((tmp_path / "records.jsonl").stat().st_mode) == 0o600


def test_a_guess_of_the_records_is_not_confirmed_by_the_log(ledger, tmp_path):
    """The same records give another entry at every start, and their digest is in none."""
    for _ in range(2):
        commit(ledger, tmp_path / "records.jsonl", "ward", bytes(32))
    logged = [entry for entry in entries(ledger) if entry.get("kind") == "records" or "commitment" in entry]
    assert len({entry["commitment"] for entry in logged}) == 2
    assert bytes(32).hex() not in json.dumps(entries(ledger))
