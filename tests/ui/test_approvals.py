"""Answers that custodians have yet to release, at a hospital's own site that this machine knows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import PASSPHRASE, Lab
from playwright.sync_api import expect

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))
sys.path.insert(0, str(Path(__file__).parents[1] / "review"))

import clinic
from clinic import Clinic, newest


@pytest.fixture
def known(lab: Lab, tmp_path: Path) -> Iterator[Clinic]:
    """A clinic that Lab's user has connected to before."""
    with clinic.open_clinic(tmp_path) as opened:
        key = tmp_path / "researcher.key"
        opened.researcher.save(key, PASSPHRASE)
        told = {"where": opened.url, "url": opened.url, "key": str(key), "project": "", "simulated": True}
        path = lab.server.folder / "rapha" / "sites" / "clinic.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told | {"name": "clinic", "site_key": str(opened.connect().key)}))
        yield opened
        path.unlink()


def test_what_waits_for_a_custodian_is_named_until_it_is_released(lab: Lab, known: Clinic) -> None:
    """The sidebar says who is waited for and under which name they find it; once released the job is done."""
    known.connect().run('patients.mean("age", epsilon=0.5)', "ward")
    custodian = known.custodian()
    subject = newest(custodian)["subject"]
    lab.command("rapha-lab:open-panel")
    waiting = lab.page.locator(".rapha-Section", has_text="Approvals waited for").locator(".rapha-Job")
    for said in ("Waits for approval", "ward at clinic", "waits for a custodian", subject[:12]):
        expect(waiting).to_contain_text(said)
    custodian.approve(subject)
    expect(waiting).to_have_count(0)
    done = lab.page.locator(".rapha-Panel .rapha-Job[data-state='done']", has_text="ward at clinic")
    expect(done).to_contain_text("ε 0.5 spent of 0.5 granted")
