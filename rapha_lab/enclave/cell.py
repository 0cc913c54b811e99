"""One cell of a session: what was ordered, and how far it is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from rapha_lab.protocol import messages

__all__ = ["ENDED", "Cell", "Order", "State", "kept"]

State = Literal["queued", "running", "waiting", "done", "failed", "cancelled", "lost"]
ENDED = ("done", "failed", "cancelled", "lost")
STOPS = "being cancelled when the step under way ends"


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """A cell as the researcher sends it."""

    session: str
    dataset: str
    source: str
    project: str = ""
    epsilon: float | None = None
    outputs: Annotated[list[str], msgspec.Meta(max_length=1000)] = []
    inputs: msgspec.Raw = msgspec.Raw(b"{}")
    origin: Annotated[dict[str, str], msgspec.Meta(max_length=16)] = {}


@dataclass
class Cell:
    """One cell's life at the site."""

    id: str
    researcher: str
    order: Order
    tensors: bytes = b""
    state: State = "queued"
    outputs: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    steps: int = 0
    doing: str = ""
    asked: dict[str, float] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    started: float = 0.0
    ended: float = 0.0
    error: Any = None
    traceback: Any = ()
    values: Any = field(default_factory=dict)
    blob: bytes = b""
    asking: str | None = None
    asked_at: float = 0.0
    cancelled: bool = False
    orphaned: bool = False
    waits: dict[str, Any] | None = None
    size: int = 0
    told: int = 0

    @property
    def held(self) -> int:
        """Bytes that it holds: of outputs, of what was said when it was ordered and when it ended, and of tensors."""
        return self.size + self.told + len(self.tensors) + len(self.blob)

    def summary(self) -> dict[str, Any]:
        """What a job list shows."""
        lines = [line.strip() for line in self.order.source.splitlines() if line.strip()]
        telling = next((line for line in lines if "patients" in line), lines[0] if lines else "")
        rate = (time.time() - self.asked_at) / self.step if self.step and self.state == "running" else 0
        stops = self.cancelled and self.state == "running"
        alone = self.state == "running" and self.asking is None and not self.steps
        doing = STOPS if stops else self.doing or (messages.PYTHON if alone else "")
        return {
            "id": self.id, "dataset": self.order.dataset, "state": self.state,
            "step": self.step, "steps": self.steps, "doing": doing,
            "epsilon": math.fsum(self.asked.values()), "spent": math.fsum(self.spent.values()),
            "seconds_left": round(rate * (self.steps - self.step), 1) if rate else None,
            "started": self.started, "ended": self.ended,
            "source_line": telling[:200],
            "origin": self.order.origin,
            "waits": self.waits,
        }  # fmt: skip


def kept(cell: str, told: dict[str, Any]) -> dict[str, Any]:
    """What a job list shows of a cell that is gone, for whose answer custodians are waited for."""
    ended = Cell(cell, told["researcher"], Order("", told["dataset"], told["lane"], told["project"]))
    return ended.summary() | {
        "state": "waiting",
        "started": told["time"],
        "waits": {"field": told["subject"]},
    }
