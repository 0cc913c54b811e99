"""Which processor cores compute on patients, and which run sessions."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapha_lab.enclave import cores
from rapha_lab.enclave.sandbox import Limits, Zygote


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 4))
def test_halves_share_no_core_and_no_hardware_thread_of_one(numbers: set[int], threads: int) -> None:
    """Else one side could time how busy the other is, and would empty its caches."""
    own, whole = tuple(sorted(numbers)), max(numbers) // threads + 1

    def siblings(core: int) -> str:
        return str(core % whole)  # as Linux numbers them: first one of each core, then the second of each

    curator, sessions = cores.halves(own, siblings)
    if len({siblings(core) for core in own}) == 1:
        assert curator == sessions == own
        return
    assert {*curator} | {*sessions} == numbers
    assert not {siblings(core) for core in curator} & {siblings(core) for core in sessions}
    assert abs(len({*map(siblings, curator)}) - len({*map(siblings, sessions)})) <= 1


def test_a_worker_stays_on_its_cores() -> None:
    if len(cores.ALL) < 2:
        pytest.skip("one core")
    with (
        Zygote("sandbox_cell:main", bare=True) as zygote,
        zygote.spawn(Limits(cores=cores.SESSIONS)) as worker,
    ):
        assert worker.pid is not None
        assert os.sched_getaffinity(worker.pid) == {*cores.SESSIONS}
