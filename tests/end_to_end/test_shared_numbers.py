"""A large model's numbers go between its loop and the curator in memory that both share, and nobody else's comes by them."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_running_cells import printed
from ward import FEATURES, Ward

from rapha_lab.client.site import Site
from rapha_lab.protocol import messages
from rapha_lab.session.worker import Worker

LOOP = f"""
import torch, torch.nn.functional as F
model = torch.nn.Sequential(torch.nn.Linear({len(FEATURES)}, 280), torch.nn.Tanh(), torch.nn.Linear(280, 280), torch.nn.Tanh(),
                            torch.nn.Linear(280, 1))
before = [p.detach().clone() for p in model.parameters()]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for batch in patients.train.batches(100, epochs=0.4, epsilon=2.0):
    loss = F.binary_cross_entropy_with_logits(model(batch[{FEATURES!r}]).squeeze(-1), batch["died"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("step")
"""
"""80,000 parameters: 320 kB."""

MOVED = """
moved = [bool((p != b).any()) for p, b in zip(model.parameters(), before)]
print(moved, bool(all(p.isfinite().all() for p in model.parameters())))
"""


@pytest.fixture
def site(serving: Ward) -> Iterator[Site]:
    """A connection whose sessions end with the test."""
    mine = serving.connect()
    yield mine
    mine.end_sessions()


def worker_of(serving: Ward, name: str) -> Any:
    """The running site's worker of a session."""
    return next(s._worker for key, s in serving.site.cells._sessions.items() if key[1] == name and not s.over)


def test_a_large_models_steps_pass_by_shared_memory(site: Site, serving: Ward) -> None:
    """Nothing of them goes through the session's pipe, but for the program, once; and the model learns."""
    site.run("x = 1", "ward", session="large").wait()
    worker = worker_of(serving, "large")
    assert worker.block is not None
    left = worker.reader.raw._left
    job = site.run(LOOP + MOVED, "ward", session="large").wait()
    text = printed(job)
    assert text.strip().endswith(f"{[True] * 6} True"), text
    steps = text.count("step")
    assert steps > 3
    size = 4 * (280 * (len(FEATURES) + 1) + 280 * 281 + 281)
    assert left - worker.reader.raw._left < steps * size / 2


def test_a_session_that_has_no_block_trains_through_its_pipes(site: Site, serving: Ward, monkeypatch) -> None:
    monkeypatch.setattr(serving.site.cells._blocks, "_free", [])
    site.run("x = 1", "ward", session="pipes").wait()
    assert worker_of(serving, "pipes").block is None
    assert site.run(LOOP, "ward", session="pipes").wait().state == "done"


FORGED = {
    "more than there is": 'say({"say": "ask", "number": 77, "ask": ask, "shared": 1 << 40})',
    "less than nothing": 'say({"say": "ask", "number": 77, "ask": ask, "shared": -5})',
    "a part of it": 'say({"say": "ask", "number": 77, "ask": ask, "shared": 1000})',
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_size_that_a_session_made_up_is_refused_and_harms_nobody(
    site: Site, serving: Ward, forged: str
) -> None:
    source = f"""
import msgspec
from rapha_lab.protocol import messages
opened = patients._ask(messages.Open(dataset="ward", split="train", epsilon=0.1, steps=2, batch=100, clip=1.0))[0]
ask = msgspec.Raw(messages.encode(messages.Gradient(loop=opened["loop"], inputs={{"x0": "age"}}, digest="none")))
it = patients._ask.__self__
say = it._say
{FORGED[forged]}
told, _ = it._next(it._answers)
print(told["number"], told["error"]["kind"])
"""
    job = site.run(source, "ward", session="forged").wait()
    assert "77 ProgramError" in str(job.outputs) or "77 RequestError" in str(job.outputs), job.outputs
    assert site.run("patients.count(epsilon=0.1)", "ward", session="forged").wait().state == "done"


@pytest.mark.parametrize("when", ["read", "write"])
def test_an_interrupt_waits_for_the_whole_answer(when: str) -> None:
    """Half a frame would be taken for the next one's beginning, and an answer on its way may be in the shared memory."""

    class Interrupting(io.BytesIO):
        def __init__(self, at: str) -> None:
            self.at = at
            super().__init__()

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            if when == self.at:
                worker._interrupted()
            return data

        def flush(self) -> None:
            if when == self.at:
                worker._interrupted()

    read, written = Interrupting("read"), Interrupting("write")
    for number in (1, 2):
        header = {"do": "answer", "number": number, "release": {}}
        frames = io.BytesIO()
        messages.write_frame(frames, messages.encode(header), b"answer %d" % number)
        read.write(frames.getvalue())
    read.seek(0)
    worker = Worker(read, written, memoryview(bytearray(messages.BLOCK)))
    step, numbers = messages.Gradient(loop="l", inputs={"x0": "age"}, digest="d"), bytes(2 * messages.PIPED)
    worker._busy = True
    with pytest.raises(KeyboardInterrupt):
        worker.ask(step, numbers)
    worker._busy = False
    assert 2 * read.tell() == len(read.getvalue())
    assert worker.ask(step, numbers)[1] == b"answer 2"
    with pytest.raises(EOFError):
        worker.ask(step)


@pytest.mark.parametrize("first", ["cell", "answer"])
def test_who_waits_reads_for_the_others(first: str) -> None:
    """A thread of a cell that has ended may ask while the next cell is awaited: each gets its own, whoever reads."""
    there, here = os.pipe()
    told, asked = dict[str, Any](), messages.Gradient(loop="l", inputs={"x0": "age"}, digest="d")
    frames = {"cell": {"do": "run"}, "answer": {"do": "answer", "number": 1, "release": {}}}
    with open(there, "rb") as reader, open(here, "wb") as writer:
        worker = Worker(reader, io.BytesIO())
        ways: dict[str, Callable[[], Any]] = {
            "cell": lambda: worker._next(worker._cells),
            "answer": lambda: worker.ask(asked),
        }
        threads = {
            name: threading.Thread(target=lambda n=name, w=way: told.update({n: w()}), daemon=True)
            for name, way in ways.items()
        }
        order = [first, *ways.keys() - {first}]
        for name in order:
            threads[name].start()
            time.sleep(0.2)
        for name in order:
            messages.write_frame(writer, messages.encode(frames[name]), name.encode())
            threads[name].join(20)
            assert told[name][1] == name.encode()
