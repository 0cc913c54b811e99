"""The planner's sliders: what a question would cost and give, before anything is spent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab import CONNECT, Lab
from playwright.sync_api import expect


@pytest.fixture
def lab_of_its_own(lab: Lab) -> Iterator[Lab]:
    """The page, with a fresh kernel: widgets of a kernel that other documents have left do not draw."""
    shared, lab.kernel = lab.kernel, None
    yield lab
    lab.kernel = shared


def test_moving_the_slider_by_keyboard_changes_the_figures_and_spends_nothing(lab_of_its_own: Lab) -> None:
    """A larger ε gives a smaller error, drawn anew after the slider rests; the budget stays as it was."""
    lab = lab_of_its_own
    left = "print('left', cohort.budget['tutorial']['train']['left'])"
    lab.write("planner.ipynb", f"{CONNECT}\n{left}", 'cohort.plan("mean:age", epsilon=0.1)', left)
    lab.open("planner.ipynb")
    lab.run(0)
    lab.run(1)
    output = lab.cell(1).locator(".jp-OutputArea-output").last
    handle = output.locator(".noUi-handle").first
    expect(handle).to_be_visible()
    before = output.inner_text()
    handle.focus()
    for _ in range(4):
        lab.page.keyboard.press("ArrowRight")
    lab.page.wait_for_function(
        "([node, text]) => node.innerText !== text", arg=[output.element_handle(), before]
    )
    lab.run(2)
    texts = [lab.cell(number).locator(".jp-OutputArea-output").last.inner_text() for number in (0, 2)]
    assert texts[0] == texts[1]
