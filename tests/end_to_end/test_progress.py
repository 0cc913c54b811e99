"""What is being waited for, said in one line where somebody waits."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

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
