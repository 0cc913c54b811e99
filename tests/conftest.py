"""What every test run says at its end: how large the code is that has to be trusted; and how workers share a machine."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[1] / "rapha_lab"
TRUSTED = ("protocol", "curator", "enclave")


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several workers one thread: more than there are cores spin while they wait for one another."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def code_lines(path: Path) -> int:
    """Lines of a module that hold code: no blanks, comments or docstrings."""
    text = path.read_text()
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
        ):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the size of the trusted computing base."""
    terminalreporter.section("trusted computing base")
    whole = 0
    for wing in TRUSTED:
        files = sorted((PACKAGE / wing).rglob("*.py"))
        code = sum(code_lines(path) for path in files)
        total = sum(len(path.read_text().splitlines()) for path in files)
        whole += code
        terminalreporter.write_line(
            f"{wing:<10} {len(files):3} files {code:6} lines of code {total:6} lines in all"
        )
    terminalreporter.write_line(f"together   {whole:6} lines of code; the aim is under 4,000")
