"""A malicious graph cannot mix patients: through every operation, one's gradient keeps its bits whatever another becomes.

Graphs are chains of the table's operations, each fed with what the one before made, through the whole engine:
checked, lifted, differentiated by layers' own rules or by copies. `RAPHA_LAB_DEEP=1` tries thousands.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import node
from test_table import CASES, Given
from torch import Tensor

from rapha_lab.curator.lift import TABLE, Lifted, lift, table
from rapha_lab.curator.mechanisms import train
from rapha_lab.protocol.errors import ProgramError
from rapha_lab.protocol.program import Node, Program, Ref, TensorSpec

PATIENTS = 8
DEEP = os.environ.get("RAPHA_LAB_DEEP") == "1"
NAMES = sorted(CASES)
STORAGE = {"layout", "device", "pin_memory", "memory_format", "generator", "out"}
CLIP = 1.0
# torch has no derivative of these, so that a parameter among their arguments is refused
WITHOUT_GRADIENT = {"aten.heaviside.default", "aten.floor_divide.default", "aten.div.Tensor_mode"}


pytestmark = pytest.mark.filterwarnings("ignore:Using padding")


@dataclass
class Chain:
    """A program in the making, with its patients' inputs and its parameters."""

    nodes: list[Node] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def node(self, op: str, *args: Any, **kwargs: Any) -> str:
        self.nodes.append(node(f"n{len(self.nodes)}", op, *args, **kwargs))
        return self.nodes[-1].id

    def add(self, name: str, args: list[Any], last: tuple[str, int] | None) -> tuple[str, int]:
        """One operation of the table, its first float argument made of the chain's last value; its name and size."""
        op, rule = TABLE[name]
        schema = [a for a in op._schema.arguments if a.name not in STORAGE]
        self.left = last
        given = {a.name: self.encoded(v) for a, v in zip(schema, args, strict=True)}
        positional = [] if any(a.name in STORAGE and not a.kwarg_only for a in op._schema.arguments) else [
            a.name for a in schema if not a.kwarg_only
        ]  # fmt: skip
        kwargs = {k: v for k, v in given.items() if k not in positional and v is not None}
        id = f"n{len(self.nodes)}"
        self.nodes.append(Node(id, name, [given[k] for k in positional], kwargs, line=7))
        out = rule(*args)
        if not isinstance(out, Tensor):
            item = f"n{len(self.nodes)}"
            self.nodes.append(Node(item, "getitem", [Ref(id), 0], line=7))
            id, out = item, out[0]
        return self.node("_to_copy.default", f"@{id}", dtype="float64"), math.prod(out.shape[1:])

    def encoded(self, arg: Any) -> Any:
        if isinstance(arg, list):
            return [self.encoded(a) for a in arg]
        if isinstance(arg, torch.dtype):
            return str(arg).removeprefix("torch.")
        if isinstance(arg, float) and not math.isfinite(arg):
            return str(arg)
        return Ref(self.tensor(arg)) if isinstance(arg, Tensor) else arg

    def tensor(self, t: Tensor) -> str:
        shape = list(t.shape[1:])
        if len(t) == 1 and t.dtype.is_floating_point:
            name = f"p{len(self.parameters)}"
            self.parameters[name] = t[0]
            return name
        if self.left and t.dtype.is_floating_point:
            return self.from_last(math.prod(shape), shape)
        name = f"x{len(self.inputs)}"
        self.inputs[name] = t if len(t) > 1 else t.expand(PATIENTS, *t.shape[1:]).clone()
        return self.node("view.default", f"@{name}", shape)

    def from_last(self, wanted: int, shape: list[int]) -> str:
        last, size = self.left  # type: ignore[misc]
        self.left = None
        flat = self.node("view.default", f"@{last}", [size])
        many = self.node("repeat.default", f"@{flat}", [-(-wanted // size)])
        return self.node("view.default", f"@{self.node('narrow.default', f'@{many}', 0, 0, wanted)}", shape)

    def program(self, last: str) -> Program:
        self.parameters["gain"] = torch.tensor(0.7, dtype=torch.float64)
        self.inputs["y"] = torch.linspace(0.5, 2, PATIENTS, dtype=torch.float64)
        loss = self.node("mul.Tensor", f"@{self.node('mul.Tensor', f'@{last}', '@gain')}", "@y")
        loss = self.node("sum.default", f"@{loss}")
        spec = lambda n, t: TensorSpec(n, str(t.dtype)[6:], list(t.shape))  # noqa: E731
        return Program(
            inputs=[spec(n, t[0]) for n, t in self.inputs.items()],
            parameters=[spec(n, t) for n, t in self.parameters.items()],
            constants=[], nodes=self.nodes, output=loss,
        )  # fmt: skip


def chain_of(names: list[str], seed: int) -> Chain:
    """The operations one after another, their shapes and made-up patients drawn by the seed."""
    draw, chain, last = random.Random(seed), Chain(), None
    for k, name in enumerate(names):
        given = Given(seed * 31 + k, *(draw.randint(1, 4) for _ in range(3)), PATIENTS)
        last = chain.add(name, draw.choice(CASES[name])(given), last)
        if last[1] == 0:
            break
    chain.last = last[0]  # type: ignore[union-attr, attr-defined]
    return chain


def spoiled(inputs: dict[str, Tensor], who: int, bad: float) -> dict[str, Tensor]:
    """The inputs with one patient's replaced, indices by ones far out of range."""
    out = {name: t.clone() for name, t in inputs.items()}
    for t in out.values():
        t[who] = bad if t.dtype.is_floating_point else ~t[who] if t.dtype == torch.bool else 10**12
    return out


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int64)


def moved(
    it: Lifted, parameters: dict[str, Tensor], inputs: dict[str, Tensor], who: int, bad: float
) -> list[str]:
    """The parameters by which some other patient's gradient has changed in any bit."""
    others = torch.arange(PATIENTS) != who
    torch.manual_seed(0)
    before = it.gradients(parameters, {}, inputs)
    torch.manual_seed(0)
    after = it.gradients(parameters, {}, spoiled(inputs, who, bad))
    return [n for n, t in before.items() if not torch.equal(bits(t[others]), bits(after[n][others]))]


def norm(sums: dict[str, Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in sums.values()]).norm())


def check(names: list[str], seed: int) -> bool:
    """Whether the chain is computed at all; that nobody moves anybody, and adds at most C, if it is."""
    chain = chain_of(names, seed)
    try:
        it = lift(chain.program(chain.last))  # type: ignore[attr-defined]
    except ProgramError:
        return False
    draw = random.Random(seed)
    who, bad = draw.randrange(PATIENTS), draw.choice([math.nan, math.inf, -1e300, 1e300, 0.0, 1e-300])
    assert not moved(it, chain.parameters, chain.inputs, who, bad), (names, seed)
    hostile = spoiled(chain.inputs, who, bad)
    everyone, less = torch.ones(PATIENTS, dtype=torch.bool), torch.arange(PATIENTS) != who
    whole, rest = (it.clipped_sum(chain.parameters, {}, hostile, m, CLIP) for m in (everyone, less))
    assert norm({n: whole[n] - rest[n] for n in whole}) <= CLIP * (1 + train.slack(PATIENTS)), (names, seed)
    one = it.clipped_sum(chain.parameters, {}, hostile, ~less, CLIP)
    assert torch.equal(whole.counted - rest.counted, one.counted), (names, seed)
    return True


@pytest.mark.parametrize("name", NAMES)
def test_no_operation_lets_a_patient_move_anothers_gradient(name: str) -> None:
    """Bit for bit in float64, with a value that is not finite, huge or tiny in another patient's place."""
    done = [check([name], seed) for seed in range(20 if DEEP else 1)]
    assert any(done) or name in WITHOUT_GRADIENT, f"{name} was refused"


def test_no_chain_of_operations_does_either() -> None:
    """Random graphs of two to six operations of the table."""
    draw, done = random.Random(7), 0
    for seed in range(4000 if DEEP else 60):
        done += check([draw.choice(NAMES) for _ in range(draw.randint(2, 6))], seed)
    assert done > (2000 if DEEP else 30)


def misshapen(arg: Any, draw: random.Random) -> Any:
    """An argument with dimensions put in or left out, or other numbers in it, as only a hostile program has."""
    if isinstance(arg, Tensor):
        fewer, more = arg.reshape(len(arg), -1), arg.unsqueeze(1)
        least = fewer[:, 0] if fewer.shape[1] else fewer
        return draw.choice([arg, fewer, least, more, more.unsqueeze(1)]).contiguous()
    if isinstance(arg, list) and all(type(v) is int for v in arg):
        return draw.choice([arg, arg, [], [0], [-1], [1, 1], [3, 1], arg[:-1], arg + arg[-1:]])
    if isinstance(arg, list):
        return [misshapen(v, draw) for v in arg]
    return draw.choice([arg, arg, -2, -1, 0, 1, PATIENTS]) if type(arg) is int else arg


def test_no_misshapen_argument_does_either() -> None:
    """Arguments of other ranks than an operation is meant for: refused, or patients are kept apart."""
    draw, done = random.Random(11), 0
    for seed in range(5000 if DEEP else 250):
        chain = Chain()
        given = Given(seed, *(draw.randint(1, 4) for _ in range(3)), PATIENTS)
        name = draw.choice(NAMES)
        args = [misshapen(arg, draw) for arg in draw.choice(CASES[name])(given)]
        try:
            last, _ = chain.add(name, args, None)  # the rule itself may raise first
            it = lift(chain.program(last))
        except Exception:
            continue
        done += 1
        bad = draw.choice([math.nan, 1e300, 0.0, -3.0])
        assert not moved(it, chain.parameters, chain.inputs, draw.randrange(PATIENTS), bad), (name, seed)
    assert done > (2000 if DEEP else 100)


def test_an_operation_that_mixes_patients_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teeth: a rule that adds a trace of the batch's mean to each patient, and one that sorts patients."""
    op, rule = TABLE["aten.tanh.default"]
    for mixing in (lambda x: rule(x + 1e-9 * x.mean(0, keepdim=True)), lambda x: rule(x.sort(0).values)):
        monkeypatch.setitem(table.TABLE, "aten.tanh.default", (op, mixing))
        with pytest.raises(AssertionError):
            assert [check(["aten.tanh.default"], seed) for seed in range(10)]
