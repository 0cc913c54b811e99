"""The whole story: three roles sign, a training waits for two of them, and an outsider verifies model, dossier and log."""

from __future__ import annotations

import base64
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import ward
from clinic import Clinic, newest, until
from safetensors import safe_open
from safetensors.torch import save_file

import rapha_lab as rapha
from rapha_lab.cli import main
from rapha_lab.client import bundles
from rapha_lab.client.appraisal import Verifier
from rapha_lab.client.attacks import canaries
from rapha_lab.client.attestation import Attestation, reappraise
from rapha_lab.client.dossier import _charged_under, _privacy, check, dossier, write
from rapha_lab.client.kept import load
from rapha_lab.client.page import _settings
from rapha_lab.enclave.attester import SimulatedAttester
from rapha_lab.protocol.errors import EvidenceError, RaphaError, RequestError, TrustError
from rapha_lab.protocol.evidence import Evidence
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import Policy
from rapha_lab.protocol.release import Release
from rapha_lab.protocol.schema import Schema
from rapha_lab.session import parcels

STORY = f"""
import torch
model = torch.nn.Linear({len(ward.FEATURES)}, 1)
history = patients.train.fit(model, inputs={ward.FEATURES}, target="died", epochs=2, epsilon=2)
quality = patients.test.evaluate(model, ["auroc", "brier"], epsilon=1)
"""
SCHEMA = Schema.from_dict(tomllib.loads(ward.SCHEMA))


@pytest.fixture(scope="module")
def kept(shared: Clinic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as its researcher keeps it, after a guardian and a counsel released it."""
    names = ["model", "history", "quality"]
    job = until(shared.connect().run(STORY, "ward", session="story", outputs=names), "waiting")
    for number in (0, 2):
        custodian = shared.custodian(number)
        custodian.approve(newest(custodian)["subject"])
    until(job, "done")
    model = torch.nn.Linear(len(ward.FEATURES), 1)
    told = parcels.unpack(job.values, job.blob, into={"model": model})
    report = rapha.attack(model, told["history"], SCHEMA, ward.FEATURES, "died")
    path = tmp_path_factory.mktemp("kept") / "mortality.safetensors"
    return rapha.keep(path, model, told["history"], told["quality"], site=shared.connect(), attack=report)


@pytest.fixture(scope="module")
def folder(kept: Path) -> Path:
    return write(kept, kept.with_suffix(".dossier"))


def held(folder: Path) -> dict[str, bool | None]:
    return {c["criterion"]: c["holds"] for c in json.loads((folder / "dossier.json").read_text())["criteria"]}


def test_a_selection_counts_for_the_patients_who_scored_it(kept: Path) -> None:
    """Whoever of them is asked again gave both; the page says what was chosen, and from how many."""
    training, quality = load(kept).releases
    selection = {
        "candidates": 4,
        "mean": 5.0,
        "runs": 14,
        "chosen": 1,
        "settings": {"lr": 0.3},
        "score": None,
    }
    chosen = msgspec.structs.replace(training, values=training.values | {"selection": selection})
    judged = msgspec.structs.replace(quality, split="validation")
    assert _privacy([training, judged])["epsilon at most"] == 2.0  # other patients
    told = _privacy([chosen, judged])
    assert told["epsilon at most"] == 3.0
    assert [answer["split"] for answer in told["answers"]] == ["train and validation", "validation"]
    rows = dict(_settings({"dataset": "ward", **chosen.values}))
    assert (rows["selection: candidates"], rows["selection: chosen lr"]) == (4, 0.3)
    assert "selection" not in rows
    assert (
        dict(_settings(training.values)).keys()
        == dict(_settings({**training.values, "selection": None})).keys()
    )


def test_an_outsider_verifies_it_with_one_command(
    folder: Path, shared: Clinic, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Elsewhere, with the dossier's folder and the site's published key alone."""
    monkeypatch.setenv("RAPHA_LAB_HOME", str(tmp_path / "home"))
    shutil.copytree(folder, tmp_path / "dossier")
    monkeypatch.chdir(tmp_path / "dossier")
    assert main(["log", "verify", "site.log", "--key", str(shared.site.signing_key.public)]) == 0
    assert "hold" in capsys.readouterr().out
    assert main(["policy", "check", "policy.toml"]) == 0
    assert main(["dossier", ".", "--key", str(shared.site.signing_key.public)]) == 0
    told = capsys.readouterr().out
    assert "DOES NOT HOLD  computed in attested hardware" in told
    assert told.count("warning. SIMULATED ENCLAVE") == 2  # at training, and now
    assert main(["dossier", ".", "--key", str(PrivateKey.create().public)]) == 1
    assert "of another site" in capsys.readouterr().err


def test_each_criterion_has_its_outcome_and_its_evidence(folder: Path) -> None:
    """All hold but the one of the hardware, which is not there."""
    told = json.loads((folder / "dossier.json").read_text())
    outcomes = held(folder)
    assert outcomes.pop("computed in attested hardware") is False
    assert all(outcomes.values()), outcomes
    assert [s["role"] for s in told["policy"]["signers"]] == [
        "Caldicott Guardian",
        "Data Protection Officer",
        "General Counsel",
    ]
    assert {d["by"] for d in told["decisions"]} == {"C0 (Caldicott Guardian)", "C2 (General Counsel)"}
    assert [r["released by"] for r in told["receipts"]] == ["two custodians", "auto"]
    assert told["privacy"]["epsilon at most"] == 2.0  # train and test are other patients
    assert {f["name"] for f in told["evaluation"][0]["figures"]} >= {"auroc", "brier"}
    assert (
        told["attacks"]["membership"]["plain"]["auc"] > told["attacks"]["membership"]["private"]["auc"] + 0.05
    )
    assert set(told["satre"]["3.3.09"]["answered by"]) <= set(told)


def test_the_page_stands_alone(folder: Path) -> None:
    """Pictures inside, a warning in front, nothing loaded from elsewhere, no markup of the site's."""
    text = (folder / "dossier.html").read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "Simulated enclave." in text
    assert "DOES NOT HOLD" in text
    assert "http" not in text.split("<pre>")[0].replace("data:image", "")
    assert "<script" not in text


def test_the_crate_is_one_and_names_what_is_there(folder: Path) -> None:
    """As the reference library reads it, by the Five Safes profile."""
    from rocrate.rocrate import ROCrate

    crate = ROCrate(folder)
    root = crate.root_dataset
    assert root["conformsTo"].id == "https://w3id.org/5s-crate/0.4"
    assert {part.id for part in root["hasPart"]} == {
        p.name for p in folder.iterdir() if p.name != "ro-crate-metadata.json"
    }
    told = json.loads((folder / "ro-crate-metadata.json").read_text())["@graph"]
    ids = {entity["@id"] for entity in told}
    assert len(ids) == len(told)
    for entity in told:
        for value in entity.values():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, dict) and not one["@id"].startswith("http"):
                    assert one["@id"] in ids
    assert sum("#decision" in identifier for identifier in ids) == 2


def opened(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A kept model's tensors, and what its file says of itself, to be changed."""
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["rapha-lab"])
    return {name: tensor.clone() for name, tensor in load(path).tensors.items()}, told


def changed(kept: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a kept model, with its log, whose file says something else."""
    tensors, told = opened(kept)
    change(told)
    path = folder / kept.name
    save_file(tensors, path, metadata={"rapha-lab": json.dumps(told)})
    shutil.copy(load(kept).log, path.with_suffix(".log"))
    return path


def foreign(told: dict[str, Any], **fields: Any) -> None:
    """Evidence of the same kind, honestly made, bound to something else."""
    evidence = msgspec.convert(told["attestation"]["evidence"], Evidence)
    binding = msgspec.structs.replace(evidence.binding, **fields)
    made = SimulatedAttester(Verifier().verify(evidence).measurement).evidence(binding)
    made = msgspec.structs.replace(made, build=evidence.build)
    told["attestation"]["evidence"] = msgspec.to_builtins(made)


def edited(told: dict[str, Any]) -> None:
    payload = bytearray(base64.b64decode(told["attestation"]["evidence"]["payload"]))
    payload[-3] ^= 1
    told["attestation"]["evidence"]["payload"] = base64.b64encode(payload).decode()


def of_another_build(told: dict[str, Any]) -> None:
    evidence = msgspec.convert(told["attestation"]["evidence"], Evidence)
    made = SimulatedAttester("sha256:" + "ab" * 32).evidence(evidence.binding)
    told["attestation"]["evidence"] = msgspec.to_builtins(msgspec.structs.replace(made, build=evidence.build))


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "none": (lambda told: told.pop("attestation"), "holds no evidence"),
    "malformed": (lambda told: told["attestation"].update(evidence={"payload": 1}), "holds no evidence"),
    "edited": (edited, "was altered"),
    "another key": (
        lambda told: foreign(told, signing_key=str(PrivateKey.create().public)),
        "another key than the one that signed the training's receipt",
    ),
    "another policy": (lambda told: foreign(told, policy_hash=b"q" * 32), "another policy than the page"),
    "an edited page": (
        lambda told: told["policy"].update(text=told["policy"]["text"].replace("= 900.0", "= 901.0")),
        "another policy than the page",
    ),
    "another log": (lambda told: foreign(told, checkpoint_hash=b"q" * 32), "not the one that the evidence"),
    "another build": (of_another_build, "no release that measures"),
    "the binding alone": (
        lambda told: told["attestation"]["evidence"]["binding"].update(
            nonce=base64.b64encode(bytes(32)).decode()
        ),
        "not those that the evidence is bound to",
    ),
    "an older time": (lambda told: told["attestation"].update(at=1.7e9), "another time"),
    "a later time": (lambda told: told["attestation"].update(at=9.9e9), "future"),
    "no time": (lambda told: told["attestation"].update(at=1e300), "is none"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_evidence_that_is_not_the_trainings_is_refused_by_name(
    kept: Path, tmp_path: Path, fault: str
) -> None:
    """When the dossier is written, and when one is checked whose model's file was exchanged."""
    change, reason = FAULTS[fault]
    path = changed(kept, tmp_path, change)
    with pytest.raises(TrustError, match=reason):
        write(path, tmp_path / "dossier")
    write(kept, tmp_path / "good")
    shutil.copy(path, tmp_path / "good" / "model.safetensors")
    with pytest.raises(TrustError, match=reason):
        check(tmp_path / "good")


def test_evidence_from_before_another_build_was_started_is_refused(kept: Path) -> None:
    """The log says which build ran when the training was charged; without the log nobody says it."""
    found = load(kept)
    proved, training = Attestation.of(found.told), found.releases[0]
    policy = Policy.parse(found.told["policy"]["text"])
    entries = [msgspec.json.decode(body, type=dict) for body, _ in bundles.read(found.log).entries]
    ran = "its build ran when the training was charged"
    assert reappraise(proved, training, policy, entries)[ran] is True
    assert reappraise(proved, training, policy)[ran] is None
    older = entries[: training.receipt["index"]]  # another build may have been started before the charge
    assert reappraise(proved, training, policy, older)[ran] is None
    build = next(number for number, entry in enumerate(entries) if entry["kind"] == "release-of-enclave")
    entries[build] |= {"measurements": ["sha256:" + "ab" * 32]}
    with pytest.raises(EvidenceError, match="another build than the one that ran"):
        reappraise(proved, training, policy, entries)


def test_the_training_is_the_one_that_gave_the_weights(kept: Path, tmp_path: Path) -> None:
    """Not another one, of a better time, that is put before it for its evidence and its history."""

    def put_before(told: dict[str, Any]) -> None:
        other = told["releases"][0] | {"job": "another", "tensors": "ab" * 32}
        told["releases"].insert(0, other)

    found = load(changed(kept, tmp_path, put_before))
    assert [release.job for release in found.releases[:2]] == ["another", load(kept).training.job]
    assert found.training.job == load(kept).training.job
    assert found.unchanged()
    held = {each["criterion"]: each["holds"] for each in dossier(found)["criteria"]}
    assert held["by the build that was attested"]
    assert not held["every charge is in the site's log"]


def test_a_page_from_after_the_training_was_charged_shows(kept: Path) -> None:
    """Only what the log says was in force between reservation and charge counts; without a log nothing is said."""
    found = load(kept)
    training, policy = found.releases[0], Policy.parse(found.told["policy"]["text"])
    entries = [msgspec.json.decode(body, type=dict) for body, _ in bundles.read(found.log).entries]
    assert _charged_under(policy, training, entries) is True
    assert _charged_under(policy, training, []) is None
    assert _charged_under(policy, training, entries[: training.receipt["index"]]) is None
    other = {"kind": "policy", "hash": "ab" * 32}
    charged = training.receipt["index"]
    reserved = next(n for n, e in enumerate(entries) if e["kind"] == "reserve" and e["job"] == training.job)
    assert reserved < charged
    before = [*entries[:reserved], other, *entries[reserved + 1 :]]
    assert _charged_under(policy, training, before) is False
    renamed = [e | {"hash": "ab" * 32} if e["kind"] == "policy" else e for e in entries]
    later = [*renamed, {"kind": "policy", "hash": policy.hash.hex()}]
    assert _charged_under(policy, training, later) is False


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("dossier.json", '"simulated": true', '"simulated": false', "field 'attestation'"),
        ("dossier.json", '"epsilon at most": 2.0', '"epsilon at most": 1.0', "field 'privacy'"),
        ("dossier.json", '"holds": false', '"holds": true', "field 'criteria'"),
        ("dossier.json", '"satre"', '"more"', "field '(satre|more)'"),
        ("dossier.html", "DOES NOT HOLD", "holds", "dossier.html"),
        ("ro-crate-metadata.json", "does not hold", "holds", "ro-crate-metadata.json"),
        ("policy.toml", "900.0", "9.0", "policy.toml"),
        ("policy.toml.signatures", '"sign"', '"Sign"', "policy.toml.signatures"),
    ],
)
def test_an_edited_dossier_is_refused_by_name(
    folder: Path, tmp_path: Path, name: str, old: str, new: str, reason: str
) -> None:
    """Whatever file it is in; as it was written it is found whole."""
    shutil.copytree(folder, tmp_path / "dossier")
    assert check(tmp_path / "dossier")["attestation"]["at training"]["status"] == "warning"
    path = tmp_path / "dossier" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(TrustError, match=reason):
        check(tmp_path / "dossier")


def test_what_is_no_dossier_is_refused(folder: Path, tmp_path: Path) -> None:
    """An empty folder, no JSON, JSON of another kind, nested a thousand deep."""
    with pytest.raises(RequestError):
        check(tmp_path)
    shutil.copytree(folder, tmp_path / "dossier")
    for text in ("", "[]", "{}", "7", '{"written": 7}', "[" * 5000, "\0"):
        (tmp_path / "dossier" / "dossier.json").write_text(text)
        with pytest.raises(RequestError):
            check(tmp_path / "dossier")


def test_a_models_file_of_somebodys_making_is_refused_without_a_traceback(
    kept: Path, folder: Path, tmp_path: Path
) -> None:
    """Whatever it says of attacks, answers, receipts, policy and parameters."""
    shutil.copytree(folder, tmp_path / "dossier")
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda told: told.update(attack={"canaries": {}}),
        lambda told: told.update(attack=7),
        lambda told: told["releases"][1].update(values={"kind": "histogram"}),
        lambda told: told["releases"][1].update(values={"metrics": 7}),
        lambda told: told["releases"][0].update(receipt={"index": "x", "checkpoint": []}),
        lambda told: told["releases"][0].update(dataset="another"),
        lambda told: told["policy"].update(text="[policy]"),
        lambda told: told["policy"].update(statements=["{}"]),
        lambda told: told.update(kept=10**30),
        lambda told: told.update(parameters=[[]]),
        lambda told: told.pop("site"),
        lambda told: told.update(releases=[]),
    ]
    for change in changes:
        path = changed(kept, tmp_path, change)
        shutil.copy(path, tmp_path / "dossier" / "model.safetensors")
        with pytest.raises(RaphaError):
            check(tmp_path / "dossier")


@pytest.mark.parametrize(
    ("fault", "criterion"),
    [
        ("weights", "exactly the released weights"),
        ("buffer", "nothing beside the parameters"),
        ("values", "every charge is in the site's log"),
        ("decision", "the whole log verified"),
        ("signature", "under a policy that its custodians signed"),
    ],
)
def test_what_was_changed_shows(kept: Path, tmp_path: Path, fault: str, criterion: str) -> None:
    """A weight, a tensor slipped in, a figure, a line of the log, a signature that is not there."""
    found, path = load(kept), tmp_path / kept.name
    tensors, told = opened(kept)
    log = found.log.read_text()
    if fault == "weights":
        tensors["bias"] += 1e-6
    elif fault == "buffer":
        tensors["rows"] = torch.zeros(3)
    elif fault == "values":
        told["releases"][1]["values"]["metrics"]["auroc"]["value"] += 0.1
    elif fault == "decision":
        log = "".join(line for line in log.splitlines(keepends=True) if '\\"decision\\"' not in line)
        assert log != found.log.read_text()
    else:
        del told["policy"]["statements"][1:]
    save_file(tensors, path, metadata={"rapha-lab": json.dumps(told)})
    path.with_suffix(".log").write_text(log)
    assert held(write(path, tmp_path / "dossier"))[criterion] is False


def test_a_file_that_is_none_is_refused(tmp_path: Path, kept: Path) -> None:
    """Without releases, or no safetensors at all; a training must be among them."""
    (tmp_path / "a").write_bytes(b"not a model")
    save_file({"a": torch.zeros(1)}, tmp_path / "b")
    for name in ("a", "b", "c"):
        with pytest.raises(RequestError):
            write(tmp_path / name, tmp_path / "d")
    with pytest.raises(RequestError, match="training"):
        rapha.keep(tmp_path / "x", torch.nn.Linear(1, 1), load(kept).releases[1])
    with pytest.raises(RequestError, match="The model is a Release"):
        rapha.keep(tmp_path / "x", *load(kept).releases)


def test_canaries_refute_an_epsilon_that_the_noise_does_not_carry(kept: Path) -> None:
    """The recipe as released is not refuted; a claim of a fortieth of its ε is."""
    release = load(kept).releases[0]
    assert canaries(release)["holds"]
    assert isinstance(release, Release)
    told = {name: getattr(release, name) for name in release.__struct_fields__}
    assert not canaries(Release(**told | {"epsilon": 0.05}))["holds"]
