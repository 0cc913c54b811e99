"""Fetch a site's log and verify the whole of it offline: hashes, signature, and that no account was overdrawn.

A bundle is a file of JSON lines: the signed checkpoint with the site's key first, then every entry in order. Verifying
needs the bundle and nothing else; whoever has an older checkpoint can demand that the log extends it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from rapha_lab.client.site import Site
from rapha_lab.protocol.checkpoint import Checkpoint, open_checkpoint, root_of
from rapha_lab.protocol.errors import LogError, RequestError
from rapha_lab.protocol.keys import PublicKey

__all__ = ["Audit", "fetch", "verify"]


def fetch(site: Site, path: str | Path) -> int:
    """Write the site's whole log to `path` as a bundle; returns the number of entries."""
    entries: list[str] = []
    while True:
        told = site._channel.call("log", {"start": len(entries)})[0]
        entries += told["entries"]
        size = open_checkpoint(told["checkpoint"], _native(str(site.key))).size
        if len(entries) >= size or not told["entries"]:
            break
    head = {"checkpoint": told["checkpoint"], "key": str(site.key)}
    lines = [json.dumps(head), *(json.dumps(entry) for entry in entries[:size])]
    Path(path).write_text("\n".join(lines) + "\n")
    return size


@dataclass
class Audit:
    """What a verified log says.

    Attributes:
        checkpoint: the signed head.
        kinds: number of entries by kind.
        accounts: by account, {"budget", "spent", "epsilon", "delta"}.
        jobs: by job, how it ended.
    """

    checkpoint: Checkpoint
    kinds: dict[str, int] = field(default_factory=dict)
    accounts: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)


def verify(path: str | Path, key: str | None = None) -> Audit:
    """Check a bundle: every hash, the signature, and the books.

    Args:
        path: the bundle.
        key: the site's public key as it is known from elsewhere; without it the bundle's own is taken, which
            shows that the bundle is whole but not whose it is.

    Raises:
        LogError: naming the first entry that does not hold, and why.
    """
    lines = Path(path).read_text().splitlines()
    try:
        head, entries = json.loads(lines[0]), [_entry(line, n) for n, line in enumerate(lines[1:])]
        note, named = (str(head.pop(name)) for name in ("checkpoint", "key"))
        if head:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise LogError("The bundle's first line is malformed.", "", "Fetch it again.") from None
    if key is not None and key != named:
        raise LogError("The bundle is another site's.", f"It names the key {named}.", "Fetch the right one.")
    checkpoint = open_checkpoint(note, _native(named))
    if len(entries) != checkpoint.size:
        first = min(len(entries), checkpoint.size)
        why = f"The checkpoint is of {checkpoint.size} entries; the bundle has {len(entries)}."
        raise LogError(f"Entry {first} is the first that does not hold.", why, "Fetch it again.")
    audit = Audit(checkpoint)
    for number, body in enumerate(entries):
        _Books(audit, number, body).check()
    if root_of(entries) != checkpoint.root:
        raise LogError(
            "The entries are not those that were signed.",
            "Their root hash is not the checkpoint's: at least one was changed, moved or replaced.",
            "Compare it with a bundle or receipt held by somebody else.",
        )
    return audit


def _native(key: str) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(PublicKey.parse(key).raw)
    except (RequestError, ValueError):
        raise LogError("The site's key is malformed.", "", "Give it as ed25519:...") from None


def _entry(line: str, number: int) -> bytes:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, str):
        raise LogError(f"Entry {number} is the first that does not hold.", "It is no line of a bundle.")
    return entry.encode()


class _Books:
    """Checks one entry against the books so far."""

    def __init__(self, audit: Audit, number: int, body: bytes) -> None:
        self._audit, self._number, self._body = audit, number, body

    def check(self) -> None:
        try:
            entry = json.loads(self._body)
            kind = entry["kind"]
            self._audit.kinds[kind] = self._audit.kinds.get(kind, 0) + 1
            if kind == "account":
                self._account(entry)
            elif "accounts" in entry:
                self._charge(kind, entry)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise self._bad("It is malformed.") from None

    def _bad(self, why: str) -> LogError:
        what = f"Entry {self._number} is the first that does not hold."
        return LogError(what, why, "Show it to the custodians.")

    def _account(self, entry: dict[str, Any]) -> None:
        old = self._audit.accounts.get(entry["account"], {"spent": 0, "open": {}})
        told = {name: entry[name] for name in ("budget", "epsilon", "delta", "alpha")}
        if old["spent"] > told["budget"]:
            raise self._bad(f"The budget of {entry['account']} is less than what was spent.")
        self._audit.accounts[entry["account"]] = old | told

    def _charge(self, kind: str, entry: dict[str, Any]) -> None:
        job, jobs = entry["job"], self._audit.jobs
        if (kind == "reserve") != (job not in jobs) or jobs.get(job, "reserve") != "reserve":
            raise self._bad(f"Job {job} is {jobs.get(job, 'not reserved')} and cannot {kind}.")
        jobs[job] = kind
        for name, told in entry["accounts"].items():
            account = self._audit.accounts[name]
            before = account["open"].pop(job, 0)
            spent = account["spent"] - before + told["charged"]
            if told["charged"] < 0 or (kind != "reserve" and told["charged"] > before):
                raise self._bad(f"Job {job} is charged more than was reserved.")
            if spent != told["spent"] or spent > account["budget"]:
                raise self._bad(
                    f"The account {name} does not add up: {told['spent']} of {account['budget']}."
                )
            account["spent"] = spent
            if kind == "reserve":
                account["open"][job] = told["charged"]


def summary(audit: Audit) -> Iterable[str]:
    """The audit in sentences."""
    yield f"{audit.checkpoint.size} entries of the log {audit.checkpoint.origin} hold; root {audit.checkpoint.root.hex()}."
    yield "Entries: " + ", ".join(f"{count} {kind}" for kind, count in sorted(audit.kinds.items())) + "."
    for name, account in sorted(audit.accounts.items()):
        share = account["spent"] / account["budget"]
        yield f"{name}: {share:.1%} of the budget of epsilon={account['epsilon']}, delta={account['delta']} is spent."
