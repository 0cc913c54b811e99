"""Envelopes: what was sealed opens for its key and context, unchanged, and for nothing else."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapha_lab.protocol import sealing
from rapha_lab.protocol.errors import SealError
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.sealing import open_sealed, padded, seal

MIB = 1 << 20
KEYS = {"x-wing": PrivateKey.create("x-wing"), "x25519": PrivateKey.create("x25519")}
suites = pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)


@suites
@settings(max_examples=30, deadline=None)
@given(text=st.binary(max_size=2000), context=st.binary(max_size=64))
def test_what_was_sealed_opens(key: PrivateKey, text: bytes, context: bytes) -> None:
    """Any bytes, any context."""
    assert open_sealed(seal(text, key.public, context), key, context) == text


@suites
@pytest.mark.parametrize(
    "size", [0, 1, 248, 249, MIB - 9, MIB - 8, MIB - 7, MIB, MIB + 1, 3 * MIB - 8, 3 * MIB + 5]
)
def test_sizes_around_the_chunks_survive(key: PrivateKey, size: int) -> None:
    """Bodies that end just before, on and after a chunk's end."""
    text = random.Random(size).randbytes(size)
    assert open_sealed(seal(text, key.public, b"c"), key, b"c") == text


@suites
def test_every_flipped_bit_is_refused(key: PrivateKey) -> None:
    """Bits all over a small envelope, one at a time: header, wrapped key, ciphertext and tag."""
    envelope = seal(b"the body", key.public, b"c")
    step = 13  # coprime to 8: every position of a bit within a byte is met
    for bit in range(0, len(envelope) * 8, step):
        flipped = bytearray(envelope)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealError):
            open_sealed(bytes(flipped), key, b"c")


@suites
def test_a_truncated_envelope_is_refused(key: PrivateKey) -> None:
    """At every length of a small one, and at each boundary of a large one's chunks."""
    small, large = seal(b"body", key.public, b"c"), seal(bytes(3 * MIB), key.public, b"c")
    header = len(small) - padded(0) - 16
    cuts = [small[:end] for end in range(0, len(small), 3)]
    cuts += [large[: header + n * (MIB + 16) + extra] for n in range(4) for extra in (-1, 0, 1, 16)]
    for cut in cuts:
        with pytest.raises(SealError):
            open_sealed(cut, key, b"c")


@suites
def test_chunks_cannot_be_dropped_swapped_repeated_or_added(key: PrivateKey) -> None:
    """Each knows its place, and the last one that it is the last."""
    text = random.Random(1).randbytes(4 * MIB - 8)
    envelope = seal(text, key.public, b"c")
    size = MIB + 16
    header, body = envelope[: len(envelope) - 4 * size], envelope[len(envelope) - 4 * size :]
    a, b, c, d = (body[at : at + size] for at in range(0, 4 * size, size))
    assert open_sealed(header + a + b + c + d, key, b"c") == text
    for parts in ([b, a, c, d], [a, b, d], [a, b, c], [a, b, c, d, d], [a, a, b, c, d], [d, a, b, c], [d]):
        with pytest.raises(SealError):
            open_sealed(header + b"".join(parts), key, b"c")


@suites
def test_chunks_of_another_envelope_do_not_fit(key: PrivateKey) -> None:
    """Even of the same text for the same key."""
    first, second = (seal(bytes(3000), key.public, b"c") for _ in range(2))
    header = len(first) - padded(3008) - 16
    with pytest.raises(SealError):
        open_sealed(first[:header] + second[header:], key, b"c")


@suites
def test_another_context_does_not_open_it(key: PrivateKey) -> None:
    """Not even a shorter or a longer one."""
    envelope = seal(b"body", key.public, b"context")
    for other in (b"", b"contex", b"context\0", b"Context"):
        with pytest.raises(SealError):
            open_sealed(envelope, key, other)


def test_another_key_does_not_open_it() -> None:
    """Nor a key of the other suite."""
    for key in KEYS.values():
        for other in (PrivateKey.create(key.algorithm), *(k for k in KEYS.values() if k is not key)):
            with pytest.raises(SealError):
                open_sealed(seal(b"body", key.public, b"c"), other, b"c")


def test_an_unknown_suite_is_refused() -> None:
    """A signing key neither seals nor opens."""
    key = PrivateKey.create("ed25519")
    with pytest.raises(SealError, match="does not seal"):
        seal(b"body", key.public, b"c")
    with pytest.raises(SealError, match="does not seal"):
        open_sealed(b"RPS1\x03" + bytes(300), key, b"c")


@given(st.integers(0, 2**40))
def test_padding_costs_at_most_an_eighth(size: int) -> None:
    """Padmé: at most 12 % or a block of 4 KiB, never less than the text, and a padded size stays as it is."""
    assert size <= padded(size) <= max(size + 4096, size * 1.12)
    assert padded(size) % 4096 == 0
    assert padded(padded(size)) == padded(size)


@pytest.mark.parametrize("value", [0.0, -0.000123456789, 1.0 / 3.0, 123456789.123456])
def test_a_numbers_digits_do_not_show_in_the_size(value: float) -> None:
    """An answer of some figures has one size, however long they are written."""
    texts = [json.dumps({"values": [number] * 100}).encode() for number in (0.5, value)]
    assert len({len(seal(text, KEYS["x25519"].public, b"c")) for text in texts}) == 1


def test_nearly_equal_texts_have_equal_sizes() -> None:
    """An observer of a million possible lengths sees few sizes."""
    assert len({padded(size) for size in range(1, 1_000_000)}) < 250
    sizes = {len(seal(bytes(size), KEYS["x25519"].public, b"c")) for size in (0, 10, 200, 2000)}
    assert len(sizes) == 1


FINISHED = bytes(MIB - 8) + (MIB - 8).to_bytes(
    8, "big"
)  # a chunk that reads like the last one of an envelope


@suites
def test_a_text_that_looks_finished_midway_cannot_be_cut_there(key: PrivateKey) -> None:
    """The text itself cannot feign its end: only the last chunk's nonce says so."""
    envelope = seal(FINISHED + bytes(2 * MIB), key.public, b"c")
    header = len(envelope) - padded(3 * MIB + 8) - 4 * 16
    with pytest.raises(SealError):
        open_sealed(envelope[: header + MIB + 16], key, b"c")


class TestMutants:
    """What the tests above would not notice if they had no teeth."""

    def test_without_the_last_flag_a_cut_would_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The flag is what refuses an envelope cut at a chunk's end."""
        monkeypatch.setattr(sealing, "_nonce", lambda number, last: number.to_bytes(12, "big"))
        key, size = KEYS["x25519"], MIB + 16
        envelope = seal(FINISHED + bytes(2 * MIB), key.public, b"c")
        cut = envelope[: 5 + 32 + 48 + size]
        assert open_sealed(cut, key, b"c") == bytes(MIB - 8)

    def test_without_the_context_a_message_could_be_redirected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The context is what HPKE's info carries."""
        monkeypatch.setattr(sealing, "_info", lambda start, context: b"")
        key = KEYS["x25519"]
        assert open_sealed(seal(b"body", key.public, b"a"), key, b"b") == b"body"
