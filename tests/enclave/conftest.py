"""One warm zygote per tier for all tests here: loading the libraries takes seconds, a worker none."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from rapha_lab.enclave.sandbox import Limits, Worker, Zygote
from rapha_lab.protocol.errors import SiteError


class Cell:
    """A worker that runs snippets of Python; `run` gives their `result`."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def tell(self, source: str) -> None:
        """Send a snippet without waiting for its answer."""
        self.worker.writer.write(json.dumps(source).encode() + b"\n")
        self.worker.writer.flush()

    def answer(self) -> dict[str, Any]:
        """The next answer."""
        line = self.worker.reader.readline()
        assert line, f"the worker ended: {self.worker.wait(10)}"
        return json.loads(line)

    def run(self, source: str) -> Any:
        """The value of a snippet's name `result`; fails if it raises."""
        self.tell(source)
        answer = self.answer()
        assert "error" not in answer, answer["trace"]
        return answer["value"]

    def error(self, source: str) -> tuple[str, str]:
        """The kind and text of what a snippet raises."""
        self.tell(source)
        answer = self.answer()
        return answer["error"], answer["text"]


@pytest.fixture(scope="session", params=["S3", "S2"])
def zygote(request: pytest.FixtureRequest) -> Iterator[Zygote]:
    """A warm zygote of each tier this machine has."""
    try:
        warm = Zygote("sandbox_cell:main", (), request.param)
    except SiteError as error:
        if request.param == "S3":
            pytest.skip(f"no S3 here: {error}")
        raise
    with warm:
        assert warm.tier == request.param
        yield warm


@pytest.fixture
def cell(zygote: Zygote) -> Iterator[Cell]:
    """A fresh worker."""
    with zygote.spawn(Limits(cpu_seconds=120, wall_seconds=120)) as worker:
        yield Cell(worker)
