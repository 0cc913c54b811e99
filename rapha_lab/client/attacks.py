"""Attacks on a training's recipe, for the dossier: on made-up patients, or on public records that the researcher holds.

Two questions. Does the noise carry the ε that is claimed (a one-run audit with canaries, Steinke, Nasr and Jagielski
2023)? Could somebody tell who was among the patients (the likelihood-ratio attack, LiRA, Carlini et al. 2022)? Both
run here, on the release's own numbers of noise, clip, rate and steps. They say nothing of a fault at the site: its code
is audited in tests/audit. An attack on the records themselves is a function of the review lane, for custodians to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rapha_lab.client.audit import audit, coins
from rapha_lab.client.mock import mock
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.release import Release
from rapha_lab.protocol.schema import Schema

if TYPE_CHECKING:
    import polars
    import torch

__all__ = ["Report", "attack", "canaries", "lira"]

CANARIES, GUESSES = 5000, 200
SHADOWS, PATIENTS, STEPS, PLAIN = 64, 60, 60, 200


class Report(dict[str, Any]):
    """What both attacks found, as it goes into a dossier; shown without its curves."""

    def __repr__(self) -> str:
        found, told = self["canaries"], self["membership"]
        verdict = "not refuted" if found["holds"] else "REFUTED"
        private, plain = (told[name]["auc"] for name in ("private", "plain"))
        return (
            f"canaries: ε is {found['bound']:.3g} or more with {found['confidence']:.0%} confidence; "
            f"ε {found['epsilon']:g} is {verdict}\n"
            f"membership: AUC {private:.3f} with the recipe, {plain:.3f} in plain training; 0.5 is a guess\n"
            f"on {self['on']}"
        )


def attack(
    model: torch.nn.Module,
    release: Release,
    schema: Schema,
    inputs: Sequence[str],
    target: str,
    seed: int = 0,
    *,
    records: polars.DataFrame | None = None,
) -> Report:
    """Both attacks on the recipe of `release`.

    Args:
        model: its architecture; its weights are not used.
        release: of its training.
        schema: of the dataset.
        inputs: the columns it was given as one tensor.
        target: a boolean column.
        seed: of all that is drawn.
        records: of patients that everybody may see, such as those of a demonstration dataset, to tell the membership of
            instead of made-up ones; what is reported of them is no private answer. Never a hospital's.
    """
    whose = "made-up patients" if records is None else "public records that the researcher holds"
    return Report(
        canaries=canaries(release, seed),
        membership=lira(model, release, schema, inputs, target, seed, records=records),
        on=f"{whose}, with the recipe's own noise, clip, rate and steps",
    )


def canaries(release: Release, seed: int = 0) -> dict[str, Any]:
    """A lower bound on the ε of the recipe: each canary has a coordinate of its own, which no gradient can beat.

    Raises:
        RequestError: the release is of no training.
    """
    told = _recipe(release)
    rng, present = np.random.default_rng(seed), coins(CANARIES, seed)
    drawn = rng.binomial(told["steps"], min(1.0, told["rate"]), CANARIES)
    scores = present * drawn + told["noise"] * np.sqrt(told["steps"]) * rng.standard_normal(CANARIES)
    found = audit(scores, present, release.delta, guesses=GUESSES)
    return {
        "bound": found.bound,
        "epsilon": release.epsilon,
        "holds": found.bound <= release.epsilon,
        "canaries": CANARIES,
        "guesses": found.guesses,
        "correct": found.correct,
        "confidence": found.confidence,
    }


def lira(
    model: torch.nn.Module,
    release: Release,
    schema: Schema,
    inputs: Sequence[str],
    target: str,
    seed: int = 0,
    *,
    records: polars.DataFrame | None = None,
) -> dict[str, Any]:
    """How well membership can be told: with the recipe's clip and noise, and in plain training, where the attack bites.

    Shadow models are trained side by side, each on its own half of the patients. An AUC of 0.5 is a guess.

    Raises:
        RequestError: the target is no boolean column, or the records do not suffice.
    """
    told = _recipe(release)
    if schema.column(target).type != "boolean":
        raise RequestError(
            f"{target} is no boolean column.", "The attack is on a classifier.", field="target"
        )
    frame = mock(schema, PATIENTS, seed) if records is None else _drawn(records, target, seed)
    xs, ys = _encoded(schema, frame, list(inputs), target)
    members = np.random.default_rng(seed).random((SHADOWS, len(ys))) < 0.5
    report: dict[str, Any] = {"shadows": SHADOWS, "patients": len(ys), "steps": min(STEPS, told["steps"])}
    plain = {"noise": 0.0, "clip": 1e6, "rate": 1.0, "steps": PLAIN}
    for name, recipe in (("private", told | {"steps": report["steps"]}), ("plain", plain)):
        scores = _shadows(model, xs, ys, members, recipe, seed)
        fpr, tpr = _roc(_ratios(scores, members), members)
        auc = float(np.trapezoid(tpr, fpr))
        at = float(np.interp(0.01, fpr, tpr))
        curve = [[round(float(a), 4), round(float(b), 4)] for a, b in zip(fpr[::20], tpr[::20], strict=True)]
        report[name] = {"auc": auc, "tpr at fpr 1 %": at, "curve": [*curve, [1.0, 1.0]]}
    return report


def _recipe(release: Release) -> dict[str, Any]:
    told = {name: release.values.get(name) for name in ("noise", "rate", "steps", "clip")}
    if any(value is None for value in told.values()):
        raise RequestError("The release is of no training.", "", "Give the one of fit().", field="release")
    return told


def _drawn(records: polars.DataFrame, target: str, seed: int) -> polars.DataFrame:
    """As many of the records as there would be made-up patients, of those whose target is known."""
    known = records.drop_nulls(target) if target in records.columns else records.clear()
    if len(known) < PATIENTS:
        why = f"There are {len(known)} with {target}; {PATIENTS} are drawn."
        raise RequestError("The records are too few for the attack.", why, field="records")
    return known.sample(PATIENTS, shuffle=True, seed=seed)


def _encoded(
    schema: Schema, frame: polars.DataFrame, inputs: list[str], target: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (n, *shape) and targets (n,); made-up targets follow nothing, so all that is learned is learned by heart."""
    import torch

    from rapha_lab.client.rehearsal import encoded

    ys = torch.tensor([float(value or 0) for value in frame[target].to_list()])
    return encoded(schema, frame, inputs), ys


def _shadows(
    model: torch.nn.Module,
    xs: torch.Tensor,
    ys: torch.Tensor,
    members: np.ndarray,
    told: dict[str, Any],
    seed: int,
) -> np.ndarray:
    """The log-odds each shadow gives to each patient's own label, (shadows, patients), after DP-SGD on its members."""
    import torch
    from torch.func import functional_call, grad, vmap

    generator = torch.Generator().manual_seed(seed)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    weights = {
        name: torch.randn((len(members), *value.shape), generator=generator)
        * float(value.abs().mean() + 0.01)
        for name, value in start.items()
    }

    def logit(own: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(model, own, (x[None],)).reshape(())

    def loss(own: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(logit(own, x), y)

    each = vmap(vmap(grad(loss), (None, 0, 0)), (0, None, None))
    clip, noise, inside = float(told["clip"]), float(told["noise"]), torch.tensor(members)
    # large enough to learn by heart; a step of clipped gradients is as long as the clip lets it be
    rate, step = min(1.0, float(told["rate"])), 1.0 / min(clip, 1.0)
    for _ in range(int(told["steps"])):
        grads = each(weights, xs, ys)
        norms = sum(g.flatten(2).square().sum(2) for g in grads.values()).sqrt()
        drawn = (torch.rand(inside.shape, generator=generator) < rate) & inside
        share = drawn * (clip / norms.clamp_min(1e-12)).clamp(max=1.0)
        for name, g in grads.items():
            total = torch.einsum("sn,sn...->s...", share, g)
            total += noise * clip * torch.randn(total.shape, generator=generator)
            weights[name] = weights[name] - step * total / max(1.0, rate * len(ys) / 2)
    said = vmap(vmap(logit, (None, 0)), (0, None))(weights, xs)
    return (said * (2 * ys - 1)).detach().numpy()


def _ratios(scores: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Log-likelihood ratios of membership, each from the other shadows' scores of the same patient."""
    ratios = np.zeros_like(scores)
    for shadow in range(len(scores)):
        others = np.arange(len(scores)) != shadow
        inside, outside = (
            np.where(members[others] == side, scores[others], np.nan) for side in (True, False)
        )
        ratios[shadow] = _likelihood(scores[shadow], inside) - _likelihood(scores[shadow], outside)
    return ratios


def _likelihood(score: np.ndarray, among: np.ndarray) -> np.ndarray:
    mean, deviation = np.nanmean(among, axis=0), np.nanstd(among) + 1e-9
    return -((score - mean) ** 2) / (2 * deviation**2)


def _roc(ratios: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-ratios, axis=None, kind="stable")
    hits = members.ravel()[order]
    tpr, fpr = (np.concatenate([[0.0], np.cumsum(side) / side.sum()]) for side in (hits, ~hits))
    return fpr, tpr
