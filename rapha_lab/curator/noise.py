"""Gaussian noise and sampling bits from a cryptographic generator, at memory speed.

Construction: the keystream of AES-256 in counter mode (NIST SP 800-38A), keyed from the operating system's
generator (`os.urandom`), cut into 64-bit words of which the upper 53 bits make a uniform number on a grid of
2^-53; pairs of those become normal numbers by Box and Muller (1958) in float64. The uniform in the logarithm
lies in (0, 1], so the tail ends at 8.6 standard deviations and no draw is infinite.

What is not proved: exact differential privacy of a *continuous* mechanism in floating point (Mironov 2012).
Against the known attacks a mechanism adds the noise in float64 and rounds the sum to a grid that does not
depend on data, so that the set of possible answers is the same for every data set; that the float Box-Muller
distribution on that grid is close enough to the normal is argued by its 53 bits and tested, not proved.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

__all__ = ["Noise", "SeededNoise", "SystemNoise", "compile_noise", "grid_of", "noisy"]

_WORDS = 1 << 13  # what is made of so much keystream stays in cache
_ZEROS = bytes(8 * _WORDS)
_BITS = 53


class Noise(Protocol):
    """A source of randomness for mechanisms."""

    def gaussian(self, n: int) -> Tensor:
        """`n` independent standard normal numbers, float64."""
        ...

    def uniform(self, n: int) -> Tensor:
        """`n` independent uniform numbers in [0, 1), float64."""
        ...

    def order(self, n: int) -> Tensor:
        """0 .. n - 1 in random order, int64."""
        ...

    def sample(self, n: int, rate: float) -> Tensor:
        """Which of 0 .. n - 1 are in a Poisson sample, int64 in order: each independently, at `rate` or 2^-64 below."""
        ...


class _Words:
    """Noise made of a stream of uniform 64-bit words."""

    def _words(self, n: int) -> Tensor:
        """`n` uniform integers, int64, `n` at most `_WORDS`."""
        raise NotImplementedError

    def uniform(self, n: int) -> Tensor:
        """`n` independent uniform numbers in [0, 1), float64."""
        parts = [torch.empty(0, dtype=torch.float64)]
        for start in range(0, n, _WORDS):
            parts.append(_whole(self._words(min(_WORDS, n - start))).mul_(2.0**-_BITS))
        return torch.cat(parts)

    def order(self, n: int) -> Tensor:
        """0 .. n - 1 in random order, int64."""
        return self.uniform(n).argsort()

    def sample(self, n: int, rate: float) -> Tensor:
        """Which of 0 .. n - 1 are in a Poisson sample, int64 in order: each independently, at `rate` or 2^-64 below.

        Sixteen bits decide for each one, and 48 more where they are the rate's own, once in 65,536 times.
        """
        first, rest = divmod(int(rate * 2.0**64), 1 << 48)  # exact, and never above the rate
        found = [np.empty(0, dtype=np.int64)]
        for start in range(0, n, 4 * _WORDS):
            count = min(4 * _WORDS, n - start)
            bits = self._words(-(-count // 4)).numpy().view(np.uint16)[:count]
            at = np.flatnonzero(bits <= first)
            taken = bits[at] < first
            ties = np.flatnonzero(~taken)
            taken[ties] = self._words(len(ties)).numpy() >> 16 & (1 << 48) - 1 < rest
            found.append(at[taken] + start)
        return torch.from_numpy(np.concatenate(found))

    def gaussian(self, n: int) -> Tensor:
        """`n` independent standard normal numbers, float64."""
        out = torch.empty(-(-n // _WORDS) * _WORDS, dtype=torch.float64)
        for start in range(0, n, _WORDS):
            wanted = n - start
            if wanted > _WORDS // 2:
                _normal(self._words(_WORDS), out[start : start + _WORDS])
            else:
                wanted += wanted % 2
                box_muller(self._words(wanted), out[start : start + wanted])
        return out[:n]


def _whole(words: Tensor) -> Tensor:
    """The upper 53 bits of words as numbers in [0, 2^53)."""
    return words.bitwise_right_shift(64 - _BITS).bitwise_and_((1 << _BITS) - 1).double()


def box_muller(words: Tensor, out: Tensor) -> None:
    """Normal numbers of an even number of words: half of them are radii, the other half angles."""
    first, second = _whole(words).chunk(2)
    radius = first.add_(1).mul_(2.0**-_BITS).log_().mul_(-2).sqrt_()
    angle = second.mul_(2.0**-_BITS * 2 * math.pi)
    half = len(words) // 2
    torch.mul(radius, angle.cos(), out=out[:half])
    torch.mul(radius, angle.sin(), out=out[half:])


_normal: Callable[[Tensor, Tensor], None] = box_muller
"""What makes normal numbers of `_WORDS` words: as above, or compiled."""


def compile_noise(assembled: Callable[..., Callable[[list[Tensor]], Any]]) -> bool:
    """Compile the transformation to twice its speed, if the result is the same; whether it was.

    Args:
        assembled: a compiler of functions of tensors, see `lift.compiling`.
    """
    global _normal
    if _normal is not box_muller:
        return True
    words = SeededNoise(0)._words(_WORDS)
    mine, plain = (torch.empty(_WORDS, dtype=torch.float64) for _ in range(2))

    def normal(words: Tensor, out: Tensor) -> tuple[()]:
        first, second = _whole(words).chunk(2)
        radius = ((first + 1) * 2.0**-_BITS).log().mul(-2).sqrt()
        angle = second * (2.0**-_BITS * 2 * math.pi)
        out.copy_(torch.cat([radius * angle.cos(), radius * angle.sin()]))
        return ()

    try:
        fast = assembled(normal, [words, mine])
        fast([words, mine])
    except Exception:
        return False
    box_muller(words, plain)
    if not torch.allclose(mine, plain, rtol=1e-12, atol=1e-15):
        return False
    _normal = lambda words, out: fast([words, out])  # noqa: E731
    return True


class SystemNoise(_Words):
    """The generator of production; takes no seed, and a forked child rekeys itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rekey()

    def _rekey(self) -> None:
        self._pid = os.getpid()
        self._stream: Any = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def _words(self, n: int) -> Tensor:
        words = np.empty(n, dtype=np.int64)
        with self._lock:
            if os.getpid() != self._pid:
                self._rekey()
            self._stream.update_into(memoryview(_ZEROS)[: 8 * n], words.view(np.uint8))
        return torch.from_numpy(words)


class SeededNoise(_Words):
    """Repeatable noise, for tests alone: whoever knows the seed can take it off again."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def _words(self, n: int) -> Tensor:
        return torch.randint(-(1 << 63), (1 << 63) - 1, (n,), generator=self._generator)


def noisy(values: Tensor, deviation: float, noise: Noise, share: float = 1.0) -> Tensor:
    """The vector `values`, float64, with Gaussian noise of this standard deviation, on a fixed grid, over `share`; in place."""
    grid = grid_of(deviation)  # a power of two, so that all is as exact in its units
    for part in values.split(4 * _WORDS):
        units = noise.gaussian(len(part)).mul_(deviation / grid).add_(part, alpha=1 / grid).round_()
        torch.mul(units, grid / share, out=part)
    return values


def grid_of(scale: float) -> float:
    """What values are rounded to multiples of: a power of two just below `scale` / 2^20, the same whatever they are."""
    return 2.0 ** (math.floor(math.log2(scale)) - 20)
