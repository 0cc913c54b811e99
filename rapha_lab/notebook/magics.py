"""`%%enclave`: rehearse the cell here, run it at the site, show what may be shown."""

from __future__ import annotations

import argparse
import atexit
import re
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, cell_magic, magics_class
from IPython.display import display

from rapha_lab.client import cards
from rapha_lab.client.progress import if_slow
from rapha_lab.client.site import ENDED, Dataset, Job, Site, latest
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import (
    CellError,
    RaphaError,
    RefusedError,
    RequestError,
    SealedError,
    SiteError,
)

__all__ = ["EnclaveMagics"]

SOON = 1.0
"""Seconds after an interrupt in which a kernel that shuts down has been told so."""

SLOW = 2.0
"""Seconds after which a cell that has shown nothing says what it does."""

MOST_SAID = 10_000
"""Characters that are shown of what a failed rehearsal printed, the last ones."""

USAGE = "%%enclave DATASET [--epsilon E] [-o NAMES] [-i NAMES] [--no-rehearsal | --rehearse-only]"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"The line of this enclave cell is malformed: {message}.", "", f"Write {USAGE}.")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not name.isidentifier():
            raise argparse.ArgumentTypeError(f"{name!r} is no name")
    return names


def _epsilon(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"--epsilon is {text!r}; it must be a number above 0")
    return value


def parser() -> argparse.ArgumentParser:
    """Of the magic's line."""
    line = _Parser(prog="%%enclave", add_help=False)
    line.add_argument("dataset")
    line.add_argument("--epsilon", type=_epsilon)
    line.add_argument("-o", "--output", type=_names, default=[])
    line.add_argument("-i", "--input", type=_names, default=[])
    line.add_argument("--no-rehearsal", action="store_true")
    line.add_argument("--rehearse-only", action="store_true")
    return line


@magics_class
class EnclaveMagics(Magics):
    """The cell magic; one notebook has one session at a site."""

    shell: InteractiveShell

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        from rapha_lab.client.rehearsal import Rehearsal

        self._session = uuid.uuid4().hex
        self._rehearsal = Rehearsal()
        self._sites: set[Site] = set()
        atexit.register(self._leave)  # else the sessions of kernels that are gone would count for an hour

    def _leave(self) -> None:
        """Give up this notebook's session; jobs that run go on, and their values are kept."""
        for site in self._sites:
            site.leave(self._session)

    @cell_magic
    def enclave(self, line: str, cell: str) -> None:
        """Run this cell at the hospital's enclave: %%enclave DATASET [--epsilon E] [-o NAMES] [-i NAMES]."""
        self._said = ""
        try:
            self._enclave(line, cell)
        except RaphaError as error:
            raise _shown(error, line, self._said) from None

    def _enclave(self, line: str, cell: str) -> None:
        args = self._parse(line)
        dataset, card = latest().dataset(args.dataset), _Card(self.shell)
        sent = self._rehearsal.send(self.shell.user_ns, args.input)
        if args.rehearse_only or not args.no_rehearsal:
            held: list[dict[str, Any]] = []
            show = card.place if args.rehearse_only else held.append
            try:
                with card.rehearsing(dataset) as tell:
                    self._rehearsal.run(
                        cell,
                        dataset.schema,
                        epsilon=args.epsilon,
                        inputs=sent,
                        outputs=args.output,
                        show=show,
                        largest_model=dataset.largest_model,
                        tell=tell,
                    )
            except RaphaError as error:
                self._explain(error, args.output)
                self._said = _words(held)
                card.give_way()
                raise
        if args.rehearse_only:
            print("Made-up patients: it would run at the site. Nothing was sent, no ε was spent.")
            return
        job = self._run(dataset, cell, args, sent, card)
        taken = self._rehearsal.take(job.values, job.blob, self.shell.user_ns)
        self.shell.user_ns.update(taken)

    def _parse(self, line: str) -> argparse.Namespace:
        try:
            return parser().parse_args(shlex.split(line, comments=True))
        except ValueError as error:
            raise RequestError(
                f"The line of this enclave cell is malformed: {error}.", "", f"Write {USAGE}."
            ) from None

    def _run(
        self,
        dataset: Dataset,
        cell: str,
        args: argparse.Namespace,
        sent: tuple[dict[str, Any], bytes],
        card: _Card,
    ) -> Job:
        site: Site = dataset.site
        self._sites.add(site)
        job = site.run(
            cell,
            dataset.name,
            session=self._session,
            epsilon=args.epsilon,
            outputs=args.output,
            inputs=sent,
            origin=_origin(self.shell),
        )
        try:
            _follow(job, card)
        except KeyboardInterrupt:
            if self._is_leaving():
                raise SiteError("The job runs on without this kernel.", "", _back(job)) from None
            job.cancel()
            _follow(job, card)
        try:
            job.raise_error()
        except CellError as error:
            self._explain(error)
            raise
        return job

    def _explain(self, error: RaphaError, outputs: Sequence[str] = ()) -> None:
        """Say why a cell lacks a name that is known elsewhere, and how it gets there."""
        if any(error.what == f"{name} is not defined." for name in outputs):
            error.instead += (
                ' Of a job of an earlier kernel: site.attach(site.jobs()[-1]["id"]).bring(model=model).'
            )
        lacks = re.match(r"NameError: name '(\w+)' is not defined", error.what)
        if not lacks or not isinstance(error, CellError):
            return
        name, here = lacks[1], self.shell.user_ns
        if name in self._rehearsal.namespace:
            error.traceback.append(
                f"{name} is only in the rehearsal: the cell that defines it was refused at the site or only rehearsed, "
                "or its session there has ended. Run that cell again first."
            )
        elif name in self._rehearsal.refused:
            error.traceback.append(
                f"The cell that defines {name} was refused, and nothing of it is kept. Run it again first."
            )
        elif name in here and (isinstance(here[name], ModuleType | type) or callable(here[name])):
            error.traceback.append(
                f"{name} is in the notebook alone: import or define it in an enclave cell."
            )
        elif name in here:
            error.traceback.append(
                f"{name} is in the notebook alone: -i {name} on the cell's first line sends it."
            )

    def _is_leaving(self) -> bool:
        """Whether the kernel shuts down: Jupyter begins that with an interrupt as well, and says so a moment later."""
        until = time.monotonic() + SOON
        while time.monotonic() < until and not self.shell.exit_now:
            time.sleep(0.02)
        return bool(self.shell.exit_now)


def _back(job: Job) -> str:
    return f'Come back to it: job = site.attach("{job.id}"), job.releases, job.bring(model=model).'


class _Card:
    """A cell's card: shown once it takes steps, waits, or keeps somebody waiting; kept up to date from then on."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._out = shell.display_pub  # a rehearsal has display() for itself
        self._begun, self._id, self._shown = time.monotonic(), uuid.uuid4().hex, False
        self._alone = True

    @contextmanager
    def rehearsing(self, dataset: Dataset) -> Iterator[Callable[[int, int, str], None]]:
        """While a rehearsal runs: if it is slow the card says so, and how far it is, as what this gives was told."""
        told = {"id": "", "state": "rehearsing", "dataset": dataset.name, **dataset.site._tag()}

        def tell(step: int, steps: int, doing: str) -> None:
            told.update(step=step, steps=steps, doing=doing)
            if self._shown:
                self._show(cards.job(dict(told)))

        with if_slow(SLOW, lambda: self._show(cards.job(dict(told)))):
            yield tell

    def update(self, job: Job) -> None:
        """Show how far the job is."""
        slow = not job.outputs and time.monotonic() - self._begun > SLOW
        works = job.told.get("steps", 0) > 1 or job.told.get("doing") not in (None, "", messages.PYTHON)
        if self._shown or slow or works or job.state == "waiting":
            self._show(job._repr_mimebundle_())

    def place(self, output: dict[str, Any], steps: int = 0) -> None:
        """Show an output: the first one of a cell without steps takes the card's place, others stand below it."""
        if steps <= 1:
            self.give_way()
        self._alone = False
        _show(output)

    def give_way(self) -> None:
        """Make room for what is shown first, while nothing else is."""
        if self._shown and self._alone:
            self._out.clear_output(wait=True)
            self._id, self._shown = uuid.uuid4().hex, False

    def _show(self, bundle: dict[str, Any]) -> None:
        self._out.publish(data=bundle, transient={"display_id": self._id}, update=self._shown)
        self._shown = True


def _follow(job: Job, card: _Card) -> None:
    """Show a job's outputs as they come, and its card."""
    for outputs in job.follow():
        for output in outputs:
            card.place(output, job.told.get("steps", 0))
        card.update(job)
    if job.state not in ENDED:
        raise SiteError("The job was left running.", "", _back(job))


def _show(output: dict[str, Any]) -> None:
    data = output.get("data") or {"text/plain": output["text"].rstrip("\n")}
    display(data, raw=True, metadata=output.get("metadata") or {})


def _words(outputs: list[dict[str, Any]]) -> str:
    """What a rehearsal showed before it failed; pictures of made-up patients would only mislead."""
    told = [output.get("text") or (output.get("data") or {}).get("text/plain", "") for output in outputs]
    return "\n".join(part.rstrip("\n") for part in told if part)[-MOST_SAID:]


def _origin(shell: InteractiveShell) -> dict[str, str]:
    """Which notebook cell this is, as far as the front end says."""
    parent = getattr(shell, "parent_header", None) or {}
    cell = (parent.get("metadata") or {}).get("cellId", "")
    path = shell.user_ns.get("__session__", "")
    return {"cell": str(cell), "notebook": str(path)}


def _shown(error: RaphaError, line: str, said: str) -> RaphaError:
    """The error as the notebook raises it: refusals leave a card above and one line below, what was `said` before above."""
    if isinstance(error, CellError):
        error.traceback[:0] = [cards.SAID, said, ""] if said else []
        return error
    carded = isinstance(error, SealedError | RefusedError | RequestError)
    if carded:
        told = error.to_wire() | ({"said": said} if said else {})
        if error.suggestion:
            told["suggestion"] = f"%%enclave {line.split()[0]}\n{error.suggestion}"
        display(cards.blocked(told), raw=True)
    said = f"{type(error).__name__}: {error.what if carded else error}"
    error._render_traceback_ = lambda: [said]  # type: ignore[method-assign]
    return error
