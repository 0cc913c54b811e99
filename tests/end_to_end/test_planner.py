"""The planner: what its sliders show is the accountant's, in a real kernel and without one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hospital
import pytest
import torch
import ward
from jupyter_client.manager import KernelManager

import rapha_lab
from rapha_lab.client.site import Dataset
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.keys import PrivateKey

PASSPHRASE = "a passphrase of a test"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, PrivateKey]]:
    """A site of its own, with a small budget."""
    config, key = hospital.prepare(
        tmp_path_factory.mktemp("planned"), ward.SCHEMA, ward.frame(), "ward", epsilon=3.0
    )
    with hospital.running(config) as (_, url):
        yield url, key


@pytest.fixture(scope="module")
def cohort(running: tuple[str, PrivateKey]) -> Dataset:
    """The ward."""
    return hospital.connected(*running).dataset("ward")


def model() -> torch.nn.Module:
    """41 numbers to train."""
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


class TestFigures:
    def test_a_plan_of_a_model_has_the_figures_of_its_quote(self, cohort):
        """Without widgets, as plain values."""
        plan = rapha_lab.plan(cohort, model(), epsilon=0.8, epochs=5, batch=100, widgets=False)
        assert plan.widget is None
        assert plan.quote == cohort.quote(model(), epsilon=0.8, epochs=5, batch=100)
        assert plan.quote.figures["numbers to train"] == 41
        assert [each.epsilon for each in plan.curve] == sorted(each.epsilon for each in plan.curve)

    @pytest.mark.parametrize("what", ["count", "mean:age", "histogram:sex", "evaluate:auroc,brier", "fit"])
    def test_every_question_can_be_planned(self, cohort, what):
        """With a picture whose curve falls as ε rises."""
        plan = rapha_lab.plan(cohort, what, widgets=False)
        heights = [each.noise if each.error is None else each.error for each in plan.curve]
        assert heights[0] > heights[-1]
        assert "<svg" in plan.to_html()

    def test_moving_changes_the_figures_and_spends_nothing(self, cohort):
        """More ε is less noise and less budget left."""
        before = dict(cohort.budget)
        plan = rapha_lab.plan(cohort, "fit", epsilon=0.5, widgets=False)
        first, html = plan.quote, plan.to_html()
        plan.move(epsilon=1.5)
        assert plan.quote.noise < first.noise
        assert plan.quote.left < first.left
        assert plan.to_html() != html
        assert cohort.budget == before

    def test_beyond_the_budget_it_says_so_and_what_would_fit(self, cohort):
        """In words, not by colour alone; the curve is dashed there."""
        plan = rapha_lab.plan(cohort, "count", epsilon=9, widgets=False)
        assert not plan.quote.fits
        assert "✗ It does not fit the budget." in plan.to_html()
        assert f"it would fit with ε {plan.quote.largest:.4g}" in repr(plan)
        assert "stroke-dasharray" in plan.to_html()

    def test_another_cohort_is_marked_hypothetical(self, cohort):
        """And the declared one is not."""
        plan = rapha_lab.plan(cohort, "mean:age", widgets=False)
        assert "Hypothetical" not in plan.to_html()
        assert "Hypothetical: as if 50,000" in plan.move(patients=50_000).to_html()
        assert "Hypothetical" not in plan.move(patients=ward.PATIENTS).to_html()

    def test_settings_without_a_quote_leave_the_last_one_and_say_why(self, cohort):
        """A batch above the cohort; back within it, the reason is gone."""
        plan = rapha_lab.plan(cohort, "fit", batch=100, widgets=False)
        kept = plan.quote
        plan.move(batch=10**6)
        assert plan.quote == kept
        assert plan.problem.field == "batch"
        assert 'role="status"' in plan.to_html()
        assert plan.move(batch=200).problem is None

    def test_what_cannot_be_planned_is_refused_at_once(self, cohort):
        """With the error that asking would give."""
        with pytest.raises(RequestError):
            rapha_lab.plan(cohort, "mean:nothing")


class TestWidgets:
    def test_the_repr_degrades_to_html_and_text(self, cohort):
        """For nbconvert and editors without widgets."""
        shown = rapha_lab.plan(cohort, "count")._repr_mimebundle_()
        assert set(shown) == {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"}
        assert shown["text/plain"].startswith("Quote: Number of patients")

    def test_sliders_are_labelled_and_begin_at_the_plan(self, cohort):
        """ε, epochs, batch and cohort for a fit; what has no say has no slider."""
        plan = rapha_lab.plan(cohort, model(), epsilon=0.8, epochs=7, batch=100)
        *sliders, _ = plan.widget.children
        assert [slider.description for slider in sliders] == ["ε", "epochs", "batch size", "cohort size"]
        assert [slider.value for slider in sliders] == [0.8, 7, 100, ward.PATIENTS]
        assert len(rapha_lab.plan(cohort, "count").widget.children) == 2

    def test_sliders_begin_at_the_declared_figures_to_the_digit(self, cohort):
        """So that showing them changes nothing: what is planned first is the declared cohort."""
        plan = rapha_lab.plan(cohort, "fit")
        first = plan.quote
        *sliders, cohort_size, _ = plan.widget.children
        assert cohort_size.value == ward.PATIENTS
        for slider in sliders:
            slider.index, kept = 0, slider.index
            slider.index = kept
        assert plan.quote == first
        assert not plan.quote.hypothetical

    def test_without_an_event_loop_a_slider_redraws_at_once(self, cohort):
        """As in a script."""
        plan = rapha_lab.plan(cohort, model())
        *sliders, picture = plan.widget.children
        before = picture.value
        sliders[1].value = 100
        assert picture.value != before
        assert plan.quote.figures["steps"] == 500

    def test_a_smaller_cohort_takes_the_batch_with_it(self, cohort):
        """So that sliders alone cannot ask for a batch above the cohort."""
        plan = rapha_lab.plan(cohort, "fit", batch=800)
        sliders = {slider.description: slider for slider in plan.widget.children[:-1]}
        sliders["cohort size"].value = 100
        assert plan.problem is None
        assert plan.quote.figures["patients expected in a step"] <= 70


class Kernel:
    """A kernel of this Python, and what a front end does with it."""

    def __init__(self, folder: Path) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(60)

    def run(self, source: str) -> list[dict[str, Any]]:
        """Run a cell; gives all that it published."""
        said: list[dict[str, Any]] = []
        reply = self.client.execute_interactive(source, timeout=120, output_hook=said.append)
        assert reply["content"]["status"] == "ok", reply["content"]
        return said

    def slide(self, comm: str, index: int) -> None:
        """Move a slider, as its view does."""
        data = {"method": "update", "state": {"index": index}, "buffer_paths": []}
        content = {"comm_id": comm, "data": data}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))

    def updates(self, comm: str, wanted: str, seconds: float = 60) -> str:
        """The first value of a widget that holds `wanted`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            message = self.client.get_iopub_msg(timeout=seconds)
            content = message["content"]
            if message["msg_type"] == "comm_msg" and content["comm_id"] == comm:
                value = content["data"].get("state", {}).get("value", "")
                if wanted in str(value):
                    return str(value)
        raise AssertionError("no such value came")

    def close(self) -> None:
        """End it."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    """A kernel that ends with the test."""
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.close()


class TestKernel:
    def test_a_slider_moved_in_a_front_end_redraws_the_figures(self, kernel, running, tmp_path):
        """The extension gives datasets their `plan`; sliders are real comms; the picture follows, once at rest."""
        url, key = running
        key.save(tmp_path / "me.key", PASSPHRASE)
        kernel.run(f"""
import sys
sys.path.insert(0, {str(Path(hospital.__file__).parent)!r})
import hospital
from rapha_lab.protocol.keys import PrivateKey
%load_ext rapha_lab
site = hospital.connected({url!r}, PrivateKey.load({str(tmp_path / "me.key")!r}, {PASSPHRASE!r}))
cohort = site.dataset("ward")
""")
        said = kernel.run("plan = cohort.plan('mean:age', epsilon=0.5)\nplan")
        shown = next(m["content"]["data"] for m in said if m["msg_type"] == "execute_result")
        assert "application/vnd.jupyter.widget-view+json" in shown
        assert "Mean of age" in shown["text/html"]
        opened = {
            m["content"]["comm_id"]: m["content"]["data"]["state"]
            for m in said
            if m["msg_type"] == "comm_open" and "state" in m["content"]["data"]
        }
        slider = next(id for id, state in opened.items() if state.get("description") == "ε")
        picture = next(id for id, state in opened.items() if state.get("_model_name") == "HTMLModel")
        for label in ("0.631", "0.708", "1.26"):
            kernel.slide(slider, opened[slider]["_options_labels"].index(label))
        html = kernel.updates(picture, "ε 1.26:")
        cohort = hospital.connected(url, key).dataset("ward")
        assert f"{cohort.quote('mean:age', epsilon=1.26).error:.4g} years" in html
        said = kernel.run("print(plan.quote.epsilon, type(plan).__name__)")
        assert "1.26 Plan" in "".join(m["content"].get("text", "") for m in said)
