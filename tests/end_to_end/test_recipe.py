"""A newcomer's first training works: `fit`'s defaults on real patients, against the same model without privacy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from sklearn.metrics import roc_auc_score
from torch import nn

from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.noise import SystemNoise
from rapha_lab.curator.plans import plan_of
from rapha_lab.protocol import messages
from rapha_lab.protocol.schema import Schema
from rapha_lab.session import recipe, tracing

pytest.importorskip("sksurv", reason="the demonstration data are in the demo extra")

FEATURES = ["age", "sex", "sample_yr", "kappa", "lambda_", "flc_grp", "creatinine", "mgus"]
EPSILON, DELTA, SEEDS = 1.0, 1e-5, 5


def model_of(seed: int) -> nn.Module:
    """The tutorial's model."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(len(FEATURES), 64), nn.GELU(), nn.Linear(64, 1))


def auroc(model: nn.Module, cohort: Cohort) -> float:
    """The exact AUROC on the test split, which only a test may compute."""
    view = cohort.view("test")
    with torch.no_grad():
        scores = model(view.tensor(FEATURES)).squeeze(-1)
    return float(roc_auc_score(view.tensor("death").numpy(), scores.numpy()))


def privately(seed: int, cohort: Cohort) -> float:
    """AUROC of the model trained as `patients.train.fit` trains it by default."""
    schema, model = cohort.schema, model_of(seed)
    traced = tracing.loss_program(
        model, nn.BCEWithLogitsLoss(), {"x": torch.zeros(len(FEATURES))}, torch.zeros(())
    )
    expected = round(schema.expected("train") or 0)
    ask = messages.Fit(
        dataset=schema.name,
        split="train",
        epsilon=EPSILON,
        program=traced.program,
        inputs={"x": FEATURES, "target": "death"},
        **recipe.choose(expected, EPSILON, model, None),
    )
    plan = plan_of(messages.decode(messages.encode(ask)), traced.blob, schema, DELTA, SystemNoise())
    answer = plan.run(cohort.view("train"), lambda *_: None)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load(answer.tensors).items():
            parameters[name].copy_(value)
    return auroc(model, cohort)


def openly(seed: int, cohort: Cohort) -> float:
    """AUROC of the same model trained with Adam and no privacy."""
    model, view = model_of(seed), cohort.view("train")
    x, y = view.tensor(FEATURES), view.tensor("death")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        for part in torch.randperm(len(x), generator=generator).split(256):
            loss = nn.functional.binary_cross_entropy_with_logits(model(x[part]).squeeze(-1), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return auroc(model, cohort)


def test_fit_with_its_defaults_is_within_a_hundredth_of_training_without_privacy(tmp_path: Path) -> None:
    """Mean AUROC over five seeds on held-out patients, at ε = 1 and δ = 1e-5."""
    from rapha_lab.demo.build import build

    path = build(tmp_path)
    cohort = Cohort.open(Schema.load(path), path.parent, salt=b"a recipe's own salt")
    private = np.mean([privately(seed, cohort) for seed in range(SEEDS)])
    open_ = np.mean([openly(seed, cohort) for seed in range(SEEDS)])
    print(f"AUROC {private:.4f} at epsilon {EPSILON}, {open_:.4f} without privacy")
    assert open_ > 0.8
    assert private > open_ - 0.01
