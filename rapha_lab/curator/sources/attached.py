"""Images and notes that a table's cells name as files: NumPy, PNG, DICOM and plain text.

One that is not there, cannot be read or lies outside the data folder is a missing value, and is counted.
"""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath

import numpy as np
import polars as pl
import torch

from rapha_lab.curator.sources.database import needs
from rapha_lab.curator.sources.files import Seen
from rapha_lab.protocol.columns import Column

__all__ = ["contents", "names_files"]


def names_files(column: Column, series: pl.Series) -> bool:
    """Whether the cells name files: those of an image that are text, and of a text that the schema says do."""
    return series.dtype == pl.String and (column.type == "image" or column.files)


def contents(folder: Path, column: Column, series: pl.Series, seen: Seen) -> tuple[pl.Series, int]:
    """What the named files hold, and how many cannot be read.

    Raises:
        RequestError: if a package to read them with is not installed.
    """
    found = [None if name is None else _content(folder, column, name, seen) for name in series]
    known = [value is not None for value in found]
    bad = len(series) - series.null_count() - sum(known)
    if column.type == "text":
        return pl.Series(column.name, found, dtype=pl.String), bad
    blank = np.zeros(math.prod(column.shape), dtype=np.float32)
    pixels = np.array([blank if value is None else value for value in found]).reshape(len(found), len(blank))
    whole = pl.Series(column.name, pixels, dtype=pl.Array(pl.Float32, len(blank)))
    return pl.select(pl.when(pl.Series(known, dtype=pl.Boolean)).then(whole)).to_series().alias(
        column.name
    ), bad


def _content(folder: Path, column: Column, name: str, seen: Seen) -> str | np.ndarray | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return None
    try:
        seen(folder / path)
        if column.type == "text":
            return (folder / path).read_bytes().decode("utf-8", "replace")
        reader = {".npy": _numpy, ".png": _png, ".dcm": _dicom}.get(path.suffix.lower())
        return None if reader is None else _fitted(reader(folder / path), column).ravel()
    except ImportError as error:
        raise needs(str(error.name)) from None
    except Exception:  # whatever a decoder makes of damaged bytes: the image is missing
        return None


def _numpy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _png(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        grey = image.mode in ("1", "L", "I", "I;16", "F")
        pixels = np.asarray(image if grey else image.convert("RGB"), dtype=np.float32)
    return pixels if grey else pixels.transpose(2, 0, 1)


def _dicom(path: Path) -> np.ndarray:
    """Pixels in the scanner's units, as Hounsfield's of a CT."""
    from pydicom import dcmread
    from pydicom.pixels import apply_rescale

    image = dcmread(path)
    pixels = np.asarray(apply_rescale(image.pixel_array, image), dtype=np.float32)
    return pixels.transpose(2, 0, 1) if int(image.get("SamplesPerPixel", 1)) == 3 else pixels


def _fitted(pixels: np.ndarray, column: Column) -> np.ndarray:
    """Pixels in the column's shape: an axis of channels added where there is none, height and width resized.

    Raises:
        ValueError: if channels, or the number of axes, are others.
    """
    shape, image = tuple(column.shape), torch.tensor(np.asarray(pixels, dtype=np.float32))
    if image.dim() == len(shape) - 1:
        image = image[None]
    if image.shape == shape:
        return image.numpy()
    if image.dim() != len(shape) or image.shape[0] != shape[0] or not math.prod(image.shape):
        raise ValueError("the image has another number of axes or channels")
    mode = {2: "linear", 3: "bilinear", 4: "trilinear"}[len(shape)]
    resized = torch.nn.functional.interpolate(image[None], shape[1:], mode=mode, antialias=mode == "bilinear")
    return resized[0].numpy()
