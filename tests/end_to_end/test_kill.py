"""SIGKILL anywhere between reserve and release: what was let out is charged, and nothing is charged that was not touched."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hospital
import pytest
import ward
from mistakes import MISTAKES
from test_running_cells import LONG, until

from rapha_lab.enclave.curator import THREADS
from rapha_lab.protocol.errors import SiteError


class Hades:
    """The warm process that lets curators live and die; see mortal.py."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("mortal.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def _do(self, **order: Any) -> tuple[int, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        code, said = json.loads(self._process.stdout.readline())
        return code, said

    def live(self, mistake: str | None = None, point: int | None = None) -> tuple[int, Any, list[str]]:
        """One life: how it ended, what it said, and what of the promise does not hold afterwards."""
        self._count += 1
        world = str(self._folder / str(self._count))
        code, said = self._do(world=world, mistake=mistake, point=point)
        _, faults = self._do(world=world, mistake=mistake, check=True)
        return code, said, faults

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="module")
def hades() -> Iterator[Hades]:
    """With its worlds in memory: a killed process loses nothing it wrote there either."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        hades = Hades(Path(folder))
        yield hades
        hades.close()


def test_no_point_of_death_loses_or_doubles_a_charge(hades):
    """A mean, fits, a cancelled one, a refused one and two loops, killed at some ninety points of the desk's work."""
    code, said, faults = hades.live()
    assert (code, said["open"], faults) == (0, [], [])
    close = {point + near for point in said["replies"] for near in (-3, -2, -1, 0)}
    points = sorted(close | set(range(0, said["points"] - 25, 8)))
    kills = 0
    for point in points:
        code, said, faults = hades.live(point=point)
        assert code in (-signal.SIGKILL, 0), said
        assert faults == [], f"killed at point {point}"
        kills += code == -signal.SIGKILL
    assert kills >= 80


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_desk_with_this_mistake_is_caught(hades, mistake):
    """By the very checks that the honest one passes, alive or at some point of death."""
    code, said, faults = hades.live(mistake)
    assert code == 0, said
    if faults or said["open"]:
        return
    near = [point + d for point in said["replies"] for d in (0, 1, 2, -1, -2)]
    others = random.Random(5).sample(range(said["points"]), 60)
    for point in near[:40] + others:
        if hades.live(mistake, point)[2]:
            return
    pytest.fail("it was not caught")


def test_a_site_whose_curator_is_killed_in_a_fit_says_so_and_goes_on(tmp_path):
    """The cell gets a clear error, the next one runs, the ledger has what ran and the log is whole."""
    config, key = hospital.prepare(tmp_path, ward.SCHEMA, ward.frame(), "ward")
    with hospital.running(config) as (site, url):
        environment = Path(f"/proc/{site._curator.pid}/environ").read_text().split("\0")
        assert (
            f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', THREADS['OMP_NUM_THREADS'])}" in environment
        )
        connected = hospital.connected(url, key)
        connected.run("kept = patients.count(epsilon=0.1)", "ward").wait()
        job = connected.run(LONG, "ward")
        until(lambda: job.poll(0.5) is not None and job.told["step"] > 0)
        reserved = hospital.spent(tmp_path)["train"]
        os.kill(site._curator.pid, signal.SIGKILL)
        with pytest.raises(SiteError, match="curator's process ended") as caught:
            job.wait()
        assert "stay charged" in caught.value.why
        after = connected.run("print(kept.value > 0)\npatients.count(epsilon=0.2)", "ward").wait()
        assert after.outputs[0]["text"] == "True\n"
        assert len(after.releases) == 1
        charged = hospital.spent(tmp_path)["train"]
        assert 0 < charged < reserved
        entries = [json.loads(entry) for entry in site._curator.look_up("log", start=0)["entries"]]
        (recovered,) = [entry for entry in entries if entry["kind"] == "recover"]
        assert recovered["steps"] > 0
        assert entries[-1]["accounts"]["p/ward/train"]["spent"] == charged
