"""The custodians' console in a real browser: it shows, it never signs, and nothing foreign in it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clinic
import pytest
from clinic import Clinic, newest, until
from playwright.sync_api import Browser, Page

from rapha_lab.client.custodian import countersign
from rapha_lab.protocol.errors import RaphaError
from rapha_lab.protocol.keys import PrivateKey

HOSTILE = """
def hostile(frame):
    "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    far = "BLANKS", frame.head()
    return frame["age"].mean()

patients.review(hostile, columns=["age"])
"""


TWO = """
def harmless(frame):
    return 1

patients.review(harmless, columns=["age"])
"""


GIVEN = """
import torch

def given(frame, w, word):
    total = 0
    total = total + 1
    total = total + 2
    return total

w = torch.tensor([[0.0, 1, 2], [3, 4, 5.0]])
patients.review(given, columns=["age"], inputs={"w": w, "word": "a\\u202eb"})
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    """A clinic of its own."""
    with clinic.open_clinic(tmp_path_factory.mktemp("console")) as opened:
        yield opened


@pytest.fixture
def page(opened: Browser, site: Clinic) -> Iterator[Page]:
    """The console, not logged in; errors of its script fail the test."""
    made, errors = opened.new_page(viewport={"width": 1280, "height": 800}), list[str]()
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.set_default_timeout(60_000)
    made.goto(f"{site.url}/console")
    yield made
    made.close()
    assert errors == []


def signed(page: Page, button: str, key: PrivateKey) -> str:
    """Save the file that the button gives out and sign it as the command line does."""
    with page.expect_download() as waited:
        page.click(button)
    return countersign(Path(waited.value.path()).read_text(), key, lambda text: None)


def enter(page: Page, key: PrivateKey) -> None:
    page.fill("#login-line", signed(page, "#challenge", key))
    page.click("#enter")


def test_a_custodian_logs_in_looks_and_approves(page: Page, site: Clinic) -> None:
    """With two files and two pasted lines; the researcher's cell goes on."""
    job = until(site.connect().run('patients.mean("age", epsilon=0.5)', "ward"), "waiting")
    enter(page, site.custodians[0])
    page.click("text=Look at it")
    page.wait_for_selector("text=An answer asks to leave")
    assert "epsilon 0.5" in page.inner_text("#facts")
    assert '"column": "age"' in page.inner_text("#values")
    page.fill("#decision-line", signed(page, "#approve", site.custodians[0]))
    page.click("#send")
    page.wait_for_selector("text=Nothing waits for a decision")
    assert until(job, "done").releases[0].values["column"] == "age"


def test_a_refusal_needs_a_reason_and_foreign_source_is_only_text(page: Page, site: Clinic) -> None:
    """Markup in a function's source does nothing; its columns and costs are shown."""
    if site.site.tier != "S3":
        pytest.skip("reviewed functions need the sandbox's tier S3")
    job = until(site.connect().run(HOSTILE.replace("BLANKS", " " * 600), "ward"), "waiting")
    enter(page, site.custodians[1])
    page.click("text=Look at it")
    page.wait_for_selector("text=A function asks to run")
    assert "<img src=x onerror" in page.inner_text("#source")
    assert "no privacy guarantee" in page.inner_text("#facts")
    hidden = page.evaluate(
        "[...document.querySelectorAll('pre')].filter(p => p.scrollWidth > p.clientWidth).length"
    )
    assert hidden == 0  # what stands after six hundred blanks is in sight, too
    page.click("#refuse")
    assert "Give a reason" in page.inner_text("#problem")
    page.fill("#reason", "Not this one.")
    page.fill("#decision-line", signed(page, "#refuse", site.custodians[1]))
    page.click("#send")
    page.wait_for_selector("#list:not([hidden])")
    assert page.title() == "Airlock"
    assert "Not this one." in json.dumps(until(job, "failed").told["error"])


def test_what_changed_and_what_it_is_given_is_shown_in_full(page: Page, site: Clinic, tmp_path: Path) -> None:
    """Since the version approved last: every line, added, gone or moved; tensors with all their values on demand."""
    if site.site.tier != "S3":
        pytest.skip("reviewed functions need the sandbox's tier S3")
    guardian, session = site.custodian(), "versions"
    job = until(site.connect().run(GIVEN, "ward", session=session), "waiting")
    enter(page, site.custodians[0])
    page.click("text=Look at it")
    page.wait_for_selector("text=No function of this project was approved on this dataset before")
    guardian.approve(newest(guardian, job=job)["subject"])
    guardian.refuse(newest(guardian, "answer", job)["subject"], "Seen.")
    until(job, "failed")
    other = GIVEN.replace("total + 1\n    total = total + 2", "total + 2\n    total = total + 1").replace(
        "5.0", "6.0"
    )
    job = until(site.connect().run(other, "ward", session=session), "waiting")
    page.click("#back")
    page.click("text=Look at it")
    page.wait_for_selector("text=since the version approved last in this project")
    changes = page.inner_text("#changes")
    assert "- line 5:     total = total + 1" in changes or "- line 3:     total = total + 1" in changes
    assert "tensors: was" in changes
    assert "source: was" not in changes
    assert "w (tensor 0): 2x3 F32, 0 to 6; begins 0, 1, 2, 3, 4, 6" in page.inner_text("#tensors")
    asks = json.loads(guardian.show(newest(guardian, job=job)["subject"])["document"])["asks"]
    assert asks["tensors"] in page.inner_text("#tensors")
    assert "\\u202e" in page.inner_text("#inputs")  # a character that turns what follows is written out
    with page.expect_download() as waited:
        page.click("#save-inputs")
    assert hashlib.sha256(Path(waited.value.path()).read_bytes()).hexdigest() == asks["tensors"]
    guardian.refuse(newest(guardian, job=job)["subject"], "Seen.")
    until(job, "failed")


def test_what_comes_late_is_not_shown_beside_another(page: Page, site: Clinic) -> None:
    """One function's inputs are slow: whoever goes on to the next one sees the source that they sign."""
    if site.site.tier != "S3":
        pytest.skip("reviewed functions need the sandbox's tier S3")
    guardian = site.custodian()
    sources = {"slow": TWO, "quick": TWO.replace("harmless", "harmful")}
    jobs = {
        name: until(site.connect().run(text, "ward", session=name), "waiting")
        for name, text in sources.items()
    }
    enter(page, site.custodians[0])
    page.wait_for_selector("text=Look at it")
    page.evaluate(
        "const real = fetch; let first = true; const gate = new Promise(open => { window.open_gate = open; });"
        "window.fetch = async (url, how) => { if (url.endsWith('inputs') && first) { first = false; await gate;"
        " window.passed = true; } return real(url, how); }; 0"
    )
    buttons = page.locator("#items button")
    buttons.nth(buttons.count() - 2).click()
    page.wait_for_timeout(300)
    buttons.nth(buttons.count() - 1).click()
    page.wait_for_selector("text=A function asks to run")
    page.evaluate("window.open_gate()")
    page.wait_for_function("window.passed")
    page.wait_for_timeout(500)
    assert "def harmful" in page.inner_text("#source")
    assert "runs\nharmful" in page.inner_text("#facts")
    for job in jobs.values():
        guardian.refuse(newest(guardian, job=job)["subject"], "Seen.")
        until(job, "failed")


def test_what_nobody_sees_is_written_out(page: Page, site: Clinic) -> None:
    """In answers and in what the checks found."""
    assert (
        page.evaluate(r"seen('a\u202e\ufe01\u{e0101}\u3164\nä')")
        == "a\\u{202e}\\u{fe01}\\u{e0101}\\u{3164}\nä"
    )


@pytest.mark.parametrize("who", ["researcher", "replay", "nobody"])
def test_nobody_else_is_let_in(page: Page, site: Clinic, who: str) -> None:
    """Not the researcher, not with a line that was used; without a log-in the site says nothing."""
    key = site.researcher if who == "researcher" else site.custodians[0]
    line = signed(page, "#challenge", key)
    if who == "replay":
        page.fill("#login-line", line)
        page.click("#enter")
        page.wait_for_selector("#list:not([hidden])")
        page.reload()
    if who == "nobody":
        told: Any = page.evaluate("fetch('/console/items', {method: 'POST'}).then(reply => reply.json())")
        assert "not logged in" in told["what"]
        return
    page.fill("#login-line", line)
    page.click("#enter")
    page.wait_for_selector("text=You were not let in")
    assert page.is_hidden("#list")


def test_a_line_signed_by_another_key_is_not_sent_on(page: Page, site: Clinic) -> None:
    """Who is logged in decides, or nobody."""
    until(site.connect().run('patients.mean("age", epsilon=0.6)', "ward", session="third"), "waiting")
    enter(page, site.custodians[0])
    page.click("text=Look at it")
    page.fill("#decision-line", signed(page, "#approve", site.custodians[2]))
    page.click("#send")
    page.wait_for_selector("text=signed by another key")
    assert newest(site.custodian())["missing"] == 1


def test_it_can_be_read_by_everybody(page: Page, site: Clinic) -> None:
    """No finding of the accessibility checker, in either theme."""
    from axe_playwright_python.sync_playwright import Axe

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        found = Axe().run(page, options={"resultTypes": ["violations"]})
        assert found.violations_count == 0, found.generate_report()


def test_a_veto_ends_the_policy(page: Page, site: Clinic) -> None:
    """From the browser, too; who connects anew is a stranger and hears no reason. The last test: this clinic is closed."""
    enter(page, site.custodians[2])
    page.click("text=Veto the policy")
    page.fill("#veto-reason", "The ethics approval lapsed.")
    page.fill("#veto-line", signed(page, "#veto", site.custodians[2]))
    page.click("#send-veto")
    page.wait_for_selector("text=no longer in force")
    with pytest.raises(RaphaError, match="No policy is in force"):
        site.connect().run("1", "ward")
