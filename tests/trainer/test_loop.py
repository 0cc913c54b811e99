"""A training loop against a real desk and ledger: what it pays, when, and that no step is free."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars
import pytest
import torch
import torch.nn.functional as F
from house import House, numbers
from torch import nn

from rapha_lab.curator.desk import Caller
from rapha_lab.curator.funds import follow
from rapha_lab.curator.ledger import PATIENCE
from rapha_lab.curator.lift import compiling
from rapha_lab.curator.mechanisms import loop, train
from rapha_lab.curator.mechanisms.loop import Loop
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import BudgetError, PolicyError, RaphaError, RequestError
from rapha_lab.protocol.policy import Policy
from rapha_lab.session import patients
from rapha_lab.session.patients import _Gradients

N, COLUMNS = 600, ["x0", "x1", "x2"]
OPEN = messages.Open(dataset="clinic", split="train", epsilon=0.1, steps=4, batch=100, clip=1.0)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Six hundred patients whose outcome follows from three numbers."""
    x = np.random.default_rng(0).uniform(-1, 1, (N, 3))
    columns = {"pid": [f"p{n}" for n in range(N)], "y": x.sum(1) > 0}
    frame = polars.DataFrame(columns | {name: x[:, k] for k, name in enumerate(COLUMNS)})
    found = House(tmp_path, numbers("clinic", 3, N), frame)
    yield found
    found.ledger.close()


@pytest.fixture
def followed(house: House, tmp_path: Path) -> House:
    """The same, whose ledger follows what the custodians sign, which is ε = 5."""
    house.desk._policy = follow(house.ledger, lambda: house.policy, tmp_path / "policy.toml")
    sign(house, 5.0)
    return house


def step(model: nn.Module, batch: Any) -> None:
    F.binary_cross_entropy_with_logits(model(batch[COLUMNS])[:, 0], batch["y"].float()).backward()


def test_a_loop_learns_and_pays_for_its_steps(house: House) -> None:
    """Its release says the ε that was asked, and the ledger holds no more than that."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for batch in house.patients.train.batches(size=100, epochs=5, epsilon=4, clip=1.0):
        optimizer.zero_grad()
        step(model, batch)
        optimizer.step()
    x = torch.rand(500, 3) * 2 - 1
    assert float(((model(x)[:, 0] > 0) == (x.sum(1) > 0)).float().mean()) > 0.9
    (release,) = house.releases
    assert release.values["steps"] == sum(house.steps) == 21
    assert 3.9 < house.spent() <= 4.0


def test_a_loop_goes_on_with_a_program_that_the_site_forgot(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that goes up and down makes a program of each of its values; sent anew, it costs no step."""
    monkeypatch.setattr(loop, "MOST", 2)
    monkeypatch.setattr(patients, "_PROGRAMS", 4)
    model = nn.Linear(3, 1)
    for k, batch in enumerate(house.patients.train.batches(size=100, epochs=4, epsilon=1)):
        loss = F.binary_cross_entropy_with_logits(model(batch[COLUMNS])[:, 0], batch["y"].float())
        (loss * (1.0 + k % 3)).backward()
    (release,) = house.releases
    assert release.values["steps"] == sum(house.steps) == 17


def test_an_open_loop_keeps_no_room_for_large_sums(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight loops of sixteen programs each would fill the curator's memory."""
    for room, kept in ((4, 1), (3, 0)):
        monkeypatch.setattr(loop, "ROOM", room)
        model = nn.Linear(3, 1)
        for batch in house.patients.train.batches(size=100, epochs=0.5, epsilon=0.5):
            step(model, batch)
            (opened,) = house.desk._loops.values()
            assert sum(known.total is not None for known in opened.loop._known.values()) == kept
            assert model.weight.grad is not None
            model.weight.grad = None


@pytest.mark.parametrize(("room", "kept"), [(1500, 1), (5000, 3)])
def test_open_loops_together_keep_no_more_rows_than_a_question_may_have(
    house: House, monkeypatch: pytest.MonkeyPatch, room: int, kept: int
) -> None:
    """Each has up to 4 GiB, and eight of them would fill the curator's memory; who was used longest ago makes them anew."""
    monkeypatch.setattr(loop, "ROWS", room)
    monkeypatch.setattr(loop, "_keeping", weakref.WeakKeyDictionary())
    several = [house.patients.train.batches(size=100, epochs=0.5, epsilon=0.5) for _ in range(3)]
    for batches in zip(*several, strict=True):
        for model, batch in ((nn.Linear(3, 1), batch) for batch in batches):
            step(model, batch)
            assert model.weight.grad is not None
            opened = [each.loop for each in house.desk._loops.values()]
            assert len(opened) == 3
            assert sum(bool(found._rows) for found in opened) <= kept
    assert len(house.releases) == 3


def test_accumulated_gradients_are_paid_each(house: House) -> None:
    """Two backwards on one batch are two steps; a loop that asks for more than it opened is refused before data."""
    model, batches = nn.Linear(3, 1), house.patients.train.batches(size=100, epochs=0.7, epsilon=1)
    with pytest.raises(BudgetError, match="more steps"):  # noqa: PT012
        for batch in batches:
            step(model, batch)
            step(model, batch)
    assert sum(house.steps) == 3


def test_nobody_holds_the_budget_with_loops_they_do_not_run(house: House) -> None:
    """The ninth open loop is refused before anything is reserved; when one is closed there is room again."""
    opened = [house.patients.train.batches(size=100, epochs=1, epsilon=0.1) for _ in range(9)]
    for batches in opened[:8]:
        next(batches)
    with pytest.raises(RequestError, match="too many training loops") as refused:
        next(opened[8])
    assert refused.value.field == "op"
    opened[0].close()
    next(house.patients.train.batches(size=100, epochs=1, epsilon=0.1))
    for batches in opened[1:8]:
        batches.close()
    assert house.spent() == 0


def test_a_loop_that_was_left_standing_makes_room_for_another(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the ledger has ended it, it is none of its owner's eight, and a step of it is refused."""
    now = [0.0]
    monkeypatch.setattr(house.ledger, "_clock", lambda: now[0])
    opened = [house.ask(OPEN, b"")[0]["loop"] for _ in range(8)]
    now[0] += PATIENCE + 1
    house.ask(OPEN, b"")
    assert len(house.desk._loops) == 1
    step = messages.Gradient(loop=opened[0], inputs={"x": "x0"}, digest="")
    with pytest.raises(RequestError, match="no such loop"):
        house.ask(step, b"")
    house.desk.sweep("c")
    assert not house.desk._loops
    assert house.spent() == 0


def sign(house: House, epsilon: float) -> None:
    """A page with another budget."""
    was = house.policy.project("p").epsilon
    house.policy = Policy.parse(house.policy.text.replace(f"epsilon = {was}", f"epsilon = {epsilon}"))


@pytest.mark.parametrize(("signed", "steps"), [(4.9, 21), (4.5, 5)])
def test_a_loop_that_no_longer_fits_a_smaller_budget_ends_at_its_next_step(
    followed: House, signed: float, steps: int
) -> None:
    """What ran stays charged and has its release; what still fits goes on, and so does whoever asks afterwards."""
    model, taken = nn.Linear(3, 1), 0
    with contextlib.suppress(PolicyError):
        for batch in followed.patients.train.batches(size=100, epochs=5, epsilon=4.8):
            step(model, batch)
            taken += 1
            if taken == 5:
                sign(followed, signed)
    assert [release.values["steps"] for release in followed.releases] == [taken] == [steps]
    before = followed.spent()
    assert 0 < before < signed
    followed.patients.train.mean("x0", epsilon=0.01)
    assert before < followed.spent() < signed
    assert followed.ledger.statement("p", "clinic", "train").epsilon == signed


def test_a_fit_that_no_longer_fits_a_smaller_budget_ends_at_its_next_block(followed: House) -> None:
    """It releases nothing, and what ran stays charged."""

    class Signing(list[Any]):
        def append(self, far: Any) -> None:
            super().append(far)
            if far[0] == 3:
                sign(followed, 4.5)

    followed.told = Signing()
    how = {"inputs": COLUMNS, "target": "y", "batch": 100, "epochs": 5, "epsilon": 4.8}
    with pytest.raises(PolicyError, match="ends at its next step"):
        followed.patients.train.fit(nn.Linear(3, 1), nn.BCEWithLogitsLoss(), **how)
    assert sum(followed.steps) == 4
    assert not followed.releases
    followed.patients.train.mean("x0", epsilon=0.01)
    assert 0 < followed.spent() < 4.5


def test_an_idle_loop_keeps_a_smaller_budget_out_for_no_longer_than_its_hour(
    followed: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others who ask this account are refused while it holds more than was signed, and no longer once it has timed out."""
    now = [0.0]
    monkeypatch.setattr(followed.ledger, "_clock", lambda: now[0])
    followed.ask(msgspec.structs.replace(OPEN, epsilon=4.4), b"")
    sign(followed, 4.0)
    with pytest.raises(PolicyError, match="held by a training"):
        followed.patients.train.mean("x0", epsilon=0.01)
    followed.patients.test.mean("x0", epsilon=0.01)
    now[0] += PATIENCE + 1
    followed.patients.train.mean("x0", epsilon=0.01)


def test_a_steps_numbers_are_read_once_all_else_is_in_order(house: House) -> None:
    """They may be 64 MB in shared memory, for a message of a hundred bytes; and no more than its program has."""
    read, send = list[int](), house.desk.answer

    def shared(caller: Any, request: bytes, tensors: bytes, *more: Any) -> Any:
        asked = messages.decode(request)
        if not isinstance(asked, messages.Gradient):
            return send(caller, request, tensors, *more)

        def numbers(most: int) -> bytes:
            read.append(most)
            return tensors

        for wrong in ({"loop": "other"}, {"digest": "none", "program": None}, {"inputs": {"x": "gone"}}):
            bad = msgspec.structs.replace(asked, **wrong)
            if asked.program is None or "inputs" not in wrong:
                with pytest.raises(RaphaError):
                    send(caller, messages.encode(bad), b"", *more, numbers)
        assert not read
        answer = send(caller, request, b"", *more, numbers)
        assert len(tensors) <= read.pop() < len(tensors) + 8192
        return answer

    house.desk.answer = shared  # type: ignore[method-assign]
    model = nn.Linear(3, 1)
    for batch in house.patients.train.batches(size=100, epochs=0.6, epsilon=1):
        step(model, batch)
    assert sum(house.steps) == 3


def test_only_a_step_has_its_numbers_in_shared_memory(house: House) -> None:
    caller = Caller(house.key, "p", "c-x")
    with pytest.raises(RequestError, match="Only a step"):
        house.desk.answer(
            caller, messages.encode(OPEN), b"", lambda *_: None, shared=lambda most: bytes(most)
        )


def test_loops_opened_at_once_are_counted_each(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve that threads ask for together eight are opened."""
    count = house.desk._open_loops

    def slow(researcher: str) -> int:
        found = count(researcher)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(house.desk, "_open_loops", slow)
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(house.ask, OPEN, b"") for _ in range(12)]
    refused = [done.exception() for done in asked if done.exception() is not None]
    assert len(refused) == 4
    assert all("too many training loops" in str(error) for error in refused)
    house.desk.sweep("c")


def test_one_of_two_that_close_a_loop_at_once_gets_its_release(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other is told that there is no such loop; nothing fails inside, nothing is charged twice."""
    loop = house.ask(OPEN, b"")[0]["loop"]
    look_up, both = house.desk._loop, threading.Barrier(2)

    def together(*args: Any) -> Any:
        found = look_up(*args)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # the other comes this far too, or waits for this one
        return found

    monkeypatch.setattr(house.desk, "_loop", together)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(house.ask, messages.Close(loop=loop), b"") for _ in range(2)]
    (refused,) = [error for error in (done.exception() for done in asked) if error is not None]
    assert isinstance(refused, RequestError)
    assert refused.field == "loop"
    assert house.spent() == 0


def test_what_is_not_used_comes_back(house: House) -> None:
    """A loop left after a few of its steps pays for the blocks begun; one left at once pays nothing."""
    model = nn.Linear(3, 1)
    for _ in house.patients.train.batches(size=100, epochs=50, epsilon=4):
        break
    assert house.spent() == 0.0
    for number, batch in enumerate(house.patients.train.batches(size=100, epochs=50, epsilon=4)):
        step(model, batch)
        if number == 4:
            break
    assert house.steps == [4, 4]  # blocks of a fiftieth of 211 steps
    assert 0 < house.spent() < 2


@pytest.mark.parametrize("epochs", [0.9, 12.0, 35.3])
def test_every_step_was_announced_before_it_ran(
    house: House, epochs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the loop, at each moment the ledger holds at least the steps that ran, and in the end all."""
    ran = 0
    original = Loop._inputs

    def counting(self: Loop, *args: Any) -> Any:
        nonlocal ran
        ran += 1
        assert ran <= sum(house.steps)
        return original(self, *args)

    monkeypatch.setattr(Loop, "_inputs", counting)
    model = nn.Linear(3, 1)
    loop = house.patients.train.batches(size=100, epochs=epochs, epsilon=4)
    batch = None
    for batch in loop:
        step(model, batch)
    assert ran == sum(house.steps)
    with pytest.raises(RaphaError):  # the loop is closed
        step(model, batch)
    assert ran == sum(house.steps)


def test_steps_at_once_are_not_free(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads that ask one loop together get as many gradients as it opened, and not one more."""
    last: list[Any] = []
    original = _Gradients.__call__

    def noted(self: _Gradients, *args: Any) -> Any:
        last[:] = args
        return original(self, *args)

    monkeypatch.setattr(_Gradients, "__call__", noted)
    loop = house.patients.train.batches(size=100, epochs=30, epsilon=4)
    batch = next(loop)
    step(nn.Linear(3, 1), batch)
    given: list[int] = []

    def hammer() -> None:
        for _ in range(60):
            try:
                original(batch.gradients, *last)
            except RaphaError:
                return
            given.append(1)

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 + len(given) == sum(house.steps) == 126


def test_a_program_travels_once(house: House) -> None:
    """Afterwards its digest stands for it."""
    sent: list[bytes] = []
    ask = house.ask

    def noted(request: messages.ASKS, tensors: bytes) -> Any:
        sent.append(messages.encode(request))
        return ask(request, tensors)

    house.ask = noted  # type: ignore[method-assign]
    model = nn.Linear(3, 1)
    for batch in house.patients.train.batches(size=100, epochs=1, epsilon=1):
        step(model, batch)
    gradients = [body for body in sent if b'"gradient"' in body]
    assert len(gradients) == 5
    assert [b'"nodes"' in body for body in gradients] == [True, False, False, False, False]


def test_a_model_given_to_torch_compile_runs_as_written(house: House) -> None:
    """In a cell, with and without arguments of the compiler's."""
    from rapha_lab.session.interpreter import Screen, run

    cell = """
import torch
model = torch.compile(torch.nn.Linear(3, 1), mode="max-autotune")
double = torch.compile(mode="default")(lambda x: 2 * x)
for batch in patients.train.batches(size=100, epochs=0.1, epsilon=1):
    double(model(batch[["x0", "x1", "x2"]])).square().mean().backward()
"""
    compiler, namespace = torch.compile, {"patients": house.patients}
    run(cell, namespace, Screen(lambda output: None))
    assert namespace["model"].weight.grad is not None  # type: ignore[attr-defined]
    assert torch.compile is compiler


def test_who_waits_for_a_compiler_is_told(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a loop as by a fit, as long as it lasts, before any step and apart from them."""
    monkeypatch.setattr(train, "WORTH", -1e9)
    monkeypatch.setattr(train, "compile_noise", lambda assembled: True)
    monkeypatch.setattr(compiling, "_steps", {})
    monkeypatch.setattr(compiling, "_machine_code", lambda graph, example: lambda tensors: graph(*tensors))
    model, part = nn.Linear(3, 1), house.patients.train
    part.fit(model, nn.BCEWithLogitsLoss(), inputs=COLUMNS, target="y", batch=100, epochs=1, epsilon=1)
    waits = [far[0] for far in house.told if far[3:] and far[3]]
    assert len(waits) > 1
    assert house.told[0][3] == train.TESTING
    assert {far[3] for far in house.told[1 : len(waits)]} == {train.COMPILING}
    assert set(waits) == {0}
    assert [far[0] for far in house.told[len(waits) :]] == [*range(len(house.told) - len(waits))]
    assert house.releases[-1].values["engine"].startswith("compiled in")
    house.told.clear()
    for batch in part.batches(size=120, epochs=1, epsilon=1, clip=1.0):
        step(model, batch)
    doing = [far[3] for far in house.told if len(far) > 3 and far[3]]
    assert doing[0] == train.TESTING
    assert set(doing[1:]) == {train.COMPILING}
    assert house.releases[-1].values["engine"].startswith("compiled in")
