"""`python -m rapha_lab.demo.build NAME [FOLDER]`: build a demonstration dataset from the package that carries it."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import polars as pl

from rapha_lab.demo import clinic, eunomia, nafld, survset
from rapha_lab.protocol.errors import RequestError, SiteError
from rapha_lab.protocol.schema import Schema

__all__ = ["NAMES", "build", "built", "flchain", "main", "provenance"]

# each writes its records into an empty folder
_RECIPES: dict[str, Callable[[Path], object]] = {
    "flchain": lambda folder: flchain().write_parquet(folder / "flchain.parquet"),
    "support2": lambda folder: survset.support2().write_parquet(folder / "support2.parquet"),
    "rhc": lambda folder: survset.rhc().write_parquet(folder / "rhc.parquet"),
    "nafld": nafld.write,
    "eunomia": eunomia.write,
    "clinic": lambda folder: clinic.frame().write_parquet(folder / "clinic.parquet"),
}
NAMES = tuple(_RECIPES)


def build(folder: str | Path, name: str = "flchain") -> Path:
    """Put a dataset's records and schema into `folder` unless they are there; returns the schema's path.

    The schema appears last, so that where it is, the records are whole, also when two processes build at once.

    Raises:
        RequestError: if there is no dataset of that name.
        SiteError: if the package that carries it is not installed.
    """
    if name not in _RECIPES:
        raise RequestError(
            f"There is no dataset {name!r:.64}.", "", f"There are {', '.join(NAMES)}.", field="name"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    with _alone(folder):
        if path not in built(folder):
            path.unlink(missing_ok=True)
            part = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}."))
            try:
                _RECIPES[name](part)
                (part / path.name).write_bytes(_schema(name))
                for entry in sorted(part.iterdir(), key=lambda entry: entry.name == path.name):
                    if (folder / entry.name).is_dir():
                        shutil.rmtree(folder / entry.name)
                    entry.replace(folder / entry.name)
            finally:
                shutil.rmtree(part)
    return path


def built(folder: str | Path) -> list[Path]:
    """The schemas of the datasets that are in `folder`, as this release has them and with all their sources."""
    found = []
    for name in NAMES:
        path = Path(folder) / f"{name}.toml"
        if path.exists() and path.read_bytes() == _schema(name):
            schema = Schema.load(path)
            sources = [schema.source, *(table.source for table in schema.tables)]
            # a table of a database is in the file that its source's folder names
            places = [
                path.parent / (source if ".duckdb/" not in source else source.rpartition("/")[0])
                for source in sources
            ]
            if all(place.exists() for place in places):
                found.append(path)
    return found


def provenance(path: Path) -> str:
    """Where a dataset is from, how to cite it and under which licence it comes."""
    schema = Schema.load(path)
    return f"{schema.title}\n\nCite: {schema.citation}\n\nLicence: {schema.licence}\n\n{path}"


def _schema(name: str) -> bytes:
    return resources.files("rapha_lab.demo").joinpath(f"{name}.toml").read_bytes()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder, so that a second build waits for the first."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


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


def main() -> None:
    """Build one dataset into a folder and say where it comes from."""
    line = argparse.ArgumentParser(prog="python -m rapha_lab.demo.build")
    line.add_argument("name", choices=NAMES)
    line.add_argument("folder", type=Path, nargs="?", default=Path("data"))
    args = line.parse_args()
    try:
        path = build(args.folder, args.name)
    except (RequestError, SiteError) as error:
        sys.exit(str(error))
    print(provenance(path))


if __name__ == "__main__":
    main()
