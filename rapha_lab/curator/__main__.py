"""`python -m rapha_lab.curator`: the process that holds the records. Its first frame is its configuration."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.curator.airlock import Airlock
from rapha_lab.curator.blocks import Blocks
from rapha_lab.curator.cohort import Cohort, Findings
from rapha_lab.curator.desk import Caller, Desk
from rapha_lab.curator.funds import follow
from rapha_lab.curator.inforce import InForce
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.lift.compiling import flush_denormals, keep_pages
from rapha_lab.curator.noise import SystemNoise
from rapha_lab.curator.optouts import OptOuts
from rapha_lab.curator.quotes import quotes
from rapha_lab.curator.records import commit
from rapha_lab.curator.server import Call, Server
from rapha_lab.curator.workers import EnclaveWorkers
from rapha_lab.protocol import messages
from rapha_lab.protocol.builds import KIND, Build
from rapha_lab.protocol.decision import Decision
from rapha_lab.protocol.errors import RaphaError, RequestError
from rapha_lab.protocol.policy import Policy, Statement
from rapha_lab.protocol.schema import SPLITS, Schema

__all__ = ["Config", "main"]

PART = 250  # entries of the log in one answer: each is signed for, and others wait meanwhile


class Source(msgspec.Struct, forbid_unknown_fields=True):
    """One dataset: its schema file and the folder with its records."""

    schema: str
    folder: str


class Config(msgspec.Struct, forbid_unknown_fields=True):
    """What the curator is started with, over its pipe: keys are in no file or argument of it."""

    site: str
    log: str
    simulated: bool
    policy: str
    ledger: str
    key: str
    salt: str
    opt_outs: str
    measurement: str
    build: Build
    tier: str
    datasets: list[Source]
    workers: int
    cores: int
    blocks: list[int] = []


def main() -> None:
    """Serve the desk over stdin and stdout until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the site's operator ends the site, not its curator
    keep_pages()
    flush_denormals()
    reader = os.fdopen(os.dup(0), "rb", messages.BUFFER)
    writer = os.fdopen(os.dup(1), "wb", messages.BUFFER)
    os.dup2(2, 1)  # what a library prints never gets among the frames
    frame = messages.read_frame(reader)
    if frame is None:
        return
    try:
        server = _open(msgspec.json.decode(frame[0], type=Config), reader, writer)
    except (RaphaError, OSError, msgspec.DecodeError) as error:
        wrong = error if isinstance(error, RaphaError) else _unforeseen(error)
        messages.write_frame(writer, messages.encode({"error": wrong.to_wire()}))
        sys.exit(1)
    messages.write_frame(writer, messages.encode({"ready": os.getpid()}))
    server.serve()


def _open(config: Config, reader: Any, writer: Any) -> Server:
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(config.key))

    ledger = Ledger(Path(config.ledger), key, origin=config.log, about={"tier": config.tier})
    served: list[str] = []

    def admits(policy: Policy) -> None:
        for name in served:
            policy.admits(name, config.measurement, simulated=config.simulated, tier=config.tier)

    pages = InForce(config.policy, ledger, admits)
    policy = pages()
    cohorts = {}
    for source in config.datasets:
        schema = Schema.load(source.schema)
        served.append(schema.name)
        admits(policy)
        scratch = Path(config.ledger).parent
        cohorts[schema.name] = Cohort.open(schema, source.folder, bytes.fromhex(config.salt), scratch=scratch)
        _advise(policy, cohorts[schema.name])
        for column, found in cohorts[schema.name].findings.items():
            if found != Findings():
                print(f"{schema.name}.{column}: {found}", file=sys.stderr)
    in_force = follow(ledger, pages, config.policy)
    in_force()
    for name, cohort in cohorts.items():
        commit(ledger, Path(config.ledger).with_name("records.jsonl"), name, cohort.digest)
    build = ledger.record(KIND, **msgspec.to_builtins(config.build))
    workers = EnclaveWorkers(config.workers, config.cores)
    airlock, noise = Airlock(ledger), SystemNoise()
    desk = Desk(
        in_force,
        ledger,
        cohorts,
        noise,
        config.site,
        workers,
        simulated=config.simulated,
        airlock=airlock,
        opt_outs=OptOuts(config.opt_outs, ledger, in_force, bytes.fromhex(config.salt)),
        reviews=f"{config.measurement} {config.tier}" if config.tier == "S3" else None,
    )
    free = _free(ledger, in_force, cohorts, build) | _custody(airlock, pages)
    return Server(desk, free, reader, writer, Blocks(config.blocks))


def _unforeseen(error: Exception) -> RequestError:
    """Why the site cannot start, for its operator."""
    if isinstance(error, FileNotFoundError):
        what = f"The site cannot start: there is no file {error.filename}."
        instead = "A schema's source is looked for in the dataset's folder, the schema's own if site.toml names none."
        return RequestError(what, "", instead, field="source")
    return RequestError(f"The site cannot start: {error}")


def _advise(policy: Policy, cohort: Cohort) -> None:
    """Tell the operator alone if a dataset of no declared size is under a project's smallest cohort."""
    schema, size = cohort.schema, len(cohort.view("all"))
    for project in policy.projects:
        if schema.patients is None and schema.name in project.datasets and size < project.smallest_cohort:
            what = (
                f"{schema.name} holds fewer patients than the smallest cohort of the project {project.name}."
            )
            print(what, "Declare `patients` in its schema, or take it out of the project.", file=sys.stderr)


def _custody(airlock: Airlock, policy: InForce) -> dict[str, Any]:
    """What custodians ask and say, and what a researcher may see of what waits for them."""

    def item(call: Call) -> Any:
        told = airlock.show(call.researcher, call.text, policy())
        before = airlock.approved_before(call.text)
        return told | {"before": before.decode() if before else None}

    def state(call: Call) -> Any:
        policy.state(Statement.decode(call.text.encode()))
        return {}

    return {
        "airlock": lambda call: airlock.listed(call.researcher, policy()),
        "item": item,
        "inputs": lambda call: ({}, airlock.inputs(call.researcher, call.text, policy())),
        "decide": lambda call: airlock.decide(Decision.decode(call.text), policy()),
        "state": state,
    }


def _free(
    ledger: Ledger, policy: Callable[[], Policy], cohorts: dict[str, Cohort], build: int
) -> dict[str, Any]:
    """What holds nothing of a patient: the catalog with its budgets, the log, a cell's hash for the log."""

    def catalog(call: Call) -> Any:
        mine = policy().projects_of(call.researcher)
        return [_card(name, cohort.schema, mine) for name, cohort in cohorts.items()]

    def _card(name: str, schema: Schema, projects: Any) -> Any:
        mine = [project for project in projects if name in project.datasets]
        budget = {
            project.name: {
                split: msgspec.to_builtins(ledger.statement(project.name, name, split)) for split in SPLITS
            }
            for project in mine
        }
        told = {"name": name, "title": schema.title, "schema": msgspec.to_builtins(schema), "budget": budget}
        return told | {"largest_model": max((project.largest_model for project in mine), default=None)}

    def cell(call: Call) -> Any:
        return ledger.record("cell", source=call.text, project=call.project, researcher=call.researcher)

    def log(call: Call) -> Any:
        part = ledger.log.signed(call.start, PART)
        told = {"entries": [body.decode() for body, _ in part], "signatures": [said for _, said in part]}
        return told | {"checkpoint": ledger.log.checkpoint()}

    def proved_build(call: Call) -> Any:
        return ledger.log.proved(build)

    schemas = {name: cohort.schema for name, cohort in cohorts.items()}

    def quote(call: Call) -> Any:
        if call.quote is None:
            raise RequestError("The frame asks for no quote.", field="quote")
        return quotes(call.quote, policy(), Caller(call.researcher, call.project, call.id), schemas, ledger)

    def extends(call: Call) -> Any:
        size = ledger.log.size()
        end = size if call.end is None else min(call.end, size)
        proof = [part.hex() for part in ledger.log.consistency(min(call.start, end), end)]
        return {"checkpoint": ledger.log.checkpoint(), "proof": proof}

    return {
        "build": proved_build,
        "catalog": catalog,
        "cell": cell,
        "log": log,
        "extends": extends,
        "quote": quote,
        "checkpoint": lambda call: ledger.log.checkpoint(),
    }


if __name__ == "__main__":
    main()
