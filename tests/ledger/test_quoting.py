"""Quotes of the ledger: what a statement would say, told without writing anything."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from rapha_lab.curator.accounting import Gaussian, Loss, Pure, SampledGaussian, noise_for
from rapha_lab.curator.ledger import Ledger
from rapha_lab.protocol.errors import BudgetError, PolicyError

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
ACCOUNT = ("risk", "flchain", "train")
losses = st.one_of(
    st.builds(Gaussian, st.floats(1, 60)),
    st.builds(Pure, st.floats(0.01, 1)),
    st.builds(SampledGaussian, st.sampled_from([0.02, 0.2]), st.floats(1, 30), st.integers(1, 200)),
)


def run(ledger: Ledger, job: str, loss: Loss) -> None:
    """Reserve a job, run all of it, settle it."""
    ledger.reserve(job, "risk", "flchain", ["train"], loss, bytes(32))
    ledger.touch(job, loss.steps)
    ledger.settle(job, b"answer")


class TestQuotes:
    @given(st.lists(losses, min_size=1, max_size=6))
    @settings(max_examples=25, deadline=None)
    def test_a_quote_is_what_the_statement_says_afterwards(self, story):
        """Whatever was spent before; and what does not fit is what is refused."""
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            ledger = Ledger(Path(folder) / "ledger.db", Ed25519PrivateKey.generate())
            ledger.open_account(*ACCOUNT, 1.0, 1e-6)
            for number, loss in enumerate(story):
                before = ledger.statement(*ACCOUNT)
                quote = ledger.quote(*ACCOUNT, loss)
                if quote.fits:
                    run(ledger, f"job-{number}", loss)
                else:
                    with pytest.raises(BudgetError):
                        run(ledger, f"job-{number}", loss)
                after = ledger.statement(*ACCOUNT)
                assert quote.before == before.spent
                assert quote.room == after.room
                # the same terms, added in another order
                assert (quote.spent, quote.left) == pytest.approx((after.spent, after.left), rel=1e-9)
            ledger.close()

    def test_a_quote_writes_nothing(self, ledger):
        """Neither a charge nor an entry of the log; asked a hundred times, all is as it was."""
        run(ledger, "first", Gaussian(20))
        before = ledger.statement(*ACCOUNT), ledger.log.size(), ledger.log.checkpoint()
        quotes = {ledger.quote(*ACCOUNT, Gaussian(noise)) for noise in [12.0] * 100}
        assert len(quotes) == 1
        assert (ledger.statement(*ACCOUNT), ledger.log.size(), ledger.log.checkpoint()) == before

    @pytest.mark.parametrize("spent", [40.0, 12.0, 7.0])
    @pytest.mark.parametrize("loss", [Gaussian(0.5), Pure(5.0), SampledGaussian(0.1, 0.6, 100)])
    def test_what_a_quote_says_would_fit_does_fit(self, ledger, loss, spent):
        """The ε it proposes, asked for as that mechanism is asked, is admitted; a hundredth more is not."""
        run(ledger, "first", Gaussian(spent))
        quote = ledger.quote(*ACCOUNT, loss)
        assert not quote.fits
        assert quote.largest

        def asked(epsilon: float) -> Loss:
            return (
                Pure(epsilon)
                if isinstance(loss, Pure)
                else loss.with_noise(noise_for(loss.with_noise, epsilon, 1e-6))
            )

        assert ledger.quote(*ACCOUNT, asked(quote.largest)).fits
        assert not ledger.quote(*ACCOUNT, asked(quote.largest * 1.01)).fits

    def test_an_account_that_is_not_there_has_no_quote(self, ledger):
        """As it has no statement."""
        with pytest.raises(PolicyError):
            ledger.quote("risk", "flchain", "validation", Gaussian(20))
