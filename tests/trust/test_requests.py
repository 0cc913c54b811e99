"""Signed requests and replies inside their envelopes."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest

from rapha_lab.protocol import sealing
from rapha_lab.protocol.errors import SealError
from rapha_lab.protocol.keys import PrivateKey, PublicKey
from rapha_lab.protocol.sealing import (
    WINDOW,
    Replay,
    Request,
    open_reply,
    open_request,
    seal,
    seal_reply,
    seal_request,
)

NOW = 1_800_000_000.0
EVIDENCE = b"e" * 32
SITE, SIGNER = PrivateKey.create("x25519"), PrivateKey.create()
RESEARCHER, MAILBOX = PrivateKey.create(), PrivateKey.create("x25519")


def ask(body: bytes = b"print(1)", **other: Any) -> bytes:
    """A request of the researcher to the site."""
    given = {
        "to": SITE.public,
        "evidence_hash": EVIDENCE,
        "researcher": RESEARCHER,
        "reply_to": MAILBOX.public,
    }
    return seal_request("run", body, **{**given, "now": NOW, **other})


def receive(envelope: bytes, replay: Replay | None = None, **other: Any) -> Request:
    """The request as the site opens it."""
    given: dict[str, Any] = {"key": SITE, "evidence_hash": EVIDENCE, "now": NOW, **other}
    return open_request(envelope, replay=replay or Replay(), **given)


def hear(reply: bytes, request: bytes, **other: Any) -> sealing.Reply:
    """The reply as the researcher opens it."""
    given: dict[str, Any] = {"to": SITE.public, "key": MAILBOX, "site": SIGNER.public, **other}
    return open_reply(reply, request=request, **given)


class TestRequests:
    def test_a_request_arrives_with_its_sender(self) -> None:
        """Kind, body, researcher and the key to answer to."""
        request = receive(ask())
        assert (request.kind, request.body) == ("run", b"print(1)")
        assert (request.researcher, request.reply_to) == (RESEARCHER.public, MAILBOX.public)

    @pytest.mark.parametrize("suite", ["x-wing", "x25519"])
    def test_both_suites_carry_a_round_trip(self, suite: str) -> None:
        """Request and reply."""
        site, mailbox = PrivateKey.create(suite), PrivateKey.create(suite)
        envelope = ask(to=site.public, reply_to=mailbox.public)
        reply = seal_reply("done", b"2", request=receive(envelope, key=site), site=SIGNER)
        assert hear(reply, envelope, to=site.public, key=mailbox) == sealing.Reply("done", b"2")

    def test_every_flipped_bit_is_refused(self) -> None:
        """A sample of a thousand bits, spread over the whole envelope."""
        envelope = ask()
        for bit in range(0, len(envelope) * 8, len(envelope) * 8 // 1000):
            flipped = bytearray(envelope)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(SealError):
                receive(bytes(flipped))

    def test_a_replay_is_refused(self) -> None:
        """The second time, and ever after."""
        envelope, replay = ask(), Replay()
        receive(envelope, replay)
        for later in (0, WINDOW - 1):
            with pytest.raises(SealError, match="replay"):
                receive(envelope, replay, now=NOW + later)

    def test_the_same_question_may_be_asked_twice(self) -> None:
        """Two requests have two nonces."""
        replay = Replay()
        assert receive(ask(), replay).nonce != receive(ask(), replay).nonce

    def test_a_message_sealed_anew_is_still_a_replay(self) -> None:
        """The nonce is inside the signature, so another envelope around the same message changes nothing."""
        envelope, replay = ask(), Replay()
        receive(envelope, replay)
        inner = sealing.open_sealed(envelope, SITE, b"request")
        with pytest.raises(SealError, match="replay"):
            receive(seal(inner, SITE.public, b"request"), replay)

    @pytest.mark.parametrize("when", [NOW - WINDOW - 1, NOW + WINDOW + 1, float("nan"), float("inf")])
    def test_a_stale_request_is_refused(self, when: float) -> None:
        """Too old, too new, or no time at all."""
        with pytest.raises(SealError):
            receive(ask(now=when))

    def test_other_evidence_is_refused_and_said(self) -> None:
        """After a restart or a new policy the client has to look at the enclave again."""
        with pytest.raises(SealError, match="Connect again"):
            receive(ask(evidence_hash=b"f" * 32))

    def test_a_site_cannot_pass_a_request_on_as_its_own(self) -> None:
        """What is signed names the key it was sealed to: another site refuses the same message."""
        inner = sealing.open_sealed(ask(), SITE, b"request")
        other = PrivateKey.create("x25519")
        with pytest.raises(SealError, match="another message or recipient"):
            receive(seal(inner, other.public, b"request"), key=other)

    def test_an_unknown_researcher_is_refused_before_anything_is_remembered(self) -> None:
        """Strangers cannot fill the memory of nonces."""
        replay = Replay()
        with pytest.raises(SealError, match="does not know"):
            receive(ask(), replay, known=lambda key: key != RESEARCHER.public)
        assert not replay._until

    def test_nobody_signs_for_another(self) -> None:
        """A message that names a researcher and is signed by somebody else is refused."""
        with pytest.raises(SealError, match="signature"):
            receive(_forged())

    def test_a_changed_body_under_an_honest_head_is_refused(self) -> None:
        """The head holds the body's hash."""
        inner = sealing.open_sealed(ask(b"print(1)"), SITE, b"request")
        with pytest.raises(SealError, match="signature"):
            receive(seal(inner.replace(b"print(1)", b"print(2)"), SITE.public, b"request"))

    def test_a_reply_is_no_request(self) -> None:
        """The two have different domains, whatever the fields say."""
        inner = sealing._signed(
            b"reply", b"x", RESEARCHER, kind="run", bound=EVIDENCE, nonce=bytes(32), to=str(SITE.public),
            reply_to=str(MAILBOX.public), time=NOW,
        )  # fmt: skip
        with pytest.raises(SealError, match="signature"):
            receive(seal(inner, SITE.public, b"request"))

    @pytest.mark.parametrize(
        "inner", [b"", b"\xff" * 40, b"\0\0\0\2{}" + bytes(70), bytes(100), b"\0\0\0\x04null"]
    )
    def test_garbage_inside_an_honest_envelope_is_refused(self, inner: bytes) -> None:
        """Anybody may seal to a site, so what is inside is as untrusted as what is outside."""
        with pytest.raises(SealError):
            receive(seal(inner, SITE.public, b"request"))

    def test_fields_that_are_not_known_are_refused(self) -> None:
        """Nothing rides along unsigned or unread."""
        head = {
            "kind": "run",
            "bound": "",
            "signer": str(RESEARCHER.public),
            "to": "",
            "body": "",
            "nonce": "",
            "x": 1,
        }
        text = msgspec.json.encode(head)
        with pytest.raises(SealError, match="malformed"):
            receive(seal(len(text).to_bytes(4, "big") + text + bytes(64), SITE.public, b"request"))


class TestReplies:
    def test_a_reply_arrives(self) -> None:
        """Kind and body, a large one too."""
        envelope, body = ask(), bytes(3 << 20)
        reply = seal_reply("weights", body, request=receive(envelope), site=SIGNER)
        assert hear(reply, envelope) == sealing.Reply("weights", body)

    def test_every_flipped_bit_is_refused(self) -> None:
        """A sample of its bits."""
        envelope = ask()
        reply = seal_reply("done", b"2", request=receive(envelope), site=SIGNER)
        for bit in range(0, len(reply) * 8, 23):
            flipped = bytearray(reply)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(SealError):
                hear(bytes(flipped), envelope)

    def test_swapped_replies_are_refused(self) -> None:
        """The answer to one question is not taken for the answer to another."""
        first, second = ask(), ask()
        replies = [seal_reply("done", b"2", request=receive(e), site=SIGNER) for e in (first, second)]
        assert hear(replies[0], first).body == b"2"
        for reply, envelope in ((replies[0], second), (replies[1], first)):
            with pytest.raises(SealError):
                hear(reply, envelope)

    def test_a_redirected_reply_is_refused(self) -> None:
        """Sealed to another key by someone who could read it, it names the key it was for."""
        envelope = ask()
        request = receive(envelope)
        reply = seal_reply("done", b"2", request=request, site=SIGNER)
        thief = PrivateKey.create("x25519")
        with pytest.raises(SealError):
            hear(reply, envelope, key=thief)
        inner = sealing.open_sealed(reply, MAILBOX, b"reply" + request.bound)
        with pytest.raises(SealError, match="recipient"):
            hear(seal(inner, thief.public, b"reply" + request.bound), envelope, key=thief)

    def test_a_reply_that_another_key_signed_is_refused(self) -> None:
        """Anybody can seal to the researcher; only the attested key can sign."""
        envelope = ask()
        reply = seal_reply("done", b"2", request=receive(envelope), site=PrivateKey.create())
        with pytest.raises(SealError, match="attested"):
            hear(reply, envelope)

    def test_sizes_show_little(self) -> None:
        """A yes and a no, an error and an answer, are as long as each other."""
        request = receive(ask())
        sizes = {len(seal_reply("done", bytes(n), request=request, site=SIGNER)) for n in range(0, 1000, 10)}
        assert len(sizes) == 1


class TestReplay:
    def test_it_forgets_what_is_stale(self) -> None:
        """Memory holds the requests of ten minutes."""
        replay = Replay()
        for second in range(0, 10_000, 10):
            replay.admit("a", second.to_bytes(32, "big"), float(second))
        assert len(replay._until) <= 2 * WINDOW / 10 + 1

    def test_it_refuses_rather_than_forgets(self) -> None:
        """A flood by one researcher locks that one out for minutes, and no nonce comes free early."""
        replay = Replay(per_key=3, total=5)
        for number in range(3):
            replay.admit("a", bytes([number]) * 32, NOW)
        with pytest.raises(SealError, match="Too many"):
            replay.admit("a", b"x" * 32, NOW)
        replay.admit("b", b"y" * 32, NOW)
        with pytest.raises(SealError, match="replay"):
            replay.admit("a", bytes(32), NOW)
        replay.admit("a", b"x" * 32, NOW + 2 * WINDOW + 1)

    def test_of_many_threads_one_gets_through(self) -> None:
        """The same nonce at the same moment."""
        replay, passed = Replay(), list[int]()

        def attempt(number: int) -> None:
            try:
                replay.admit("a", bytes(32), NOW)
            except SealError:
                return
            passed.append(number)

        threads = [threading.Thread(target=attempt, args=(n,)) for n in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(passed) == 1


class TestMutants:
    """Each check taken out lets its attack through: the tests above have teeth."""

    def test_without_the_signature_check_a_forgery_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The attack of `test_nobody_signs_for_another`."""
        monkeypatch.setattr(PublicKey, "verifies", lambda self, signature, message: True)
        assert receive(_forged()).researcher == RESEARCHER.public

    def test_without_the_nonce_check_a_replay_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The attack of `test_a_replay_is_refused`."""
        monkeypatch.setattr(Replay, "admit", lambda self, signer, nonce, now: None)
        envelope, replay = ask(), Replay()
        assert receive(envelope, replay) == receive(envelope, replay)

    def test_without_the_binding_a_swap_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The attack of `test_swapped_replies_are_refused`."""
        monkeypatch.setattr(sealing, "_name", lambda envelope, algorithm: bytes(32))
        first, second = ask(), ask()
        reply = seal_reply("done", b"2", request=receive(first), site=SIGNER)
        assert hear(reply, second).body == b"2"


def _forged() -> bytes:
    """A request in the researcher's name, signed by an impostor."""
    impostor = PrivateKey.create()
    inner = sealing.open_sealed(ask(researcher=impostor), SITE, b"request")
    size = int.from_bytes(inner[:4], "big")
    text = inner[4 : 4 + size].replace(str(impostor.public).encode(), str(RESEARCHER.public).encode())
    head = b"rapha-lab/request/v1\0" + text
    return seal(inner[:4] + text + impostor.sign(head) + inner[68 + size :], SITE.public, b"request")


def test_the_command_line_speaks_of_its_own_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """Not of the argument that Python's users give."""
    from rapha_lab import cli
    from rapha_lab.protocol.errors import EvidenceError

    def refused(args: object) -> None:
        raise EvidenceError("The enclave is not to be trusted.", "(allow_simulated=True accepts it.)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_fetch_log", refused)
        assert cli.main(["log", "fetch", "demo", "x"]) == 1
    told = capsys.readouterr().err
    assert "--allow-simulated accepts it" in told
    assert "allow_simulated=True" not in told


def test_a_port_in_use_is_named_once() -> None:
    """And nobody is told that a socket was being created."""
    import socket

    from rapha_lab.enclave.site import _bound
    from rapha_lab.protocol.errors import SiteError

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SiteError) as caught:
            _bound("127.0.0.1", port)
    assert str(caught.value).count(str(port)) == 1
    assert "Address already in use" in str(caught.value)


def test_no_private_name_of_an_error_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that a fresh attestation does not mend ends in an error of the public kinds."""
    import dataclasses
    import threading

    from rapha_lab.client import channel
    from rapha_lab.protocol.errors import SealError

    @dataclasses.dataclass
    class Bound:
        signing_key: str = "ed25519:x"

    @dataclasses.dataclass
    class Attested:
        binding: Bound = dataclasses.field(default_factory=Bound)

    def never(self: object, kind: str, header: object, blob: bytes) -> None:
        raise channel._OtherEvidence("It does not open.", "Why.", "Do.")

    made = channel.Channel.__new__(channel.Channel)
    made._attesting, made.attested = threading.Lock(), Attested()  # type: ignore[assignment]
    monkeypatch.setattr(channel.Channel, "_attest", lambda self: Attested())
    monkeypatch.setattr(channel.Channel, "_call", never)
    with pytest.raises(SealError) as caught:
        made.call("card", {})
    assert type(caught.value) is SealError
