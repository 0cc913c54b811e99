"""What to write instead, where Python's or torch's own error does not say it."""

from __future__ import annotations

import inspect
import re

__all__ = ["of"]

NO_FILES = (
    "A cell at the site has no files and no network. Its records are patients; -i sends what you have read here; "
    "-o brings numbers, tables, figures and weights back, to be saved in a cell of the notebook's own."
)
_ASK = 'patients.validation.evaluate(model, ["logloss"], inputs=FEATURES, target="death", epsilon=0.1)'
_LOGGERS = (
    "A cell has no logger: leave it out. The job's card shows its steps, print(...) what is public (epochs, learning rates), "
    f"and how a model does is asked for: {_ASK}."
)
_TRAINERS = (
    "A cell has no trainer of another library. Write its loop: for x, y in patients.train.loader(FEATURES, target, epochs=10, "
    "epsilon=1): loss = model.training_step(...); or patients.train.fit(model, loss, inputs=FEATURES, target=...)."
)
_LAYERS = (
    "A cell has no torchvision and no zoo of models: write the layers in the cell; weights you have here are sent as a dict "
    "by -i weights, for model.load_state_dict(weights)."
)
PLAIN = "A cell is plain Python: lines with ! or % belong in a cell of the notebook's own."

_HINTS = {
    r"RuntimeError: .*mat1 and mat2 shapes cannot be multiplied": (
        "A category of more than two values takes a number for each: patients.schema.layout(FEATURES) says how wide a list is."
    ),
    r"TypeError: Patients\.fit\(\) got an unexpected keyword argument '(lr_)?schedul": (
        "fit keeps its learning rate. A schedule goes into a loop, unchanged: for batch in patients.train.batches(...): "
        "...; optimizer.step(); scheduler.step()."
    ),
    r"\w*Error: SparseAdam does not support dense gradients": (
        "A private gradient has noise in every row: use torch.optim.Adam or AdamW."
    ),
    r"TypeError: LBFGS\.step\(\) missing": (
        "LBFGS decides by the value of the loss, which is not here: use torch.optim.SGD or AdamW."
    ),
    r"\w*Error: .*(Operation not permitted|Permission denied|Read-only file system|No such file or directory)": NO_FILES,
    r"(gaierror|URLError|ConnectionError): ": NO_FILES,
    r"ModuleNotFoundError: .*'(tensorboard|tensorboardX|wandb|mlflow|comet_ml|neptune|clearml|aim)\b": _LOGGERS,
    r"ModuleNotFoundError: .*'(lightning|pytorch_lightning|ignite|accelerate|fastai|skorch|keras)\b": _TRAINERS,
    r"ModuleNotFoundError: .*'(torchvision|timm|transformers|torchaudio|monai)\b": _LAYERS,
    r"ModuleNotFoundError: .*'opacus": "docs/methods.md says what of Opacus a cell has; the rest is the curator's.",
    r"ModuleNotFoundError: ": (
        "A cell has the packages that the site has, and installs none; what a file of your own defines goes into a cell."
    ),
    r"AttributeError: .*'grad_sample'": (
        "Each patient's gradient stays at the site: p.grad is the clipped, noised mean of a batch, after loss.backward()."
    ),
}


def of(error: BaseException) -> list[str]:
    """Lines to add to this error."""
    if isinstance(error, SyntaxError):
        return [PLAIN] if (error.text or "").lstrip().startswith(("!", "%")) else []
    text = f"{type(error).__name__}: {error}"
    found = next((hint for pattern, hint in _HINTS.items() if re.match(pattern, text, re.S)), None)
    return [*_takes(text), *([found] if found else [])]


def _takes(text: str) -> list[str]:
    """What a question of `patients` takes, for an error of its arguments."""
    from rapha_lab.session.patients import Patients

    found = re.search(r"\bPatients\.(\w+)\(\) (got an unexpected keyword|takes|missing)", text)
    if found is None or not hasattr(Patients, found[1]):
        return []
    given = [
        p for name, p in inspect.signature(getattr(Patients, found[1])).parameters.items() if name != "self"
    ]
    named = [p.name for p in given if p.kind is p.KEYWORD_ONLY]
    placed = [p.name for p in given if p.kind is not p.KEYWORD_ONLY]
    if found[2] == "takes" and named:
        return [
            f"{found[1]} takes {', '.join(placed)}, and by name {', '.join(f'{name}=' for name in named)}."
        ]
    size = next((name for name in _SIZES if name in [*placed, *named]), None)
    meant = f" It calls the expected patients of a batch {size}=." if size and _said(text) in _SIZES else ""
    return [f"{found[1]} takes {', '.join([*placed, *named])}.{meant}"]


_SIZES = ("size", "batch", "batch_size")
"""What batches, fit and loader call the expected patients of a batch."""


def _said(text: str) -> str:
    """The argument that a call did not know."""
    found = re.search(r"unexpected keyword argument '(\w+)'", text)
    return found[1] if found else ""
