"""The custodians' document: a page of TOML that says who may ask what of which patients, and its signatures.

A custodian signs the very bytes of the page (its hash is `sha256sum policy.toml`), so that nothing read on
it, comments included, can change unsigned. Statements beside it sign, veto or revoke; the last two only ever
close. A custodian's veto ends the policy, and a revocation takes one researcher or project out of it, each at
once and by one custodian alone; what was closed opens again only by a new version with its own signatures.
"""

from __future__ import annotations

import hashlib
import time
import tomllib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Protocol

import msgspec
from msgspec import Meta

from rapha_lab.protocol.errors import PolicyError, RequestError
from rapha_lab.protocol.keys import PrivateKey, PublicKey
from rapha_lab.protocol.program import within

__all__ = [
    "Custodian",
    "Dataset",
    "Head",
    "Lane",
    "Policy",
    "Project",
    "Signed",
    "Statement",
    "seen",
    "state",
    "unseen",
]

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*\Z")]
Words = Annotated[str, Meta(min_length=1, max_length=200)]
Digest = Annotated[str, Meta(pattern=r"^(any simulated|sha(256:[0-9a-f]{64}|384:[0-9a-f]{96}))\Z")]
Duo = Annotated[str, Meta(pattern=r"^DUO:\d{7}\Z")]
Release = Literal["auto", "one custodian", "two custodians"]
LaneName = Literal["aggregate", "train", "evaluate", "shards", "review"]
# not gt=0: see messages.Positive
Epsilon = Annotated[float, Meta(ge=1e-100, le=1000.0)]
Delta = Annotated[float, Meta(ge=1e-100, lt=0.1)]
Discovery = Annotated[float, Meta(ge=0.0, lt=0.1)]
Count = Annotated[int, Meta(ge=1, le=10**12)]

_UNSEEN = ("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp")  # a lawyer must see every character that counts
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {
    chr(code) for code in (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))
}


def unseen(text: str) -> list[str]:
    """The characters of a text that whoever reads it does not see, or that move what they see."""
    return [c for c in text if c not in "\n\t" and (unicodedata.category(c) in _UNSEEN or c in _BLANK)]


def seen(text: str) -> str:
    """The text on one line, with whatever of it nobody sees written out."""
    hidden = {*unseen(text), "\n", "\t"}
    return "".join(ascii(c)[1:-1] if c in hidden else c for c in text)


class Custodian(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Somebody whose signature counts."""

    name: Words
    role: Words
    key: str


class Dataset(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A dataset, the releases of the enclave that may open it, and the weakest sandbox beside it.

    `epsilon`, if there is one, caps what all projects together may learn of a patient, at `delta`; and
    `discovery_delta` what of δ they may together spend besides on keys discovered in the records.
    """

    name: Name
    measurements: Annotated[list[Digest], Meta(min_length=1)]
    sandbox: Literal["S1", "S2", "S3"] = "S3"
    epsilon: Epsilon | None = None
    delta: Delta
    discovery_delta: Discovery = 0.0


class Lane(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A kind of question, and who looks at its answer before it leaves; a person, unless signed otherwise."""

    release: Release = "one custodian"


class Sized(Protocol):
    """What has so many numbers to train."""

    @property
    def size(self) -> int:
        """How many."""
        ...


class Project(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who may ask, of what, how much: `epsilon` and `delta` are per patient, for the whole project.

    `discovery_delta` is added to `delta` if the project discovers keys, such as codes, in the records.
    """

    name: Name
    researchers: list[str]
    datasets: Annotated[list[Name], Meta(min_length=1)]
    epsilon: Epsilon
    delta: Delta
    discovery_delta: Discovery = 0.0
    largest_model: Count
    smallest_cohort: Count
    metrics: list[Name] = []
    lanes: dict[LaneName, Lane] = {}

    def within_size(self, program: Sized) -> None:
        """Raise PolicyError if `program` has more parameters than `largest_model`."""
        within(program.size, self.largest_model, f"Project {self.name!r}")


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the page is, what for, until when, and how many custodians must sign it."""

    name: Words
    version: Count
    purpose: Annotated[list[Duo], Meta(min_length=1)]
    expires: date
    quorum: Count


class _Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    policy: Head
    custodians: Annotated[list[Custodian], Meta(min_length=1)]
    datasets: list[Dataset]
    projects: list[Project]


@dataclass(frozen=True)
class Policy:
    """A policy as written; `Signed.check` gives the one in force."""

    text: str
    head: Head
    custodians: tuple[Custodian, ...]
    datasets: tuple[Dataset, ...]
    projects: tuple[Project, ...]
    revoked: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Policy:
        """The policy on this page.

        Raises:
            RequestError: naming the field that is missing, unknown, out of range or contradicts another.
        """
        strange = ["\\"] * ("\\" in text) + unseen(text)
        if strange:
            _wrong(f"has an invisible or escaped character, U+{ord(strange[0]):04X}")
        try:
            page = msgspec.convert(tomllib.loads(text), type=_Page)
        except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
            _wrong(str(error))
        _consistent(page)
        return cls(text, page.policy, tuple(page.custodians), tuple(page.datasets), tuple(page.projects))

    @property
    def canonical(self) -> bytes:
        """The bytes that are signed: the page itself."""
        return self.text.encode()

    @property
    def hash(self) -> bytes:
        """SHA-256 of the page."""
        return hashlib.sha256(self.canonical).digest()

    def project(self, name: str) -> Project:
        """The project of that name, or PolicyError."""
        found = [p for p in self.projects if p.name == name and name not in self.revoked]
        if not found:
            _refuse(f"There is no project {name!r} in the policy.", "It was never in it, or was revoked.")
        return found[0]

    def dataset(self, name: str) -> Dataset:
        """The dataset of that name, or PolicyError."""
        found = [d for d in self.datasets if d.name == name]
        if not found:
            _refuse(f"The policy does not open the dataset {name!r}.", "No custodian has signed for it.")
        return found[0]

    def projects_of(self, researcher: str) -> list[Project]:
        """The projects in which the holder of this public key may ask."""
        mine = [p for p in self.projects if researcher in p.researchers and p.name not in self.revoked]
        return [] if researcher in self.revoked else mine

    def allows(
        self, researcher: str, project: str, dataset: str, lane: str, *, metrics: Iterable[str] = ()
    ) -> Release:
        """Who releases the answer, if the holder of the key `researcher` may ask this at all.

        Raises:
            PolicyError: naming what the policy does not allow.
        """
        here = self.project(project)
        if here not in self.projects_of(researcher):
            _refuse(f"Your key is not in project {project!r}, or was revoked.", f"It is {researcher}.")
        self.dataset(dataset)
        if dataset not in here.datasets:
            _refuse(f"Project {project!r} may not use {dataset!r}.", f"Its own: {', '.join(here.datasets)}.")
        lanes = {str(name): value for name, value in here.lanes.items()}
        if lane not in lanes:
            _refuse(f"Project {project!r} may not {lane}.", f"Its lanes are: {', '.join(lanes) or 'none'}.")
        barred = [metric for metric in metrics if metric not in here.metrics]
        if barred:
            _refuse(f"The metric {barred[0]!r} may not leave.", f"These may: {', '.join(here.metrics)}.")
        return lanes[lane].release

    def admits(self, dataset: str, measurement: str, *, simulated: bool, tier: str) -> None:
        """Raise PolicyError unless this enclave, with a sandbox of this tier, may open `dataset`."""
        asked = self.dataset(dataset)
        fits = measurement in asked.measurements and ":" in measurement
        if not fits and not (simulated and "any simulated" in asked.measurements):
            _refuse(f"This enclave may not open {dataset!r}.", f"Nobody signed for {measurement}.")
        if tier not in ("S1", "S2", "S3") or tier < asked.sandbox:
            _refuse(f"The sandbox is too weak for {dataset!r}.", f"It is {tier}; needed is {asked.sandbox}.")


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A custodian's word on a policy: sign, veto, or revoke a `subject`, a researcher's key or a project."""

    act: Literal["sign", "veto", "revoke"]
    policy: str
    key: str
    time: int
    subject: str = ""
    reason: str = ""
    signature: bytes = b""

    @classmethod
    def decode(cls, line: bytes) -> Statement:
        """The statement in a line of JSON, or RequestError: a line that does not read may be a veto."""
        try:
            found = msgspec.json.decode(line, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            _wrong(f"has a statement that cannot be read: {error}")
        if msgspec.json.encode(found) != line:
            _wrong("has a statement that cannot be read: it was rewritten")
        return found

    def signed_bytes(self) -> bytes:
        """What the signature is over."""
        bare = msgspec.structs.replace(self, signature=b"")
        return b"rapha-lab/policy-statement/v1\0" + msgspec.json.encode(bare)

    def holds(self) -> bool:
        """Whether its signature is its key's; RequestError if its key is none."""
        return PublicKey.parse(self.key).verifies(self.signature, self.signed_bytes())


def state(
    act: Literal["sign", "veto", "revoke"],
    policy: Policy | str,
    key: PrivateKey,
    subject: str = "",
    reason: str = "",
) -> Statement:
    """`key`'s statement on `policy`, given as a page or by its hash, to append to its file of signatures."""
    name = policy if isinstance(policy, str) else policy.hash.hex()
    bare = Statement(act, name, str(key.public), int(time.time()), subject, reason)
    return msgspec.structs.replace(bare, signature=key.sign(bare.signed_bytes()))


@dataclass(frozen=True)
class Signed:
    """A policy's page with the statements made on it."""

    text: str
    statements: tuple[Statement, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Signed:
        """The page at `path` and the statements in `path` + ".signatures", one JSON object a line."""
        beside = Path(f"{path}.signatures")
        try:
            text = Path(path).read_bytes().decode()
            lines = beside.read_bytes().splitlines() if beside.exists() else []
            return cls(text, tuple(Statement.decode(line) for line in lines))
        except OSError as error:
            _refuse(f"There is no policy at {path}.", f"{error.strerror}.", "Give its path.")
        except UnicodeDecodeError:
            _wrong("cannot be read: it is not in UTF-8")

    def check(self, now: datetime | None = None, after: Policy | None = None) -> Policy:
        """The policy, if in force at `now`; if it succeeds `after`, the custodians of that one must agree.

        Raises:
            PolicyError: it expired, was vetoed or edited, or lacks signatures, which are named.
            RequestError: the page itself is wrong.
        """
        policy = Policy.parse(self.text)
        now, head = now or datetime.now(UTC), policy.head
        if now.date() > head.expires:
            _refuse(
                f"The policy {head.name!r} expired.", f"It ended on {head.expires}.", "Sign a new version."
            )
        if after is not None and after.hash != policy.hash:
            if head.version == after.head.version:
                _refuse(
                    f"The policy was changed and is still version {head.version}.",
                    "Another page of that version was in force.",
                    f"Write version = {head.version + 1}, and have it signed anew.",
                )
            if head.version < after.head.version:
                _refuse("The policy is an older version.", f"Version {after.head.version} was in force.")
            self._quorum(policy, after, f"Version {after.head.version}")
        return self._quorum(policy, policy, "This version")

    def _quorum(self, policy: Policy, judges: Policy, which: str) -> Policy:
        """`policy` less what was revoked, if enough of `judges`' custodians signed it and none vetoed."""
        names = {c.key: f"{c.name} ({c.role})" for c in judges.custodians}
        held = [s for s in self.statements if s.key in names and s.holds()]
        ours = [s for s in held if s.policy == policy.hash.hex()]
        for veto in (s for s in ours if s.act == "veto"):
            why = f"The reason: {veto.reason.rstrip('.')}." if veto.reason else ""
            _refuse(f"{names[veto.key]} vetoed the policy.", why, "Sign a version that they accept.")
        signed = {s.key for s in ours if s.act == "sign"}
        if len(signed) < judges.head.quorum:
            missing = ", ".join(names[key] for key in names if key not in signed)
            others = {names[s.key] for s in held if s.act == "sign" and s.key not in signed}
            why = f"{which} needs {judges.head.quorum} custodians' signatures and has {len(signed)}."
            if others:
                why += f" It was edited, or is another version, since {', '.join(sorted(others))} signed."
            instead = f"Missing: {missing}. They sign with rapha-lab policy sign."
            _refuse("The policy is not in force.", why, instead)
        return replace(policy, revoked=frozenset(s.subject for s in ours if s.act == "revoke"))


def _consistent(page: _Page) -> None:
    """Raise RequestError where two fields of `page` contradict each other."""
    keys = [c.key for c in page.custodians]
    for what, items in (
        ("custodians' keys", keys),
        ("custodians' names", [c.name for c in page.custodians]),
        ("datasets", [d.name for d in page.datasets]),
        ("projects", [p.name for p in page.projects]),
        *(("researchers of " + p.name, p.researchers) for p in page.projects),
    ):
        if len(set(items)) < len(items):
            _wrong(f"names one twice among the {what}")
    for key in [*keys, *(key for p in page.projects for key in p.researchers)]:
        if PublicKey.parse(key).algorithm != "ed25519":
            _wrong(f"has a key that does not sign: {key[:40]}")
    if page.policy.quorum > len(keys):
        _wrong(f"asks for {page.policy.quorum} signatures of {len(keys)} custodians")
    deltas = {d.name: d.delta for d in page.datasets}
    caps = {d.name: d.discovery_delta for d in page.datasets if d.epsilon is not None}
    for d in page.datasets:
        if d.discovery_delta and d.epsilon is None:
            _wrong(f"caps the discovery_delta of dataset {d.name!r}, but not its epsilon")
    for p in page.projects:
        for name in p.datasets:
            if name not in deltas:
                _wrong(f"gives project {p.name!r} a dataset it does not have: {name!r}")
            if "review" in p.lanes and p.lanes["review"].release == "auto":
                _wrong(
                    f"has nobody look at the lane review of project {p.name!r}, which nothing else protects"
                )
            if p.delta > deltas[name]:
                _wrong(f"gives project {p.name!r} a larger delta than its dataset {name!r}")
            if p.discovery_delta > caps.get(name, p.discovery_delta):
                _wrong(f"gives project {p.name!r} a larger discovery_delta than its dataset {name!r}")


def _wrong(why: str) -> NoReturn:
    raise RequestError(
        f"The policy {why}." if why[:2].islower() else f"The policy is wrong: {why}.", field="policy"
    )


def _refuse(what: str, why: str, instead: str = "Ask the custodians.") -> NoReturn:
    raise PolicyError(what, why, instead)
