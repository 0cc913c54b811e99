"""Forged requests written straight into a real curator's pipe: each is refused by name, nothing is charged."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hospital
import msgspec
import pytest
import torch
import ward
from hypothesis import given, settings
from hypothesis import strategies as st
from pipe import Pipe, piped, requests
from safetensors.torch import load, save
from ward import Ward

from rapha_lab.protocol import messages
from rapha_lab.protocol.errors import RequestError

Request = tuple[dict[str, Any], bytes]
DEEP = 100_000


@pytest.fixture(scope="module")
def honest(serving: Ward) -> dict[str, Request]:
    """One honest request of each kind."""
    return requests(serving)


@pytest.fixture(scope="module")
def pipe(serving: Ward, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipe]:
    """A curator with the ward's patients."""
    with piped(serving, tmp_path_factory.mktemp("forged")) as pipe:
        yield pipe


@pytest.fixture
def untouched(pipe: Pipe) -> Iterator[None]:
    """Afterwards nothing is charged, no job was opened, and the curator still answers."""
    before = pipe.books()
    yield
    assert pipe.books() == before
    assert pipe.look_up("checkpoint")
    assert pipe.process.poll() is None


def refused(reply: dict[str, Any], *kinds: str, field: str | None = None, says: str = "") -> None:
    """It is a typed error with the way out, and no internal one."""
    error = reply.get("error")
    assert error is not None, reply
    assert error["kind"] in (kinds or ("RequestError", "ProgramError", "PolicyError")), error
    assert "nternal error" not in str(error)
    assert error["what"]
    if field is not None:
        assert field in (error["field"] or ""), error
    assert says in f"{error['what']} {error['why']} {error['instead']}", error


MEAN = '{"op":"mean","dataset":"ward","split":"train","epsilon":%s,"column":"age"}'

MALFORMED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", ""),
    "null": (b"null", ""),
    "a number": (b"7", ""),
    "a list": (b"[]", ""),
    "text": (b'"count"', ""),
    "no op": (b'{"dataset":"ward","epsilon":1}', ""),
    "an unknown op": (b'{"op":"records","dataset":"ward","epsilon":1}', "op"),
    "an op that is a list": (b'{"op":["mean"],"dataset":"ward","epsilon":1}', ""),
    "an op twice": (b'{"op":"mean","op":"records","dataset":"ward","epsilon":1,"column":"age"}', ""),
    "a field too many": (b'{"op":"count","dataset":"ward","epsilon":1,"noise":0}', "noise"),
    "a field of another op": (b'{"op":"count","dataset":"ward","epsilon":1,"column":"age"}', "column"),
    "a field too few": (b'{"op":"mean","dataset":"ward","epsilon":1}', "column"),
    "epsilon of nothing": (MEAN.replace("%s", "0").encode(), "epsilon"),
    "epsilon below nothing": (MEAN.replace("%s", "-1").encode(), "epsilon"),
    "epsilon minus nothing": (MEAN.replace("%s", "-0.0").encode(), "epsilon"),
    "epsilon that is no number": (MEAN.replace("%s", "NaN").encode(), ""),
    "epsilon infinite": (MEAN.replace("%s", "Infinity").encode(), ""),
    "epsilon beyond floats": (MEAN.replace("%s", "1e400").encode(), ""),
    "epsilon large": (MEAN.replace("%s", "1e300").encode(), "epsilon"),
    "epsilon tiny": (MEAN.replace("%s", "1e-300").encode(), "epsilon"),
    "epsilon subnormal": (MEAN.replace("%s", "5e-324").encode(), "epsilon"),
    "epsilon as text": (MEAN.replace("%s", '"1"').encode(), "epsilon"),
    "epsilon null": (MEAN.replace("%s", "null").encode(), "epsilon"),
    "epsilon true": (MEAN.replace("%s", "true").encode(), "epsilon"),
    "epsilon a list": (MEAN.replace("%s", "[1]").encode(), "epsilon"),
    "epsilon left out": (b'{"op":"count","dataset":"ward"}', "epsilon"),
    "a thousand million bins": (
        b'{"op":"histogram","dataset":"ward","epsilon":1,"column":"age","bins":1000000000}',
        "bins",
    ),
    "no bins": (b'{"op":"histogram","dataset":"ward","epsilon":1,"column":"age","bins":0}', "bins"),
    "half a bin": (b'{"op":"histogram","dataset":"ward","epsilon":1,"column":"age","bins":1.5}', "bins"),
    "an unknown dataset": (b'{"op":"count","dataset":"wards","epsilon":1}', "dataset"),
    "a dataset with a path": (b'{"op":"count","dataset":"../ward","epsilon":1}', "dataset"),
    "an unknown column": (MEAN.replace("age", "name").replace("%s", "1").encode(), "name"),
    "the patients' identifier": (
        MEAN.replace("age", "hospital_number").replace("%s", "1").encode(),
        "hospital",
    ),
    "a column with a line's end": (MEAN.replace("age", "age\\n").replace("%s", "1").encode(), ""),
    "the mean of a category": (MEAN.replace("age", "chapter").replace("%s", "1").encode(), "chapter"),
    "an unknown split": (MEAN.replace("train", "everyone").replace("%s", "1").encode(), "split"),
    "a split that is a list": (MEAN.replace('"train"', '["train"]').replace("%s", "1").encode(), "split"),
    "not UTF-8": (b'{"op":"count","dataset":"\xff\xfe","epsilon":1}', ""),
    "UTF-16": ('{"op":"count","dataset":"ward","epsilon":1}'.encode("utf-16"), ""),
    "half a surrogate": (b'{"op":"count","dataset":"\\ud800","epsilon":1}', ""),
    "cut short": (b'{"op":"count","dataset":"ward","epsi', ""),
    "something behind": (b'{"op":"count","dataset":"ward","epsilon":1}{}', ""),
    "nested deeply": (b'{"op":"count","dataset":' + b"[" * DEEP + b"]" * DEEP + b"}", ""),
    "nested deeply in an unknown field": (b'{"op":"count","x":' + b"[" * DEEP + b"]" * DEEP + b"}", ""),
    "deep objects": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, ""),
    "a pickle": (pickle.dumps({"op": "count", "dataset": "ward", "epsilon": 1}), ""),
    "an enormous integer": (MEAN.replace("%s", "1" + "0" * 5000).encode(), ""),
    "steps of a loop nobody opened": (
        b'{"op":"gradient","loop":"x","inputs":{"x":"age"},"digest":"0"}',
        "loop",
    ),
    "the end of a loop nobody opened": (b'{"op":"close","loop":"job-1"}', "loop"),
}


@pytest.mark.usefixtures("untouched")
class TestMalformed:
    @pytest.mark.parametrize("what", MALFORMED)
    def test_this_is_refused(self, pipe, what):
        """By a typed error that names the field at fault where there is one."""
        request, field = MALFORMED[what]
        refused(pipe.ask(request), field=field)

    @pytest.mark.parametrize("depth", [200, 300, 400, 500, 700, 900, 940, 960, 980, 1000, 1500])
    def test_nesting_of_any_depth_harms_nothing(self, pipe, depth):
        """Near the interpreter's own limit too, wherever that is."""
        refused(pipe.ask(b'{"op":"fit","program":' + b'{"nodes":[' * depth + b"]}" * depth + b"}"))
        refused(pipe.ask(b"[" * depth + b"]" * depth))

    def test_frames_of_the_gateways_own_that_do_not_read_are_passed_over(self, pipe):
        """Even those, though no session can write one."""
        for header in (b"{}", b"[]", b"not json", b"\xff", b'{"do": 5, "id": "x"}', b"[" * DEEP):
            pipe.write(header)
        pipe.write({"do": "nothing", "id": "n"})
        assert "error" in pipe.hear("n")[0]

    def test_a_cancel_of_a_job_that_is_not_there_does_nothing(self, pipe):
        """Nor does sweeping a cell."""
        pipe.write({"do": "cancel", "id": "nobody's"})
        pipe.write({"do": "sweep", "id": ""})


class TestCallers:
    @pytest.mark.usefixtures("untouched")
    @pytest.mark.parametrize(
        "who", [{"researcher": "ed25519:" + "A" * 43}, {"researcher": ""}, {"project": "q"}]
    )
    def test_a_stranger_and_a_strange_project_are_refused(self, pipe, honest, who):
        """Whatever they ask."""
        for request, tensors in honest.values():
            refused(pipe.ask(request, tensors, **who), "PolicyError")

    def test_a_job_runs_once(self, pipe, honest):
        """Asked again it is the same release at no price; for another question the number is taken."""
        request, tensors = honest["mean"]
        first = pipe.ask(request, tensors, job="once")
        spent = pipe.books()
        again = pipe.ask(request, tensors, job="once")
        assert again["release"]["values"] == first["release"]["values"]
        refused(pipe.ask(request | {"column": "visits"}, tensors, job="once"), field="job")
        refused(pipe.ask(request | {"epsilon": 0.5}, tensors, job="once"), field="job")
        refused(pipe.ask(request, b"other tensors", job="once"), field="job")
        assert pipe.books() == spent

    def test_anothers_job_gives_nothing(self, pipe, honest, serving):
        """Neither for the same question nor for another."""
        request, tensors = honest["mean"]
        request |= {"epsilon": 0.125}  # not asked before, so that it opens a job
        pipe.ask(request, tensors, job="mine")
        spent = pipe.books()
        other = str(serving.other.public)
        refused(pipe.ask(request, tensors, job="mine", researcher=other), field="job")
        refused(pipe.ask(request | {"column": "visits"}, tensors, job="mine", researcher=other), field="job")
        assert pipe.books() == spent

    def test_anothers_loop_is_not_there(self, pipe, honest, serving):
        """It takes no step and is not closed."""
        opened = pipe.ask(*honest["open"])["release"]["loop"]
        other = str(serving.other.public)
        step = {"op": "gradient", "loop": opened, "inputs": {"x": "age"}, "digest": "0"}
        refused(pipe.ask(step, researcher=other), field="loop")
        refused(pipe.ask({"op": "close", "loop": opened}, researcher=other), field="loop")
        refused(pipe.ask(step), "ProgramError", field="program")
        assert pipe.ask({"op": "close", "loop": opened})["release"] == {}
        refused(pipe.ask({"op": "close", "loop": opened}), field="loop")


def changed(request: Request, change: Callable[[dict[str, Any]], None]) -> Request:
    """A deep copy with one thing changed."""
    asked = copy.deepcopy(request[0])
    change(asked)
    return asked, request[1]


def node(asked: dict[str, Any], k: int = 0) -> dict[str, Any]:
    """One of a request's operations."""
    return asked["program"]["nodes"][k]


PROGRAMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "an operation that is not in the table": lambda a: node(a).update(op="aten.svd.default"),
    "random numbers": lambda a: node(a).update(op="aten.bernoulli.default"),
    "an operation of no library": lambda a: node(a).update(op="os.system"),
    "a name to resolve": lambda a: node(a).update(op="torch.ops.aten.linear.default"),
    "a dunder": lambda a: node(a).update(op="__class__"),
    "an empty operation": lambda a: node(a).update(op=""),
    "a reference to nothing": lambda a: node(a).update(args=[{"ref": "nowhere"}]),
    "a reference to itself": lambda a: node(a).update(args=[{"ref": node(a)["id"]}]),
    "a reference forward": lambda a: node(a).update(args=[{"ref": node(a, -1)["id"]}]),
    "too few arguments": lambda a: node(a).update(args=[]),
    "too many arguments": lambda a: node(a).update(args=node(a)["args"] * 4),
    "arguments of other kinds": lambda a: node(a).update(args=[[1.5], None, "mean"]),
    "a keyword that is none": lambda a: node(a).update(kwargs={"out": {"ref": node(a)["id"]}}),
    "the same name twice": lambda a: a["program"]["nodes"].append(copy.deepcopy(node(a))),
    "an output that is not there": lambda a: a["program"].update(output="nowhere"),
    "no operations": lambda a: a["program"].update(nodes=[]),
    "a parameter too large": lambda a: a["program"]["parameters"][0].update(shape=[1 << 28, 4]),
    "a parameter of another shape": lambda a: a["program"]["parameters"][0].update(shape=[3]),
    "a parameter of no dtype": lambda a: a["program"]["parameters"][0].update(dtype="complex64"),
    "a parameter of another dtype": lambda a: a["program"]["parameters"][0].update(dtype="int64"),
    "a shape with a negative size": lambda a: a["program"]["parameters"][0].update(shape=[-1, 4]),
    "a parameter that is not sent": lambda a: a["program"]["parameters"].append(
        {"name": "ghost", "dtype": "float32", "shape": [1]}
    ),
    "an input of another shape": lambda a: a["program"]["inputs"][0].update(shape=[77]),
    "an input without columns": lambda a: a["inputs"].pop("x"),
    "columns without an input": lambda a: a["inputs"].update(more=["age"]),
    "an unknown column": lambda a: a["inputs"].update(x=["age", "potassium", "visits", "secret"]),
    "the patients' identifier as a column": lambda a: a["inputs"].update(
        x=["age", "potassium", "visits", "hospital_number"]
    ),
    "another version": lambda a: a["program"].update(version="rapha-program-0"),
    "a batch larger than all": lambda a: a.update(batch=1_000_000),
    "no steps": lambda a: a.update(steps=0),
    "too many steps": lambda a: a.update(steps=10**9),
    "no clipping": lambda a: a.update(clip=0),
    "infinite clipping": lambda a: a.update(clip=1e308),
    "an optimiser of no kind": lambda a: a["optimizer"].update(name="__import__"),
    "a setting of no kind": lambda a: a["optimizer"].update(settings={"lr": 1.0, "foreach": True}),
    "a setting out of range": lambda a: a["optimizer"].update(settings={"lr": 1e308}),
    "a negative learning rate": lambda a: a["optimizer"].update(settings={"lr": -1.0}),
    "an epsilon that no noise reaches": lambda a: a.update(epsilon=1e-7),
}

HEADER = (1 << 40).to_bytes(8, "little")
BLOBS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda b: b"",
    "a pickle": lambda b: pickle.dumps(load(b)),
    "torch.save": lambda b: _saved(load(b)),
    "an exported program": lambda b: _archive(),
    "cut short": lambda b: b[:-1],
    "half": lambda b: b[: len(b) // 2],
    "something behind": lambda b: b + b"\0",
    "a header beyond all bounds": lambda b: HEADER + b[8:],
    "a header that is no JSON": lambda b: (16).to_bytes(8, "little") + b"\xff" * 16,
    "a tensor too many": lambda b: save({**load(b), "ghost": torch.zeros(1)}),
    "a tensor too few": lambda b: save(dict(list(load(b).items())[1:])),
    "other shapes": lambda b: save({k: torch.zeros(2, 7) for k in load(b)}),
    "other dtypes": lambda b: save({k: t.double() for k, t in load(b).items()}),
    "whole numbers": lambda b: save({k: t.long() for k, t in load(b).items()}),
    "no numbers": lambda b: save({k: torch.full_like(t, math.nan) for k, t in load(b).items()}),
    "infinite numbers": lambda b: save({k: torch.full_like(t, math.inf) for k, t in load(b).items()}),
}


def _saved(tensors: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/models/model.json", "{}")
        archive.writestr("archive/data/weights/weight_0", pickle.dumps(print))
    return buffer.getvalue()


@pytest.mark.usefixtures("untouched")
class TestPrograms:
    @pytest.mark.parametrize("what", PROGRAMS)
    def test_a_fit_with_this_is_refused(self, pipe, honest, what):
        """Before a record is touched."""
        refused(pipe.ask(*changed(honest["fit"], PROGRAMS[what])))

    @pytest.mark.parametrize("what", BLOBS)
    @pytest.mark.parametrize("op", ["fit", "evaluate"])
    def test_tensors_that_are_this_are_refused_or_trained_on_as_they_are(self, pipe, honest, op, what):
        """No pickle is opened; weights that are no numbers make no model."""
        request, tensors = honest[op]
        refused(pipe.ask(request, BLOBS[what](tensors)))

    def test_a_pickle_that_would_run_is_not_run(self, pipe, honest, tmp_path):
        """Neither as the request nor as its tensors, plain or in an archive."""

        class Trap:
            def __reduce__(self) -> Any:
                return open, (str(tmp_path / "sprung"), "w")

        for trap in (pickle.dumps(Trap()), _saved({"w": Trap()})):  # type: ignore[dict-item]
            refused(pipe.ask(honest["fit"][0], trap))
            refused(pipe.ask(trap, honest["fit"][1]))
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize("metrics", [[], ["auroc"] * 99, ["records"], ["auroc", None], "auroc"])
    def test_metrics_outside_the_list_are_refused(self, pipe, honest, metrics):
        """It is a list, not a filter."""
        request, tensors = honest["evaluate"]
        refused(pipe.ask(request | {"metrics": metrics}, tensors))

    def test_an_evaluation_of_what_is_no_boolean_is_refused(self, pipe, honest):
        """Naming the column."""
        request, tensors = honest["evaluate"]
        refused(pipe.ask(request | {"target": "age"}, tensors), field="target")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_programs_never_meet_an_internal_error(pipe, honest, data):
    """One value anywhere in a request replaced by any other: refused by name, or answered and charged."""
    op = data.draw(st.sampled_from(["fit", "evaluate", "histogram", "mean", "open"]))
    request, tensors = copy.deepcopy(honest[op])
    where: Any = request
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = data.draw(st.sampled_from(keys))
        inner = where[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        where = inner
    odd = st.sampled_from(
        [
            None,
            True,
            0,
            -1,
            3,
            1e-9,
            2.5,
            2**40,
            2**63,
            "",
            "x",
            "nan",
            "age",
            [],
            [0],
            {},
            {"ref": "x"},
            "inf",
        ]
    )
    where[key] = data.draw(odd)
    if op == "fit" and isinstance(request.get("steps"), int) and request["steps"] > 50:
        return
    before = pipe.books()[1]
    reply = pipe.ask(request, tensors)
    if "error" in reply:
        refused(reply, "RequestError", "ProgramError", "PolicyError", "BudgetError", "RefusedError")
    if "error" in reply and reply["error"]["kind"] != "RefusedError":
        assert pipe.books()[1] == before
    elif op == "open" and "error" not in reply:
        pipe.ask({"op": "close", "loop": reply["release"]["loop"]})


@pytest.fixture(scope="module")
def poor(serving: Ward, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pipe, Path]]:
    """A curator with ε = 2 for each split."""
    folder = tmp_path_factory.mktemp("poor")
    config, key = hospital.prepare(folder, ward.SCHEMA, ward.frame(), "ward", epsilon=2.0)
    datasets = [msgspec.to_builtins(dataset) for dataset in config.datasets]
    with piped(serving, folder, policy=config.policy, datasets=datasets) as pipe:
        pipe.researcher = str(key.public)
        yield pipe, folder


class TestBudget:
    def test_many_at_once_never_overdraw(self, poor, honest):
        """What is granted fits, what is refused says what is left and what fits, and the log agrees."""
        pipe, _ = poor
        kinds = [honest["fit"], honest["mean"], honest["count"], honest["histogram"]]
        jobs = [
            # no two alike, since the same question has the same answer for nothing
            pipe.send(kinds[n % 4][0] | {"split": "train", "epsilon": 0.4 + n / 1e4}, kinds[n % 4][1])
            for n in range(60)
        ]
        replies = [pipe.hear(job)[0] for job in jobs]
        granted = [reply["release"] for reply in replies if "release" in reply]
        poorer = [reply["error"] for reply in replies if "error" in reply]
        assert 4 <= len(granted) < 60
        for error in poorer:
            assert error["kind"] == "BudgetError"
            assert "is left" in error["why"]
            assert "fits" in error["instead"]
        budget = pipe.look_up("catalog", researcher=pipe.researcher)[0]["budget"]["p"]["train"]
        assert budget["spent"] <= budget["epsilon"] == 2.0
        assert budget["jobs"] == len(granted)
        heads = [json.loads(entry) for entry in pipe.look_up("log")["entries"]]
        last = [e["accounts"]["p/ward/train"] for e in heads if "p/ward/train" in e.get("accounts", {})][-1]
        assert last["spent"] == pipe.books()[0]["train"]
        assert last["spent"] <= max(e["budget"] for e in heads if e.get("account") == "p/ward/train")

    def test_what_the_refusal_says_fits_fits(self, poor, honest):
        """To the last digit, and then nothing more of its size does."""
        pipe, _ = poor
        request, tensors = honest["mean"]
        error = pipe.ask(request | {"split": "train", "epsilon": 1.9}, tensors)["error"]
        fits = float(error["instead"].split("epsilon=")[1].rstrip("."))
        before = pipe.books()[0]["train"]
        assert "release" in pipe.ask(request | {"split": "train", "epsilon": fits}, tensors)
        assert pipe.books()[0]["train"] > before
        more = request | {"split": "train", "epsilon": fits, "column": "visits"}
        refused(pipe.ask(more, tensors), "BudgetError")

    def test_a_refused_request_touches_no_other_split(self, poor, honest):
        """All splits are charged, or none."""
        pipe, _ = poor
        before = pipe.books()
        request, tensors = honest["mean"]
        refused(pipe.ask(request | {"split": "all", "epsilon": 1.5}, tensors), "BudgetError")
        assert pipe.books() == before

    def test_a_loop_takes_no_more_steps_than_it_opened(self, poor, honest):
        """Its whole price is reserved; what it did not use is refunded when it is swept."""
        pipe, _ = poor
        request, _ = honest["open"]
        before = pipe.books()[0]["test"]
        opened = pipe.ask(request | {"split": "test", "steps": 2, "batch": 50, "epsilon": 0.5}, job="cell-1")
        program, tensors = honest["fit"]
        from rapha_lab.protocol.program import Program, digest

        name = digest(msgspec.convert(program["program"], Program))
        step = {
            "op": "gradient",
            "loop": opened["release"]["loop"],
            "inputs": program["inputs"],
            "digest": name,
            "program": program["program"],
        }
        assert "release" in pipe.ask(step, tensors)
        refused(pipe.ask(step | {"digest": "0" * 64}, tensors), "ProgramError", field="digest")
        assert "release" in pipe.ask(step | {"program": None}, tensors)
        refused(pipe.ask(step | {"program": None}, tensors), "BudgetError", "RequestError")
        reserved = pipe.books()[0]["test"] - before
        assert reserved > 0
        pipe.write({"do": "sweep", "id": "cell"})
        pipe.look_up("checkpoint")
        assert pipe.books()[0]["test"] - before == reserved
        refused(pipe.ask(step, tensors), field="loop")


def test_a_curator_whose_pipe_breaks_off_ends_and_the_next_has_its_books(serving, honest, tmp_path):
    """In the middle of a frame, of a request, or of a fit."""
    request, tensors = honest["fit"]
    whole = io.BytesIO()
    messages.write_frame(
        whole,
        messages.encode({"do": "ask", "id": "cut", "researcher": str(serving.key.public), "project": "p"}),
    )
    messages.write_frame(whole, json.dumps(request).encode(), tensors)
    for cut in (20, len(whole.getvalue()) - 1):
        with piped(serving, tmp_path) as pipe:
            before = pipe.books()
            assert pipe.process.stdin is not None
            pipe.process.stdin.write(whole.getvalue()[:cut])
            pipe.process.stdin.close()
            pipe.process.wait(30)
            assert pipe.books() == before
    with piped(serving, tmp_path) as pipe:
        assert "release" in pipe.ask(request, tensors, job="cut")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["op", "dataset", "split", "epsilon", "column", "bins", "program", "inputs", "x"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)
HONEST = b'{"op":"histogram","dataset":"ward","split":"train","epsilon":0.5,"column":"age","bins":11}'


class TestDecoding:
    def holds(self, data: bytes) -> None:
        """It is a request that means one thing, or a RequestError."""
        try:
            ask = messages.decode(data)
        except RequestError:
            pass
        else:
            assert messages.decode(messages.encode(ask)) == ask
            epsilon = getattr(ask, "epsilon", 1.0)
            assert 0 < epsilon <= 1e6

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=200))
    def test_any_bytes(self, data):
        """Of any kind."""
        self.holds(data)

    @settings(max_examples=300, deadline=None)
    @given(JSON)
    def test_any_json(self, value):
        """With the fields' names."""
        self.holds(json.dumps(value).encode())

    @settings(max_examples=500, deadline=None)
    @given(st.integers(0, len(HONEST) - 1), st.integers(0, 3), st.binary(min_size=1, max_size=3))
    def test_an_honest_request_with_a_few_bytes_changed(self, at, cut, by):
        """Replaced, inserted or removed."""
        self.holds(HONEST[:at] + by + HONEST[at + cut :])
