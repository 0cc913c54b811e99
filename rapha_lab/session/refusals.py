"""What a sealed tensor refuses, by torch's name of it or by torch's own file that asks: what, why, and what to write instead."""

from __future__ import annotations

__all__ = ["OF_TORCH", "PACKED", "REFUSALS", "TRANSFORMS"]

_MISSING = "A sealed tensor stands for patients at the site; no value of theirs is here."
_ASK = 'patients.validation.evaluate(model, ["logloss"], inputs=FEATURES, target="death", epsilon=0.1)'
_LOSS = f"Ask for a priced figure: {_ASK}."
OF_TORCH: dict[str, tuple[str, str, str]] = {
    "torch/optim/lbfgs.py": (
        "LBFGS decides by the value of the loss.",
        "Its line search and stopping rule look at losses of patients, which are not here.",
        "Use torch.optim.SGD or AdamW, whose steps use gradients alone.",
    ),
    "torch/optim/lr_scheduler.py": (
        "This schedule decides by the value of the loss.", _MISSING,
        f"Use CosineAnnealingLR or OneCycleLR, or give step() a figure of {_ASK}.",
    ),
    "torch/distributions/distribution.py": (
        "This distribution looks whether its arguments are valid.", _MISSING,
        "Make it without: torch.distributions.Normal(mean, scale, validate_args=False), say.",
    ),
    "torch/nn/utils/rnn.py": (
        "Packing needs the length of each patient's sequence, and shapes that depend on it.", _MISSING,
        "Give the layer the padded sequence, whose latest row is last: h[:, -1], or pool h by visits.present. The very "
        "states of packing have the rows in front: n = present.sum(1, keepdim=True).long(); "
        "front = (torch.arange(x.shape[1]) - n) % x.shape[1]; x = x.gather(1, front[..., None].expand_as(x)); after the layer "
        "the last is h.gather(1, (n - 1).clamp(min=0)[..., None].expand(-1, -1, h.shape[2]))[:, 0].",
    ),
}  # fmt: skip
PACKED = OF_TORCH["torch/nn/utils/rnn.py"]
TRANSFORMS = (
    "A transform of torch.func was given a sealed tensor.", _MISSING,
    "Write the sum over heads or experts with torch.einsum, and a derivative out in full; patients are computed together "
    "as it is. fit takes a model whose forward uses torch.func.vmap.",
)  # fmt: skip
_AGGREGATE = "Ask for an aggregate: patients.mean(column, epsilon=0.1) or .histogram(...)."
_DECIDE = (
    f"Use torch.where instead of if. To stop early or keep the best model, decide by a figure of {_ASK}."
)
_TENSORS = "Keep to tensors: torch.where instead of if, and losses left as they are."
_INDEX = "Index the other dimensions: x[:, 0]. A place of each patient's own is x.gather(1, place[:, None])."
_WHOLE = "Compute on the whole batch; columns of a table come padded."

REFUSALS: dict[str, tuple[str, str, str]] = {
    **dict.fromkeys(
        ("item", "tolist", "__float__", "__int__", "__complex__", "__index__", "__format__"),
        ("{name} would show a value computed from patients.", _MISSING, _LOSS),
    ),
    **dict.fromkeys(
        ("numpy", "__array__", "__dlpack__", "data", "data_ptr", "storage", "untyped_storage"),
        ("{name} would copy patients' values out.", _MISSING, _AGGREGATE),
    ),
    **dict.fromkeys(
        ("__bool__", "is_nonzero", "equal", "allclose", "__contains__"),
        ("A decision on patients' values was asked for.", "It would tell one of them.", _DECIDE),
    ),
    **dict.fromkeys(
        ("nonzero", "unique", "masked_select", "argwhere", "bincount"),
        ("{name} gives a shape that depends on patients' values.", "Shapes are public.", _TENSORS),
    ),
    **dict.fromkeys(
        ("__reduce_ex__", "__deepcopy__", "share_memory_"),
        ("A sealed tensor cannot be copied or saved.", _MISSING, "Save the model's weights."),
    ),
    **dict.fromkeys(
        ("grad_fn", "register_hook", "retain_grad", "register_post_accumulate_grad_hook"),
        (
            "{name} of a value computed from patients was asked for.",
            "Gradients are derived at the site, and only their noisy sums by parameter come back.",
            "A hook of a parameter is called with its private gradient: p.register_hook(...).",
        ),
    ),
    "__iter__": ("Going through patients one by one was asked for.", _MISSING, _WHOLE),
    "__len__": ("The number of patients in a batch was asked for.", "It is secret.", "Use batch.expected."),
    "__getitem__": ("Single patients were asked for.", _MISSING, _INDEX),
    "grad": ("{name} of a loss on patients was asked for.", _MISSING, "loss.backward() fills p.grad."),
}  # fmt: skip
