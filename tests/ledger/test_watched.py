"""Files that are asked for at every step of a loop are read when they change, and whenever that is not sure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rapha_lab.curator import watched
from rapha_lab.curator.watched import Watched


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A file that was written long ago."""
    path = tmp_path / "page"
    path.write_text("one")
    return path


def counted(path: Path, beside: Path) -> tuple[Watched[str], list[str]]:
    reads: list[str] = []

    def read() -> str:
        reads.append(path.read_text() + (beside.read_text() if beside.exists() else ""))
        return reads[-1]

    return Watched(read, path, beside), reads


def test_a_settled_file_is_read_once(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "TICK", 0)
    found, reads = counted(page, page.with_name("beside"))
    assert [found() for _ in range(3)] == ["one"] * 3
    assert len(reads) == 1


def test_a_file_that_has_just_changed_is_read_each_time(page: Path) -> None:
    """A second change could bear the same time."""
    found, _ = counted(page, page.with_name("beside"))
    before = os.stat(page)
    assert found() == "one"
    page.write_text("two")
    os.utime(page, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert found() == "two"


@pytest.mark.parametrize("kind", ["written", "exchanged", "beside came", "gone"])
def test_every_change_is_seen(page: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(watched, "TICK", 0)
    found, _ = counted(page, page.with_name("beside"))
    assert found() == "one"
    if kind == "written":
        page.write_text("other")
    elif kind == "exchanged":
        page.with_name("new").write_text("two")
        page.with_name("new").replace(page)
    elif kind == "beside came":
        page.with_name("beside").write_text("two")
    else:
        page.unlink()
        with pytest.raises(FileNotFoundError):
            found()
        return
    assert found() == {"written": "other", "exchanged": "two", "beside came": "onetwo"}[kind]


def test_what_could_not_be_read_is_tried_again(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "TICK", 0)
    bad = [True]

    def read() -> str:
        if bad and bad.pop():
            raise ValueError("torn")
        return page.read_text()

    found = Watched(read, page)
    with pytest.raises(ValueError, match="torn"):
        found()
    assert found() == "one"
