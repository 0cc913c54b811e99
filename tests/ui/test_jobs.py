"""A job lives at the site: its card and the sidebar follow it whatever happens to page, kernel and Lab."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import pytest
from lab import CONNECT, FIT, Lab
from playwright.sync_api import Locator, expect

LONG = FIT.format(epochs=3000)


@pytest.fixture
def training(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Locator]:
    """A notebook in which a long training runs; its job card."""
    name = f"{request.node.name}.ipynb"
    shared = lab.kernel
    if any(word in name for word in ("killed", "restart", "sidebar")):
        lab.kernel = None  # a kernel of its own
    lab.write(name, f"import os, pathlib; pathlib.Path('pid').write_text(str(os.getpid()))\n{CONNECT}", LONG)
    lab.open(name)
    used = lab.kernel
    lab.run(0)
    lab.run(1, wait=False)
    card = lab.cell(1).locator(".rapha-Job")
    # a slow rehearsal has steps too
    expect(card).to_have_attribute("data-state", "running", timeout=90_000)
    expect(card.locator(".rapha-Job-figures")).to_contain_text(re.compile(r"step [1-9]"), timeout=90_000)
    yield card
    if lab.kernel == used:  # else a restarted Lab has given the page another
        lab.kernel = shared
    _cancel_all(lab)


def _cancel_all(lab: Lab) -> None:
    """Cancel whatever runs at the site, and wait for its end: a block of steps is always finished."""
    lab.page.evaluate(
        """async () => {
        const xsrf = (document.cookie.match(/_xsrf=([^;]*)/) || [])[1];
        const init = {method: 'POST', body: '{}', headers: {'X-XSRFToken': xsrf}};
        for (let tries = 0; tries < 360; tries++) {
            const jobs = await (await fetch('/rapha-lab/jobs')).json();
            const live = jobs.filter(({state}) => ['queued', 'running'].includes(state));
            if (!live.length) { return; }
            for (const job of tries ? [] : live) {
                const reply = await fetch(`/rapha-lab/jobs/${job.site}/${job.id}/cancel`, init);
                if (!reply.ok) { throw new Error(await reply.text()); }
            }
            await new Promise(resolve => setTimeout(resolve, 500));
        }
        throw new Error('a job did not end');
    }"""
    )


def _step(card: Locator) -> int:
    found = re.search(r"step (\d+)", card.locator(".rapha-Job-figures").inner_text())
    return int(found[1]) if found else -1


def _moves_on(lab: Lab, card: Locator) -> None:
    """The card reaches a later step than it shows now."""
    before = _step(card)
    for _ in range(200):
        if _step(card) > before:
            return
        lab.page.wait_for_timeout(100)
    raise AssertionError(f"the job card stands still at step {before}")


def test_a_running_job_shows_its_steps_and_its_price(lab: Lab, training: Locator) -> None:
    """The card is live, names the site as simulated, and says what is spent of what was granted."""
    _moves_on(lab, training)
    expect(training).to_contain_text("Running")
    expect(training).to_contain_text("flchain at demo")
    expect(training).to_contain_text("simulated enclave")
    expect(training).to_contain_text(re.compile(r"ε [\d.]+ spent of [\d.]+ granted"))
    expect(training.get_by_role("progressbar")).to_be_visible()


def test_a_job_is_cancelled_from_its_card(lab: Lab, training: Locator) -> None:
    """One click; the card then says that it was cancelled, and offers no second click."""
    training.get_by_role("button", name="Cancel").click()
    expect(training).to_contain_text("Cancelled")
    expect(training.get_by_role("button", name="Cancel")).to_have_count(0)
    expect(training).to_contain_text(re.compile(r"ε 0\.\d*[1-9]\d* spent of 0.05 granted"))
    expect(lab.cell(1)).to_contain_text("What had run stays charged")
    expect(lab.cell(1).locator(".rapha-Blocked")).to_have_count(0)


def test_interrupting_the_kernel_cancels_the_job(lab: Lab, training: Locator) -> None:
    """The notebook's own stop button is a wish to cancel."""
    lab.command("notebook:interrupt-kernel")
    expect(training).to_contain_text("Cancelled")
    expect(lab.cell(1)).to_contain_text("What had run stays charged")


def test_a_reload_in_mid_job_picks_it_up_again(lab: Lab, training: Locator) -> None:
    """After a reload the card in the saved notebook and the sidebar move on."""
    lab.save()
    lab.reload()
    lab.command("rapha-lab:open-panel")
    job = lab.page.locator(".rapha-Panel .rapha-Job[data-state='running']")
    expect(job).to_have_count(1)
    _moves_on(lab, job)
    _moves_on(lab, lab.cell(1).locator(".rapha-Job"))


def test_a_kernel_killed_in_mid_job_leaves_the_card_live(lab: Lab, training: Locator) -> None:
    """The kernel is gone; the job is not, and can still be cancelled."""
    os.kill(int((lab.server.files / "pid").read_text()), signal.SIGKILL)
    lab.page.get_by_role("dialog").get_by_role("button", name="Ok").click()  # Lab's own word of the death
    _moves_on(lab, training)
    training.get_by_role("button", name="Cancel").click()
    expect(training).to_contain_text("Cancelled")


def test_a_kernel_restarted_in_mid_job_leaves_it_running(lab: Lab, training: Locator) -> None:
    """The interrupt that a restart begins with is not taken for a wish to cancel."""
    lab.page.evaluate(
        "async () => { await window.jupyterapp.shell.currentWidget.sessionContext.restartKernel(); }"
    )
    _moves_on(lab, training)
    expect(training).to_contain_text("Running")


def test_lab_restarted_in_mid_job_picks_it_up_again(lab: Lab, training: Locator) -> None:
    """All kernels are gone with it; after the restart the saved card and the sidebar move on."""
    lab.save()
    lab.server.stop()
    lab.server.start()
    lab.reload()
    try:
        lab.command("rapha-lab:open-panel")
        job = lab.page.locator(".rapha-Panel .rapha-Job[data-state='running']")
        expect(job).to_have_count(1)
        _moves_on(lab, job)
        _moves_on(lab, lab.cell(1).locator(".rapha-Job"))
    finally:
        lab.connect()


def test_the_sidebar_leads_from_a_job_to_its_cell(lab: Lab, training: Locator) -> None:
    """The button makes the cell that sent the job the active one, and opens its notebook if that was closed."""
    lab.select(0)
    lab.command("rapha-lab:open-panel")
    job = lab.page.locator(".rapha-Panel .rapha-Job[data-state='running']")
    job.get_by_role("button", name="Show its cell").click()
    active = "window.jupyterapp.shell.currentWidget?.content?.activeCellIndex === 1"
    lab.page.wait_for_function(active)
    lab.save()
    lab.close_all()
    job.get_by_role("button", name="Show its cell").click()
    lab.page.wait_for_function(active)


def test_a_job_that_no_site_knows_shows_its_saved_state(lab: Lab) -> None:
    """The card of an old notebook says that it is the last saved state, and cannot be cancelled."""
    saved = {"id": "gone", "site": "demo", "dataset": "flchain", "state": "running", "step": 7, "steps": 20}
    saved |= {"epsilon": 1.0, "spent": 0.35, "seconds_left": 9, "started": 0, "simulated": True}
    output = {
        "output_type": "display_data",
        "data": {"application/vnd.rapha.job+json": saved},
        "metadata": {},
    }
    lab.write("old.ipynb", {"source": LONG, "outputs": [output], "execution_count": 1})
    lab.open("old.ipynb", kernel=False)
    card = lab.cell(0).locator(".rapha-Job")
    expect(card).to_contain_text("step 7 of 20")
    expect(card).to_contain_text("Last state saved in this notebook")
    expect(card.get_by_role("button", name="Cancel")).to_have_count(0)
