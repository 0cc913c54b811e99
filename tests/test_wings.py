"""The folders are the trust domains: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rapha_lab

PACKAGE = Path(rapha_lab.__file__).parent
WINGS = ("protocol", "session", "curator", "enclave", "client", "notebook", "custodian")
MAY = {
    "protocol": {"protocol"},
    "session": {"session", "protocol"},
    "curator": {"curator", "protocol"},
    "enclave": {"enclave", "protocol", "curator", "session"},
    "client": {"client", "protocol"},
    "notebook": {"notebook", "client", "protocol"},
    "custodian": {"custodian", "protocol", "curator"},
}
REHEARSAL = PACKAGE / "client" / "rehearsal.py"
NETWORK = {
    "socket",
    "socketserver",
    "ssl",
    "http",
    "urllib",
    "httpx",
    "requests",
    "uvicorn",
    "starlette",
    "asyncio",
}
CODECS = {"msgspec", "cryptography", "rfc8785", "safetensors", "tomli_w"}


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the wing"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def wings_of(path: Path) -> set[str]:
    """The wings a file imports."""
    return {
        parts[1] for name in imports(path) if (parts := name.split("."))[0] == "rapha_lab" and len(parts) > 1
    } & set(WINGS)


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_only_what_its_trust_allows(wing: str) -> None:
    """No module reaches into a wing it must not know."""
    for path in (PACKAGE / wing).rglob("*.py"):
        allowed = MAY[wing] | ({"session", "curator"} if path == REHEARSAL else set())
        assert wings_of(path) <= allowed, f"{path} imports {wings_of(path) - allowed}"


def test_the_curator_opens_no_socket() -> None:
    """Nothing that could open a connection is imported beside the records; one file receives what it inherits."""
    for path in (PACKAGE / "curator").rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path)} & NETWORK
        if path.name == "workers.py":  # takes workers' pipes over a socket that the enclave opened
            used -= {"socket"}
            assert ".connect(" not in path.read_text()
            assert ".bind(" not in path.read_text()
        assert not used, f"{path} imports {used}"


def test_protocol_knows_only_the_standard_library_and_codecs() -> None:
    """Formats need no numerics: neither torch nor numpy is imported to read a message."""
    import sys

    for path in (PACKAGE / "protocol").rglob("*.py"):
        outside = (
            {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"rapha_lab", ""}
        )
        assert outside <= CODECS, f"{path} imports {outside - CODECS}"


def test_the_import_rules_have_teeth(tmp_path: Path) -> None:
    """A forbidden import is seen in any form and at any depth."""
    for text in (
        "import rapha_lab.curator.ledger",
        "from rapha_lab import curator",
        "def f():\n    from rapha_lab.curator.desk import Desk",
    ):
        path = tmp_path / "m.py"
        path.write_text(text)
        assert wings_of(path) == {"curator"}


def test_no_module_is_longer_than_a_sitting() -> None:
    """Six hundred lines at most."""
    long = {str(path): n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 600}
    assert long == {}


def test_beside_the_records_nothing_runs_or_resolves_what_was_sent() -> None:
    """No pickle, no `torch.load`, no exec, eval or import by name in the curator or in what it reads with."""
    for path in [*(PACKAGE / "curator").rglob("*.py"), *(PACKAGE / "protocol").rglob("*.py")]:
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {"pickle", "marshal", "shelve", "importlib", "runpy", "subprocess"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("exec", "eval", "compile", "__import__", "open_code"), (
                    f"{path}: {called}"
                )
                assert called not in ("torch.load", "np.load", "numpy.load", "os.system"), f"{path}: {called}"


def test_the_public_names_are_complete_and_there() -> None:
    """`rapha_lab.__all__` is sorted and every name of it can be had."""
    assert rapha_lab.__all__ == sorted(rapha_lab.__all__)
    for name in rapha_lab.__all__:
        assert getattr(rapha_lab, name) is not None


def test_every_module_of_the_package_says_what_it_exports() -> None:
    """Each public module has a docstring, and `__all__` names only what it has."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"


def test_the_project_speaks_only_of_itself() -> None:
    """No machine path and no registry host is in a file."""
    root = PACKAGE.parent
    words = ("/" + "work/", "pypi" + ".org", "registry" + ".npmjs")
    for folder in (
        "rapha_lab",
        "tests",
        "scripts",
        "docs",
        "notebooks",
        "extensions",
        "binder",
        "benchmarks",
    ):
        for path in (root / folder).rglob("*"):
            skip = {"node_modules", "labextension", "__pycache__", "lib", ".yarn", "pictures"} & set(
                path.parts
            )
            if (
                path.is_file()
                and not skip
                and path.suffix in (".py", ".md", ".ts", ".tsx", ".toml", ".ipynb", ".json", ".yml", ".lock")
            ):
                text = path.read_text(errors="replace")
                assert not any(word in text for word in words), path
