"""Patients whose target is not known."""

from __future__ import annotations

import polars
import torch

from rapha_lab.curator.cohort import Cohort
from rapha_lab.curator.mechanisms.train import with_target
from rapha_lab.protocol.schema import Column, Schema


def test_a_patient_without_a_target_is_not_learned_from() -> None:
    """A missing outcome is no outcome of 0: the patient is left out of the training."""
    died = Column(name="died", type="boolean", meaning="m", public="p", missing="possible")
    schema = Schema(
        name="d",
        title="t",
        citation="c",
        licence="l",
        patient="id",
        source="d.csv",
        columns=(died,),
        patients=4,
    )
    frame = polars.DataFrame({"id": ["a", "b", "c", "d"], "died": [True, None, False, None]})
    view = Cohort(schema, frame, salt=bytes(16)).view("all")
    known = with_target(view, {"x": ["died.missing"], "target": "died"})
    assert torch.equal(known, torch.tensor([True, False, True, False]))
    assert with_target(view, {"x": "died", "target": "died.missing"}).all()
