"""Cells at a real site: what they show, keep, bring back and refuse, and how they are stopped."""

from __future__ import annotations

import base64
import contextlib
import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy
import polars
import pytest
import torch
import ward
from ward import Ward

from rapha_lab.client import cards
from rapha_lab.client.site import Job, Site
from rapha_lab.curator import accounting
from rapha_lab.enclave import cells as cells_module
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import BudgetError, CellError, RaphaError, RequestError, SiteError
from rapha_lab.protocol.release import MIME, Release
from rapha_lab.session import parcels


@pytest.fixture(scope="module")
def site(serving: Ward) -> Iterator[Site]:
    """A connection whose sessions end with this file."""
    site = serving.connect()
    yield site
    site.end_sessions()


@pytest.fixture
def fresh(site: Site) -> Iterator[str]:
    """A session that nothing else uses."""
    name = f"session-{time.monotonic_ns()}"
    yield name
    site.end_sessions(name)


def printed(job: Job) -> str:
    """What a job wrote to stdout."""
    return "".join(o["text"] for o in job.outputs if o["type"] == "stream" and o["name"] == "stdout")


def shown(job: Job) -> list[dict[str, Any]]:
    """The bundles that a job displayed."""
    return [o["data"] for o in job.outputs if o["type"] == "display"]


def brought(
    site: Site, source: str, *names: str, into: dict[str, Any] | None = None, **how: Any
) -> dict[str, Any]:
    """What a cell brings back under these names."""
    job = site.run(source, "ward", outputs=names, **how).wait()
    return parcels.unpack(job.values, job.blob, into)


def until(condition: Any, seconds: float = 60) -> None:
    """Wait for a condition that comes true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


FIT = f"""
import torch
from torch import nn
model = nn.Sequential(nn.Linear({len(ward.FEATURES)}, 8), nn.Tanh(), nn.Linear(8, 1))
history = patients.train.fit(model, inputs={ward.FEATURES}, target="died", epochs=2, epsilon=4)
"""
LOOP = f"""
import torch
model = torch.nn.Linear({len(ward.FEATURES)}, 1)
for step, batch in enumerate(patients.train.batches(size=100, epochs=2, epsilon=2)):
    loss = (model(batch[{ward.FEATURES}]).squeeze(-1) - batch["died"]).square().mean()
    loss.backward()
    if step == 2:
        raise ValueError("enough")
"""
LONG = FIT.replace("epochs=2", "epochs=2_000").replace("epsilon=4", "epsilon=1")


class TestShowing:
    def test_prints_come_back_in_their_order_on_their_stream(self, site):
        """As from a local cell."""
        job = site.run(
            "import sys\nprint('first', 1 + 1)\nprint('odd', file=sys.stderr)\nprint('last')", "ward"
        ).wait()
        assert printed(job) == "first 2\nlast\n"
        assert [o["text"] for o in job.outputs if o.get("name") == "stderr"] == ["odd\n"]

    def test_the_last_expression_is_shown_in_its_richest_form(self, site):
        """A frame as a table."""
        (bundle,) = shown(site.run("import polars\npolars.DataFrame({'made_up': [1, 2]})", "ward").wait())
        assert "<table" in bundle["text/html"]
        assert "made_up" in bundle["text/plain"]

    def test_a_semicolon_silences_the_last_expression(self, site):
        """As in IPython."""
        assert site.run("40 + 2;", "ward").wait().outputs == []

    def test_display_shows_each_value_above_what_is_printed_next(self, site):
        """Order is kept between streams and displays."""
        job = site.run("print('a')\ndisplay(1, 2)\nprint('b')", "ward").wait()
        said = [o.get("text") or o["data"]["text/plain"] for o in job.outputs]
        assert said == ["a\n", "1", "2", "b\n"]

    def test_figures_are_pictures(self, site):
        """plt.show() and a figure left open alike; each once."""
        job = site.run(
            "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nplt.figure();\nplt.plot([2, 1]);",
            "ward",
        ).wait()
        pictures = [base64.b64decode(b["image/png"]) for b in shown(job)]
        assert len(pictures) == 2
        assert all(p.startswith(b"\x89PNG") for p in pictures)

    def test_what_a_hostile_repr_shows_ends_no_session(self, site, fresh):
        """Values that JSON cannot carry, that raise, or that recurse."""
        site.run("kept = 1", "ward", session=fresh).wait()
        for body in (
            "def _repr_json_(self): return {'n': 2**80}",
            "def _repr_json_(self): return {'n': float('nan')}",
            "def _repr_json_(self): return {1: object()}",
            "def _repr_html_(self): return 5",
            "def _repr_html_(self): return '\\udc80'",
            "def _repr_mimebundle_(self, **_): return {'x': [[]] * 3, 'y': {}}",
            "def __repr__(self): raise SystemExit",
            "def _repr_json_(self):\n  a = []\n  for _ in range(3000): a = [a]\n  return a",
        ):
            job = site.run(f"class X:\n {body}\nX()", "ward", session=fresh)
            for _ in job.follow():
                pass
            assert job.state in ("done", "failed"), body
        assert printed(site.run("print(kept)", "ward", session=fresh).wait()) == "1\n"

    def test_a_print_without_end_is_cut_and_the_session_goes_on(self, site, fresh, monkeypatch):
        """Beyond the limit nothing is kept."""
        monkeypatch.setattr(cells_module, "MAX_OUTPUT", 100_000)
        job = site.run("for n in range(40): print('x' * 10_000)", "ward", session=fresh).wait()
        assert 0 < len(printed(job)) <= 100_000
        assert printed(site.run("print(1)", "ward", session=fresh).wait()) == "1\n"


class TestErrors:
    def test_a_traceback_names_the_line_and_hides_the_machinery(self, site):
        """What a local cell would print."""
        job = site.run("x = 1\n\ndef inner():\n    return 1 / 0\n\ninner()", "ward")
        with pytest.raises(CellError, match="ZeroDivisionError") as caught:
            job.wait()
        text = "\n".join(caught.value.traceback)
        assert caught.value.line == 4
        assert "line 4, in inner" in text
        assert "return 1 / 0" in text
        assert "interpreter.py" not in text

    def test_of_a_library_s_errors_only_the_cells_lines_are_shown(self, site):
        """Nor the errors that a library met on the way."""
        job = site.run("import torch\n\ndef f():\n    return torch.ones(2) @ torch.ones(3)\nf()", "ward")
        with pytest.raises(CellError) as raised:
            job.wait()
        told = "\n".join(raised.value.traceback)
        assert "return torch.ones(2) @ torch.ones(3)" in told
        assert "RuntimeError" in told
        job = site.run("import json\ntry: json.loads('{')\nexcept ValueError: 1 / 0", "ward")
        with pytest.raises(CellError) as raised:
            job.wait()
        told = "\n".join(raised.value.traceback)
        assert "During handling" in told, "an earlier error that came through the cell"
        assert "decoder.py" not in told
        job = site.run("from urllib.request import urlopen\nurlopen('http://example.org')", "ward")
        with pytest.raises(CellError) as raised:
            job.wait()
        told = "\n".join(raised.value.traceback)
        assert told.count("File") == 1, told

    def test_a_syntax_error_shows_where(self, site):
        """Before anything of the cell ran."""
        with pytest.raises(CellError, match="SyntaxError") as caught:
            site.run("print('ran')\nx = = 1", "ward").wait()
        assert "x = = 1" in "\n".join(caught.value.traceback)
        assert caught.value.line in (2, None)

    def test_a_refusal_names_the_line_of_the_cell(self, site):
        """The line which asked, not one of the library."""
        with pytest.raises(RaphaError, match="records") as caught:
            site.run("a = 1\npatients.head()\nb = 2", "ward").wait()
        assert caught.value.line == 2

    def test_a_failed_cell_keeps_what_ran_before_the_failure(self, site, fresh):
        """As in a kernel."""
        with pytest.raises(CellError):
            site.run("before = 7\n1 / 0", "ward", session=fresh).wait()
        assert printed(site.run("print(before)", "ward", session=fresh).wait()) == "7\n"

    @pytest.mark.parametrize(
        "body", ["import sys; sys.exit(3)", "raise SystemExit", "raise BaseException('b')"]
    )
    def test_leaving_is_an_error_of_the_cell(self, site, fresh, body):
        """It ends neither session nor site."""
        with pytest.raises(CellError):
            site.run(body, "ward", session=fresh).wait()
        assert printed(site.run("print(1)", "ward", session=fresh).wait()) == "1\n"

    def test_a_module_that_is_not_there_is_said_plainly(self, site):
        """No installer, no path."""
        with pytest.raises(CellError, match="preloaded"):
            site.run("import requests_that_nobody_has", "ward").wait()


class TestState:
    def test_names_and_classes_live_from_cell_to_cell(self, site, fresh):
        """A class defined in one cell is there in the next."""
        site.run("class Model:\n    size = 3", "ward", session=fresh).wait()
        assert printed(site.run("print(Model.size)", "ward", session=fresh).wait()) == "3\n"

    def test_two_sessions_run_side_by_side_and_share_nothing(self, site, fresh):
        """One waits while the other works."""
        slow = site.run("import time\nname = 'slow'\ntime.sleep(3)", "ward", session=f"{fresh}-a")
        quick = site.run("print('name' in globals())", "ward", session=f"{fresh}-b").wait()
        assert printed(quick) == "False\n"
        assert slow.poll() == []
        assert slow.state == "running"
        slow.wait()
        for name in ("a", "b"):
            site.end_sessions(f"{fresh}-{name}")

    def test_cells_of_one_session_run_in_their_order(self, site, fresh):
        """Though all were sent at once."""
        jobs = [
            site.run(f"trace = globals().get('trace', []) + [{n}]\nprint(trace)", "ward", session=fresh)
            for n in range(5)
        ]
        assert printed(jobs[-1].wait()) == "[0, 1, 2, 3, 4]\n"

    def test_another_connection_attaches_to_the_same_job(self, site, serving):
        """A job lives at the site, not in the kernel that sent it."""
        job = site.run("print('here')", "ward").wait()
        again = serving.connect().attach(job.id).wait()
        assert printed(again) == "here\n"
        assert job.id in [told["id"] for told in site.jobs()]


class TestValues:
    def test_every_kind_that_travels_comes_back_as_it_was(self, site):
        """Tensors, arrays, frames, numbers, strings, nested."""
        source = """
import torch, numpy, polars
tensor = torch.arange(6, dtype=torch.float64).reshape(2, 3)
whole, flag, scalar = torch.tensor([1, 2]), torch.tensor([True, False]), torch.tensor(3.5)
half = torch.tensor([1.5], dtype=torch.bfloat16)
array = numpy.ones((2, 0, 3), dtype=numpy.int16)
frame = polars.DataFrame({"a": [1, None], "b": ["x", None], "c": [0.5, 1.5]})
nested = {"a": [1, 2.5, None, True, "ü"], "b": (float("inf"), float("-inf")), "c": {"d": tensor}}
nan, huge = float("nan"), 2**60
"""
        names = ["tensor", "whole", "flag", "scalar", "half", "array", "frame", "nested", "nan", "huge"]
        got = brought(site, source, *names)
        assert torch.equal(got["tensor"], torch.arange(6, dtype=torch.float64).reshape(2, 3))
        assert (got["whole"].dtype, got["flag"].dtype, got["half"].dtype) == (
            torch.int64,
            torch.bool,
            torch.bfloat16,
        )
        assert got["scalar"].shape == ()
        assert isinstance(got["array"], numpy.ndarray)
        assert (got["array"].shape, got["array"].dtype) == ((2, 0, 3), numpy.int16)
        assert got["frame"].equals(polars.DataFrame({"a": [1, None], "b": ["x", None], "c": [0.5, 1.5]}))
        assert got["nested"]["a"] == [1, 2.5, None, True, "ü"]
        assert got["nested"]["b"] == (math.inf, -math.inf)
        assert torch.equal(got["nested"]["c"]["d"], got["tensor"])
        assert math.isnan(got["nan"])
        assert got["huge"] == 2**60

    def test_a_pandas_frame_comes_back_as_a_polars_one(self, site):
        """Strings, gaps and categories included."""
        pytest.importorskip("pandas", reason="it comes with the demo extra")
        source = """
import pandas
frame = pandas.DataFrame({"a": [1, 2], "b": ["x", None], "c": [0.5, None], "d": pandas.Categorical(["u", "v"])})"""
        expected = polars.DataFrame({"a": [1, 2], "b": ["x", None], "c": [0.5, None], "d": ["u", "v"]})
        assert brought(site, source, "frame")["frame"].equals(expected)

    def test_a_module_comes_back_as_weights_of_the_module_that_is_here(self, site):
        """Into the very object, no pickle."""
        here = torch.nn.Linear(2, 1)
        got = brought(
            site, "import torch\nm = torch.nn.Linear(2, 1)\nprint(m.weight.tolist())", "m", into={"m": here}
        )
        assert got["m"] is here
        job = site.run("print(m.weight.tolist())", "ward").wait()
        assert printed(job).strip() == str(here.weight.tolist())

    def test_a_module_that_is_not_here_comes_as_its_weights(self, site):
        """A dict of tensors."""
        got = brought(site, "import torch\nm = torch.nn.Linear(2, 1)", "m")
        assert {k: tuple(v.shape) for k, v in got["m"].items()} == {"weight": (1, 2), "bias": (1,)}

    def test_a_release_comes_back_with_its_receipt(self, site):
        """As the object it was there."""
        got = brought(site, "age = patients.mean('age', epsilon=1)", "age")["age"]
        assert isinstance(got, Release)
        assert got.value == pytest.approx(50, abs=10)
        assert got.receipt["index"] >= 0

    def test_values_are_sent_and_used(self, site):
        """The same kinds the other way."""
        here = {
            "t": torch.ones(2),
            "f": polars.DataFrame({"a": [1, 2]}),
            "n": [1, (2, float("nan"))],
            "s": "text",
        }
        source = "print(t.sum().item(), f['a'].sum(), n[1][0], s, type(n[1]).__name__)"
        job = site.run(source, "ward", inputs=parcels.pack(here, list(here))).wait()
        assert printed(job) == "2.0 3 2 text tuple\n"

    @pytest.mark.parametrize(
        "value",
        [
            "lambda: 1",
            "object()",
            "torch.optim.SGD([torch.zeros(1)], lr=1)",
            "{1: 2}",
            "{1, 2}",
            "patients",
            "b'bytes'",
        ],
    )
    def test_what_does_not_travel_says_so_and_what_does(self, site, value):
        """Instead of a pickle."""
        with pytest.raises(RaphaError, match="does not travel") as caught:
            brought(site, f"import torch\nx = {value}", "x")
        assert caught.value.field == "x"

    def test_a_name_that_is_not_there_is_named(self, site):
        """After the cell ran."""
        with pytest.raises(RequestError, match="nowhere is not defined"):
            brought(site, "here = 1", "nowhere")

    def test_odd_shapes_and_names_travel(self, site):
        """Shared weights, transposed and sparse ones, keys with slashes."""
        source = """
import torch
base = torch.arange(6.).reshape(2, 3)
odd = {"a/b": base.t(), "a": {"b": base[:, :1]}, "": base}
class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(2, 2)
        self.two = self.one
tied = Tied()
"""
        got = brought(site, source, "odd", "tied")
        assert got["odd"]["a/b"].shape == (3, 2)
        assert torch.equal(got["odd"]["a"]["b"], torch.tensor([[0.0], [3.0]]))
        assert set(got["tied"]) == {"one.weight", "one.bias", "two.weight", "two.bias"}

    def test_a_value_that_runs_code_when_packed_ends_no_session(self, site, fresh):
        """A hostile state_dict, mapping or array protocol is an error of the cell."""
        for body in (
            "class X(torch.nn.Module):\n  def state_dict(self): raise KeyError('k')",
            "class X(dict):\n  def items(self): raise ValueError('v')\n  def __iter__(self): raise ValueError('v')",
            "class X(torch.nn.Module):\n  def state_dict(self): return {'a': object()}",
        ):
            job = site.run(f"import torch\n{body}\nx = X()", "ward", session=fresh, outputs=["x"])
            for _ in job.follow():
                pass
            assert job.state in ("failed", "done"), body
        assert printed(site.run("print(1)", "ward", session=fresh).wait()) == "1\n"


class TestPrices:
    def test_the_cells_epsilon_is_used_once(self, site, serving):
        """A second question in the cell has to name its own."""
        before = serving.spent()
        job = site.run("a = patients.count()\nb = patients.count()", "ward", epsilon=0.5)
        with pytest.raises(RequestError, match="No ε was given") as caught:
            job.wait()
        assert caught.value.line == 2
        assert [release.epsilon for release in job.releases] == [0.5]
        assert all(serving.spent()[split] > before[split] for split in before)

    def test_a_split_shares_the_cells_epsilon(self, site):
        """`patients.train` is no second purse."""
        with pytest.raises(RequestError, match="No ε was given"):
            site.run("patients.train.count()\npatients.test.count()", "ward", epsilon=0.5).wait()

    def test_each_release_shows_one_signed_card(self, site):
        """By the site, not by the session, and once."""
        job = site.run("patients.count(epsilon=0.5)", "ward").wait()
        (card,) = [o for o in job.outputs if MIME in o["data"]]
        assert card["data"][MIME]["epsilon"] == 0.5
        assert card["metadata"]["rapha"]["key"] == str(site.key)

    def test_a_session_cannot_pass_a_card_of_its_own_for_a_release(self, site):
        """A forged or edited one loses what front ends and checkers would take for a release."""
        source = f"""
true = patients.count(epsilon=0.5)
class Forged:
    def _repr_mimebundle_(self, include=None, exclude=None):
        bundle = true._repr_mimebundle_()
        card = {{**bundle["{MIME}"], "rows": [{{"name": "patients", "value": 999999.0}}], "title": "forged"}}
        return {{**bundle, "{MIME}": card}}
Forged()
"""
        job = site.run(source, "ward").wait()
        cards = [b[MIME] for b in shown(job) if MIME in b]
        assert len(cards) == 1
        assert cards[0]["title"] != "forged"

    def test_a_release_shown_again_is_still_a_release(self, site, fresh):
        """An honest card may be displayed in a later cell."""
        site.run("age = patients.mean('age', epsilon=1)", "ward", session=fresh).wait()
        (bundle,) = shown(site.run("age", "ward", session=fresh).wait())
        assert bundle[MIME]["values"]["column"] == "age"


def _charged(folder, cell):
    """The ε of the steps that the ledger has down for a cell's only job."""
    with contextlib.closing(sqlite3.connect(folder / "state" / "ledger.sqlite")) as db:
        ((loss, ran),) = db.execute("SELECT loss, touched FROM job WHERE name LIKE ?", (f"{cell}-%",))
    return accounting.epsilon_of(accounting.decode_loss(loss).part(ran), 1e-5)


class TestStopping:
    def test_a_loop_that_is_left_early_shows_what_its_steps_cost(self, site, serving, fresh):
        """It raises after three of its steps: those are charged and shown, of all that was granted."""
        job = site.run(LOOP, "ward", session=fresh)
        with pytest.raises(RaphaError, match="enough"):
            job.wait()
        assert 0 < job.told["spent"] < job.told["epsilon"] == 2
        assert job.told["spent"] == pytest.approx(_charged(serving.folder, job.id))

    def test_what_is_refused_before_it_ran_is_neither_granted_nor_spent(self, site, fresh):
        """A job shows the ε of the questions that were answered."""
        source = "patients.count(epsilon=0.53)\npatients.count(epsilon=1e5)"
        job = site.run(source, "ward", session=fresh)
        with pytest.raises(BudgetError):
            job.wait()
        assert (job.told["epsilon"], job.told["spent"]) == (0.53, 0.53)

    def test_a_cancelled_fit_is_charged_for_what_ran_and_refunded_the_rest(self, site, serving, fresh):
        """And says so."""
        before = serving.spent()["train"]
        job = site.run(LONG, "ward", session=fresh)
        until(lambda: job.poll(0.5) is not None and job.told["step"] > 0)
        reserved = serving.spent()["train"] - before
        stopped = site.cancel(job.id)
        assert stopped.id == job.id
        assert "cancelled" in stopped._repr_mimebundle_()["text/plain"]
        with pytest.raises(RaphaError, match="cancelled"):
            job.wait()
        assert job.state == "cancelled"
        paid = serving.spent()["train"] - before
        assert 0 < paid < reserved
        assert job.told["spent"] == pytest.approx(_charged(serving.folder, job.id))
        assert 0 < job.told["spent"] < job.told["epsilon"] == 1
        assert printed(site.run("print(model is not None)", "ward", session=fresh).wait()) == "True\n"

    @pytest.mark.parametrize(
        "body",
        ["while True: pass", "import time\ntime.sleep(600)", "import threading\nthreading.Event().wait(600)"],
    )
    def test_an_endless_cell_is_interrupted_and_the_session_stays(self, site, fresh, body):
        """Whether it computes, sleeps or waits."""
        site.run("kept = 5", "ward", session=fresh).wait()
        job = site.run(body, "ward", session=fresh)
        until(lambda: job.poll(0.2) is not None and job.state == "running")
        job.cancel()
        began = time.monotonic()
        with pytest.raises(RaphaError):
            job.wait()
        assert time.monotonic() - began < 60
        assert job.state == "cancelled"
        assert printed(site.run("print(kept)", "ward", session=fresh).wait()) == "5\n"

    def test_what_is_refused_where_nothing_catches_it_is_one_line(self, site, fresh):
        """As by a loop that is given up once its job was cancelled: no traceback, and the cell goes on."""
        source = """
def given_up():
    try:
        yield
    finally:
        patients.count(epsilon=1e5)
loop = given_up()
next(loop)
del loop
print("on")
"""
        job = site.run(source, "ward", session=fresh).wait()
        (said,) = [o["text"] for o in job.outputs if o.get("name") == "stderr"]
        assert "Traceback" not in said
        assert "Exception ignored" not in said
        assert "budget" in said
        assert printed(job) == "on\n"

    def test_an_interrupt_where_nothing_catches_it_is_kept_for_later(self, site, fresh):
        """It ends the cell at its next word, without a traceback of its own."""
        source = """
class Deaf:
    def __del__(self):
        raise KeyboardInterrupt
Deaf()
while True:
    print("on" * 100_000)
"""
        job = site.run(source, "ward", session=fresh)
        with pytest.raises(CellError, match="interrupted"):
            job.wait()
        assert not [o for o in job.outputs if o.get("name") == "stderr"]

    @pytest.mark.parametrize(
        ("call", "takes"),
        [
            ("patients.train.batches(batch_size=3)", "batches takes size, epochs, epsilon, clip."),
            ("patients.train.fit(None, lr=0.1)", "fit takes model, loss, inputs, target, "),
        ],
    )
    def test_an_argument_that_a_question_does_not_take_is_told_those_it_does(self, site, fresh, call, takes):
        """Below the traceback of the cell's own line."""
        with pytest.raises(CellError, match="unexpected keyword") as caught:
            site.run(call, "ward", session=fresh).wait()
        assert caught.value.traceback[-1].startswith(takes)

    def test_a_cell_cancelled_before_its_python_began_is_interrupted_once_it_has(self, site, fresh):
        """It is running for the site while its values are still on their way into the session."""
        site.run("import time", "ward", session=fresh).wait()
        values = parcels.pack({"large": torch.zeros(1 << 23)}, ["large"])
        job = site.run("time.sleep(600)", "ward", session=fresh, inputs=values)
        job.cancel()
        with pytest.raises(RaphaError):
            job.wait()
        assert job.state == "cancelled"

    def test_a_cell_interrupted_while_it_asks_mixes_up_no_answers(self, site, fresh):
        """The next question gets its own answer, not the one that was left over."""
        for _ in range(6):
            job = site.run("while True: patients.count(epsilon=0.01)", "ward", session=fresh)
            until(lambda job=job: job.poll(0.1) is not None and len(job.outputs) > 1)
            job.cancel()
            with pytest.raises(RaphaError):
                job.wait()
            source = "a = patients.mean('age', epsilon=0.1)\nb = patients.count(epsilon=0.1)"
            got = brought(site, source, "a", "b", session=fresh)
            assert (got["a"].op, got["b"].op) == ("mean", "count")

    def test_a_cell_that_swallows_the_cancellation_asks_no_more(self, site, serving, fresh):
        """Nothing further is answered, so nothing further is charged."""
        source = """
import time
for n in range(200):
    try:
        patients.count(epsilon=0.01)
        print("answered")
    except Exception:
        print("refused")
    time.sleep(0.02)
    if n > 100: break
"""
        job = site.run(source, "ward", session=fresh)
        until(lambda: job.poll(0.1) is not None and "answered" in printed(job))
        job.cancel()
        for _ in job.follow():
            pass
        after = printed(job).split("refused", 1)
        assert "answered" not in after[1] if len(after) > 1 else job.state == "cancelled"

    def test_a_queued_cell_is_cancelled_before_it_runs(self, site, fresh):
        """It never starts."""
        first = site.run("import time; time.sleep(2)", "ward", session=fresh)
        second = site.run("ran = True", "ward", session=fresh)
        second.cancel()
        with pytest.raises(SiteError):
            second.wait()
        first.wait()
        assert printed(site.run("print('ran' in globals())", "ward", session=fresh).wait()) == "False\n"

    def test_cancelling_what_has_ended_does_nothing(self, site, serving, fresh):
        """Nor does cancelling twice."""
        job = site.run("x = 1", "ward", session=fresh).wait()
        job.cancel()
        job.cancel()
        assert job.state == "done"

    def test_ending_a_session_stops_the_fit_it_runs(self, site, serving, fresh):
        """Nobody could receive its answer, so the steps left are not run and not paid."""
        before = serving.spent()["train"]
        job = site.run(LONG, "ward", session=fresh)
        until(lambda: job.poll(0.5) is not None and job.told["step"] > 0)
        reserved = serving.spent()["train"] - before
        site.end_sessions(fresh)
        with pytest.raises(SiteError):
            job.wait()
        assert job.state == "lost"
        until(lambda: 0 < serving.spent()["train"] - before < reserved)


class TestSessions:
    @pytest.mark.parametrize(
        ("body", "why"),
        [
            ("import os; os._exit(1)", "Its process ended"),
            ("x = []\nwhile True: x.append(bytearray(64 << 20))", "memory"),
            ("import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)", "sandbox"),
            ("import ctypes; ctypes.string_at(0)", "ended"),
        ],
    )
    def test_a_session_that_dies_says_why_and_a_new_one_starts(self, site, fresh, body, why):
        """The next cell runs, in an empty namespace."""
        site.run("kept = 1", "ward", session=fresh).wait()
        job = site.run(body, "ward", session=fresh)
        for _ in job.follow():
            pass
        assert job.state in ("lost", "failed")
        if job.state == "lost":
            with pytest.raises(SiteError, match=why):
                job.raise_error()
        else:
            assert "MemoryError" in str(job.told["error"])
        after = site.run("print('kept' in globals())", "ward", session=fresh).wait()
        assert printed(after) == ("False\n" if job.state == "lost" else "True\n")

    def test_garbage_from_a_session_ends_that_session_alone(self, site, fresh):
        """Bytes, frames and fields that no honest worker writes."""
        header = "import os, struct, json\ndef frame(h): os.write(4, struct.pack('>4sIQ', b'RPH1', len(h), 0) + h)\n"
        for body in (
            "os.write(4, b'garbage' * 9)",
            "frame(b'not json')",
            "frame(b'[]')",
            'frame(b\'{"say": "output", "output": {"type": "stream", "text": 5, "name": "x"}}\')',
            'frame(b\'{"say": "output", "output": {"type": "display"}}\')',
            'frame(b\'{"say": "output", "output": {"type": "display", "data": \' + b\'[\' * 900 + b\']\' * 900 + b\'}}\')',
            "frame(b'{\"say\": \"ask\", \"ask\": ' + b'[' * 100000 + b']' * 100000 + b'}')",
            'frame(b\'{"say": "done", "error": {"kind": 5, "what": [], "line": {}}}\')',
            'frame(b\'{"say": "done", "values": {"x": 5}}\')',
            'frame(b\'{"say": "nothing"}\')',
            "os.write(4, struct.pack('>4sIQ', b'RPH1', 1 << 31, 0))",
            "os.write(4, struct.pack('>4sIQ', b'RPH1', 100, 0))\nos._exit(0)",
            'frame(b\'{"say": "ask", "ask": "\\xff\\xfe"}\')',
        ):
            job = site.run(header + body + "\nimport time; time.sleep(0.3)", "ward", session=fresh)
            for _ in job.follow():
                pass
            assert job.state in ("lost", "done", "failed"), body
            site.end_sessions(fresh)
            assert printed(site.run("print(1)", "ward", session=fresh).wait()) == "1\n", body

    def test_too_many_sessions_are_refused_with_the_way_out(self, site):
        """Where each has a job; ending some makes room."""
        site.end_sessions()
        busy = [
            site.run("import time; time.sleep(60)", "ward", session=f"many-{n}")
            for n in range(cells_module.MAX_SESSIONS)
        ]
        for job in busy:
            until(lambda job=job: job.poll(0.1) is not None and job.state == "running")
        with pytest.raises(SiteError, match="limit for one researcher"):
            site.run("x = 1", "ward", session="one-more")
        site.end_sessions()
        site.run("x = 1", "ward", session="one-more").wait()
        site.end_sessions()

    def test_too_many_waiting_cells_are_refused(self, site, fresh, monkeypatch):
        """Those that wait run all the same."""
        monkeypatch.setattr(cells_module, "MAX_QUEUE", 3)
        first = site.run("import time; time.sleep(2)", "ward", session=fresh)
        until(lambda: first.poll(0.1) is not None and first.state == "running")
        waiting = [site.run("x = 1", "ward", session=fresh) for _ in range(3)]
        with pytest.raises(SiteError, match="wait"):
            site.run("x = 1", "ward", session=fresh)
        waiting[-1].wait()

    def test_as_many_fits_as_sessions_leave_the_site_answering(self, site, serving):
        """Long trainings hold up neither a newcomer's evidence nor their question nor the cancel that ends them."""
        site.end_sessions()
        fits = [site.run(LONG, "ward", session=f"busy-{n}") for n in range(cells_module.MAX_SESSIONS)]
        for job in fits[:2]:  # the curator's other threads are kept for others and for short questions
            until(lambda job=job: job.poll(0.5) is not None and job.told["step"] > 0)
        answered = threading.Event()

        def newcomer() -> None:
            other = serving.connect(serving.other)
            other.run("patients.count(epsilon=0.1)", "ward", session="newcomer").wait()
            answered.set()

        threading.Thread(target=newcomer, daemon=True).start()
        came = answered.wait(60)
        for job in fits:
            job.cancel()
        for job in fits:
            with pytest.raises(RaphaError):
                job.wait()
        site.end_sessions()
        assert came


def test_a_job_that_was_cancelled_says_that_it_stops() -> None:
    """From the moment it was asked to until it has, which takes as long as the step under way."""
    order = cells_module.Order("", "d", "patients.count()")
    cell = cells_module.Cell("j", "r", order, state="running", doing="compiling")
    assert cell.summary()["doing"] == "compiling"
    cell.cancelled = True
    assert "cancelled" in cell.summary()["doing"]
    cell.state = "cancelled"
    assert cell.summary()["doing"] == "compiling"


def test_a_job_says_from_the_start_who_is_at_work() -> None:
    """The cell's own Python, until it asks for something; nothing between the steps of a training."""
    cell = cells_module.Cell("j", "r", cells_module.Order("", "d", "model = ..."), state="running")
    assert cell.summary()["doing"] == messages.PYTHON
    cell.asking = "j-1"
    assert not cell.summary()["doing"]
    cell.asking, cell.step, cell.steps = None, 2, 9
    assert not cell.summary()["doing"]


def test_a_job_says_what_it_does_before_its_steps() -> None:
    """Instead of a time left that nobody can know yet, and only while it runs."""
    told = {
        "id": "j" * 12,
        "site": "s",
        "dataset": "d",
        "state": "running",
        "doing": "compiling",
        "seconds_left": 9,
    }
    for state, says in (("running", True), ("done", False)):
        bundle = cards.job(told | {"state": state})
        assert ("compiling" in bundle["text/plain"]) is says
        assert ("compiling" in bundle["text/html"]) is says
        assert "9 s left" not in bundle["text/html"]
