"""Loops as people write them by hand: each trains, or is refused by the cell's line with what to write instead."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Any

import numpy as np
import polars
import pytest
import torch
from house import House, numbers

from rapha_lab.protocol.errors import RaphaError
from rapha_lab.session.interpreter import Screen, run

N = 600
PUBLIC = {"meaning": "A number.", "public": "By design."}

HEAD = """
import torch, torch.nn.functional as F
from torch import nn
torch.manual_seed(0)
X = ["x0", "x1", "x2"]
model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
opt = torch.optim.SGD(model.parameters(), lr=0.1)
logits = F.binary_cross_entropy_with_logits
def loss_of(batch, **how):
    return logits(model(batch[X]).squeeze(-1), batch["y"].float(), **how)
def batches(epochs=0.3):
    return patients.train.batches(size=100, epochs=epochs, epsilon=1)
def update(loss):
    opt.zero_grad(); loss.backward(); opt.step()
"""

SEQUENCE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(2, 8, batch_first=True), nn.Linear(8, 1)
model = Net()
opt = torch.optim.Adam(model.parameters())
for batch in batches():
    v, present = torch.stack([batch["labs.value"], batch["labs.time"]], -1), batch["labs.present"].float()
    h = model.gru(v)[0]
"""

TRAIN = {
    "three epochs": """
for epoch in range(3):
    for batch in batches():
        update(loss_of(batch))
""",
    "clipping and class weights": """
crit = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]))
for batch in batches():
    loss = crit(model(batch[X]), batch["y"].float().unsqueeze(1))
    opt.zero_grad(set_to_none=True); loss.backward(); nn.utils.clip_grad_norm_(model.parameters(), 1.0); opt.step()
""",
    "a sum over the size of the batch": """
for batch in batches():
    update(loss_of(batch, reduction="sum") / batch[X].size(0))
""",
    "groups, a schedule, a closure": """
opt = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}], lr=1e-2)
schedule = torch.optim.lr_scheduler.OneCycleLR(opt, [0.1, 0.1], total_steps=20)
for batch in batches():
    def closure():
        opt.zero_grad(); loss = loss_of(batch); loss.backward()
        return loss
    opt.step(closure); schedule.step()
""",
    "accumulation": """
for i, batch in enumerate(batches(0.8)):
    (loss_of(batch) / 2).backward()
    if (i + 1) % 2 == 0:
        opt.step(); opt.zero_grad()
""",
    "frozen layers": """
for p in model[0].parameters():
    p.requires_grad_(False)
opt = torch.optim.RMSprop(filter(lambda p: p.requires_grad, model.parameters()))
for batch in batches():
    update(loss_of(batch))
""",
    "weights of two tasks that are learned": """
model, weigh = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)), nn.Parameter(torch.zeros(2))
opt = torch.optim.Adam([*model.parameters(), weigh])
for batch in batches():
    out = model(batch[X])
    first, second = logits(out[:, 0], batch["y"].float()), F.mse_loss(out[:, 1], batch["t"])
    update(torch.exp(-weigh[0]) * first + torch.exp(-weigh[1]) * second + weigh.sum())
""",
    "hazards by interval": """
model = nn.Linear(3, 5)
opt = torch.optim.Adam(model.parameters())
for batch in batches():
    last, died = (batch["t"] * 2).long().clamp(0, 4), batch["y"].float()
    at_risk = (torch.arange(5)[None] <= last[:, None]).float()
    update((logits(model(batch[X]), F.one_hot(last, 5) * died[:, None], reduction="none") * at_risk).sum(1).mean())
""",
    "the last state": SEQUENCE + '    update(logits(model.out(h[:, -1]).squeeze(-1), batch["y"].float()))',
    "states pooled by a mask": SEQUENCE
    + """
    pooled = (h * present[..., None]).sum(1) / present.sum(1, keepdim=True).clamp(min=1)
    update(logits(model.out(pooled).squeeze(-1), batch["y"].float()))
""",
    "a state of each patient's own": SEQUENCE
    + """
    place = present.sum(1).long().clamp(min=1) - 1
    own = h.gather(1, place.view(-1, 1, 1).expand(-1, 1, 8)).squeeze(1)
    update(logits(model.out(own).squeeze(-1), batch["y"].float()))
""",
}

REFUSED = {
    "running loss": ("total = 0 + loss.item()", "evaluate(model"),
    "printed": ('print(f"{loss:.3f}")', "evaluate(model"),
    "early stopping": ("stop = loss < 0.1 and 1", "stop early"),
    "plateau": ("torch.optim.lr_scheduler.ReduceLROnPlateau(opt).step(loss)", "OneCycleLR"),
    "lbfgs": ("torch.optim.LBFGS(model.parameters()).step(lambda: loss_of(batch))", "SGD or AdamW"),
    "packed": (
        'nn.utils.rnn.pack_padded_sequence(batch["labs.value"], batch["labs.present"].sum(1), True, False)',
        "pool by",
    ),
    "cox by order": ('order = torch.argsort(batch["t"])', "logit for each interval"),
    "cox by pairs": (
        'r = model(batch[X])[:, 0]; (r - (r.exp()[None] * (batch["t"][None] > batch["t"][:, None])).sum(1)).mean().backward()',
        "logit for each interval",
    ),
    "own places": ('model(batch[X])[torch.arange(13), batch["y"].long()]', "x.gather"),
    "unpacked": ("x, y = batch", "batch[FEATURES]"),
    "its length": ("len(batch[X])", "batch.expected"),
    "another device": ("model.cuda()", "Leave .cuda()"),
    "its rows on another device": ('batch[X].to("cuda")', "Leave .cuda()"),
    "loader": ("torch.utils.data.DataLoader(patients.train, shuffle=True)", "patients.train.batches"),
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Patients with an outcome, a time, and up to four labs."""
    x = np.random.default_rng(0).uniform(-1, 1, (N, 3))
    schema = numbers("clinic", 3, N)
    schema["columns"].append({"name": "t", "type": "number", "bounds": [0, 10], **PUBLIC})
    value: dict[str, Any] = {"name": "value", "type": "number", "bounds": [0, 10], **PUBLIC}
    labs = {"name": "labs", "meaning": "A lab.", "patient": "pid", "most": 4, "source": "labs.parquet"}
    schema["tables"] = [labs | {"time": "day", "columns": [value]}]
    columns = {"pid": [f"p{n}" for n in range(N)], "y": x.sum(1) > 0, "t": np.abs(x[:, 1]) * 9}
    frame = polars.DataFrame(columns | {f"x{k}": x[:, k] for k in range(3)})
    rows = range(3 * N)
    told = {"pid": [f"p{n // 3}" for n in rows], "day": [date(2020, 1, 1 + n % 3) for n in rows]}
    tables = {"labs": polars.DataFrame(told | {"value": [float(n % 7) for n in rows]})}
    found = House(tmp_path_factory.mktemp("house"), schema, frame, epsilon=900.0, tables=tables)
    yield found
    found.ledger.close()


def ran(house: House, source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"patients": house.patients}
    run(HEAD + source, namespace, Screen(lambda output: None), "<enclave cell 1>")
    return namespace


@pytest.mark.parametrize("name", TRAIN)
def test_a_loop_of_this_kind_trains(house: House, name: str) -> None:
    """Its release is given, and every weight that learns has learnt something finite."""
    before = len(house.releases)
    opt = ran(house, TRAIN[name])["opt"]
    assert len(house.releases) > before
    learning = [p for group in opt.param_groups for p in group["params"]]
    assert all(bool(p.isfinite().all()) for p in learning)
    assert all(name == "accumulation" or bool((p.grad != 0).any()) for p in learning)


@pytest.mark.parametrize("name", REFUSED)
def test_a_loop_of_this_kind_is_refused_in_words(house: House, name: str) -> None:
    """With the line of the cell, and what to write in its place."""
    line, instead = REFUSED[name]
    with pytest.raises(RaphaError) as refused:
        ran(house, f"\nfor batch in batches():\n    loss = loss_of(batch)\n    {line}\n")
    assert instead in (refused.value.instead or "")
    assert refused.value.line == HEAD.count("\n") + 4


def test_a_scaler_leaves_the_loss_as_it_is(house: House) -> None:
    """A loss scaled by 65,536 would be clipped as a whole, and its gradient scaled down to nothing."""
    scaler = torch.amp.GradScaler
    source = """
scaler = torch.amp.GradScaler("cpu")
for batch in batches(0.1):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(batch)
    opt.zero_grad(); scaler.scale(loss).backward(); scaler.unscale_(opt); scaler.step(opt); scaler.update()
"""
    model = ran(house, source)["model"]
    assert max(float(p.grad.abs().max()) for p in model.parameters()) > 1e-3
    assert torch.amp.GradScaler is scaler
