"""What a loop's next step draws is drawn while nobody waits: the same numbers, each used once, for a step that comes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
from house import House, numbers
from torch import Tensor, nn

from rapha_lab.curator import ahead
from rapha_lab.curator.ahead import Ahead
from rapha_lab.curator.mechanisms import train
from rapha_lab.curator.noise import SeededNoise

Call = tuple[str, int]


class Watched(SeededNoise):
    """Notes each draw, and what it gave."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.calls, self.given = list[Call](), list[Tensor]()

    def _noted(self, name: str, n: int, numbers: Tensor) -> Tensor:
        self.calls.append((name, n))
        self.given.append(numbers.clone())
        return numbers

    def gaussian(self, n: int) -> Tensor:
        return self._noted("gaussian", n, super().gaussian(n))

    def order(self, n: int) -> Tensor:
        return self._noted("order", n, super().order(n))

    def sample(self, n: int, rate: float) -> Tensor:
        return self._noted("sample", n, super().sample(n, rate))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Callable[..., House]]:
    """Houses of three hundred patients whose noise is noted."""
    made = list[House]()

    def house(works_ahead: bool = True) -> House:
        x = np.random.default_rng(0).uniform(-1, 1, (300, 2))
        frame = polars.DataFrame({"pid": [f"p{n}" for n in range(300)], "x0": x[:, 0], "x1": x[:, 1]})
        folder = tmp_path / str(len(made))
        folder.mkdir()
        schema = numbers("ward", 2, 300, outcome=False)
        made.append(House(folder, schema, frame, epsilon=1000.0, noise=Watched()))
        made[-1].works_ahead = works_ahead
        return made[-1]

    yield house
    for each in made:
        each.ledger.close()


def gradients(
    house: House, models: list[nn.Module], steps: int, between: Callable[[int], None] = int
) -> list[Tensor]:
    """Those of a loop whose steps take the models in turn."""
    found = []
    for k, batch in zip(
        range(steps), house.patients.train.batches(100, epochs=steps / 2, epsilon=50), strict=False
    ):
        model = models[k % len(models)]
        model.zero_grad()
        model(batch[["x0", "x1"]]).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
        between(k)
    return found


def test_the_numbers_are_those_that_would_have_been_drawn(house: Callable[..., House]) -> None:
    """With the same seed each step's gradient is the same, bit for bit, and one sample is drawn for each step."""
    model = nn.Linear(2, 3)
    one, other = house(True), house(False)
    both = [gradients(each, [model], 6) for each in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    assert [name for name, _ in one.desk._noise.calls].count("sample") == 7  # of one that did not come
    assert [name for name, _ in other.desk._noise.calls].count("sample") == 6


def test_no_number_is_used_twice(house: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where steps take other programs in turn, or the same one again: each step's noise is a draw of its own."""
    added, honest = list[Tensor](), train.private

    def watched(total: Any, *rest: Any) -> Any:
        before = total.flat.clone()
        honest(total, *rest)
        added.append(total.flat - before)
        return total

    monkeypatch.setattr(train, "private", watched)
    small, large, last = nn.Linear(2, 3), nn.Linear(2, 9), nn.Linear(2, 3)
    found = house()
    gradients(found, [small, small, small, large, large, small, last, last, large], 18)
    assert len(added) == 18
    assert len({round(float(t[0]), 9) for t in added}) == 18
    drawn = [
        t
        for (name, _), t in zip(found.desk._noise.calls, found.desk._noise.given, strict=True)
        if name == "gaussian"
    ]
    units = [
        any(torch.allclose(t / t[0], mine / mine[0], rtol=1e-3) for mine in drawn if len(mine) == len(t))
        for t in added
    ]
    assert all(units), "else what was added is not what was drawn"


def test_who_opts_out_after_the_sample_was_drawn_is_in_no_step_more(
    house: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ready sample holds everybody; the step looks at who is still there."""
    found, taken, honest = house(), list[set[int]](), train.clipped_sum

    def watched(*args: Any) -> Any:
        taken.append({*args[4].tolist()})
        return honest(*args)

    monkeypatch.setattr(train, "clipped_sum", watched)
    view = found.cohort.view("train")
    everybody = {*range(len(view))}

    def leaves(k: int) -> None:
        (opened,) = found.desk._loops.values()
        if k == 3:
            call, sample = opened.loop.noise._ready[0]
            assert call[0] == "sample"
            ready.update(sample.tolist())
            assert ready
            marks = found.cohort._marks[[*np.argsort(found.cohort._marked)]]
            gone = [marks[int(view._rows[row])].decode() for row in ready]
            found.cohort.leave_out(frozenset(gone))

    ready = set[int]()
    gradients(found, [nn.Linear(2, 1)], 6, leaves)
    assert all(step & everybody for step in taken[:4])
    assert not (taken[4] & everybody), "all that were drawn for it had left"
    assert not ready & taken[5]


def test_nothing_is_drawn_for_a_step_that_does_not_come(house: Callable[..., House]) -> None:
    """None after the last, none after two that differ; and what was ready goes with the loop."""
    found = house()
    model = nn.Linear(2, 1)
    for batch in found.patients.train.batches(100, epochs=1, epsilon=5):
        gone = [weakref.ref(kept.loop.noise) for kept in found.desk._loops.values()]
        model(batch[["x0", "x1"]]).square().sum().backward()
    steps = found.releases[-1].values["steps"]
    assert [name for name, _ in found.desk._noise.calls].count("sample") == steps
    gc.collect()
    assert gone[0]() is None
    before = len(found.desk._noise.calls)
    gradients(found, [nn.Linear(2, 1), nn.Linear(2, 2)], 6)
    drawn = [name for name, _ in found.desk._noise.calls[before:]]
    assert drawn.count("sample") == 6


class TestAhead:
    def test_what_does_not_fit_is_thrown_away(self) -> None:
        """Other amounts than were drawn get numbers of their own, and so does all that follows."""
        noise = Watched()
        made = Ahead(noise)
        for _ in range(2):
            made.begin()
            made.sample(9, 0.5), made.order(4), made.gaussian(6), made.gaussian(6)
        made.draw()
        assert len(made._ready) == 4
        made.begin()
        first = made.sample(9, 0.5)
        assert torch.equal(first, noise.given[8])
        given = [made.order(5), made.gaussian(6), made.gaussian(6)]
        assert all(torch.equal(a, b) for a, b in zip(given, noise.given[12:], strict=True))
        assert not made._ready

    def test_it_stops_where_the_thread_is_wanted_and_goes_on_in_the_step(self) -> None:
        """The step's numbers are the same then too."""
        for pieces in range(5):
            noise, plain = Watched(), Watched()
            made, left = Ahead(noise), iter([False] * pieces + [True] * 9)
            for turn in range(3):
                made.begin()
                for name in ("order", "gaussian", "gaussian"):
                    assert torch.equal(getattr(made, name)(8), getattr(plain, name)(8))
                if turn == 1:
                    made.draw(lambda left=left: next(left))  # type: ignore[misc]
                    assert len(made._ready) == min(pieces, 3)
            assert len(noise.calls) == 9

    def test_it_keeps_no_more_than_stated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ahead, "MOST", 25)
        made = Ahead(Watched())
        for _ in range(2):
            made.begin()
            for _ in range(4):
                made.gaussian(10)
        made.draw()
        made.draw()
        assert len(made._ready) == 2
