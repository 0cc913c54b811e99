"""The dossier as a Five Safes RO-Crate (w3id.org/5s-crate): what TREs exchange about an output and its checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["crate"]

CONTEXT, CRATE, PROFILE = (
    "https://w3id.org/ro/crate/1.2/context",
    "https://w3id.org/ro/crate/1.2",
    "https://w3id.org/5s-crate/0.4",
)
SHP = "https://w3id.org/shp#"
FILES = {
    "dossier.json": ("The dossier", "application/json"),
    "dossier.html": ("The dossier, to print", "text/html"),
    "model.safetensors": ("The model's weights", "application/octet-stream"),
    "policy.toml": ("The custodians' policy", "application/toml"),
    "policy.toml.signatures": ("Statements on the policy", "application/jsonl"),
    "site.log": ("The site's transparency log", "application/jsonl"),
}


def crate(told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The content of ro-crate-metadata.json for the dossier in `folder`."""
    files = [name for name in FILES if (folder / name).exists()]
    policy, site = told["policy"], told["attestation"]
    signers = [_person(s["key"], s["name"], s["role"]) for s in policy["signers"]]
    acts = [_training(told), _sign_off(told), *_disclosure(told)]
    known = {person["@id"] for person in signers}
    deciders = {d["key"]: _person(d["key"], d["by"], "custodian") for d in told["decisions"]}
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"Dossier of a model trained on {told['training']['dataset']}",
        "description": "Privacy guarantee, policy, attestation, receipts, evaluation and attack report of one model.",
        "conformsTo": {"@id": PROFILE},
        "datePublished": told["written"],
        "license": {"@id": "#licence"},
        "publisher": {"@id": "#site"},
        "sourceOrganization": {"@id": "#project"},
        "hasPart": [{"@id": name} for name in files],
        "mainEntity": {"@id": "model.safetensors"},
        "mentions": [{"@id": act["@id"]} for act in acts],
    }
    about = {"@id": "./"}
    descriptor = {
        "@id": "ro-crate-metadata.json",
        "@type": "CreativeWork",
        "conformsTo": {"@id": CRATE},
        "about": about,
    }
    graph = [
        descriptor,
        root,
        {"@id": PROFILE, "@type": "CreativeWork", "name": "Five Safes RO-Crate profile", "version": "0.4"},
        {"@id": "#licence", "@type": "CreativeWork", "name": "As the policy says: " + policy["purposes"]},
        {"@id": "#site", "@type": "Organization", "name": site["site"], "identifier": site["site key"]},
        {"@id": "#project", "@type": "Project", "name": policy["name"], "identifier": policy["sha256"]},
        *(_file(folder, name) for name in files),
        *signers,
        *(person for person in deciders.values() if person["@id"] not in known),
        *acts,
    ]
    return {"@context": CONTEXT, "@graph": graph}


def _file(folder: Path, name: str) -> dict[str, Any]:
    words, kind = FILES[name]
    size = (folder / name).stat().st_size
    return {"@id": name, "@type": "File", "name": words, "encodingFormat": kind, "contentSize": str(size)}


def _person(key: str, name: str, role: str) -> dict[str, Any]:
    return {"@id": f"#{key}", "@type": "Person", "name": name, "jobTitle": role, "identifier": key}


def _training(told: dict[str, Any]) -> dict[str, Any]:
    privacy = told["privacy"]
    return {
        "@id": "#training",
        "@type": "CreateAction",
        "name": f"Training by DP-SGD on {told['training']['dataset']}, {told['training']['split']}",
        "description": f"epsilon {privacy['epsilon at most']:.4g} at most, per patient. {privacy['accountant']}",
        "agent": {"@id": "#site"},
        "result": {"@id": "model.safetensors"},
        "actionStatus": "http://schema.org/CompletedActionStatus",
    }


def _sign_off(told: dict[str, Any]) -> dict[str, Any]:
    policy = told["policy"]
    return {
        "@id": "#sign-off",
        "@type": "AssessAction",
        "additionalType": {"@id": f"{SHP}SignOff"},
        "name": f"Policy {policy['name']}, version {policy['version']}, signed by its custodians",
        "agent": [{"@id": f"#{s['key']}"} for s in policy["signers"]],
        "instrument": {"@id": "policy.toml"},
        "object": {"@id": "#project"},
        "actionStatus": _status(policy["in force when kept"]),
    }


def _disclosure(told: dict[str, Any]) -> list[dict[str, Any]]:
    checks = {
        "@id": "#disclosure-check",
        "@type": "AssessAction",
        "additionalType": {"@id": f"{SHP}DisclosureCheck"},
        "name": "Automatic checks of the dossier",
        "description": "; ".join(f"{c['criterion']}: {_WORDS[c['holds']]}" for c in told["criteria"]),
        "agent": {"@id": "#site"},
        "object": {"@id": "model.safetensors"},
        "result": {"@id": "dossier.json"},
        "actionStatus": "http://schema.org/CompletedActionStatus",
    }
    decided = [
        {
            "@id": f"#decision-{number}",
            "@type": "AssessAction",
            "additionalType": {"@id": f"{SHP}DisclosureCheck"},
            "name": f"{d['act']} of the answer of job {d['job']}",
            "agent": {"@id": f"#{d['key']}"},
            "object": {"@id": "model.safetensors"},
            "endTime": d["when"],
            "actionStatus": _status(d["signature holds"]),
        }
        for number, d in enumerate(told["decisions"])
    ]
    return [checks, *decided]


_WORDS = {True: "holds", False: "does not hold", None: "not tried"}


def _status(holds: bool) -> str:
    return f"http://schema.org/{'Completed' if holds else 'Failed'}ActionStatus"
