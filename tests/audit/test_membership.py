"""The dossier's attack on membership, on records that everybody may see."""

from __future__ import annotations

import tomllib
from importlib import resources

import polars as pl
import pytest
import torch

from rapha_lab.client.attacks import PATIENTS, attack, lira
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.release import Release
from rapha_lab.protocol.schema import Schema

INPUTS = ["age", "sex", "kappa", "lambda_", "creatinine"]
RECIPE = {"noise": 2.0, "rate": 0.06, "steps": 300, "clip": 1.0}


@pytest.fixture(scope="module")
def schema() -> Schema:
    """Flchain's."""
    text = resources.files("rapha_lab.demo").joinpath("flchain.toml").read_text()
    return Schema.from_dict(tomllib.loads(text))


@pytest.fixture(scope="module")
def records() -> pl.DataFrame:
    """Its public records."""
    pytest.importorskip("sksurv")
    from rapha_lab.demo.build import flchain

    return flchain()


@pytest.fixture
def training() -> Release:
    """A training's release."""
    return Release(
        job="j", op="fit", dataset="flchain", split="train", site="s", epsilon=2.0, delta=1e-6, values=RECIPE
    )


def test_it_bites_on_plain_training_of_real_records_and_not_on_the_recipe(
    schema: Schema, records: pl.DataFrame, training: Release
) -> None:
    """Sixty residents of Olmsted County: who was among them can be told of the one and not of the other."""
    report = attack(_of(schema, records), training, schema, INPUTS, "death", records=records)
    told = report["membership"]
    assert report["on"].startswith("public records that the researcher holds")
    assert told["patients"] == PATIENTS
    assert told["plain"]["auc"] > 0.6
    assert abs(told["private"]["auc"] - 0.5) < 0.06
    assert repr(report).startswith("canaries: ε is ")
    assert len(repr(report)) < 400


def _of(schema: Schema, records: pl.DataFrame) -> torch.nn.Module:
    """A network that can learn sixty patients by heart."""
    from rapha_lab.client.rehearsal import encoded

    width = encoded(schema, records.head(2), INPUTS).shape[1]
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(width, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))


def test_too_few_records_are_refused(schema: Schema, records: pl.DataFrame, training: Release) -> None:
    """Or such without the target."""
    for frame in (records.head(PATIENTS - 1), records.drop("death"), records.clear()):
        with pytest.raises(RequestError) as caught:
            lira(_of(schema, records), training, schema, INPUTS, "death", records=frame)
        assert caught.value.field == "records"
