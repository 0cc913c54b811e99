"""Whatever comes over the wire or lies on a disk, each parser answers with one kind of error and nothing else.

Inputs are random, or honest ones with bytes changed, cut, doubled or spliced, since those get further in.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trust_material import DEEP, VECTORS, fixed

from rapha_lab.client import bundles, logs
from rapha_lab.client.appraisal import Verifier
from rapha_lab.client.builds import logged_build
from rapha_lab.client.cosignatures import cosign, cosigned_at, verifier_keys
from rapha_lab.client.proofs import open_proof, write_proof
from rapha_lab.enclave.attester import SimulatedAttester, launch_measurement
from rapha_lab.protocol import messages, sealing
from rapha_lab.protocol.builds import Build
from rapha_lab.protocol.checkpoint import (
    Checkpoint,
    Inclusion,
    leaf_hash,
    open_checkpoint,
    root_of,
    sign_checkpoint,
)
from rapha_lab.protocol.errors import EvidenceError, LogError, RaphaError, RequestError, SealError
from rapha_lab.protocol.evidence import NITRO, NVIDIA, SGX, SIMULATED, SNP, TDX, Binding, Evidence
from rapha_lab.protocol.keys import PrivateKey

examples = settings(
    max_examples=5000 if DEEP else 120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SITE, RESEARCHER, MAILBOX, WITNESS = (
    PrivateKey.create("x25519"),
    fixed(4),
    PrivateKey.create("x25519"),
    fixed(6),
)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
ENTRY = b'{"kind":"release-of-enclave","measurements":["sha256:' + b"ab" * 32 + b'"],"version":"1"}'
NOTE = sign_checkpoint(Checkpoint("ward", 2, root_of([ENTRY, b"{}"])), KEY)
LOGGED = Inclusion(0, ENTRY, [leaf_hash(b"{}")], NOTE)
BINDING = Binding(
    nonce=bytes(32), sealing_key=str(SITE.public), signing_key=str(fixed(5).public), policy_hash=bytes(32),
    checkpoint_hash=bytes(32),
)  # fmt: skip
EVIDENCE = SimulatedAttester("sha256:" + "ab" * 32).evidence(BINDING)
ENVELOPE = sealing.seal_request(
    "run",
    b"print(1)",
    to=SITE.public,
    evidence_hash=bytes(32),
    researcher=RESEARCHER,
    reply_to=MAILBOX.public,
)
VKEYS = verifier_keys("w.example", WITNESS)


def frame() -> bytes:
    """An honest frame."""
    stream = io.BytesIO()
    messages.write_frame(stream, b'{"op":"count","dataset":"d","epsilon":1.0}', b"tensors")
    return stream.getvalue()


@st.composite
def spoiled(draw: Any, honest: bytes) -> bytes:
    """`honest` with a few bytes changed, cut out, doubled or put in."""
    data = bytearray(honest)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        size = draw(st.integers(0, 40))
        how = draw(st.sampled_from(["change", "cut", "double", "insert", "end"]))
        if how == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[at : at + size]
        elif how == "double":
            data[at:at] = data[at : at + size]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=40))
        else:
            del data[at:]
    return bytes(data)


def of(honest: bytes) -> st.SearchStrategy[bytes]:
    """Spoiled copies of an honest input, and pure noise."""
    return st.one_of(spoiled(honest), st.binary(max_size=300))


def only(kind: type[RaphaError], parse: Callable[[], Any]) -> None:
    """Run `parse`, of which nothing but an error of `kind` may come out."""
    with contextlib.suppress(kind):
        parse()


class TestProtocol:
    @examples
    @given(of(EVIDENCE.encode()))
    def test_evidence(self, data: bytes) -> None:
        """From its JSON to its claims."""
        only(EvidenceError, lambda: Verifier().verify(Evidence.decode(data)))

    @examples
    @given(of(EVIDENCE.payload), st.sampled_from([SNP, TDX, SGX, NITRO, NVIDIA, SIMULATED, "", "x"]))
    def test_payloads_of_every_kind(self, payload: bytes, media_type: str) -> None:
        """Under any media type."""
        only(EvidenceError, lambda: Verifier().verify(Evidence(media_type, payload, BINDING)))

    @examples
    @given(of(ENTRY), st.integers(-2, 3), st.lists(st.binary(max_size=40), max_size=4), of(NOTE.encode()))
    def test_the_proof_of_a_build(self, entry: bytes, index: int, proof: list[bytes], note: bytes) -> None:
        """Each part of it."""
        build = Inclusion(index, entry, proof, note.decode("latin-1"))
        only(LogError, lambda: logged_build(Evidence(SIMULATED, b"", BINDING, build)))
        only(LogError, lambda: Build.logged(entry))

    @examples
    @given(of(ENVELOPE))
    def test_envelopes(self, envelope: bytes) -> None:
        """None opens but the honest one, under either suite."""
        for key in (SITE, PrivateKey.create("x-wing")):
            given = {"key": key, "evidence_hash": bytes(32), "replay": sealing.Replay()}
            only(SealError, lambda given=given: sealing.open_request(envelope, **given))  # type: ignore[misc]

    @examples
    @given(of(sealing.open_sealed(ENVELOPE, SITE, b"request")))
    def test_what_is_inside_an_envelope(self, inner: bytes) -> None:
        """Anybody can seal anything to a site."""
        envelope = sealing.seal(inner, SITE.public, b"request")
        given = {"key": SITE, "evidence_hash": bytes(32), "replay": sealing.Replay()}
        only(SealError, lambda: sealing.open_request(envelope, **given))

    @examples
    @given(of(frame()))
    def test_frames(self, data: bytes) -> None:
        """Between the processes of a site."""

        def parse() -> None:
            read = messages.read_frame(io.BytesIO(data))
            if read is not None:
                messages.decode(read[0])

        only(RequestError, parse)

    @examples
    @given(of(NOTE.encode()))
    def test_checkpoints(self, note: bytes) -> None:
        """And the cosignatures on them."""
        only(LogError, lambda: open_checkpoint(note.decode("latin-1"), KEY.public_key(), "ward"))
        only(LogError, lambda: open_checkpoint(note.decode("utf-8", "replace"), KEY.public_key()))

    @examples
    @given(of(cosign(NOTE, "w.example", WITNESS).encode()), of(VKEYS[0].encode()))
    def test_cosignatures(self, note: bytes, vkey: bytes) -> None:
        """The note's, and the witness's key as it was typed in."""
        for known in VKEYS:
            only(LogError, lambda known=known: cosigned_at(note.decode("utf-8", "replace"), known))  # type: ignore[misc]
        only(LogError, lambda: cosigned_at(NOTE, vkey.decode("utf-8", "replace")))

    @examples
    @given(of(write_proof(LOGGED).encode()))
    def test_proofs(self, text: bytes) -> None:
        """In their own files."""
        only(LogError, lambda: open_proof(text.decode("utf-8", "replace"), ENTRY, KEY.public_key()))

    @examples
    @given(st.data())
    def test_bundles(self, tmp_path: Path, data: st.DataObject) -> None:
        """Reading, verifying, and comparing with."""
        key = str(PrivateKey("ed25519", (KEY,)).public)
        notes = [sign_checkpoint(Checkpoint("ward", n, root_of([ENTRY, b"{}"][:n])), KEY) for n in (1, 2)]
        lines = [json.dumps({"checkpoint": NOTE, "key": key})]
        codes = (note.rsplit(" ", 1)[1].strip() for note in notes)
        lines += [json.dumps([body.decode(), code]) for body, code in zip((ENTRY, b"{}"), codes, strict=True)]
        honest = "\n".join(lines) + "\n"
        path, other = tmp_path / "bundle", tmp_path / "other"
        path.write_bytes(data.draw(of(honest.encode())))
        other.write_bytes(data.draw(of(honest.encode())))
        only(LogError, lambda: logs.verify(path, against=[other]))
        only(LogError, lambda: bundles.prove(path, data.draw(st.integers(-1, 3))))


@pytest.mark.skipif(
    not VECTORS.is_dir(), reason="recorded evidence of real hardware is not part of this repository"
)
class TestRecordings:
    @examples
    @given(st.data(), st.sampled_from([(NITRO, "nitro-document.bin"), (TDX, "tdx-quote.bin")]))
    def test_a_site_reads_its_own_evidence_or_says_why_not(
        self, data: st.DataObject, what: tuple[str, str]
    ) -> None:
        """The enclave's reader of its own measurement, on spoiled documents."""
        payload = data.draw(of((VECTORS / what[1]).read_bytes()))
        only(EvidenceError, lambda: launch_measurement(what[0], payload))
