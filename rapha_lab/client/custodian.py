"""A custodian's side of a site's airlock: see what waits, and sign a decision on the very document that was shown."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable
from typing import Any

import msgspec
from safetensors.torch import load

from rapha_lab.client.site import Site
from rapha_lab.protocol.decision import Act, decide, signed_login, subject_of
from rapha_lab.protocol.errors import RequestError, TrustError
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import seen, state

__all__ = ["Custodian", "changes", "countersign", "described", "in_words"]

FIRST = 8
"""Values of a tensor that are shown at its beginning."""


class Custodian:
    """A connection that signs as a custodian.

    Args:
        site: connected with the custodian's key.
        key: that key.
    """

    def __init__(self, site: Site, key: PrivateKey) -> None:
        self.site, self._key = site, key

    def waiting(self) -> list[dict[str, Any]]:
        """What waits for a decision, oldest first."""
        return [told for told in self.site.airlock() if told["state"] == "waiting"]

    def show(self, subject: str) -> dict[str, Any]:
        """All of one thing: its document, the findings of the automatic checks, what was decided so far.

        Args:
            subject: or its first letters, if no other thing that waits begins with them.

        Raises:
            TrustError: the site showed another document, or other inputs, than those named.
        """
        told = self._item(subject)
        if told["kind"] != "function":
            return told
        return told | {"tensors": described(self._inputs(told), json.loads(told["document"]))}

    def inputs(self, subject: str) -> bytes:
        """The tensors among a function's inputs, safetensors: all their values, as its researcher sent them."""
        told = self._item(subject)
        if told["kind"] != "function":
            what = "It is an answer, and was given nothing."
            raise RequestError(what, "Only functions have inputs.", "See review show.", field="subject")
        return self._inputs(told)

    def _item(self, subject: str) -> dict[str, Any]:
        told = self.site._channel.call("item", {"text": self._whole(subject)})[0]
        if subject_of(told["document"].encode()) != told["subject"]:
            raise TrustError("The site showed another document than the one that waits.", "", "Do not sign.")
        return dict(told)

    def _inputs(self, told: dict[str, Any]) -> bytes:
        blob = bytes(self.site._channel.call("inputs", {"text": told["subject"]})[1])
        if hashlib.sha256(blob).hexdigest() != json.loads(told["document"])["asks"]["tensors"]:
            raise TrustError("The site showed other inputs than those that wait.", "", "Do not sign.")
        return blob

    def approve(self, subject: str) -> dict[str, Any]:
        """Approve it: a function may then run, an answer may leave, once enough custodians have."""
        return self._decide("approve", subject, "")

    def refuse(self, subject: str, reason: str) -> dict[str, Any]:
        """Refuse it for good; the researcher is told the reason."""
        return self._decide("refuse", subject, reason)

    def veto(self, reason: str) -> None:
        """End the policy at once, and with it everything that runs."""
        self._state("veto", "", reason)

    def revoke(self, subject: str, reason: str = "") -> None:
        """Take a researcher's key or a project out of the policy at once."""
        self._state("revoke", subject, reason)

    def _decide(self, act: Act, subject: str, reason: str) -> dict[str, Any]:
        told = self.show(subject)
        decision = decide(act, told["document"].encode(), told["policy"], self._key, reason)
        return dict(self.site._channel.call("decide", {"text": msgspec.json.encode(decision).decode()})[0])

    def _state(self, act: Any, subject: str, reason: str) -> None:
        self.site.refresh()
        said = state(act, self.site.card()["policy"]["hash"], self._key, subject, reason)
        self.site._channel.call("state", {"text": msgspec.json.encode(said).decode()})

    def _whole(self, subject: str) -> str:
        found = [told["subject"] for told in self.site.airlock() if told["subject"].startswith(subject)]
        if len(found) != 1:
            what = "There is nothing" if not found else "There is more than one thing"
            raise RequestError(f"{what} in the airlock that begins with {subject!r}.", field="subject")
        return str(found[0])


def described(blob: bytes, document: dict[str, Any]) -> list[str]:
    """A function's tensors, a line each: name, shape, kind, range and first values. Anything may have been sent."""
    try:
        tensors = load(blob) if blob else {}
    except Exception:  # the library has errors of its own, and of others
        return ["cannot be read as tensors: the function will get nothing that can, either"]
    names: dict[str, list[str]] = {}
    _places(document["asks"]["inputs"], "", names)
    return [
        f"{ascii(', '.join(names.get(key, ['named nowhere'])))[1:-1]} (tensor {ascii(key)[1:-1]}): {_tensor(tensors[key])}"
        for key in sorted(tensors)
    ]


def _places(spec: Any, path: str, names: dict[str, list[str]]) -> None:
    """By tensor, where in the inputs it is named."""
    if isinstance(spec, dict) and isinstance(spec.get("tensor"), str):
        names.setdefault(spec["tensor"], []).append(path or "it")
    parts = spec.items() if isinstance(spec, dict) else enumerate(spec) if isinstance(spec, list) else ()
    for name, part in parts:
        within = path if name in ("values", "items", "state", "columns") else f"{path}.{name}".lstrip(".")
        _places(part, within, names)


def _tensor(tensor: Any) -> str:
    about = f"{'x'.join(str(n) for n in tensor.shape) or 'one'} {str(tensor.dtype).removeprefix('torch.')}"
    values = tensor.flatten().double()
    if not len(values):
        return f"{about}, empty"
    known = values[values.isfinite()]
    span = f"{float(known.min()):g} to {float(known.max()):g}" if len(known) else "nothing finite"
    more = f"; {len(values) - len(known)} not finite" if len(known) < len(values) else ""
    first = ", ".join(f"{value:g}" for value in values[:FIRST].tolist())
    return f"{about}, {span}{more}; begins {first}{' ...' if len(values) > FIRST else ''}"


def countersign(text: str, key: PrivateKey, show: Callable[[str], object] = print) -> str:
    """What a console's file asks to be signed, signed, as a line to paste; `show` is given what it says first.

    Raises:
        RequestError: it is no file of a console's.
    """
    try:
        asked = json.loads(text)
        if asked["sign"] == "log-in":
            show(f"Log in to the console of {asked['site']}.")
            return signed_login(asked["site"], asked["challenge"], key)
        if asked["sign"] == "veto":
            show(f"You veto the policy {asked['policy']}. Reason: {asked['reason'] or 'none'}.")
            return msgspec.json.encode(
                state("veto", str(asked["policy"]), key, "", str(asked["reason"]))
            ).decode()
        show(in_words(asked["item"]))
        show(f"You {asked['sign']} it." + (f" Reason: {asked['reason']}" if asked.get("reason") else ""))
        document, policy = asked["item"]["document"].encode(), asked["item"]["policy"]
        said = decide(asked["sign"], document, policy, key, asked.get("reason", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RequestError(
            "This file asks for no signature.", "", "Take it from the console.", field="file"
        ) from None
    return msgspec.json.encode(said).decode()


def in_words(told: dict[str, Any]) -> str:
    """One thing of the airlock as a custodian reads it: what it is, what it asks, what it costs, what changed."""
    document = json.loads(told["document"])
    # what is signed is the document: nothing beside it may say that it is another's, or of something else
    bound = ("kind", "researcher", "project", "dataset", "lane", "mode")
    told = told | {name: document[name] for name in bound if name in document}
    told["subject"] = subject_of(told["document"].encode())
    lines = [
        f"{told['kind']} {told['subject']}",
        f"project {told['project']}, dataset {told['dataset']}, lane {told['lane']}; asked by {told['researcher']}",
        f"released by {told['mode']}; {told['missing']} still to approve"
        if told["state"] == "waiting"
        else told["state"],
    ]
    if told["kind"] == "function":
        lines += _function(document, told.get("before"), told.get("tensors") or _unseen(document))
    else:
        lines += _answer(document)
    lines += ["Automatic checks:", *(f"  {seen(line)}" for line in told["findings"] or ["nothing found"])]
    lines += [
        f"{d['act']} by {d['key']}" + (f": {seen(d['reason'])}" if d["reason"] else "")
        for d in told["decisions"]
    ]
    return "\n".join(lines)


def _answer(document: dict[str, Any]) -> list[str]:
    release = document["release"]
    price = f"epsilon {release['epsilon']:g}, delta {release['delta']:g} per patient"
    if release["op"] == "review":
        price = "NO differential privacy: what you approve here is all that protects the patients"
    values = json.dumps(release["values"], indent=1, ensure_ascii=True).splitlines()
    return [f"answer to {release['op']} on {release['split']}, {price}", *(f"  {line}" for line in values)]


def _unseen(document: dict[str, Any]) -> list[str]:
    """What a console's file says of tensors: their hash alone, which is shown beside."""
    none = document["asks"]["tensors"] == hashlib.sha256(b"").hexdigest()
    return [] if none else ["see the console, or rapha-lab review show"]


def _selection(asks: dict[str, Any]) -> list[str]:
    """Of whom, and with which columns made from others, as it was asked."""
    said = {"of the patients where": asks.get("where"), "with columns made from others": asks.get("derive")}
    return [f"{words}: {json.dumps(value)}" for words, value in said.items() if value]


def _function(document: dict[str, Any], before: str | None, tensors: list[str]) -> list[str]:
    asks = document["asks"]
    return [
        f"runs {asks['name']} of the source below",
        f"asks for the columns {', '.join(asks['columns'])} of the split {document['split']}, as they are",
        *(
            [f"and for all rows that count of the tables {', '.join(asks['tables'])}, as they are"]
            if asks.get("tables")
            else []
        ),
        f"takes {asks['seconds']:g} s in a sandbox without network; costs no epsilon, because it has no guarantee",
        "its answer will wait here again before anybody sees it",
        *_selection(asks),
        f"inputs: {json.dumps(asks['inputs'])}",
        f"tensors among them, SHA-256 {asks['tensors']}:",
        *(f"  {line}" for line in tensors or ["none"]),
        f"environment {document['environment']}",
        "source:",
        *(f"  {line}" for line in asks["source"].splitlines()),
        *changes(document, json.loads(before) if before else None),
    ]


def changes(document: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """What a function changed since the one last approved in its project, line by line."""
    if before is None:
        return ["No function of this project was approved on this dataset before."]
    lines = []
    old, new = before["asks"], document["asks"]
    for name in sorted({*old, *new} - {"source"}):
        was, now = (json.dumps(each.get(name)) for each in (old, new))  # to Python True is 1, too
        if was != now:
            lines.append(f"  {name}: was {was}, is {now}")
    for name in ("site", "split", "environment", "policy", "researcher"):
        if before.get(name) != document.get(name):
            lines.append(f"  {name}: was {before.get(name)}, is {document.get(name)}")
    told = difflib.unified_diff(old["source"].splitlines(), new["source"].splitlines(), lineterm="", n=2)
    lines += [f"  {line}" for line in list(told)[2:]]
    return ["Since the version approved last in this project:", *(lines or ["  nothing"])]
