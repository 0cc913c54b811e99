"""A real curator process whose pipe a test holds itself, to say what no honest gateway would."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from ward import FEATURES, Ward

from rapha_lab.enclave.curator import Curator
from rapha_lab.protocol import messages
from rapha_lab.session.patients import Patients


class Pipe:
    """Frames to and from one curator.

    Args:
        curator: started and open.
        ledger: the file of its ledger.
        researcher: who asks if nobody else is named.
    """

    def __init__(self, curator: Curator, ledger: Path, researcher: str) -> None:
        self.process, self.ledger, self.researcher = curator._process, ledger, researcher
        self._heard: dict[str, tuple[dict[str, Any], bytes]] = {}
        self._count = 0

    def write(self, header: Any, *request: bytes) -> None:
        """Write a frame, and a second one with a request and its tensors."""
        assert self.process.stdin is not None
        messages.write_frame(
            self.process.stdin, header if isinstance(header, bytes) else messages.encode(header)
        )
        if request:
            messages.write_frame(self.process.stdin, *request)

    def hear(self, job: str) -> tuple[dict[str, Any], bytes]:
        """The last word on a job."""
        assert self.process.stdout is not None
        while job not in self._heard:
            frame = messages.read_frame(self.process.stdout)
            assert frame is not None, "the curator ended"
            said = json.loads(frame[0])
            if "step" not in said:
                self._heard[said["id"]] = said, frame[1]
        return self._heard.pop(job)

    def send(self, request: Any, tensors: bytes = b"", job: str = "", **who: str) -> str:
        """Ask and don't wait; gives the job's number."""
        self._count += 1
        job = job or f"job-{self._count}"
        header = {"do": "ask", "id": job, "researcher": self.researcher, "project": "p"} | who
        self.write(header, request if isinstance(request, bytes) else json.dumps(request).encode(), tensors)
        return job

    def ask(self, request: Any, tensors: bytes = b"", job: str = "", **who: str) -> dict[str, Any]:
        """Ask and wait: {"release"} or {"error"}."""
        return self.hear(self.send(request, tensors, job, **who))[0]

    def look_up(self, what: str, **fields: Any) -> Any:
        """Something that costs nothing."""
        self._count += 1
        number = f"look-{self._count}"
        self.write({"do": what, "id": number, **fields})
        return self.hear(number)[0]["result"]

    def books(self) -> tuple[dict[str, int], int]:
        """What each account has spent, and how many jobs there ever were."""
        with contextlib.closing(sqlite3.connect(f"file:{self.ledger}?mode=ro", uri=True)) as db:
            spent = dict(db.execute("SELECT split, spent FROM account").fetchall())
            return spent, db.execute("SELECT count(*) FROM job").fetchone()[0]


@contextmanager
def piped(serving: Ward, folder: Path, **changed: Any) -> Iterator[Pipe]:
    """A curator like that of the running site, with a ledger of its own in `folder`."""
    ledger = folder / "ledger.sqlite"
    curator = Curator(serving.site._shards.connect)
    process = curator._process
    config = serving.site._curator._config | {"ledger": str(ledger)} | changed
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        messages.write_frame(process.stdin, messages.encode(config | {"workers": curator._channel}))
        first = messages.read_frame(process.stdout)
        assert first is not None
        assert "ready" in json.loads(first[0])
        yield Pipe(curator, ledger, str(serving.key.public))
    finally:
        curator.close()
        process.stdout.close()


class _Captured(Exception):
    pass


def requests(serving: Ward) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Honest requests as the session's own code makes them, each as JSON and tensors."""
    schema = serving.connect().dataset("ward").schema
    found: dict[str, tuple[dict[str, Any], bytes]] = {}

    def ask(request: messages.ASKS, tensors: bytes = b"") -> Any:
        found[str(type(request).__struct_config__.tag)] = msgspec.to_builtins(request), tensors
        raise _Captured

    patients, model = Patients(schema, ask), torch.nn.Linear(len(FEATURES), 1)
    how: dict[str, Any] = {"inputs": FEATURES, "target": "died", "epsilon": 1.0}
    for question in (
        lambda: patients.train.count(epsilon=1.0),
        lambda: patients.train.mean("age", epsilon=1.0),
        lambda: patients.train.histogram("age", epsilon=1.0),
        lambda: patients.train.fit(model, epochs=1, **how),
        lambda: patients.test.evaluate(model, ["auroc"], **how),
        lambda: next(patients.train.batches(200, epochs=1, epsilon=1.0)),
    ):
        with contextlib.suppress(_Captured):
            question()
    return found
