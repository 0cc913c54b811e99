"""Progress bars in cells: `tqdm(batches)` goes through what it is given and draws nothing, as the job's card says how far it is.

A bar would come as an output for each of its states. `tqdm` itself need not be installed at a site.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

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
    before = {name: sys.modules.get(name) for name in _NAMES}
    for name in _NAMES:
        module = ModuleType(name)
        module.tqdm, module.trange = Bar, lambda *args, **_: Bar(range(*args))  # type: ignore[attr-defined]
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, module_before in before.items():
            sys.modules.pop(name)
            if module_before is not None:
                sys.modules[name] = module_before
