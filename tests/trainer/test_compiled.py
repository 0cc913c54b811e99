"""A compiled step computes what the eager one does, is kept for later jobs, and failing leaves the eager one."""

from __future__ import annotations

import pytest
import torch
from conftest import lifted
from test_models import MODELS

from rapha_lab.curator.lift import compiling


@pytest.mark.parametrize("name", ["mlp", "cnn with group norm", "embedding and mlp", "attention"])
def test_the_traced_step_gives_the_same_sums(name: str) -> None:
    """Traced with its backward pass into one graph, to the last digits."""
    make, loss, xs, ys = MODELS[name]
    torch.manual_seed(5)
    model, x, y = make(), xs(), ys()
    model(x)
    it, parameters, constants = lifted(model, loss, x, y)
    it.microbatch = 10
    batch = {"x": torch.cat([x, xs()]), "target": torch.cat([y, ys()])}
    mask = torch.arange(10) != 4
    eager = it.clipped_sum(parameters, constants, batch, mask, 0.3)
    assert it.compile(parameters, constants, backend="eager")
    for parameter, t in it.clipped_sum(parameters, constants, batch, mask, 0.3).items():
        torch.testing.assert_close(t, eager[parameter], rtol=1e-5, atol=1e-7)


def test_a_second_job_of_the_same_shape_starts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled step is found by the graph's structure; weights are arguments."""
    make, loss, xs, ys = MODELS["logistic"]
    x, y = xs(), ys()
    it, parameters, constants = lifted(make(), loss, x, y)
    assert it.compile(parameters, constants, backend="eager")
    monkeypatch.setattr(compiling, "_compile", None)
    again, parameters, constants = lifted(make(), loss, x, y)
    assert again.compile(parameters, constants, backend="eager")
    it.microbatch = again.microbatch
    assert again._step is it._step


def test_without_a_compiler_the_step_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never fails for want of speed."""
    make, loss, xs, ys = MODELS["autoencoder"]
    x, y = xs(), ys()
    it, parameters, constants = lifted(make(), loss, x, y)

    def broken(*args: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiling, "_compile", broken)
    assert not it.compile(parameters, constants)
    rows = {"x": x, "target": y}
    assert it.clipped_sum(parameters, constants, rows, torch.ones(5, dtype=torch.bool), 1.0)
