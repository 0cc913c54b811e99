"""Disks that are full, read-only or damaged, for real: a clear error, nothing released, nothing lost."""

import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rapha_lab.curator.accounting import SampledGaussian, order_for, units
from rapha_lab.curator.ledger import Ledger
from rapha_lab.protocol.checkpoint import verify_receipt
from rapha_lab.protocol.errors import RaphaError, SiteError

TRAINING = SampledGaussian(1.0, 60.0, 10)
ALPHA = order_for(1.0, 1e-6).alpha


def in_child(act: Callable[[], None]) -> None:
    """Run it in a process of its own, whose limits are its own."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def spent(ledger: Ledger) -> int:
    """The one integer of train."""
    return int(ledger._db.execute("SELECT spent FROM account WHERE split = 'train'").fetchone()[0])


@pytest.fixture
def busy(ledger, path):
    """A ledger's file with a settled job and one that ran three of ten steps, closed as by a crash."""
    for job, steps in (("done", 2), ("open", 3)):
        ledger.reserve(job, "risk", "flchain", ["train"], TRAINING, bytes(32))
        ledger.touch(job, steps)
    ledger.settle("done", b"weights", bytes(5000))
    ledger.close()
    return path


class TestFull:
    def test_no_file_can_grow_any_more(self, ledger, path):
        """Each act is refused as a whole; with space again the job settles, and what it ran is what it pays."""
        ledger.reserve("job", "risk", "flchain", ["train"], TRAINING, bytes(32))
        ledger.touch("job", 2)
        ledger.close()

        def act() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            again = Ledger(path, ledger._key)
            again.reserve("next", "risk", "flchain", ["train"], TRAINING, bytes(32))
            again.touch("next", 4)
            largest = max(Path(f"{path}{end}").stat().st_size for end in ("", "-wal"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
            refused = 0
            for number in range(30):
                try:
                    again.settle("next", bytes(1 << 20))
                except SiteError:
                    refused += 1
                assert again.release_of("next") is None
                with_more = SampledGaussian(1.0, 60.0, number + 1)
                try:
                    again.reserve(f"more-{number}", "risk", "flchain", ["train"], with_more, bytes(32))
                    again.abandon(f"more-{number}", "cancelled")
                except RaphaError:
                    refused += 1
            assert refused > 30
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            receipt = again.settle("next", bytes(1 << 20))
            verify_receipt(receipt, ledger._key.public_key(), bytes(1 << 20))

        in_child(act)
        again = Ledger(path, ledger._key)
        assert again._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert spent(again) == units(TRAINING.part(2), ALPHA) + units(TRAINING.part(4), ALPHA)
        assert len(again.release_of("next")) == 1 << 20
        again.close()


OPEN_READ_ONLY = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rapha_lab.curator.ledger import Ledger
from rapha_lab.protocol.errors import SiteError
try:
    Ledger(Path(sys.argv[1]), Ed25519PrivateKey.generate())
except SiteError as error:
    print(error)
    sys.exit(7)
"""


class TestReadOnly:
    @pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap for a read-only mount")
    def test_no_curator_opens_a_ledger_it_cannot_write(self, busy):
        """On a file system mounted read-only; afterwards all is as it was."""
        before = busy.read_bytes()
        command = [
            "bwrap",
            "--ro-bind",
            "/",
            "/",
            "--dev",
            "/dev",
            sys.executable,
            "-c",
            OPEN_READ_ONLY,
            str(busy),
        ]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        if "namespace" in told.stderr:
            pytest.skip("no user namespaces here")
        assert told.returncode == 7, told.stderr
        assert "cannot be read or written" in told.stdout
        assert busy.read_bytes() == before


class TestDamage:
    def outcome(self, path: Path, key) -> str:
        """Whether it opens and all its answers are true, or which error says that it is damaged."""
        try:
            ledger = Ledger(path, key)
        except SiteError:
            return "refused"
        try:
            for act in (
                lambda: ledger.statement("risk", "flchain", "train"),
                lambda: ledger.release_of("done"),
                lambda: ledger.receipt_of("done"),
                lambda: ledger.settled(bytes(32), b""),
                lambda: ledger.reserve("new", "risk", "flchain", ["train"], TRAINING, bytes(32)),
                lambda: ledger.touch("new", 1),
                lambda: ledger.settle("new", b"answer"),
                lambda: ledger.log.entries(),
            ):
                try:
                    act()
                except RaphaError:
                    return "said"
            honest = units(TRAINING.part(2), ALPHA) + units(TRAINING.part(3), ALPHA)
            assert spent(ledger) >= honest
            return "sound"
        finally:
            ledger.close()

    def test_a_damaged_page_is_said_or_does_no_harm(self, busy, key, tmp_path):
        """Garbage in each page in turn; never another error than the typed one, never less spent than was."""
        whole, seen = busy.read_bytes(), set()
        rng = random.Random(0)
        for page in range(len(whole) // 4096):
            for size in (4096, 64):
                damaged = bytearray(whole)
                start = page * 4096 + rng.randrange(4096 - size + 1)
                damaged[start : start + size] = rng.randbytes(size)
                copy = tmp_path / f"{page}-{size}.db"
                copy.write_bytes(damaged)
                seen.add(self.outcome(copy, key))
        assert seen >= {"refused", "said"}

    def test_an_account_that_was_lowered_is_refused(self, busy, key):
        """Its state is the sum of its charges, or the site does not start."""
        db = sqlite3.connect(busy)
        db.execute("UPDATE account SET spent = spent - 1 WHERE split = 'train'")
        db.commit()
        db.close()
        with pytest.raises(SiteError, match="cannot be read"):
            Ledger(busy, key)


class TestTheFileItself:
    """What the database refuses whatever the code above it says."""

    @pytest.mark.parametrize(
        "wrong",
        [
            "UPDATE charge SET units = units + 1",
            "DELETE FROM charge",
            "DELETE FROM job",
            "UPDATE job SET touched = 0 WHERE state = 'settled'",
            "UPDATE job SET state = 'reserved' WHERE state = 'settled'",
            "UPDATE entry SET body = x'00'",
            "DELETE FROM entry",
            "UPDATE subtree SET hash = x'00'",
            "UPDATE account SET spent = -1",
            "UPDATE account SET delta_spent = -1",
            "UPDATE charge SET delta = delta + 1",
            "INSERT INTO charge SELECT 1, 'done', 0, 0",
            "INSERT INTO charge SELECT 2, 'done', -5, 0",
        ],
    )
    def test_a_statement_that_would_lower_the_books_fails(self, busy, wrong):
        """By a trigger or a constraint."""
        db = sqlite3.connect(busy)
        with pytest.raises(sqlite3.IntegrityError):
            db.execute(wrong)
        db.close()

    def test_a_reservation_over_the_budget_fails_even_unchecked(self, ledger, monkeypatch):
        """Where the code's own comparison is broken."""
        monkeypatch.setattr("rapha_lab.curator.ledger.units", _cheap(ledger))
        with pytest.raises(SiteError, match="over the budget"):
            ledger.reserve("huge", "risk", "flchain", ["train"], SampledGaussian(1.0, 3.0, 9), bytes(32))
        assert spent(ledger) == 0


def _cheap(ledger: Ledger) -> Callable[..., int]:
    """Prices that are right only when they are written."""
    calls = iter([0, *[1 << 50] * 9])
    return lambda loss, alpha: next(calls)
