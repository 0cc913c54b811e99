"""A site as its clients see it over the wire: evidence, log, TLS, revocation; each lie is refused before anything is sent."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import hospital
import httpx
import msgspec
import pytest
import ward
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from ward import Ward

from rapha_lab.client import site as client
from rapha_lab.client import witness as witnessing
from rapha_lab.client.appraisal import AppraisalPolicy
from rapha_lab.client.channel import Channel
from rapha_lab.client.cosignatures import cosigned_at, verifier_keys, witness_name
from rapha_lab.client.logs import fetch, verify
from rapha_lab.client.witness import last_seen, witness
from rapha_lab.enclave.attester import measure
from rapha_lab.enclave.site import Config
from rapha_lab.protocol.builds import Build
from rapha_lab.protocol.checkpoint import sign_checkpoint
from rapha_lab.protocol.errors import EvidenceError, LogError, RaphaError, RequestError
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import Policy, state
from rapha_lab.protocol.release import MIME

CUSTODIANS = [PrivateKey.create(), PrivateKey.create()]
SIMULATED = AppraisalPolicy(allow_simulated=True)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these clients remember is forgotten with the test."""
    monkeypatch.setenv("RAPHA_LAB_HOME", str(tmp_path / "home"))


def lying(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> list[str]:
    """From now on somebody changes evidence on its way; gives the list of what is sent to the site."""
    honest, sent = Channel._send, list[str]()

    def send(self: Channel, method: str, path: str, **what: Any) -> httpx.Response:
        sent.append(path)
        response = honest(self, method, path, **what)
        if path == "/evidence":
            told = json.loads(response.content)
            change(told)
            response._content = json.dumps(told).encode()
        return response

    monkeypatch.setattr(Channel, "_send", send)
    return sent


class TestEvidence:
    def test_it_shows_the_build_in_the_log(self, serving: Ward) -> None:
        """With the measurement of the evidence, and the log's head that the evidence binds."""
        attested = Channel(serving.url, serving.key, SIMULATED).attested
        assert attested.build.measurements == [attested.verdict.claims.measurement]
        assert attested.head.origin == "test-hospital"
        assert attested.head.size > 0

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda told: told.pop("build"), "does not show its build"),
            (lambda told: told["build"].update(index=0), "not in the log|no release"),
            (lambda told: told["build"].update(proof=told["build"]["proof"][1:]), "not in the log"),
            (lambda told: told["build"].update(entry="e30="), "not in the log"),
            (lambda told: told["build"].update(checkpoint=told["build"]["checkpoint"] + "x"), "bound to"),
            (lambda told: told["binding"].update(policy_hash="A" * 43 + "="), "bound to"),
            (lambda told: told["binding"].update(tls_key_hash="B" * 43 + "="), "does not end in the enclave"),
            (lambda told: told["binding"].update(nonce="A" * 43 + "="), "not fresh"),
            (
                lambda told: told.update(media_type="application/vnd.rapha.evidence.tdx"),
                "collateral|malformed",
            ),
        ],
    )
    def test_each_lie_is_refused_before_anything_is_sent(
        self, serving: Ward, monkeypatch: pytest.MonkeyPatch, change: Any, reason: str
    ) -> None:
        """Evidence is asked for, and nothing else."""
        sent = lying(monkeypatch, change)
        with pytest.raises((EvidenceError, LogError), match=reason):
            Channel(serving.url, serving.key, SIMULATED)
        assert sent == ["/evidence"]

    def test_a_build_that_no_pinned_key_signed_is_refused(self, serving: Ward) -> None:
        """A client that names release keys holds a simulated enclave to them too."""
        pinned = AppraisalPolicy(signers=frozenset({str(PrivateKey.create().public)}), allow_simulated=True)
        with pytest.raises(EvidenceError, match="No known release"):
            Channel(serving.url, serving.key, pinned)

    def test_without_consent_nothing_is_sent_to_a_simulated_enclave(
        self, serving: Ward, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The default refuses."""
        sent = lying(monkeypatch, lambda told: None)
        with pytest.raises(EvidenceError, match="SIMULATED"):
            Channel(serving.url, serving.key, AppraisalPolicy())
        assert sent == ["/evidence"]


class TestConnect:
    @pytest.fixture(autouse=True)
    def alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No connection of another test is taken up."""
        monkeypatch.setattr(client, "_open", {})
        monkeypatch.setattr(client, "_latest", [])

    def test_stricter_terms_are_not_met_by_an_earlier_connection(self, serving: Ward) -> None:
        """Who consented to a simulated enclave once has to do so again, and pins count each time."""
        site = client.connect(serving.url, key=serving.key, allow_simulated=True)
        assert client.connect(serving.url, key=serving.key, allow_simulated=True) is site
        with pytest.raises(EvidenceError, match="SIMULATED"):
            client.connect(serving.url, key=serving.key)
        with pytest.raises(EvidenceError, match="No known release"):
            client.connect(
                serving.url, key=serving.key, allow_simulated=True, measurements=["sha256:" + "0" * 64]
            )

    def test_a_researcher_may_demand_the_policy_they_read(self, serving: Ward, tmp_path: Path) -> None:
        """The site runs under that very page, or is refused."""
        page = serving.folder / "policy.toml"
        assert client.connect(serving.url, key=serving.key, allow_simulated=True, policy=page).name
        other = tmp_path / "policy.toml"
        other.write_text(page.read_text().replace("900.0", "1.0"))
        with pytest.raises(EvidenceError, match="another policy than the one shown"):
            client.connect(serving.url, key=serving.key, allow_simulated=True, policy=other)


class TestWitness:
    def test_a_client_cosigns_what_it_saw(self, serving: Ward, tmp_path: Path) -> None:
        """Its note is a checkpoint of the log, with a line of its own that anybody can check."""
        site = serving.connect()
        head = witness(site._channel)
        note = last_seen(head.origin, str(site.key))
        assert note is not None
        for vkey in verifier_keys(witness_name(serving.key.public), serving.key):
            assert cosigned_at(note, vkey) <= time.time()
        fetch(site, tmp_path / "log.jsonl")
        (tmp_path / "note").write_text(note)
        assert (
            verify(tmp_path / "log.jsonl", str(site.key), against=[tmp_path / "note"]).checkpoint.size
            >= head.size
        )

    def test_a_name_that_was_met_under_another_key_is_not_cosigned(self, serving: Ward) -> None:
        """What is signed is the name: the client goes on, and remembers without a line that another could use."""
        channel = serving.connect()._channel
        witnessing.write(
            witnessing._path(channel.attested.head.origin, ""), {"site": str(PrivateKey.create().public)}
        )
        head = witness(channel)
        note = last_seen(head.origin, str(channel.site_key))
        assert note is not None
        with pytest.raises(LogError, match="not cosigned"):
            cosigned_at(note, verifier_keys(witness_name(serving.key.public), serving.key)[0])

    def test_the_head_in_the_evidence_is_part_of_what_was_seen(
        self, serving: Ward, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A site that binds one log and shows another is caught, though it is met for the first time."""
        channel = serving.connect()._channel
        head = msgspec.structs.replace(channel.attested.head, root=b"x" * 32)
        monkeypatch.setattr(channel, "attested", dataclasses.replace(channel.attested, head=head))
        with pytest.raises(LogError, match="does not extend"):
            witness(channel)

    def test_a_log_under_a_new_name_is_no_way_out(
        self, serving: Ward, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A real site keeps its log's name; the demo, which is simulated, has a new log at each start."""
        channel = serving.connect()._channel
        claims = msgspec.structs.replace(channel.verdict.claims, simulated=False)
        verdict = dataclasses.replace(channel.verdict, claims=claims)
        monkeypatch.setattr(channel, "attested", dataclasses.replace(channel.attested, verdict=verdict))
        witness(channel)
        witness(channel)
        path = witnessing._path("", str(channel.site_key))
        path.write_text(json.dumps({"origin": "the log that was"}))
        with pytest.raises(LogError, match="another name"):
            witness(channel)
        assert json.loads(path.read_text()) == {"origin": "the log that was"}

    def test_mutant_without_memory_a_fork_passes(
        self, serving: Ward, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was seen before is what refuses another history."""
        channel = serving.connect()._channel
        head = witness(channel)
        forged = msgspec.structs.replace(head, root=b"x" * 32)
        path = witnessing._path(head.origin, str(channel.site_key))
        told = json.loads(path.read_text())
        told["checkpoint"] = sign_checkpoint(forged, serving.site.signing_key.parts[0])
        path.write_text(json.dumps(told))
        with pytest.raises(LogError, match="does not extend"):
            witness(channel)
        monkeypatch.setattr(witnessing, "last_seen", lambda origin, site: None)
        assert witness(channel).size >= head.size


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    alternatives = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = builder.add_extension(alternatives, False).sign(key, hashes.SHA256())
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(*form))
    return paths


LONG = f"""
from torch import nn
model = nn.Sequential(nn.Linear({len(ward.FEATURES)}, 8), nn.Tanh(), nn.Linear(8, 1))
patients.train.fit(model, inputs={ward.FEATURES}, target="died", epochs=3000, epsilon=1)
"""


@dataclass
class Own:
    """A hospital of these tests' own, with a TLS key, a second suite and a signed release, and how it runs."""

    config: Config
    key: PrivateKey
    leaver: PrivateKey
    release: PrivateKey
    folder: Path
    running: Any = None
    url: str = ""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    """The hospital, serving."""
    folder, leaver, release = tmp_path_factory.mktemp("own"), PrivateKey.create(), PrivateKey.create()
    given = {"others": [leaver], "custodians": CUSTODIANS, "epsilon": 900.0}
    config, key = hospital.prepare(folder, ward.SCHEMA, ward.frame(), "ward", **given)
    pem, secret = certificate(folder, "site")
    config.tls_certificate, config.tls_key, config.suite = str(pem), str(secret), "x25519"
    config.release = str(folder / "release.json")
    build = Build.sign("0.1.0", [measure(), "sha384:" + "0" * 96], release)
    Path(config.release).write_bytes(msgspec.json.encode(build))
    made = Own(config, key, leaver, release, folder)
    with hospital.running(config) as (made.running, made.url):
        yield made


class TestOwnSite:
    @pytest.fixture(autouse=True)
    def trusted(self, own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
        """The hospital's certificate is in this machine's store."""
        monkeypatch.setenv("SSL_CERT_FILE", own.config.tls_certificate)

    def test_tls_ends_where_the_evidence_says(self, own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
        """At the certificate's key; a proxy with another trusted certificate is found out."""
        assert own.url.startswith("https://")
        channel = Channel(own.url, own.key, SIMULATED)
        assert channel.binding.tls_key_hash != bytes(32)
        assert channel.binding.suite == "x25519"
        assert channel.call("card", {})[0]["name"] == "test-hospital"
        monkeypatch.setattr(own.running, "_tls_key_hash", b"another key's hash, of 32 bytes.")
        with pytest.raises(EvidenceError, match="does not end in the enclave"):
            Channel(own.url, own.key, SIMULATED)

    def test_a_signed_release_is_known_by_its_key(self, own: Own) -> None:
        """The client pins the key, the log shows the release; another key is not enough."""
        pinned = AppraisalPolicy(signers=frozenset({str(own.release.public)}), allow_simulated=True)
        build = Channel(own.url, own.key, pinned).attested.build
        assert (build.version, build.measurements[0]) == ("0.1.0", measure())
        other = AppraisalPolicy(signers=frozenset({str(own.key.public)}), allow_simulated=True)
        with pytest.raises(EvidenceError, match="No known release"):
            Channel(own.url, own.key, other)

    def test_following_a_fast_fit_asks_a_few_times_a_second(
        self, own: Own, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not at each of its steps, or the limit on requests would end the watching."""
        kinds, asked = own.running.gateway._kinds, list[int]()
        watch = kinds["watch"]
        monkeypatch.setitem(kinds, "watch", lambda *given: (asked.append(1), watch(*given))[1])
        job = (
            hospital.connected(own.url, own.key).run(LONG.replace("epochs=3000", "epochs=150"), "ward").wait()
        )
        assert job.told["steps"] > 300
        assert 3 * len(asked) < job.told["steps"]

    def test_a_revoked_researchers_fit_stops_and_their_session_ends(self, own: Own) -> None:
        """One custodian revokes: what ran stays charged, nothing is released, the key is unknown; others work on."""
        site = hospital.connected(own.url, own.leaver)
        job = site.run(LONG, "ward")
        wait_for(lambda: (job.poll(wait=1), job.told.get("step", 0) > 3)[1])
        revoke(own.folder, own.leaver)
        cell = own.running.cells.get(str(own.leaver.public), job.id)
        wait_for(lambda: cell.state in ("failed", "lost", "cancelled"))
        assert not [output for output in cell.outputs if output.get("of") == MIME]
        wait_for(lambda: str(own.leaver.public) not in own.running.cells.researchers())
        with pytest.raises(RaphaError, match="does not know this researcher"):
            site.jobs()
        assert hospital.spent(own.folder)["train"] > 0
        assert hospital.connected(own.url, own.key).run("print(1)", "ward").wait().state == "done"


@pytest.mark.parametrize(
    "wrong", [{"measurements": ["sha384:" + "0" * 96]}, {"version": "9"}, {"signature": ""}], ids=str
)
def test_a_release_file_of_another_enclave_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    """Or one that was edited: the site does not start under a false name."""
    from rapha_lab.enclave.site import _build

    build = Build.sign("0.1.0", [measure()], PrivateKey.create())
    (tmp_path / "release.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(build, **wrong)))
    with pytest.raises(RequestError, match="does not describe this enclave"):
        _build(str(tmp_path / "release.json"), measure())


def test_a_rolled_back_ledger_shows_at_the_next_connection(tmp_path: Path) -> None:
    """The operator restores yesterday's disk; the same keys, an older log."""
    config, key = hospital.prepare(tmp_path, ward.SCHEMA, ward.frame(), "ward")
    with hospital.running(config) as (_, url):
        with (
            contextlib.closing(sqlite3.connect(tmp_path / "state" / "ledger.sqlite")) as today,
            contextlib.closing(sqlite3.connect(tmp_path / "yesterday.sqlite")) as yesterday,
        ):
            today.backup(yesterday)
        site = hospital.connected(url, key)
        for n in range(4):
            site.run(f"print({n})", "ward").wait()
        witness(site._channel)
    for path in (tmp_path / "state").glob("ledger.sqlite*"):
        path.unlink()
    shutil.copy(tmp_path / "yesterday.sqlite", tmp_path / "state" / "ledger.sqlite")
    with hospital.running(config) as (_, url), pytest.raises(LogError, match="does not extend"):
        witness(Channel(url, key, SIMULATED))


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until it comes true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def revoke(folder: Path, key: PrivateKey) -> None:
    """A custodian takes the researcher out of the policy."""
    page = Policy.parse((folder / "policy.toml").read_text())
    said = state("revoke", page, CUSTODIANS[0], str(key.public), "left the hospital")
    with (folder / "policy.toml.signatures").open("ab") as file:
        file.write(msgspec.json.encode(said) + b"\n")
