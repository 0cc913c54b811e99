"""A log as a regulator gets it: one file, verified offline."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.client.logs import verify
from rapha_lab.curator.accounting import Gaussian
from rapha_lab.curator.ledger import Ledger
from rapha_lab.protocol.errors import LogError
from rapha_lab.protocol.keys import PrivateKey

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = str(PrivateKey("ed25519", (KEY,)).public)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The log of a ledger with a settled, an abandoned and an open job."""
    ledger = Ledger(tmp_path / "ledger.sqlite", KEY, origin="ward")
    ledger.open_account("p", "d", "train", 3.0, 1e-5)
    for job in ("settled", "abandoned", "open"):
        ledger.reserve(job, "p", "d", ["train"], Gaussian(20.0), bytes(32))
    ledger.touch("settled", 1)
    ledger.settle("settled", b"release")
    ledger.abandon("abandoned", "cancelled")
    lines = [json.dumps({"checkpoint": ledger.log.checkpoint(), "key": PUBLIC})]
    lines += [json.dumps(body.decode()) for body in ledger.log.entries()]
    ledger.close()
    path = tmp_path / "bundle.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def rewritten(path: Path, change: object) -> Path:
    """The bundle after `change` was made to its lines."""
    lines = path.read_text().splitlines()
    change(lines)  # type: ignore[operator]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_an_honest_bundle_verifies_and_its_books_are_told(bundle: Path) -> None:
    """Jobs, kinds and what each account spent come out of the log alone."""
    audit = verify(bundle, PUBLIC)
    assert audit.jobs == {"settled": "charge", "abandoned": "abandon", "open": "reserve"}
    account = audit.accounts["p/d/train"]
    assert account["spent"] == 2 * next(iter(account["open"].values()))


def test_another_sites_key_does_not_verify_it(bundle: Path) -> None:
    """Whose log it is is known from elsewhere."""
    with pytest.raises(LogError):
        verify(bundle, str(PrivateKey.create().public))


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines.pop(),
        lambda lines: lines.pop(2),
        lambda lines: lines.insert(3, lines[2]),
        lambda lines: lines.__setitem__(slice(2, 4), lines[3:1:-1]),
        lambda lines: lines.append(lines[-1]),
        lambda lines: lines.__setitem__(2, lines[2].replace("settled", "sett1ed")),
        lambda lines: lines.__setitem__(0, lines[0].replace("ward", "wart")),
    ],
    ids=["truncated", "dropped", "duplicated", "reordered", "extended", "edited", "renamed"],
)
def test_a_tampered_bundle_is_refused(bundle: Path, change: object) -> None:
    """Each kind of tampering shows."""
    with pytest.raises(LogError):
        verify(rewritten(bundle, change), PUBLIC)


def test_no_changed_character_verifies(bundle: Path) -> None:
    """One character anywhere, 500 times (seeded); white space between JSON's tokens says nothing."""
    rng, text = random.Random(7), bundle.read_text()
    for _ in range(500):
        at = rng.randrange(len(text))
        changed = text[:at] + rng.choice("abcXYZ0189") + text[at + 1 :]
        if changed == text or json.loads(text.splitlines()[0])["key"] not in changed.splitlines()[0]:
            continue
        bundle.write_text(changed)
        with pytest.raises(LogError):
            verify(bundle, PUBLIC)


def test_the_first_entry_that_does_not_add_up_is_named(bundle: Path) -> None:
    """A charge that was made smaller is named before the hashes are looked at."""

    def cheaper(lines: list[str]) -> None:
        entry = json.loads(json.loads(lines[5]))
        entry["accounts"]["p/d/train"]["charged"] = 1
        lines[5] = json.dumps(json.dumps(entry))

    with pytest.raises(LogError, match="Entry 4 is the first"):
        verify(rewritten(bundle, cheaper), PUBLIC)


def test_every_receipt_carries_the_sites_labels(tmp_path: Path) -> None:
    """The tier of the sandbox stands in the entry that the receipt proves."""
    ledger = Ledger(tmp_path / "ledger.sqlite", KEY, origin="ward", about={"tier": "S3"})
    ledger.open_account("p", "d", "train", 3.0, 1e-5)
    ledger.reserve("job", "p", "d", ["train"], Gaussian(20.0), bytes(32))
    ledger.touch("job", 1)
    assert json.loads(ledger.settle("job", b"release").entry)["tier"] == "S3"
    ledger.close()
