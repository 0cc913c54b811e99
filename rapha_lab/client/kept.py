"""A trained model as the researcher keeps it: one safetensors file with the releases and the proofs it came with.

No pickle. What the file says of itself is in its metadata: releases with their receipts, the enclave's evidence with what
its vendor signed, the policy's page with its signatures. The site's log is kept beside it, for anybody to verify.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from safetensors import SafetensorError, safe_open

from rapha_lab.client.attestation import Attestation
from rapha_lab.client.logs import fetch
from rapha_lab.client.site import Site, latest
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.policy import Policy
from rapha_lab.protocol.release import Release

if TYPE_CHECKING:
    import torch

__all__ = ["Kept", "keep", "load"]

KEY = "rapha-lab"


@dataclass(frozen=True)
class Kept:
    """A kept model.

    Attributes:
        path: the file.
        tensors: by name.
        parameters: the names of what was trained; the rest are buffers.
        releases: what the site answered, the training first.
        told: evidence, policy and attack report as they were when it was kept.
        log: where the site's log is kept.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    parameters: list[str]
    releases: list[Release]
    told: dict[str, Any]
    log: Path

    @property
    def training(self) -> Release:
        """The training that gave these weights; if none of a fit did, the first."""
        return self._fit() or _first(self.releases)

    def unchanged(self) -> bool | None:
        """Whether it holds exactly the weights that the site released; None after a loop, whose steps were released."""
        if all(release.op != "fit" for release in self.releases):
            return None
        return self._fit() is not None

    def _fit(self) -> Release | None:
        return _fit(self.releases, {name: self.tensors[name] for name in self.parameters})


def _first(releases: Sequence[Release]) -> Release:
    return next(release for release in releases if release.op in ("fit", "open"))


def _fit(releases: Sequence[Release], trained: Mapping[str, torch.Tensor]) -> Release | None:
    """The fit that released exactly these weights."""
    from safetensors.torch import save

    digest = hashlib.sha256(save(dict(trained))).hexdigest()
    return next((each for each in releases if each.op == "fit" and each.tensors == digest), None)


def keep(
    path: str | Path,
    model: torch.nn.Module,
    *releases: Release,
    site: Site | None = None,
    attack: dict[str, Any] | None = None,
) -> Path:
    """Keep a trained model with what shows how it came about, for its dossier.

    Args:
        path: of the file, "mortality.safetensors"; the site's log is written beside it.
        model: with the released weights.
        releases: the training's, evaluations and whatever belongs to it.
        site: where it was trained; the last one connected to if not given.
        attack: a report of `rapha_lab.client.attacks.attack`.

    Raises:
        RequestError: the model is no module, or no release of a training is among the others.
    """
    import torch
    from safetensors.torch import save_file

    if not isinstance(model, torch.nn.Module):
        why = "What is kept is a module with the released weights."
        raise RequestError(
            f"The model is a {type(model).__name__}.", why, "Say keep(path, model, history).", field="model"
        )
    if not any(release.op in ("fit", "open") for release in releases):
        why = "The dossier of a model tells how it was trained."
        raise RequestError(
            "No release of a training is given.", why, "Say keep(path, model, history).", field="releases"
        )
    site = site or latest()
    policy = site._channel.call("policy", {})[0]
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    parameters = [name for name, _ in model.named_parameters()]
    training = _fit(releases, {name: weights[name] for name in parameters}) or _first(releases)
    told = {
        "releases": [msgspec.to_builtins(release) for release in releases],
        "parameters": parameters,
        "site": site.name,
        "attestation": msgspec.to_builtins(_attestation(site, policy["text"], training)),
        "policy": policy,
        "attack": attack,
        "kept": int(time.time()),
    }
    save_file(weights, path, metadata={KEY: json.dumps(told)})
    kept = Path(path)
    fetch(site, kept.with_suffix(".log"))
    return kept


def _attestation(site: Site, page: str, training: Release) -> Attestation:
    """The last evidence that was appraised before the training was charged, under the policy's page if there is such."""
    channel, bound = site._channel, Policy.parse(page).hash
    charged = training.receipt.get("index", 0)
    found = max(
        reversed(channel.seen),
        key=lambda each: (each.binding.policy_hash == bound, each.head.size <= charged),
    )
    return Attestation(found.evidence, found.at, dict(channel.policy.minimum_tcb))


class _Told(msgspec.Struct):
    """What a kept model's file must say, whoever wrote it."""

    site: str
    policy: _Page
    kept: int


class _Page(msgspec.Struct):
    text: str
    statements: list[str]


def load(path: str | Path, log: str | Path | None = None) -> Kept:
    """What `keep` wrote, with the site's log beside it if it is not at `log`.

    Raises:
        RequestError: the file is none of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"There is no model at {path}.", "", "Keep one with rapha.keep.", field="model")
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        releases = [msgspec.convert(each, Release) for each in told.pop("releases")]
        parameters = [name for name in told.pop("parameters") if name in tensors]
        if not any(release.op in ("fit", "open") for release in releases):
            raise ValueError
        msgspec.convert(told, _Told)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        raise RequestError(
            f"{path} is no model kept with its releases.", "", "Keep it with rapha.keep.", field="model"
        ) from None
    return Kept(path, tensors, parameters, releases, told, Path(log) if log else path.with_suffix(".log"))
