"""Patients' rows as programs see them, and nobody's row of zeros below: on the site's own disk where they are many.

What is too large for memory goes into a file without a name in the site's folder of state, which the deployment
encrypts as it does the records: it is gone when the process ends, however it ends. Whether rows go there, and how
large the file is, follows from the declared number of patients. A step reads as many rows of it whoever was drawn,
all of them asked for at once; which of them the kernel still has in memory is nothing that can be hidden, and depends
on earlier draws.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rapha_lab.protocol.errors import SiteError

__all__ = ["MEMORY", "OnDisk", "ask_for", "filled", "on_disk", "taken", "with_nobody"]

MEMORY = 1 << 30
"""Bytes of one input's rows up to which they are held in memory."""
LEFT = 1 << 30
"""Bytes of the disk that are left to the ledger, which is on it too."""
PART = 1 << 24
"""Bytes of rows that are made at a time for the disk."""

_taking = threading.Lock()  # two jobs that look for room at once would both find it


class OnDisk(dict[str, Tensor]):
    """Rows by input of which some are read from disk."""


def with_nobody(rows: Tensor) -> Tensor:
    """The rows with one of zeros below, which fills the slots that no patient was drawn for."""
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])


def on_disk(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a file of no name.

    Raises:
        SiteError: if the disk has no room for it.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            with _taking:
                disk = os.fstatvfs(file.fileno())
                if disk.f_bavail * disk.f_frsize < size + LEFT:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                # all of it now: a write into a hole of a full disk would end the process
                os.posix_fallocate(file.fileno(), 0, size)
            held = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise SiteError(
            "The site's disk has no room for the records as this model reads them.",
            f"The system says: {error.strerror}.",
            "Tell the site's operator, or train on fewer inputs.",
        ) from None
    held.madvise(mmap.MADV_RANDOM)  # drawn rows lie anywhere: what the kernel reads besides is for nothing
    return torch.frombuffer(held, dtype=dtype).view(shape)


def filled(out: Tensor, count: int, rows: Callable[[int, int], Tensor]) -> Tensor:
    """The first `count` rows and nobody's, of `out`, made of `rows(start, end)` part by part."""
    step = max(1, PART // max(1, math.prod(out.shape[1:]) * out.element_size()))
    for start in range(0, count, step):
        end = min(start + step, count)
        out[start:end] = rows(start, end)
    return out[: count + 1]


def ask_for(rows: Tensor, places: Tensor) -> None:
    """Have the kernel fetch the rows in these places together: one by one, each would wait for the disk by itself."""
    madvise, size = ctypes.CDLL(None).madvise, rows.stride(0) * rows.element_size()
    for place in places.tolist():
        first = rows.data_ptr() + place * size
        page = first - first % mmap.PAGESIZE
        madvise(ctypes.c_void_p(page), ctypes.c_size_t(first + size - page), mmap.MADV_WILLNEED)


def taken(rows: Mapping[str, Tensor], places: Tensor, nobody: int) -> dict[str, Tensor]:
    """The rows in these places, zeros where a place is `nobody`'s."""
    if not isinstance(rows, OnDisk):
        return {name: t.index_select(0, places) for name, t in rows.items()}
    there = places != nobody
    # any row is read for nobody's place, so that as many are read whoever was drawn
    read = torch.where(there, places, torch.randint(max(nobody, 1), places.shape))
    for t in rows.values():
        if t.untyped_storage().nbytes() > MEMORY:  # of a public size; smaller ones are in memory
            ask_for(t, read)
    found = {name: t.index_select(0, read) for name, t in rows.items()}
    return {name: t.where(there.view(-1, *[1] * (t.dim() - 1)), t.new_zeros(())) for name, t in found.items()}
