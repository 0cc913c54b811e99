"""The site's door: how often one may knock, what a stranger gets, and who must log in."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from trust_material import fixed

from rapha_lab.cli import main
from rapha_lab.enclave import gateway
from rapha_lab.enclave.cell import Cell, Order
from rapha_lab.enclave.cells import Cells
from rapha_lab.enclave.gateway import MINE, ROOMS, WAITING, Gateway
from rapha_lab.enclave.identity import LONGEST, Login, Provider, token_nonce
from rapha_lab.enclave.limits import Limits, neighbourhood
from rapha_lab.enclave.wire import Bodies
from rapha_lab.protocol import messages, sealing
from rapha_lab.protocol.errors import PolicyError, RaphaError, SiteError, from_wire
from rapha_lab.protocol.keys import PrivateKey

SEALING, SIGNING = PrivateKey.create("x25519"), PrivateKey.create()
RESEARCHER, COLLEAGUE, MAILBOX = fixed(41), fixed(42), PrivateKey.create("x25519")
IDENTITY = b"i" * 32
NONCE = {"nonce": "00" * 32}
NOW = 1_800_000_000.0


class TestLimits:
    @given(st.lists(st.floats(0, 5), max_size=60))
    def test_no_more_is_let_in_than_a_full_bucket_and_what_was_refilled(self, waits: list[float]) -> None:
        """Whatever the pace."""
        limits, now, admitted = Limits(2.0, 5, lock=0.0), 0.0, 0
        for wait in waits:
            now += wait
            try:
                limits.admit("a", now=now)
                admitted += 1
            except SiteError:
                pass
            assert admitted <= 5 + 2.0 * now + 1e-6

    def test_who_goes_on_at_an_empty_bucket_is_locked_out(self) -> None:
        """For a minute, during which waiting a second does not help; then all is as before."""
        limits = Limits(1.0, 3)
        for _ in range(3):
            limits.admit("a", now=0.0)
        for _ in range(3):
            with pytest.raises(SiteError, match="The limit is 1 a second"):
                limits.admit("a", now=0.0)
        with pytest.raises(SiteError, match="locked out for 50 s"):
            limits.admit("a", now=10.0)
        limits.admit("b", now=10.0)
        limits.admit("a", now=61.0)

    def test_one_strangers_flood_costs_another_nothing(self) -> None:
        """Each has a bucket of their own."""
        limits = Limits(1.0, 3)
        for _ in range(3):
            limits.admit("a", now=0.0)
        for _ in range(50):
            with pytest.raises(SiteError):
                limits.admit("a", now=0.0)
        limits.admit("b", now=0.0)

    def test_the_memory_is_bounded(self) -> None:
        """A million addresses do not fill it; the quiet ones are forgotten."""
        limits = Limits(1.0, 3, names=10)
        for n in range(10):
            limits.admit(str(n), now=0.0)
        with pytest.raises(SiteError, match="others"):
            limits.admit("new", now=1.0)
        limits.admit("new", now=5.0)
        assert len(limits._buckets) == 1

    def test_an_ipv6_network_is_one_stranger(self) -> None:
        """A home has 256 networks of 2^64 addresses of it, an office 65,536."""
        assert (
            neighbourhood("2001:db8::1")
            == neighbourhood("2001:db8:0:ffff:ffff::1")
            != neighbourhood("2001:db8:1::1")
        )
        assert neighbourhood("192.0.2.1") != neighbourhood("192.0.2.2")
        assert neighbourhood("nonsense") == neighbourhood("") == "unknown"

    def test_an_ipv4_address_in_ipv6_is_that_address(self) -> None:
        """Else all of IPv4 were one stranger behind a proxy that writes it so, and one could lock out all."""
        assert neighbourhood("::ffff:192.0.2.1") == neighbourhood("192.0.2.1")


class Door:
    """A gateway without a site behind it."""

    def __init__(self, login: Login | None = None) -> None:
        self.evidence: Any = lambda nonce: {"nonce": nonce.hex()}
        self.quote: Any = dict
        self.cells = Cells(None, None, None, {}, None)  # type: ignore[arg-type]
        self.revoked = False
        self.gateway = Gateway(
            self.cells,
            card=lambda who: {"you": who},
            log=lambda start: {},
            extends=lambda start, end: {},
            quote=lambda who, asked: self.quote(),
            evidence=lambda nonce: self.evidence(nonce),
            sealing_key=SEALING,
            signing_key=SIGNING,
            identity=lambda: IDENTITY,
            known=self._known,
            custody={"item": lambda who, text: ({}, bytes(1 << 20))},
            login=login,
        )

    def _known(self, researcher: str) -> None:
        if self.revoked or researcher not in (str(RESEARCHER.public), str(COLLEAGUE.public)):
            raise PolicyError("No project of this site names your key.")

    def send(
        self, *requests: tuple[str, str, dict[str, Any]], address: str = "192.0.2.1"
    ) -> list[httpx.Response]:
        """Each request's answer, one after another."""

        async def all_of_them() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.gateway.app(), client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://site") as client:
                return [await client.request(method, path, **what) for method, path, what in requests]

        return asyncio.run(all_of_them())

    def ask(self, kind: str, header: Any = None, key: PrivateKey = RESEARCHER) -> Any:
        """The result of one sealed request, or the error it was refused with."""
        envelope = seal(kind, header or {}, key)
        (response,) = self.send(("POST", "/open", {"content": envelope}))
        return opened(envelope, response)

    def crowd(
        self, kind: str, header: Any, until: Callable[[int], bool], release: Callable[[], object]
    ) -> list[Any]:
        """What more requests of one researcher than there are rooms are answered, after a colleague was answered."""

        async def everybody() -> list[Any]:
            transport = httpx.ASGITransport(self.gateway.app(), client=("192.0.2.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://site") as client:
                sealed = [seal(kind, header) for _ in range(ROOMS + MINE)]
                many = [asyncio.create_task(client.post("/open", content=each)) for each in sealed]
                try:
                    async with asyncio.timeout(20):
                        while not until(sum(each.done() for each in many)):
                            await asyncio.sleep(0.01)
                    mine = seal("card", {}, COLLEAGUE)
                    answer = await asyncio.wait_for(client.post("/open", content=mine), 20)
                    assert opened(mine, answer) == {"you": str(COLLEAGUE.public)}
                finally:
                    release()
                return list(zip(sealed, await asyncio.gather(*many), strict=True))

        return asyncio.run(everybody())


def opened(envelope: bytes, response: httpx.Response) -> Any:
    """The result in a sealed answer, or the error in it."""
    if response.status_code != 200:
        raise from_wire(response.json())
    given = {"request": envelope, "to": SEALING.public, "key": MAILBOX, "site": SIGNING.public}
    reply = sealing.open_reply(response.content, **given)
    said = json.loads(reply.body[16 : 16 + int.from_bytes(reply.body[4:8], "big")])
    if "error" in said:
        raise from_wire(said["error"])
    return said["result"]


def outcome(answer: tuple[bytes, httpx.Response]) -> Any:
    """As `opened`, with the error instead of raising it."""
    try:
        return opened(*answer)
    except RaphaError as error:
        return error


def seal(kind: str, header: Any, key: PrivateKey = RESEARCHER) -> bytes:
    """A sealed request."""
    import io

    frame = io.BytesIO()
    messages.write_frame(frame, messages.encode(header))
    given = {"to": SEALING.public, "evidence_hash": IDENTITY, "researcher": key, "reply_to": MAILBOX.public}
    return sealing.seal_request(kind, frame.getvalue(), **given)


@pytest.fixture
def door() -> Door:
    """A door without a login."""
    return Door()


class TestDoor:
    def test_evidence_is_for_everybody_in_measure(self, door: Door) -> None:
        """The hardware answers slowly: a flood from one address is turned away, another address is served."""
        answers = door.send(*[("GET", "/evidence", {"params": NONCE})] * 150)
        assert [a.status_code for a in answers[:100]] == [200] * 100
        assert answers[-1].status_code == 429
        assert from_wire(answers[-1].json()).what == "Too many requests."
        (other,) = door.send(("GET", "/evidence", {"params": NONCE}), address="192.0.2.2")
        assert other.status_code == 200

    def test_envelopes_that_do_not_open_are_counted_and_those_that_do_are_not(self, door: Door) -> None:
        """Who sends rubbish is locked out by address; a researcher elsewhere notices nothing."""
        answers = door.send(*[("POST", "/open", {"content": b"rubbish"})] * 250)
        assert answers[0].status_code == 400
        assert answers[-1].status_code == 429
        honest = [("POST", "/open", {"content": seal("card", {})}) for _ in range(150)]
        assert {a.status_code for a in door.send(*honest, address="192.0.2.2")} == {200}

    def test_large_rubbish_costs_more(self, door: Door) -> None:
        """Forty megabytes take as much out of the bucket as six small ones, and leave a debt."""
        door.gateway.strangers = Limits(0.001, 8)
        big = ("POST", "/open", {"content": bytes(40 << 20)})
        small = ("POST", "/open", {"content": b"rubbish"})
        assert [a.status_code for a in door.send(big, big, small)] == [400, 400, 429]

    def test_what_is_held_is_given_back(self, door: Door) -> None:
        """Memory is bounded for all senders together, and freed whatever the outcome."""
        door.gateway.bodies = Bodies(1 << 20)
        (answer,) = door.send(("POST", "/open", {"content": bytes(2 << 20)}))
        assert (answer.status_code, from_wire(answer.json()).what) == (429, "The site is busy.")
        door.send(
            ("POST", "/open", {"content": b"rubbish"}), ("POST", "/open", {"content": seal("card", {})})
        )
        assert not door.gateway.bodies.held
        assert not door.gateway.bodies.coming

    def test_a_researcher_has_a_measure_too(self, door: Door) -> None:
        """Told inside the seal, and no colleague is kept waiting for it."""
        door.gateway.researchers = Limits(0.001, 3)
        for _ in range(3):
            assert door.ask("card") == {"you": str(RESEARCHER.public)}
        with pytest.raises(SiteError, match="Too many requests"):
            door.ask("card")
        assert door.ask("card", key=COLLEAGUE) == {"you": str(COLLEAGUE.public)}

    def test_nobody_can_lock_another_out_by_using_their_name(self, door: Door) -> None:
        """Only a signature that holds counts against a key."""
        door.gateway.researchers = Limits(0.001, 3)
        impostor = PrivateKey.create()
        for _ in range(10):
            inner = sealing.open_sealed(seal("card", {}, impostor), SEALING, b"request")
            forged = inner.replace(str(impostor.public).encode(), str(RESEARCHER.public).encode())
            (answer,) = door.send(
                ("POST", "/open", {"content": sealing.seal(forged, SEALING.public, b"request")})
            )
            assert answer.status_code == 400
        assert door.ask("card")

    def test_one_researchers_questions_leave_room_for_a_colleagues(self, door: Door) -> None:
        """However long they take, and however many there are; what is too much is refused, inside the seal."""
        held, gate = list[int](), threading.Event()

        def quote() -> dict[str, Any]:
            held.append(1)
            gate.wait(30)
            return {}

        door.quote = quote
        asked = {"dataset": "ward", "asks": [{"kind": "mean"}]}
        answers = door.crowd("quote", asked, lambda done: len(held) == MINE and done == ROOMS, gate.set)
        refused = [a for a in map(outcome, answers) if isinstance(a, SiteError)]
        assert len(refused) == len(answers) - MINE
        assert {str(each.what) for each in refused} == {"Too many requests."}
        assert len(held) == MINE

    def test_answers_that_nobody_takes_fill_no_memory(
        self, door: Door, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of one researcher so many bytes are on their way at once, and no more; sent or broken off, they are no longer."""
        monkeypatch.setattr(gateway, "GOING", 5 << 19)

        def ask(key: PrivateKey = RESEARCHER) -> tuple[bytes, Any]:
            envelope = seal("item", {"text": ""}, key)
            return envelope, door.gateway.answer(envelope)

        def outcome(envelope: bytes, reply: Any) -> Any:
            return opened(envelope, httpx.Response(200, content=reply.body))

        async def sent(message: Any) -> None:
            pass

        async def broken(message: Any) -> None:
            raise OSError

        first, second, third = ask(), ask(), ask()
        assert outcome(*first) == outcome(*second) == outcome(*ask(COLLEAGUE)) == {}
        with pytest.raises(SiteError, match="on its way to you"):
            outcome(*third)
        for send, (_, reply) in ((sent, first), (broken, second)):
            with contextlib.suppress(OSError):
                asyncio.run(reply({"type": "http"}, None, send))
            assert outcome(*ask()) == {}
            with pytest.raises(SiteError, match="on its way to you"):
                outcome(*ask())

    def test_a_few_wait_for_news_and_the_rest_are_told_how_things_stand(self, door: Door) -> None:
        """So that many notebooks of one researcher go on, only a little later."""
        cell = Cell("c", str(RESEARCHER.public), Order("s", "ward", "1"), state="running")
        door.cells._cells["c"] = cell
        waits = door.gateway._waits

        def end() -> None:
            with door.cells._changed:
                cell.state = "done"
                door.cells._changed.notify_all()

        watch = {"cell": "c", "wait": 10.0, "state": "running", "step": 0}
        answers = door.crowd("watch", watch, lambda _: waits._taken.total() == WAITING, end)
        told = [a for a in map(outcome, answers) if not isinstance(a, SiteError)]
        assert len(told) >= MINE
        assert {each["state"] for each in told} <= {"running", "done"}
        assert not waits._taken

    def test_a_failure_of_the_hardware_or_the_policy_is_an_error_of_ours(self, door: Door) -> None:
        """Not a bare 500."""

        def expired(nonce: bytes) -> Any:
            raise PolicyError("The policy expired.", "It ended.", "Sign a new version.")

        door.evidence = expired
        (answer,) = door.send(("GET", "/evidence", {"params": NONCE}))
        assert answer.status_code == 503
        assert isinstance(from_wire(answer.json()), PolicyError)

    def test_a_revoked_key_is_a_strangers(self, door: Door) -> None:
        """From the next request on."""
        assert door.ask("card")
        door.revoked = True
        with pytest.raises(RaphaError, match="does not know"):
            door.ask("card")


ISSUER, AUDIENCE = "https://login.hospital.example", "rapha-lab"
KEYS: dict[str, tuple[str, Any]] = {
    "rsa": ("RS256", rsa.generate_private_key(65537, 2048)),
    "ec": ("ES256", ec.generate_private_key(ec.SECP256R1())),
    "ed": ("EdDSA", Ed25519PrivateKey.generate()),
}


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Provider:
    """A provider with three keys."""
    path = tmp_path_factory.mktemp("idp") / "jwks.json"
    jwks = []
    for kid, (algorithm, key) in KEYS.items():
        told = json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key()))
        jwks.append({**told, "kid": kid, "alg": algorithm, "use": "sig"})
    path.write_text(json.dumps({"keys": jwks}))
    people = {str(RESEARCHER.public): "ada", str(COLLEAGUE.public): "bo"}
    return Provider(issuer=ISSUER, audience=AUDIENCE, jwks=str(path), people=people)


def token(kid: str = "rsa", *, signed_by: Any = None, algorithm: str = "", **claims: Any) -> str:
    """A token as the provider gives it to the researcher; a claim that is None is left out."""
    told = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "iat": NOW, "exp": NOW + 3600}
    told |= {"nonce": token_nonce(str(RESEARCHER.public))} | claims
    given = {name: value for name, value in told.items() if value is not None}
    key = signed_by if signed_by is not None else KEYS[kid][1]
    return jwt.encode(given, key, algorithm=algorithm or KEYS[kid][0], headers={"kid": kid})


WHO = str(RESEARCHER.public)


class TestLogin:
    @pytest.mark.parametrize("kid", KEYS)
    def test_a_token_of_the_provider_lets_its_person_ask(self, provider: Provider, kid: str) -> None:
        """Until it expires, and no longer."""
        login = Login(provider)
        with pytest.raises(PolicyError, match="not logged in"):
            login.require(WHO, NOW)
        assert login.enter(WHO, token(kid), NOW) == NOW + 3600
        login.require(WHO, NOW + 3599)
        with pytest.raises(PolicyError, match="not logged in"):
            login.require(WHO, NOW + 3600)

    def test_a_long_token_lasts_half_a_day(self, provider: Provider) -> None:
        """Whatever the provider says: who left the hospital is out by the evening."""
        assert Login(provider).enter(WHO, token(exp=NOW + 1e7), NOW) == NOW + LONGEST

    @pytest.mark.parametrize(
        "claims",
        [
            {"iss": "https://elsewhere.example"}, {"iss": None}, {"aud": "another-service"}, {"aud": None},
            {"sub": "bo"}, {"sub": None}, {"nonce": token_nonce(str(COLLEAGUE.public))}, {"nonce": None},
            {"exp": NOW - 1}, {"exp": None}, {"exp": "soon"}, {"iat": NOW + 3600}, {"iat": None}, {"iat": True},
            {"iat": NOW - LONGEST - 1, "exp": NOW + 9}, {"nbf": NOW + 1e9},
        ],
        ids=str,
    )  # fmt: skip
    def test_each_claim_counts(self, provider: Provider, claims: dict[str, Any]) -> None:
        """Of another provider, for another service, of another person, for another key, not in its time."""
        login = Login(provider)
        with pytest.raises(PolicyError, match="login was refused"):
            login.enter(WHO, token(**claims), NOW)
        with pytest.raises(PolicyError, match="not logged in"):
            login.require(WHO, NOW)

    def test_a_colleagues_token_serves_nobody_else(self, provider: Provider) -> None:
        """Neither stolen, nor lent by asking for it with the other's nonce."""
        for claims in ({"sub": "bo", "nonce": token_nonce(str(COLLEAGUE.public))}, {"sub": "bo"}):
            with pytest.raises(PolicyError):
                Login(provider).enter(WHO, token(**claims), NOW)

    def test_a_person_nobody_wrote_down_is_refused(self, provider: Provider) -> None:
        """Even if the provider knows them."""
        with pytest.raises(PolicyError, match="not of the person"):
            Login(provider).enter(str(PrivateKey.create().public), token(sub="cy"), NOW)

    def test_forged_tokens_are_refused(self, provider: Provider) -> None:
        """Another key, no signature, the public key as a secret, an unknown key, another algorithm, rubbish."""
        public = KEYS["rsa"][1].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        head, body, _ = token().split(".")
        none = base64.urlsafe_b64encode(b'{"alg":"none","kid":"rsa"}').rstrip(b"=").decode()
        forged = [
            token(signed_by=rsa.generate_private_key(65537, 2048)),
            token(signed_by=hashlib.sha256(public).digest() * 2, algorithm="HS256"),
            token("ec", signed_by=KEYS["rsa"][1], algorithm="RS256"),
            f"{none}.{body}.",
            f"{head}.{body}.",
            f"{head}.{body}",
            "",
            "a.b.c",
            "\0",
        ]
        for text in forged:
            with pytest.raises(PolicyError, match="login was refused"):
                Login(provider).enter(WHO, text, NOW)

    def test_no_flipped_character_is_accepted(self, provider: Provider) -> None:
        """Anywhere in the token."""
        text, login = token("ed"), Login(provider)
        for at in range(0, len(text) - 1, 3):
            changed = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
            with pytest.raises(PolicyError):
                login.enter(WHO, changed, NOW)

    def test_a_missing_or_broken_key_file_lets_nobody_in(self, provider: Provider, tmp_path: Path) -> None:
        """And is no traceback."""
        for text in (
            None,
            "",
            "{}",
            '{"keys": []}',
            '{"keys": [{"kty": "oct", "k": "AAAA", "kid": "rsa"}]}',
            "[1]",
        ):
            path = tmp_path / "jwks.json"
            if text is not None:
                path.write_text(text)
            bare = Provider(issuer=ISSUER, audience=AUDIENCE, jwks=str(path), people=provider.people)
            with pytest.raises(PolicyError):
                Login(bare).enter(WHO, token(), NOW)

    def test_at_the_door_a_login_comes_before_all_else(self, provider: Provider) -> None:
        """The key alone opens nothing, the token alone neither."""
        door = Door(Login(provider))
        with pytest.raises(PolicyError, match="not logged in"):
            door.ask("card")
        now = time.time()
        door.ask("login", {"token": token(iat=now, exp=now + 60)})
        assert door.ask("card") == {"you": WHO}
        with pytest.raises(PolicyError, match="not logged in"):
            door.ask("card", key=COLLEAGUE)
        with pytest.raises(RaphaError, match="asks for no login"):
            Door().ask("login", {"token": token()})

    def test_the_nonce_is_printed_for_a_public_key(self, capsys: Any) -> None:
        """And nothing for what is none."""
        assert main(["keys", "nonce", WHO]) == 0
        assert capsys.readouterr().out.strip() == token_nonce(WHO)
        assert main(["keys", "nonce", "ed25519:AAAA"]) == 1


class TestNoPolicy:
    SECRET = PolicyError(
        "The policy is not in force.", "It has 1.", "Missing: Bo Ek (data protection officer)."
    )

    def no(self, *_: Any) -> Any:
        raise self.SECRET

    def test_a_stranger_is_not_told_who_the_custodians_are(self, door: Door) -> None:
        """Neither with evidence, nor before an envelope is opened, nor in one that a stranger sealed."""
        door.evidence = self.no
        mine = seal("card", {}, PrivateKey.create())
        door.gateway._in_force = self.no
        told = [*door.send(("GET", "/evidence", {"params": NONCE}), ("POST", "/open", {"content": mine}))]
        door.gateway._identity = self.no
        told += door.send(("POST", "/open", {"content": seal("card", {})}))
        assert [answer.status_code for answer in told] == [503, 400, 400]
        assert not [answer.text for answer in told if "Bo Ek" in answer.text]
        assert "No policy is in force" in told[0].text

    def test_whom_it_named_is_told_what_is_wrong_sealed(self, door: Door) -> None:
        """A researcher and a custodian can do something about it."""
        door.gateway._in_force = self.no
        with pytest.raises(PolicyError, match="Bo Ek"):
            door.ask("card")


def test_strangers_cannot_keep_custodians_out_of_the_console() -> None:
    """However many challenges they ask for: none is remembered; each lets in once, and not for ever."""
    from starlette.applications import Starlette

    from rapha_lab.enclave import console
    from rapha_lab.protocol.decision import signed_login

    guardian = PrivateKey.create()
    known = str(guardian.public)
    bodies = Bodies()

    def body(request: Any, limit: int) -> Any:
        return bodies.read(request, "somebody", limit)

    made = console.Console(
        "site", lambda *_: {}, lambda: "", lambda key: key == known, lambda request: None, body
    )

    async def all_of_them() -> None:
        transport = httpx.ASGITransport(Starlette(routes=made.routes()))
        async with httpx.AsyncClient(transport=transport, base_url="http://site") as client:

            async def challenge() -> str:
                return str((await client.post("/console/challenge")).json()["challenge"])

            async def login(text: str) -> int:
                line = signed_login("site", text, guardian)
                return (await client.post("/console/login", content=line)).status_code

            first = await challenge()
            for _ in range(150):
                await challenge()
            assert await login(first[:-1] + ("0" if first[-1] != "0" else "1")) == 400
            assert await login("00" * 56) == 400
            assert await login(first) == 200
            assert await login(first) == 400
            stale = made._made(bytes(16), time.monotonic() - console.FRESH - 1)
            later = made._made(bytes(16), time.monotonic() + 60)
            never = made._made(bytes(16), float("nan"))
            assert [await login(text) for text in (stale, later, never)] == [400] * 3

    asyncio.run(all_of_them())
