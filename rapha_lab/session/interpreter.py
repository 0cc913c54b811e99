"""Runs one cell as a notebook would: prints, figures, rich values and tracebacks go to a `Screen`.

Used in the site's sandbox and, for rehearsals, in the researcher's own kernel. No record is in either
process, so whatever a cell shows here is free of patients' data.
"""

from __future__ import annotations

import ast
import base64
import io
import linecache
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import matplotlib.pyplot as pyplot
import torch
from IPython.core.formatters import DisplayFormatter

from rapha_lab.protocol.errors import CellError, RaphaError, RefusedError
from rapha_lab.protocol.release import Release, canonical
from rapha_lab.session import hints, pictures, tracing
from rapha_lab.session.bars import undrawn
from rapha_lab.session.counted import counted
from rapha_lab.session.loops import close_open
from rapha_lab.session.opacus_names import recognised
from rapha_lab.session.sealed import SealedTensor
from rapha_lab.session.transforms import untransformed

__all__ = ["Screen", "cell_error", "run"]

Output = dict[str, Any]
Send = Callable[[Output], None]

MOST_PICTURES = 20
"""Releases of one cell that are drawn."""

_NO_DEVICE = re.compile(
    r"Torch not compiled with \w+ enabled|PyTorch is not linked with support for \w+ devices|Found no NVIDIA driver"
)
"""How torch says that there is no such device."""

_formatter = DisplayFormatter()


class Screen:
    """Turns what a cell shows into outputs and sends each on.

    Args:
        send: takes one output: {"type": "stream", "name", "text"} or {"type": "display", "data", "metadata"}.

    Attributes:
        released: what this cell was given by the curator, whose cards the site shows by itself.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.released: list[Any] = []
        self.streams: tuple[_Stream, ...] = ()

    def stream(self, name: str, text: str) -> None:
        """Send what was printed."""
        if text.strip("\n"):
            self._send({"type": "stream", "name": name, "text": text})

    def release(self, release: Release) -> None:
        """Take note of a release, whose card the site shows by itself, and show a picture of it below."""
        self.released.append(release)
        if len(self.released) > MOST_PICTURES:
            return
        try:
            figure = pictures.picture(release)
        except Exception:  # a picture is a courtesy: the release stands without it
            return
        if figure is not None:
            self.show(figure)

    def settle(self) -> None:
        """Send what was printed and still waits, so that what comes next stands below it."""
        for stream in self.streams:
            stream.send()

    def show(self, *values: Any, raw: bool = False, metadata: Any = None, **_: Any) -> None:
        """Show each value in the richest forms it has, or as it is if it is a bundle and `raw`."""
        self.settle()
        for value in values:
            data, about = (value, metadata or {}) if raw else _formatter.format(value)
            if data or about:
                self._send({"type": "display", "data": _sendable(data), "metadata": _sendable(about)})

    def figures(self) -> None:
        """Show and close the matplotlib figures that are open, as the inline backend does."""
        self.settle()
        for number in pyplot.get_fignums():
            figure = pyplot.figure(number)
            self._send({"type": "display", "data": picture(figure), "metadata": {}})
            pyplot.close(figure)


def picture(figure: Any) -> dict[str, str]:
    """A matplotlib figure as PNG and as words."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", dpi=100)
    return {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": repr(figure)}


_formatter.formatters["image/png"].for_type_by_name(
    "matplotlib.figure", "Figure", lambda figure: base64.b64decode(picture(figure)["image/png"])
)


def _sendable(data: Any) -> dict[str, Any]:
    """Those forms of a value that JSON can carry; bytes of pictures as base64, as the notebook format wants them."""
    if not isinstance(data, dict):
        return {"text/plain": f"<{type(data).__name__}, which is no bundle>"}
    kept = {}
    for kind, value in data.items():
        try:
            form = base64.b64encode(value).decode() if isinstance(value, bytes) else value
            canonical({kind: form})
            kept[kind] = form
        except (ValueError, TypeError, RecursionError):
            kept.setdefault("text/plain", f"<{type(value).__name__} that cannot be shown>")
    return kept


class _Stream(io.TextIOBase):
    def __init__(self, screen: Screen, name: str) -> None:
        self._screen, self._name, self._waiting, self._sent = screen, name, "", time.monotonic()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._waiting += str(text)
        # lines in quick succession are one output
        if ("\n" in text and time.monotonic() > self._sent + 0.3) or len(self._waiting) > 1 << 16:
            self.send()
        return len(text)

    def send(self) -> None:
        text, self._waiting, self._sent = self._waiting, "", time.monotonic()
        self._screen.stream(self._name, text)


@contextmanager
def _captured(screen: Screen, name: str) -> Iterator[None]:
    """Streams, display and plt.show go to the screen while the cell of that name runs."""
    import IPython.core.display_functions as functions
    import IPython.display as public

    before = sys.stdout, sys.stderr, functions.display, public.display, pyplot.show
    streams = _Stream(screen, "stdout"), _Stream(screen, "stderr")
    sys.stdout, sys.stderr = screen.streams = streams
    functions.display = public.display = screen.show
    pyplot.show = lambda *_, **__: screen.figures()
    own = torch.compile, torch.amp.GradScaler, torch.save, torch.jit.script, torch.jit.trace
    torch.jit.script, torch.jit.trace = _unscripted(own[3]), _unscripted(own[4])
    torch.compile, torch.amp.GradScaler = _as_written, _unscaled  # type: ignore[misc,assignment]
    torch.save = _unwritten  # type: ignore[assignment]
    cell = tracing.CELL.set(name)
    try:
        with (
            tracing.derived(lambda _, args: any(isinstance(arg, SealedTensor) for arg in args)),
            counted(),
            untransformed(),
        ):
            yield
    finally:
        tracing.CELL.reset(cell)
        screen.streams = ()
        for stream in streams:
            stream.send()
        sys.stdout, sys.stderr, functions.display, public.display, pyplot.show = before
        torch.compile, torch.amp.GradScaler, torch.save, torch.jit.script, torch.jit.trace = own  # type: ignore[misc]


def _as_written(model: Any = None, **_: Any) -> Any:
    """In place of torch.compile: on sealed tensors there is nothing to gain, and the curator compiles for itself."""
    return model if model is not None else _as_written


def _unscripted(scripted: Callable[..., Any]) -> Callable[..., Any]:
    """In place of torch.jit.script and trace, whose results take a sealed tensor's made-up numbers without a word."""

    def either(it: Any, *args: Any, **kwargs: Any) -> Any:
        torchs = f"{os.sep}torch{os.sep}" in sys._getframe(1).f_code.co_filename
        return scripted(it, *args, **kwargs) if torchs else it

    return either


def _unscaled(device: str = "cuda", **_: Any) -> Any:
    """In place of torch.amp.GradScaler: a scaled loss would have every patient's gradient clipped to nothing else."""
    return torch.amp.grad_scaler.GradScaler(device, enabled=False)


def _unwritten(it: Any, f: Any, *args: Any, **kwargs: Any) -> None:
    """In place of torch.save: a cell has no files, which a rehearsal says before anything is paid for."""
    if tracing.CELL.get() and isinstance(f, str | os.PathLike):
        raise RefusedError(
            "torch.save would write a file.",
            "A cell has none of its own; its session's values stay until it ends, and what -o names comes back.",
            "Write best = copy.deepcopy(model.state_dict()), bring it with -o best, and save it in the notebook.",
            line=tracing.cell_line(),
        )  # fmt: skip
    torch.serialization.save(it, f, *args, **kwargs)


def run(source: str, namespace: dict[str, Any], screen: Screen, name: str = "<cell>") -> None:
    """Run `source` in `namespace`; the value of a last expression is shown.

    Raises:
        RaphaError: a refusal met by the cell, with the line of the cell that met it.
        CellError: the cell's own code raised; `traceback` is what a local cell would print.
    """
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace.setdefault("__name__", "__main__")
    namespace["display"] = screen.show
    screen.released.clear()
    with _captured(screen, name), recognised(source), undrawn(source):
        try:
            body, last = _compile(source, name)
            exec(body, namespace)  # noqa: S102 - running the cell is what this process is for
            if last is not None:
                _show_last(eval(last, namespace), namespace, screen)  # noqa: S307
            close_open()
            screen.figures()
        except RaphaError as error:
            error.line = error.line or _line(error, name)
            raise
        except KeyboardInterrupt:
            raise CellError("The cell was interrupted.", "", "Run it again when you like.") from None
        except BaseException as error:
            raise _no_device(error, name) or cell_error(error, name) from None


def _compile(source: str, name: str) -> tuple[CodeType, CodeType | None]:
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    silent = source.rstrip().endswith(";")
    if isinstance(last, ast.Expr) and silent:
        tree.body.append(last)
        last = None
    value = compile(ast.Expression(last.value), name, "eval") if isinstance(last, ast.Expr) else None
    return compile(tree, name, "exec"), value


def _show_last(value: Any, namespace: dict[str, Any], screen: Screen) -> None:
    if value is not None:
        namespace["_"] = value
        if not any(value is release for release in screen.released):
            screen.show(value)


def _line(error: BaseException, name: str) -> int | None:
    """The innermost line of the cell that `error` came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
    return lines[-1] if lines else None


def _no_device(error: BaseException, name: str) -> RefusedError | None:
    """The refusal in place of torch's own error, where a cell asked for a device that is not there."""
    text = next((arg for arg in error.args if isinstance(arg, str)), "")
    if type(error) not in (AssertionError, RuntimeError) or not _NO_DEVICE.match(text):
        return None
    return RefusedError(
        "A device was asked for that is not here.",
        "Cells run on the processor; what is trained on patients is computed by the curator.",
        'Leave .cuda() and .to("cuda") out, or write device = "cuda" if torch.cuda.is_available() else "cpu".',
        line=_line(error, name),
    )


def cell_error(error: BaseException, name: str) -> CellError:
    """The error as a local cell would print it, but for the frames of libraries, ours among them."""
    kind = type(error).__name__
    try:
        told = traceback.TracebackException.from_exception(error)
        _cells_only(told)
        lines = list(told.format())
        message = str(error)
        lines += [f"{hint}\n" for hint in hints.of(error)]
    except Exception:  # a hostile __str__ must not end the session
        lines, message = [f"{kind}: (its message could not be made)"], ""
    text = "".join(lines).rstrip().splitlines()
    return CellError(f"{kind}: {message}"[:2000], traceback=[*text], line=_line(error, name))


def _cells_only(told: traceback.TracebackException) -> None:
    """Leave the lines of cells, which their author can change, and of earlier errors those that came through one."""
    told.stack[:] = [frame for frame in told.stack if frame.filename.startswith("<enclave cell")]
    for earlier in ("__cause__", "__context__"):
        if (error := getattr(told, earlier)) is not None:
            _cells_only(error)
            if not error.stack:
                setattr(told, earlier, None)
