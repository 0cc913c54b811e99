"""The airlock's tests have teeth: each part taken out lets an answer leave, or lose its wait, at a real desk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars
import pytest
from house import House, numbers

from rapha_lab.curator.airlock import Airlock
from rapha_lab.protocol.errors import RequestError, WaitingError
from rapha_lab.protocol.policy import Policy


@pytest.fixture
def house(tmp_path: Path) -> Any:
    """Where one custodian releases an aggregate."""
    frame = polars.DataFrame({"pid": [f"p{n}" for n in range(500)], "x0": [0.0] * 500, "y": [True] * 500})
    found = House(tmp_path, numbers("ward", 1, 500), frame)
    text = found.policy.text.replace('aggregate.release = "auto"', 'aggregate.release = "one custodian"')
    found.policy = Policy.parse(text)
    yield found
    found.ledger.close()


def test_an_answer_waits_at_the_desk_and_is_charged(house: Any) -> None:
    """However often it is asked; nothing was given."""
    for _ in range(2):
        with pytest.raises(WaitingError):
            house.patients.mean("x0", epsilon=1.0)
    assert house.releases == []
    assert house.spent() > 0
    assert len(Airlock(house.ledger).listed(house.key, house.policy)) == 1


def test_a_desk_that_does_not_ask_the_airlock_lets_it_out(
    house: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one call on which it hangs."""
    monkeypatch.setattr(Airlock, "pass_answer", lambda self, job: None)
    house.patients.mean("x0", epsilon=1.0)
    assert len(house.releases) == 1


def test_an_answer_without_room_in_the_airlock_costs_nothing(
    house: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is reserved; one that waits already is still asked for."""
    monkeypatch.setattr("rapha_lab.curator.airlock.MOST_WAITING", 2)
    for epsilon in (1.0, 0.5):
        with pytest.raises(WaitingError):
            house.patients.mean("x0", epsilon=epsilon)
    spent = house.spent()
    with pytest.raises(RequestError, match="Too much of yours waits"):
        house.patients.mean("x0", epsilon=0.25)
    with pytest.raises(WaitingError):
        house.patients.mean("x0", epsilon=1.0)
    assert house.spent() == spent


def test_what_cannot_be_made_to_wait_is_neither_settled_nor_given(
    house: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Charge and wait are one transaction: where the wait fails, no answer is kept that could be asked for again."""

    def fails(*args: Any, **more: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(Airlock, "hold", fails)
    with pytest.raises(Exception, match="could not be computed"):
        house.patients.mean("x0", epsilon=1.0)
    monkeypatch.undo()
    with pytest.raises(WaitingError):
        house.patients.mean("x0", epsilon=1.0)
    assert house.releases == []
