"""How properties are tried, and how mutants are made."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "data", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("data")


@pytest.fixture
def mutant(monkeypatch: pytest.MonkeyPatch) -> Callable[[types.ModuleType, str, str], types.ModuleType]:
    """A copy of a module with one piece of its source replaced."""

    def make(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
        source = inspect.getsource(module)
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
        copy = types.ModuleType(module.__name__ + "_mutant")
        # dataclasses look their module up by name
        monkeypatch.setitem(sys.modules, copy.__name__, copy)
        exec(compile(source.replace(old, new), copy.__name__, "exec"), copy.__dict__)
        return copy

    return make
