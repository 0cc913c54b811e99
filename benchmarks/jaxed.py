"""The workloads' models written for JAX: each gives a function of parameters and one patient's input to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from torch import nn
from workloads import Adapted, Bag, Recurrent, Series, Text, Visits

Forward = Callable[[dict[str, Any], Any], Any]


def forward_of(model: nn.Module) -> Forward:
    """The same computation for one patient, by the model's own names of parameters.

    Raises:
        NotImplementedError: if it is not written.
    """
    if isinstance(model, nn.Sequential):
        return _sequence(model, "")
    if isinstance(model, Recurrent) and isinstance(model.layers, nn.GRU):
        return lambda p, x: _dense(p, "head", _recurrent(p, x, 2)[-1])
    if isinstance(model, Visits):
        return _visits
    if isinstance(model, Adapted):
        return _adapted([jnp.asarray(t.numpy()) for t in model.buffers()])
    if isinstance(model, Series):
        return lambda p, x: _dense(p, "head", _encoder(p, "body", 2, 4, _dense(p, "inp", x)).mean(0))
    if isinstance(model, Text):
        return _text
    if isinstance(model, Bag):
        encoder = _sequence(model.encoder, "encoder.")

        def bag(p: Any, x: Any) -> Any:
            there = x[:, 30:]
            return _dense(p, "head", (encoder(p, x[:, :30]) * there).sum(0) / there.sum(0))

        return bag
    raise NotImplementedError("not written for JAX")


def _dense(p: Any, name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _sequence(model: nn.Sequential, prefix: str) -> Forward:
    def run(p: Any, x: Any) -> Any:
        for key, layer in model.named_children():
            x = _layer(p, prefix + key, layer, x)
        return x

    return run


def _layer(p: Any, name: str, layer: nn.Module, x: Any) -> Any:
    if isinstance(layer, nn.Linear):
        return _dense(p, name, x)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        same = [(layer.padding[0],) * 2] * (x.ndim - 1)
        one = (1,) * (x.ndim - 1)
        out = lax.conv_general_dilated(x[None], p[f"{name}.weight"], one, same)[0]
        return out + p[f"{name}.bias"].reshape(-1, *one)
    if isinstance(layer, nn.GroupNorm):
        groups = x.reshape(layer.num_groups, -1)
        x = _normal(groups, layer.eps).reshape(x.shape)
        shape = (-1, *[1] * (x.ndim - 1))
        return x * p[f"{name}.weight"].reshape(shape) + p[f"{name}.bias"].reshape(shape)
    if isinstance(layer, nn.MaxPool2d):
        size = (1, layer.kernel_size, layer.kernel_size)
        return lax.reduce_window(x, -jnp.inf, lax.max, size, size, "VALID")
    if isinstance(layer, nn.AdaptiveAvgPool1d):
        return x.mean(-1, keepdims=True)
    if isinstance(layer, nn.ReLU):
        return jax.nn.relu(x)
    if isinstance(layer, nn.Flatten):
        return x.reshape(-1)
    raise NotImplementedError(f"{type(layer).__name__} is not written for JAX")


def _normal(x: Any, eps: float) -> Any:
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + eps)


def _recurrent(p: Any, x: Any, layers: int) -> Any:
    for layer in range(layers):
        wi, wh, bi, bh = (p[f"layers.{n}_l{layer}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

        def cell(state: Any, given: Any, wh: Any = wh, bh: Any = bh) -> Any:
            (r, z, n), (hr, hz, hn) = jnp.split(given, 3), jnp.split(wh @ state + bh, 3)
            z, n = jax.nn.sigmoid(z + hz), jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn)
            new = (1 - z) * n + z * state
            return new, new

        _, x = lax.scan(cell, jnp.zeros(wh.shape[1]), x @ wi.T + bi)
    return x


def _visits(p: Any, x: Any) -> Any:
    there = (x[:, :1] > 0) * 1.0
    rows = p["codes.weight"][x] * (x > 0)[..., None]
    return _dense(p, "head", (_recurrent(p, rows.sum(1), 1) * there).sum(0) / there.sum(0))


def _adapted(frozen: list[Any]) -> Forward:
    def run(p: Any, x: Any) -> Any:
        for n, weight in enumerate(frozen):
            x = jax.nn.relu((weight + p[f"up.{n}"] @ p[f"down.{n}"]) @ x)
        return _dense(p, "head", x)

    return run


def _text(p: Any, x: Any) -> Any:
    x = p["words.weight"][x] + p["places.table"]
    return _dense(p, "head", _encoder(p, "body", 2, 4, x).mean(0))


def _encoder(p: Any, name: str, layers: int, heads: int, x: Any) -> Any:
    """Torch's TransformerEncoder, norms after the sums."""
    for k in range(layers):
        at = f"{name}.layers.{k}"
        x = _norm(p, f"{at}.norm1", x + _attention(p, f"{at}.self_attn", heads, x))
        x = _norm(
            p, f"{at}.norm2", x + _dense(p, f"{at}.linear2", jax.nn.relu(_dense(p, f"{at}.linear1", x)))
        )
    return x


def _norm(p: Any, name: str, x: Any) -> Any:
    return _normal(x, 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def _attention(p: Any, name: str, heads: int, x: Any) -> Any:
    length, width = x.shape
    mixed = x @ p[f"{name}.in_proj_weight"].T + p[f"{name}.in_proj_bias"]
    q, k, v = (part.reshape(length, heads, -1) for part in jnp.split(mixed, 3, axis=1))
    scores = jnp.einsum("ihd,jhd->hij", q, k) / (width // heads) ** 0.5
    out = jnp.einsum("hij,jhd->ihd", jax.nn.softmax(scores), v).reshape(length, width)
    return _dense(p, f"{name}.out_proj", out)
