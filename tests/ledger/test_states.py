"""The ledger against a thirty-line model of it, over random lives with crashes and concurrent jobs."""

import json
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rapha_lab.curator.accounting import Gaussian, Pure, SampledGaussian, order_for, units
from rapha_lab.curator.ledger import Ledger
from rapha_lab.protocol.checkpoint import open_checkpoint, verify_consistency, verify_receipt
from rapha_lab.protocol.errors import RaphaError

SPLITS = ("test", "train", "validation")
ORDER = order_for(1.0, 1e-6)
names = st.sampled_from("abcdefgh")
losses = st.one_of(
    st.builds(Gaussian, st.floats(4, 60)),
    st.builds(Pure, st.floats(0.01, 0.4)),
    st.builds(SampledGaussian, st.just(1.0), st.floats(8, 80), st.integers(1, 6)),
)


class Model:
    """What the ledger has to say after each call."""

    def __init__(self) -> None:
        self.jobs: dict = {}

    def spent(self, split: str) -> int:
        return sum(units(job["paid"], ORDER.alpha) for job in self.jobs.values() if split in job["splits"])

    def reserve(self, name, splits, loss) -> bool:
        price = units(loss, ORDER.alpha)
        if name in self.jobs or any(self.spent(split) + price > ORDER.units for split in splits):
            return False
        self.jobs[name] = {
            "splits": splits,
            "loss": loss,
            "paid": loss,
            "ran": 0,
            "open": True,
            "release": None,
        }
        return True

    def touch(self, name, steps) -> bool:
        job = self.jobs.get(name)
        if not job or not job["open"] or steps < 1 or job["ran"] + steps > job["loss"].steps:
            return False
        job["ran"] += steps
        return True

    def end(self, name, release) -> bool:
        job = self.jobs.get(name)
        if not job or not job["open"] or (release is not None and not job["ran"]):
            return False
        job |= {"open": False, "paid": job["loss"].part(job["ran"]), "release": release}
        return True


class Lives(RuleBasedStateMachine):
    @initialize()
    def found(self) -> None:
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.key = Ed25519PrivateKey.generate()
        self.model, self.seen = Model(), None
        self.open()
        for split in SPLITS:
            self.ledger.open_account("risk", "flchain", split, 1.0, 1e-6)

    def open(self) -> None:
        self.ledger = Ledger(Path(self.folder.name) / "ledger.db", self.key)

    def agree(self, expected: bool, call, *args) -> None:
        try:
            call(*args)
        except RaphaError:
            assert not expected
        else:
            assert expected

    @rule(name=names, splits=st.sets(st.sampled_from(SPLITS), min_size=1), loss=losses)
    def reserve(self, name, splits, loss):
        admitted = self.model.reserve(name, splits, loss)
        self.agree(admitted, self.ledger.reserve, name, "risk", "flchain", list(splits), loss, bytes(32))

    @rule(name=names, steps=st.integers(-1, 4))
    def touch(self, name, steps):
        self.agree(self.model.touch(name, steps), self.ledger.touch, name, steps)

    @rule(name=names, release=st.binary(max_size=4))
    def settle(self, name, release):
        self.agree(self.model.end(name, release), self.ledger.settle, name, release)

    @rule(name=names)
    def abandon(self, name):
        self.agree(self.model.end(name, None), self.ledger.abandon, name, "cancelled")

    @rule(epsilon=st.floats(0.2, 1.0, exclude_max=True))
    def shrink(self, epsilon):
        """Refused when overspent; otherwise taken back, since the model's budget is fixed."""
        try:
            self.ledger.open_account("risk", "flchain", "train", epsilon, 1e-6)
        except RaphaError:
            assert self.model.spent("train") > 0
        self.ledger.open_account("risk", "flchain", "train", 1.0, 1e-6)

    @rule()
    def crash(self):
        """The process ends without closing; another opens."""
        self.ledger._held.close()
        self.ledger._db.close()
        for name in self.model.jobs:
            self.model.end(name, None)
        self.open()

    @invariant()
    def books_agree(self):
        rows = self.ledger._db.execute("SELECT split, spent FROM account").fetchall()
        assert dict(rows) == {split: self.model.spent(split) for split in SPLITS}
        assert all(spent <= ORDER.units for _, spent in rows)

    @invariant()
    def releases_are_kept_and_provable(self):
        for name, job in self.model.jobs.items():
            assert self.ledger.release_of(name) == job["release"]
            receipt = self.ledger.receipt_of(name)
            assert (receipt is None) == (job["release"] is None)
            if receipt:
                verify_receipt(receipt, self.key.public_key(), job["release"])

    @rule()
    def statements_stay_within_the_budget(self):
        for split in SPLITS:
            statement = self.ledger.statement("risk", "flchain", split)
            assert 0.0 <= statement.spent <= 1.0
            assert (statement.jobs == 0) == (self.model.spent(split) == 0)

    @invariant()
    def the_log_only_grows(self):
        head = open_checkpoint(self.ledger.log.checkpoint(), self.key.public_key())
        if self.seen:
            proof = self.ledger.log.consistency(self.seen.size, head.size)
            verify_consistency(self.seen.size, head.size, self.seen.root, head.root, proof)
        self.seen = head
        assert all(json.loads(entry)["kind"] for entry in self.ledger.log.entries(head.size - 1))

    def teardown(self) -> None:
        self.ledger.close()
        self.folder.cleanup()


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
