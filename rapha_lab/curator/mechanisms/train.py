"""Training by DP-SGD: Algorithm 1 of Abadi et al. 2016, with the patient as the unit.

For each step: take a random sample of patients, each with probability q (Poisson); compute each one's
gradient; clip it to norm C; sum; add noise of standard deviation σC; divide by the *expected* number L = qN;
descend. Neighbouring data sets differ in one patient, added or removed. The sum is taken of the very numbers
whose norm was clipped, whatever the model. Neither a step's shape nor its work tells how many were drawn, but for
a chance below 2^-60.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from rapha_lab.curator.accounting import BandedGaussian, SampledGaussian, noise_for
from rapha_lab.curator.cohort import BESIDES, EXCESS, View
from rapha_lab.curator.lift import Lifted, Totals, lift
from rapha_lab.curator.lift.compiling import assembled
from rapha_lab.curator.lift.parts import GROUP
from rapha_lab.curator.mapped import taken
from rapha_lab.curator.mechanisms import Answer, Plan, Progress, banded
from rapha_lab.curator.mechanisms.adam import CorrectedAdam
from rapha_lab.curator.mechanisms.adaptive import Clip
from rapha_lab.curator.noise import Noise, compile_noise, noisy
from rapha_lab.protocol.errors import ProgramError, RefusedError, RequestError
from rapha_lab.protocol.messages import Columns, Fit, Open, Optimizer
from rapha_lab.protocol.program import Program
from rapha_lab.protocol.schema import MISSING, SPLITS, Schema

__all__ = [
    "Weights",
    "block",
    "capacity",
    "checked",
    "clipped_sum",
    "draw",
    "fits",
    "microbatches",
    "optimizer_for",
    "plan",
    "prepare",
    "price",
    "private",
    "rate_of",
    "recipe",
    "slack",
    "train",
    "unpriced",
    "updates",
    "with_target",
]

Tensors = dict[str, Tensor]

WORTH, EACH = 20.0, 1.0
"""Seconds of training from which on compiling is worth it, and for each of the program's operations: a compiler takes
about half as long, and the step becomes two to three times as fast."""

TESTING = "trying the arithmetic of its step on made-up patients"
COMPILING = "compiling the step, once for this shape of model"

MEMORY = 1 << 27
"""Numbers of noise that a run remembers, a gigabyte of them."""

BLOCKS = 50
"""A run announces its steps in about this many blocks."""


def block(steps: int) -> int:
    """How many steps of a run are announced at once."""
    return max(1, steps // BLOCKS)


def plan(ask: Fit, tensors: bytes, schema: Schema, delta: float, noise: Noise) -> Plan:
    """How a model will be trained at the asked epsilon; checks everything, touches no record.

    Raises:
        ProgramError: if the loss cannot be computed patient by patient, or is too large.
        RequestError: naming the field that is out of range.
    """
    lifted, parameters, constants = checked(ask, tensors, schema)
    loss = price(ask, schema, delta)
    rate, sigma = loss.rate, loss.noise
    updates(ask, [t.clone() for t in parameters.values()], sigma)
    Clip(ask, sigma)

    def run(view: View, progress: Progress) -> Answer:
        those = view.of(with_target(view, ask.inputs))
        rows = those.rows(ask.inputs)
        clip = Clip(ask, sigma)
        weights = train(lifted, parameters, constants, rows, ask, rate, clip, noise, progress, those.present)
        return Answer({"kind": "fit", **recipe(ask, rate, sigma, clip), "engine": lifted.note}, save(weights))

    touches = SPLITS if ask.split == "all" else (ask.split,)
    return Plan(loss, ask.steps, touches, run)


def recipe(ask: Fit, rate: float, sigma: float, clip: Clip) -> dict[str, Any]:
    """What a release says of how it was trained."""
    values = {"steps": ask.steps, "noise": sigma, "clip": ask.clip, "rate": rate, "batch": ask.batch}
    options = {"bands": ask.bands > 1 and ask.bands, "average": ask.average, "corrected": ask.corrected}
    options |= {"clip_quantile": ask.clip_quantile, "count_noise": clip.count_noise}
    options |= {"last_clip": ask.clip_quantile and clip.norm}
    return values | {name: value for name, value in options.items() if value}


def checked(ask: Fit, tensors: bytes, schema: Schema) -> tuple[Lifted, Tensors, Tensors]:
    """The program, lifted, its parameters and constants, once they and the fit's settings were found to be in order.

    Raises:
        ProgramError, RequestError: as `plan`.
    """
    lifted = lift(ask.program)
    parameters, constants = lifted.tensors(tensors)
    fits(ask.program, ask.inputs, schema)
    if (ask.bands - 1) * ask.program.size > MEMORY:
        why = f"Each keeps as many numbers as the model has, and {MEMORY:,} may be kept."
        raise RequestError(f"bands is {ask.bands}.", why, "Take fewer bands.", field="bands")
    momentum = ask.optimizer.settings.get("momentum", 0.0)
    if ask.bands > 1 and not (isinstance(momentum, int | float) and 0 <= momentum < 1):
        why = "Bands of noise are made for one below 1; a larger one would drown in rounding what later steps take back."
        field = "optimizer.settings.momentum"
        raise RequestError(f"momentum is {momentum}.", why, "Take a smaller one, or no bands.", field=field)
    return lifted, parameters, constants


def train(
    lifted: Lifted,
    parameters: Tensors,
    constants: Tensors,
    rows: Tensors,
    ask: Fit,
    rate: float,
    clip: Clip,
    noise: Noise,
    progress: Progress,
    present: Callable[[Tensor], Tensor],
    finite: Callable[[Tensors, int], None] = lambda weights, step: _finite(weights, step),
    prepared: bool = False,
) -> Tensors:
    """The parameters after `ask.steps` steps on the patients' rows, each `(n + 1, *shape)`, the last of zeros.

    Who of some rows is no longer `present` takes no part in the next step; `finite` stops a run that diverged. With
    `prepared`, the caller has called `prepare` with this very program, as it is lifted here, and these parameters.
    """
    weights = Weights(parameters)
    optimizer = updates(ask, weights.vectors, clip.noise)
    memory = banded.Memory(ask.bands, float(ask.optimizer.settings.get("momentum", 0.0)))  # type: ignore[arg-type]
    averages = {name: t.clone() for name, t in weights.items()} if ask.average else weights
    parts = microbatches(lifted, ask, rate)
    slots = parts * lifted.microbatch
    rounding = 1 + slack(lifted.microbatch)
    if not prepared:
        prepare(lifted, weights, constants, ask.steps * parts, progress)
    total = lifted.zeros()
    count = len(next(iter(rows.values()))) - 1
    turn = banded.turns(count, ask.bands, noise) if ask.bands > 1 else None
    for step in range(ask.steps):
        if step % block(ask.steps) == 0:
            finite(weights, step)
            progress(min(block(ask.steps), ask.steps - step))

        def takes_part(rows: Tensor, step: int = step) -> Tensor:
            there = present(rows)
            return there if turn is None else there & (turn[rows] == step % ask.bands)

        drawn = draw(count, rate, slots, noise, takes_part)
        clipped_sum(lifted, weights, constants, rows, drawn, clip.norm, total)
        with memory.of(total.flat, ask.batch):
            private(total, clip.noise * clip.norm * rounding * memory.norm, ask.batch, noise)
        clip.follow(total.counted, noise)
        weights.follow(total)
        optimizer.step()
        if ask.average:
            averaged(averages, weights, ask.average, step)
    finite(averages, ask.steps)
    return {name: t.clone() for name, t in averages.items()}


class Weights(dict[str, Tensor]):
    """Copies of parameters by name as parts of one vector, so that an update is one operation.

    Attributes:
        vectors: what an optimiser updates; one, or the parameters themselves where their dtypes differ.
    """

    def __init__(self, parameters: Tensors) -> None:
        if len({t.dtype for t in parameters.values()}) == 1:
            sizes = [t.numel() for t in parameters.values()]
            self.vectors = [torch.cat([t.reshape(-1) for t in parameters.values()])]
            parts = self.vectors[0].split(sizes)
            whole = {n: part.view_as(t) for (n, t), part in zip(parameters.items(), parts, strict=True)}
        else:
            whole = {name: t.clone() for name, t in parameters.items()}
            self.vectors = [t.view(-1) for t in whole.values()]
        super().__init__(whole)
        for t in self.vectors:
            t.grad = torch.zeros_like(t)

    def follow(self, gradient: Totals) -> None:
        """Let the optimiser's next step be by this gradient, of the same parameters in the same order."""
        parts = gradient.flat.split([len(t) for t in self.vectors])
        for t, part in zip(self.vectors, parts, strict=True):
            assert t.grad is not None
            t.grad.copy_(part)


def averaged(averages: Tensors, weights: Tensors, decay: float, step: int) -> None:
    """Move the averages towards the weights, faster in the beginning; with decay 0 they are the weights."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, t in weights.items():
        averages[name].lerp_(t, 1 - decay)


def with_target(view: View, inputs: dict[str, Columns]) -> Tensor:
    """The patients whose target is known, bool (n,): nothing is learned from the others, so they add nothing."""
    target = inputs.get("target")
    if not isinstance(target, str) or target.endswith(MISSING):
        return torch.ones(len(view), dtype=torch.bool)
    return view.known(target)


def prepare(
    lifted: Lifted, parameters: Tensors, constants: Tensors, microbatches: int, progress: Progress
) -> None:
    """Test the machine's arithmetic on made-up patients; use the compiled step if there is one or the run gains by it.

    Which it is depends on this program, on those that were compiled before, and on how busy the machine is.

    Raises:
        RefusedError: if a patient's gradient depends on the others in the batch.
    """
    progress(0, TESTING)
    seconds, before = lifted.selftest(parameters, constants), lifted.compiled_before
    if not before:
        if seconds * microbatches < WORTH + EACH * len(lifted.program.nodes):
            return
        progress(0, COMPILING)
    if lifted.compile(parameters, constants, lambda: progress(0, COMPILING)) is not None:
        compile_noise(assembled)
        lifted.selftest(parameters, constants)


def price(ask: Fit | Open, schema: Schema, delta: float) -> SampledGaussian | BandedGaussian:
    """The privacy loss of all steps of a training, its noise solved from the asked (epsilon, delta).

    Raises:
        RequestError: naming the field that is out of range.
    """
    one = unpriced(ask, schema)
    return one.with_noise(noise_for(one.with_noise, ask.epsilon, delta))


def unpriced(ask: Fit | Open, schema: Schema) -> SampledGaussian | BandedGaussian:
    """The same with a noise multiplier of 1."""
    rate, bands = rate_of(ask.batch, schema.expected(ask.split)), ask.bands if isinstance(ask, Fit) else 1
    if bands == 1:
        return SampledGaussian(rate, 1.0, ask.steps)
    if bands * rate > 1:
        raise RequestError(
            f"bands is {bands}.",
            "Each step draws from the patients whose turn it is, and there are too few of them for the batch.",
            f"Take at most {int(1 / rate)} bands, or a smaller batch.",
            field="bands",
        )
    return BandedGaussian(bands * rate, 1.0, bands, ask.steps)


def rate_of(batch: int, expected: float | None) -> float:
    """Each patient's chance to be in a step of `batch` expected patients, from the declared number of them.

    Raises:
        RequestError: naming `patients` if none is declared, or `batch` if it is larger.
    """
    if expected is None:
        why = "Sampling rates must not be computed from the true number."
        raise RequestError("The dataset declares no number of patients.", why, field="patients")
    if batch > expected:
        why, instead = f"About {expected:.0f} patients are expected.", "Make it smaller."
        raise RequestError(f"batch is {batch}.", why, instead, field="batch")
    return batch / expected


def draw(
    count: int, rate: float, slots: int, noise: Noise, takes_part: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """A Poisson sample of patients as `slots` row numbers, `count` (the row of zeros) where there is none.

    Only of those rows that `takes_part` says True of, if it is given.

    Patients take slots at random, so that one more leaves the others' slots as they were (in distribution):
    no one's arithmetic moves with anybody's presence. More patients than `capacity` has slots for make the step
    longer: to leave one out for another would be no Poisson sample, for which alone the price is proved.
    """
    drawn = noise.sample(count, rate)
    drawn = drawn if takes_part is None else drawn[takes_part(drawn)]
    while len(drawn) > slots:
        slots *= 2
    places = noise.order(slots)[: len(drawn)]
    return torch.full((slots,), count).scatter(0, places, drawn)


def microbatches(lifted: Lifted, ask: Fit, rate: float) -> int:
    """How many a step has; they are made so large that they divide its slots evenly."""
    return lifted.for_batches_of(capacity(most(ask.batch, rate / ask.bands, ask.split), 1))


def most(batch: int, rate: float, split: str) -> float:
    """The most patients a step can expect: no split is opened that holds more than this over the declared figure."""
    return EXCESS * batch + rate * BESIDES * (len(SPLITS) if split == "all" else 1)


def capacity(batch: float, microbatch: int) -> int:
    """Slots of a step, in whole microbatches: more patients than that are drawn with probability below 2^-60.

    Of patients drawn independently, L of whom are expected, P(k or more) <= E[x^(number - k)] <= exp(L(x - 1)) / x^k
    for any x >= 1 (Chernoff), which is least at x = k/L: exp(-(k ln(k/L) - k + L)). Only L decides.
    """

    def exponent(k: int) -> float:
        return k * math.log(k / batch) - k + batch

    larger = range(math.ceil(batch), math.ceil(3 * batch) + 100)
    too_many = larger[bisect_left(larger, 60 * math.log(2), key=exponent)]
    return math.ceil((too_many - 1) / microbatch) * microbatch


def clipped_sum(
    lifted: Lifted,
    weights: Tensors,
    constants: Tensors,
    rows: Tensors,
    drawn: Tensor,
    clip: float,
    total: Totals | None = None,
) -> Totals:
    """The sum of the drawn patients' clipped gradients, microbatch by microbatch, in float64; in `total` if given."""
    if total is None:
        total = lifted.zeros()
    total.flat.zero_()
    total.counted.zero_()
    absent = len(next(iter(rows.values()))) - 1
    for part in drawn.split(lifted.microbatch):
        batch = taken(rows, part, absent)
        lifted.clipped_sum(weights, constants, batch, part != absent, clip, total)
    return total


def private(total: Totals, deviation: float, share: float, noise: Noise) -> Totals:
    """The sums with Gaussian noise of this standard deviation, on a grid no record moves, over `share`, in place."""
    noisy(total.flat, deviation, noise, share)
    return total


def slack(microbatch: int) -> float:
    """By how much of C a patient may move the computed sum beyond C, because float32 rounds.

    Adding n numbers in float32 in any order errs by at most (n + 2) 2^-24 times the sum of their sizes
    (Higham 2002, section 4.2; products and scales included). With and without a patient the others keep their
    slots, so that only the sum of one group of n patients rounds differently: twice (n + 2) 2^-24 nC.
    Groups are added in float64, which 1e-5 covers along with the rounding of the scales.
    """
    group = min(microbatch, GROUP)
    return 2 * group * (group + 2) * 2.0**-24 + 1e-5


def fits(program: Program, inputs: dict[str, Columns], schema: Schema) -> None:
    """Check that columns have the shape and dtype of the program's inputs of the same names.

    Raises:
        ProgramError: naming the input that does not fit.
        RequestError: naming an unknown column, or if all of them are too much to hold.
    """
    stated = {spec.name: (tuple(spec.shape), spec.dtype) for spec in program.inputs}
    for name in {*stated} ^ {*inputs}:
        raise ProgramError(f"The input {name} has no columns, or the program has no such input.", field=name)
    for name, columns in inputs.items():
        shape, dtype = schema.layout(columns)
        if stated[name] != (tuple(shape), dtype):
            why = f"Its columns give {dtype} {tuple(shape)}, not {stated[name][1]} {stated[name][0]}."
            raise ProgramError(
                f"The input {name} does not fit the program.", why, "Trace it again.", field=name
            )
    schema.held(shape for shape, _ in stated.values())


_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta")
}
_CORRECTED = {"lr", "betas", "weight_decay"}
_SETTINGS = {
    "lr", "momentum", "dampening", "weight_decay", "nesterov", "betas", "eps", "amsgrad", "alpha", "centered",
    "lr_decay", "initial_accumulator_value", "momentum_decay", "rho", "maximize", "decoupled_weight_decay",
}  # fmt: skip


def optimizer_for(settings: Optimizer, weights: list[Tensor]) -> torch.optim.Optimizer:
    """The update rule on these weights; it sees private gradients only, so all it does is post-processing.

    Raises:
        RequestError: naming the setting that is unknown or out of range.
    """
    for key, value in settings.settings.items():
        several = isinstance(value, list)
        numbers = value if isinstance(value, list) else [value]
        as_many = several == (key == "betas") and len(numbers) == 1 + several
        if key not in _SETTINGS or not as_many or not all(abs(x) <= 1e6 for x in numbers):
            raise RequestError(
                f"The optimiser's setting {key} is unknown or out of range.",
                field=f"optimizer.settings.{key}",
            )
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.settings.items()}
    try:
        # one group of plain tensors, no fused kernels: the update's cost depends on sizes alone
        return _OPTIMIZERS[settings.name](weights, **given)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"The optimiser does not take these settings: {error}", field="optimizer"
        ) from None


def updates(ask: Fit, weights: list[Tensor], sigma: float) -> torch.optim.Optimizer:
    """The update rule of a fit, with the noise taken out of Adam's second moment if that is asked.

    Raises:
        RequestError: naming the setting that is unknown or out of range.
    """
    if not ask.corrected:
        return optimizer_for(ask.optimizer, weights)
    settings = {key: ask.optimizer.settings[key] for key in ask.optimizer.settings.keys() & _CORRECTED}
    if ask.optimizer.name not in ("adam", "adamw") or ask.bands > 1:
        raise RequestError(
            "corrected takes independent noise out of Adam's second moment.",
            f"This optimiser is {ask.optimizer.name}"
            + (f", with {ask.bands} bands of noise." if ask.bands > 1 else "."),
            "Use optimizer=torch.optim.Adam(model.parameters()) or AdamW and no bands, or leave corrected out.",
            field="corrected",
        )
    optimizer_for(ask.optimizer, weights)
    return CorrectedAdam(weights, sigma * ask.clip / ask.batch, **settings)  # type: ignore[arg-type]


def _finite(weights: Tensors, step: int) -> None:
    # weights are made of private sums only, so whether they are finite may be told
    if not all(bool(t.isfinite().all()) for t in weights.values()):
        raise RefusedError(
            f"Training diverged before step {step + 1}.",
            "The weights are no longer finite; the steps that ran stay charged.",
            "Use a smaller learning rate.",
        )
