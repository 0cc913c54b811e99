"""A canary in every record: it is in no byte that leaves the curator, whoever tries, and in none on the wire."""

from __future__ import annotations

import base64
import http.server
import io
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import hospital
import polars
import pytest

from rapha_lab.client.site import Site as Connected
from rapha_lab.enclave.curator import Curator
from rapha_lab.protocol.keys import PrivateKey

NAME, NUMBER = "CANARY-7f3a91c2", 73.91827364
SCHEMA = """
name = "aviary"
title = "Birds"
citation = "none"
licence = "none"
patient = "pid"
patients = 600
source = "aviary.parquet"
[[columns]]
name = "age"
type = "number"
bounds = [0, 100]
meaning = "Age."
public = "Nobody is older."
[[columns]]
name = "dead"
type = "boolean"
meaning = "Dead."
public = "Yes or no."
[[columns]]
name = "note"
type = "category"
categories = ["seen", "unseen"]
missing = "possible"
meaning = "A note."
public = "As in the form."
"""


def traces() -> list[bytes]:
    """What would show that a record got out: its texts and the bits of its number, plain and in base64."""
    plain = [NAME.encode(), b"7f3a91c2", b"73.91827", NAME[::-1].encode()]
    plain += [struct.pack(f"{order}{kind}", NUMBER) for order in "<>" for kind in "df"]
    coded = [base64.b64encode(bytes(pad) + NAME.encode())[skip:-4] for pad, skip in enumerate((0, 2, 3))]
    return [*plain, *coded, NAME.encode().hex().encode()]


def found(data: bytes) -> list[bytes]:
    """The traces in `data`."""
    return [trace for trace in traces() if trace in data]


@dataclass
class Tap:
    """Everything that was read from a stream."""

    stream: BinaryIO
    heard: bytearray = field(default_factory=bytearray)

    def read(self, size: int = -1) -> bytes:
        """Read and remember."""
        data = self.stream.read(size)
        self.heard += data
        return data


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a site and keeps every byte of both ways."""

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url, self.wire, self.posts = url, bytearray(), list[bytes]()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.wire += f"{self.command} {self.path}\n{self.headers}".encode() + body
        request = urllib.request.Request(self.server.url + self.path, body or None, method=self.command)
        try:
            with urllib.request.urlopen(request) as reply:
                status, answer = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, answer = error.code, error.read()
        if self.command == "POST":
            self.server.posts.append(body)
            self.server.wire += answer  # evidence is public, all else is sealed
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = _pass  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@dataclass
class Aviary:
    """The hospital with canaries, its taps, and a researcher behind the proxy."""

    site: Connected
    other: Connected
    taps: list[Tap]
    proxy: Proxy
    folder: Path

    def run(self, source: str) -> Any:
        """One cell, to its end; the session is a new one each time."""
        job = self.site.run(source, "aviary", session=f"s{hash(source)}")
        for _ in job.follow():
            pass
        self.site.end_sessions(f"s{hash(source)}")
        return job

    def fill(self, size: Callable[[], int], least: int) -> None:
        """Ask until so much was heard; at once if other tests asked before."""
        for number in range(40):
            if size() >= least:
                return
            self.run(f"patients.histogram('age', bins={10 + number}, epsilon=1)")


@pytest.fixture(scope="module")
def aviary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aviary]:
    """Six hundred patients, each with the canary in identifier and number, and in what should be a category."""
    folder, taps, patch = tmp_path_factory.mktemp("aviary"), list[Tap](), pytest.MonkeyPatch()
    frame = polars.DataFrame(
        {
            "pid": [f"{NAME}-{number}" for number in range(600)],
            "age": [NUMBER] * 600,
            "dead": [number % 3 == 0 for number in range(600)],
            "note": [NAME] * 300 + ["seen"] * 300,
        }
    )
    launch = Curator._launch

    def tapped(self: Curator) -> Any:
        process = launch(self)
        taps.append(Tap(process.stdout))  # type: ignore[arg-type]
        process.stdout = taps[-1]  # type: ignore[assignment]
        return process

    patch.setattr(Curator, "_launch", tapped)
    other = PrivateKey.create()
    config, key = hospital.prepare(folder, SCHEMA, frame, "aviary", others=[other], epsilon=500.0)
    with hospital.running(config) as (_, url):
        proxy = Proxy(url)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        behind = f"http://127.0.0.1:{proxy.server_port}"
        yield Aviary(hospital.connected(behind, key), hospital.connected(url, other), taps, proxy, folder)
        proxy.shutdown()
    patch.undo()


QUESTIONS = {
    "count": "r = patients.count(epsilon=1)",
    "mean": "r = patients.mean('age', epsilon=1)",
    "histogram": "r = patients.histogram('note', epsilon=1)",
    "fit": "import torch\nm = torch.nn.Linear(1, 1)\n"
    "r = patients.train.fit(m, inputs=['age'], target='dead', epsilon=1, epochs=2)",
    "evaluate": "import torch\nm = torch.nn.Linear(1, 1)\n"
    "r = patients.test.evaluate(m, ['auroc'], inputs=['age'], target='dead', epsilon=1)",
    "loop": "import torch\nm = torch.nn.Linear(1, 1)\nfor b in patients.train.batches(size=100, epochs=1, epsilon=1):\n"
    "    m(b[['age']]).mean().backward()",
}

HANDLE = """patients.head() | print(patients) or patients.values | list(patients) | len(patients) | patients['age']
patients[0] | patients.age | repr(patients.__dict__) | import pickle; pickle.dumps(patients)
import copy; copy.deepcopy(patients)
import numpy; numpy.array(patients) | import torch; torch.tensor(patients)
import json; json.dumps(patients)
patients.to_pandas() | patients.train.collect() | patients.test.iloc[0] | bool(patients) | sum(patients) | sorted(patients)
display(patients) | f'{patients:x}' | vars(patients.train) | patients.schema.to_json() | [*patients]
print(*patients)
next(iter(patients.train.batches(size=50, epochs=1, epsilon=.5)))['age'].item()
next(iter(patients.train.batches(size=50, epochs=1, epsilon=.5)))['age'].numpy()
next(iter(patients.train.batches(size=50, epochs=1, epsilon=.5)))['age'].tolist()
print(next(iter(patients.train.batches(size=50, epochs=1, epsilon=.5)))['age'] + 0)
float(next(iter(patients.train.batches(size=50, epochs=1, epsilon=.5)))['age'].sum())"""

SYSTEM = {
    "files of the site": "import os\nfor p in {paths}:\n    print(open(p, 'rb').read())",
    "listing": "import os\nprint(os.listdir({folder!r}), os.stat({folder!r}))",
    "processes": "import os\nfor p in os.listdir('/proc'):\n    print(open(f'/proc/{{p}}/environ', 'rb').read())",
    "the curator's memory": "for p in range(1, 400):\n    open(f'/proc/{{p}}/mem', 'rb')",
    "own memory": "import gc\nprint([o for o in gc.get_objects() if 'CANARY' in str(type(o))])",
    "every object": "import gc\nname = 'CANARY' + '-7f3'\n"
    "print([o for o in gc.get_objects() if isinstance(o, (dict, list)) and name in str(o)])",
    "frames": "import sys\nf = sys._getframe()\nwhile f:\n    print(f.f_locals.keys())\n    f = f.f_back",
    "modules": "import sys\nprint([m for m in sys.modules if 'curator' in m])",
    "descriptors": "import os\nfor fd in range(3, 64):\n    try:\n"
    "        print(fd, os.fstat(fd))\n    except OSError:\n        pass",
    "reading descriptors": "import os, select\nfor fd in range(3, 64):\n    try:\n"
    "        if select.select([fd], [], [], 0)[0]:\n            print(os.read(fd, 100))\n"
    "    except (OSError, ValueError):\n        pass",
    "a shell": "import subprocess\nprint(subprocess.run(['cat', {records!r}], capture_output=True))",
    "the network": "import socket\ns = socket.create_connection(('127.0.0.1', 1))",
    "a raw system call": "import ctypes\nprint(ctypes.CDLL(None).syscall(2, {records!r}.encode(), 0))",
    "a thread": "import threading\nt = threading.Thread(target=lambda: print(open({records!r})))\nt.start(); t.join()",
    "standard output": "import os\nos.write(1, b'x' * 10); os.write(2, b'y')",
    "a core dump": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "an exit hook": "import atexit\natexit.register(lambda: print(open({records!r}, 'rb').read()))",
    "polars": "import polars\nprint(polars.read_parquet({records!r}))",
    "a warning": "import warnings\nwarnings.warn(str(patients))",
    "logging": "import logging\nlogging.error(patients)",
    "a forged request": "patients._ask.__self__._say({{'say': 'ask', 'ask': {{'op': 'rows', 'dataset': 'aviary'}}}})\n"
    "it = patients._ask.__self__\nprint(it._next(it._answers))",
    "an error's message": "patients.histogram('note', bins=3, epsilon=1)['never']",
    "a raw bundle": "from IPython.display import display\ndisplay({{'text/plain': str(patients)}}, raw=True)",
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_answer_is_free_of_the_canary(aviary: Aviary, question: str) -> None:
    """Whatever is asked, no record's text or number is in the answer."""
    job = aviary.run(QUESTIONS[question] + "\nprint(r)" * (question != "loop"))
    assert job.state == "done", job.told
    assert not found(str(job.outputs).encode() + job.blob)


@pytest.mark.parametrize("attempt", [a.strip() for line in HANDLE.splitlines() for a in line.split(" | ")])
def test_no_handle_shows_a_record(aviary: Aviary, attempt: str) -> None:
    """Every way to make a handle or a sealed tensor speak."""
    job = aviary.run(attempt)
    assert job.state in ("done", "failed")
    assert not found(str(job.told).encode() + str(job.outputs).encode())


@pytest.mark.parametrize("attempt", SYSTEM)
def test_the_session_finds_no_record(aviary: Aviary, attempt: str) -> None:
    """Nor is there one to find by other means: in the session's memory, files, neighbours."""
    paths = [str(path) for path in aviary.folder.rglob("*") if path.is_file()]
    names = {"folder": str(aviary.folder), "records": str(aviary.folder / "aviary.parquet")}
    job = aviary.run(SYSTEM[attempt].format(paths=paths, **names))
    assert not found(str(job.outputs).encode() + str(job.told).encode())


def test_the_researchers_side_is_told_nothing_either(aviary: Aviary) -> None:
    """Card, jobs, log, and another researcher's errors."""
    aviary.run("patients.count(epsilon=1)")
    told = [aviary.site.card(), aviary.site.jobs(), aviary.site._channel.call("log", {"start": 0})[0]]
    mine = aviary.site.jobs()[-1]["id"]
    for ask in (lambda: aviary.other.attach(mine), lambda: aviary.other.cancel(mine)):
        with pytest.raises(Exception, match="no such job"):
            ask()
    assert aviary.other.jobs() == []
    assert not found(str(told).encode())


def test_no_byte_that_left_the_curator_holds_the_canary(aviary: Aviary) -> None:
    """Everything it wrote since its start, answers and refusals together."""
    aviary.fill(lambda: sum(len(tap.heard) for tap in aviary.taps), 10_000)
    heard = b"".join(bytes(tap.heard) for tap in aviary.taps)
    assert len(heard) > 10_000
    assert not found(heard)


def test_no_byte_on_the_wire_holds_source_columns_keys_or_the_canary(aviary: Aviary) -> None:
    """Envelopes only: what was asked, by whom, of what, and what came back are sealed."""
    aviary.fill(lambda: len(aviary.proxy.wire), 100_000)
    wire = bytes(aviary.proxy.wire)
    assert len(wire) > 100_000
    key = str(aviary.site._channel.key.public).encode()
    for word in (b"patients.", b"epsilon", b"aviary", b'"age"', b"torch", key, key.split(b":")[1]):
        assert word not in wire
    assert not found(wire)


def test_a_replayed_cut_flipped_or_foreign_envelope_is_refused_and_the_site_goes_on(aviary: Aviary) -> None:
    """Each gets a plain typed error; the next honest request is answered."""
    envelope = aviary.proxy.posts[-1]
    flipped = bytearray(envelope)
    flipped[len(flipped) // 2] ^= 1
    for body in (envelope, envelope[:-1], envelope[:40], bytes(flipped), b"", b"RPS1", b"\x00" * 5000):
        request = urllib.request.Request(aviary.proxy.url + "/open", body, method="POST")
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(request)
        assert refusal.value.code == 400
        assert b'"kind":"SealError"' in refusal.value.read().replace(b" ", b"")
    assert aviary.run("print('still here')").state == "done"


def test_a_stranger_is_refused(aviary: Aviary) -> None:
    """A key that no project names gets no card."""
    from rapha_lab.protocol.errors import RaphaError

    with pytest.raises(RaphaError):
        hospital.connected(aviary.proxy.url, PrivateKey.create())


def test_the_search_has_teeth(tmp_path: Path) -> None:
    """A mechanism that put a record into its answer would be seen, in each form it could take."""
    from rapha_lab.protocol import messages

    for leak in (
        {"values": [NUMBER]},
        {"note": NAME},
        {"b64": base64.b64encode(f"x{NAME}".encode()).decode()},
    ):
        buffer = io.BytesIO()
        messages.write_frame(buffer, messages.encode(leak))
        tap = Tap(io.BytesIO(buffer.getvalue()))
        messages.read_frame(tap)  # type: ignore[arg-type]
        assert found(bytes(tap.heard))
    buffer = io.BytesIO()
    messages.write_frame(buffer, b"{}", struct.pack("<3f", 1.0, NUMBER, 2.0))
    assert found(buffer.getvalue())
