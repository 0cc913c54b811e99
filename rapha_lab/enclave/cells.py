"""Cells and the sessions they run in: each session a sandboxed process, each cell a job with its outputs."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from rapha_lab.enclave.blocks import Block, Blocks
from rapha_lab.enclave.cell import ENDED, Cell, Order, State
from rapha_lab.enclave.cores import SESSIONS
from rapha_lab.enclave.curator import Curator, CuratorLost
from rapha_lab.enclave.sandbox import Limits, Worker, Zygote
from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RaphaError, RequestError, SiteError, WaitingError
from rapha_lab.protocol.release import MIME, Release, canonical

__all__ = ["Cells"]

MAX_SESSIONS, MAX_QUEUE, MAX_CELLS, MAX_OUTPUT = 4, 32, 500, 64 << 20
MAX_HELD, OVERHEAD = 1 << 30, 2048
"""Bytes that one researcher's cells may hold, sent, shown or brought back; and that an output takes beside its own."""


class Cells:
    """All cells of a site, run in order within a session and side by side between sessions.

    Args:
        zygote: gives sandboxed workers.
        curator: answers their requests.
        sign: signs one output: (job, notebook cell, index, data) -> what goes into its metadata.
        schemas: the public schemas by dataset, for the handles.
        project_of: (researcher, project, dataset) -> the project they act for, or PolicyError.
        idle: seconds after which a session that was given nothing ends.
        blocks: memory for a session and the curator; all goes through pipes without.
    """

    def __init__(
        self,
        zygote: Zygote,
        curator: Curator,
        sign: Callable[[str, str, int, dict[str, Any]], dict[str, Any]],
        schemas: dict[str, dict[str, Any]],
        project_of: Callable[[str, str, str], str],
        idle: float = 3600.0,
        blocks: Blocks | None = None,
    ) -> None:
        self._blocks = blocks or Blocks(0)
        self._zygote, self._curator, self._sign = zygote, curator, sign
        self._schemas, self._project_of, self.idle = schemas, project_of, idle
        self._changed = threading.Condition()
        self._cells: dict[str, Cell] = {}
        self._sessions: dict[tuple[str, str], _Session] = {}
        # sessions that ended unasked, and what their next cell is told
        self._ended: dict[tuple[str, str], str] = {}
        self._issued: set[bytes] = set()
        self._decisions = 0

    def submit(self, researcher: str, order: Order, tensors: bytes) -> Cell:
        """Queue a cell in its session, which is started if it is new.

        Raises:
            RequestError: the dataset is unknown. SiteError: a limit of this site is reached.
            PolicyError: the researcher is in no project that may use the dataset.
        """
        if order.dataset not in self._schemas:
            known = ", ".join(sorted(self._schemas))
            raise RequestError(
                f"There is no dataset {order.dataset!r} here.",
                f"This site has: {known}.",
                "Name one.",
                field="dataset",
            )
        order.project = self._project_of(researcher, order.project, order.dataset)
        cell = Cell(uuid.uuid4().hex, researcher, order, tensors, told=len(msgspec.json.encode(order)))
        digest = hashlib.sha256(order.source.encode()).hexdigest()
        self._curator.look_up("cell", project=order.project, researcher=researcher, text=digest)
        worker = self._spawn(researcher, order.session)  # takes a while: nobody waits with the lock held
        with self._changed:
            session = self._session(researcher, order.session, worker)
            if sum(c.state == "queued" for c in session.cells) >= MAX_QUEUE:
                raise SiteError(
                    "Too many cells wait in this session.", f"The limit is {MAX_QUEUE}.", "Wait for some."
                )
            self._forget(researcher, cell.held)
            self._cells[cell.id] = cell
            if (why := self._ended.pop((researcher, order.session), "")) != "":
                self._add(cell, {"type": "stream", "name": "stderr", "text": why})
            session.leaving = False
            session.cells = [*(c for c in session.cells if c.state not in ENDED), cell]
            self._changed.notify_all()
        return cell

    def _forget(self, researcher: str, more: int) -> None:
        """Forget this researcher's oldest ended cells where they are too many or hold too much; nobody else's."""
        mine = [cell for cell in self._cells.values() if cell.researcher == researcher]
        held, count = sum(cell.held for cell in mine) + more, len(mine)
        for cell in mine:
            if (count >= MAX_CELLS or held > MAX_HELD) and cell.state in ENDED:
                del self._cells[cell.id]
                held, count = held - cell.held, count - 1
        if held > MAX_HELD:
            raise SiteError(
                "Your cells hold too much at this site.",
                f"What waits and runs may hold {MAX_HELD >> 20} MiB.",
                "Wait for some, or send less with -i.",
            )

    def _spawn(self, researcher: str, name: str) -> Worker | None:
        """A worker for a session that is new, or None."""
        with self._changed:
            self._sessions = {key: session for key, session in self._sessions.items() if not session.over}
            if (researcher, name) in self._sessions:
                return None
            self._room(researcher)
        block = self._blocks.take()
        try:
            memory = Limits.memory - (
                0 if block is None else messages.BLOCK
            )  # it counts as the session's own
            return self._zygote.spawn(Limits(memory, cores=SESSIONS), block)
        except BaseException:
            self._blocks.give_back(block)
            raise

    def _room(self, researcher: str) -> None:
        """Room for one more session: the researcher's own that was idle for longest makes it, never one with a job."""
        mine = [s for key, s in self._sessions.items() if key[0] == researcher and not s.over]
        if len(mine) < MAX_SESSIONS:
            return
        idle = [session for session in mine if all(cell.state in ENDED for cell in session.cells)]
        if not idle:
            raise SiteError(
                f"You have {MAX_SESSIONS} sessions open at this site, and a job in each.",
                "That is the limit for one researcher.",
                "Wait for one, cancel one (site.jobs(), site.cancel(id)), or call site.end_sessions().",
            )
        longest = min(idle, key=lambda session: session.since)
        self._note(longest, _CROWDED)
        longest.kill()

    def _note(self, session: _Session, why: str) -> None:
        """Have the session's next cell told why there is nothing left of the earlier ones."""
        self._ended.pop(session.key, None)
        self._ended[session.key] = why
        mine = [key for key in self._ended if key[0] == session.key[0]]
        for key in mine[:-MAX_CELLS]:  # never another researcher's, however many sessions one opens
            del self._ended[key]

    def _session(self, researcher: str, name: str, worker: Worker | None) -> _Session:
        """The session, with the worker if it is new; one that is not needed is ended."""
        key = (researcher, name)
        old = self._sessions.get(key)
        try:
            if old is not None and not old.over:
                return old
            self._room(researcher)
            if worker is None:
                raise SiteError("The session ended at this moment.", "", "Run the cell again.")
            self._sessions[key], worker = _Session(self, worker, key), None
            return self._sessions[key]
        finally:
            if worker is not None:
                threading.Thread(target=self._retire, args=(worker,), daemon=True).start()

    def _retire(self, worker: Worker) -> None:
        """End a worker of which nothing is under way any more; its block is free once it is gone."""
        worker.close()
        worker.wait()
        self._blocks.give_back(worker.block)

    def of(self, researcher: str) -> list[Cell]:
        """The researcher's cells, oldest first."""
        with self._changed:
            return [cell for cell in self._cells.values() if cell.researcher == researcher]

    def get(self, researcher: str, cell: str) -> Cell:
        """One of the researcher's cells.

        Raises:
            RequestError: they have none of that id.
        """
        found = self._cells.get(cell)
        if found is None or found.researcher != researcher:
            raise RequestError(
                "There is no such job of yours here.", "It is another's, or long over.", field="cell"
            )
        return found

    def watch(self, cell: Cell, after: int, seconds: float, seen: tuple[str, int] | None = None) -> None:
        """Wait until the cell has more than `after` outputs, moves on from `seen`, or time is up.

        Its end is told at once, outputs and steps a little later and together: who follows a fast fit asks a few times a
        second and not at each of its steps.
        """
        left = min(max(seconds, 0.0), 10.0)

        def ended() -> bool:
            return cell.state in ENDED

        def told() -> bool:
            return ended() or len(cell.outputs) > after

        def moved() -> bool:
            return told() or (cell.state, cell.step) != seen or cell.doing != before

        with self._changed:
            before = cell.doing
            for sign, pause in ((ended, 0.1), (told, 0.4), (moved, left)):
                if self._changed.wait_for(sign, min(pause, left)):
                    return

    def cancel(self, cell: Cell) -> None:
        """Stop a cell: its running request before the next step, its Python where it stands."""
        with self._changed:
            cell.cancelled = True
            if cell.state == "queued":
                self._end(cell, "cancelled")
            asking, running = cell.asking, cell.state == "running"
            self._changed.notify_all()
            mine = [session for session in self._sessions.values() if cell in session.cells]
        if asking is not None:
            self._curator.cancel(asking)
        elif running:
            for session in mine:
                session.interrupt()

    def end(self, researcher: str, session: str | None = None, *, idle: bool = False) -> None:
        """End one of the researcher's sessions, or all of them; `idle` ones only, a busy one once its cells are done."""
        with self._changed:
            mine = [s for k, s in self._sessions.items() if k[0] == researcher and session in (None, k[1])]
            for each in mine if idle else ():
                each.leaving = True
            self._changed.notify_all()
        for each in () if idle else mine:
            each.kill()

    def decided(self) -> None:
        """A custodian decided on something: whoever waits in the airlock asks again."""
        with self._changed:
            self._decisions += 1
            self._changed.notify_all()

    def researchers(self) -> set[str]:
        """Who has a session open."""
        with self._changed:
            return {key[0] for key, session in self._sessions.items() if not session.over}

    def busy(self) -> bool:
        """Whether any cell waits or runs."""
        with self._changed:
            return any(cell.state not in ENDED for cell in self._cells.values())

    def close(self) -> None:
        """End every session."""
        for session in list(self._sessions.values()):
            session.kill()

    # -- called by a session's thread -----------------------------------------------------------------

    def _add(self, cell: Cell, output: dict[str, Any]) -> None:
        with self._changed:
            cell.size += len(msgspec.json.encode(output)) + OVERHEAD
            if cell.size > MAX_OUTPUT:
                return
            # a print is an output like any other, so that it too can be signed
            data = output["data"] if output["type"] == "display" else _printed(output)
            signed = self._sign(cell.id, cell.order.origin.get("cell", ""), len(cell.outputs), data)
            output = output | {"data": data, "metadata": {**output.get("metadata", {}), "rapha": signed}}
            cell.outputs.append(output)
            self._changed.notify_all()

    def _honest(self, output: dict[str, Any]) -> dict[str, Any]:
        """A session's output without cards that only the site may show; a release it got may be shown again."""
        if output["type"] == "stream":
            return {"type": "stream", "name": str(output["name"]), "text": str(output["text"])}
        data = dict(output["data"])
        if MIME not in data or _name(data) not in self._issued:
            data = {kind: v for kind, v in data.items() if not kind.startswith("application/vnd.rapha.")}
        return {"type": "display", "data": data, "metadata": dict(output["metadata"])}

    def _end(self, cell: Cell, state: State, **fields: Any) -> None:
        self._curator.sweep(cell.id)
        with self._changed:
            cell.state, cell.ended, cell.asking = state, time.time(), None
            for name, value in fields.items():
                setattr(cell, name, value)
            self._changed.notify_all()

    def _ask(
        self, cell: Cell, request: bytes, tensors: bytes, block: Block | None = None, shared: int = 0
    ) -> tuple[dict[str, Any], bytes]:
        """One request of a cell's: carried to the curator, its release shown as a card.

        Args:
            block: the memory that its session shares with the curator.
            shared: how many bytes of tensors are there, in place of `tensors`.
        """
        epsilon, loop = messages.asked_for(request)

        def on_step(step: int, steps: int, spent: float, doing: str) -> None:
            with self._changed:
                if cell.doing:
                    cell.asked_at = time.time()  # how long steps take is reckoned from when they begin
                cell.doing = doing
                if not doing:
                    cell.step, cell.steps, cell.spent[job] = step, steps, spent
                self._changed.notify_all()

        with self._changed:
            if cell.cancelled:
                raise _Stopped("The cell was cancelled.")
            cell.asking = f"{cell.id}-{uuid.uuid4().hex[:8]}"
            if epsilon:
                cell.asked_at, cell.step, cell.steps = time.time(), 0, 0
                cell.asked[cell.asking] = epsilon
            number = cell.asking
            job = loop or number
        asked: tuple[Any, ...] = number, cell.researcher, cell.order.project, request, tensors, on_step
        # other requests are asked again where the curator died, from what is kept here
        if block is not None and loop:
            asked = *asked, block.number, shared
        while True:
            seen = self._decisions
            try:
                wire, blob = self._asked(asked)
                break
            except WaitingError as waits:
                self._wait(cell, waits, seen)
            except RaphaError:
                with self._changed:
                    if job not in cell.spent:
                        cell.asked.pop(job, None)  # refused before anything was touched: nothing was granted
                raise
            finally:
                with self._changed:
                    cell.asking, cell.doing = None, ""
            with self._changed:
                cell.asking = number
        if "op" not in wire:
            if epsilon:  # a loop was opened, of whose loss its session now makes a program
                with self._changed:
                    cell.doing = messages.PREPARES
                    self._changed.notify_all()
            return wire, blob  # a step of a loop, which is one release when it closes
        with self._changed:
            cell.spent.setdefault(job, 0.0 if wire["repeated"] else wire["epsilon"])
            cell.step = cell.steps
        release = msgspec.convert(wire, Release)
        data = release._repr_mimebundle_()
        self._issued.add(_name(data))
        self._add(cell, {"type": "display", "data": data, "metadata": {}, "of": MIME})
        return wire, blob

    def _asked(self, asked: tuple[Any, ...]) -> tuple[dict[str, Any], bytes]:
        try:
            return self._curator.ask(*asked)
        except CuratorLost:
            # if it was settled before the curator died it is paid for, and asking for it again is free
            with contextlib.suppress(RaphaError):
                return self._curator.ask(*asked)
            raise

    def _wait(self, cell: Cell, waits: WaitingError, seen: int) -> None:
        """Wait until a custodian decides on something; the cell is cancelled or its session ends before, perhaps."""
        with self._changed:
            cell.state, cell.waits = "waiting", waits.to_wire()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._decisions != seen or cell.cancelled or cell.orphaned)
            cell.state, cell.waits = "running", None
            self._changed.notify_all()
            if cell.cancelled or cell.orphaned:
                raise _Stopped("The cell was stopped while it waited.", waits.why, _COLLECT)


_COLLECT = "What waited is still in the airlock: site.airlock() lists it, site.collect(subject) brings it."


class _Stopped(SiteError):
    """A question of a cell that was cancelled before."""


def _name(data: dict[str, Any]) -> bytes:
    """What stands for a card among those that were issued."""
    return hashlib.sha256(canonical(data)).digest()


def _printed(output: dict[str, Any]) -> dict[str, Any]:
    """What was printed, as a bundle."""
    text = output["text"].rstrip("\n")
    return {"text/plain": text} | (
        {"application/vnd.jupyter.stderr": text} if output["name"] == "stderr" else {}
    )


class _Session:
    """A worker and the thread that feeds it cells."""

    def __init__(self, cells: Cells, worker: Worker, key: tuple[str, str]) -> None:
        self.cells: list[Cell] = []
        self.over = self.leaving = False
        self.key, self.since = key, time.monotonic()
        self._cells, self._worker = cells, worker
        self._lock = threading.Lock()
        self._ran = 0
        threading.Thread(target=self._serve, daemon=True).start()
        threading.Thread(target=self._mourn, daemon=True).start()

    def interrupt(self) -> None:
        self._worker.interrupt()

    def kill(self) -> None:
        with self._cells._changed:
            self.over = True
            self._cells._changed.notify_all()
        self._worker.kill()

    def _say(self, header: dict[str, Any], tensors: bytes = b"") -> None:
        with self._lock:
            messages.write_frame(self._worker.writer, messages.encode(header), tensors)

    def _next(self) -> Cell | None:
        changed = self._cells._changed
        with changed:
            self.since = time.monotonic()
            changed.wait_for(
                lambda: self.over or self.leaving or any(c.state == "queued" for c in self.cells),
                self._cells.idle,
            )
            cell = next((c for c in self.cells if c.state == "queued"), None)
            if cell is not None and not self.over:
                cell.state, cell.started = "running", time.time()
                changed.notify_all()
                return cell
            if not self.over and not self.leaving:
                self._cells._note(self, _IDLED)
            self.over = True
        return None

    def _serve(self) -> None:
        while (cell := self._next()) is not None:
            try:
                self._run(cell)
            except Exception:  # whatever it sent, it ends itself and nobody else
                break
        with self._cells._changed:
            self.over = True
        try:
            outcome = self._worker.wait(1)
        except TimeoutError:
            outcome = "killed"
        why = _OUTCOMES.get(outcome, _OUTCOMES["killed"])
        lost = SiteError("The session at the site ended.", why, "Run the notebook's enclave cells again.")
        for cell in self.cells:
            if cell.state not in ENDED:
                self._cells._end(cell, "cancelled" if cell.cancelled else "lost", error=lost.to_wire())
        self._cells._retire(self._worker)

    def _mourn(self) -> None:
        """Once the worker is gone, stop what it still asks: nobody could receive the answer."""
        self._worker.wait()
        with self._cells._changed:
            for cell in self.cells:
                cell.orphaned = True
            self._cells._changed.notify_all()
        for asking in [cell.asking for cell in self.cells if cell.asking is not None]:
            with contextlib.suppress(RaphaError):
                self._cells._curator.cancel(asking)

    def _run(self, cell: Cell) -> None:
        self._ran += 1
        order = cell.order
        fields = {
            "source": order.source,
            "epsilon": order.epsilon,
            "inputs": order.inputs,
            "outputs": order.outputs,
        }
        schema = self._cells._schemas[order.dataset]
        self._say(
            {"do": "run", "name": f"<enclave cell {self._ran}>", "schema": schema, **fields}, cell.tensors
        )
        cell.tensors = b""
        while True:
            frame = messages.read_frame(self._worker.reader)
            if frame is None:
                raise OSError("the worker is gone")
            said = msgspec.json.decode(frame[0], type=_Said)
            if said.say == "begun" and cell.cancelled:
                self.interrupt()  # what was sent before met no cell to interrupt
            elif said.say == "output" and said.output.get("type") in ("stream", "display"):
                self._cells._add(cell, self._cells._honest(said.output))
            elif said.say == "ask":
                self._answer(cell, said, frame[1])
            elif said.say == "done":
                cell.told += len(frame[0])
                return self._finish(cell, said, frame[1])

    def _answer(self, cell: Cell, said: _Said, tensors: bytes) -> None:
        answer: dict[str, Any] = {"do": "answer", "number": said.number}
        try:
            wire, blob = self._cells._ask(cell, bytes(said.ask), tensors, self._worker.block, said.shared)
        except RaphaError as error:
            self._say(answer | {"error": error.to_wire()})
            if isinstance(error, _Stopped):
                self.interrupt()  # it swallowed the first refusal
        else:
            self._say(answer | {"release": wire}, blob)

    def _finish(self, cell: Cell, said: _Said, blob: bytes) -> None:
        state: State = "done" if bytes(said.error) == b"null" else "cancelled" if cell.cancelled else "failed"
        # kept as JSON, which nobody here reads: as Python's objects it would be many times as large
        raw = {name: msgspec.Raw(bytes(getattr(said, name))) for name in ("error", "traceback", "values")}
        self._cells._end(cell, state, **raw, blob=blob)


class _Said(msgspec.Struct, forbid_unknown_fields=True):
    """A frame from a worker, which is not trusted."""

    say: str
    output: dict[str, Any] = {}
    number: int = 0
    ask: msgspec.Raw = msgspec.Raw(b"null")
    shared: int = 0
    error: msgspec.Raw = msgspec.Raw(b"null")
    traceback: msgspec.Raw = msgspec.Raw(b"[]")
    values: msgspec.Raw = msgspec.Raw(b"{}")


_GONE = """What this notebook's earlier enclave cells defined there is gone, models included that no -o brought back; releases,
what -o brought back and the ε spent stay. Run those cells again: a question asked again as it was is free, and so is a
training from the same starting weights; -i sends what is here.\n"""
_IDLED = f"The session at the site had been idle for long and was ended. {_GONE}"
_CROWDED = f"This session, idle for longest of your {MAX_SESSIONS}, was ended: another notebook of yours needed room. {_GONE}"

_OUTCOMES = {
    "ended": "Its process ended.",
    "killed": "Its process was ended.",
    "memory": "It needed more memory than a session may have.",
    "time": "It ran longer than a session may.",
    "violation": "It tried what the sandbox does not allow.",
}
