"""The whole story: three roles sign, a training waits for two of them, and an outsider verifies model, dossier and log."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import ward
from clinic import Clinic, newest, until
from safetensors import safe_open
from safetensors.torch import save_file

import rapha_lab as rapha
from rapha_lab.cli import main
from rapha_lab.client.attacks import canaries
from rapha_lab.client.dossier import write
from rapha_lab.client.kept import load
from rapha_lab.protocol.errors import RequestError
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


@pytest.mark.parametrize(
    ("fault", "criterion"),
    [
        ("weights", "exactly the released weights"),
        ("buffer", "nothing beside the parameters"),
        ("values", "every charge is in the site's log"),
        ("decision", "the whole log verified"),
        ("page", "under a policy that its custodians signed"),
    ],
)
def test_what_was_changed_shows(kept: Path, tmp_path: Path, fault: str, criterion: str) -> None:
    """A weight, a tensor slipped in, a figure, a line of the log, a letter of the policy."""
    found, path = load(kept), tmp_path / kept.name
    tensors = {name: tensor.clone() for name, tensor in found.tensors.items()}
    with safe_open(kept, "pt") as file:
        told = json.loads(file.metadata()["rapha-lab"])
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
        told["policy"]["text"] = told["policy"]["text"].replace("epsilon = 900.0", "epsilon = 901.0")
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


def test_canaries_refute_an_epsilon_that_the_noise_does_not_carry(kept: Path) -> None:
    """The recipe as released is not refuted; a claim of a fortieth of its ε is."""
    release = load(kept).releases[0]
    assert canaries(release)["holds"]
    assert isinstance(release, Release)
    told = {name: getattr(release, name) for name in release.__struct_fields__}
    assert not canaries(Release(**told | {"epsilon": 0.05}))["holds"]
