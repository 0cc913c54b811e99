# ruff: noqa: D103  (a rule does what the operation it is entered under does)
"""The table's rules for layers: a weight is shared by all patients, or each patient's own (dimension 0)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rapha_lab.curator.lift.reductions import matmul
from rapha_lab.curator.lift.shapes import clamped
from rapha_lab.curator.lift.table import batch_of, dims, raised, rule


def folded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with all positions of all patients as the rows of one product, whatever their order in memory."""
    return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


@rule("linear.default")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.shape[0] == 1 and (bias is None or bias.shape[0] == 1):
        return folded(x, weight[0], None if bias is None else bias[0])
    product = matmul(x, weight.transpose(1, 2) if weight.dim() == 3 else weight)
    return product if bias is None else product + raised(bias, product.dim() - 1)


@rule("bilinear.default")
def bilinear(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    size = batch_of(a, b, weight)
    a, b, w = (t.expand(size, *t.shape[1:]) for t in (a, b, weight))
    out = torch.einsum("z...i,zoij,z...j->z...o", a, w, b)
    return out if bias is None else out + raised(bias, out.dim() - 1)


# Convolutions: the program's own batch, if it has one, is folded with the patients


def per_patient(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`function(x, weight, bias)` for each patient, whose weight and bias may be their own."""
    size = batch_of(x, weight) if bias is None else batch_of(x, weight, bias)
    args = [t.expand(size, *t.shape[1:]) for t in (x, weight, *([] if bias is None else [bias]))]
    return torch.vmap(lambda x, w, b=None: function(x, w, b))(*args)


def convolution(function: Callable[..., Tensor], rank: int) -> Callable[..., Tensor]:
    """A rule for a convolution over `rank` dimensions."""

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        if x.dim() not in (rank + 2, rank + 3):
            raise ValueError(f"an input of {rank + 2} dimensions is expected")
        if weight.shape[0] > 1 or (bias is not None and bias.shape[0] > 1):
            return per_patient(lambda x, w, b: function(x, w, b, *args), x, weight, bias)
        folded = x.reshape(-1, *x.shape[-rank - 1 :])
        out = function(folded, weight[0], None if bias is None else bias[0], *args)
        return out.reshape(*x.shape[: -rank - 1], *out.shape[1:])

    return apply


for _n, _conv, _transposed in (
    (1, F.conv1d, F.conv_transpose1d),
    (2, F.conv2d, F.conv_transpose2d),
    (3, F.conv3d, F.conv_transpose3d),
):
    rule(f"conv{_n}d.default", f"conv{_n}d.padding")(convolution(_conv, _n))
    rule(f"conv_transpose{_n}d.{'default' if _n == 1 else 'input'}")(convolution(_transposed, _n))


@rule("convolution.default")
def any_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    return convolution(torch.convolution, weight.dim() - 3)(x, weight, bias, *args)


# Normalisations over one patient's own features


@rule("layer_norm.default")
def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, cudnn: bool
) -> Tensor:
    if len(shape) > x.dim() - 1:
        raise ValueError("more normalised dimensions than there are")
    if all(t is None or t.shape[0] == 1 for t in (weight, bias)):
        w, b = (None if t is None else t[0] for t in (weight, bias))
        return F.layer_norm(x, list(shape), w, b, eps)
    return _affine(F.layer_norm(x, list(shape), None, None, eps), weight, bias)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * raised(weight, x.dim() - 1)
    return x if bias is None else x + raised(bias, x.dim() - 1)


def _channels(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A per-channel tensor shaped to meet `x`, whose patient holds (N, C, ...)."""
    return None if t is None else t.reshape(t.shape[0], 1, -1, *[1] * (x.dim() - 3))


@rule("rms_norm.default")
def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> Tensor:
    if len(shape) > x.dim() - 1:
        raise ValueError("more normalised dimensions than there are")
    return _affine(F.rms_norm(x, list(shape), None, eps), weight, None)


@rule("group_norm.default")
def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, cudnn: bool
) -> Tensor:
    if x.dim() < 3:
        raise ValueError("an input of at least two dimensions is expected")
    plain = F.group_norm(x.reshape(-1, *x.shape[2:]), groups, None, None, eps).reshape(x.shape)
    return _affine(plain, _channels(weight, x), _channels(bias, x))


@rule("instance_norm.default")
def instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None,
    own: bool, momentum: float, eps: float, cudnn: bool,
) -> Tensor:  # fmt: skip
    if not own:
        raise ValueError("running statistics are not kept")
    plain = F.instance_norm(x.reshape(-1, *x.shape[2:]), eps=eps).reshape(x.shape)
    return _affine(plain, _channels(weight, x), _channels(bias, x))


@rule("batch_norm.default")
def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None,
    training: bool, momentum: float, eps: float, cudnn: bool,
) -> Tensor:  # fmt: skip
    if training or mean is None or variance is None:
        raise ValueError("statistics over patients; use GroupNorm or LayerNorm")
    if x.dim() < 3:
        raise ValueError("an input of at least two dimensions is expected")
    plain = (x - _channels(mean, x)) * torch.rsqrt(_channels(variance, x) + eps)  # type: ignore[operator,arg-type]
    return _affine(plain, _channels(weight, x), _channels(bias, x))


@rule("_native_batch_norm_legit_no_training.default")
def batch_norm_frozen(
    x: Tensor, w: Any, b: Any, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> Any:
    return (batch_norm(x, w, b, mean, var, False, momentum, eps, False),)


@rule("_weight_norm.default")
def weight_norm(direction: Tensor, length: Tensor, d: int) -> Tensor:
    kept = dims(direction, d)[0] if d != -1 else 0
    over = [k for k in range(1, direction.dim()) if k != kept]
    # of no dimensions torch would take the norm over all, the patients' too
    norm = torch.linalg.vector_norm(direction, 2, over, True) if over else direction.abs()
    return direction * (length / norm)


# Embeddings


@rule("embedding.default")
def embedding(weight: Tensor, index: Tensor, padding: int, scale: bool, sparse: bool) -> Tensor:
    index = clamped(index, weight.shape[1])
    if weight.shape[0] == 1:
        return F.embedding(index, weight[0])
    size = weight.shape[0]
    wide = index.expand(size, *index.shape[1:]).reshape(size, -1, 1)
    rows = weight.gather(1, wide.expand(-1, -1, weight.shape[2]))
    rows = torch.where(wide == padding, rows.detach(), rows)  # what fills up is not trained
    return rows.reshape(size, *index.shape[1:], weight.shape[2])


# Attention


@rule("scaled_dot_product_attention.default")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> Tensor:
    if min(t.dim() for t in (q, k, v)) < (4 if gqa else 3):
        raise ValueError("queries, keys and values of at least two dimensions are expected, three with heads")
    if gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = matmul(q * scale, k.transpose(-1, -2))
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        mask = raised(mask, scores.dim() - 1)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    return matmul(dropped(weights, dropout) if dropout else weights, v)


# Dropout: drawn by the curator's side


def dropped(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Dropout by operations that write nothing in place, which a compiler is not told of and gets wrong."""
    if not training or not p:
        return x
    return x * (torch.bernoulli(x.new_empty(x.shape), 1 - p) * (1 / (1 - p) if p < 1 else 0.0))


@rule("native_dropout.default")
def native_dropout(x: Tensor, p: float, training: bool | None) -> Any:
    return (dropped(x, p, training is not False),)


@rule("dropout.default")
def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    return dropped(x, p, training)


@rule("feature_dropout.default")
def feature_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    if not training or not p:
        return x
    keep = dropped(torch.ones(x.shape[:3], dtype=x.dtype, device=x.device), p)
    return x * keep.reshape(*x.shape[:3], *[1] * (x.dim() - 3))


# Pooling and resizing: each image alone, so that patients may be folded with the program's batch


def folding(rank: int, *names: str) -> None:
    """Enter operations on `rank` trailing dimensions that treat all dimensions before them alike."""
    for name in names:
        op = rule_op(name)

        def apply(x: Tensor, *args: Any, _op: Any = op) -> Any:
            if x.dim() < rank + 2:
                raise ValueError(f"an input of at least {rank + 1} dimensions is expected")
            lead = x.shape[: x.dim() - rank]
            out = _op(x.reshape(1, -1, *x.shape[x.dim() - rank :]), *args)
            return out.reshape(*lead, *out.shape[2:])

        rule(name)(apply)


def rule_op(name: str) -> Any:
    op, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, op), overload)


folding(
    1,
    "max_pool1d.default",
    "avg_pool1d.default",
    "adaptive_avg_pool1d.default",
    "upsample_nearest1d.vec",
    "upsample_linear1d.vec",
    "_upsample_nearest_exact1d.vec",
)
folding(
    2,
    "max_pool2d.default",
    "avg_pool2d.default",
    "adaptive_avg_pool2d.default",
    "upsample_nearest2d.vec",
    "upsample_bilinear2d.vec",
    "upsample_bicubic2d.vec",
    "_upsample_nearest_exact2d.vec",
    "_upsample_bilinear2d_aa.vec",
    "_upsample_bicubic2d_aa.vec",
)
folding(
    3,
    "max_pool3d.default",
    "avg_pool3d.default",
    "adaptive_avg_pool3d.default",
    "upsample_nearest3d.vec",
    "upsample_trilinear3d.vec",
    "_upsample_nearest_exact3d.vec",
)


def _pairs(rank: int, name: str) -> None:
    op = rule_op(name)

    def apply(x: Tensor, *args: Any) -> Any:
        if x.dim() < rank + 2:
            raise ValueError(f"an input of at least {rank + 1} dimensions is expected")
        lead = x.shape[: x.dim() - rank]
        values, places = op(x.reshape(1, -1, *x.shape[x.dim() - rank :]), *args)
        return tuple(t.reshape(*lead, *t.shape[2:]) for t in (values, places))

    rule(name)(apply)


_pairs(1, "adaptive_max_pool1d.default")
_pairs(2, "adaptive_max_pool2d.default")
_pairs(2, "max_pool2d_with_indices.default")


@rule("pixel_shuffle.default")
def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    if x.dim() < 4:
        raise ValueError("an input of at least three dimensions is expected")
    return F.pixel_shuffle(x, factor)


@rule("glu.default")
def glu(x: Tensor, d: int) -> Tensor:
    (d,) = dims(x, d)
    return F.glu(x, d)
