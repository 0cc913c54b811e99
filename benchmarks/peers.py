"""Other engines on the same workloads, each with its own noise: Opacus in four modes, torch.compile(vmap(grad)), and JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from workloads import Columns, Recurrent, Series, Text, Workload, lstm

Step = Callable[[], Any]
CLIP, RATE = 0.1, 1e-3


def opacus(workload: Workload, mode: str) -> Step:
    """One step of Opacus: mode is hooks, ew (expanded weights), functorch or ghost."""
    from opacus.grad_sample import (
        GradSampleModule,
        GradSampleModuleExpandedWeights,
        GradSampleModuleFastGradientClipping,
    )
    from opacus.layers import DPGRU, DPLSTM
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
    from opacus.validators import ModuleValidator

    torch.manual_seed(0)
    layers = {Recurrent: DPGRU, lstm: DPLSTM}.get(workload.make)  # type: ignore[call-overload]
    model = workload.make() if layers is None else Recurrent(layers)
    if workload.make in (Series, Text, Columns):
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
    """One step of jit(vmap(grad)) with clipping, noise and update."""
    import jax
    import jax.numpy as jnp
    from jaxed import forward_of

    torch.manual_seed(0)
    model = workload.make()
    weights = {name: jnp.asarray(t.detach().numpy()) for name, t in model.named_parameters()}
    logits = forward_of(model)

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


def vmapped(workload: Workload) -> Step:
    """One step of torch.compile(vmap(grad)), clipping in the compiled part, with torch's own noise."""
    from torch.func import functional_call, grad, vmap

    torch.manual_seed(0)
    model, (x, y) = workload.make(), workload.data()
    weights = {name: t.detach().clone() for name, t in model.named_parameters()}

    def loss(p: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, p, (one[None],)), target[None])

    def clipped(p: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        rows = vmap(grad(loss), (None, 0, 0))(p, x, y)
        square = torch.stack([g.flatten(1).square().sum(1) for g in rows.values()]).sum(0)
        scale = (CLIP / square.sqrt()).clamp(max=1)
        return {name: torch.tensordot(scale, g, 1) for name, g in rows.items()}

    fast = torch.compile(clipped, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step() -> None:
        for name, total in fast(weights, x, y).items():
            total.add_(torch.randn_like(total), alpha=CLIP)
            weights[name].add_(total, alpha=-RATE / workload.batch)

    return step


PEERS: dict[str, Callable[[Workload], Step]] = {
    **{f"opacus {mode}": (lambda w, m=mode: opacus(w, m)) for mode in ("hooks", "ew", "ghost")},
    "jax": jax_step,
    "vmap": vmapped,
    "opacus functorch": lambda w: opacus(w, "functorch"),
}
NOT_RUN = {
    **{
        ("wide4096", name): "per-patient gradients would take 150 GB"
        for name in PEERS
        if name != "opacus ghost"
    },
    **{
        (name, "opacus functorch"): "minutes a step"
        for name in ("gru", "lstm", "transformer", "text", "columns", "visits", "bag")
    },
    **{
        (name, "vmap"): "torch has no rule for recurrent layers under vmap"
        for name in ("gru", "lstm", "visits")
    },
    **{
        (name, "vmap"): "unrolls attention by patient: minutes to compile"
        for name in ("transformer", "text", "columns")
    },
}
