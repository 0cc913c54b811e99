"""Memory that a session and the curator share: one session's, without a descriptor, and of zeros for the next."""

import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rapha_lab.curator import blocks as curators
from rapha_lab.enclave.blocks import Blocks, affordable
from rapha_lab.enclave.sandbox import Worker, Zygote
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.messages import BLOCK


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """Workers that run what they are sent, with a block at hand."""
    with Zygote("sandbox_cell:sharing", bare=True) as mine:
        yield mine


@pytest.fixture
def blocks() -> Iterator[Blocks]:
    """Two of them."""
    yield (mine := Blocks(2))
    mine.close()


def run(worker: Worker, source: str) -> Any:
    """The `result` of a worker's snippet."""
    worker.writer.write(json.dumps(source).encode() + b"\n")
    worker.writer.flush()
    return json.loads(worker.reader.readline())


def test_both_sides_see_the_same_memory_and_the_worker_holds_no_descriptor_of_it(zygote, blocks) -> None:
    """A descriptor could cut the file short under the curator, whose process would die of that."""
    block = blocks.take()
    curator = curators.Blocks(blocks.fds)
    with zygote.spawn(block=block) as worker:
        assert run(worker, f"result = len(block) == {BLOCK}")["value"]
        run(worker, "block[:5] = b'there'")
        assert curator.read(block.number, 5) == b"there"
        curator.write(block.number, b"back")
        assert run(worker, "result = bytes(block[:4]).decode()")["value"] == "back"
        folder = Path(f"/proc/{worker.pid}/fd")
        if os.access(folder, os.R_OK):
            assert len(os.listdir(folder)) == 5
        for call in (f"import os; os.ftruncate({block.fd}, 0)", "import mmap; mmap.mmap(-1, 9)"):
            assert "error" in run(worker, call), call


def test_the_next_session_gets_zeros_and_nobody_gets_anothers(zygote, blocks) -> None:
    first, second = blocks.take(), blocks.take()
    assert first.number != second.number
    assert blocks.take() is None
    with zygote.spawn(block=first) as mine, zygote.spawn(block=second) as other:
        run(mine, f"block[:6] = b'secret'; block[{BLOCK} - 6:] = b'secret'")
        assert run(other, "result = any(bytes(block[::4096])) or any(bytes(block[-4096:]))")["value"] is False
    mine.wait(10)
    blocks.give_back(first)
    again = blocks.take()
    assert again == first
    with zygote.spawn(block=again) as next_one:
        assert (
            run(next_one, "result = any(bytes(block[::4096])) or any(bytes(block[-4096:]))")["value"] is False
        )
    with mmap.mmap(first.fd, BLOCK) as memory:
        assert memory[:] == bytes(BLOCK)


def test_more_than_the_reader_wants_is_not_copied(blocks) -> None:
    with pytest.raises(RequestError, match="longer"):
        curators.Blocks(blocks.fds).read(0, BLOCK, 1000)


def test_all_blocks_together_are_a_small_part_of_the_machine() -> None:
    """None on one that has no gigabyte: sessions use their pipes there."""
    assert [affordable(gib << 30) for gib in (0, 1, 4, 24, 64, 1024)] == [0, 1, 4, 24, 64, 64]


@pytest.mark.parametrize(("number", "size"), [(-1, 9), (2, 9), (0, 0), (0, -1), (0, BLOCK + 1), (0, 1 << 62)])
def test_a_size_or_block_that_is_not_there_is_refused(blocks, number: int, size: int) -> None:
    with pytest.raises(RequestError):
        curators.Blocks(blocks.fds).read(number, size)


def test_what_was_read_is_the_curators_own(blocks) -> None:
    """Else a session could change the numbers between their check and their use."""
    block, curator = blocks.take(), curators.Blocks(blocks.fds)
    with mmap.mmap(block.fd, BLOCK) as session:
        session[:4] = b"good"
        read = curator.read(block.number, 4)
        session[:4] = b"evil"
    assert read == b"good"


def test_a_block_that_is_given_back_twice_is_not_given_to_two(blocks) -> None:
    """Two who clean up after one session: the second must take it from nobody who has it by then."""
    first = blocks.take()
    blocks.take()
    blocks.give_back(first)
    blocks.give_back(first)
    again = blocks.take()
    assert blocks.take() is None
    with mmap.mmap(again.fd, BLOCK) as memory:
        memory[:6] = b"theirs"
        blocks.give_back(first)
        assert memory[:6] == b"theirs"
    assert blocks.take() is None


def test_what_was_written_after_it_was_given_back_is_gone_when_the_next_gets_it(blocks) -> None:
    """By the last breath of a session whose zygote died before it, or by the curator."""
    block = blocks.take()
    with mmap.mmap(block.fd, BLOCK) as late:
        blocks.give_back(block)
        late[:6] = b"secret"
        next_one = blocks.take()
        assert next_one.fd == block.fd
        assert late[:6] == bytes(6)


def test_nobody_can_change_its_size(blocks) -> None:
    """Whoever touched what was cut off would die of it, the curator too."""
    block = blocks.take()
    for size in (0, BLOCK // 2, 2 * BLOCK):
        with pytest.raises(PermissionError):
            os.ftruncate(block.fd, size)
