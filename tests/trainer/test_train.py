"""DP-SGD as in the paper: the sample, the noise, the divisor and the update, and what tells on none of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conftest import node, program
from house import numbers
from safetensors.torch import load, save
from torch import Tensor

from rapha_lab.curator.cohort import _most
from rapha_lab.curator.lift import Totals, lift
from rapha_lab.curator.mapped import with_nobody
from rapha_lab.curator.mechanisms import train
from rapha_lab.curator.noise import SeededNoise, SystemNoise, grid_of, noisy
from rapha_lab.protocol.errors import ProgramError, RefusedError, RequestError
from rapha_lab.protocol.messages import Fit, Optimizer
from rapha_lab.protocol.schema import Schema

N = 1000


class Records:
    """Stands for a view: a thousand patients with two columns."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def of(self, which: Tensor) -> Records:
        return Records(self.values[which])

    def rows(self, inputs: Any) -> dict[str, Tensor]:
        return dict.fromkeys(inputs, with_nobody(self.values))

    def __len__(self) -> int:
        return len(self.values)

    def present(self, rows: Tensor) -> Tensor:
        return torch.ones(len(rows), dtype=torch.bool)


class Public:
    """Stands for a schema."""

    def expected(self, split: str) -> float:
        return float(N)

    def layout(self, columns: Any) -> tuple[tuple[int, ...], str]:
        return (len(columns),), "float32"

    def held(self, shapes: Any) -> None:
        """All of it fits in memory."""


# the loss w.x, so that a patient's gradient is x
DOT = program(
    {"x": [4]},
    {"w": [4]},
    [node("y", "mul.Tensor", "@x", "@w"), node("loss", "sum.default", "@y")],
    "float32",
)


def ask(**changes: Any) -> Fit:
    fields: dict[str, Any] = {
        "dataset": "d", "split": "train", "epsilon": 1.0, "program": DOT, "inputs": {"x": ["a", "b", "c", "d"]},
        "steps": 1, "batch": 100, "clip": 1.0, "optimizer": Optimizer(name="sgd", settings={"lr": 1.0}),
    }  # fmt: skip
    return Fit(**{**fields, **changes})


def run(values: Tensor, noise: Any, **changes: Any) -> tuple[Tensor, dict[str, Any]]:
    """Weights after training from zero, and the answer's values."""
    plan = train.plan(ask(**changes), save({"w": torch.zeros(4)}), Public(), 1e-5, noise)  # type: ignore[arg-type]
    answer = plan.run(Records(values), lambda *_: None)  # type: ignore[arg-type]
    return load(answer.tensors)["w"], answer.values


class Silent(SeededNoise):
    """No noise, everyone drawn: what remains is the clipped sum."""

    def gaussian(self, n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.float64)


class Unit(SeededNoise):
    """Noise of one standard deviation exactly."""

    def gaussian(self, n: int) -> Tensor:
        return torch.ones(n, dtype=torch.float64)


def test_a_step_is_the_noisy_clipped_sum_over_the_expected_batch() -> None:
    """Without noise a step at rate 1 moves the weights by minus the clipped sum over L."""
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
    moved, values = run(x, Silent(0), batch=N)
    clipped = x / x.norm(dim=1, keepdim=True).clamp_min(1.0)
    torch.testing.assert_close(moved, -clipped.sum(0) / N, rtol=1e-3, atol=1e-5)
    assert values["rate"] == 1.0


def test_the_noise_is_sigma_times_the_norm() -> None:
    """On patients without a gradient the step is noise of sigma C (and rounding's slack) over L, not less."""
    for clip in (0.5, 2.0):
        moved, values = run(torch.zeros(N, 4), Unit(0), clip=clip)
        assert torch.allclose(-moved * 100, torch.full((4,), values["noise"] * clip), rtol=1e-2)
        assert float((-moved * 100).min()) > values["noise"] * clip


def test_half_the_noise_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teeth: a mechanism that halves its noise fails the check above."""
    original = train.private
    monkeypatch.setattr(train, "private", lambda total, d, *more: original(total, d / 2, *more))
    with pytest.raises(AssertionError):
        test_the_noise_is_sigma_times_the_norm()


@pytest.mark.parametrize(
    "name", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam", "radam", "adamax", "adadelta"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_of_all_weights_as_one_vector_is_that_of_each(name: str, dtype: torch.dtype) -> None:
    """Also where dtypes differ: the parameters follow their own gradients, as with torch's optimiser on each."""
    torch.manual_seed(0)
    each = {"a": torch.randn(5, 3), "b": torch.randn(7, dtype=dtype), "c": torch.randn(())}
    together = train.Weights(each)
    rule = Optimizer(name=name, settings={"lr": 0.1})
    apart, whole = (train.optimizer_for(rule, ts) for ts in ([*each.values()], together.vectors))
    total = Totals({n: list(t.shape) for n, t in each.items()})
    for _ in range(3):
        total.flat.normal_()
        for n, t in each.items():
            t.grad = total[n].to(t.dtype)
        together.follow(total)
        apart.step()
        whole.step()
    for n, t in each.items():
        assert together[n].dtype == t.dtype
        assert torch.allclose(together[n], t, rtol=1e-5, atol=1e-6)


def test_a_step_s_sum_is_of_that_step_alone() -> None:
    """The vector that a run keeps for its sums holds nothing of the step before."""
    it, rows = lift(DOT), {"x": with_nobody(torch.ones(8, 4))}
    used = Totals({"w": [4]})
    used.flat.fill_(7.0)
    used.counted.fill_(7.0)
    step = it, {"w": torch.zeros(4)}, {}, rows, torch.arange(8), 1.0
    again, fresh = train.clipped_sum(*step, used), train.clipped_sum(*step)
    assert torch.equal(again.flat, fresh.flat)
    assert torch.equal(again.counted, fresh.counted)


def test_no_step_and_no_number_has_anothers_noise() -> None:
    """Over 64 steps independent noise grows by 8, the same one by 64; no part of a long vector repeats another."""
    moved, values = run(torch.zeros(N, 4), SeededNoise(3), steps=64)
    each = moved * 100 / (values["noise"] * 8)
    assert 0.2 < float(each.norm()) < 5
    size = 1 << 13
    source, totals = SystemNoise(), [Totals({"w": [9 * size]}) for _ in range(2)]
    parts = torch.cat([train.private(t, 1.0, 1.0, source).flat.view(9, size) for t in totals])
    alike = torch.corrcoef(parts) - torch.eye(18)
    assert float(alike.abs().max()) < 6 / math.sqrt(size)


def test_the_noise_asked_of_the_accountant_gives_the_epsilon() -> None:
    """The plan's loss is (epsilon, delta) at most, and nearly."""
    from rapha_lab.curator.accounting import epsilon_of

    plan = train.plan(ask(steps=50), save({"w": torch.zeros(4)}), Public(), 1e-5, SystemNoise())  # type: ignore[arg-type]
    assert 0.99 < epsilon_of(plan.loss, 1e-5) <= 1.0
    assert plan.steps == 50


def test_patients_are_drawn_independently_at_the_rate() -> None:
    """Every patient as often as any other, sizes as of a binomial."""
    noise, slots = SeededNoise(1), train.capacity(100, 8)
    counts, sizes = torch.zeros(N), []
    for _ in range(400):
        drawn = train.draw(N, 0.1, slots, noise)
        real = drawn[drawn < N]
        assert len(real) == len(real.unique())
        counts[real] += 1
        sizes.append(len(real))
    spread = float(torch.tensor(sizes, dtype=torch.float64).std())
    assert abs(sum(sizes) / 400 - 100) < 4 * math.sqrt(90 / 400)
    assert 0.85 < spread / math.sqrt(90) < 1.15
    chi = float(((counts - 40) ** 2 / 36).sum())
    assert abs(chi - N) < 5 * math.sqrt(2 * N)


def test_a_step_has_the_same_shape_however_many_are_drawn() -> None:
    """Slots depend on the public batch alone."""
    for count in (0, 1, N):
        assert len(train.draw(count, 0.1, train.capacity(100, 8), SeededNoise(2))) == train.capacity(100, 8)


def test_nobody_is_left_out_of_a_step_that_draws_more_than_it_has_slots_for() -> None:
    """One patient who took another's place would move the sum by twice C, at a price for once."""
    drawn = train.draw(100, 1.0, 24, SeededNoise(4))
    assert sorted(drawn.tolist()) == [*range(100)] + [100] * (len(drawn) - 100)
    assert len(drawn) % 24 == 0


@pytest.mark.parametrize("expected", [0.01, 0.3, 1.1, 16.0, 100.0, 281.6, 4506.0])
def test_slots_are_too_few_once_in_2_to_the_60_and_hardly_any_is_spare(expected: float) -> None:
    """By the exact tail of the Poisson distribution; with a few slots less it would be more often."""

    def more_than(slots: int) -> float:
        return math.fsum(
            math.exp(k * math.log(expected) - expected - math.lgamma(k + 1))
            for k in range(slots + 1, slots + 2000)
        )

    slots = train.capacity(expected, 1)
    assert more_than(slots) <= 2.0**-60 < more_than(math.floor(0.97 * slots) - 1)
    assert 0 <= train.capacity(expected, 8) - slots < 8


@pytest.mark.parametrize("split", ["all", "train", "validation", "test"])
def test_slots_are_for_as_many_patients_as_a_split_is_opened_with(split: str) -> None:
    """Each of the three may hold some besides, all of them three times as many."""
    schema = Schema.from_dict(numbers("ward", 1, 100))
    rate = 10 / (schema.expected(split) or 0)
    assert train.most(10, rate, split) == pytest.approx(rate * _most(schema, split))


def test_another_patient_leaves_the_others_slots_alone() -> None:
    """Slots are taken at random, so the place of a patient says nothing about how many came before."""
    noise, places = SeededNoise(3), []
    for _ in range(2000):
        drawn = train.draw(3, 1.0, 16, noise)
        places.append(int((drawn == 2).nonzero()))
    counts = torch.bincount(torch.tensor(places), minlength=16).double()
    assert float(((counts - 125) ** 2 / 125).sum()) < 50


def test_records_that_are_not_finite_do_not_stop_or_spoil_a_run() -> None:
    """A patient whose gradient is NaN or infinite counts as zero; the weights stay finite."""
    x = torch.zeros(N, 4)
    x[::3] = float("nan")
    x[1::3] = float("inf")
    assert run(x, SystemNoise(), steps=5)[0].isfinite().all()


def test_divergence_is_a_public_error() -> None:
    """Weights that overflow by the private updates alone end the run with a reason."""
    with pytest.raises(RefusedError, match="diverged"):
        run(
            torch.ones(N, 4),
            SystemNoise(),
            steps=200,
            optimizer=Optimizer(name="sgd", settings={"lr": 1e6, "momentum": 1e6}),
        )


def test_steps_are_announced_before_they_run() -> None:
    """Progress hears of every step, in about fifty blocks; what it raises ends the run."""
    plan = train.plan(ask(steps=120), save({"w": torch.zeros(4)}), Public(), 1e-5, SystemNoise())  # type: ignore[arg-type]
    told: list[int] = []
    plan.run(Records(torch.zeros(N, 4)), lambda steps, doing="": told.append(steps))  # type: ignore[arg-type]
    assert sum(told) == 120
    assert len(told) <= 62  # with what is tried before

    def stop(steps: int, doing: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.run(Records(torch.zeros(N, 4)), stop)  # type: ignore[arg-type]


WRONG: dict[str, Callable[[], Fit]] = {
    "batch": lambda: ask(batch=N + 1),
    "optimizer.settings.hook": lambda: ask(optimizer=Optimizer(name="sgd", settings={"hook": 1.0})),
    "optimizer.settings.lr": lambda: ask(optimizer=Optimizer(name="sgd", settings={"lr": 1e9})),
    "optimizer.settings.betas": lambda: ask(optimizer=Optimizer(name="adamax", settings={"betas": []})),
    "optimizer.settings.dampening": lambda: ask(
        optimizer=Optimizer(name="sgd", settings={"dampening": [0.1, 0.1]})
    ),
    "optimizer": lambda: ask(optimizer=Optimizer(name="adam", settings={"momentum": 0.9})),
    "x": lambda: ask(inputs={"x": ["a"]}),
    "y": lambda: ask(inputs={"x": ["a", "b", "c", "d"], "y": ["a"]}),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_named(field: str) -> None:
    """Before anything is planned."""
    with pytest.raises((RequestError, ProgramError)) as caught:
        train.plan(WRONG[field](), save({"w": torch.zeros(4)}), Public(), 1e-5, SystemNoise())  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(
    "name", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam", "radam", "adamax", "adadelta"]
)
def test_every_named_optimiser_runs(name: Any) -> None:
    """With its own defaults."""
    assert run(torch.ones(N, 4), SystemNoise(), steps=3, optimizer=Optimizer(name=name))[0].isfinite().all()


@pytest.mark.parametrize("what", ["flat", "counted"])
def test_a_machine_that_mixes_rows_is_not_used(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test at the start of a run sees a kernel that lets one row's values into another's, or into the count."""
    it = lift(DOT)
    original = type(it).clipped_sum

    def leaky(self: Any, parameters: Any, constants: Any, inputs: Any, mask: Tensor, clip: float) -> Totals:
        totals = original(self, parameters, constants, inputs, mask, clip)
        getattr(totals, what).add_(1e-7 * inputs["x"].nan_to_num().sum())
        return totals

    it.selftest({"w": torch.ones(4)}, {})
    monkeypatch.setattr(type(it), "clipped_sum", leaky)
    with pytest.raises(RefusedError, match="reproducibly"):
        it.selftest({"w": torch.ones(4)}, {})


# The generator


def ks(sample: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov and Smirnov's distance times the root of the sample's size."""
    ordered, n = sample.sort().values, len(sample)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    p = cdf(ordered)
    return float(torch.maximum((p - steps[:-1]).abs().max(), (steps[1:] - p).abs().max())) * math.sqrt(n)


@pytest.mark.parametrize("noise", [SystemNoise(), SeededNoise(7)], ids=["system", "seeded"])
def test_noise_has_the_normal_law(noise: Any) -> None:
    """By distance of distributions (1.95 is exceeded once in a thousand) and by tails."""
    z = noise.gaussian(300_001)
    assert z.dtype == torch.float64
    assert len(z) == 300_001
    assert ks(z, lambda t: 0.5 * (1 + torch.erf(t / math.sqrt(2)))) < 2.3
    assert ks(noise.uniform(300_000), lambda t: t) < 2.3
    assert 250 < int((z.abs() > 3.29).sum()) < 350
    pairs = z[:300_000].reshape(2, -1)
    assert abs(float((pairs[0] * pairs[1]).mean())) < 5 / math.sqrt(150_000)


class Scripted(SystemNoise):
    """First every number of 16 bits in order, then one word wherever more bits are asked for."""

    def __init__(self, word: int) -> None:
        every = np.arange(1 << 16, dtype=np.uint16).view(np.int64)
        self.parts = [*torch.from_numpy(every).split(1 << 13)]
        self.parts.insert(
            1, torch.empty(0, dtype=torch.int64)
        )  # none of the first half has the rate's own bits
        self.parts.append(torch.tensor([word - (1 << 64) if word >> 63 else word]))

    def _words(self, n: int) -> Tensor:
        part = self.parts.pop(0)
        assert len(part) == n
        return part


@pytest.mark.parametrize("rate", [0.7, 2 / 3, math.nextafter(1.0, 0.0), 0.5 + 2.0**-53])
def test_a_sample_is_at_the_rate_to_the_last_bit(rate: float) -> None:
    """Of all numbers of 16 bits those below the rate's own are in; at its own it is the next 48 bits that are below."""
    whole = math.floor(Fraction(rate) * 2**64)
    first, rest = whole >> 48, whole % (1 << 48)
    for below, word in ((True, ((rest - 1) << 16) + 0xFFFF), (False, rest << 16)):
        if rest or not below:
            assert torch.equal(Scripted(word).sample(1 << 16, rate), torch.arange(first + below))


@pytest.mark.parametrize("rate", [0.0, 2.0**-64, 1.5 * 2.0**-17, 1.5 * 2.0**-16, 0.3, 1.0])
def test_samples_have_the_size_of_a_binomial(rate: float) -> None:
    """At rates that more bits decide alone, at some that they decide half of, and at none of theirs."""
    n = 3_000_017
    for noise in (SystemNoise(), SeededNoise(5)):
        found = noise.sample(n, rate)
        assert abs(len(found) - n * rate) <= 5 * math.sqrt(n * rate * (1 - rate))
        assert len(found) == len(found.unique()) == int(((found >= 0) & (found < n)).sum())
        # as many in each part of the keystream, and in each place of a word
        for where in (found * 4 // n, found % 4):
            off = where.bincount(minlength=4) - n * rate / 4
            assert float(off.abs().max()) <= 5 * math.sqrt(n * rate * (1 - rate) / 4) + 1
    assert SystemNoise().sample(0, rate).shape == (0,)


def test_halved_noise_fails_the_law() -> None:
    """Teeth: the distance sees a wrong deviation at once."""
    z = SystemNoise().gaussian(300_000) / 2
    assert ks(z, lambda t: 0.5 * (1 + torch.erf(t / math.sqrt(2)))) > 10


def test_seeded_noise_repeats_and_the_system_s_does_not() -> None:
    """Only tests may foresee noise."""
    assert torch.equal(SeededNoise(1).gaussian(10), SeededNoise(1).gaussian(10))
    assert not torch.equal(SystemNoise().gaussian(10), SystemNoise().gaussian(10))


def test_a_forked_child_draws_other_noise() -> None:
    """Parent and child do not share a stream."""
    noise = SystemNoise()
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(write, noise.uniform(1).numpy().tobytes())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 8) != noise.uniform(1).numpy().tobytes()


def test_answers_lie_on_a_grid_that_no_record_moves() -> None:
    """Multiples of one power of two, whatever the values."""
    given = torch.randn(1000, dtype=torch.float64) * 37 + 1e3
    values = noisy(given.clone(), 37.0, SeededNoise(2))
    assert torch.equal(values, (values * 2**15).round() / 2**15)
    plain = given + 37.0 * SeededNoise(2).gaussian(1000)
    torch.testing.assert_close(values, plain, rtol=0, atol=grid_of(37.0) / 2)
    assert torch.equal(noisy(given, 37.0, SeededNoise(2), share=300.0), values * (1 / 300.0))
