"""Metrics from counts agree with scikit-learn's from scores, and intervals cover."""

import os
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn import metrics as sk
from wards import repeatable

from rapha_lab.curator.mechanisms import evaluate, metrics

NAMES = ["auroc", "auprc", "accuracy", "sensitivity", "specificity", "brier", "logloss"]


def scored(rng, n, prevalence, apart=1.5, spread=1.0):
    """Outcomes and logits of a model that separates the classes."""
    y = (rng.random(n) < prevalence).astype(int)
    return y, rng.normal(0, spread, n) + apart * y + np.log(
        prevalence / (1 - prevalence)
    ) - apart * prevalence


def truth(y, s):
    """The metrics by scikit-learn."""
    p, yes = expit(s), s >= 0
    return {
        "auroc": sk.roc_auc_score(y, s),
        "auprc": sk.average_precision_score(y, s),
        "accuracy": sk.accuracy_score(y, yes),
        "sensitivity": sk.recall_score(y, yes),
        "specificity": sk.recall_score(1 - y, ~yes),
        "brier": sk.brier_score_loss(y, p),
        "logloss": sk.log_loss(y, p),
    }


def judged(y, s, epsilon, names=NAMES, rng=None):
    """What the curator would answer about these scores."""
    add_noise = partial(repeatable, "laplace", rng=rng or np.random.default_rng(17))
    s = evaluate.bounded(torch.tensor(s))
    share = evaluate.share_for_placing(float(len(y)), epsilon)
    find, scale = evaluate.finder(share * epsilon), 1 / ((1 - 2 * share) * epsilon)
    edges = evaluate.edges_between(
        *(float(evaluate.CANDIDATES[find(part)]) for part in evaluate.utilities(s))
    )
    noisy = np.array(add_noise(scale)(evaluate.cells(s, y, edges).ravel())).reshape(2, -1)
    return metrics.judge(noisy, edges, scale, names)


class TestValues:
    @pytest.mark.parametrize("spread", [0.05, 0.4, 1.0, 2.0])
    @pytest.mark.parametrize("prevalence", [0.1, 0.5])
    def test_without_noise_they_are_those_of_the_scores(self, spread, prevalence):
        """Eleven bins tell what 30,000 scores do, however narrow the model's scores."""
        y, s = scored(np.random.default_rng(0), 30_000, prevalence, apart=1.4 * spread, spread=spread)
        exact, answer = truth(y, s), judged(y, s, 1e4)["metrics"]
        for name in NAMES:
            assert answer[name]["value"] == pytest.approx(
                exact[name], abs=0.015 if name == "auprc" else 0.006
            ), name

    @pytest.mark.parametrize("name", ["brier", "logloss"])
    def test_intervals_hold_for_a_model_that_says_nearly_the_same_of_all(self, name):
        """Its bins fall anywhere, for no candidate is between its scores: one bin holds them all, somewhere in it."""
        rng, held = np.random.default_rng(3), 0
        for _ in range(60):
            s = rng.normal(0.77, 0.003, 1275)
            y = (rng.random(1275) < expit(s)).astype(int)
            low, high = judged(y, s, 1.0, [name], rng)["metrics"][name]["interval"]
            p = expit(0.77)
            held += (
                low
                <= {"brier": p * (1 - p), "logloss": -p * np.log(p) - (1 - p) * np.log(1 - p)}[name]
                <= high
            )
        assert held >= 54

    def test_where_no_bin_holds_most_nothing_is_added(self):
        """Intervals of models that tell patients apart are as wide as they were."""
        edges, crowd = evaluate.edges_between(-0.5, 0.5), metrics._crowd
        apart, same = np.full((2, 13), 9.0), np.full((2, 13), 1.0)
        same[:, 5] = 90
        assert crowd(apart, edges, 0.0, metrics._brier) == 0
        assert crowd(np.zeros((2, 13)), edges, 0.0, metrics._brier) == 0
        assert crowd(same, edges, 0.0, metrics._logloss) > 0

    def test_auroc_at_a_usual_price_is_close(self):
        """1,600 patients at ε = 1: the mean error is under a hundredth."""
        rng = np.random.default_rng(1)
        errors = []
        for _ in range(60):
            y, s = scored(rng, 1600, 0.27)
            errors.append(
                judged(y, s, 1.0, ["auroc"], rng)["metrics"]["auroc"]["value"] - sk.roc_auc_score(y, s)
            )
        assert np.abs(errors).mean() < 0.01
        assert abs(np.mean(errors)) < 0.005

    def test_curves_are_curves(self):
        """The ROC rises from 0,0 to 1,1; calibration follows the diagonal of a calibrated model."""
        rng = np.random.default_rng(2)
        s = rng.normal(0, 1.5, 20_000)
        y = (rng.random(20_000) < expit(s)).astype(int)
        answer = judged(y, s, 10.0, ["auroc", "calibration"])
        fpr, tpr = answer["roc"]["fpr"], answer["roc"]["tpr"]
        assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == pytest.approx((0, 0, 1, 1))
        assert np.all(np.diff(fpr) >= 0)
        assert np.all(np.diff(tpr) >= 0)
        calibration = answer["calibration"]
        inner = slice(1, -1)  # a tail's scores are taken to be as wide as a bin
        assert calibration["observed"][inner] == pytest.approx(calibration["predicted"][inner], abs=0.05)
        assert all(low <= high for low, high in calibration["interval"])


DEEP = bool(os.environ.get("RAPHA_LAB_DEEP"))
SETTINGS = [*product((1000, 5000), (0.1, 0.3), (0.5, 1.0))] if DEEP else [(1000, 0.1, 0.5), (1000, 0.3, 1.0)]


def covered(n, prevalence, epsilon, apart, rounds):
    """The share of cohorts whose intervals hold the population's value, by metric."""
    rng = np.random.default_rng(3)
    population = truth(*scored(rng, 400_000, prevalence, apart))
    hits = dict.fromkeys(NAMES, 0)
    for _ in range(rounds):
        for name, answer in judged(*scored(rng, n, prevalence, apart), epsilon, rng=rng)["metrics"].items():
            low, high = answer["interval"]
            hits[name] += low <= population[name] <= high
    return {name: count / rounds for name, count in hits.items()}


class TestIntervals:
    @pytest.mark.parametrize(("n", "prevalence", "epsilon"), SETTINGS)
    def test_they_cover_what_all_patients_like_these_would_give(self, n, prevalence, epsilon):
        """Sampling and noise together: between 93 and 97 of 100, here and in the deep run within three standard errors."""
        shares = covered(n, prevalence, epsilon, 1.5, 1200 if DEEP else 150)
        assert min(shares.values()) >= (0.91 if DEEP else 0.885), shares
        assert max(shares.values()) <= (0.985 if DEEP else 1.0), shares

    def test_they_cover_where_a_model_is_nearly_right(self):
        """Noise that is cut off at 0 would look like patients on the wrong side, and did: 80 of 100."""
        shares = covered(1000, 0.1, 0.5, 2.5, 600 if DEEP else 100)
        assert min(shares[name] for name in ("auroc", "brier", "logloss")) >= (0.93 if DEEP else 0.88), shares

    def test_with_hardly_a_positive_they_are_all_that_is_possible(self):
        """Three positives under noise of three: nothing is known of the ranking, and the answer says so."""
        rng = np.random.default_rng(4)
        y, s = scored(rng, 500, 0.006)
        for name in ("auroc", "auprc"):
            low, high = judged(y, s, 0.3)["metrics"][name]["interval"]
            assert high - low > 0.6

    @pytest.mark.parametrize("epsilon", [0.05, 1.0, 100.0])
    @pytest.mark.parametrize("kind", ["empty", "positive", "negative", "constant", "nan", "huge"])
    def test_nothing_in_the_scores_makes_them_raise(self, epsilon, kind):
        """Nobody, one class, equal scores, NaN, infinity: finite answers within public limits."""
        n = 0 if kind == "empty" else 200
        y = np.arange(n) % 2 if kind not in ("positive", "negative") else np.full(n, int(kind == "positive"))
        s = {"nan": np.full(n, np.nan), "huge": np.where(y, np.inf, -1e308), "constant": np.zeros(n)}.get(
            kind, np.linspace(-3, 3, n)
        )
        answer = judged(y, s, epsilon, [*NAMES, "calibration"])
        for name, found in answer["metrics"].items():
            low, high = found["interval"]
            assert 0 <= low <= found["value"] <= high <= (16 if name == "logloss" else 1)
            assert np.isfinite(found["error"])

    def test_noise_alone_takes_no_figure_past_its_limit(self):
        """Of nobody, at a small ε, a log loss of noise would now and then be more than the largest there is."""
        nobody = np.arange(0)
        found = [judged(nobody, nobody, 0.05, ["logloss"])["metrics"]["logloss"] for _ in range(150)]
        assert all(0 <= f["interval"][0] <= f["value"] <= f["interval"][1] <= 16 for f in found)

    def test_a_mutant_that_forgets_the_noise_does_not_cover(self, mutant):
        """The test of coverage has teeth: intervals of sampling alone miss far too often."""
        broken = mutant(
            metrics,
            "return rng.poisson(counts, shape) - counts + rng.geometric(p, shape) - rng.geometric(p, shape)",
            "return rng.poisson(counts, shape) - counts",
        )
        rng = np.random.default_rng(5)
        population = truth(*scored(rng, 400_000, 0.1))["auroc"]
        hits = 0
        for _ in range(100):
            y, s = scored(rng, 1000, 0.1)
            s = evaluate.bounded(torch.tensor(s))
            edges = evaluate.edges_between(-3.0, -1.5)
            exact = evaluate.cells(s, y, edges).ravel()
            noisy = np.array(repeatable("laplace", 2.0, rng)(exact)).reshape(2, -1)
            low, high = broken.judge(noisy, edges, 2.0, ["auroc"])["metrics"]["auroc"]["interval"]
            hits += low <= population <= high
        assert hits < 85
