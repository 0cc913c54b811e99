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
from typing import Any, Protocol

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

__all__ = ["Noise", "SeededNoise", "SystemNoise", "on_grid"]

_WORDS = 1 << 17  # a megabyte of keystream at a time stays in cache
_BITS = 53


class Noise(Protocol):
    """A source of randomness for mechanisms."""

    def gaussian(self, n: int) -> Tensor:
        """`n` independent standard normal numbers, float64."""
        ...

    def uniform(self, n: int) -> Tensor:
        """`n` independent uniform numbers in [0, 1), float64."""
        ...

    def bernoulli(self, n: int, rate: float) -> Tensor:
        """`n` independent booleans, each True with probability `rate`."""
        ...


class _Words:
    """Noise made of a stream of uniform 53-bit words."""

    def _words(self, n: int) -> Tensor:
        """`n` uniform integers below 2^53, int64."""
        raise NotImplementedError

    def uniform(self, n: int) -> Tensor:
        """`n` independent uniform numbers in [0, 1), float64."""
        return self._words(n).double().mul_(2.0**-_BITS)

    def bernoulli(self, n: int, rate: float) -> Tensor:
        """`n` independent booleans, each True with probability `rate` to within 2^-53."""
        return self.uniform(n) < rate

    def gaussian(self, n: int) -> Tensor:
        """`n` independent standard normal numbers, float64."""
        out = torch.empty(n + n % 2, dtype=torch.float64)
        for start in range(0, len(out), _WORDS):
            part = out[start : start + _WORDS]
            words, half = self._words(len(part)), len(part) // 2
            radius = (words[:half].double() + 1).mul_(2.0**-_BITS).log_().mul_(-2).sqrt_()
            angle = words[half:].double().mul_(2.0**-_BITS * 2 * math.pi)
            torch.mul(radius, angle.cos(), out=part[:half])
            torch.mul(radius, angle.sin(), out=part[half:])
        return out[:n]


class SystemNoise(_Words):
    """The generator of production; takes no seed, and a forked child rekeys itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rekey()

    def _rekey(self) -> None:
        self._pid = os.getpid()
        self._stream: Any = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def _words(self, n: int) -> Tensor:
        buffer = bytearray(8 * n)
        with self._lock:
            if os.getpid() != self._pid:
                self._rekey()
            self._stream.update_into(bytes(8 * n), buffer)
        if not n:
            return torch.empty(0, dtype=torch.int64)
        return (
            torch.frombuffer(buffer, dtype=torch.int64)
            .bitwise_right_shift_(64 - _BITS)
            .bitwise_and_((1 << _BITS) - 1)
        )


class SeededNoise(_Words):
    """Repeatable noise, for tests alone: whoever knows the seed can take it off again."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def _words(self, n: int) -> Tensor:
        return torch.randint(1 << _BITS, (n,), generator=self._generator)


def on_grid(values: Tensor, scale: float) -> Tensor:
    """The values rounded to a power of two just below `scale` / 2^20: the same grid whatever they are."""
    grid = 2.0 ** (math.floor(math.log2(scale)) - 20)
    return values.div(grid).round_().mul_(grid)
