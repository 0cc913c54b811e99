"""Where the researcher's side keeps what it must remember: keys, sites it knows, the last checkpoint of each log."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

__all__ = ["home", "read", "write"]


def home() -> Path:
    """The folder, for its owner alone: $RAPHA_LAB_HOME, or one below the user's data folder."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    folder = Path(os.environ.get("RAPHA_LAB_HOME") or Path(data) / "rapha-lab")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def read(path: Path) -> dict[str, Any]:
    """A small JSON file's content; empty if it is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace a small JSON file whole, so that a reader never sees half of it, whoever else replaces it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
