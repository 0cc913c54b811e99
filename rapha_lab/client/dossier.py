"""The dossier of one model: all that an output checker needs in one place, as JSON, as a page, and as a crate.

Everything in it is checked while it is written, and by `check` anew: weights against the releases, receipts against the
log, the policy against its signatures, decisions against their signers. What does not hold is said, not left out;
evidence that was altered or is another's is refused. The fields, and
what each is for in SATRE, are in docs/dossier.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from rapha_lab.client import bundles, logs
from rapha_lab.client.appraisal import Endorsements
from rapha_lab.client.attestation import Attestation, charged_at, reappraise
from rapha_lab.client.crate import crate
from rapha_lab.client.kept import Kept, load
from rapha_lab.client.page import page
from rapha_lab.client.policies import purposes
from rapha_lab.client.releases import verify_release
from rapha_lab.protocol.errors import EvidenceError, RaphaError, RequestError, TrustError
from rapha_lab.protocol.keys import PublicKey
from rapha_lab.protocol.policy import Policy, Signed, Statement
from rapha_lab.protocol.release import Release

__all__ = ["VERSION", "check", "dossier", "write"]

VERSION = "rapha-lab/dossier/1"
ACCOUNTANT = (
    "Rényi differential privacy at one order, fixed from the policy's (epsilon, delta): a filter that is sound for "
    "adaptively chosen questions; Poisson sampling of patients, clipping per patient, Gaussian noise."
)


def write(model: str | Path, folder: str | Path) -> Path:
    """Write the dossier of a kept model into `folder`: dossier.json, dossier.html, ro-crate-metadata.json and what they name.

    Raises:
        RequestError: the model was not kept with its releases, or the folder has something in it.
        EvidenceError: the site's evidence was altered, or belongs to another key, policy, build or time.
    """
    kept, folder = load(model), Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RequestError(f"{folder} is not empty.", "", "Name another folder.", field="folder")
    told = dossier(kept)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(kept.path, folder / "model.safetensors")
    for name, text in _policy_files(kept).items():
        (folder / name).write_text(text)
    if kept.log.exists():
        shutil.copy(kept.log, folder / "site.log")
    (folder / "dossier.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    (folder / "dossier.html").write_text(page(told))
    (folder / "ro-crate-metadata.json").write_text(json.dumps(crate(told, folder), indent=1) + "\n")
    return folder


def check(
    folder: str | Path,
    key: str | None = None,
    *,
    endorsements: Endorsements | None = None,
    minimum_tcb: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The dossier in `folder` made anew from the model, the log and the evidence in it, once it is found to say the same.

    Args:
        folder: as `write` left it.
        key: the site's public key as it is known from elsewhere.
        endorsements: newer ones of the hardware's vendor, to judge the evidence by now.
        minimum_tcb: lowest firmware versions of an AMD platform to accept now.

    Raises:
        TrustError: naming the field or the file that says something else, or the key that is another one.
        EvidenceError: as `write`.
    """
    folder = Path(folder)
    kept = load(folder / "model.safetensors", folder / "site.log")
    if key is not None and key != Attestation.of(kept.told).key:
        raise EvidenceError(
            "The dossier is of another site.",
            f"Its evidence is bound to {Attestation.of(kept.told).key}.",
            _ASK,
        )
    try:
        told = json.loads((folder / "dossier.json").read_bytes())
        made = json.loads(json.dumps(dossier(kept, when=datetime.fromisoformat(told["written"]))))
        files = _policy_files(kept) | {"dossier.html": page(made)}
        files |= {"ro-crate-metadata.json": json.dumps(crate(made, folder), indent=1) + "\n"}
        found = {name: (folder / name).read_text() for name in files}
    except (
        OSError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise RequestError(f"{folder} holds no dossier.", why, field="folder") from None
    for name in {*made, *told}:
        if made.get(name) != told.get(name):
            raise TrustError(
                f"The dossier's field {name!r} was changed.", "The model's file says another.", _ASK
            )
    for name, text in files.items():
        if _without_pictures(found[name]) != _without_pictures(text):
            raise TrustError(
                f"The dossier's file {name} was changed.", "It says another than dossier.json.", _ASK
            )
    return dossier(kept, endorsements=endorsements, minimum_tcb=minimum_tcb)


_ASK = "Ask who gave it to you for the one that was written."


def _policy_files(kept: Kept) -> dict[str, str]:
    told = kept.told["policy"]
    return {
        "policy.toml": told["text"],
        "policy.toml.signatures": "".join(line + "\n" for line in told["statements"]),
    }


def _without_pictures(text: str) -> str:
    """Pictures are drawn by another program's version on another machine, and are not compared."""
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", text)


def dossier(
    kept: Kept,
    *,
    when: datetime | None = None,
    endorsements: Endorsements | None = None,
    minimum_tcb: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """All of it as JSON, judged at the time `when`, or now.

    Raises:
        EvidenceError: as `write`.
    """
    releases, when = kept.releases, when or datetime.now(UTC).replace(microsecond=0)
    training = kept.training
    proved, policy = Attestation.of(kept.told), Policy.parse(kept.told["policy"]["text"])
    audited, entries = _log(kept, proved)
    told: dict[str, Any] = {
        "dossier": VERSION,
        "written": when.isoformat(timespec="seconds"),
        "model": _model(kept),
        "privacy": _privacy(releases),
        "policy": _policy(kept) | {"in force when charged": _charged_under(policy, training, entries)},
        "attestation": {"site": str(kept.told["site"])}
        | reappraise(
            proved, training, policy, entries, endorsements=endorsements, minimum_tcb=minimum_tcb, now=when
        ),
        "training": {"dataset": training.dataset, "split": training.split, **training.values},
        "evaluation": [_evaluation(release) for release in releases if release is not training],
        "receipts": [_receipt(release, proved.key, entries) for release in releases],
        "decisions": list(_decisions(releases, entries, policy)),
        "attacks": kept.told.get("attack"),
        "log": audited,
    }
    told["criteria"] = list(_criteria(told))
    told["satre"] = _SATRE
    return told


_SATRE = {
    "3.3.07": {
        "asks": "whether a model may be exported, and under which technical controls",
        "answered by": ["policy", "privacy", "model", "attestation", "attacks"],
    },
    "3.3.09": {
        "asks": "a machine-readable record of each disclosure-control criterion and its outcome",
        "answered by": ["criteria", "receipts", "decisions", "log"],
    },
}


def _model(kept: Kept) -> dict[str, Any]:
    tensors = [{"name": n, "dtype": str(t.dtype), "shape": list(t.shape)} for n, t in kept.tensors.items()]
    return {
        "file": "model.safetensors",
        "sha256": hashlib.sha256(kept.path.read_bytes()).hexdigest(),
        "format": "safetensors: numbers by name, no code",
        "parameters": sum(kept.tensors[name].numel() for name in kept.parameters),
        "beside the parameters": [name for name in kept.tensors if name not in kept.parameters],
        "tensors": tensors,
        "exactly what was released": kept.unchanged(),
    }


def _privacy(releases: Sequence[Release]) -> dict[str, Any]:
    """Each answer's guarantee, and a bound for all: sums within a split, the largest over disjoint splits."""
    splits: dict[str, float] = {}
    everybody = sum(r.epsilon for r in releases if r.split == "all")
    for release in releases:
        for split in release.splits:
            if split != "all":
                splits[split] = splits.get(split, 0.0) + release.epsilon
    return {
        "unit": "one patient, with all records of that patient",
        "accountant": ACCOUNTANT,
        "epsilon at most": everybody + max(splits.values(), default=0.0),
        "delta at most": sum(r.delta for r in releases),
        "answers": [
            {
                "job": r.job,
                "asked": r.op,
                "dataset": r.dataset,
                "split": " and ".join(r.splits),
                "epsilon": r.epsilon,
                "delta": r.delta,
            }
            for r in releases
        ],
        "outside the guarantee": [r.job for r in releases if r.op == "review"],
    }


def _policy(kept: Kept) -> dict[str, Any]:
    told = kept.told["policy"]
    policy = Policy.parse(told["text"])
    statements = tuple(Statement.decode(line.encode()) for line in told["statements"])
    when = datetime.fromtimestamp(kept.told["kept"], UTC)
    try:
        Signed(told["text"], statements).check(when)
        in_force, why = True, ""
    except RaphaError as error:
        in_force, why = False, str(error)
    keys = {
        s.key: s.time for s in statements if s.act == "sign" and s.policy == policy.hash.hex() and s.holds()
    }
    return {
        "name": policy.head.name,
        "version": policy.head.version,
        "sha256": policy.hash.hex(),
        "purposes": purposes(policy),
        "expires": str(policy.head.expires),
        "in force when kept": in_force,
        "why not": why,
        "signers": [
            {"name": c.name, "role": c.role, "key": c.key, "signed": _time(keys[c.key])}
            for c in policy.custodians
            if c.key in keys
        ],
        "budgets": {
            p.name: {"epsilon": p.epsilon, "delta": p.delta, "discovery_delta": p.discovery_delta}
            for p in policy.projects
        },
        "page": told["text"],
    }


def _charged_under(policy: Policy, training: Release, entries: Sequence[Mapping[str, Any]]) -> bool | None:
    """Whether by the log it was the page in force between the training's reservation and its charge; None without these."""
    charged = charged_at(training, entries)
    if charged is None:
        return None
    kinds = [(n, entry.get("kind"), entry) for n, entry in enumerate(entries[:charged])]
    reserved = next(
        (n for n, kind, e in kinds if kind == "reserve" and e.get("job") == training.job), charged
    )
    pages = [(n, entry.get("hash")) for n, kind, entry in kinds if kind == "policy"]
    earlier = [page for n, page in pages if n < reserved]
    return policy.hash.hex() in {*earlier[-1:], *(page for n, page in pages if n > reserved)}


def _evaluation(release: Release) -> dict[str, Any]:
    rows = [
        {"name": row.name, "value": row.value, "standard error": row.error, "95 % interval": row.interval}
        for row in release.rows
    ]
    return {"title": release.title, "dataset": release.dataset, "split": release.split, "figures": rows}


def _receipt(release: Release, key: str, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    try:
        verify_release(release, PublicKey.parse(key))
        holds, why = True, ""
    except RaphaError as error:
        holds, why = False, str(error)
    index = release.receipt.get("index", -1)
    logged = 0 <= index < len(entries) and entries[index].get("job") == release.job
    mode = entries[index].get("mode", "") if logged else ""
    proof = {name: release.receipt.get(name) for name in ("index", "entry", "proof", "checkpoint")}
    return {
        "job": release.job,
        "holds": holds,
        "why not": why,
        "in the log kept": logged,
        "released by": mode,
    } | proof


def _log(kept: Kept, proved: Attestation) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the kept log says, verified, and its entries; it must extend the head that the hardware signed for."""
    if not kept.log.exists():
        return {"kept": False, "verified": False, "why not": "It was not kept beside the model."}, []
    told = {"kept": True, "file": "site.log", "sha256": hashlib.sha256(kept.log.read_bytes()).hexdigest()}
    try:
        bound = proved.evidence.build
        seen = {"The evidence": bound.checkpoint} if bound else {}
        said = list(logs.summary(logs.verify(kept.log, proved.key, seen=seen)))
        entries = [msgspec.json.decode(body, type=dict) for body, _ in bundles.read(kept.log).entries]
    except RaphaError as error:
        return told | {"verified": False, "why not": str(error)}, []
    return told | {"verified": True, "says": said}, entries


def _decisions(
    releases: Sequence[Release], entries: Sequence[dict[str, Any]], policy: Policy
) -> Iterator[dict[str, Any]]:
    """Custodians' decisions on these answers, from the log, each with whether its signature holds."""
    jobs = {release.job for release in releases}
    subjects = {e["subject"]: e["job"] for e in entries if e["kind"] == "airlock" and e["job"] in jobs}
    people = {c.key: f"{c.name} ({c.role})" for c in policy.custodians}
    for entry in entries:
        if entry["kind"] == "decision" and entry["subject"] in subjects:
            told = {n: entry[n] for n in ("act", "subject", "policy", "key", "time", "reason")}
            signed = b"rapha-lab/decision/v1\0" + msgspec.json.encode(told, order="sorted")
            holds = PublicKey.parse(entry["key"]).verifies(bytes.fromhex(entry["signature"]), signed)
            yield {
                "job": subjects[entry["subject"]],
                "act": entry["act"],
                "by": people.get(entry["key"], "somebody whom this page does not name"),
                "key": entry["key"],
                "when": _time(entry["time"]),
                "signature holds": holds,
                "subject": entry["subject"],
            }


def _criteria(told: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each disclosure-control criterion with its outcome: true, false, or null where it was not tried."""

    def outcome(criterion: str, holds: bool | None, evidence: str) -> dict[str, Any]:
        return {"criterion": criterion, "holds": holds, "evidence": evidence}

    needed = {"one custodian": 1, "two custodians": 2}
    approvals: dict[str, set[str]] = {}
    for each in told["decisions"]:
        if each["act"] == "approve" and each["signature holds"]:
            approvals.setdefault(each["job"], set()).add(each["key"])
    released = all(
        len(approvals.get(r["job"], ())) >= needed.get(r["released by"], 0) for r in told["receipts"]
    )
    model, privacy = told["model"], told["privacy"]
    yield outcome(
        "differentially private with the patient as unit",
        not privacy["outside the guarantee"],
        "privacy.answers",
    )
    yield outcome("only numbers, no code", True, "model.format")
    yield outcome("exactly the released weights", model["exactly what was released"], "model.sha256")
    yield outcome("nothing beside the parameters", not model["beside the parameters"], "model.tensors")
    yield outcome(
        "under a policy that its custodians signed", told["policy"]["in force when kept"], "policy.signers"
    )
    yield outcome(
        "charged while that policy was in force",
        told["policy"]["in force when charged"],
        "policy.in force when charged",
    )
    yield outcome("every charge is in the site's log", all(r["holds"] for r in told["receipts"]), "receipts")
    yield outcome("the whole log verified", told["log"]["verified"], "log")
    yield outcome(
        "released by whom the policy names", released if told["log"]["verified"] else None, "decisions"
    )
    attested = told["attestation"]
    yield outcome("computed in attested hardware", not attested["simulated"], "attestation.at training")
    ran = attested["its build ran when the training was charged"]
    yield outcome("by the build that was attested", ran, "attestation.measurement")
    yield outcome(
        "the evidence holds as of today", attested["now"]["status"] != "contraindicated", "attestation.now"
    )
    attacks = told["attacks"]
    yield outcome(
        "canaries do not refute epsilon", attacks and attacks["canaries"]["holds"], "attacks.canaries"
    )
    near = attacks and attacks["membership"]["private"]["auc"] < 0.6
    yield outcome("membership cannot be told by an attack on the recipe", near, "attacks.membership")


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
