"""Turn a PyTorch model and its loss into the program of one patient, or say which line cannot be one.

A function is exported by `torch.export` on a batch of one patient, so nothing in the program can name a
second one; linear, convolution, attention and recurrent layers stay whole, only cells of recurrent ones are written out.
"""

from __future__ import annotations

import io
import logging
import math
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CodeType
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from torch import Tensor, nn

from rapha_lab.protocol.errors import ProgramError
from rapha_lab.protocol.program import DTYPES, Arg, Node, Program, Ref, TensorSpec, check, refs
from rapha_lab.protocol.tensors import pack
from rapha_lab.session import layers
from rapha_lab.session.plain import WRITTEN_OUT, gaussian_nll_loss
from rapha_lab.session.refusals import PACKED
from rapha_lab.session.settled import Settled

__all__ = ["Traced", "loss_program", "score_program", "trace"]

Tensors = Mapping[str, Tensor]
Function = Callable[[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]], Tensor]

# arguments that say where and how a tensor is stored, which is the curator's business
_STORAGE = {"device", "layout", "pin_memory", "memory_format"}
# frames that are not the author's
_OURS = re.compile(r"[\\/](torch|rapha_lab)[\\/]|site-packages|[\\/]lib[\\/]python3|<frozen|<string>")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')

INTERVALS = "A Cox loss compares patients: give the model a logit for each interval of time instead, as docs/methods.md shows."

ALONE = (
    "Compute every patient alone: no statistics, distances or softmax over the batch. "
    'A loss with class weights is a sum over patients with reduction="sum". '
    f"One logit of a yes or no takes nn.BCEWithLogitsLoss, not CrossEntropyLoss. {INTERVALS}"
)

DRAWN = "Draw them in forward by torch: nn.Dropout, torch.randn_like(x), torch.rand(x.shape[0], 8), torch.bernoulli(p)."

CELL: ContextVar[str | None] = ContextVar("cell", default=None)
"""The file name of the cell that runs: a line of another cell would only mislead."""


@dataclass(frozen=True)
class Traced:
    """A program with its parameters and constants."""

    program: Program
    tensors: dict[str, Tensor]

    @property
    def blob(self) -> bytes:
        """The tensors as safetensors bytes, to travel beside the program."""
        return pack(self.tensors)


def trace(
    function: Function, parameters: Tensors, constants: Tensors, inputs: Tensors, *, modules: Any = None
) -> Traced:
    """The program that `function(parameters, constants, inputs)` computes for one patient.

    Args:
        function: gets the three dicts, each input with a leading dimension of 1, and returns a tensor.
        parameters: tensors to train, by name.
        constants: other tensors it reads, by name.
        inputs: one patient's example tensors, without a batch dimension.
        modules: an `nn.Module` whose children's names appear in errors.

    Raises:
        ProgramError: naming the operation or module and the line that cannot be computed patient by patient.
    """
    wrapper = _Wrapper(function, modules)
    batch = {name: example.detach().unsqueeze(0) for name, example in inputs.items()}
    plain = [{k: t.detach() for k, t in part.items()} for part in (parameters, constants)]
    with _quiet():
        try:
            with _unasked():
                exported = torch.export.export(wrapper, (*plain, batch), strict=False)
            exported = exported.run_decompositions(WRITTEN_OUT)
        except Exception as error:
            raise _untraceable(error) from None
    names = [*parameters, *constants, *inputs]
    return _encode(exported, names, {**parameters, **constants}, inputs, list(parameters))


class _Wrapper(nn.Module):
    def __init__(self, function: Function, modules: nn.Module | None) -> None:
        super().__init__()
        self.function, self.it = function, modules

    def forward(self, parameters: Any, constants: Any, inputs: Any) -> Tensor:
        with derived(lambda function, _: not function.__module__.startswith("torch.")):
            return self.function(parameters, constants, inputs)


@contextmanager
def derived(refuses: Callable[[Any, tuple[Any, ...]], bool]) -> Iterator[None]:
    """Refuse functions with a backward of their own, of which `refuses` says on which arguments.

    A program is the forward pass, of which the curator derives the gradients: the other backward would be lost unseen.
    """
    apply = torch.autograd.Function.__dict__["apply"]

    def checked(function: Any, *args: Any, **kwargs: Any) -> Any:
        if refuses(function, args):
            if function.__name__ == "BackwardHookFunction":
                raise ProgramError(*layers.HOOK, field="model", line=cell_line())
            raise ProgramError(
                f"{function.__name__} has a backward of its own.",
                "Gradients are derived at the site from the forward pass, so that it would be lost.",
                "Write use_reentrant=False." if function.__name__ == "CheckpointFunction" else
                "Write it with detach(): (2 * x).detach() - x turns a gradient round, x + (x.round() - x).detach() lets it "
                "pass straight through.", field="model", line=cell_line(),
            )  # fmt: skip
        return apply.__get__(None, function)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(checked)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


def loss_program(model: nn.Module, loss: Callable[..., Tensor], inputs: Tensors, target: Tensor) -> Traced:
    """The program of one patient's loss; its target is the input named "target".

    Args:
        model: parameters that require grad are trained, all else is constant. A single input named "x" is
            passed by position, any other set of inputs by name.
        loss: called as `loss(model(batch), target)`; must be a mean or a sum over patients.
        inputs: one patient's example tensors by name, without a batch dimension.
        target: one patient's example target.

    Raises:
        ProgramError: naming the module, operation or line to change.
    """
    if "target" in inputs:
        raise ProgramError("An input is named target.", "That is the target's name.", "Rename the input.")
    layers.refuse_modules(model)
    _refuse_loss(loss)
    layers.refuse_hooks(_Both(model, loss))
    if not any(p.requires_grad for p in _Both(model, loss).parameters()):
        raise ProgramError(
            "The model has nothing to train.", "No parameter of it has requires_grad.",
            "Say model.requires_grad_(True), or of the layers to train.", field="model",
        )  # fmt: skip
    for name, t in model.state_dict().items():
        if t.is_floating_point() and not t.isfinite().all():
            raise ProgramError(
                f"{name} is not finite.", "It holds NaN or infinity.", "Make the model anew.", field=name
            )

    def compute(both: _Both, batch: dict[str, Tensor], squeeze: bool = True) -> Tensor:
        prediction = _call(both.model, batch, without="target")
        return both.loss(*_matched(both.loss, prediction, batch["target"], squeeze))

    both, examples = _Both(model, loss), {**inputs, "target": target}
    # a loss of one's own may squeeze by itself, which fails on one patient if it was done before
    alone = partial(compute, squeeze=False)
    works = [_works(partial(way, both), examples) for way in (compute, alone)]
    return _program(both, alone if works == [False, True] else compute, examples, training=True)


def _refuse_loss(loss: Any) -> None:
    """Raise ProgramError if a loss cannot be called with a prediction and a target."""
    name = getattr(loss, "__name__", type(loss).__name__)
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise ProgramError(
            f"The loss is the class {name}.", "It must be one of that class.",
            f"Write {name}() in place of {name}.", field="loss",
        )  # fmt: skip
    if not callable(loss):
        raise ProgramError(
            f"The loss is a {name}.", "It is called with the prediction and the target.",
            "Say nn.BCEWithLogitsLoss(), for instance.", field="loss",
        )  # fmt: skip


def score_program(model: nn.Module, inputs: Tensors) -> Traced:
    """The program of one patient's scores, the model in evaluation mode; arguments as for `loss_program`."""
    layers.refuse_modules(model, training=False)
    return _program(_Both(model, None), lambda both, batch: _call(both.model, batch), inputs, training=False)


class _Both(nn.Module):
    """A model and its loss as one module, so that both may hold tensors."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model, self.loss = model, loss


def _program(both: _Both, compute: Callable[..., Tensor], inputs: Tensors, *, training: bool) -> Traced:
    state = dict(both.named_parameters()) | dict(both.named_buffers())
    names = {key: key.removeprefix("model.") for key in state}
    wanted = {key for key, t in both.named_parameters() if t.requires_grad}
    holder = _Call(both, compute)

    def function(parameters: Any, constants: Any, batch: Any) -> Tensor:
        tensors = {f"both.{key}": {**parameters, **constants}[name] for key, name in names.items()}
        return torch.func.functional_call(holder, tensors, (batch,))

    modes = {module: module.training for module in both.modules()}
    try:
        both.eval()
        _refuse_mixing(
            function,
            {names[key]: t for key, t in state.items()},
            {names[key] for key in wanted} if training else set(),
            inputs,
        )
        both.train(training)
        parameters = {names[key]: t for key, t in state.items() if key in wanted}
        constants = {names[key]: t for key, t in state.items() if key not in wanted}
        return trace(function, parameters, constants, inputs, modules=both)
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Call(nn.Module):
    def __init__(self, both: _Both, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.both, self.compute = both, compute

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.compute(self.both, batch)


def _call(model: nn.Module, batch: dict[str, Tensor], without: str = "") -> Tensor:
    inputs = {name: t for name, t in batch.items() if name != without}
    output = model(inputs["x"]) if list(inputs) == ["x"] else model(**inputs)
    if not isinstance(output, Tensor):
        raise ProgramError(
            f"The model returns a {type(output).__name__}.", "A program has one tensor as its output.",
            "Return that tensor from forward.", field="model",
        )  # fmt: skip
    return output


def _works(function: Callable[[dict[str, Tensor]], Tensor], inputs: Tensors) -> bool:
    """Whether it runs on one made-up patient."""
    with _quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            function({name: made_up(example, 1) for name, example in inputs.items()})
        except Exception:
            return False
    return True


def _matched(loss: Any, prediction: Tensor, target: Tensor, squeeze: bool = True) -> tuple[Tensor, Tensor]:
    """The prediction in the target's shape if only trailing ones differ, the target in the loss's dtype."""
    if (
        squeeze
        and prediction.dim() == target.dim() + 1
        and prediction.shape[-1] == 1
        and prediction.shape[:-1] == target.shape
    ):
        prediction = prediction.squeeze(-1)
    if prediction.shape == target.shape and not target.is_floating_point():
        target = target.to(prediction.dtype)
    classes = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or loss is nn.functional.cross_entropy
    if classes and prediction.dim() == target.dim() + 1:
        target = target.long()
    return prediction, target


def made_up(example: Tensor, patients: int, seed: int = 0) -> Tensor:
    """Made-up values of `patients` patients in the shape and dtype of one patient's `example`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (patients, *example.shape)
    if example.is_floating_point():
        return torch.rand(shape, generator=generator, dtype=example.dtype)
    high = 2 if example.dtype == torch.bool or not example.numel() else max(int(example.max()), 1) + 1
    return torch.randint(high, shape, generator=generator).to(example.dtype)


def _refuse_mixing(function: Function, state: Tensors, trained: set[str], inputs: Tensors) -> None:
    """Raise ProgramError unless made-up patients together give the mean or sum of each alone, or the rows if none is trained."""
    from rapha_lab.session import mixing  # which names lines as this module does

    def compute(state: Tensors, batch: Tensors) -> Tensor:
        with Settled():
            return function(dict(state), {}, dict(batch))

    batches = [
        {name: made_up(t, n, seed) for seed, (name, t) in enumerate(inputs.items(), 10 * n)} for n in (3, 5)
    ]
    single = [{name: t[i : i + 1] for name, t in batches[0].items()} for i in range(3)]
    with _quiet(), torch.no_grad():
        alone = [_run(compute, state, one) for one in single]
        together, again = _run(compute, state, batches[0]), _run(compute, state, batches[0])
    many = next((t for t in (alone[0], together) if t.numel() != 1), None)
    refuse_random(together, again)
    if not trained:
        mixing.refuse_mixed_rows(compute, state, batches, ALONE)
        return
    if many is not None:
        raise ProgramError(
            f"The loss has shape {tuple(many.shape)}.", "A loss is one number.",
            "Reduce it with .mean() or .sum(), or leave reduction='none' out.", field="loss",
        )  # fmt: skip
    if not together.isfinite().all():  # else it is by being alone that a patient has none
        refuse_nan(torch.stack([t.reshape(()) for t in alone]))
    mixing.reduction(compute, state, trained, batches, ALONE)
    none = {name: t if name == "target" else torch.zeros_like(t) for name, t in single[0].items()}
    # one that fails on zeros alone is traced all the same
    with _quiet(), torch.no_grad(), suppress(ProgramError):
        together = _run(compute, state, none)
    warn_of_none(together)


def refuse_random(once: Tensor, again: Tensor, line: int | None = None) -> None:
    """Raise ProgramError if the same patients gave another loss when it was computed again."""
    if not torch.allclose(once, again, rtol=1e-6, atol=0, equal_nan=True):
        raise ProgramError(
            "The loss is another each time it is computed.",
            "Random numbers for each patient are drawn at the site, which knows torch's and no others.",
            DRAWN, field="loss", line=line,
        )  # fmt: skip


def refuse_nan(losses: Tensor, line: int | None = None) -> None:
    """Raise ProgramError if the loss of a made-up patient is no finite number: at the site he would add nothing."""
    if not losses.isfinite().all():
        raise ProgramError(
            "The loss of a made-up patient is NaN or infinite.",
            "A patient whose loss or gradient is no number adds nothing to the training.",
            "Keep logarithms, roots and quotients in their domain, with clamp(min=1e-6) say. p[y > 0] selects nothing "
            "of some patients, and the mean of nothing is none: write (p * (y > 0)).mean().",
            field="loss", line=line,
        )  # fmt: skip


def warn_of_none(loss: Tensor) -> None:
    """Warn where the loss of a made-up patient without rows, whose inputs are zeros, is no finite number."""
    if not loss.isfinite().all():
        said = (
            "the loss of a patient of zeros, as one without rows is, is no number: such patients add nothing to the training, "
            "and are scored as 0. Where a mask hides all of a patient's rows let it hide none: pad & ~pad.all(1, keepdim=True)."
        )
        warnings.warn_explicit(said, UserWarning, CELL.get() or "cell", cell_line() or 1)


def _run(compute: Callable[..., Tensor], state: Tensors, batch: dict[str, Tensor]) -> Tensor:
    try:
        return compute(state, batch)
    except ProgramError:
        raise
    except Exception as error:
        raise _untraceable(error, batch) from None


def _encode(exported: Any, names: list[str], tensors: Tensors, inputs: Tensors, trained: list[str]) -> Traced:
    """The exported graph in our own format; nothing of torch's serialisation is used."""
    signature, constants = exported.graph_signature, {}
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        changed = next(
            iter([*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()])
        )
        raise ProgramError(
            f"The model changes {changed} while it computes.", "A patient's program changes nothing.",
            "Use a layer without running statistics: nn.GroupNorm or nn.LayerNorm.", field=str(changed),
        )  # fmt: skip
    ids, flat = {}, iter(_flat_order(names, tensors, inputs, trained))
    for spec in signature.input_specs:
        if spec.kind == torch.export.graph_signature.InputKind.USER_INPUT:
            ids[spec.arg.name] = next(flat)
        elif spec.target in exported.constants:
            ids[spec.arg.name] = f"constant.{spec.target}"
            constants[ids[spec.arg.name]] = exported.constants[spec.target]
    nodes = [_node(n, ids) for n in exported.graph.nodes if n.op == "call_function" and _computes(n)]
    (output,) = exported.graph.output_node().args[0]
    if not isinstance(output, torch.fx.Node) or output.op != "call_function":
        raise ProgramError(
            "The model computes nothing from its inputs.", "", "Return a tensor made from them."
        )
    nodes = _live(nodes, ids[output.name])
    read = {name for node in nodes for name in refs(node)}
    kept = {name: t for name, t in {**tensors, **constants}.items() if name in read or name in trained}
    program = Program(
        inputs=[_spec(name, t) for name, t in inputs.items()],
        parameters=[_spec(name, kept[name]) for name in trained],
        constants=[_spec(name, t) for name, t in kept.items() if name not in trained],
        nodes=nodes,
        output=ids[output.name],
    )
    check(program)
    return Traced(program, kept)


def _flat_order(names: list[str], tensors: Tensors, inputs: Tensors, trained: list[str]) -> list[str]:
    constants = [name for name in tensors if name not in trained]
    return [*trained, *constants, *inputs]


def _computes(node: Any) -> bool:
    return "_assert" not in str(node.target) and "sym_" not in str(node.target)


def _node(node: Any, ids: dict[str, str]) -> Node:
    op = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target.__name__
    line, module = _place(node.meta)
    _refuse_complex(node, op, line)
    taken = set(ids.values())
    ids[node.name] = node.name if node.name not in taken else f"{node.name}.node"
    try:
        given = {**_default_dtype(node), **node.kwargs}
        kwargs = {k: _arg(v, ids) for k, v in given.items() if k not in _STORAGE}
        return Node(ids[node.name], op, [_arg(a, ids) for a in node.args], kwargs, line, module)
    except (TypeError, KeyError):
        where = f" in {module}" if module else ""
        raise ProgramError(
            f"{op}{where} depends on a value that only running it would show.",
            "A patient's values decide no shape and no branch.",
            "Compute with tensors only: torch.where instead of if, no .item(), float() or data-sized shapes.",
            field=op, line=line,
        ) from None  # fmt: skip


def _default_dtype(node: Any) -> dict[str, Any]:
    """The dtype of a tensor that is made from nothing, for the site has defaults of its own."""
    value, schema = node.meta.get("val"), getattr(node.target, "_schema", None)
    if not isinstance(value, Tensor) or node.all_input_nodes or schema is None:
        return {}
    return {"dtype": value.dtype} if any(a.name == "dtype" for a in schema.arguments) else {}


def _refuse_complex(node: Any, op: str, line: int | None) -> None:
    """Raise ProgramError if a node's value is complex."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.is_complex():
        raise ProgramError(
            f"{op} gives complex numbers.", "A site computes with real ones.",
            "Compute both parts: cos and sin of the angle instead of polar or exp(1j * angle), products of real and "
            "imaginary parts, and for a Fourier transform of fixed length a product with matrices of cosines and sines.",
            field=op, line=line,
        )  # fmt: skip


def _arg(value: Any, ids: dict[str, str]) -> Arg:
    if isinstance(value, torch.fx.Node):
        return Ref(ids[value.name])
    if isinstance(value, list | tuple):
        return [_arg(item, ids) for item in value]  # type: ignore[misc]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device | torch.layout | torch.memory_format):
        return None
    raise TypeError(type(value).__name__)


def _live(nodes: list[Node], output: str) -> list[Node]:
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if node.id in wanted:
            kept.append(node)
            wanted.update(refs(node))
    return kept[::-1]


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        allowed = ", ".join(DTYPES)
        raise ProgramError(f"{name} is {dtype}.", f"Allowed: {allowed}.", "Convert it first.", field=name)
    return TensorSpec(name, dtype, list(tensor.shape))  # type: ignore[arg-type]


def cell_line(until: CodeType | None = None) -> int | None:
    """The line of the cell that is running, among what the code `until` called."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not until and not authors(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None or frame.f_code is until else frame.f_lineno


def authors(file: str) -> bool:
    """Whether a frame's file is the author's, and of the cell that runs."""
    return CELL.get() in (None, file) and not _is_ours(file)


@lru_cache(4096)
def _is_ours(file: str) -> bool:
    return _OURS.search(file) is not None


def _place(meta: dict[str, Any]) -> tuple[int | None, str]:
    """The author's line that made a node, and the path of its module."""
    lines = [int(n) for f, n in _FRAME.findall(meta.get("stack_trace") or "") if authors(f)]
    stack = meta.get("nn_module_stack") or {}
    paths = [path.removeprefix("it.") for path, _ in stack.values() if path not in ("", "it")]
    return (lines[-1] if lines else None), (paths[-1] if paths else "")


def _untraceable(error: Exception, batch: Tensors | None = None) -> ProgramError:
    if isinstance(error, ProgramError):
        return error
    frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if authors(f.filename)]
    line = frames[-1] if frames else None
    kind = type(error).__name__
    if "DynamicOutput" in kind:
        return ProgramError(
            f"{str(error).strip() or 'An operation'} makes shapes of a patient's values.",
            "Shapes are public, the same for every patient.",
            "Use operations whose shapes are known, as F.cross_entropy for each place in place of ctc_loss.", line=line,
        )  # fmt: skip
    if "DataDependent" in kind:
        return ProgramError(
            "The model decides something by a patient's values.",
            "No branch, loop or shape may depend on what a record holds.",
            "Use torch.where instead of if, and shapes that are the same for every patient.", line=line,
        )  # fmt: skip
    text = str(error).strip().split("\n")[0] or kind
    instead = "Check the shapes and dtypes of inputs, target and layers."
    if batch and ("shape" in text or "size" in text):
        shapes = ", ".join(f"{name} {tuple(t.shape[1:])}" for name, t in batch.items())
        instead = (
            f"One patient's shapes are {shapes}. In a list of columns a category of more than two values takes a "
            "number for each: patients.schema.layout(FEATURES) says how wide a list is."
        )
    if text.startswith("Target size"):
        instead = (
            "A column is one number a patient: end the model with one output, squeezed by .squeeze(-1), not .squeeze(), "
            "which takes a single patient's dimension too."
        )
    if "dtype" in text:
        instead = "Records are float32: make the model so, with model.float(), and tensors of your own."
    if "'indices'" in text:
        instead = (
            'An embedding takes the codes of a category that is named alone, inputs="ward". An integer becomes one by '
            'patients.with_columns(code=pl.col("visits").cut([0, 1, 2])), inputs="code".'
        )
    patients = len(next(iter(batch.values()))) if batch else 1
    count = "one made-up patient" if patients == 1 else f"{patients} made-up patients together"
    return ProgramError(
        f"The model or loss fails on {count}: {kind}: {text.rstrip('.')}.", "It was tried before anything was sent.",
        instead, field="model", line=line,
    )  # fmt: skip


@contextmanager
def _unasked() -> Iterator[None]:
    """Without torch's own looks at values: at a variance, at a distribution's arguments, at what a mask masks."""
    causal = torch.nn.modules.transformer
    with (
        patch.object(torch.nn.functional, "gaussian_nll_loss", gaussian_nll_loss),
        patch.object(torch.distributions.Distribution, "_validate_args", False),
        patch.object(torch._VF, "_pack_padded_sequence", _refuse_packing, create=True),
        patch.object(
            causal, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: bool(is_causal)
        ),
    ):
        yield


def _refuse_packing(*args: Any) -> NoReturn:
    raise ProgramError(*PACKED, field="model", line=cell_line())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warnings and logs about tracing: they speak of torch's insides, not of the cell."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch._export", "torch.fx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
