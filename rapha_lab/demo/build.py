"""Build the demonstration datasets from the packages that carry them."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import polars as pl

from rapha_lab.protocol.errors import SiteError
from rapha_lab.protocol.schema import Schema

__all__ = ["build", "flchain"]


def build(folder: str | Path) -> Path:
    """Put the demo's records and schema into `folder` unless they are there; returns the schema's path.

    Each file appears whole or not at all, also when two processes build at once.

    Raises:
        SiteError: if the `demo` extra is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = resources.files("rapha_lab.demo").joinpath("flchain.toml").read_bytes()
    path = folder / "flchain.toml"
    if path.exists() and path.read_bytes() == text and (folder / "flchain.parquet").exists():
        return path
    _atomically(folder / "flchain.parquet", flchain().write_parquet)
    # the schema last: where it is, the records are
    _atomically(path, lambda part: part.write_bytes(text))
    Schema.load(path)
    return path


def flchain() -> pl.DataFrame:
    """Serum free light chains in 7,874 residents of Olmsted County (Dispenzieri et al. 2012), one row each.

    Raises:
        SiteError: if scikit-survival, which carries the data, is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from sksurv.datasets import load_flchain
    except ImportError:
        raise SiteError(
            "The demonstration data are not installed.",
            "They come with scikit-survival, which is an optional dependency.",
            "Run: pip install 'rapha-lab[demo]'",
        ) from None
    features, outcome = load_flchain()
    columns = {name: features[name].tolist() for name in features.columns}
    text = {
        name: [None if value != value else value for value in columns[name]] for name in ("sex", "chapter")
    }
    return pl.DataFrame(
        {
            # the source has no identifiers; a row's number stands in for one
            "patient": [f"F{row:05d}" for row in range(len(features))],
            "age": columns["age"],
            "sex": text["sex"],
            "sample_yr": [int(year) for year in columns["sample.yr"]],
            "kappa": columns["kappa"],
            "lambda_": columns["lambda"],
            "flc_grp": [int(tenth) for tenth in columns["flc.grp"]],
            "creatinine": columns["creatinine"],
            "mgus": [value == "yes" for value in columns["mgus"]],
            "futime": outcome["futime"].astype(float),
            "death": outcome["death"].astype(bool),
            "chapter": text["chapter"],
        },
        nan_to_null=True,
    )


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
