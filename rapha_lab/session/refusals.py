"""What sealed tensors (by torch's name or its own file that asks) and `patients` refuse: what, why, what to write instead."""

from __future__ import annotations

__all__ = [
    "ANSWERS",
    "COPIES",
    "COUNT",
    "LOAD",
    "OF_TORCH",
    "PACKED",
    "PANDAS",
    "PUBLIC",
    "REFUSALS",
    "ROWS",
    "TRANSFORMS",
]

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
    "torch/utils/data/": (
        "A DataLoader would take patients one by one.", _MISSING,
        "Patients come in batches already: for x, y in patients.train.loader(FEATURES, target, epochs=10, epsilon=1), "
        "or for batch in patients.train.batches(...).",
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
COPIES = (
    "A tensor is made of a sealed tensor's numbers.",
    "torch would copy those of the made-up patients that are underneath.",
    "Compute with x itself: x.float() for torch.FloatTensor(x), x + torch.zeros(3) for torch.full((3,), x), torch.stack and "
    "scatter_add for what is sparse; torch.zeros(x.shape[0], 3) makes a number for each patient.",
)

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

LOAD = (
    "To train, in place of a DataLoader: for x, y in patients.train.loader(FEATURES, target, epochs=10, epsilon=1), "
    "or patients.train.fit(model, inputs=FEATURES, target=...)."
)
COUNT = "patients.count(epsilon=0.1)"
ANSWERS = (
    "count, sum, mean, var, quantile, histogram, contingency, corr, survival, missing, describe, fit, batches, evaluate "
    "and shards; where, with_columns, select, group_by, table and join choose who and what is meant"
)
ROWS = frozenset(
    """tail sample iloc loc values rows row collect show glimpse fetch limit slice first last item items data numpy
    tolist to_list iterrows itertuples to_pandas to_numpy to_dict to_csv write_csv to_parquet write_parquet to_json
    to_dicts""".split()
)


PANDAS = {
    "groupby": " Here it is group_by, as in polars.",
    "query": ' Here it is where(pl.col("age") > 60), as in polars.',
    "value_counts": ' Ask patients.group_by("sex").count(epsilon=0.1).',
    "nunique": " Values are public: cohort shows those of each category.",
    "isna": " Ask patients.missing(epsilon=0.1).",
    "median": ' Ask patients.quantile("age", 0.5, epsilon=0.1).',
    "assign": " Here it is with_columns, as in polars.",
}
PUBLIC = frozenset("columns schema dtypes dtype info keys shape".split())
