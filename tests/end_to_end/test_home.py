"""What the client keeps in a user's folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rapha_lab.client.home import read, write


def test_threads_that_remember_the_same_site_do_not_take_each_others_file(tmp_path: Path) -> None:
    """A list of jobs and a wish to cancel, both of which connect: one of them said that no such site was known."""
    path = tmp_path / "site.json"

    def again(number: int) -> None:
        for _ in range(500):
            write(path, {"by": number})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(again, range(4)))
    assert read(path)["by"] in range(4)
    assert [*tmp_path.iterdir()] == [path]
