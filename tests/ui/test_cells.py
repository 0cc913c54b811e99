"""Enclave cells: marked as they are typed, their outputs sealed or covered, refusals as cards."""

from __future__ import annotations

import json
from pathlib import Path

from lab import MEAN, Lab
from playwright.sync_api import expect


class TestMark:
    def test_a_cell_is_marked_while_it_is_typed(self, lab: Lab) -> None:
        """The strip comes with `%%enclave`, and says dataset, site, simulated, and the ε asked for."""
        lab.write("mark.ipynb", "")
        lab.open("mark.ipynb")
        strip = lab.cell(0).locator(".rapha-Strip")
        lab.cell(0).locator(".cm-content").click()
        lab.page.keyboard.type("%%enclave")
        expect(strip).to_be_visible()
        lab.page.keyboard.type(" flchain --epsilon 2\npatients.mean('age', epsilon=0.5)")
        for said in ("flchain", "at demo", "simulated enclave", "asks ε 2 + 0.5"):
            expect(strip).to_contain_text(said)

    def test_the_mark_goes_with_the_first_line(self, lab: Lab) -> None:
        """A cell whose magic is edited away is an ordinary cell again."""
        lab.write("unmark.ipynb", "%%enclave flchain\n1")
        lab.open("unmark.ipynb")
        expect(lab.cell(0).locator(".rapha-Strip")).to_be_visible()
        lab.cell(0).locator(".cm-content").click()
        lab.page.keyboard.press("Control+Home")
        lab.page.keyboard.type("# ")
        expect(lab.cell(0).locator(".rapha-Strip")).to_have_count(0)

    def test_another_magic_is_no_enclave_cell(self, lab: Lab) -> None:
        """`%%enclave-x`, a comment and a mention are not marked."""
        lab.write("other.ipynb", "%%enclave-x flchain", "# %%enclave flchain", "print('%%enclave flchain')")
        lab.open("other.ipynb")
        expect(lab.page.locator(".jp-Notebook .jp-CodeCell")).to_have_count(3)
        expect(lab.page.locator(".rapha-Strip")).to_have_count(0)

    def test_a_dataset_that_no_site_has_is_said_in_the_mark(self, lab: Lab) -> None:
        """The strip does not name a site it does not know."""
        lab.write("unknown.ipynb", "%%enclave nowhere\n1")
        lab.open("unknown.ipynb")
        expect(lab.cell(0).locator(".rapha-Strip")).to_contain_text("no connected site has it")


class TestSeal:
    def test_a_release_is_shown_with_its_seal_and_receipt(self, lab: Lab) -> None:
        """Run a cell: the value with its error, signed by the site; the receipt opens with its proof."""
        lab.write("release.ipynb", MEAN)
        lab.open("release.ipynb")
        lab.run(0)
        output = lab.cell(0).locator(".jp-OutputArea-child").last
        expect(output.locator(".rapha-Release")).to_contain_text("Mean of age")
        expect(output.locator(".rapha-Seal")).to_contain_text("Signed by demo")
        output.get_by_role("button", name="Receipt").click()
        dialog = lab.page.get_by_role("dialog")
        expect(dialog).to_contain_text("Inclusion proof")
        expect(dialog).to_contain_text("Checkpoint")
        dialog.get_by_role("button", name="Close").click()

    def test_a_saved_release_verifies_when_it_is_opened_again(self, lab: Lab, executed: Path) -> None:
        """The signature survives the browser, the file and a new page."""
        _save_copy(executed, lab, "again.ipynb", lambda cells: None)
        lab.open("again.ipynb", kernel=False)
        expect(lab.cell(1).locator(".rapha-Seal")).to_contain_text("Signed by demo")
        expect(lab.cell(1).locator(".rapha-Release")).to_be_visible()

    def test_an_edited_release_is_covered(self, lab: Lab, executed: Path) -> None:
        """One digit changed in the file: the output is not shown, and the cover says why."""

        def edit(cells: list[dict]) -> None:
            card = cells[1]["outputs"][-1]["data"]["application/vnd.rapha.release+json"]
            card["rows"][0]["value"] += 1

        _save_copy(executed, lab, "edited.ipynb", edit)
        lab.open("edited.ipynb", kernel=False)
        expect(lab.cell(1).locator(".rapha-Seal")).to_contain_text("changed after the site signed it")
        expect(lab.cell(1).locator(".rapha-Release")).not_to_be_visible()

    def test_an_unsigned_output_is_covered_and_no_button_shows_it(self, lab: Lab) -> None:
        """A print, a picture of a number or a bare release in an enclave cell is not shown."""
        release = {"title": "Mean", "rows": [{"name": "age", "value": 1.0}], "epsilon": 0.1, "delta": 0}
        outputs = [
            _display({"text/plain": "AUROC 0.99"}),
            _display({"text/html": "<b>AUROC 0.99</b>"}),
            _display({"application/vnd.rapha.release+json": release}),
            {"output_type": "stream", "name": "stdout", "text": "AUROC 0.99\n"},
        ]
        lab.write("unsigned.ipynb", {"source": MEAN, "outputs": outputs, "execution_count": 1})
        lab.open("unsigned.ipynb", kernel=False)
        covers = lab.cell(0).locator("[data-rapha-seal='covered']")
        expect(covers).to_have_count(4)
        expect(lab.cell(0).get_by_text("AUROC 0.99").first).not_to_be_visible()
        expect(covers.first).to_contain_text("Run the cell again")
        expect(covers.get_by_role("button")).to_have_count(0)

    def test_a_release_says_whose_patients_it_looked_at(self, lab: Lab) -> None:
        """A selection's are those who scored it too; a notebook of before names the one split."""
        release = {"title": "Trained", "rows": [], "epsilon": 1, "delta": 0, "dataset": "d", "split": "train"}
        both = release | {"splits": ["train", "validation"]}
        outputs = [_display({"application/vnd.rapha.release+json": each}) for each in (both, release)]
        lab.write("splits.ipynb", {"source": "model", "outputs": outputs, "execution_count": 1})
        lab.open("splits.ipynb", kernel=False)
        cards = lab.cell(0).locator(".rapha-Release")
        expect(cards.nth(0)).to_contain_text("d, train and validation splits")
        expect(cards.nth(1)).to_contain_text("d, train split")

    def test_a_signed_output_is_covered_in_another_cell_and_when_doubled(
        self, lab: Lab, executed: Path
    ) -> None:
        """A release stands where it was made, once."""

        def move(cells: list[dict]) -> None:
            signed = cells[1]["outputs"][-1]
            cells[1]["outputs"] = [signed, signed]
            cells.append({**cells[1], "id": "elsewhere", "outputs": [signed]})

        _save_copy(executed, lab, "moved.ipynb", move)
        lab.open("moved.ipynb", kernel=False)
        seals = lab.cell(1).locator(".rapha-Seal")
        expect(seals.nth(0)).to_contain_text("Signed by demo")
        expect(seals.nth(1)).to_contain_text("second copy")
        expect(lab.cell(2).locator(".rapha-Seal")).to_contain_text("belongs to another cell")

    def test_turning_a_plain_cell_into_an_enclave_cell_covers_its_output(self, lab: Lab) -> None:
        """What was printed by a plain cell is no answer of a site, and becomes none by editing."""
        outputs = [_display({"text/plain": "AUROC 0.99"})]
        lab.write("turned.ipynb", {"source": "print()", "outputs": outputs, "execution_count": 1})
        lab.open("turned.ipynb", kernel=False)
        expect(lab.cell(0).get_by_text("AUROC 0.99")).to_be_visible()
        lab.cell(0).locator(".cm-content").click()
        lab.page.keyboard.press("Control+Home")
        lab.page.keyboard.type("%%enclave flchain\n")
        expect(lab.cell(0).get_by_text("AUROC 0.99")).not_to_be_visible()


class TestBlocked:
    def test_a_refusal_is_a_card_and_said_once(self, lab: Lab) -> None:
        """`patients.head()` shows what, why and instead, and not the same again as an error."""
        lab.write("blocked.ipynb", "%%enclave flchain\npatients.head()")
        lab.open("blocked.ipynb")
        lab.run(0)
        card = lab.cell(0).locator(".rapha-Blocked")
        for said in ("Blocked", "SealedError", "Why", "Instead"):
            expect(card).to_contain_text(said)
        expect(lab.cell(0).locator("[data-rapha-seal='said']")).to_be_hidden()

    def test_the_suggestion_becomes_a_new_cell_below(self, lab: Lab) -> None:
        """The button inserts the suggested code under the refused cell, and runs nothing."""
        card = {
            "what": "No.",
            "why": "Rows.",
            "instead": "Ask.",
            "suggestion": MEAN,
            "line": 2,
            "kind": "SealedError",
        }
        outputs = [_display({"application/vnd.rapha.blocked+json": card})]
        source = "%%enclave flchain\npatients.head()"
        lab.write("suggest.ipynb", {"source": source, "outputs": outputs, "execution_count": 1}, "last = 1")
        lab.open("suggest.ipynb")
        lab.cell(0).get_by_role("button", name="Insert as a new cell").click()
        expect(lab.page.locator(".jp-Notebook .jp-CodeCell")).to_have_count(3)
        expect(lab.cell(1).locator(".cm-content")).to_contain_text("patients.mean")
        expect(lab.cell(1).locator(".rapha-Strip")).to_be_visible()
        expect(lab.cell(1).locator(".jp-OutputArea-child")).to_have_count(0)

    def test_a_hostile_card_is_text_and_nothing_else(self, lab: Lab) -> None:
        """Markup in a card's fields is shown as it is written."""
        evil = "<img src=x onerror='window.hacked = true'>"
        outputs = [
            _display({"application/vnd.rapha.blocked+json": {"what": evil, "why": evil, "instead": evil}})
        ]
        lab.write("evil.ipynb", {"source": MEAN, "outputs": outputs, "execution_count": 1})
        lab.open("evil.ipynb", kernel=False)
        expect(lab.cell(0).locator(".rapha-Blocked-what")).to_have_text(evil)
        assert lab.page.evaluate("window.hacked") is None


def _display(data: dict) -> dict:
    return {"output_type": "display_data", "data": data, "metadata": {}}


def _save_copy(executed: Path, lab: Lab, name: str, change) -> None:
    """A copy of the executed notebook with its cells changed, as an editor of the file would."""
    notebook = json.loads(executed.read_text())
    change(notebook["cells"])
    (lab.server.files / name).write_text(json.dumps(notebook))
