"""What a zygote loads before it forks, since a locked worker can open no file.

Everything here runs single-threaded: a second OpenMP or allocator thread before the fork hangs the child.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pkgutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib import machinery
from typing import Any

__all__ = ["load", "reseed", "seal_imports"]

_NEVER = {"antigravity", "this", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "ensurepip", "venv"}

# starts a thread of its allocator's as it is imported, and is tried for by other libraries
_THREADED = ("pyarrow",)

# started by `import polars`; waits for files to delete, which a worker never has
_PARKED = {"polars-ooc-clea"}

LIBRARIES = """
    encodings.idna encodings.ascii encodings.latin_1 encodings.cp1252 encodings.utf_8_sig
    concurrent.futures.thread concurrent.futures.process html.entities xml.etree.ElementTree zoneinfo
    numpy.fft numpy.linalg numpy.random numpy.polynomial numpy.ma numpy.testing numpy._core._methods
    scipy.cluster.hierarchy scipy.integrate scipy.interpolate scipy.linalg scipy.ndimage scipy.optimize
    scipy.signal scipy.sparse.linalg scipy.spatial.distance scipy.special scipy.stats
    sklearn.calibration sklearn.cluster sklearn.covariance sklearn.compose sklearn.datasets
    sklearn.decomposition sklearn.dummy sklearn.ensemble sklearn.feature_selection sklearn.gaussian_process
    sklearn.impute sklearn.inspection sklearn.isotonic sklearn.kernel_ridge sklearn.linear_model
    sklearn.metrics sklearn.mixture sklearn.model_selection sklearn.naive_bayes sklearn.neighbors
    sklearn.neural_network sklearn.pipeline sklearn.preprocessing sklearn.svm sklearn.tree
    torch.func torch.fx.experimental.proxy_tensor torch.fx.experimental.symbolic_shapes torch.distributions
    torch.special torch.linalg torch._dynamo torch.nested torch.sparse torch.autograd.forward_ad
    torch.autograd.profiler torch.autograd.gradcheck torch.optim.swa_utils torch.testing
    polars polars.selectors polars.dataframe._html polars.testing polars.sql
    IPython.core.formatters IPython.core.display IPython.core.ultratb IPython.lib.pretty IPython.display
    pandas pandas.core.methods pandas.plotting
    safetensors.torch safetensors.numpy msgspec.json msgspec.msgpack msgspec.inspect
    PIL.Image PIL.ImageDraw PIL.ImageFont PIL.PngImagePlugin PIL.JpegImagePlugin
    matplotlib.style matplotlib.animation matplotlib.gridspec matplotlib.dates matplotlib.patheffects
    mpl_toolkits.mplot3d mpl_toolkits.axes_grid1 stack_data executing pygments.lexers.python
    pygments.formatters.terminal256 pygments.formatters.html
""".split()
"""Modules beside the standard library; one that is not installed is passed over."""

WALKED = """
    torch.nn torch.fx torch._export torch.export torch._higher_order_ops torch.utils polars pygments.styles
    pandas.io.formats pandas.core.methods pandas.plotting
""".split()
"""Packages that import their own parts at first use: all of these are loaded."""

_PASSED_OVER = ("test", "tensorboard", "hipify", "benchmark", "onnx", "bundled", "__main__")


def load(preload: Sequence[str], *, libraries: bool = True) -> None:
    """Import `preload`, and unless told otherwise the standard and the scientific libraries, warmed.

    Raises:
        ImportError: if a module of `preload` cannot be imported.
        RuntimeError: if something loaded here started a thread.
    """
    tempfile.tempdir = "/tmp"  # noqa: S108
    sys.modules.update(dict.fromkeys(_THREADED))  # type: ignore[arg-type]
    if libraries:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _libraries()
    for name in preload:
        importlib.import_module(name)
    for name in _THREADED:  # a library that only looks whether it is loaded must find nothing, not None
        sys.modules.pop(name, None)
    assert_alone()


def _libraries() -> None:
    for name in sorted(sys.stdlib_module_names - _NEVER):
        if not name.startswith("_"):
            _try(name)
    for name in LIBRARIES:
        _try(name)
    for package in WALKED:
        _walk(package)
    _terminal()
    _torch()
    _figures()


def _try(name: str) -> None:
    with contextlib.suppress(Exception):
        importlib.import_module(name)


def _walk(package: str) -> None:
    path = getattr(sys.modules.get(package), "__path__", ())
    for module in pkgutil.walk_packages(path, f"{package}.", onerror=lambda _: None):
        if not any(part in module.name for part in _PASSED_OVER):
            _try(module.name)


def _terminal() -> None:
    """Read the colours of IPython's tracebacks, which it keeps in files."""
    with contextlib.suppress(ImportError):
        from IPython.utils import PyColorize

        for name in list(PyColorize.theme_table):
            PyColorize.theme_table[name]


def _torch() -> None:
    """One step of each kind that imports lazily: an optimiser, an export."""
    import torch

    torch.set_num_threads(1)
    layer = torch.nn.Linear(2, 1)
    for optimizer in (torch.optim.SGD(layer.parameters(), lr=0.1), torch.optim.AdamW(layer.parameters())):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    batch = ({0: torch.export.Dim("n")},)
    torch.export.export(layer, (torch.zeros(1, 2),)).run_decompositions().module()
    torch.export.export(layer, (torch.zeros(3, 2),), dynamic_shapes=batch, strict=True)
    torch.save(layer.state_dict(), io.BytesIO())


class _Shelf:
    """A module with a few names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _figures() -> None:
    """Load matplotlib with its fonts held in memory: an inherited open file would join sibling workers."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import _mathtext, font_manager, pyplot

    fonts = {}
    for entry in font_manager.fontManager.ttflist:
        with open(entry.fname, "rb") as file:
            fonts[os.path.realpath(entry.fname)] = file.read()

    def font(path: Any, *args: Any, **kwargs: Any) -> Any:
        return freetype.FT2Font(io.BytesIO(fonts[path]) if path in fonts else path, *args, **kwargs)

    freetype = font_manager.ft2font  # type: ignore
    font_manager.ft2font = _Shelf(freetype, FT2Font=font)  # type: ignore

    def known(name: Any) -> bool:
        return os.path.realpath(name) in fonts

    here = _Shelf(os, path=_Shelf(os.path, isfile=known, exists=known))
    font_manager.os = _mathtext.os = here  # type: ignore
    for form in ("png", "svg"):
        figure, axes = pyplot.subplots()
        axes.plot([1, 10], [1, 2], label="$x^2$")
        axes.set(title="a", xlabel="b", yscale="log")
        axes.legend()
        figure.savefig(io.BytesIO(), format=form)
        pyplot.close(figure)


def assert_alone() -> None:
    """Raise if a thread could hold a lock when this process forks; waits for those that are ending."""
    busy = set()
    for _ in range(100):
        busy = {name for name in _threads() if name not in _PARKED}
        if not busy:
            return
        time.sleep(0.02)
    raise RuntimeError(f"A preloaded module started a thread: {', '.join(sorted(busy))}.")


def _threads() -> Iterator[str]:
    """The kernel's names of this process's threads but the main one."""
    for task in set(os.listdir("/proc/self/task")) - {str(os.getpid())}:
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm") as file:
            yield file.read().strip()


def reseed() -> None:
    """Give this worker its own random state; forks would otherwise share one."""
    import random

    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(int.from_bytes(os.urandom(4), "little"))
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)


class _NothingMore:
    """The end of the import path: what was not preloaded is not there."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        raise ModuleNotFoundError(
            f"No module named {name!r} is preloaded at this site: define what you need of it in the cell, "
            "or use it here on what -o brings back",
            name=name,
        )


def seal_imports() -> None:
    """Say plainly that a module is not there, instead of asking the kernel for files it will refuse."""
    sys.meta_path[:] = [machinery.BuiltinImporter, machinery.FrozenImporter, _NothingMore]
