"""What a cell does with visits, notes and pictures: trained, evaluated and looped over in a rehearsal."""

from pathlib import Path

import pytest

import rapha_lab
from rapha_lab.client.rehearsal import Rehearsal
from rapha_lab.protocol.errors import RaphaError
from rapha_lab.protocol.schema import Schema

DEMO = Path(rapha_lab.__file__).parent / "demo"
CELLS = {
    "clinic": """
import torch
from torch import nn

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(1024, 4)
        self.scan = nn.Sequential(nn.Conv2d(1, 2, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
        self.head = nn.Linear(9, 1)

    def forward(self, note, scan, age):
        there = (note > 0).float().unsqueeze(-1)
        words = (self.words(note) * there).sum(1) / there.sum(1).clamp(min=1)
        return self.head(torch.cat([words, self.scan(scan), age], 1))

model = Both()
inputs = {"note": "note", "scan": "scan", "age": ["age"]}
patients.train.fit(model, inputs=inputs, target="pneumonia", epsilon=1.0, epochs=1)
judged = patients.test.evaluate(model, ["auroc"], epsilon=1.0)
for batch in patients.train.batches(size=64, epochs=1, epsilon=1.0):
    scores = model(batch["note"], batch["scan"], batch[["age"]]).squeeze(-1)
    nn.functional.binary_cross_entropy_with_logits(scores, batch["pneumonia"]).backward()
""",
    "nafld": """
import torch
from torch import nn

class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.each, self.head = nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, visits, present):
        there = present.unsqueeze(-1)
        return self.head((self.each(visits).tanh() * there).sum(1) / there.sum(1).clamp(min=1))

model = Mean()
inputs = {"visits": ["visits.hdl", "visits.sbp"], "present": "visits.present"}
patients.train.fit(model, inputs=inputs, target="death", epsilon=1.0, epochs=1)
judged = patients.test.evaluate(model, ["auroc"], epsilon=1.0)
""",
}


@pytest.mark.parametrize("name", CELLS)
def test_a_model_of_them_trains_evaluates_and_loops(name):
    """Token ids into an embedding, pixels into a convolution, visits into a masked mean."""
    rehearsal = Rehearsal()
    rehearsal.run(CELLS[name], Schema.load(DEMO / f"{name}.toml"), epsilon=None)
    assert 0 <= float(rehearsal.namespace["judged"]["auroc"]) <= 1
    assert all(weight.isfinite().all() for weight in rehearsal.namespace["model"].parameters())


def test_a_name_of_a_table_that_is_none_is_told_in_the_cell():
    """With what was meant, before anything is sent."""
    cell = 'patients.train.fit(nn.Linear(2, 1), inputs=["visits.hld", "visits.sbp"], target="death", epsilon=1.0)'
    with pytest.raises(RaphaError, match=r"Did you mean visits\.hdl"):
        Rehearsal().run("from torch import nn\n" + cell, Schema.load(DEMO / "nafld.toml"), epsilon=None)
