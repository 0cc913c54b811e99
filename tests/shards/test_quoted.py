"""What a quote says of a function on shards: the error that its release will state, and when another lane is better."""

import msgspec
import pytest
from bay import SCHEMA, Here, asked, ward
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.client.quotes import inquiry
from rapha_lab.curator import quotes
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.mechanisms import shards
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.policy import Project

TERMS = {"datasets": ["ward"], "epsilon": 8.0, "delta": 1e-5, "largest_model": 1000, "smallest_cohort": 10}
PROJECT = Project(name="p", researchers=[], **TERMS)
LARGE = msgspec.structs.replace(SCHEMA, patients=60_000)


@pytest.fixture
def quoted(tmp_path):
    """Quotes `what` of a ward with accounts for it."""
    ledger = Ledger(tmp_path / "ledger", Ed25519PrivateKey.generate())
    for split in ("train", "validation", "test"):
        ledger.open_account("p", "ward", split, 8.0, 1e-5)

    def quote(what, schema=LARGE, epsilon=1.0, **settings):
        return quotes.quote(inquiry(schema, what, epsilon=epsilon, **settings), PROJECT, schema, ledger)

    yield quote
    ledger.close()


@pytest.mark.parametrize("size", [1, 5])
def test_the_error_quoted_is_the_one_released(quoted, size):
    """And the price is the one charged: by the same k, noise and bounds."""
    quote = quoted(f"shards:{size}")
    ask = asked("def f(frame):\n    return 0\n", k=None, shape=[size], bounds=[(0.0, 100.0)])
    plan = shards.plan(ask, LARGE, 1e-5, Here(lambda job: bytes(8 * size)))
    released = plan.run(ward(range(50)).view("all"), lambda *_: None).values
    assert quote.figures["shards"] == released["shards"]
    assert [quote.error * 100.0] * size == pytest.approx(released["errors"])
    assert plan.loss.noise == quote.noise


@pytest.mark.parametrize(
    ("what", "schema", "hint"),
    [
        ("shards:3", LARGE, False),
        ("shards:40", LARGE, True),
        ("shards:3", SCHEMA, True),
        ("shards", LARGE, False),
    ],
)
def test_it_says_where_a_trained_model_serves_better(quoted, what, schema, hint):
    """Many numbers, or few patients in a shard."""
    assert any("DP-SGD" in note for note in quoted(what, schema).notes) == hint


@pytest.mark.parametrize(
    ("what", "settings", "field"),
    [
        ("shards:101", {}, "size"),
        ("shards:two", {}, "what"),
        ("shards:3", {"epsilon": None, "error": 0.1}, "error"),
        ("shards:3", {"schema": msgspec.structs.replace(SCHEMA, patients=1000)}, "k"),
        ("shards:3", {"schema": msgspec.structs.replace(SCHEMA, patients=None)}, "patients"),
    ],
)
def test_what_has_no_quote_is_said(quoted, what, settings, field):
    """Naming the field."""
    with pytest.raises(RequestError) as refused:
        quoted(what, **settings)
    assert refused.value.field == field
