"""Other engines on the same workloads, each with its own noise: Opacus in its four modes, and JAX's jit(vmap(grad))."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from workloads import Recurrent, Series, Text, Workload

Step = Callable[[], Any]
CLIP, RATE = 0.1, 1e-3


def opacus(workload: Workload, mode: str) -> Step:
    """One step of Opacus: mode is hooks, ew (expanded weights), functorch or ghost."""
    from opacus.grad_sample import (
        GradSampleModule,
        GradSampleModuleExpandedWeights,
        GradSampleModuleFastGradientClipping,
    )
    from opacus.layers import DPGRU
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
    from opacus.validators import ModuleValidator

    torch.manual_seed(0)
    model = Recurrent(DPGRU) if workload.make is Recurrent else workload.make()
    if workload.make in (Series, Text):
        model = ModuleValidator.fix(model)
    x, y = workload.data()
    settings = {"noise_multiplier": 1.0, "max_grad_norm": CLIP, "expected_batch_size": workload.batch}
    if mode == "ghost":
        private: Any = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="mean"
        )
        plain = torch.optim.SGD(private.parameters(), lr=RATE)
        optimizer: Any = DPOptimizerFastGradientClipping(plain, **settings)
        loss: Any = DPLossFastGradientClipping(private, optimizer, nn.CrossEntropyLoss())
    else:
        wrap = GradSampleModuleExpandedWeights if mode == "ew" else GradSampleModule
        private = wrap(model, **({"force_functorch": True} if mode == "functorch" else {}))
        optimizer = DPOptimizer(torch.optim.SGD(private.parameters(), lr=RATE), **settings)
        loss = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(private(x), y).backward()
        optimizer.step()

    return step


def jax_step(workload: Workload) -> Step:
    """One step of jit(vmap(grad)) with clipping, noise and update, for models of linear layers, ReLU and a GRU."""
    import jax
    import jax.numpy as jnp

    if workload.make is Recurrent:
        weights = _arrays(Recurrent())

        def logits(p: Any, x: Any) -> Any:
            h = x
            for layer in (0, 1):
                wi, wh, bi, bh = (
                    p[f"layers.{n}_l{layer}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )

                def cell(state: Any, given: Any, wh: Any = wh, bh: Any = bh) -> Any:
                    (r, z, n), (hr, hz, hn) = jnp.split(given, 3), jnp.split(wh @ state + bh, 3)
                    z, n = jax.nn.sigmoid(z + hz), jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn)
                    new = (1 - z) * n + z * state
                    return new, new

                _, h = jax.lax.scan(cell, jnp.zeros(wh.shape[1]), h @ wi.T + bi)
            return p["head.weight"] @ h[-1] + p["head.bias"]
    else:
        model = workload.make()
        if not all(isinstance(layer, nn.Linear | nn.ReLU) for layer in model.children()):
            raise NotImplementedError("not written for JAX")
        weights = _arrays(model)

        def logits(p: Any, x: Any) -> Any:
            last = max(int(name.split(".")[0]) for name in p)
            for k in range(0, last + 1, 2):
                x = p[f"{k}.weight"] @ x + p[f"{k}.bias"]
                x = jax.nn.relu(x) if k < last else x
            return x

    def loss(p: Any, x: Any, y: Any) -> Any:
        return -jax.nn.log_softmax(logits(p, x))[y]

    @jax.jit
    def update(p: Any, key: Any, x: Any, y: Any) -> Any:
        rows = jax.vmap(jax.grad(loss), (None, 0, 0))(p, x, y)
        square = sum((g.reshape(len(g), -1) ** 2).sum(1) for g in rows.values())
        scale = jnp.minimum(1, CLIP / jnp.sqrt(square))
        keys = dict(zip(p, jax.random.split(key, len(p)), strict=True))
        grads = {
            n: (jnp.tensordot(scale, g, 1) + CLIP * jax.random.normal(keys[n], p[n].shape)) / workload.batch
            for n, g in rows.items()
        }
        return {n: p[n] - RATE * grads[n] for n in p}

    x, y = (jnp.asarray(t.numpy()) for t in workload.data())
    state = {"p": weights, "key": jax.random.key(0)}

    def step() -> None:
        state["key"], now = jax.random.split(state["key"])
        state["p"] = update(state["p"], now, x, y)
        jax.block_until_ready(state["p"])

    return step


def _arrays(model: nn.Module) -> dict[str, Any]:
    import jax.numpy as jnp

    return {name: jnp.asarray(t.detach().numpy()) for name, t in model.named_parameters()}


PEERS: dict[str, Callable[[Workload], Step]] = {
    **{f"opacus {mode}": (lambda w, m=mode: opacus(w, m)) for mode in ("hooks", "ew", "functorch", "ghost")},
    "jax": jax_step,
}
# per-sample gradients of 9.5 M parameters at batch 4,096 would take 150 GB
TOO_LARGE = {("wide4096", name) for name in PEERS if name != "opacus ghost"}
# more than twenty times the plain step where tried
TOO_SLOW = {(name, "opacus functorch") for name in ("gru", "transformer", "text", "bag")}
