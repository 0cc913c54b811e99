"""Sidebar, status bar, commands: without a kernel, by keyboard, in both themes."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from lab import MEAN, Lab
from playwright.sync_api import expect

OURS = ".rapha-Panel, .rapha-Strip, .rapha-Seal, .rapha-Output, .rapha-Status, .jp-RenderedHTML"
CARDS = "display(site, cohort, cohort.quote('mean:age', epsilon=0.1))"
BLOCKED = {
    "what": "No.",
    "why": "Rows.",
    "instead": "Ask.",
    "suggestion": MEAN,
    "line": 2,
    "kind": "SealedError",
}
JOB = {
    "id": "gone",
    "site": "demo",
    "dataset": "flchain",
    "state": "running",
    "step": 7,
    "steps": 20,
    "epsilon": 1.0,
}
JOB |= {"spent": 0.35, "seconds_left": 9, "started": 0, "simulated": True, "source_line": "fit()"}


def _gallery(lab: Lab) -> None:
    """A notebook with one of everything that can stand in a cell, and the sidebar open."""
    bundles = [{"application/vnd.rapha.blocked+json": BLOCKED}, {"application/vnd.rapha.job+json": JOB}]
    bundles += [{"text/plain": "AUROC 0.99"}]
    outputs = [{"output_type": "display_data", "data": data, "metadata": {}} for data in bundles]
    lab.write("gallery.ipynb", MEAN, {"source": MEAN, "outputs": outputs, "execution_count": 1}, CARDS)
    lab.open("gallery.ipynb")
    lab.run(0)
    lab.run(2)
    expect(lab.cell(0).locator(".rapha-Release")).to_be_visible()
    lab.command("rapha-lab:open-panel")
    expect(lab.page.locator(".rapha-Panel .rapha-Gauge").first).to_be_visible()


def test_the_sidebar_needs_no_kernel(lab: Lab) -> None:
    """With no notebook open it shows the site with its verdict and policy, the budgets and the jobs."""
    lab.command("rapha-lab:open-panel")
    panel = lab.page.locator(".rapha-Panel")
    for said in (
        "demo",
        "answers",
        "simulated enclave",
        "Attestation",
        "Demo policy",
        "Ada Example",
        "Expires",
    ):
        expect(panel.locator(".rapha-Site")).to_contain_text(said)
    for said in ("flchain", "one patient, by patient", "Budget of tutorial", "left", "room for ε"):
        expect(panel.locator(".rapha-Dataset")).to_contain_text(said)
    expect(panel.locator(".rapha-Job").filter(has_text="Done").first).to_be_visible()


def test_the_status_bar_says_what_is_left_for_the_notebook(lab: Lab) -> None:
    """The smallest budget of the dataset that the notebook's enclave cells use; a click opens the sidebar."""
    lab.write("status.ipynb", "%%enclave flchain\n1", "plain = 1")
    lab.open("status.ipynb", kernel=False)
    lab.select(1)
    status = lab.page.locator(".rapha-Status")
    expect(status).to_contain_text("flchain: ε")
    lab.page.evaluate("window.jupyterapp.shell.collapseLeft()")
    status.get_by_role("button").click()
    expect(lab.page.locator(".rapha-Panel")).to_be_visible()


class TestCommands:
    def test_a_rehearsal_runs_here_and_spends_nothing(self, lab: Lab) -> None:
        """The toolbar's flask runs the cell on mock patients in a panel of its own, not in the notebook."""
        lab.write("here.ipynb", MEAN)
        lab.open("here.ipynb")
        left = lab.page.locator(".rapha-Status").inner_text()
        lab.select(0)
        lab.page.locator(".jp-NotebookPanel-toolbar:visible [data-command='rapha-lab:run-here']").click()
        panel = lab.page.locator(".rapha-Rehearsal")
        expect(panel).to_contain_text("Nothing was sent")
        expect(panel.locator(".jp-OutputArea-output").first).to_be_visible()
        expect(lab.cell(0).locator(".jp-OutputArea-child")).to_have_count(0)
        assert lab.page.locator(".rapha-Status").inner_text() == left

    def test_all_enclave_cells_run_and_no_other(self, lab: Lab) -> None:
        """The plain cell between them stays as it is."""
        lab.write("all.ipynb", MEAN, "raise SystemError('plain')", MEAN)
        lab.open("all.ipynb")
        lab.command("rapha-lab:run-all")
        for index in (0, 2):
            expect(lab.cell(index).locator(".rapha-Release")).to_be_visible()
        expect(lab.cell(1).locator(".jp-OutputArea-child")).to_have_count(0)

    def test_an_enclave_cell_is_inserted_by_keyboard(self, lab: Lab) -> None:
        """Alt+Shift+E puts a marked cell with the notebook's dataset below, ready to type in."""
        lab.write("insert.ipynb", "plain = 1")
        lab.open("insert.ipynb")
        lab.cell(0).locator(".jp-InputPrompt").click()
        lab.page.keyboard.press("Alt+Shift+E")
        expect(lab.cell(1).locator(".rapha-Strip")).to_contain_text("flchain")
        lab.page.keyboard.type("patients.count(epsilon=0.1)")
        expect(lab.cell(1).locator(".cm-content")).to_contain_text("patients.count")

    def test_the_receipt_is_shown_by_keyboard(self, lab: Lab) -> None:
        """Alt+Shift+R on a cell with a release opens its receipt; Escape closes it."""
        lab.write("receipt.ipynb", MEAN)
        lab.open("receipt.ipynb")
        lab.run(0)
        expect(lab.cell(0).locator(".rapha-Seal")).to_contain_text("Signed by demo")
        lab.cell(0).locator(".jp-InputPrompt").click()
        lab.page.keyboard.press("Alt+Shift+R")
        expect(lab.page.get_by_role("dialog")).to_contain_text("Inclusion proof")
        expect(lab.page.locator(".jp-Dialog :focus")).to_have_count(
            1
        )  # a dialog is drawn before it takes keys
        lab.page.keyboard.press("Escape")
        expect(lab.page.get_by_role("dialog")).to_have_count(0)


class TestAccessibility:
    @pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
    def test_axe_finds_nothing_in_what_we_draw(self, lab: Lab, theme: str) -> None:
        """Contrast AA, names, roles and order, in the sidebar and in every kind of card."""
        _gallery(lab)
        lab.theme(theme)
        selectors = [[selector.strip()] for selector in OURS.split(",")]
        context = {"include": [s for s in selectors if lab.page.locator(s[0]).count()]}
        options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
        found = Axe().run(lab.page, context=context, options=options)
        lab.theme("JupyterLab Light")
        assert found.violations_count == 0, found.generate_report()

    def test_every_control_is_reached_by_tab_and_pressed_by_enter(self, lab: Lab) -> None:
        """Focus walks the cards' buttons; Enter does what a click does."""
        _gallery(lab)
        button = lab.cell(1).get_by_role("button", name="Insert as a new cell")
        lab.cell(1).locator(".rapha-Blocked pre").focus()
        lab.page.keyboard.press("Tab")
        expect(button).to_be_focused()
        lab.page.keyboard.press("Enter")
        expect(lab.page.locator(".jp-Notebook .jp-CodeCell")).to_have_count(4)

    def test_no_state_is_told_by_colour_alone(self, lab: Lab) -> None:
        """Simulated, signed, covered and spent each stand in words."""
        _gallery(lab)
        expect(lab.cell(0).locator(".rapha-Strip")).to_contain_text("simulated enclave")
        expect(lab.cell(0).locator(".rapha-Seal")).to_contain_text("Signed by")
        expect(lab.cell(1)).to_contain_text("Output covered")
        expect(lab.page.locator(".rapha-Gauge").first).to_contain_text("left")


class TestRows:
    ROWS = "patient_id,age,sex,diagnosis\n101,50,F,I10\n102,61,M,E11\n103,47,F,I21\n"

    def test_saving_rows_warns_and_saves_all_the_same(self, lab: Lab) -> None:
        """The output is marked, the warning offers to show and to clear it, the file is written: help, not a wall."""
        output = {"output_type": "stream", "name": "stdout", "text": self.ROWS}
        path = lab.write(
            "rows.ipynb", {"source": "print(df)", "outputs": [output], "execution_count": 1}, "x = 1"
        )
        lab.open("rows.ipynb", kernel=False)
        lab.cell(1).locator(".cm-content").click()
        lab.page.keyboard.type("0")
        lab.save()
        toast = lab.page.locator(".Toastify__toast", has_text="may hold patients’ rows")
        expect(toast).to_contain_text("patient_id")
        expect(toast).to_contain_text("help, not a wall")
        assert "x = 1" in path.read_text()
        toast.get_by_role("button", name="Clear those outputs").click()
        expect(lab.cell(0).locator(".jp-OutputArea-child")).to_have_count(0)

    def test_saving_aggregates_warns_of_nothing(self, lab: Lab) -> None:
        """A table of groups with counts is what a notebook is for."""
        output = {
            "output_type": "stream",
            "name": "stdout",
            "text": "sex,count,mean_age\nF,4350,64.9\nM,3524,63.7\n",
        }
        lab.write("groups.ipynb", {"source": "print(g)", "outputs": [output], "execution_count": 1})
        lab.open("groups.ipynb", kernel=False)
        lab.command("rapha-lab:check-outputs")
        expect(lab.page.locator(".Toastify__toast", has_text="No output here looks like")).to_be_visible()
        expect(lab.page.locator(".rapha-mod-rows")).to_have_count(0)
