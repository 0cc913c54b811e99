"""Modules of other names, that stand in `sys.modules` while a cell runs which imports them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

__all__ = ["standing_in"]


@contextmanager
def standing_in(
    modules: Mapping[str, Mapping[str, Any]], refuse: Callable[[str, str], NoReturn] | None = None
) -> Iterator[None]:
    """While it lasts, `import` finds these modules with these names in them, installed or not.

    Args:
        modules: names by module, parents first.
        refuse: raises for a name that a module does not have, told module and name.
    """
    before = {name: sys.modules.get(name) for name in modules}
    for name, names in modules.items():
        sys.modules[name] = module = _Module(name, refuse)
        vars(module).update(names)
        parent, _, last = name.rpartition(".")
        if parent in modules:
            setattr(sys.modules[parent], last, module)
    try:
        yield
    finally:
        for name, module_before in before.items():
            sys.modules.pop(name, None)
            if module_before is not None:
                sys.modules[name] = module_before


class _Module(ModuleType):
    def __init__(self, name: str, refuse: Callable[[str, str], NoReturn] | None) -> None:
        super().__init__(name)
        # libraries ask find_spec whether a package is there, which raises for a module without one
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []
        self.__version__ = "0"
        self._refuse = refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self._refuse is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self._refuse(self.__name__, name)
