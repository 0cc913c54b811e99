"""A one-run privacy audit: what a training's answer shows of canaries, as a lower bound on its ε.

Steinke, Nasr and Jagielski 2023 (arXiv:2305.08846): m canaries are put among the patients, each or not by a fair
coin, and one training is run. From the answer alone an auditor guesses for some of them whether they were there.
An (ε, δ)-private training lets a guess be right with odds of e^ε at most, so too many right ones refute the ε.
It finds faults and proves no safety: a bound below the charged ε is what a sound training gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

__all__ = ["Audit", "audit", "coins", "p_value"]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        bound: ε is at least this, at the audit's confidence.
        canaries: how many there were, present or not.
        guesses: for how many the auditor guessed.
        correct: how many guesses were right.
        confidence: the chance at least that a bound below the true ε is given.
    """

    bound: float
    canaries: int
    guesses: int
    correct: int
    confidence: float


def coins(canaries: int, seed: int | None = None) -> np.ndarray:
    """For each canary whether it is put among the patients, bool (canaries,)."""
    return np.random.default_rng(seed).random(canaries) < 0.5


def audit(
    scores: np.ndarray, present: np.ndarray, delta: float, *, guesses: int, confidence: float = 0.95
) -> Audit:
    """The largest ε that the guesses refute.

    Args:
        scores: of each canary, the larger the likelier it was there, float (canaries,).
        present: whether it was, bool (canaries,).
        delta: of the guarantee.
        guesses: how many to make, fixed before the scores are seen: half of them on the highest scores, that those
            were there, half on the lowest, that they were not.
        confidence: of the bound.
    """
    order, half = np.argsort(scores, kind="stable"), guesses // 2
    correct = int((~present[order[:half]]).sum() + present[order[len(order) - half :]].sum())
    found = 0.0, 64.0
    if p_value(correct, 2 * half, len(order), 0.0, delta) > 1 - confidence:
        found = 0.0, 0.0
    for _ in range(40):
        middle = sum(found) / 2
        refuted = p_value(correct, 2 * half, len(order), middle, delta) <= 1 - confidence
        found = (middle, found[1]) if refuted else (found[0], middle)
    return Audit(found[0], len(order), 2 * half, correct, confidence)


def p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """The chance at most of so many right guesses if the training is (epsilon, delta)-private; their Theorem 5.2."""
    right = 1 / (1 + np.exp(-epsilon))
    tails = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    slack = max(0.0, float(np.max(tails / np.arange(1, correct + 1)))) if correct else 0.0
    return min(1.0, float(binom.sf(correct - 1, guesses, right)) + 2 * canaries * delta * slack)
