"""The price of a private selection: above the true divergence of selections that can be computed, never by much."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import simpson
from scipy.special import logsumexp
from scipy.stats import norm, poisson

from rapha_lab.curator.accounting import (
    DELTA_UNIT,
    BandedGaussian,
    Gaussian,
    Nothing,
    SampledGaussian,
    Selected,
    Sum,
    decode_loss,
    encode_loss,
    epsilon_of,
    noise_for,
    order_for,
    runs_for,
    units,
)
from rapha_lab.protocol.errors import RequestError

DELTA = 1e-6
TRAIN = SampledGaussian(0.2, 10.0, 100)


def counts(mean: float, runs: int) -> np.ndarray:
    """The chance of each number of runs that count."""
    chances = poisson.pmf(np.arange(runs + 1), mean)
    return chances / chances.sum()


def divergence(alpha: int, sigma: float, chances: np.ndarray, towards: int) -> float:
    """The exact Rényi divergence of the best of so many Gaussian answers, moved by 1 towards better or worse."""
    k, y = np.arange(1, len(chances)), np.linspace(-12 * sigma, 14 * sigma, 8001)

    def best(shift: float) -> np.ndarray:
        """The logarithm of the density of the best."""
        z = (y[:, None] - shift) / sigma
        terms = np.log(chances[1:] * k) + (k - 1) * norm.logcdf(z) + norm.logpdf(z) - math.log(sigma)
        return np.asarray(logsumexp(terms, axis=1))

    whole = simpson(np.exp(alpha * best(towards) + (1 - alpha) * best(0.0)), x=y)
    return math.log(chances[0] + whole) / (alpha - 1)


CASES = [(2.0, 9), (5.0, 14), (10.0, 22), (2.0, 3)]  # of the last the tail is long, and is paid for


class TestSelected:
    @pytest.mark.parametrize(("mean", "runs"), CASES)
    @pytest.mark.parametrize("sigma", [3.0, 10.0])
    @pytest.mark.parametrize("alpha", [3, 9, 22])
    @pytest.mark.parametrize("towards", [1, -1])
    def test_the_price_covers_the_best_of_gaussian_answers(self, mean, runs, sigma, alpha, towards):
        """By numerical integration, where the score is the answer itself, which shows most; none counting is an outcome."""
        exact = divergence(alpha, sigma, counts(mean, runs), towards)
        assert exact <= Selected(SampledGaussian(1.0, sigma, 1), mean, runs).rdp(alpha) + 1e-9

    def test_the_price_of_one_run_does_not_cover_it(self):
        """Teeth: without the number of runs in it the check above fails."""
        for mean, runs in CASES[1:3]:
            assert divergence(9, 10.0, counts(mean, runs), 1) > 1.5 * SampledGaussian(1.0, 10.0, 1).rdp(9)

    @given(
        st.lists(st.tuples(st.floats(-4, 0), st.floats(-1.5, 1.5)), min_size=2, max_size=6),
        st.sampled_from(CASES),
        st.sampled_from([2, 3, 9, 22]),
    )
    @settings(max_examples=300, deadline=None, derandomize=True)
    def test_the_price_covers_the_best_of_any_few_answers(self, outcomes, case, alpha):
        """Of few outcomes in any order of worth, whose chances a patient moves at will: summed out, both ways."""
        p = np.exp([a for a, _ in outcomes])
        q = p * np.exp([b for _, b in outcomes])
        p, q = p / p.sum(), q / q.sum()

        def lost(p: np.ndarray, q: np.ndarray, order: int) -> float:
            return math.log(float((p**order * q ** (1.0 - order)).sum())) / (order - 1)

        def best(p: np.ndarray) -> np.ndarray:
            below = np.concatenate([[0.0], p.cumsum()])
            none_worse = (chances * below[:, None] ** np.arange(len(chances))).sum(
                1
            )  # all that count are below
            return np.concatenate([[chances[0]], np.diff(none_worse)])

        class Run:
            def rdp(self, order: int) -> float:
                return max(lost(p, q, order), lost(q, p, order))

        class Alone(Selected, frozen=True):
            def _one(self, order: int) -> float:
                return self.train.rdp(order)

        chances = counts(*case)
        claimed = Alone(Run(), *case).rdp(alpha)  # type: ignore[arg-type]
        assert max(lost(best(p), best(q), alpha), lost(best(q), best(p), alpha)) <= claimed + 1e-9

    @pytest.mark.parametrize("mean", [1.0, 2.5, 5.0, 20.0])
    @pytest.mark.parametrize("alpha", [2, 7, 22, 64, 1024])
    def test_the_curve_is_the_theorem_s(self, mean, alpha):
        """ln(e^-μ + μ e^((λ-1)(ε + μδ̂)))/(λ-1) and the tail, to fifty digits, with δ̂ by Scarf's bound at e^ε̂ = λ/(λ-1)."""
        loss = Selected(TRAIN, mean, runs_for(mean))
        mpmath.mp.dps = 50
        eps, chi2 = mpmath.mpf(TRAIN.rdp(alpha)), mpmath.expm1(TRAIN.rdp(2))
        gap = mpmath.mpf(alpha) / (alpha - 1) - 1
        delta = (mpmath.sqrt(chi2 + gap**2) - gap) / 2
        below = mpmath.gammainc(loss.runs, loss.mean, regularized=True)  # P(fewer than runs)
        inside = mpmath.exp(-mean) + mean * mpmath.exp((alpha - 1) * (eps + mean * delta))
        whole = (mpmath.log(inside) - alpha * mpmath.log(below)) / (alpha - 1)
        assert loss.rdp(alpha) == pytest.approx(float(whole), rel=1e-9)
        assert loss.rdp(alpha) >= float(whole)
        published = eps + mean * delta + mpmath.log(mean) / (alpha - 1)  # Theorem 6, by itself
        assert loss.rdp(alpha) >= float(published)

    def test_scarf_s_bound_covers_the_gaussian_s_delta(self):
        """What e^ε̂ leaves over, exactly, is below the bound from order 2 alone, and where it weighs not by far."""
        for sigma in (2.0, 5.0, 20.0):
            for alpha in (2, 9, 22, 64):
                gap = 1 / (alpha - 1)
                move, eps = 1 / sigma, math.log1p(gap)
                exact = norm.cdf(move / 2 - eps / move) - (1 + gap) * norm.cdf(-move / 2 - eps / move)
                chi2 = math.expm1(Gaussian(sigma).rdp(2))
                bound = (math.sqrt(chi2 + gap**2) - gap) / 2
                assert exact <= bound
                assert eps > move or bound < 3 * exact

    @pytest.mark.parametrize("mean", [1.0, 2.0, 5.0, 10.0, 20.0])
    def test_runs_reach_as_far_as_the_number_that_counts(self, mean):
        """A Poisson number is that large once in a thousand times at most; one run fewer would be too few."""
        runs = runs_for(mean)
        assert poisson.sf(runs - 1, mean) <= 1e-3 < poisson.sf(runs - 2, mean)

    def test_the_price_rises_with_every_danger(self):
        """Less noise, more runs that count, fewer that could."""
        for alpha in (3, 12, 40):
            prices = [
                Selected(TRAIN.with_noise(noise), 5.0, 14).rdp(alpha)
                for noise in (40.0, 20.0, 10.0, 5.0, 1.0)
            ]
            assert prices == sorted(prices)
            prices = [Selected(TRAIN, mean, 40).rdp(alpha) for mean in (1.0, 2.0, 5.0, 10.0, 20.0)]
            assert prices == sorted(prices)
            assert Selected(TRAIN, 5.0, 10).rdp(alpha) > Selected(TRAIN, 5.0, 14).rdp(alpha)
            assert Selected(TRAIN, 1.0, runs_for(1.0)).rdp(alpha) > TRAIN.rdp(alpha)

    def test_a_validation_patient_loses_no_more_than_one_who_is_trained_on(self):
        """The score's noise is such that its curve is below a training's at every order, or else it is the one that counts."""
        for train in (TRAIN, SampledGaussian(0.01, 0.8, 2000), BandedGaussian(0.4, 3.0, 4, 40)):
            score = Selected(train, 5.0, 14).score
            assert score.rdp(2) == pytest.approx(train.rdp(2))
            assert all(score.rdp(alpha) <= train.rdp(alpha) * (1 + 1e-9) for alpha in (2, 3, 8, 22, 64, 300))

    def test_all_of_it_is_charged_once_anything_ran(self):
        """Of a selection that is cut short nothing is known to be cheaper; what was not touched costs nothing."""
        loss = Selected(TRAIN, 5.0, 14)
        assert loss.steps == 14 * 101
        assert loss.part(0) == Nothing()
        assert loss.part(1) == loss.part(loss.steps) == loss
        assert decode_loss(encode_loss(loss)) == loss
        assert loss.delta_units == 0 < DELTA_UNIT

    @pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
    @pytest.mark.parametrize("mean", [3.0, 10.0])
    def test_it_costs_less_than_so_many_runs_told_one_by_one(self, epsilon, mean):
        """The noise at which the whole is at the asked ε is less than what `mean` runs need that are all released."""
        one = Selected(TRAIN, mean, runs_for(mean))
        loss = one.with_noise(noise_for(one.with_noise, epsilon, DELTA))
        assert epsilon - 1e-4 < epsilon_of(loss, DELTA) <= epsilon
        each = noise_for(lambda noise: Sum([(TRAIN.with_noise(noise), round(mean))]), epsilon, DELTA)
        alone = noise_for(TRAIN.with_noise, epsilon, DELTA)
        assert alone < loss.noise < each

    def test_a_selection_fits_a_budget_somewhat_larger_than_its_own_epsilon(self):
        """At the account's one order it costs more than a Gaussian of the same ε, by a fifth at most."""
        order = order_for(1.0, DELTA)
        one = Selected(TRAIN, 5.0, 14)
        loss = one.with_noise(noise_for(one.with_noise, 1.0, DELTA))
        assert order.units < units(loss, order.alpha) < 1.2 * order.units

    def test_an_epsilon_that_no_noise_reaches_is_refused_with_one_that_is_reached(self):
        """ln μ / (λ-1) stays, however much noise there is."""
        one = Selected(TRAIN, 20.0, runs_for(20.0))
        with pytest.raises(RequestError) as caught:
            noise_for(one.with_noise, 0.0065, DELTA)
        least = float(caught.value.instead.rpartition("=")[2].rstrip("."))
        assert epsilon_of(one.with_noise(noise_for(one.with_noise, least, DELTA)), DELTA) <= least

    @pytest.mark.parametrize(
        ("mean", "runs"), [(0.5, 14), (math.nan, 14), (5.0, 0), (5.0, 10_000), (20.0, 3)]
    )
    def test_what_the_theorem_is_not_about_is_refused(self, mean, runs):
        """A mean below 1, none, no run, too many of them, or a number cut off in its middle."""
        with pytest.raises(RequestError):
            Selected(TRAIN, mean, runs)
