"""Loops as people write them by hand: each trains, or is refused by the cell's line with what to write instead."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import date
from typing import Any

import msgspec
import numpy as np
import polars
import pytest
import torch
from house import House, numbers

from rapha_lab.protocol.columns import Column
from rapha_lab.protocol.errors import CellError, ProgramError, RaphaError
from rapha_lab.session import parcels, scaled
from rapha_lab.session.interpreter import Screen, run
from rapha_lab.session.patients import Patients

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
    "names of what an operation gives": """
model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 4))
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for batch in batches():
    score = model(batch[X])
    update(logits(score.max(1).values + score.sort(-1).values[:, 1], batch["y"].float()))
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
    "a schedule as long as the batches": """
loader = batches(0.5)
opt = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=len(loader))
for i, batch in enumerate(loader):
    update(loss_of(batch)); schedule.step()
assert i + 1 == len(loader) == 3
""",
    "an early end, and another loop": """
for batch in batches(2):
    update(loss_of(batch)); break
loader = batches(2)
try:
    update(loss_of(next(loader))); 1 / 0
except ZeroDivisionError:
    update(loss_of(next(loader)))
""",
    "a network of convolutions over visits, focal loss, an average by hand": """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 8, 2, padding=2, dilation=2))
        self.out = nn.Linear(8 + 3, 1)
    def forward(self, v, x):
        h = F.relu(self.conv(v.transpose(1, 2))[:, :, :-2].contiguous())
        return self.out(torch.cat([h[:, :, -1], x], 1)).squeeze(-1)
model = torch.compile(nn.DataParallel(Net()))
decay, rest = [[p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
opt = torch.optim.AdamW([{"params": decay, "weight_decay": 1e-2}, {"params": rest, "weight_decay": 0.0}], lr=3e-3)
average = {k: v.clone() for k, v in model.state_dict().items()}
for batch in batches():
    v = torch.stack([batch["labs.value"], batch["labs.time"]], -1)
    v = 0.8 * v + 0.2 * v.flip(1)
    with torch.amp.autocast("cpu", dtype=torch.bfloat16):
        bce = logits(model(v, batch[X]), batch["y"] * 0.9 + 0.05, reduction="none")
        loss = (0.25 * (1 - torch.exp(-bce)) ** 2 * bce).mean()
    update(loss)
    for k, p in model.state_dict().items():
        average[k] = 0.9 * average[k] + 0.1 * p
""",
    "a token for each patient, zeros for each, a mean by hand": """
token = nn.Parameter(torch.zeros(1, 1, 2))
opt = torch.optim.Adam([token, *model.parameters()])
for batch in batches():
    v = torch.stack([batch["labs.value"], batch["labs.time"]], -1)
    B = v.shape[0]
    h = torch.cat([token.expand(B, -1, -1), v, torch.zeros(B, 1, 2)], 1)
    each = logits(model(h.mean(1) @ torch.ones(2, 3)).view(B), batch["y"].float(), reduction="none")
    update(each.sum() * (1.0 / B) + 0 * each.sum() / torch.tensor(B))
""",
    "noise, a mask for each patient, samples": """
for batch in batches():
    x = batch[X] + 1e-3 * torch.randn_like(batch[X])
    kept = torch.rand(x.shape[0], 1) > 0.1
    x = x * kept * x.new_empty(x.shape[0], 1).bernoulli_(0.9) + torch.normal(0.0, 0.1, x.shape)
    x = x + torch.distributions.Normal(x, 0.1 + 0 * x, validate_args=False).rsample()
    update(logits(model(x).squeeze(-1), batch["y"].float()))
""",
    "scripts of torch.jit": """
@torch.jit.script
def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)
model = nn.Sequential(torch.jit.script(nn.Linear(3, 8)), torch.jit.trace(nn.Linear(8, 1), torch.zeros(2, 8)))
opt = torch.optim.Adam(model.parameters())
for batch in batches():
    update(logits(swish(model(torch.tensor(batch[X]))).squeeze(-1), batch["y"].float()))
""",
    "a progress bar": """
from tqdm.auto import tqdm, trange
for epoch in trange(2):
    with tqdm(batches(), desc="training") as bar:
        for batch in bar:
            loss = loss_of(batch); update(loss); bar.set_postfix(loss=loss)
        assert bar.n == len(bar) == 2
""",
    "hazards by interval": """
model = nn.Linear(3, 5)
opt = torch.optim.Adam(model.parameters())
for batch in batches():
    last, died = (batch["t"] * 2).long().clamp(0, 4), batch["y"].float()
    at_risk = (torch.arange(5)[None] <= last[:, None]).float()
    update((logits(model(batch[X]), F.one_hot(last, 5) * died[:, None], reduction="none") * at_risk).sum(1).mean())
""",
    "squeezed by no dimension": """
for batch in batches():
    update(logits(model(batch[X]).squeeze(), torch.squeeze(batch["y"]).float()))
""",
    "dropout between recurrent layers": """
model = nn.Sequential(nn.GRU(2, 4, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(4, 1))
opt = torch.optim.Adam(model.parameters())
for batch in batches():
    h = model[0](torch.stack([batch["labs.value"], batch["labs.time"]], -1))[0]
    update(logits(model[1](h[:, -1]).squeeze(), batch["y"].float()))
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
    "a distribution": (
        'torch.distributions.Bernoulli(logits=model(batch[X])[:, 0]).log_prob(batch["y"].float())',
        "validate_args=False",
    ),
    "packed": (
        'nn.utils.rnn.pack_padded_sequence(batch["labs.value"], batch["labs.present"].sum(1), True, False)',
        "x.gather(1, front",
    ),
    "cox by order": ('order = torch.argsort(batch["t"])', "logit for each interval"),
    "cox by pairs": (
        'r = model(batch[X])[:, 0]; (r - (r.exp()[None] * (batch["t"][None] > batch["t"][:, None])).sum(1)).mean().backward()',
        "logit for each interval",
    ),
    "own places": ('model(batch[X])[torch.arange(13), batch["y"].long()]', "x.gather"),
    "unpacked": ("x, y = batch", "batch[FEATURES]"),
    "its columns on another device": ("batch = {k: v.cuda() for k, v in batch.items()}", "batch[FEATURES]"),
    "a backward of its own": (
        "type('Turned', (torch.autograd.Function,), dict(forward=staticmethod(lambda ctx, x: x), "
        "backward=staticmethod(lambda ctx, g: -g))).apply(loss)",
        "(2 * x).detach() - x",
    ),
    "a hook of a module": (
        "model[0].register_full_backward_hook(lambda *a: None); model(batch[X])",
        "p.register_hook",
    ),
    "a hook of a module, the older way": (
        "model[0].register_backward_hook(lambda *a: None); model(batch[X])",
        "p.register_hook",
    ),
    "a hook of what is computed": ("model(batch[X]).register_hook(print)", "p.register_hook"),
    "in two parts": (
        "torch.utils.checkpoint.checkpoint(model, batch[X], use_reentrant=True)",
        "use_reentrant=False",
    ),
    "numbers for each": (
        "(model(batch[X]) * torch.from_numpy(__import__('numpy').random.rand(13, 3))).mean().backward()",
        "torch.randn_like(x)",
    ),
    "a size that is made up": (
        "(model(batch[X])[:, 0] * torch.linspace(0, 1, 13)).mean().backward()",
        "x.shape[0]",
    ),
    "a vmap": ("torch.func.vmap(model)(batch[X])", "torch.einsum"),
    "a vmap over weights": ("torch.func.vmap(lambda w: batch[X] @ w)(torch.ones(2, 3))", "torch.einsum"),
    "a derivative of torch.func": ("torch.func.grad(lambda x: model(x).sum())(batch[X])", "in full"),
    "a number of patients as a float": ("loss / float(batch[X].size(0))", "batch.expected"),
    "a softmax over the batch": (
        "(model(batch[X]).softmax(0)[:, 0] * batch['y']).mean().backward()",
        "no softmax",
    ),
    "standardised": ("model(batch[X] / batch[X].std(0)).mean().backward()", "no statistics over the batch"),
    "its length": ("len(batch[X])", "batch.expected"),
    "another device": ("model.cuda()", "Leave .cuda()"),
    "its rows on another device": ('batch[X].to("cuda")', "Leave .cuda()"),
    "in days": (
        "(logits(model(batch[X])[:, 0], (batch['t'] > 5).float())).mean().backward()",
        'Write batch["t"] > 0.',
    ),
    "pairs": ("F.mse_loss(model(batch[X]), batch['t'])", ".squeeze(-1)"),
    "pairs of yes or no": ("logits(model(batch[X]), batch['y'].float())", ".squeeze(-1)"),
    "classes as floats": (
        "F.cross_entropy(torch.cat([model(batch[X])] * 2, 1), batch['y'].float())",
        ".long()",
    ),
    "a number as a yes or no": ("logits(model(batch[X]).squeeze(-1), batch['t'])", 'pl.col("t") > 5'),
    "its numbers": ("loss = model(torch.Tensor(batch[X])).mean()", "torch.FloatTensor(x)"),
    "a file": ("torch.save(model.state_dict(), 'best.pt')", "-o best"),
    "loader": ("torch.utils.data.DataLoader(patients.train, shuffle=True)", "patients.train.loader"),
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


def test_batches_are_gone_through_once(house: House) -> None:
    """A second epoch over them would train nothing, and is refused with what to write instead."""
    with pytest.raises(RaphaError, match="gone through before") as refused:
        ran(
            house,
            "loader = batches(0.1)\nfor epoch in range(2):\n    for batch in loader: update(loss_of(batch))",
        )
    assert "epochs=30" in (refused.value.instead or "")


@pytest.mark.parametrize(
    "taken", ["torch.Tensor._make_subclass(torch.Tensor, batch[X])", "torch.autograd.Variable(batch[X])"]
)
def test_a_loop_that_trains_on_made_up_numbers_is_refused(house: House, taken: str) -> None:
    """What is taken out of a sealed tensor has a gradient of its own, which nobody at the site gave."""
    with pytest.raises(RaphaError, match="No loss of this loop") as refused:
        ran(house, f"for batch in batches(0.1):\n    update(model({taken}).mean())")
    assert "as it is" in (refused.value.instead or "")


def test_a_loop_ends_with_its_cell(house: House) -> None:
    """One that is kept by a name gives its release all the same, while the cell is there to show it."""
    before = len(house.releases)
    kept = ran(house, "loader = batches(2)\nupdate(loss_of(next(loader)))")["loader"]
    assert len(house.releases) == before + 1
    assert next(kept, None) is None


def test_a_column_says_what_it_is_scaled_by(house: House) -> None:
    """Its public bounds stand where one looks at it, and a comparison that holds for nobody names the number meant."""
    shown = ran(
        house, "batch = next(batches())\nt, x, y = repr(batch['t']), repr(batch[X]), repr(batch['y'])"
    )
    assert shown["t"] == "<sealed tensor: (patients,), float32; t: -1 and 1 are 0 and 10>"
    assert "their public bounds" in shown["x"]
    assert "-1" not in shown["y"]
    age = {"name": "age", "type": "number", "unit": "years", **PUBLIC}
    for more, value, seen in (
        ({"bounds": [0, 100]}, 75, 0.5),
        ({"bounds": [1, 100], "scale": "log"}, 10, 0.0),
    ):
        assert scaled.place(msgspec.convert(age | more, Column), value) == pytest.approx(seen)


def test_a_rehearsal_finds_steps_that_are_not_paid_for(house: House) -> None:
    """Two on a batch would end the loop half-way at the site, with half of its ε spent."""
    patients = Patients(house.schema, house.ask, most_steps=2)
    twice = "for batch in batches(2):\n    update(loss_of(batch)); update(loss_of(batch))"
    with pytest.raises(RaphaError, match="4 times on 2 batches") as refused:
        run(HEAD + twice, {"patients": patients}, Screen(lambda output: None), "<enclave cell 1>")
    assert "zip(loop, loop)" in (refused.value.instead or "")


def test_a_fit_refuses_a_loss_of_yes_or_no_for_a_number(house: House) -> None:
    """It is scaled to -1 and 1, of which the loss has no least value: it would train to nowhere without a word."""
    with pytest.raises(ProgramError, match="takes a yes or no, and t is a number") as refused:
        ran(house, 'patients.train.fit(model, nn.BCEWithLogitsLoss(), inputs=X, target="t", epsilon=1)')
    assert "nn.MSELoss()" in refused.value.instead
    ran(house, 'patients.train.fit(model, nn.BCEWithLogitsLoss(), inputs=X, target="y", epsilon=1, epochs=1)')


@pytest.mark.parametrize("optimizer", ["'adam'", "torch.optim.Adam"])
def test_a_fit_refuses_what_is_no_optimizer(house: House, optimizer: str) -> None:
    """With one to write instead."""
    with pytest.raises(RaphaError, match="optimizer") as refused:
        ran(house, f'patients.train.fit(model, inputs=X, target="y", epsilon=1, optimizer={optimizer})')
    assert "torch.optim.Adam(model.parameters()" in (refused.value.instead or "")


def test_a_fit_tells_of_groups_and_its_release_of_options(house: House) -> None:
    """Groups are a loop's; what a training was asked for beside its steps stands in its card."""
    with pytest.raises(RaphaError, match="2 groups of parameters") as refused:
        ran(house, 'opt = torch.optim.SGD([{"params": model[k].parameters()} for k in (0, 2)], lr=1)\n'
            'patients.train.fit(model, inputs=X, target="y", epsilon=1, optimizer=opt)')  # fmt: skip
    assert "loop" in refused.value.instead
    fit = 'patients.train.fit(model, inputs=X, target="y", epsilon=1, epochs=1, batch=100, '
    ran(house, f"{fit} bands=2, average=0.9)")
    shown = repr(house.releases[-1])
    assert re.search(r"bands of noise +2\n", shown)
    assert re.search(r"average of the weights, decay +0.9\n", shown)
    ran(house, f"{fit} corrected=True, optimizer=torch.optim.Adam(model.parameters()))")
    assert "second moment corrected" in repr(house.releases[-1])
    ran(house, f"{fit} clip_quantile=0.9)")
    assert re.search(r"clipping norm followed +0.9\n", repr(house.releases[-1]))


def test_a_figure_decides_which_model_is_kept(house: House) -> None:
    """An evaluation's figure compares with numbers and other figures, so that a loop can stop early by it."""
    found = ran(
        house,
        """
told = patients.validation.evaluate(model, ["brier"], inputs=X, target="y", epsilon=1)["brier"]
kept = [told < 9.0, told > 9.0, told <= told, told >= 9.0, 9.0 > told, min([told, 0.0]), told < float("inf")]
""",
    )
    assert found["kept"] == [True, False, True, False, True, 0.0, True]
    assert re.fullmatch(r"0\.\d+ \(95 % [\d.e-]+ to [\d.e-]+\)", str(found["told"]))


def test_figures_kept_by_epoch_come_back_as_numbers(house: House) -> None:
    """A history is a list of them, and a list travels."""
    found = ran(
        house,
        """
told = patients.validation.evaluate(model, ["brier"], inputs=X, target="y", epsilon=1)
history = {"brier": [told["brier"]]}
""",
    )
    back = parcels.unpack(*parcels.pack(found, ["history"]))["history"]
    assert back == {"brier": [found["told"]["brier"].value]}
    assert type(back["brier"][0]) is float


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        (
            'patients.train.fit(model, X, "y", epsilon=1)',
            "fit takes model, loss, and by name inputs=, target=",
        ),
        ("patients.train.batches(batch_size=100, epochs=1, epsilon=1)", "of a batch size="),
        ("patients.train.fit(model, inputs=X, target='y', epsilon=1, size=100)", "of a batch batch="),
        ("patients.train.loader(X, 'y', batch=100, epsilon=1)", "of a batch batch_size="),
        ("torch.optim.LBFGS(model.parameters()).step()", "use torch.optim.SGD"),
        ("model(torch.zeros(2, 4))", "patients.schema.layout(FEATURES)"),
        ("raise PermissionError(1, 'Operation not permitted')", "-o brings numbers"),
        ("patients.train.fit(model, inputs=X, target='y', epsilon=1, scheduler=1)", "scheduler.step()"),
        ("import no_such_package", "installs none"),
        ("!pip install lifelines", "lines with ! or %"),
        ("model(", None),
    ],
)
def test_errors_of_python_and_torch_are_told_with_a_way_out(
    house: House, source: str, hint: str | None
) -> None:
    """Below the traceback, where there is one; a slip of the pen has none."""
    with pytest.raises(CellError) as raised:
        ran(house, source)
    assert (hint or "lines with") in raised.value.traceback[-1] or hint is None
    assert hint is not None or not any("lines with" in line for line in raised.value.traceback)


def test_a_fit_refuses_a_backward_of_its_own_and_random_numbers(house: House) -> None:
    """Either would be lost: a gradient that is turned round would not be, noise would be everybody's or nobody's."""
    cell = """
class Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return -g
class Net(nn.Linear):
    def forward(self, x): return CHANGE
patients.train.fit(Net(3, 1), inputs=X, target="y", epsilon=1)
"""
    changes = {
        "Turned.apply(super().forward(x))": "backward of its own",
        "super().forward(x + float(torch.randperm(99)[0]))": "another each",
    }
    for change, what in changes.items():
        with pytest.raises(ProgramError, match=what):
            ran(house, cell.replace("CHANGE", change))
    function = torch.autograd.Function.apply
    assert "checked" not in repr(function)


def test_hooks_of_parameters_are_called(house: House) -> None:
    """Whichever way they were put there, each at every step."""
    source = """
seen, w = [], model[0].weight
node = torch.autograd.graph.get_gradient_edge(model[2].bias).node
node.register_hook(lambda *grads: seen.append("node"))
w.register_hook(lambda grad: seen.append("gradient"))
w.register_post_accumulate_grad_hook(lambda p: seen.append("after"))
torch.autograd.graph.register_multi_grad_hook(list(model.parameters()), lambda grads: seen.append("all"))
for batch in batches(0.5):
    update(loss_of(batch))
"""
    seen = ran(house, source)["seen"]
    assert sorted(seen) == sorted(["node", "gradient", "after", "all"] * 3)


@pytest.mark.parametrize(
    "hook",
    [
        "model[0].register_full_backward_hook(print)",
        "model.register_full_backward_pre_hook(print)",
        "model[0].register_backward_hook(print)",
        "model[0].weight.register_hook(print)",
        "model[2].bias.register_post_accumulate_grad_hook(print)",
    ],
)
def test_a_fit_refuses_hooks_that_it_would_not_call(house: House, hook: str) -> None:
    """Its steps are taken at the site."""
    with pytest.raises(ProgramError, match="would not be called"):
        ran(house, f'{hook}\npatients.train.fit(model, inputs=X, target="y", epsilon=1)')


def test_autocast_is_said_to_do_nothing_once_in_a_loop(house: House) -> None:
    """By the line of the cell."""
    source = """
for batch in batches(0.5):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(batch)
    update(loss)
"""
    with pytest.warns(UserWarning, match="autocast does nothing here") as said:
        ran(house, source)
    assert [warning.filename for warning in said] == ["<enclave cell 1>"]


@pytest.mark.parametrize(
    ("mask", "told"),
    [("pad", True), ("pad & ~pad.all(1, keepdim=True)", False)],
)
def test_a_mask_that_hides_all_of_a_patient_is_told(house: House, mask: str, told: bool) -> None:
    """Who has no row would add nothing to the training without a word; the way out that is told works."""
    cell = f"""
attend, head = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True), nn.Linear(4, 1)
opt = torch.optim.Adam([*attend.parameters(), *head.parameters()])
for batch in batches():
    v = torch.stack([batch["labs.value"], batch["labs.time"]], -1).repeat(1, 1, 2)
    pad = batch["labs.present"] == 0
    mask = {mask}
    update(logits(head(attend(v, v, v, key_padding_mask=mask)[0].mean(1)).squeeze(-1), batch["y"].float()))
"""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ran(house, cell)
    assert any("a patient of zeros" in str(each.message) for each in found) == told


def test_a_fit_and_a_check_tell_of_such_a_mask_too(house: House) -> None:
    """They know inputs, and no names of rows: a patient of zeros stands for one without any."""
    cell = """
class Net(nn.Module):
    def __init__(self, least):
        super().__init__()
        self.score, self.head, self.least = nn.Linear(2, 1), nn.Linear(2, 1), least
    def forward(self, x):
        hidden = x[..., 0] == 0
        weights = self.score(x).squeeze(-1).masked_fill(hidden, self.least).softmax(-1)
        return self.head((weights[..., None] * x).sum(1)).squeeze(-1)
rows = ["labs.present", "labs.value"]
patients.train.fit(Net(least), inputs=rows, target="y", epsilon=1, epochs=1)
"""
    for least, told in (("-1e4", False), ("-torch.inf", True)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            ran(house, f"least = {least}" + cell)
        assert any("a patient of zeros" in str(each.message) for each in found) == told


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


@pytest.mark.parametrize("named", ["tqdm", "tqdm.auto", "tqdm.notebook"])
def test_an_optimizer_is_made_beside_a_bar_in_a_new_process(named: str) -> None:
    """The first optimizer of a process looks for packages that are there, and asks the bar's module what it is."""
    code = f"""
from rapha_lab.session.interpreter import Screen, run
run('''
from {named} import tqdm, trange
import torch
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
assert list(trange(2)) == list(tqdm([0, 1]))
''', {{}}, Screen(lambda output: None))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("average=1.5", "a number below 1"),
        ("clip_quantile=-1", "of at least 0"),
        ("bands=0", "whole number of at least 1"),
    ],
)
def test_an_option_out_of_range_says_its_range(house: House, option: str, why: str) -> None:
    """In words, naming the argument and the cell's line."""
    with pytest.raises(RaphaError) as refused:
        ran(house, f"patients.train.fit(model, inputs=X, target='y', epsilon=1, {option})")
    assert refused.value.field == option.partition("=")[0]
    assert why in refused.value.why
    assert refused.value.line is not None
