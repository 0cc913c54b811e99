"""What a cell may be written for elsewhere, in a locked session at a real site: Opacus, and a check of one's model."""

from __future__ import annotations

import re

from ward import Ward

from rapha_lab.session import parcels

CHECK = """
import rapha_lab as rapha
from torch import nn

model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
columns = ["age", "visits", "sex"]
before = bool(rapha.check(model, nn.BCEWithLogitsLoss(), columns, "died", of=patients))
after = bool(rapha.check(rapha.fix(model), nn.BCEWithLogitsLoss(), columns, "died", of=patients))
"""

OPACUS = """
import torch
from opacus import PrivacyEngine
from torch import nn

model = nn.Linear(3, 1)
optimizer = torch.optim.Adam(model.parameters())
loader = patients.train.loader(["age", "visits", "sex"], "died", batch_size=100)
model, optimizer, loader = PrivacyEngine().make_private(
    module=model, optimizer=optimizer, data_loader=loader, max_grad_norm=1.0, noise_multiplier=1.1, epochs=1
)
for x, y in loader:
    optimizer.zero_grad()
    nn.functional.binary_cross_entropy_with_logits(model(x).squeeze(1), y).backward()
    optimizer.step()
"""


def test_a_locked_session_checks_models_and_runs_scripts_for_opacus(serving: Ward) -> None:
    """Neither the client nor Opacus is there, and both names work."""
    site = serving.connect()
    checked = site.run(CHECK, "ward", session="foreign", outputs=["before", "after"]).wait()
    assert parcels.unpack(checked.values, checked.blob) == {"before": False, "after": True}
    trained = site.run(OPACUS, "ward", session="foreign").wait()
    shown = "\n".join(str(output["data"].get("text/plain", "")) for output in trained.outputs)
    assert "9 private steps" in shown
    assert 1.1 <= float(re.search(r"noise multiplier +([0-9.]+)", shown)[1]) <= 1.12  # type: ignore[index]
