"""`python mortal.py FOLDER`: a curator that dies where it is told to, again and again, and is held to its books.

One warm, single-threaded process forks a child for each line it reads: {"world", "mistake", "point"} lives
through the story below and kills itself at its n-th point; {"world", "mistake"} with "check" opens what is
left and says what of the promise does not hold. A point is a call of the ledger's and its end, a statement of
SQL, a step of training, a frame or a part of one written to the pipe.

What happened is written down where it happens: a record was looked at in `Witness.ran`, called by the very
functions that look; what was let out is what is in the file that stands for the pipe.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import ward
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from mistakes import MISTAKES, ChargesAfterTheRelease

from rapha_lab.curator import clock
from rapha_lab.curator import ledger as ledger_module
from rapha_lab.curator.accounting import Loss, units
from rapha_lab.curator.blocks import Blocks
from rapha_lab.curator.cohort import Cohort, View
from rapha_lab.curator.desk import Caller, Desk
from rapha_lab.curator.ledger import Ledger
from rapha_lab.curator.mechanisms import train
from rapha_lab.curator.noise import SystemNoise
from rapha_lab.curator.plans import plan_of
from rapha_lab.curator.server import Server
from rapha_lab.protocol import messages
from rapha_lab.protocol.checkpoint import open_checkpoint, root_of, verify_receipt
from rapha_lab.protocol.errors import RaphaError
from rapha_lab.protocol.policy import Policy
from rapha_lab.protocol.program import digest
from rapha_lab.protocol.release import Release, statement
from rapha_lab.protocol.schema import Schema
from rapha_lab.session import tracing

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STEPS = 4


def story(schema: Schema) -> dict[str, tuple[messages.ASKS, bytes]]:
    """The requests in order, by the numbers of their jobs."""
    torch.manual_seed(0)
    model = torch.nn.Linear(len(ward.FEATURES), 1)
    example = {"x": torch.zeros(len(ward.FEATURES))}
    traced = tracing.loss_program(model, torch.nn.BCEWithLogitsLoss(), example, torch.zeros(()))
    inputs: dict[str, messages.Columns] = {"x": ward.FEATURES, "target": "died"}
    common: dict[str, Any] = {"dataset": schema.name, "split": "train", "epsilon": 0.5}
    sgd = messages.Optimizer(name="sgd", settings={"lr": 0.1})
    fit = messages.Fit(
        program=traced.program, inputs=inputs, steps=STEPS, batch=100, clip=1.0, optimizer=sgd, **common
    )
    opened = messages.Open(steps=3, batch=100, clip=1.0, **common)
    name = digest(traced.program)
    step = messages.Gradient(loop="cell-loop", inputs=inputs, digest=name, program=traced.program)
    left = messages.Open(steps=3, batch=100, clip=1.0, **common)
    return {
        "mean": (messages.Mean(column="age", dataset=schema.name, split="all", epsilon=0.5), b""),
        "fit": (fit, traced.blob),
        "fit-again": (fit, traced.blob),
        "cancelled": (msgspec.structs.replace(fit, clip=2.0), traced.blob),
        "overdrawn": (messages.Count(dataset=schema.name, split="train", epsilon=900.0), b""),
        "cell-loop": (opened, b""),
        "step-1": (step, traced.blob),
        "step-2": (step, traced.blob),
        "close": (messages.Close(loop="cell-loop"), b""),
        "left-open": (left, b""),
        "step-3": (msgspec.structs.replace(step, loop="left-open"), traced.blob),
    }


class Witness:
    """Writes down what really happened, and kills its process at the n-th point.

    Attributes:
        job: whose records are looked at.
    """

    def __init__(self, notes: Path, killed_at: int | None) -> None:
        self._file = os.open(notes, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._left, self.points, self.job = killed_at, 0, ""

    def point(self, *_: object) -> None:
        self.points += 1
        if self._left is not None and self.points > self._left:
            os.kill(os.getpid(), signal.SIGKILL)

    def note(self, what: str, job: str, steps: int) -> None:
        os.write(self._file, json.dumps([what, job, steps]).encode() + b"\n")

    def ran(self, steps: int = 1) -> None:
        """Records of the patients are being looked at."""
        self.note("ran", self.job, steps)
        self.point()


class Watched(Ledger):
    """The real ledger; each call's begin and end is a point."""

    witness: Witness

    def reserve(self, job: str, *rest: Any) -> None:
        self.witness.point()
        super().reserve(job, *rest)
        self.witness.point()

    def touch(self, job: str, steps: int) -> None:
        self.witness.note("touches", job, steps)
        self.witness.point()
        super().touch(job, steps)
        self.witness.job = job
        self.witness.point()

    def settle(self, job: str, *rest: Any, **more: Any) -> Any:
        self.witness.point()
        receipt = super().settle(job, *rest, **more)
        self.witness.point()
        return receipt

    def abandon(self, job: str, why: str) -> None:
        self.witness.point()
        super().abandon(job, why)
        self.witness.point()


def watch(witness: Witness) -> None:
    """Make every look at a record, and every statement of SQL, known."""
    honest_draw, honest_numbers, honest_open = train.draw, View.numbers, ledger_module._open

    def draw(*args: Any) -> Any:
        witness.ran()
        return honest_draw(*args)

    def numbers(view: View, column: str) -> Any:
        if column == "age" and view.split == "all":
            witness.ran()
        return honest_numbers(view, column)

    def traced(path: Path) -> Any:
        db = honest_open(path)
        db.set_trace_callback(witness.point)
        return db

    train.draw, ledger_module._open = draw, traced
    View.numbers = numbers  # type: ignore[method-assign]


class Wire:
    """Both ends of the curator's pipes: asks one question after another, cancels one on its way.

    Attributes:
        replies: the points at which a reply was out.
    """

    def __init__(self, asked: dict[str, tuple[messages.ASKS, bytes]], out: Path, witness: Witness) -> None:
        self._frames, self._witness = self._ask(asked), witness
        self._out = os.open(out, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._answered, self._halfway, self._told = threading.Event(), threading.Event(), threading.Event()
        self._buffer, self._said, self._asking = b"", io.BytesIO(), ""
        self.replies: list[int] = []

    def _ask(self, asked: dict[str, tuple[messages.ASKS, bytes]]) -> Iterator[bytes]:
        for job, (request, tensors) in asked.items():
            self._asking = job
            self._answered.clear()
            frame = io.BytesIO()
            header = {"do": "ask", "id": job, "researcher": "r", "project": "p"}
            messages.write_frame(frame, messages.encode(header))
            messages.write_frame(frame, messages.encode(request), tensors)
            yield frame.getvalue()
            if job == "cancelled":
                while not (self._halfway.wait(0.01) or self._answered.is_set()):
                    pass
                yield self._frame({"do": "cancel", "id": job})
                self._told.set()
            self._answered.wait()
        yield self._frame({"do": "sweep", "id": "left"})

    def _frame(self, header: dict[str, Any]) -> bytes:
        frame = io.BytesIO()
        messages.write_frame(frame, messages.encode(header))
        return frame.getvalue()

    def read(self, size: int) -> bytes:
        """The next bytes of a question, once the one before is answered."""
        while size and not self._buffer:
            self._buffer = next(self._frames, b"")
            if not self._buffer:
                return b""
        part, self._buffer = self._buffer[:size], self._buffer[size:]
        return part

    def write(self, data: bytes) -> int:
        """Let it out in two halves."""
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._witness.point()
            os.write(self._out, part)
        self._witness.point()
        self._said.write(data)
        return len(data)

    def flush(self) -> None:
        """A whole frame is out."""
        said = json.loads(_frames(self._said.getvalue())[0][0])
        self._said = io.BytesIO()
        if said.get("step", 0) >= 2 and said["id"] == "cancelled":
            self._halfway.set()
            self._told.wait()
        if "step" not in said:
            self.replies.append(self._witness.points)
            if said["id"] == self._asking:
                self._answered.set()


def _frames(data: bytes) -> list[tuple[bytes, bytes]]:
    """The whole frames in it."""
    stream, found = io.BytesIO(data), []
    with contextlib.suppress(RaphaError):
        while (frame := messages.read_frame(stream)) is not None:
            found.append(frame)
    return found


def policy() -> Policy:
    """One project that may do all."""
    import hospital

    from rapha_lab.protocol.keys import PrivateKey

    key = PrivateKey.create()
    page = hospital.policy([key], [PrivateKey.create()], ["ward"], epsilon=8.0)
    (project,) = page.projects
    named = msgspec.structs.replace(project, researchers=["r"])
    return Policy(page.text, page.head, page.custodians, page.datasets, (named,))


class World:
    """What all children share: records, requests, policy; and what one child does in a folder."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        clock.QUANTUM = 1e-6
        schema = Schema.from_dict(_toml(ward.SCHEMA))
        self.cohort = Cohort(schema, ward.frame(), salt=bytes(32))
        self.asked, self.page = story(schema), policy()
        # warm: what is loaded at first use is loaded before the first fork
        for request, tensors in (self.asked["mean"], self.asked["fit"]):
            assert isinstance(request, messages.Mean | messages.Fit)
            plan = plan_of(request, tensors, schema, 1e-5, SystemNoise())
            plan.run(self.cohort.view(request.split), lambda *_: None)
        self._prices = self._losses()

    def desk(self, ledger: Ledger, mistake: str | None) -> Desk:
        kind = MISTAKES[mistake] if mistake else Desk
        return kind(
            lambda: self.page, ledger, {"ward": self.cohort}, SystemNoise(), "s", None, simulated=True
        )  # type: ignore[arg-type]

    def live(self, folder: Path, mistake: str | None, point: int | None) -> Any:
        """Through the whole story, or until it is killed: its points, its replies' points, what is still open."""
        witness = Witness(folder / "notes", point)
        watch(witness)
        ledger = Watched(folder / "ledger", KEY)
        ledger.witness = witness
        wire = Wire(self.asked, folder / "out", witness)
        desk = self.desk(ledger, mistake)
        server = Server(desk, {}, wire, wire, Blocks(()))  # type: ignore[arg-type]
        if isinstance(desk, ChargesAfterTheRelease):
            desk.out = server._say  # type: ignore[method-assign]
        server.serve()
        server._quick.shutdown()
        still = ledger._db.execute("SELECT name FROM job WHERE state = 'reserved'").fetchall()
        return {"points": witness.points, "replies": wire.replies, "open": [name for (name,) in still]}

    def check(self, folder: Path, mistake: str | None) -> list[str]:
        """What of the promise does not hold after that life."""
        with contextlib.closing(Ledger(folder / "ledger", KEY)) as ledger:
            bad = self._faults(ledger, folder)
            return bad + self._asked_again(ledger, mistake) + books(ledger)

    def _losses(self) -> dict[str, tuple[Loss, tuple[str, ...]]]:
        from rapha_lab.curator.mechanisms import loop

        found = {}
        for job, (request, tensors) in self.asked.items():
            if isinstance(request, messages.Open):
                opened = loop.plan(request, self.cohort.schema, 1e-5, SystemNoise())
                found[job] = opened.loss, opened.touches
            elif isinstance(request, messages.Mean | messages.Fit):
                plan = plan_of(request, tensors, self.cohort.schema, 1e-5, SystemNoise())
                found[job] = plan.loss, plan.touches
        return found

    def _faults(self, ledger: Ledger, folder: Path) -> list[str]:
        notes = folder / "notes"
        happened = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        total = lambda what, job: sum(n for w, j, n in happened if (w, j) == (what, job))  # noqa: E731
        out = (folder / "out").read_bytes() if (folder / "out").exists() else b""
        bad = []
        for job, (loss, touches) in self._prices.items():
            ran, asked = total("ran", job), max(total("touches", job), total("ran", job))
            for split in touches:
                alpha, paid = _paid(ledger, job, split)
                least = units(loss.part(ran), alpha) if ran else 0
                most = units(loss.part(asked), alpha) if asked else 0
                if paid < least:
                    bad.append(f"{job}: {ran} steps ran on {split} and {paid} of {least} units are charged")
                if paid > most:
                    bad.append(
                        f"{job}: {asked} steps were touched on {split} and {paid} > {most} are charged"
                    )
        for job, told in _released(out):
            receipt = ledger.receipt_of(job)
            if ledger.release_of(job) != told or receipt is None:
                bad.append(f"{job}: it was let out and is not on the books")
            else:
                verify_receipt(receipt, KEY.public_key(), told)
        begun = _begun(out)
        if begun and ledger.release_of(begun) is None:
            bad.append(f"{begun}: part of it was let out and it is not on the books")
        return bad

    def _asked_again(self, ledger: Ledger, mistake: str | None) -> list[str]:
        """The same question gives the settled answer for nothing; another one of that number is refused."""
        desk, bad = self.desk(ledger, mistake), []
        for job in ("mean", "fit"):
            request, tensors = self.asked[job]
            before = ledger.release_of(job)
            known = ledger._db.execute("SELECT state FROM job WHERE name = ?", (job,)).fetchone()
            caller, spent = Caller("r", "p", job), _spent(ledger)
            if known is None:
                continue
            try:
                again, _ = desk.answer(caller, messages.encode(request), tensors, lambda *_: None)
                assert isinstance(again, Release)
                if before is None or statement(msgspec.structs.asdict(again)) != before:
                    bad.append(f"{job}: asked again it gives another answer")
            except RaphaError:
                if before is not None:
                    bad.append(f"{job}: its answer is paid for and not given")
            other = msgspec.structs.replace(request, epsilon=0.25)  # type: ignore[type-var]
            try:
                desk.answer(caller, messages.encode(other), tensors, lambda *_: None)
                bad.append(f"{job}: another question of its number is answered")
            except RaphaError:
                pass
            if _spent(ledger) != spent:
                bad.append(f"{job}: asking again changed the books")
        return bad


def _toml(text: str) -> Any:
    import tomllib

    return tomllib.loads(text)


def _paid(ledger: Ledger, job: str, split: str) -> tuple[int, int]:
    row = ledger._db.execute("SELECT number, alpha FROM account WHERE split = ?", (split,)).fetchone()
    if row is None:
        return 2, 0
    paid = ledger._db.execute(
        "SELECT units FROM charge WHERE account = ? AND job = ?", (row[0], job)
    ).fetchone()
    return row[1], paid[0] if paid else 0


def _spent(ledger: Ledger) -> list[Any]:
    return ledger._db.execute("SELECT split, spent FROM account ORDER BY split").fetchall()


def _released(out: bytes) -> Iterator[tuple[str, bytes]]:
    """Whole releases that were let out: job, and what the log names of it."""
    for header, tensors in _frames(out):
        said = json.loads(header)
        if "values" in (said.get("release") or {}):
            digest_of = hashlib.sha256(tensors).hexdigest()
            yield said["release"]["job"], statement(said["release"] | {"tensors": digest_of})


def _begun(out: bytes) -> str | None:
    """The job whose release was let out in part."""
    whole = sum(16 + len(header) + len(tensors) for header, tensors in _frames(out))
    rest = out[whole + 16 :]
    if b'"release"' not in rest[:60]:
        return None
    job = rest.split(b'"id":"', 1)[1].split(b'"', 1)[0].decode().removesuffix("-again")
    # gradients are steps of a loop, whose charge the notes hold it to
    return (
        None
        if job.startswith("step") or job in ("cell-loop", "left-open")
        else job.replace("close", "cell-loop")
    )


def books(ledger: Ledger) -> list[str]:
    """The books agree with themselves and with the log."""
    entries = ledger.log.entries()
    heads: dict[str, int] = {}
    for entry in map(json.loads, entries):
        if isinstance(entry.get("accounts"), dict):
            heads |= {label: head["spent"] for label, head in entry["accounts"].items()}
    bad = []
    if open_checkpoint(ledger.log.checkpoint(), KEY.public_key()).root != root_of(entries):
        bad.append("the log's root is not that of its entries")
    query = "SELECT split, spent, budget, (SELECT coalesce(sum(units), 0) FROM charge WHERE account = number) FROM account"
    for split, spent, budget, charged in ledger._db.execute(query).fetchall():
        if not spent == charged == heads.get(f"p/ward/{split}", 0) <= budget:
            bad.append(f"{split}: spent {spent}, charged {charged}, in the log {heads}")
    if ledger._db.execute("SELECT 1 FROM job WHERE state = 'reserved'").fetchone():
        bad.append("a job is still open")
    return bad


def in_child(act: Callable[[], Any]) -> tuple[int, Any]:
    """The exit code (negative for a signal) and result of `act` in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            os.write(writer, json.dumps(act()).encode())
            os._exit(0)
        except BaseException as error:
            os.write(writer, json.dumps(f"{type(error).__name__}: {error}").encode())
            os._exit(1)
        finally:
            os._exit(2)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, json.loads(said) if said else None


def main() -> None:
    """Obey line by line."""
    world = World()
    for line in sys.stdin:
        order = json.loads(line)
        folder = Path(order["world"])
        folder.mkdir(exist_ok=True)
        if order.get("check"):
            code, said = in_child(
                lambda folder=folder, order=order: world.check(folder, order.get("mistake"))
            )
        else:
            code, said = in_child(
                lambda folder=folder, order=order: world.live(
                    folder, order.get("mistake"), order.get("point")
                )
            )
        print(json.dumps([code, said]), flush=True)


if __name__ == "__main__":
    main()
