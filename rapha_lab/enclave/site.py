"""Starts a site from its configuration: keys, policy, curator, sandbox, evidence, gateway."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import socket
import ssl
import tomllib
from collections.abc import Callable
from importlib import metadata
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

import msgspec
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.enclave import cores
from rapha_lab.enclave.attester import SimulatedAttester, attester
from rapha_lab.enclave.blocks import Blocks, affordable
from rapha_lab.enclave.cell import kept
from rapha_lab.enclave.cells import Cells
from rapha_lab.enclave.console import Console
from rapha_lab.enclave.curator import Curator
from rapha_lab.enclave.gateway import Gateway
from rapha_lab.enclave.identity import Login, Provider
from rapha_lab.enclave.sandbox import Zygote
from rapha_lab.enclave.shards import ShardWorkers
from rapha_lab.enclave.wire import connections
from rapha_lab.protocol.builds import Build
from rapha_lab.protocol.checkpoint import Inclusion
from rapha_lab.protocol.errors import PolicyError, RaphaError, RequestError, SiteError
from rapha_lab.protocol.evidence import Binding, Endorsements, Evidence, key_hash
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import Policy, Signed
from rapha_lab.protocol.quote import Inquiries
from rapha_lab.protocol.release import canonical, output_statement

__all__ = ["Config", "Site", "http", "serve"]


class Dataset(msgspec.Struct, forbid_unknown_fields=True):
    """A dataset of the site: its schema file, and the folder its records are in, the schema's own if not given."""

    schema: str
    folder: str = ""


class Config(msgspec.Struct, forbid_unknown_fields=True):
    """A site's configuration, TOML; paths are relative to its file.

    Attributes:
        name: of the site.
        state: folder for the site's keys, ledger and log.
        policy: the custodians' policy; its signatures are beside it, `policy` + ".signatures".
        datasets: what it serves.
        listen: address and port; port 0 takes a free one.
        tier: at most this sandbox tier, for tests.
        idle: seconds after which a session that was given nothing ends.
        log: the log's name, the same for its whole life; the site's name if not given.
        release: the signed description of this build of the enclave, from "rapha-lab measure --sign".
        endorsements: folder with the hardware vendor's leaf.der, chain.pem, *.crl or collateral.json.
        suite: what requests are sealed with.
        tls_certificate: PEM certificate that researchers' TLS connections end at, here or at a proxy; its key
            goes into the evidence.
        tls_key: its private key, to end TLS here.
        trusted_proxies: addresses or networks of proxies whose `X-Forwarded-For` says who sends; nobody's is believed else.
        oidc: the hospital's identity provider, whose login is then asked for on top of the key.
    """

    name: str
    state: str
    policy: str
    datasets: list[Dataset]
    listen: str = "127.0.0.1:8470"
    tier: str | None = None
    idle: float = 3600.0
    log: str = ""
    release: str = ""
    endorsements: str = ""
    suite: Literal["x-wing", "x25519"] = "x-wing"
    tls_certificate: str = ""
    tls_key: str = ""
    trusted_proxies: list[str] = []
    oidc: Provider | None = None

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read it and make its paths absolute.

        Raises:
            RequestError: naming the field that is wrong.
        """
        try:
            config = msgspec.convert(tomllib.loads(path.read_text()), cls)
        except OSError as error:
            what = f"The site's configuration {path} cannot be read: {error.strerror}."
            raise RequestError(what, "", "Write it as docs/hospital.md says.") from None
        except (ValueError, msgspec.ValidationError) as error:
            what = f"The site's configuration is malformed: {error}."
            raise RequestError(what, f"It is {path}.", "Write it as docs/hospital.md says.") from None
        host, _, port = config.listen.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            what = f"listen = {config.listen!r} is no address and port."
            instead = 'Write listen = "127.0.0.1:8470"; "0.0.0.0:8470" answers everybody.'
            raise RequestError(what, f"It is in {path}.", instead, field="listen")
        for each in config.trusted_proxies:
            _network(each, path)
        base = path.parent.resolve()
        config.state, config.policy = str(base / config.state), str(base / config.policy)
        for name in ("release", "endorsements", "tls_certificate", "tls_key"):
            if getattr(config, name):
                setattr(config, name, str(base / getattr(config, name)))
        if config.oidc is not None:
            config.oidc.jwks = str(base / config.oidc.jwks)
        for dataset in config.datasets:
            dataset.schema = str(base / dataset.schema)
            dataset.folder = (
                str(base / dataset.folder) if dataset.folder else str(Path(dataset.schema).parent)
            )
        return config


class Site:
    """A running site; `close` ends its processes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._in_force: Policy | None = None
        self._state = Path(config.state)
        self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
        seed = _secret(self._state / "site.key")
        self.signing_key = PrivateKey("ed25519", (Ed25519PrivateKey.from_private_bytes(seed),))
        self.sealing_key = PrivateKey.create(config.suite)
        self._unnamed = set[str]()
        self._tls_key_hash = _tls_key_hash(config.tls_certificate)
        self._policy()
        self._attester = attester()
        self._build = _build(config.release, self._attester.measurement)
        self.simulated = isinstance(self._attester, SimulatedAttester)
        self._shards = ShardWorkers(lambda: self._zygote, config.tier)
        self._blocks = Blocks(affordable(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
        self._curator = Curator(self._shards.connect, self._blocks.fds)
        try:
            self._zygote = Zygote("rapha_lab.session.worker:main", tier=config.tier)
            self._curator.open(self._curator_config(seed))
        except BaseException:
            self._curator.close()
            self._blocks.close()
            raise
        schemas = {told["name"]: told["schema"] for told in self._curator.look_up("catalog")}
        self.cells = Cells(
            self._zygote, self._curator, self._sign, schemas, self._project_of, config.idle, self._blocks
        )
        self.gateway = Gateway(
            self.cells,
            card=self.card,
            log=lambda start: self._curator.look_up("log", start=start),
            extends=lambda start, end: self._curator.look_up("extends", start=start, end=end),
            quote=self._quote,
            evidence=self.evidence,
            sealing_key=self.sealing_key,
            signing_key=self.signing_key,
            identity=self._identity,
            known=self._known,
            in_force=self._policy,
            custody=(custody := self._custody()),
            pages=lambda admit, body: Console(
                config.name,
                lambda what, who, text: custody[what](who, text),
                lambda: self._policy().hash.hex(),
                self._is_custodian,
                admit,
                body,
            ).routes(),
            login=Login(config.oidc) if config.oidc is not None else None,
        )

    def _policy(self) -> Policy:
        """The policy in force, read anew: a veto or a revocation holds from the next request on."""
        self._in_force = Signed.load(self.config.policy).check(after=self._in_force)
        return self._in_force

    def _curator_config(self, seed: bytes) -> dict[str, Any]:
        return {
            "site": self.config.name,
            "log": self.config.log or self.config.name,
            "simulated": self.simulated,
            "policy": self.config.policy,
            "ledger": str(self._state / "ledger.sqlite"),
            "key": seed.hex(),
            "salt": _secret(self._state / "split.salt").hex(),
            "opt_outs": str(self._state / "opt-outs"),
            "measurement": self._attester.measurement,
            "build": self._build,
            "tier": self._zygote.tier,
            "cores": len(cores.ALL),
            "datasets": [msgspec.to_builtins(dataset) for dataset in self.config.datasets],
        }

    def _sign(self, job: str, cell: str, index: int, data: dict[str, Any]) -> dict[str, Any]:
        """Signs one output, so that a notebook can tell it from a forged, edited or moved one."""
        told = {"site": self.config.name, "job": job, "cell": cell, "index": index}
        signature = base64.b64encode(self.signing_key.sign(output_statement(data, told))).decode()
        digest = hashlib.sha256(canonical(data)).hexdigest()
        return told | {"key": str(self.signing_key.public), "digest": digest, "signature": signature}

    def _custody(self) -> dict[str, Callable[[str, str], tuple[Any, bytes]]]:
        """What custodians and researchers ask of the airlock; the curator judges who may."""

        def asks(what: str) -> Callable[[str, str], tuple[Any, bytes]]:
            return lambda who, text: self._curator.fetch(what, researcher=who, text=text)

        def says(what: str) -> Callable[[str, str], tuple[Any, bytes]]:
            def say(who: str, text: str) -> tuple[Any, bytes]:
                said = asks(what)(who, text)
                self.cells.decided()
                return said

            return say

        return {
            "airlock": asks("airlock"),
            "item": asks("item"),
            "inputs": asks("inputs"),
            "decide": says("decide"),
            "state": says("state"),
            "collect": self._curator.collect,
            "jobs": lambda who, text: (self._jobs(who), b""),
            "policy": lambda who, text: (self._page(), b""),
        }

    def _page(self) -> dict[str, Any]:
        """The policy's page with the statements on it, for whoever it names."""
        signed = Signed.load(self.config.policy)
        return {
            "text": signed.text,
            "statements": [msgspec.json.encode(s).decode() for s in signed.statements],
        }

    def _jobs(self, researcher: str) -> list[dict[str, Any]]:
        """The researcher's cells, oldest first; before them answers that wait although their cell is gone."""
        mine = [cell.summary() for cell in self.cells.of(researcher)]
        here = {told["id"] for told in mine}
        held = self._curator.look_up("airlock", researcher=researcher)
        gone = {told["job"].partition("-")[0]: told for told in held if told["state"] == "waiting"}
        return [kept(cell, told) for cell, told in gone.items() if cell not in here] + mine

    def _is_custodian(self, key: str) -> bool:
        """Whether a policy in force names this custodian; without one nobody is told what is wrong with it."""
        try:
            return key in {c.key for c in self._policy().custodians}
        except RaphaError:
            return False

    def _latest(self) -> Policy:
        """The policy in force, or the last one that was: whom it named is told, sealed, why it is not."""
        with contextlib.suppress(RaphaError):
            self._policy()
        assert self._in_force is not None  # none opens without one
        return self._in_force

    def _known(self, researcher: str) -> None:
        policy = self._latest()
        if not policy.projects_of(researcher) and researcher not in {c.key for c in policy.custodians}:
            raise PolicyError(
                "No project of this site names your key.",
                researcher,
                "Ask the custodians to add it to the policy.",
            )

    def _project_of(self, researcher: str, project: str, dataset: str) -> str:
        """The researcher's project that may use the dataset: the one they named, or their only one."""
        mine = [p.name for p in self._policy().projects_of(researcher) if dataset in p.datasets]
        if project in mine or (not project and len(mine) == 1):
            return project or mine[0]
        names = ", ".join(mine) or "none"
        raise PolicyError(
            f"You act for no one project that may use {dataset}.",
            f"Yours are: {names}.",
            "Say which: connect(..., project=...)." if mine else "Ask the custodians to add you.",
            field="project",
        )

    def _quote(self, researcher: str, asked: Inquiries) -> Any:
        project = self._project_of(researcher, asked.project, asked.dataset)
        return self._curator.look_up("quote", researcher=researcher, project=project, quote=asked)

    def _identity(self) -> bytes:
        return self._binding(bytes(32), bytes(32), self._latest()).identity()

    def _binding(self, nonce: bytes, checkpoint: bytes, policy: Policy) -> Binding:
        return Binding(
            nonce=nonce,
            sealing_key=str(self.sealing_key.public),
            signing_key=str(self.signing_key.public),
            policy_hash=policy.hash,
            checkpoint_hash=checkpoint,
            tls_key_hash=self._tls_key_hash,
        )

    def evidence(self, nonce: bytes) -> Evidence:
        """Fresh evidence bound to the nonce, this site's keys, its policy and the head of its log.

        With it go what a client needs beside: the proof that this build is in the log, and the vendor's endorsements.
        """
        build = msgspec.convert(self._curator.look_up("build"), Inclusion)
        binding = self._binding(nonce, hashlib.sha256(build.checkpoint.encode()).digest(), self._policy())
        evidence = self._attester.evidence(binding, {"tier": self._zygote.tier})
        folder = self.config.endorsements
        mirrored = Endorsements.load(folder) if folder else Endorsements()  # renewed while the site runs
        return msgspec.structs.replace(evidence, build=build, endorsements=mirrored)

    def card(self, researcher: str) -> dict[str, Any]:
        """What the site tells a researcher of itself."""
        policy = self._policy()
        return {
            "name": self.config.name,
            "tier": self._zygote.tier,
            "layers": self._zygote.report.layers,
            "reasons": self._zygote.report.reasons,
            "policy": {
                "name": policy.head.name,
                "hash": policy.hash.hex(),
                "signers": self._signers(policy),
                "expires": str(policy.head.expires),
            },
            "projects": [p.name for p in policy.projects_of(researcher)],
            "datasets": self._curator.look_up("catalog", researcher=researcher),
        }

    def _signers(self, policy: Policy) -> list[str]:
        said = [s for s in Signed.load(self.config.policy).statements if s.act == "sign" and s.holds()]
        keys = {s.key for s in said if s.policy == policy.hash.hex()}
        return [f"{c.name} ({c.role})" for c in policy.custodians if c.key in keys]

    def end_revoked(self) -> None:
        """End the sessions of researchers whom the policy in force no longer names; of all, if none is.

        They end at the second look, so that a page in the middle of being written closes nobody's session.
        """
        working = self.cells.researchers()
        try:
            named = {who for who in working if self._policy().projects_of(who)} if working else set()
        except RaphaError:
            named = set()
        for researcher in (working - named) & self._unnamed:
            self.cells.end(researcher)
        self._unnamed = working - named

    @property
    def tier(self) -> str:
        """The sandbox tier that was proved at start."""
        return self._zygote.tier

    def close(self) -> None:
        """End sessions, sandbox and curator."""
        self.cells.close()
        self._zygote.close()
        self._curator.close()
        self._shards.close()
        self._blocks.close()


def serve(
    site: Site, ready: Callable[[str], None] = lambda url: None, stop: Callable[[], bool] | None = None
) -> None:
    """Answer over HTTP until interrupted, or until `stop` says so.

    Args:
        site: what to serve.
        ready: called with the URL once it answers.
        stop: asked every second.
    """
    host, _, port = site.config.listen.rpartition(":")
    config = http(site.config, site.gateway.app())
    try:
        _Server(config, ready, stop, site.end_revoked).run(sockets=[_bound(host, int(port))])
    finally:
        site.close()


def http(told: Config, app: Any) -> uvicorn.Config:
    """How `app` is served: strangers get so much time and room, and no header is believed but a named proxy's."""
    return uvicorn.Config(
        app, log_level="warning", server_header=False, ws="none", http=connections(told.trusted_proxies),
        proxy_headers=bool(told.trusted_proxies), forwarded_allow_ips=told.trusted_proxies,
        ssl_certfile=told.tls_certificate if told.tls_key else None, ssl_keyfile=told.tls_key or None,
    )  # fmt: skip


def _network(text: str, path: Path) -> None:
    """A network of everybody would let each sender choose the address by which they are counted."""
    try:
        wide = ip_network(text).prefixlen == 0
    except ValueError as error:
        what = f"trusted_proxies names {text!r}, which is no address and no network."
        raise RequestError(
            what, f"{error}.", 'Write "10.1.2.3" or "10.1.2.0/24".', field="trusted_proxies"
        ) from None
    if wide:
        what = f"trusted_proxies = {text!r} trusts everybody."
        raise RequestError(what, f"It is in {path}.", "Name your proxy's address.", field="trusted_proxies")


def _bound(host: str, port: int) -> socket.socket:
    host = host.strip("[]")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[
            0
        ]  # create_server says the address once more
        raise SiteError(
            f"The site cannot listen on {host}:{port}.",
            f"{why}.",
            "Stop what answers there, or set another `listen` in its configuration.",
        ) from None


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        ready: Callable[[str], None],
        stop: Callable[[], bool] | None,
        sweep: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._ready, self._stop, self._sweep = ready, stop, sweep

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._ready(f"{'https' if self.config.is_ssl else 'http'}://{host}:{port}")

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._sweep()
            self.should_exit |= self._stop is not None and self._stop()
        return await super().on_tick(counter)


def _build(path: str, measurement: str) -> Build:
    """This build as its maker describes it, or unsigned where nobody does."""
    if not path:
        return Build(version=metadata.version("rapha-lab"), measurements=[measurement])
    build = Build.load(path)
    if measurement not in build.measurements or not build.signed_by(frozenset({build.signer})):
        raise RequestError(
            "The release file does not describe this enclave.",
            f"It does not hold {measurement}, or its signature does not hold.",
            "Sign this one with: rapha-lab measure --sign",
            field="release",
        )
    return build


def _tls_key_hash(path: str) -> bytes:
    """The hash of the key in a PEM certificate, or zeros where a proxy that nobody named ends TLS."""
    if not path:
        return bytes(32)
    try:
        return key_hash(ssl.PEM_cert_to_DER_cert(Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path} holds no certificate.", str(error), "Give one in PEM.", field="tls_certificate"
        ) from None


def _secret(path: Path) -> bytes:
    """32 random bytes kept in a file for the site alone, made at first use."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(os.urandom(32))
    except FileExistsError:
        pass
    return path.read_bytes()
