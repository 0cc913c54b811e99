"""Rapha Lab: write PyTorch in a notebook cell; it runs where the patients' records are.

    import rapha_lab as rapha
    %load_ext rapha_lab
    site = rapha.connect("demo")
    cohort = site.dataset("flchain")    # .schema, .budget, .mock(), .inputs(), .quote(), .plan()

Cells that begin with `%%enclave flchain` run at the site and hold `patients`: `help(patients)` in one of them lists what
can be asked. Here `check` and `fix` say and mend what keeps a model from training, `keep` writes a model
with its releases and receipts to a file, and `attack` tries to tell who was in a training.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rapha_lab.protocol import errors
from rapha_lab.protocol.errors import RaphaError, SealedError
from rapha_lab.protocol.release import Release

if TYPE_CHECKING:
    from rapha_lab.client.attacks import attack
    from rapha_lab.client.kept import keep
    from rapha_lab.client.rehearsal import check, fix
    from rapha_lab.client.site import Dataset, Job, Site, connect
    from rapha_lab.notebook.planner import plan

__all__ = [
    "Dataset",
    "Job",
    "RaphaError",
    "Release",
    "SealedError",
    "Site",
    "attack",
    "check",
    "connect",
    "errors",
    "fix",
    "keep",
    "plan",
]

# where a name is, for the enclave's processes import this package and not the client
_LAZY = {
    **dict.fromkeys(("Dataset", "Job", "Site", "connect"), "client.site"),
    **dict.fromkeys(("check", "fix"), "client.rehearsal"),
    "attack": "client.attacks",
    "keep": "client.kept",
    "plan": "notebook.planner",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            return getattr(import_module(f"rapha_lab.{_LAZY[name]}"), name)
        except ModuleNotFoundError:
            if name not in ("check", "fix"):
                raise
            # a session at the site has no client: there the model is checked without the curator's table
            return getattr(import_module("rapha_lab.session.checking"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext rapha_lab`: gives notebooks the `%%enclave` cells, and datasets their `plan`."""
    from rapha_lab.client.progress import Progress

    with Progress().during("Loading PyTorch and what rehearses cells", "Loaded"):
        from rapha_lab.client.site import Dataset
        from rapha_lab.notebook.magics import EnclaveMagics
        from rapha_lab.notebook.planner import plan

        # the client may not import the notebook, so the method comes with the extension
        Dataset.plan = plan  # type: ignore[attr-defined]
        shell.register_magics(EnclaveMagics)
