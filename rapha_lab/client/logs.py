"""Fetch a site's log and verify the whole of it offline: hashes, signatures, and that no account was overdrawn.

Verifying needs the bundle (see `client/bundles.py`) and nothing else, and names the first entry that does not hold.
A site that signs another history needs somebody who remembers the first one: give `verify` the checkpoints or
bundles that others hold, and it says from which entry on the two differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from rapha_lab.client.bundles import REPORT, Bundle, first_bad, read, roots
from rapha_lab.client.cosignatures import cosigned_at
from rapha_lab.client.site import Site
from rapha_lab.client.witness import last_seen, remember, same_key
from rapha_lab.protocol.builds import KIND, Build
from rapha_lab.protocol.checkpoint import (
    Checkpoint,
    checkpoint_text,
    open_checkpoint,
)
from rapha_lab.protocol.errors import LogError
from rapha_lab.protocol.keys import PrivateKey, signing_key

__all__ = ["Audit", "cosign_bundle", "fetch", "summary", "verify"]


def fetch(site: Site, path: str | Path) -> int:
    """Write the site's whole log to `path` as a bundle; returns the number of entries."""
    lines: list[str] = []
    while True:
        told = site._channel.call("log", {"start": len(lines)})[0]
        lines += [json.dumps(pair) for pair in zip(told["entries"], told["signatures"], strict=True)]
        size = open_checkpoint(told["checkpoint"], signing_key(str(site.key))).size
        if len(lines) >= size or not told["entries"]:
            break
    head = {"checkpoint": told["checkpoint"], "key": str(site.key)}
    Path(path).write_text("\n".join([json.dumps(head), *lines[:size]]) + "\n")
    return size


@dataclass
class Audit:
    """What a verified log says.

    Attributes:
        checkpoint: the signed head.
        kinds: number of entries by kind.
        accounts: by account, {"budget", "spent", "epsilon", "delta"}.
        jobs: by job, how it ended.
        builds: the releases of the enclave that ran, in order.
    """

    checkpoint: Checkpoint
    kinds: dict[str, int] = field(default_factory=dict)
    accounts: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    builds: list[Build] = field(default_factory=list)


def verify(
    path: str | Path,
    key: str | None = None,
    *,
    against: Sequence[str | Path] = (),
    witnesses: Sequence[str] = (),
    seen: Mapping[str, str] = MappingProxyType({}),
) -> Audit:
    """Check a bundle: every hash, every signature, the books, and that it extends what others hold.

    Args:
        path: the bundle.
        key: the site's public key as it is known from elsewhere; without it the bundle's own is taken, which
            shows that the bundle is whole but not whose it is.
        against: files with earlier checkpoints or bundles of this log, as held by witnesses, clients or receipts.
        witnesses: verifier keys, of Ed25519 or ML-DSA-44; each must have cosigned one of the checkpoints in `against`.
        seen: further checkpoints, by where they were seen.

    Raises:
        LogError: naming the first entry that does not hold, and why.
    """
    bundle = read(path)
    if key is not None and key != bundle.key:
        raise LogError(
            "The bundle is another site's.", f"It names the key {bundle.key}.", "Fetch the right one."
        )
    signed, audit, heads = signing_key(bundle.key), Audit(bundle.checkpoint), list[bytes]()
    for number, (root, (body, code)) in enumerate(zip(roots(bundle), bundle.entries, strict=True)):
        if number >= bundle.checkpoint.size:
            raise first_bad(number, f"The checkpoint is of {number} entries; the bundle has more.")
        _check_signature(Checkpoint(bundle.checkpoint.origin, number + 1, root), code, signed)
        _Books(audit, number, body).check()
        heads.append(root)
    if len(heads) != bundle.checkpoint.size:
        raise first_bad(
            len(heads), f"The checkpoint is of {bundle.checkpoint.size} entries; the bundle ends here."
        )
    if heads and heads[-1] != bundle.checkpoint.root:
        raise first_bad(len(heads) - 1, "The checkpoint signs for another one.")
    notes = [_compare(bundle, heads, Path(other)) for other in against]
    for whence, note in seen.items():
        _extends(bundle, heads, note, whence)
    for witness in witnesses:
        _require(notes, witness)
    return audit


def cosign_bundle(path: str | Path, key: PrivateKey, name: str = "") -> str:
    """Verify a bundle and that it extends what this user saw of its log, and cosign its checkpoint as a witness.

    Raises:
        LogError: it does not hold, or is another history or another key's; what was seen before is kept.
    """
    verify(path)
    bundle = read(path)
    same_key(bundle.checkpoint.origin, bundle.key)
    before = last_seen(bundle.checkpoint.origin, bundle.key)
    if before is not None:
        _extends(bundle, list(roots(bundle)), before, "What you saw before")
    return remember(bundle.note, bundle.key, key, name)


def _check_signature(head: Checkpoint, code: str, key: Ed25519PublicKey) -> None:
    note = f"{checkpoint_text(head)}\n— {head.origin} {code}\n"
    try:
        open_checkpoint(note, key, head.origin)
    except LogError:
        why = "The log's signature is not over the entries up to this one: it was changed, moved, dropped or put in."
        raise first_bad(head.size - 1, why) from None


def _compare(bundle: Bundle, heads: Sequence[bytes], path: Path) -> str:
    """Check that the bundle extends what the file at `path` shows; gives that one's checkpoint."""
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise LogError(f"{path} cannot be read.", str(error.strerror)) from None
    if not text.startswith("{"):
        note = text.partition("\n\n")[2] if text.startswith("c2sp.org/") else text
        _extends(bundle, heads, note, path.name)
        return note
    other = read(path)
    _holds(path, bundle.key)  # who accuses shows clean hands
    for number, (mine, theirs) in enumerate(zip(bundle.entries, other.entries, strict=False)):
        if mine[0] != theirs[0]:
            raise first_bad(number, f"{path.name} has another entry there: the site signed two histories.")
    _extends(bundle, heads, other.note, path.name)
    return other.note


def _holds(path: Path, key: str) -> None:
    try:
        verify(path, key)
    except LogError as error:
        raise LogError(
            f"{path.name} does not hold itself.", str(error), "It shows nothing about this log."
        ) from None


def _extends(bundle: Bundle, heads: Sequence[bytes], note: str, whence: str) -> None:
    seen = open_checkpoint(note, signing_key(bundle.key), bundle.checkpoint.origin)
    if seen.size > len(heads):
        why = f"{whence} shows that the log had {seen.size} entries: it was rolled back."
        raise first_bad(len(heads), why)
    if seen.size and heads[seen.size - 1] != seen.root:
        why = f"{whence} is of another history: one of the entries 0 to {seen.size - 1} was another then."
        raise LogError("The log does not extend what was seen of it before.", why, REPORT)


def _require(notes: Sequence[str], witness: str) -> None:
    refusals = []
    for note in notes:
        try:
            cosigned_at(note, witness)
            return
        except LogError as error:
            refusals.append(error)
    why = refusals[0].what if refusals else "No checkpoint was given with --against."
    raise LogError(f"The witness {witness.partition('+')[0]} does not confirm this log.", why, "Ask them.")


class _Books:
    """Checks one entry against the books so far."""

    def __init__(self, audit: Audit, number: int, body: bytes) -> None:
        self._audit, self._number, self._body = audit, number, body

    def check(self) -> None:
        try:
            entry = json.loads(self._body)
            kind = entry["kind"]
            self._audit.kinds[kind] = self._audit.kinds.get(kind, 0) + 1
            if kind == KIND:
                self._audit.builds.append(Build.logged(self._body))
            elif kind == "account":
                self._account(entry)
            elif "accounts" in entry:
                self._charge(kind, entry)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise self._bad("It is malformed.") from None

    def _bad(self, why: str) -> LogError:
        return first_bad(self._number, why)

    def _account(self, entry: dict[str, Any]) -> None:
        none = {"spent": 0, "open": {}, "delta_spent": 0, "delta_open": {}}
        old = self._audit.accounts.get(entry["account"], none)
        told = {name: entry[name] for name in ("budget", "epsilon", "delta", "alpha", "spent")}
        told |= {name: entry.get(name, 0) for name in ("delta_budget", "delta_spent")}
        if (
            entry["account"] not in self._audit.accounts
        ):  # of all projects: what they spent before is carried over
            old = {"spent": told["spent"], "open": dict(entry["running"])}
            old |= {
                "delta_spent": told["delta_spent"],
                "delta_open": dict(entry.get("delta_running", {})),
            }
        if any(old[what] != told[what] for what in ("spent", "delta_spent")):
            raise self._bad(
                f"The account {entry['account']} does not add up: {told['spent']} of {told['budget']}."
            )
        if old["spent"] > told["budget"] or old["delta_spent"] > told["delta_budget"]:
            raise self._bad(f"The budget of {entry['account']} is less than what was spent.")
        self._audit.accounts[entry["account"]] = old | told

    def _charge(self, kind: str, entry: dict[str, Any]) -> None:
        job, jobs = entry["job"], self._audit.jobs
        first = kind in ("reserve", "elsewhere")
        if first != (job not in jobs) or jobs.get(job, "reserve") != "reserve":
            raise self._bad(f"Job {job} is {jobs.get(job, 'not reserved')} and cannot {kind}.")
        jobs[job] = kind
        for name, told in entry["accounts"].items():
            account = self._audit.accounts[name]
            self._add(kind, job, name, account, told["charged"], told["spent"], "")
            delta = told.get("delta_charged", 0), told.get("delta_spent", account["delta_spent"])
            self._add(kind, job, name, account, *delta, "delta_")

    def _add(
        self, kind: str, job: str, name: str, account: dict[str, Any], charged: int, said: int, what: str
    ) -> None:
        """Add what a job was charged of Rényi loss, or of the δ of discovered keys, to an account."""
        before = account[f"{what}open"].pop(job, 0)
        spent, budget = account[f"{what}spent"] - before + charged, account[f"{what}budget"]
        if charged < 0 or (kind not in ("reserve", "elsewhere") and charged > before):
            raise self._bad(f"Job {job} is charged more than was reserved.")
        if spent != said or (kind == "reserve" and spent > budget):
            raise self._bad(f"The account {name} does not add up: {said} of {budget}.")
        account[f"{what}spent"] = spent
        if kind == "reserve":
            account[f"{what}open"][job] = charged


def summary(audit: Audit) -> Iterable[str]:
    """The audit in sentences."""
    yield f"{audit.checkpoint.size} entries of the log {audit.checkpoint.origin} hold; root {audit.checkpoint.root.hex()}."
    yield "Entries: " + ", ".join(f"{count} {kind}" for kind, count in sorted(audit.kinds.items())) + "."
    yield from dict.fromkeys(map(_build, audit.builds))
    for name, account in sorted(audit.accounts.items()):
        share = account["spent"] / account["budget"]
        yield f"{name}: {share:.1%} of the budget of epsilon={account['epsilon']}, delta={account['delta']} is spent."


def _build(build: Build) -> str:
    vouched = build.signed_by(frozenset({build.signer}))
    by = f"signed by {build.signer}" if vouched else "signed by nobody"
    return f"Enclave {build.version} ran, {by}: {', '.join(build.measurements)}."
