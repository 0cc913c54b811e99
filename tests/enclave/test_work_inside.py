"""What a researcher's cell does anywhere, it does behind the walls, where no file can be opened."""

import base64

import pytest


def test_a_model_trains(cell):
    """Fifty steps of AdamW bring the loss down."""
    first, last = cell.run("""
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x = torch.randn(64, 8); y = x.sum(1, keepdim=True); losses = []
for _ in range(50):
    loss = ((model(x) - y) ** 2).mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
result = [losses[0], losses[-1]]
""")
    assert last < first / 5


def test_layers_of_every_family_run_backward(cell):
    """Convolution, batch norm, LSTM, attention, autocast and a data loader work."""
    assert (
        cell.run("""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
net(torch.randn(2, 1, 8, 8)).sum().backward()
nn.LSTM(4, 8, batch_first=True)(torch.randn(2, 5, 4))[0].sum().backward()
attention = nn.TransformerEncoderLayer(8, 2, batch_first=True)
attention(torch.randn(2, 5, 8)).sum().backward(); attention.eval(); attention(torch.randn(2, 5, 8))
with torch.autocast("cpu", dtype=torch.bfloat16):
    torch.randn(8, 8) @ torch.randn(8, 8)
loader = DataLoader(TensorDataset(torch.randn(10, 2)), batch_size=4, shuffle=True)
result = sum(len(batch[0]) for batch in loader)
""")
        == 10
    )


def test_torch_may_use_two_threads(cell):
    """Intra-op threads start inside; only processes do not."""
    assert (
        cell.run("""
import torch
torch.set_num_threads(2); a = torch.randn(400, 400); (a @ a).sum(); result = torch.get_num_threads()
""")
        == 2
    )


@pytest.mark.parametrize("strict", [False, True])
def test_a_loss_is_exported_to_a_graph(cell, strict):
    """torch.export and its decompositions find all their parts loaded."""
    nodes = cell.run(f"""
import torch
from torch import nn
class Risk(nn.Module):
    def __init__(self):
        super().__init__(); self.codes = nn.Embedding(5, 4); self.out = nn.Linear(12, 1)
    def forward(self, x, code):
        logit = self.out(torch.cat([x, self.codes(code)], -1)).squeeze(-1)
        return nn.functional.binary_cross_entropy_with_logits(logit, x.sum(-1))
program = torch.export.export(Risk(), (torch.randn(8), torch.tensor(2)), strict={strict})
result = [len(program.graph.nodes), len(program.run_decompositions().graph.nodes)]
""")
    assert min(nodes) > 8


def test_a_lifted_gradient_is_traced(cell):
    """make_fx over vmap(grad) works, as a rehearsal of the curator's own lifting does."""
    assert "pow" in cell.run("""
import torch
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
result = str(make_fx(vmap(grad(lambda x: (x ** 3).sum())))(torch.randn(3, 4)).graph)
""")


@pytest.mark.parametrize(("form", "head"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_figure_is_drawn(cell, form, head):
    """Bold, italic, serif, monospaced and mathematical text find their fonts in memory."""
    picture = base64.b64decode(
        cell.run(f"""
import base64, io
import numpy as np, matplotlib.pyplot as plt
figure, (left, right) = plt.subplots(1, 2)
left.errorbar([1, 2], [1, 3], yerr=[0.2, 0.3], label=r"$\\hat\\alpha^2 \\pm \\int$")
left.set_title("Bold", weight="bold", style="italic", family="serif")
left.text(1, 1, "mono", family="monospace"); left.set_xscale("log"); left.legend()
figure.colorbar(right.imshow(np.eye(4))); figure.tight_layout()
memory = io.BytesIO(); figure.savefig(memory, format="{form}")
result = base64.b64encode(memory.getvalue()).decode()
""")
    )
    assert picture.startswith(head)


def test_frames_are_grouped_joined_and_shown(cell):
    """polars runs its thread pool and draws its tables."""
    grouped, markup, joined = cell.run("""
import polars as pl
frame = pl.DataFrame({"a": [1, 2, 3], "b": ["x", "y", "x"], "c": [None, 1.5, 2]})
means = frame.group_by("b").agg(pl.col("a").mean()).sort("b")
frame.lazy().filter(pl.col("a") > 1).with_columns(d=pl.col("a").log()).collect(); frame.describe()
result = [means.rows(), frame._repr_html_(), frame.join(means, on="b").shape]
""")
    assert grouped == [["x", 2.0], ["y", 2.0]]
    assert "<table" in markup
    assert joined == [3, 4]


def test_ipython_shows_values_and_tracebacks(cell):
    """The formatters and the coloured traceback need no file."""
    forms, lines = cell.run("""
import linecache, sys
import polars
from IPython.core.formatters import DisplayFormatter
from IPython.core.ultratb import VerboseTB
source = "def f(x):\\n    return x / 0\\nf(1)\\n"
linecache.cache["<cell 1>"] = (len(source), None, source.splitlines(True), "<cell 1>")
try:
    exec(compile(source, "<cell 1>", "exec"), {})
except ZeroDivisionError:
    lines = VerboseTB(theme_name="linux").text(*sys.exc_info())
result = [sorted(DisplayFormatter().format(polars.DataFrame({"a": [1]}))[0]), lines]
""")
    assert forms == ["text/html", "text/plain"]
    assert "ZeroDivisionError" in lines


def test_classical_learners_and_statistics_work(cell):
    """scikit-learn fits and scipy tests."""
    scores = cell.run("""
import numpy as np, scipy.optimize, scipy.stats
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
x = np.random.default_rng(0).normal(size=(200, 3)); y = x[:, 0] > 0
scipy.stats.ttest_ind(x[:, 0], x[:, 1]); scipy.optimize.minimize(lambda v: (v ** 2).sum(), [1, 2])
models = LogisticRegression(), RandomForestClassifier(20), HistGradientBoostingClassifier()
result = [roc_auc_score(y, model.fit(x, y).predict_proba(x)[:, 1]) for model in models]
""")
    assert min(scores) > 0.9


def test_tensors_travel_as_safetensors(cell):
    """Saving and loading weights in memory works."""
    assert cell.run("""
import torch
from safetensors.torch import load, save
result = load(save({"a": torch.ones(3)}))["a"].tolist()
""") == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("asked", "part"),
    [("to_csv", "0,1.5"), ("to_string", "1.5"), ("to_html", "<td>1.5"), ("to_dict", "1.5"), ("plot", "Axes")],
)
def test_frames_become_texts_and_pictures(cell, asked, part):
    """What pandas imports only when it is asked for it."""
    given = cell.run(f"""
import pandas
result = str(pandas.DataFrame({{"a": [1.5, 2.5]}}).{asked}())
""")
    assert part in given


def test_threads_and_the_standard_library_are_there(cell):
    """Thread pools, dates, decimals, JSON, regular expressions."""
    assert cell.run("""
import concurrent.futures, csv, datetime, decimal, fractions, io, statistics, textwrap, uuid
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    doubled = list(pool.map(lambda value: value * 2, range(5)))
str(datetime.datetime.now()), uuid.uuid4(), decimal.Decimal("1.1")
result = doubled
""") == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("module", ["nosuchmodule", "sympy.physics.mechanics", "idlelib.run"])
def test_a_module_that_is_not_loaded_is_an_import_error(cell, module):
    """A lazy import fails as a missing module does, and says that it would have to be preloaded."""
    kind, text = cell.error(f"import {module}")
    assert kind == "ModuleNotFoundError"
    assert "preloaded at this site" in text


def test_each_worker_draws_its_own_random_numbers(zygote):
    """Forks of one zygote share no random state."""
    source = (
        "import random, numpy, torch\nresult = [random.random(), numpy.random.rand(), torch.rand(1).item()]"
    )
    from snippets import Cell

    with zygote.spawn() as one, zygote.spawn() as two:
        drawn = [Cell(worker).run(source) for worker in (one, two)]
    assert all(a != b for a, b in zip(*drawn, strict=True))
