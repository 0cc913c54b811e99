"""Progress bars in cells: `tqdm(batches)` goes through what it is given and draws nothing, as the job's card says how far it is.

A bar would come as an output for each of its states. `tqdm` itself need not be installed at a site.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rapha_lab.session.standins import standing_in

__all__ = ["Bar", "undrawn"]

_NAMES = ("tqdm", "tqdm.auto", "tqdm.notebook", "tqdm.autonotebook", "tqdm.std")


class Bar:
    """Stands in a cell for `tqdm.tqdm`."""

    def __init__(self, iterable: Any = None, *_: Any, total: int | None = None, **__: Any) -> None:
        self._iterable, self.total, self.n = iterable, total, 0.0

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.n += 1

    def __len__(self) -> int:
        return len(self._iterable)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def update(self, n: float = 1) -> None:
        """Count on."""
        self.n += n

    @staticmethod
    def write(text: str, *_: Any, **__: Any) -> None:
        """Print."""
        print(text)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_, **__: None  # set_postfix, set_description, refresh, close and the like


@contextmanager
def undrawn(source: str) -> Iterator[None]:
    """While a cell runs that speaks of tqdm, its bars are the above."""
    if "tqdm" not in source:
        yield
        return
    names = {"tqdm": Bar, "trange": lambda *args, **_: Bar(range(*args)), "tqdm_notebook": Bar}
    with standing_in(dict.fromkeys(_NAMES, names)):
        yield
