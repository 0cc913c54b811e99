"""How a method is called, said where it was called in another way: Python's own error names neither the fix nor an example."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from rapha_lab.protocol.errors import RequestError

__all__ = ["called", "kind", "unknown"]

P = ParamSpec("P")
T = TypeVar("T")


def called(example: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Have a function say how it is called, as in `example`, where an argument is missing, unknown or too many."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @wraps(function)
        def either(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise _miscalled(str(error), signature, example) from None
            return function(*args, **kwargs)

        return either

    return decorate


def _miscalled(said: str, signature: inspect.Signature, example: str) -> RequestError:
    given = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = given[given[:1] in (["self"], ["dataset"]) :]  # `plan` becomes a method
    named = re.findall(r"'(\w+)'", said)
    name = named[0] if named else None
    call = example.partition("(")[0]
    if "unexpected keyword" in said and name:
        return unknown(call, name, names, example)
    what = (
        f"{call} needs {', '.join(named)}."
        if "missing" in said and name
        else f"{call} was given too many arguments in a row."
    )
    takes = f"It takes {', '.join(names)}." if names else "It takes nothing."
    return RequestError(what, takes, f"Say {example}.", field=name)


def unknown(call: str, name: str, names: list[str], example: str) -> RequestError:
    """A keyword that a call does not know, and the nearest that it does."""
    near = difflib.get_close_matches(name, names, 1)
    instead = f"Did you mean {near[0]}=?" if near else f"Say {example}."
    return RequestError(f"{call} does not know {name}.", f"It takes {', '.join(names)}.", instead, field=name)


def kind(value: Any, of: type | tuple[type, ...], field: str, must: str, example: str) -> None:
    """Raise RequestError if an argument is of another kind than it `must` be."""
    if not isinstance(value, of) or isinstance(value, bool):
        name = type(value).__name__
        shown = "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
        raise RequestError(f"{field} is {shown}.", f"It must be {must}.", f"Say {example}.", field=field)
