"""Asks a custodian at the terminal, or reads what they wrote into a file beforehand."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from rapha_lab.protocol.errors import RequestError

__all__ = ["BACK", "Asker", "BackError", "Check", "File", "Terminal"]

BACK = "back"
"""What a custodian types to answer the question before once more."""


Check = Callable[[str], object]
"""Raises RequestError for an answer that does not fit."""


class Asker(Protocol):
    """Whom the questions go to."""

    def ask(self, key: str, question: str, default: str = "", check: Check = lambda given: None) -> str:
        """The answer to a question; `key` is its name in an answers file. "" takes the default.

        Raises:
            RequestError: if there is none that `check` lets pass.
        """
        ...

    def tell(self, text: str) -> None:
        """Show something to the custodian alone."""
        ...


class BackError(Exception):
    """The custodian goes back a question: ask all of them again, those before it are answered as they were."""


class Terminal:
    """The custodian at a keyboard."""

    def __init__(self) -> None:
        self._given: dict[str, str] = {}
        self._again: dict[str, str] = {}

    def ask(self, key: str, question: str, default: str = "", check: Check = lambda given: None) -> str:
        """Prompt, and wait for a line that fits.

        Raises:
            RequestError: if the input ends.
            BackError: the custodian wants the question before.
        """
        if key in self._again:
            self._given[key] = self._again.pop(key)
            return self._given[key]
        while True:
            try:
                given = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
                if given == BACK:
                    self._rewind(key)
                check(given)
                self._given[key] = given
                return given
            except EOFError:
                what = f"The input ended at the question {key}."
                raise RequestError(what, "Nothing was written.", "Answer to the end.", field=key) from None
            except RequestError as error:
                print(error)

    def _rewind(self, key: str) -> None:
        """Keep the answers but the one before `key`, and have all questions asked again."""
        self._given.pop(key, None)  # a look at this very question
        if self._given:
            self._given.popitem()
        self._again, self._given = self._given, {}
        raise BackError

    def tell(self, text: str) -> None:
        """Print it, unless it was said before the custodian went back."""
        if not self._again:
            print(text)


class File:
    """Answers written beforehand as TOML, by the questions' keys: `"ward.age.bounds" = "0, 120"`."""

    def __init__(self, path: Path, tell: Callable[[str], object] = print) -> None:
        try:
            self._answers = {key: str(value) for key, value in tomllib.loads(path.read_text()).items()}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"The answers {path.name} are no TOML: {error}.", field="answers") from None
        self._tell, self._left = tell, set(self._answers)

    def ask(self, key: str, question: str, default: str = "", check: Check = lambda given: None) -> str:
        """The answer of that key, or the default.

        Raises:
            RequestError: if it does not fit.
        """
        self._left.discard(key)
        given = self._answers.get(key, default).strip() or default
        check(given)
        return given

    def tell(self, text: str) -> None:
        """Print it."""
        self._tell(text)

    def close(self) -> None:
        """Hold that every answer was asked for.

        Raises:
            RequestError: naming one that was not.
        """
        for key in sorted(self._left):
            near = difflib.get_close_matches(key, set(self._answers) - self._left, n=1)
            what = f"Nothing asked for the answer {key}."
            raise RequestError(what, "", f"Did you mean {near[0]}?" if near else "Leave it out.", field=key)
