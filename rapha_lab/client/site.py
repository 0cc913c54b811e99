"""`connect` to a site, and what one holds then: the site, its datasets, and jobs that live there."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from rapha_lab.client import cards, demo
from rapha_lab.client.appraisal import AppraisalPolicy, Endorsements
from rapha_lab.client.calls import called, kind
from rapha_lab.client.channel import Channel
from rapha_lab.client.home import home, read, write
from rapha_lab.client.mock import mock, mock_tables
from rapha_lab.client.progress import Progress
from rapha_lab.client.quotes import Budget, Quote, inquiry
from rapha_lab.client.witness import witness
from rapha_lab.protocol.errors import CellError, RaphaError, RequestError, SiteError, from_wire
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.quote import Inquiries, Inquiry
from rapha_lab.protocol.release import Release
from rapha_lab.protocol.schema import Schema

if TYPE_CHECKING:
    import polars
    import torch

__all__ = ["ENDED", "Dataset", "Job", "Site", "connect", "known", "latest"]

ENDED = ("done", "failed", "cancelled", "lost")
_open: dict[tuple[str, str], Site] = {}
_lock = threading.Lock()
_latest: list[Site] = []


@called('rapha.connect("demo")')
def connect(
    where: str = "demo",
    *,
    key: PrivateKey | str | Path | None = None,
    passphrase: str | None = None,
    project: str = "",
    allow_simulated: bool = False,
    measurements: Collection[str] = (),
    release_keys: Collection[str] = (),
    minimum_tcb: Mapping[str, int] | None = None,
    endorsements: Endorsements | None = None,
    policy: str | Path | None = None,
    token: str | None = None,
) -> Site:
    """Connect to a hospital's site, or to the demo on this machine, which is started if need be.

    Its attestation evidence is verified before anything is sealed to it.

    Args:
        where: "demo", or the site's address ("https://...").
        key: the researcher's key, or the file that holds it.
        passphrase: of that file; $RAPHA_LAB_PASSPHRASE if not given.
        project: the project to act for, if the researcher is in several.
        allow_simulated: accept an enclave without hardware, which protects from nobody.
        measurements: of releases of the enclave to trust, as the custodians published them.
        release_keys: keys whose signed releases to trust, as the custodians published them.
        minimum_tcb: lowest firmware versions to accept of an AMD platform, such as {"snp": 23}.
        endorsements: the vendor's collateral for the hardware's evidence, if not the site's own mirror.
        policy: the page that the custodians signed, as you read it: a site under another one is refused.
        token: of the hospital's identity provider, where the site asks for one; see `Site.login`.

    Raises:
        EvidenceError: the enclave is not to be trusted; nothing was sent.
        SiteError: it cannot be reached or did not start.
        LogError: its log does not extend what was seen of it before.
    """
    kind(where, str, "where", "an address", 'rapha.connect("demo"), or "https://..."')
    progress = Progress()
    if where == "demo":
        url, secret, simulated = demo.start(progress), demo.researcher(), True
    elif re.match(r"https?://", where):
        url, secret, simulated = where, _key(key, passphrase), allow_simulated
    else:
        raise RequestError(
            f"{where!r} is no site.", "A site is an address.", 'Say "demo" or "https://...".', field="where"
        )
    pinned = AppraisalPolicy(
        frozenset(measurements),
        frozenset(release_keys),
        allow_simulated=simulated,
        minimum_tcb=minimum_tcb or {},
    )
    page = None if policy is None else hashlib.sha256(Path(policy).read_bytes()).digest()
    progress.say(f"Verifying the attestation of {where}")
    with _lock:
        found = _open.get((url, str(secret.public)))
        # what was accepted under other terms is appraised anew
        if found is None or (found._channel.policy, found._channel.policy_hash) != (pinned, page):
            channel = Channel(url, secret, pinned, endorsements, page)
            found = _open[url, str(secret.public)] = Site(channel, project)
    if token is not None:
        found.login(token)
    found.refresh()
    witness(found._channel)
    _remember(found, where, key if isinstance(key, (str, Path)) else None)
    _latest[:] = [found]
    progress.end(f"Connected to {found.name}")
    return found


def latest() -> Site:
    """The site last connected to, which is the one that enclave cells run at.

    Raises:
        SiteError: none yet.
    """
    if not _latest:
        raise SiteError("No site is connected.", "", 'Say site = rapha.connect("demo") first.')
    return _latest[0]


def _key(key: PrivateKey | str | Path | None, passphrase: str | None) -> PrivateKey:
    if isinstance(key, PrivateKey):
        return key
    if key is None:
        raise RequestError(
            "No key was given.",
            "A hospital's site answers only researchers whose key its policy names.",
            'Make one with "rapha-lab keys new" and say connect(url, key="me.key").',
            field="key",
        )
    kind(key, (str, Path), "key", "a key or the file that holds it", 'connect(url, key="me.key")')
    return PrivateKey.load(
        key, passphrase if passphrase is not None else os.environ.get("RAPHA_LAB_PASSPHRASE", "")
    )


def _remember(site: Site, where: str, key: str | Path | None) -> None:
    told: dict[str, Any] = {
        "where": where,
        "url": site.url,
        "key": str(key) if key else "",
        "site_key": str(site.key),
    }
    told |= {"project": site.project, "simulated": site.simulated, "name": site.name}
    pinned = site._channel.policy
    told |= {"measurements": sorted(pinned.measurements), "release_keys": sorted(pinned.signers)}
    told |= {"minimum_tcb": dict(pinned.minimum_tcb)}
    write(home() / "sites" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', site.name)}.json", told)


def known() -> list[Site]:
    """The sites this user has connected to and that can be reached now without asking for anything."""
    found = []
    for path in sorted((home() / "sites").glob("*.json")):
        told = read(path)
        try:
            if told.get("where") != "demo":
                found.append(
                    connect(
                        told["url"],
                        key=told["key"],
                        project=told["project"],
                        allow_simulated=told["simulated"],
                        measurements=told.get("measurements", ()),
                        release_keys=told.get("release_keys", ()),
                        minimum_tcb=told.get("minimum_tcb"),
                    )
                )
            elif demo.running() is not None:
                found.append(connect("demo"))
        except (RaphaError, KeyError, OSError):
            continue  # gone, or its key needs a passphrase
    return found


class Site:
    """A connected site. Its repr is a card: attestation, measurement, policy, who signed it, datasets."""

    def __init__(self, channel: Channel, project: str = "") -> None:
        self._channel, self.project = channel, project
        self._card: dict[str, Any] = {}

    @called("site.login(token)")
    def login(self, token: str) -> None:
        """Log in with an ID token that was asked for with the nonce that `rapha-lab keys nonce` prints.

        Raises:
            PolicyError: the token does not hold, or is not for your key.
        """
        self._channel.call("login", {"token": token})

    def refresh(self) -> None:
        """Ask the site again for what it says of itself."""
        self._card = self._channel.call("card", {})[0]

    @property
    def name(self) -> str:
        """The site's name."""
        return str(self._card["name"])

    @property
    def url(self) -> str:
        """The address of its gateway."""
        return self._channel.url

    @property
    def simulated(self) -> bool:
        """Whether no hardware protects it."""
        return self._channel.verdict.claims.simulated

    @property
    def key(self) -> Any:
        """The attested public key with which it signs."""
        return self._channel.site_key

    def card(self) -> dict[str, Any]:
        """What the site shows of itself, with this client's verdict on its evidence."""
        verdict = self._channel.verdict
        told = {"url": self.url, "simulated": self.simulated, "alive": True, "key": str(self.key)}
        told |= {"measurement": verdict.claims.measurement, "build": self._channel.attested.build.version}
        return self._card | told | {"verdict": {"status": verdict.status, "reasons": list(verdict.reasons)}}

    @called('site.dataset("flchain")')
    def dataset(self, name: str) -> Dataset:
        """One of the site's datasets.

        Raises:
            RequestError: there is none of that name.
        """
        self.refresh()
        for told in self._card["datasets"]:
            if told["name"] == name:
                return Dataset(self, told)
        names = ", ".join(told["name"] for told in self._card["datasets"])
        instead = "Name one."
        if self.name == "demo":
            instead += (
                " rapha-lab demo build NAME makes another, served once every kernel on the demo was closed."
            )
        raise RequestError(
            f"{self.name} has no dataset {name!r}.", f"It has: {names}.", instead, field="dataset"
        )

    @property
    def datasets(self) -> Names:
        """The names of its datasets."""
        return Names(told["name"] for told in self._card["datasets"])

    @called('site.run("patients.count(epsilon=0.1)", "flchain")')
    def run(
        self,
        source: str,
        dataset: str,
        *,
        session: str = "default",
        epsilon: float | None = None,
        outputs: Collection[str] = (),
        inputs: tuple[dict[str, Any], bytes] | None = None,
        origin: dict[str, str] | None = None,
    ) -> Job:
        """Send a cell to run in one of your sessions there; returns at once."""
        parcel, blob = inputs or ({}, b"")
        order: dict[str, Any] = {
            "session": session,
            "dataset": dataset,
            "source": source,
            "project": self.project,
        }
        order |= {"epsilon": epsilon, "outputs": list(outputs), "inputs": parcel, "origin": origin or {}}
        return Job(self, self._channel.call("run", order, blob)[0]["cell"])

    def jobs(self) -> Jobs:
        """Your cells at the site, oldest first: a list of what the job card shows of each, which shows as a table."""
        return Jobs(told | self._tag() for told in self._channel.call("jobs", {})[0])

    @called('site.attach(site.jobs()[-1]["id"])')
    def attach(self, job: str) -> Job:
        """A cell of yours at the site, whether or not the kernel lives that started it; `jobs` has their numbers.

        Raises:
            RequestError: you have no such job.
        """
        kind(job, str, "job", "a job's id", 'site.attach(site.jobs()[-1]["id"])')
        found = Job(self, job)
        found.poll()
        return found

    @called('site.cancel(site.jobs()[-1]["id"])')
    def cancel(self, job: str) -> Job:
        """Stop a cell of yours, and give it as `attach` does; what has run stays charged.

        Raises:
            RequestError: you have no such job.
        """
        kind(job, str, "job", "a job's id", 'site.cancel(site.jobs()[-1]["id"])')
        found = Job(self, job)
        found.cancel()
        return found

    @called("site.end_sessions()")
    def end_sessions(self, session: str = "") -> None:
        """End your sessions there, or one of them; what they hold is lost, what was released is not."""
        kind(session, str, "session", "a session's name", "site.end_sessions(), for all of them")
        self._channel.call("end", {"id": session})

    def leave(self, session: str, seconds: float = 2.0) -> None:
        """End a session once it has no job, when the kernel that it belongs to ends; its site may be gone as well."""
        self._channel.hurry(seconds)
        with contextlib.suppress(Exception):
            self._channel.call("end", {"id": session, "idle": True})

    def airlock(self) -> list[dict[str, Any]]:
        """What waits for the site's custodians, or was decided by them: yours, or all if you are one of them."""
        return list(self._channel.call("airlock", {})[0])

    @called('site.collect(site.airlock()[-1]["subject"])')
    def collect(self, subject: str) -> tuple[Release, bytes]:
        """An answer of yours that waited in the airlock, with its tensors (safetensors), once it was approved.

        Raises:
            WaitingError: no custodian has decided yet. RefusedError: one refused it; says why.
        """
        wire, blob = self._channel.call("collect", {"text": subject})
        return msgspec.convert(wire, Release), blob

    def _tag(self) -> dict[str, Any]:
        return {"site": self.name, "simulated": self.simulated}

    def _watch(
        self, job: str, after: int, wait: float, state: str, step: int
    ) -> tuple[dict[str, Any], bytes]:
        asked = {"cell": job, "after": after, "wait": wait, "state": state, "step": step}
        told, blob = self._channel.call("watch", asked)
        return told | self._tag(), blob

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return cards.site(self.card())

    def __repr__(self) -> str:
        return f"<site {self.name} at {self.url}{', SIMULATED' if self.simulated else ''}>"


class Names(list[str]):
    """A list of names, given by `site.datasets` and by `site.datasets()` as well."""

    def __call__(self) -> Names:
        return self


class Dataset:
    """A dataset one can't see: its public schema, its privacy unit, and what budget is left."""

    def __init__(self, site: Site, told: dict[str, Any]) -> None:
        self.site, self._told = site, told
        self.schema = Schema.from_dict(told["schema"])

    def __getattr__(self, name: str) -> NoReturn:
        instead = "cohort.mock() makes patients up; an enclave cell asks about the real ones."
        if name == "plan":
            instead = "It comes with the notebook's extension: %load_ext rapha_lab."
        raise AttributeError(
            f"A dataset has no {name!r}, for its records stay at the site. {instead}", name=name, obj=self
        )

    @property
    def largest_model(self) -> int | None:
        """How many numbers a model may have that is trained on it, by the policy; None if the site does not say."""
        return self._told.get("largest_model")

    @property
    def name(self) -> str:
        """What cells call it."""
        return self.schema.name

    @property
    def budget(self) -> Budget:
        """By project and split: epsilon, delta, spent, left, and room for one more answer; shown as gauges."""
        self.site.refresh()
        told = next(d for d in self.site._card["datasets"] if d["name"] == self.name)
        return Budget(told["budget"])

    @called('cohort.quote("mean:age", epsilon=0.1)')
    def quote(
        self,
        what: str | torch.nn.Module,
        *,
        epsilon: float | None = None,
        error: float | None = None,
        split: str | None = None,
        epochs: float | None = None,
        batch: int | None = None,
        clip: float | None = None,
        patients: int | None = None,
        **settings: Any,
    ) -> Quote:
        """What a question would cost and how exact its answer would be: free, and no record is looked at.

        Args:
            what: "count", "mean:COLUMN", "histogram:COLUMN", "evaluate:METRIC,METRIC",
                "shards:NUMBERS", "fit", or a model to fit.
            epsilon: its price; or
            error: the standard error wished, of which the quote says the ε.
            split: train for a fit, test for an evaluation, else all patients, if not given.
            epochs, batch, clip: of a fit or of a training loop, chosen as `fit` does if not given.
            patients: another number of patients than the declared one; such a quote is hypothetical.
            settings: `runs` of a fit with candidates; `bins` of a histogram; `prevalence` and `auroc` to assume of an evaluation.

        Raises:
            RequestError: naming what is missing or out of range.
            PolicyError: the policy does not let it be asked.
        """
        fit = {"epochs": epochs, "batch": batch, "clip": clip}
        given = settings | fit | {"split": split, "patients": patients}
        return self.quotes([inquiry(self.schema, what, epsilon=epsilon, error=error, **given)])[0]

    @called("cohort.quotes(inquiries)")
    def quotes(self, asks: Collection[Inquiry]) -> list[Quote]:
        """Several quotes at once, each as if its question were the next and only one."""
        kind(
            asks,
            (list, tuple),
            "asks",
            "a list of inquiries",
            'cohort.quote("mean:age", epsilon=0.1) for one',
        )
        asked = Inquiries(dataset=self.name, project=self.site.project, asks=list(asks))
        return msgspec.convert(self.site._channel.call("quote", asked)[0], list[Quote])

    @called("cohort.mock(patients=200)")
    def mock(self, patients: int = 200, seed: int = 0, table: str | None = None) -> polars.DataFrame:
        """Made-up patients, or their rows in a table, drawn from the schema alone; no record was looked at."""
        for field, number in (("patients", patients), ("seed", seed)):
            kind(number, int, field, "a whole number", "cohort.mock(patients=200, seed=0)")
            if number < 0:
                raise RequestError(f"{field} is {number}.", "It must be 0 or more.", "", field=field)
        if table is None:
            return mock(self.schema, patients, seed)
        return mock_tables(self.schema, patients, seed)[self.schema.table(table).name]

    @called("cohort.inputs(frame, FEATURES)")
    def inputs(self, patients: polars.DataFrame, columns: str | list[str]) -> torch.Tensor:
        """Your own patients as a model's input: scaled and coded as the site does it, (n, *shape).

        Args:
            patients: one row a patient, with the schema's columns that are asked for; others may be absent. For
                columns of a table, its rows; patients come in the order in which they appear.
            columns: as given to `fit`'s `inputs`.
        """
        from rapha_lab.client.rehearsal import encoded

        return encoded(self.schema, patients, columns)

    def card(self) -> dict[str, Any]:
        """The dataset as its card shows it."""
        public = msgspec.to_builtins(self.schema)
        return public | {
            "budget": dict(self.budget),
            "site": self.site.name,
            "simulated": self.site.simulated,
        }

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return cards.dataset(self.card())

    def __repr__(self) -> str:
        return f"<dataset {self.name} at {self.site.name}: {len(self.schema.columns)} columns, no row to see>"


class Jobs(list[dict[str, Any]]):
    """Jobs at a site, oldest first, each with its id, state, steps and ε; shown as a table."""

    def __repr__(self) -> str:
        return str(cards.jobs(self)["text/plain"])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return cards.jobs(self)


class Job:
    """A cell at the site. It lives there, not in this kernel: `attach` to it from anywhere."""

    def __init__(self, site: Site, id: str) -> None:
        self.site, self.id = site, id
        self.told: dict[str, Any] = {"id": id, "state": "queued", "dataset": "", **site._tag()}
        self.outputs: list[dict[str, Any]] = []
        self.values: dict[str, Any] = {}
        self.blob = b""

    @property
    def state(self) -> str:
        """queued, running, done, failed, cancelled or lost, as last heard."""
        return str(self.told["state"])

    def poll(self, wait: float = 0.0) -> list[dict[str, Any]]:
        """The outputs that are new, waiting up to `wait` seconds for a change."""
        step = int(self.told.get("step") or 0)
        told, self.blob = self.site._watch(self.id, len(self.outputs), wait, self.state, step)
        new = told.pop("outputs")
        self.outputs += new
        self.values = {"values": told.pop("values")}
        self.told = told
        return new

    def follow(self) -> Iterator[list[dict[str, Any]]]:
        """New outputs as they come, ending when the job has; `state` and `told` are fresh at each."""
        while True:
            yield self.poll(wait=2.0)
            if self.state in ENDED:
                return

    def wait(self) -> Job:
        """Wait for the end.

        Raises:
            RaphaError: what ended it, if it did not end well.
        """
        for _ in self.follow():
            pass
        self.raise_error()
        return self

    @called("job.bring(model=model)")
    def bring(self, **into: Any) -> dict[str, Any]:
        """The values that the cell's -o named; waits for the end, and says how far the job is.

        Args:
            into: modules by those names, to load the weights into; else they come as dicts of tensors.

        Raises:
            RaphaError: what ended the job, weights that do not fit, or a name that it does not bring.
        """
        from rapha_lab.client.rehearsal import Rehearsal

        progress = Progress()
        for _ in self.follow():
            if self.state not in ENDED:
                progress.say(self._repr_mimebundle_()["text/plain"])
        progress.end(f"The job {self.id[:8]} was {self.state}")
        self.raise_error()
        for name in into.keys() - self.values.get("values", {}).keys():
            brings = ", ".join(self.values.get("values", {})) or "nothing"
            raise RequestError(
                f"The job {self.id[:8]} brings no {name!r}.", f"Its cell's -o brings {brings}.",
                "Choose the job: site.jobs() lists them all, the newest last, each with its source_line.", field=name,
            )  # fmt: skip
        return Rehearsal().take(self.values, self.blob, into)

    def raise_error(self) -> None:
        """Raise what ended the job, if it did not end well."""
        if self.state == "done":
            return
        if self.state == "cancelled":
            spent = f"What had run stays charged: ε {self.told.get('spent') or 0:.3g}."
            kept = f"Run it again; what a loop's model had learnt by then %%enclave {self.told['dataset']} -o model brings."
            raise SiteError("The job was cancelled.", spent, kept)
        error = (
            from_wire(self.told["error"])
            if self.told.get("error")
            else SiteError(f"The job is {self.state}.")
        )
        if isinstance(error, CellError):
            error.traceback = list(self.told.get("traceback") or [])
        raise error

    @property
    def releases(self) -> list[Release]:
        """The private answers it was given, in order."""
        found = [o["data"][_RELEASE] for o in self.outputs if _RELEASE in o.get("data", {})]
        fields = {f.name for f in msgspec.structs.fields(Release)}
        return [msgspec.convert({k: v for k, v in each.items() if k in fields}, Release) for each in found]

    def cancel(self) -> None:
        """Stop it; what has run stays charged."""
        self.told |= self.site._channel.call("cancel", {"id": self.id})[0]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        shown = {k: v for k, v in self.told.items() if k not in ("error", "traceback")}
        return cards.job({"step": 0, "steps": 0, "epsilon": 0.0, "spent": 0.0} | shown)


_RELEASE = "application/vnd.rapha.release+json"


@atexit.register
def _close() -> None:
    for site in _open.values():
        site._channel.close()
