"""What is being waited for, said in one line where somebody waits."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading

import pytest

from rapha_lab.client import progress

SAID = """
from rapha_lab.client import progress
progress.QUICK = {quick}
line = progress.Progress()
line.say("Starting")
line.say("Verifying")
line.end("Connected")
"""


def shown(quick: float) -> str:
    """What a terminal is sent."""
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", SAID.format(quick=quick)], stderr=theirs, check=True)
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        return os.read(ours, 1000).decode()
    except (BlockingIOError, OSError):
        return ""
    finally:
        os.close(ours)


def test_a_terminal_shows_one_line_that_is_updated() -> None:
    """Each text in the place of the one before; the last stays, and nothing is said of what was quick."""
    assert shown(quick=0.0) == (
        "\r\x1b[KStarting … 0 s\r\x1b[KVerifying … 0 s\r\x1b[KConnected after 0 s.\r\n"
    )
    assert shown(quick=60.0) == ""


def test_what_cannot_speak_for_itself_is_spoken_for_if_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an import: once while it lasts, and when it has ended; nothing if it is quick."""
    said, spoken = list[str](), threading.Event()

    def line(text: str, last: bool = False) -> None:
        said.append(text)
        spoken.set()

    monkeypatch.setattr(progress, "_line", lambda: line)
    monkeypatch.setattr(progress, "USUAL", 60.0)
    with progress.Progress().during("Loading", "Loaded"):
        pass
    assert not said
    monkeypatch.setattr(progress, "QUICK", 0.0)
    monkeypatch.setattr(progress, "USUAL", 0.01)
    with progress.Progress().during("Loading", "Loaded"):
        assert spoken.wait(20)
    assert [text.split()[0] for text in said] == ["Loading", "Loaded"]
