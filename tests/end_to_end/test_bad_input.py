"""Bad input at a real site: each a typed error that names field and fix, and nothing is charged for what did not run."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ward import Ward

from rapha_lab.client.site import Job, Site
from rapha_lab.enclave import gateway
from rapha_lab.protocol import messages, sealing
from rapha_lab.protocol.errors import CellError, PolicyError, RaphaError, RequestError, SealError, from_wire
from rapha_lab.protocol.keys import PrivateKey, PublicKey

BEFORE = """
import torch
from torch import nn
F = ["age", "potassium", "visits", "sex"]
m = nn.Linear(4, 1)
class Made(nn.Module):
    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.how = nn.Linear(4, 1), forward
    def forward(self, x):
        return self.how(self.layer, x)
def fit(model=m, **changed):
    return patients.train.fit(model, **{"inputs": F, "target": "died", "epsilon": 1, **changed})
"""

# what is written in the cell: kind, field, and a word that what, why or instead must hold
CELLS: dict[str, tuple[str, str | None, str]] = {
    'patients.mean("agee", epsilon=1)': ("RequestError", "agee", "Did you mean age?"),
    'patients.mean("hospital_number", epsilon=1)': ("RequestError", "hospital_number", "never an input"),
    'patients.mean("chapter", epsilon=1)': ("RequestError", "chapter", "histogram"),
    "patients.mean(None, epsilon=1)": ("RequestError", "column", "no column"),
    'patients.mean(["age"], epsilon=1)': ("RequestError", "column", "no column"),
    'patients.histogram("age", bins=0, epsilon=1)': ("RequestError", "bins", "above 0"),
    'patients.histogram("age", bins=10**9, epsilon=1)': ("RequestError", "bins", "10000"),
    'patients.histogram("age", bins=2.5, epsilon=1)': ("RequestError", "bins", "whole"),
    "patients.count(epsilon=0)": ("RequestError", "epsilon", "above 0"),
    "patients.count(epsilon=-1)": ("RequestError", "epsilon", "above 0"),
    'patients.count(epsilon=float("nan"))': ("RequestError", "epsilon", "finite"),
    'patients.count(epsilon=float("inf"))': ("RequestError", "epsilon", "finite"),
    'patients.count(epsilon="1")': ("RequestError", "epsilon", "number"),
    "patients.count(epsilon=True)": ("RequestError", "epsilon", "number"),
    "patients.count(epsilon=1e-9)": ("RequestError", "epsilon", "range"),
    "patients.count(epsilon=1e9)": ("RequestError", "epsilon", "1000000"),
    "patients.count(epsilon=5000)": ("BudgetError", "epsilon", "is left"),
    "patients.count()": ("RequestError", "epsilon", "epsilon=0.1"),
    'fit(inputs=["age", "blood"])': ("RequestError", "blood", "no column"),
    'fit(target="dead")': ("RequestError", "dead", "died"),
    "fit(inputs=None)": ("RequestError", "inputs", "list of columns"),
    "fit(inputs=[])": ("RequestError", "inputs", "list of columns"),
    "fit(inputs=[1, 2])": ("RequestError", "column", "text"),
    "fit(nn.Linear(4, 1).double())": ("ProgramError", "model", "model.float()"),
    "fit(nn.Linear(3, 1))": ("ProgramError", "model", "shapes"),
    'fit(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 1)), inputs="age")': (
        "ProgramError",
        "model",
        ".cut([0, 1, 2])",
    ),
    "fit(loss=lambda p, t: (p - t).repeat(1, 3))": ("ProgramError", "loss", ".mean()"),
    "fit(loss=lambda p, t: torch.log(-1 - p * p).mean())": ("ProgramError", "loss", "clamp"),
    "fit(loss=lambda p, t: ((p - p.mean(0)) ** 2).mean())": ("ProgramError", "model", "mixes patients"),
    "fit(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))": (
        "ProgramError",
        "1",
        "GroupNorm",
    ),
    "fit(Made(lambda f, x: f(x - x.mean(0))))": ("ProgramError", "model", "mixes patients"),
    "fit(Made(lambda f, x: f(x) if x.sum() > 0 else -f(x)))": ("ProgramError", None, "torch.where"),
    "fit(Made(lambda f, x: f(x) * x.sum().item()))": ("ProgramError", "model", "mixes patients"),
    "fit(Made(lambda f, x: f(torch.linalg.svdvals(x.reshape(-1, 2, 2)).repeat(1, 2))))": (
        "ProgramError",
        "aten.linalg_svdvals.default",
        "published table",
    ),
    "fit(nn.Sequential(nn.Linear(4, 500), nn.Linear(500, 500), nn.Linear(500, 1)))": (
        "PolicyError",
        None,
        "100,000 at most",
    ),
    "fit(nn.Identity())": ("RequestError", "model", "nothing to train"),
    "fit(lambda x: x)": ("RequestError", "model", "nn.Module"),
    "fit(nn.Linear)": ("RequestError", "model", "nn.Module"),
    "fit(optimizer=torch.optim.LBFGS(m.parameters()))": ("RequestError", "optimizer", "adamw"),
    "fit(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters()))": (
        "RequestError",
        "optimizer",
        "model.parameters()",
    ),
    "fit(optimizer=torch.optim.SGD(m.parameters(), lr=1e30))": (
        "RequestError",
        "optimizer.settings.lr",
        "range",
    ),
    "fit(epochs=-1)": ("RequestError", "epochs", "between"),
    "fit(epochs=float('nan'))": ("RequestError", "epochs", "between"),
    "fit(epochs=1e9)": ("RequestError", "epochs", "between"),
    "fit(batch=10**9)": ("RequestError", "batch", "between"),
    "fit(batch='all')": ("RequestError", "batch", "between"),
    "fit(clip=0)": ("RequestError", "clip", "between"),
    "fit(clip_quantile=90)": ("RequestError", "clip_quantile", "below 1"),
    'patients.test.evaluate(m, ["auc"], inputs=F, target="died", epsilon=1)': (
        "RequestError",
        "metrics",
        "auroc",
    ),
    'patients.test.evaluate(m, [], inputs=F, target="died", epsilon=1)': ("RequestError", "metrics", "1"),
    'patients.test.evaluate(m, ["auroc"], inputs=F, target="age", epsilon=1)': (
        "RequestError",
        "target",
        "boolean",
    ),
    'patients.test.evaluate(nn.Linear(4, 1), ["auroc"], epsilon=1)': ("RequestError", "inputs", "inputs=..."),
    'patients.test.evaluate(nn.Linear(4, 2), ["auroc"], inputs=F, target="died", epsilon=1)': (
        "ProgramError",
        "program",
        "one logit",
    ),
    "next(patients.train.batches(size=10**9, epsilon=1))": ("RequestError", "batch", "between"),
    "next(patients.train.batches(epsilon=-1))": ("RequestError", "epsilon", "above 0"),
    "patients.head()": ("SealedError", None, "mock()"),
    "list(patients)": ("SealedError", None, "fit"),
    "import pickle; pickle.dumps(patients)": ("SealedError", None, "-o"),
    "len(patients)": ("SealedError", None, "count"),
    "patients.nothing": ("CellError", None, "it answers count"),
    "patients.age": ("CellError", None, 'pl.col("age")'),
    'patients.groupby("sex").count(epsilon=1)': ("CellError", None, "group_by, as in polars"),
    'patients.where(patients["age"] > 60)': ("SealedError", None, 'it is pl.col("age")'),
    "patients.columns": ("CellError", None, "cohort shows them"),
    'patients.quantile("age", 50, epsilon=1)': ("RequestError", "at", "0.95"),
    "fit({'weight': 1})": ("RequestError", "model", "load_state_dict"),
}


@pytest.fixture(scope="module")
def site(serving: Ward) -> Iterator[Site]:
    """One session for the whole file: if a case ended it, the next would miss what it defined."""
    site = serving.connect()
    site.run(BEFORE + "alive = 'still here'", "ward", session="bad").wait()
    yield site
    site.end_sessions("bad")


def failed(job: Job) -> RaphaError:
    """What a job ended with."""
    with pytest.raises(RaphaError) as caught:
        job.wait()
    return caught.value


@pytest.mark.parametrize("source", CELLS)
def test_a_cell_with_this_gets_a_typed_error_with_the_way_out(site, serving, source):
    """Its kind, its field, its line and what to write; the session goes on and nothing is charged."""
    before = serving.spent()
    error = failed(site.run(f"x = 1\n{source}\ny = 2", "ward", session="bad"))
    kind, field, says = CELLS[source]
    assert error.to_wire()["kind"] == kind
    assert error.field == field
    assert error.line == 2
    assert says in str(error)
    assert error.what
    assert error.what[-1] in ".?!" or kind in ("CellError", "ProgramError")
    assert serving.spent() == before
    assert site.run("print(alive)", "ward", session="bad").wait().outputs[0]["text"] == "still here\n"


def test_an_integer_is_embedded_as_the_error_says(site):
    """Its codes are those of the intervals it is cut into."""
    site.run(
        "import polars as pl\n"
        'coded = patients.with_columns(code=pl.col("visits").cut([0, 1, 2]))\n'
        "embedded = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 1))\n"
        'coded.train.fit(embedded, nn.BCEWithLogitsLoss(), inputs="code", target="died", epsilon=1, epochs=0.05)',
        "ward",
        session="bad",
    ).wait()


ORDERS: dict[str, tuple[dict[str, Any], type[RaphaError], str]] = {
    "an unknown dataset": ({"dataset": "wards"}, RequestError, "dataset"),
    "no dataset": ({"dataset": None}, RequestError, "dataset"),
    "another's project": ({"project": "q"}, PolicyError, "project"),
    "a source that is no text": ({"source": 5}, RequestError, "source"),
    "an epsilon that is text": ({"epsilon": "1"}, RequestError, "epsilon"),
    "names that are none": ({"outputs": [1]}, RequestError, "outputs"),
    "a field too many": ({"priority": 1}, RequestError, "priority"),
}


@pytest.mark.parametrize("what", ORDERS)
def test_an_order_with_this_is_refused(site, serving, what):
    """Before a session is started for it."""
    change, kind, field = ORDERS[what]
    order = {"session": "bad", "dataset": "ward", "source": "x = 1"} | change
    before = serving.spent(), len(site.jobs())
    with pytest.raises(kind) as caught:
        site._channel.call("run", order)
    assert field in (caught.value.field or "")
    assert (serving.spent(), len(site.jobs())) == before


@pytest.mark.parametrize(
    ("inputs", "blob"),
    [
        ({"values": {"x": {"kind": "tensor", "tensor": "x"}}}, b""),
        ({"values": {"x": {"kind": "tensor", "tensor": "x"}}}, b"\x80\x04not safetensors"),
        ({"values": {"x": {"kind": "pickle", "value": "gASVCg=="}}}, b""),
        ({"values": {"x": 5}}, b""),
        ({"values": [1]}, b""),
        ({"values": {"x": {"kind": "dict", "items": 3}}}, b""),
    ],
)
def test_malformed_values_are_an_error_of_the_cell(site, inputs, blob):
    """And leave the session as it was."""
    error = failed(site.run("x", "ward", session="bad", inputs=(inputs, blob)))
    assert isinstance(error, RequestError | CellError)
    assert site.run("print(alive)", "ward", session="bad").wait().outputs[0]["text"] == "still here\n"


def sealed(site: Site, kind: str, body: bytes, key: PrivateKey | None = None) -> RaphaError:
    """What the gateway says to a body sealed as an honest client would."""
    channel = site._channel
    envelope = sealing.seal_request(
        kind,
        body,
        to=PublicKey.parse(channel.binding.sealing_key),
        evidence_hash=channel.binding.identity(),
        researcher=key or channel.key,
        reply_to=channel._reply_key.public,
    )
    return _opened(site, envelope, httpx.post(site.url + "/open", content=envelope, trust_env=False))


def _opened(site: Site, envelope: bytes, response: httpx.Response) -> RaphaError:
    if response.status_code != 200:
        return from_wire(response.json())
    channel = site._channel
    to = PublicKey.parse(channel.binding.sealing_key)
    reply = sealing.open_reply(
        response.content, request=envelope, to=to, key=channel._reply_key, site=channel.site_key
    )
    frame = messages.read_frame(io.BytesIO(reply.body))
    assert frame is not None
    return from_wire(json.loads(frame[0])["error"])


def framed(header: bytes, blob: bytes = b"") -> bytes:
    """A message in its frame."""
    buffer = io.BytesIO()
    messages.write_frame(buffer, header, blob)
    return buffer.getvalue()


BODIES: dict[str, tuple[str, bytes, str]] = {
    "an unknown kind": ("records", framed(b"{}"), "kind"),
    "nothing": ("card", b"", ""),
    "no frame": ("run", b"not a frame of this protocol", ""),
    "half a prefix": ("run", framed(b"{}")[:7], ""),
    "a message cut short": ("run", framed(b'{"session": "s", "dataset": "ward", "source": "1"}')[:-9], ""),
    "a length beyond all bounds": ("run", framed(b"{}")[:4] + b"\xff" * 12, ""),
    "no JSON": ("run", framed(b"\xff\xfe"), ""),
    "a list": ("run", framed(b"[]"), ""),
    "deep nesting": ("watch", framed(b"[" * 100_000), ""),
    "deep nesting in a field": ("run", framed(b'{"inputs":' + b'{"a":' * 50_000), ""),
    "a cell that is a number": ("watch", framed(b'{"cell": 5}'), "cell"),
    "a cell of nobody": ("watch", framed(b'{"cell": "x"}'), "cell"),
    "a wait that is text": ("watch", framed(b'{"cell": "x", "wait": "long"}'), "wait"),
}


@pytest.mark.parametrize("what", BODIES)
def test_a_sealed_message_with_this_inside_is_refused(site, what):
    """By a sealed, typed answer; the site goes on."""
    kind, body, field = BODIES[what]
    error = sealed(site, kind, body)
    assert isinstance(error, RaphaError)
    assert "internal error" not in error.what
    assert field in (error.field or "")
    assert site.run("print(alive)", "ward", session="bad").wait().outputs[0]["text"] == "still here\n"


@pytest.mark.parametrize("start", [-1, -(10**30), 10**30, 1.5, None])
@pytest.mark.parametrize("what", ["log", "extends"])
def test_a_place_that_no_log_has_is_refused(site, what, start):
    """Naming the field; one that this log does not have yet gives nothing."""
    with pytest.raises(RequestError) as caught:
        site._channel.call(what, {"start": start})
    assert caught.value.field == "start"
    assert site._channel.call("log", {"start": 10**6})[0]["entries"] == []
    assert site._channel.call("extends", {"start": 10**6})[0]["checkpoint"]


@pytest.mark.parametrize("method", ["garbage", "empty", "a frame", "one byte", "JSON"])
def test_what_is_no_envelope_is_refused_in_the_clear(site, method):
    """With an error that depends on nothing inside the enclave."""
    body = {
        "garbage": bytes(range(256)) * 20,
        "empty": b"",
        "a frame": framed(b"{}"),
        "one byte": b"R",
        "JSON": b"{}",
    }
    response = httpx.post(site.url + "/open", content=body[method], trust_env=False)
    assert response.status_code == 400
    assert isinstance(from_wire(response.json()), SealError)


def test_an_envelope_beyond_the_limit_is_refused_before_it_is_held(site, monkeypatch):
    """However it is sent."""
    monkeypatch.setattr(gateway, "MAX_BODY", 100_000)
    for content in (b"x" * 200_000, (b"x" * 1000 for _ in range(200))):
        response = httpx.post(site.url + "/open", content=content, trust_env=False)
        assert response.status_code == 413
        assert "too large" in from_wire(response.json()).what
    assert site.run("print(alive)", "ward", session="bad").wait().outputs[0]["text"] == "still here\n"


@pytest.mark.parametrize("nonce", ["", "00", "zz" * 32, "00" * 33, "0" * 63, "é" * 64])
def test_evidence_for_no_nonce_is_refused(site, nonce):
    """Naming the field."""
    response = httpx.get(site.url + "/evidence", params={"nonce": nonce}, trust_env=False)
    assert response.status_code == 400
    assert from_wire(response.json()).field == "nonce"


def test_a_strangers_sealed_message_is_refused(site):
    """Without a word of which keys are known."""
    key = PrivateKey.create()
    error = sealed(site, "card", framed(b"{}"), key)
    assert isinstance(error, SealError | PolicyError)
    assert str(key.public) not in str(error)


def test_anothers_job_can_be_neither_watched_nor_cancelled(site, serving):
    """It is as if it were not there."""
    other = serving.connect(serving.other)
    job = site.run("import time; time.sleep(1); x = 1", "ward", session="bad")
    for call in ("watch", "cancel"):
        with pytest.raises(RequestError, match="no such job") as caught:
            other._channel.call(call, {"cell": job.id} if call == "watch" else {"id": job.id})
        assert caught.value.field == "cell"
    other.end_sessions("bad")
    other.end_sessions()
    assert job.wait().state == "done"
    assert other.jobs() == []
