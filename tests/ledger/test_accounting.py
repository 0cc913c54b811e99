"""Prices and noise: against closed forms, against Opacus, and always to the safe side."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from scipy.stats import norm

from rapha_lab.curator.accounting import (
    ORDERS,
    Gaussian,
    Loss,
    Nothing,
    Pure,
    SampledGaussian,
    decode_loss,
    encode_loss,
    epsilon_of,
    largest_epsilon,
    noise_for,
    order_for,
    units,
)
from rapha_lab.protocol.errors import RequestError

pytestmark = pytest.mark.filterwarnings("ignore:Optimal order")

DELTA = 1e-6
epsilons = st.floats(0.05, 10)
deltas = st.floats(-9, -4).map(lambda power: 10**power)
LOSSES = [Gaussian(3.7), SampledGaussian(0.02, 1.3, 400), SampledGaussian(1.0, 37.0, 5), Pure(0.7)]


class Curve:
    """Whatever a broken mechanism might claim to lose."""

    def __init__(self, rdp: float) -> None:
        self._rdp = rdp

    def rdp(self, alpha: int) -> float:
        return self._rdp


def spoken(loss: Loss) -> str:
    """A loss's name in the test report."""
    return type(loss).__name__


class TestCurves:
    def test_gaussian_curve_is_that_of_its_paper(self):
        """α/(2σ²), Mironov 2017."""
        assert Gaussian(2.0).rdp(9) == 9 / 8

    @pytest.mark.parametrize("alpha", [2, 9, 64, 1024])
    @pytest.mark.parametrize(("rate", "noise"), [(0.001, 0.8), (0.02, 1.1), (0.3, 5.0), (1.0, 9.0)])
    def test_sampled_gaussian_curve_is_that_of_opacus(self, rate, noise, alpha):
        """Every step costs what Opacus says, and no less."""
        expected = compute_rdp(q=rate, noise_multiplier=noise, steps=300, orders=float(alpha))
        ours = SampledGaussian(rate, noise, 300).rdp(alpha)
        assert ours >= expected
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-9)

    def test_sampled_gaussian_at_the_largest_order_is_still_finite(self):
        """Beyond it the binomial coefficients overflow a float."""
        assert math.isfinite(SampledGaussian(0.01, 2.0, 10).rdp(ORDERS[-1]))

    @given(st.floats(1e-4, 8), st.sampled_from(ORDERS))
    def test_pure_curve_is_that_of_randomised_response(self, epsilon, alpha):
        """The divergence of answering truly with odds e^ε to 1, summed out."""
        truth, lie = 1 / (1 + math.exp(-epsilon)), 1 / (1 + math.exp(epsilon))
        terms = [alpha * math.log(p) + (1 - alpha) * math.log(q) for p, q in ((truth, lie), (lie, truth))]
        high = max(terms)
        exact = (high + math.log(sum(math.exp(term - high) for term in terms))) / (alpha - 1)
        assert Pure(epsilon).rdp(alpha) == pytest.approx(exact, rel=1e-6, abs=1e-12)

    @given(st.floats(1e-3, 20), st.sampled_from(ORDERS))
    def test_pure_curve_covers_laplace_noise(self, epsilon, alpha):
        """Laplace noise (Mironov 2017, Proposition 6) loses no more than the price, nor that than ε."""
        terms = [
            math.log(alpha / (2 * alpha - 1)) + (alpha - 1) * epsilon,
            math.log((alpha - 1) / (2 * alpha - 1)) - alpha * epsilon,
        ]
        laplace = (max(terms) + math.log1p(math.exp(min(terms) - max(terms)))) / (alpha - 1)
        assert laplace - 1e-9 <= Pure(epsilon).rdp(alpha) <= epsilon

    @pytest.mark.parametrize("loss", [*LOSSES, Nothing()], ids=spoken)
    def test_losses_survive_being_stored(self, loss):
        """Recovery prices a job from its stored numbers alone."""
        assert decode_loss(encode_loss(loss)) == loss

    @pytest.mark.parametrize("loss", LOSSES, ids=spoken)
    def test_parts_cost_in_proportion_and_no_part_costs_nothing(self, loss):
        """At a fixed order the steps of a job are equal, so a refund is exact."""
        assert loss.part(0).rdp(9) == 0.0
        assert loss.part(loss.steps) == loss
        half = loss.steps // 2
        assert loss.part(half).rdp(9) == pytest.approx(loss.rdp(9) * half / loss.steps)

    @pytest.mark.parametrize("steps", [-1, 401, 1.5, True, math.nan])
    def test_parts_that_do_not_exist_are_refused(self, steps):
        """No negative part to earn budget with."""
        with pytest.raises(RequestError, match="steps"):
            SampledGaussian(0.02, 1.3, 400).part(steps if steps != 1.5 else math.inf)

    @pytest.mark.parametrize(
        "bad", [math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 1e300, "1", True, None]
    )
    def test_losses_with_impossible_numbers_cannot_be_made(self, bad):
        """A mechanism fails before it has a price."""
        for make in (
            Gaussian,
            Pure,
            lambda x: SampledGaussian(x, 1.0, 1),
            lambda x: SampledGaussian(0.5, x, 1),
        ):
            with pytest.raises(RequestError):
                make(bad if bad is not True or make in (Gaussian, Pure) else None)


class TestConversion:
    def test_orders_are_those_of_the_published_table(self):
        """The integer order that buys most Gaussian answers, δ = 1e-6."""
        orders = {0.5: 40, 1: 22, 2: 12, 3: 9, 4: 7, 5: 6, 6: 5, 8: 4, 10: 4}
        assert {epsilon: order_for(epsilon, DELTA).alpha for epsilon in orders} == orders

    @given(st.floats(0.05, 20), deltas)
    def test_a_whole_budget_is_worth_no_more_than_the_policy_says(self, epsilon, delta):
        """Converted back by Opacus, at the account's order."""
        order = order_for(epsilon, delta)
        back, _ = get_privacy_spent(orders=[float(order.alpha)], rdp=[order.units / 1e9], delta=delta)
        assert epsilon - 2e-9 < back <= epsilon

    @given(epsilons, deltas)
    def test_a_gaussian_answer_is_as_private_as_stated(self, epsilon, delta):
        """The exact δ of a Gaussian mechanism (Balle and Wang 2018, Theorem 8) at our ε."""
        noise = noise_for(Gaussian, epsilon, delta)
        shift = 1 / (2 * noise)
        exact = norm.cdf(shift - epsilon * noise) - math.exp(epsilon) * norm.cdf(-shift - epsilon * noise)
        assert exact <= delta

    @pytest.mark.parametrize(("rate", "noise", "steps"), [(0.0128, 1.12, 1562), (0.2, 12.0, 200)])
    def test_training_is_as_private_as_stated(self, rate, noise, steps):
        """A tight numerical accountant finds less loss, but not far less."""
        tight = PRVAccountant()
        tight.history = [(noise, rate, steps)]
        reference = tight.get_epsilon(delta=DELTA)
        assert reference <= epsilon_of(SampledGaussian(rate, noise, steps), DELTA) <= 1.25 * reference

    @given(st.floats(0.3, 50), st.floats(0.001, 1), st.integers(1, 2000), deltas)
    @settings(max_examples=15, deadline=None)
    def test_the_order_found_is_the_best_of_all(self, noise, rate, steps, delta):
        """ε as a function of the order has one valley, so that a search finds it."""
        loss = SampledGaussian(rate, noise, steps)
        everywhere, _ = get_privacy_spent(
            orders=ORDERS, rdp=[loss.rdp(order) for order in ORDERS], delta=delta
        )
        assert epsilon_of(loss, delta) == pytest.approx(max(0.0, everywhere), rel=1e-9)


class TestNoise:
    @given(epsilons, deltas, st.sampled_from([(1.0, 1), (0.3, 20), (0.02, 900)]))
    @settings(max_examples=15, deadline=None)
    def test_noise_is_enough_and_hardly_more(self, epsilon, delta, setting):
        """Never less than the guarantee needs; a thousandth less would not do."""
        rate, steps = setting
        noise = noise_for(lambda sigma: SampledGaussian(rate, sigma, steps), epsilon, delta)
        assert epsilon_of(SampledGaussian(rate, noise, steps), delta) <= epsilon
        assert epsilon_of(SampledGaussian(rate, noise * 0.999, steps), delta) > epsilon

    @pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf, 1e-5, 5e-324])
    def test_unreachable_guarantees_are_refused_by_name(self, epsilon):
        """No silent clamping: the researcher reads which field and why."""
        with pytest.raises(RequestError) as refusal:
            noise_for(Gaussian, epsilon, DELTA)
        assert refusal.value.field == "epsilon"

    @given(st.floats(0.2, 10), deltas)
    def test_an_answer_may_spend_a_whole_budget(self, epsilon, delta):
        """Rounding prices up and budgets down doesn't refuse the one request that fits exactly."""
        order = order_for(epsilon, delta)
        assert units(Gaussian(noise_for(Gaussian, epsilon, delta)), order.alpha) <= order.units

    @given(st.floats(0.3, 10), st.floats(0.001, 1))
    @settings(max_examples=40, deadline=None)
    def test_the_largest_epsilon_is_admitted_and_a_larger_one_is_not(self, budget, share):
        """What a refusal proposes is a price that holds."""
        order = order_for(budget, DELTA)
        left = int(order.units * share)
        room = largest_epsilon(Gaussian, order.alpha, left, DELTA)
        price = lambda epsilon: units(Gaussian(noise_for(Gaussian, epsilon, DELTA)), order.alpha)  # noqa: E731
        assert room == 0.0 or price(room) <= left < price(room * 1.01 + 1e-6)


class TestPrices:
    @pytest.mark.parametrize(
        "rdp", [-1e-30, -1.0, math.nan, math.inf, -math.inf, 5e-324, 1e300, 2.0**61, None, "0"]
    )
    def test_prices_that_are_none_are_refused(self, rdp):
        """Negative, subnormal, infinite, overflowing, or no number at all."""
        with pytest.raises(RequestError):
            units(Curve(rdp), 9)

    @given(st.floats(allow_nan=True, allow_infinity=True))
    def test_a_price_is_never_less_than_the_loss(self, rdp):
        """Rounded up, by less than a billionth, or refused."""
        try:
            price = units(Curve(rdp), 9)
        except RequestError:
            return
        assert 0 <= price - Fraction(rdp) * 10**9 < 1

    @given(st.lists(st.floats(1, 100), min_size=1, max_size=30), epsilons)
    def test_what_fits_in_units_fits_in_epsilon(self, noises, epsilon):
        """The sum of integer prices bounds the composed guarantee."""
        order = order_for(epsilon, DELTA)
        if sum(units(Gaussian(noise), order.alpha) for noise in noises) <= order.units:
            composed = Gaussian(sum(noise**-2 for noise in noises) ** -0.5)
            assert epsilon_of(composed, DELTA) <= epsilon + 1e-9
