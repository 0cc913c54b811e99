"""What to write instead, where Python's or torch's own error does not say it."""

from __future__ import annotations

import inspect
import re

__all__ = ["of"]

NO_FILES = "A cell at the site has no files and no network: -i sends values there, -o brings them back."
PLAIN = "A cell is plain Python: lines with ! or % belong in a cell of the notebook's own."

_HINTS = {
    r"RuntimeError: .*mat1 and mat2 shapes cannot be multiplied": (
        "A category of more than two values takes a number for each: patients.schema.layout(FEATURES) says how wide a list is."
    ),
    r"TypeError: LBFGS\.step\(\) missing": (
        "LBFGS decides by the value of the loss, which is not here: use torch.optim.SGD or AdamW."
    ),
    r"\w*Error: .*(Operation not permitted|Permission denied|Read-only file system)": NO_FILES,
    r"(gaierror|URLError|ConnectionError): ": NO_FILES,
    r"ModuleNotFoundError: ": "A cell has the packages that the site has, and installs none.",
}


def of(error: BaseException) -> list[str]:
    """Lines to add to this error."""
    if isinstance(error, SyntaxError):
        return [PLAIN] if (error.text or "").lstrip().startswith(("!", "%")) else []
    text = f"{type(error).__name__}: {error}"
    return [*_takes(text), *(hint for pattern, hint in _HINTS.items() if re.match(pattern, text, re.S))]


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
    return [f"{found[1]} takes {', '.join([*placed, *named])}."]
