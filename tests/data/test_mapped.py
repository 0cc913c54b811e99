"""Rows that are too large for memory are read from a file without a name, as if they were in memory."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from wards import SALT, hospital

from rapha_lab.client.mock import mock, mock_tables
from rapha_lab.curator import cohort as cohorts
from rapha_lab.curator import mapped
from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.mechanisms import train
from rapha_lab.curator.noise import SeededNoise
from rapha_lab.protocol.errors import SiteError
from rapha_lab.protocol.messages import Fit, Optimizer
from rapha_lab.session.tracing import loss_program

NUMBERS = ["age", "crp", "sex", "site"]
INPUTS = {
    "one": "crp",
    "some": NUMBERS,
    "codes": "site",
    "labs": ["labs.value", "labs.code"],
    "words": "notes.text",
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "MEMORY", 0)
    monkeypatch.setattr(mapped, "PART", 256)


def ward_of(patients: int, folder: Path | None = None) -> Cohort:
    """Made-up patients with tables; the same ones for every number, as far as they go."""
    schema = hospital()
    frame = mock(schema, 100).head(patients)
    return Cohort(schema, frame, SALT, tables=mock_tables(schema, 100), scratch=folder)


def weights_of(cohort: Cohort) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model, loss = nn.Linear(6, 1), nn.BCEWithLogitsLoss()
    traced = loss_program(model, loss, {"x": torch.zeros(6)}, torch.zeros(()))
    ask = Fit(
        dataset="ward", split="all", epsilon=50.0, program=traced.program, steps=5, batch=20, clip=1.0,
        inputs={"x": NUMBERS, "target": "died"}, optimizer=Optimizer(name="sgd", settings={"lr": 1.0}),
    )  # fmt: skip
    plan = train.plan(ask, traced.blob, cohort.schema, 1e-5, SeededNoise(0))
    return load(plan.run(cohort.view("all"), lambda *_: None).tensors)


class Reads(TorchDispatchMode):
    """Takes note of which rows are read."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_select.default:
            self.places.append(args[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("split", ["all", "train"])
def test_rows_on_disk_are_those_in_memory(tmp_path: Path, split: str) -> None:
    """Columns, codes, tables and texts, bit for bit, with the row of zeros below; and the file has no name."""
    there, here = ward_of(90, tmp_path).view(split), ward_of(90).view(split)
    read, held = there.rows(INPUTS), here.rows(INPUTS)
    assert isinstance(read, mapped.OnDisk)
    assert not isinstance(held, mapped.OnDisk)
    for name, t in held.items():
        assert torch.equal(read[name], t), name
        assert not t[-1].any()
    assert not list(tmp_path.iterdir())


def test_a_training_from_disk_is_the_same(tmp_path: Path) -> None:
    """To the last bit."""
    read, held = weights_of(ward_of(90, tmp_path)), weights_of(ward_of(90))
    assert all(torch.equal(read[name], t) for name, t in held.items())


def test_the_file_does_not_tell_how_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size, and whether there is one, follow from the declared number."""
    sizes = []
    original = cohorts.on_disk
    monkeypatch.setattr(
        cohorts, "on_disk", lambda folder, shape, dtype: sizes.append(shape) or original(folder, shape, dtype)
    )
    for patients in (90, 60):
        ward_of(patients, tmp_path).view("all").rows({"x": NUMBERS})
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]
    # 100 declared are at most 230 in three splits; 75 lies between the two true numbers
    for rows, expected in ((240, False), (75, True)):
        monkeypatch.setattr(mapped, "MEMORY", 4 * 6 * rows)
        held = [ward_of(n, tmp_path).view("all").rows({"x": NUMBERS}) for n in (90, 60)]
        assert [isinstance(each, mapped.OnDisk) for each in held] == [expected] * 2


def test_as_many_rows_are_read_whoever_was_drawn(tmp_path: Path) -> None:
    """A row of nobody's is never read again and again: another patient's is, and counts for nothing."""
    rows = ward_of(90, tmp_path).view("all").rows({"x": NUMBERS})
    for drawn in ([], [3], [5, 80, 2]):
        places = torch.full((40,), 90)
        places[: len(drawn)] = torch.tensor(drawn, dtype=torch.int64)
        with Reads() as reads:
            found = mapped.taken(rows, places, 90)
        assert torch.equal(found["x"], rows["x"][places])
        assert all((read < 90).all() for read in reads.places)
        assert len(reads.places[0].unique()) > 20


def test_rows_are_asked_for_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of one input together, by the pages that hold them, and no others: nobody's row would tell how many there are."""
    rows = ward_of(90, tmp_path).view("all").rows({"x": NUMBERS, "labs": ["labs.value", "labs.code"]})
    honest, asked, advised = mapped.ask_for, [], []

    def noted(t: torch.Tensor, places: torch.Tensor) -> None:
        asked.append(places)
        honest(t, places)

    def madvise(page: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> None:
        advised.append((page.value, page.value + size.value, advice))

    monkeypatch.setattr(mapped, "ask_for", noted)
    with Reads() as reads:
        mapped.taken(rows, torch.tensor([5, 90, 80, 2, 90]), 90)
    assert len(asked) == 2
    assert all(torch.equal(a, b) for a, b in zip(asked, reads.places, strict=True))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(madvise=madvise))
    for t in rows.values():
        advised.clear()
        honest(t, torch.tensor([89, 0]))
        assert all(
            start % mmap.PAGESIZE == 0 and advice == mmap.MADV_WILLNEED for start, _, advice in advised
        )
        for (start, end, _), place in zip(advised, (89, 0), strict=True):
            assert start <= t[place].data_ptr()
            assert end == t[place].data_ptr() + t[place].numel() * t.element_size()


def test_a_disk_without_room_ends_the_training_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written, and with room left for the ledger."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    view = ward_of(90, tmp_path).view("all")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(SiteError, match="no room"):
            view.rows({"x": NUMBERS})
    monkeypatch.setattr(mapped, "LEFT", 1 << 60)
    with pytest.raises(SiteError, match="no room"):
        view.rows({"x": NUMBERS})


def test_two_jobs_do_not_take_the_same_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a disk with room for one and the ledger, the second that looks at the same time gets none."""
    free, both = [mapped.LEFT + 1500], threading.Barrier(2)

    def look(_: int) -> SimpleNamespace:
        found = SimpleNamespace(f_bavail=free[0], f_frsize=1)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        return found

    def take(*asked: int) -> None:
        free[0] -= asked[2]
        os.truncate(asked[0], asked[2])

    monkeypatch.setattr(os, "fstatvfs", look)
    monkeypatch.setattr(os, "posix_fallocate", take)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(mapped.on_disk, tmp_path, (1000,), torch.bool) for _ in range(2)]
    assert free[0] >= mapped.LEFT
    assert [type(job.exception()) for job in jobs].count(SiteError) == 1


def test_a_mutant_that_reads_nobodys_row_is_caught(tmp_path: Path, mutant) -> None:
    """Reading the row of zeros in each empty slot is quicker, by as much as there are."""
    broken = mutant(mapped, "torch.randint(max(nobody, 1), places.shape)", "places")
    rows = broken.OnDisk(x=torch.ones(91, 2))
    with Reads() as reads:
        broken.taken(rows, torch.full((40,), 90), 90)
    assert not all((read < 90).all() for read in reads.places)
