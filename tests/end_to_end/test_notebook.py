"""Enclave cells in a real kernel, as a notebook runs them."""

from __future__ import annotations

import copy
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from rapha_lab.client import releases
from rapha_lab.protocol import messages

pytest.importorskip("sksurv", reason="the demonstration data are in the demo extra")

CONNECT = """
import rapha_lab as rapha
%load_ext rapha_lab
site = rapha.connect("demo")
cohort = site.dataset("flchain")
"""


class Notebook:
    """A kernel that runs one cell after another."""

    def __init__(self, home: Path) -> None:
        self.home, self.connected = home, list[nbformat.NotebookNode]()
        self._book = nbformat.v4.new_notebook()
        self._client = NotebookClient(self._book, timeout=120, allow_errors=True)
        self._client.extra_arguments = ["--log-level=40"]
        self._kernel = self._client.setup_kernel(env={**os.environ, "RAPHA_LAB_HOME": str(home)})

    def __enter__(self) -> Notebook:
        self._kernel.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._kernel.__exit__(*raised)  # type: ignore[arg-type]

    def run(self, source: str) -> list[nbformat.NotebookNode]:
        """The outputs of one cell."""
        cell = nbformat.v4.new_code_cell(source)
        self._book.cells.append(cell)
        self._client.execute_cell(cell, len(self._book.cells) - 1)
        return cell.outputs

    def value(self, expression: str) -> object:
        """What an expression is in the kernel, through JSON."""
        outputs = self.run(f"import json; print(json.dumps({expression}))")
        return json.loads("".join(output.get("text", "") for output in outputs))


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """A notebook connected to a demo site of its own."""
    home = tmp_path_factory.mktemp("home")
    with Notebook(home) as book:
        book.connected = book.run(CONNECT)
        assert not errors(book.connected)
        yield book


@pytest.fixture
def known(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process knows the sites that the notebook's user knows."""
    monkeypatch.setenv("RAPHA_LAB_HOME", str(notebook.home))


def errors(outputs: list[nbformat.NotebookNode]) -> list[str]:
    """Names of the errors among outputs."""
    return [output["ename"] for output in outputs if output["output_type"] == "error"]


def bundles(outputs: list[nbformat.NotebookNode], kind: str) -> list[dict]:
    """The bundles of one MIME type."""
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def said(outputs: list[nbformat.NotebookNode]) -> str:
    """All that outputs and errors say."""
    lines = [line for output in outputs for line in output.get("traceback", [])]
    return "\n".join([*lines, *(str(output.get("text", "")) for output in outputs)])


def test_connecting_says_what_is_waited_for(notebook: Notebook) -> None:
    """In one line, which ends with how long it took, after one on a slow load; nothing once the site is up."""
    *slow, line = (output["data"]["text/plain"] for output in notebook.connected)
    assert re.fullmatch(r"Connected to demo after \d+ s\.", line)
    assert all(re.fullmatch(r"Loaded after \d+ s\.", text) for text in slow)
    assert not notebook.run('again = rapha.connect("demo")')


def test_an_aggregate_shows_a_release_once(notebook: Notebook) -> None:
    """Value, error bar, price and receipt; the last expression does not show it again."""
    outputs = notebook.run("%%enclave flchain\npatients.mean('age', epsilon=0.2)")
    (card,) = bundles(outputs, "application/vnd.rapha.release+json")
    assert len(outputs) == 1
    assert 55 < card["rows"][0]["value"] < 75
    assert card["epsilon"] == 0.2
    assert card["receipt"]["index"] > 0
    assert {"text/html", "text/plain"} < set(outputs[0]["data"])


def test_a_blocked_cell_shows_a_card_and_one_line(notebook: Notebook) -> None:
    """What, why, what to ask instead, and a cell to insert; in three forms."""
    outputs = notebook.run("%%enclave flchain\nx = 1\npatients.head()")
    (card,) = bundles(outputs, "application/vnd.rapha.blocked+json")
    assert card["line"] == 2
    assert card["suggestion"].startswith("%%enclave flchain\n")
    assert errors(outputs) == ["SealedError"]
    assert "[blocked]" in bundles(outputs, "text/plain")[0]


def test_what_was_printed_before_a_block_stands_in_the_card(notebook: Notebook) -> None:
    """Above it, and said to be of made-up patients; without a picture of them. Above a traceback too."""
    source = "print('so far')\npatients.histogram('age', epsilon=0.1)\npatients.head()"
    outputs = notebook.run(f"%%enclave flchain\n{source}")
    (card,) = bundles(outputs, "application/vnd.rapha.blocked+json")
    assert card["said"].startswith("so far")
    assert len(outputs) == 2
    first, second = outputs[0]["data"]["text/plain"].splitlines()[:2]
    assert "made-up patients" in first
    assert second == "so far"
    assert "<pre>so far" in outputs[0]["data"]["text/html"]
    (error,) = notebook.run("%%enclave flchain\nprint('<so> far')\n1 / 0")
    assert "\n".join(error["traceback"]).index("<so> far") < "\n".join(error["traceback"]).index(
        "ZeroDivisionError"
    )


def test_a_slow_rehearsal_says_so_and_its_card_makes_room(notebook: Notebook) -> None:
    """For a first answer, or for an error; nothing is left of it."""
    slow = "%%enclave flchain\nimport time; time.sleep(2.5)\n"
    asked = notebook.run(slow + "patients.test.count(epsilon=0.03)")
    assert len(asked) == 1
    assert bundles(asked, "application/vnd.rapha.release+json")
    code = "seen = []; out = get_ipython().display_pub; put, out.publish = out.publish, lambda **b: (seen.append(b), put(**b))[1]"
    notebook.run(code)
    assert len(notebook.run(slow + "1 / 0")) == 1
    states = "[b['data']['application/vnd.rapha.job+json']['state'] for b in seen]"
    assert notebook.value(states) == ["rehearsing"]
    notebook.run("out.publish = put")


def test_a_loop_says_what_it_does_from_the_start(notebook: Notebook) -> None:
    """In a slow rehearsal which of its few steps it is at; at the site what is done before the first."""
    code = "seen = []; out = get_ipython().display_pub; put, out.publish = out.publish, lambda **b: (seen.append(b), put(**b))[1]"
    notebook.run(code)
    notebook.run(
        "%%enclave flchain\nimport torch, time\nfrom torch import nn\nmodel = nn.Linear(1, 1)\ntime.sleep(2.5)\n"
        "for n, batch in enumerate(patients.train.batches(size=500, epochs=0.5, epsilon=0.05)):\n"
        "    time.sleep(1.2 if n == 0 else 0)\n"
        "    nn.functional.binary_cross_entropy_with_logits(model(batch[['age']])[:, 0], batch['death']).backward()"
    )
    cards = "[b['data']['application/vnd.rapha.job+json'] for b in seen if 'application/vnd.rapha.job+json' in b['data']]"
    fields = "(c['state'], c.get('doing'), c.get('step'), c.get('steps'))"
    told = [tuple(each) for each in notebook.value(f"[{fields} for c in {cards}]")]
    rehearsed = [each[1:] for each in told if each[0] == "rehearsing"]
    assert (messages.PREPARES, 0, 3) in rehearsed
    assert ("running", messages.PREPARES, 0, 0) in told
    assert ("", 1, 3) in rehearsed
    notebook.run("out.publish = put")


def test_what_was_shown_stays_when_a_question_follows_a_training(notebook: Notebook) -> None:
    """The card of a training takes no answer's place, and no answer takes the training's."""
    training = (
        "import torch, time\nmodel = torch.nn.Linear(1, 1)\n"
        "patients.train.fit(model, inputs=['age'], target='death', epsilon=0.05, batch=1000, epochs=5)\n"
    )
    outputs = notebook.run(
        "%%enclave flchain\n" + training + "time.sleep(1)\npatients.test.count(epsilon=0.04)"
    )
    assert len(bundles(outputs, "application/vnd.rapha.release+json")) == 2
    assert len(bundles(outputs, "application/vnd.rapha.job+json")) == 1


def test_what_a_slow_rehearsal_showed_stays_when_it_fails(notebook: Notebook) -> None:
    slow = "import time; time.sleep(2.5)\nprint('so far'); time.sleep(0.5)\nprint(1)\n"
    outputs = notebook.run(f"%%enclave flchain --rehearse-only\n{slow}patients.head()")
    assert "so far" in str(bundles(outputs, "text/plain"))


def test_jobs_show_as_a_table_and_are_a_list(notebook: Notebook) -> None:
    """Number, dataset, state, steps, ε, and the line that tells most of the cell."""
    notebook.run("%%enclave flchain\npatients.validation.count(epsilon=0.07)")
    (output,) = notebook.run("jobs = site.jobs(); jobs")
    head, *rows, attach = output["data"]["text/plain"].splitlines()
    assert head.split() == ["job", "begun", "dataset", "state", "steps", "ε", "spent", "cell"]
    assert "0.07 of 0.07  patients.validation.count(epsilon=0.07)" in rows[-1]
    assert "site.attach" in attach
    assert output["data"]["text/html"].count("<tr>") == len(rows) + 1
    assert notebook.value("[len(jobs), jobs[-1]['state'], isinstance(jobs, list)]") == [
        len(rows),
        "done",
        True,
    ]


def test_a_typo_is_caught_before_anything_is_sent(notebook: Notebook) -> None:
    """The rehearsal fails, the site has no job of it, and no budget is spent."""
    before = notebook.value("[len(site.jobs()), cohort.budget['tutorial']['train']['spent']]")
    outputs = notebook.run("%%enclave flchain\npatients.train.mean('agee', epsilon=0.1)")
    assert errors(outputs) == ["RequestError"]
    assert "age" in str(bundles(outputs, "text/plain"))
    assert notebook.value("[len(site.jobs()), cohort.budget['tutorial']['train']['spent']]") == before


def test_without_rehearsal_the_site_itself_refuses(notebook: Notebook) -> None:
    """The same error comes from there, and nothing is charged."""
    before = notebook.value("cohort.budget['tutorial']['train']['spent']")
    outputs = notebook.run("%%enclave flchain --no-rehearsal\npatients.train.mean('agee', epsilon=0.1)")
    assert errors(outputs) == ["RequestError"]
    assert notebook.value("cohort.budget['tutorial']['train']['spent']") == before


def test_rehearse_only_shows_made_up_results_and_sends_nothing(notebook: Notebook) -> None:
    """It prints what it would, and the site has no new job."""
    before = notebook.value("len(site.jobs())")
    outputs = notebook.run("%%enclave flchain --rehearse-only\nprint('here')\npatients.count(epsilon=0.1)")
    assert "here" in str(outputs)
    assert "Nothing was sent" in str(outputs)
    assert notebook.value("len(site.jobs())") == before


@pytest.mark.parametrize(
    "line",
    [
        "",
        "flchain --epsilon nan",
        "flchain --epsilon 0",
        "flchain --epsilon x",
        "flchain -o 1a",
        "flchain --wat",
        "'",
    ],
)
def test_a_malformed_line_says_how_to_write_it(notebook: Notebook, line: str) -> None:
    """No traceback of ours, but the usage."""
    outputs = notebook.run(f"%%enclave {line}\n1")
    assert errors(outputs) == ["RequestError"]
    assert "%%enclave DATASET" in str(outputs)


def test_values_come_back_as_ordinary_objects_and_go_there(notebook: Notebook) -> None:
    """A module's weights are loaded into the rehearsed module; what goes with -i is there."""
    notebook.run("columns = ['age', 'sex']")
    source = """%%enclave flchain --epsilon 1 -i columns -o model,history,note
import torch
model = torch.nn.Linear(len(columns), 1)
history = patients.train.fit(model, inputs=columns, target='death', epochs=2)
note = {'columns': columns, 'tensor': torch.arange(3), 'inf': float('inf')}"""
    assert not errors(notebook.run(source))
    assert notebook.value(
        "[type(model).__name__, list(model.weight.shape), note['columns'], note['inf'] > 1e300]"
    ) == [
        "Linear",
        [1, 2],
        ["age", "sex"],
        True,
    ]
    assert notebook.value("[history.op, history.steps > 1, bool((model.weight != 0).all())]") == [
        "fit",
        True,
        True,
    ]


def test_a_module_goes_there_again_and_a_rehearsal_leaves_the_one_here_alone(notebook: Notebook) -> None:
    """Its weights are loaded into the session's own module; the steps on made-up patients are taken on a copy."""
    cell = "import torch\nmodule = torch.nn.Linear(2, 1)"
    assert not errors(notebook.run(f"%%enclave flchain -o module\n{cell}"))
    notebook.run("import torch\nwith torch.no_grad(): _ = module.weight.fill_(7.0)")
    fit = "patients.train.fit(module, inputs=['age', 'sex'], target='death', epochs=1, epsilon=0.5)"
    outputs = notebook.run(f"%%enclave flchain -i module\nprint(module.weight.tolist())\n{fit}")
    assert "[[7.0, 7.0]]" in str(outputs)
    assert notebook.value("module.weight.tolist()") == [[7.0, 7.0]]


def test_a_mistake_in_a_plain_cell_shows_the_cells_line_and_no_frame_of_ours(notebook: Notebook) -> None:
    """Its own line, what is wrong, why, and what to do."""
    outputs = notebook.run("def ask():\n    return site.dataset('nowhere')\nask()")
    (error,) = [output for output in outputs if output["output_type"] == "error"]
    text = "\n".join(error["traceback"])
    assert "has no dataset 'nowhere'" in text
    assert "site.dataset('nowhere')" in text
    assert "rapha_lab" not in text


def test_an_error_of_the_cell_reads_as_a_local_one(notebook: Notebook) -> None:
    """Type, message and the line of the cell; no frame of ours."""
    outputs = notebook.run("%%enclave flchain --no-rehearsal\nx = 1\ny = x / 0")
    (error,) = [output for output in outputs if output["output_type"] == "error"]
    text = "\n".join(error["traceback"])
    assert "ZeroDivisionError" in text
    assert "line 2" in text
    assert "rapha_lab" not in text


@pytest.mark.usefixtures("known")
def test_outputs_verify_and_edited_ones_do_not(notebook: Notebook) -> None:
    """A print, a rich value and a release; then one character of each is changed."""
    outputs = notebook.run("%%enclave flchain\nprint('plain words')\npatients.count(epsilon=0.1)")
    assert len(outputs) == 2
    for output in outputs:
        good, why = releases.verify_output(output["data"], output["metadata"])
        assert good, why
        edited = copy.deepcopy(output["data"])
        edited["text/plain"] = edited["text/plain"].replace("p", "q", 1)
        assert not releases.verify_output(edited, output["metadata"])[0]
        moved = copy.deepcopy(output["metadata"])
        moved["rapha"]["index"] += 1
        assert not releases.verify_output(output["data"], moved)[0]
    assert not releases.verify_output(outputs[0]["data"], {})[0]


def test_connecting_again_gives_the_same_site(notebook: Notebook) -> None:
    """One demo site for one user, however often it is connected to."""
    assert notebook.value("[rapha.connect('demo') is site, rapha.connect('demo').url == site.url]") == [
        True,
        True,
    ]


def test_a_job_can_be_attached_to_by_its_number(notebook: Notebook) -> None:
    """Jobs live at the site; attaching gives their outputs anew."""
    notebook.run("%%enclave flchain\nprint('still here')")
    assert notebook.value(
        "[o['data']['text/plain'] for o in site.attach(site.jobs()[-1]['id']).wait().outputs]"
    ) == ["still here"]


def test_a_job_whose_kernel_is_gone_still_brings_its_values(notebook: Notebook) -> None:
    """Its state is told at once; modules come into ones of that name, and a wrong number is refused."""
    notebook.run(
        "%%enclave flchain -o seen,layer\nimport torch\nseen = [1, 2]\nlayer = torch.nn.Linear(2, 1)"
    )
    notebook.run("import torch\njob = site.attach(site.jobs()[-1]['id'])\nmine = torch.nn.Linear(2, 1)")
    assert notebook.value("[job.state, job.bring()['seen'], list(job.bring()['layer'])]") == [
        "done",
        [1, 2],
        ["weight", "bias"],
    ]
    assert notebook.value(
        "[job.bring(layer=mine)['layer'] is mine, torch.equal(mine.weight, layer.weight)]"
    ) == [
        True,
        True,
    ]
    assert "no such job" in said(notebook.run("site.attach('no such number')"))
    assert "brings seen, layer" in said(notebook.run("job.bring(model=mine)"))


def test_a_name_of_a_refused_cell_is_explained(notebook: Notebook) -> None:
    """Nothing of that cell is kept, so that the rehearsal finds the next one's lack before anything is sent."""
    notebook.run("%%enclave flchain\nheight = 3\npatients.head()")
    jobs = notebook.value("len(site.jobs())")
    told = said(notebook.run("%%enclave flchain\nheight + 1"))
    assert "NameError: name 'height' is not defined" in told
    assert "The cell that defines height was refused" in told
    assert "Run it again first." in told
    assert notebook.value("len(site.jobs())") == jobs
    notebook.run("%%enclave flchain\nheight = 3")
    assert "NameError" not in said(notebook.run("%%enclave flchain\nheight + 1"))
    assert "refused" not in said(notebook.run("%%enclave flchain\nwidth + 1"))


def test_a_name_that_was_only_rehearsed_is_explained(notebook: Notebook) -> None:
    """The rehearsal knows it and the site does not: the error says which cell to run again."""
    notebook.run("%%enclave flchain --rehearse-only\ndepth = 3")
    told = said(notebook.run("%%enclave flchain\ndepth + 1"))
    assert "depth is only in the rehearsal" in told
    assert "Run that cell again first." in told


def test_a_name_of_the_notebook_is_told_how_to_send_it(notebook: Notebook) -> None:
    """By -i, or where it does not travel by defining it in an enclave cell."""
    notebook.run("import math as arithmetic\nlengths = [1, 2]")
    assert "-i lengths on the cell's first line" in said(notebook.run("%%enclave flchain\nlengths[0]"))
    assert "define it in an enclave cell" in said(notebook.run("%%enclave flchain\narithmetic.pi"))


@pytest.mark.parametrize(
    ("line", "told"),
    [("depths = 3", "deepness is not defined"), ("deepness = print", "deepness does not travel")],
)
def test_what_cannot_come_back_is_found_before_anything_is_paid(
    notebook: Notebook, line: str, told: str
) -> None:
    """A slip in -o, or a value that does not travel, costs no ε."""
    before = notebook.value("len(site.jobs())")
    cell = f'%%enclave flchain -o deepness\n{line}\npatients.mean("age", epsilon=0.01)'
    outputs = notebook.run(cell)
    assert told in said(outputs)
    assert ("Of a job of an earlier kernel" in str(bundles(outputs, "text/plain"))) == ("not defined" in told)
    assert notebook.value("len(site.jobs())") == before


def test_what_a_cancelled_loop_had_learnt_can_be_brought(notebook: Notebook) -> None:
    """Its steps were paid for: the error says how, and the session has the weights."""
    notebook.run(
        """
import threading, time
def stop():
    while not (site.jobs() and site.jobs()[-1]["state"] == "running" and site.jobs()[-1]["step"] > 0):
        time.sleep(0.05)
    site.cancel(site.jobs()[-1]["id"])
threading.Thread(target=stop, daemon=True).start()
"""
    )
    loop = """%%enclave flchain --epsilon 0.05 -o learnt
import torch
learnt = torch.nn.Linear(1, 1)
torch.nn.init.zeros_(learnt.weight)
for batch in patients.train.batches(size=100, epochs=300):
    torch.nn.functional.mse_loss(learnt(batch[["age"]]).squeeze(), batch["creatinine"]).backward()
    torch.optim.SGD(learnt.parameters(), lr=0.1).step()
"""
    assert "%%enclave flchain -o model brings" in said(notebook.run(loop))
    notebook.run("%%enclave flchain -o learnt\nlearnt")
    assert notebook.value("bool(learnt.weight != 0)") is True


def test_own_patients_with_an_unlisted_category_are_refused(notebook: Notebook) -> None:
    """Elsewhere it would be taken for the first category without a word."""
    notebook.run(
        "import polars as pl\ndef own(*sex): return cohort.inputs(pl.DataFrame({'sex': sex}), 'sex')"
    )
    assert notebook.value("own('M', 'F').tolist()") == [1, 0]
    assert "sex is never 'female'" in said(notebook.run("own('M', 'female')"))
    assert "polars.from_pandas" in said(notebook.run("cohort.inputs({'sex': ['M']}, 'sex')"))


def test_a_dataset_says_where_its_records_are(notebook: Notebook) -> None:
    """Whoever tries a frame's methods is told what there is instead."""
    assert "cohort.mock() makes patients up" in said(notebook.run("cohort.head()"))
    assert notebook.value("'connect' in dir(rapha)") is True


def test_the_sites_processes_end_with_the_kernel(tmp_path: Path) -> None:
    """Gateway, curator and sessions are gone some seconds after the last kernel that held them."""
    with Notebook(tmp_path) as book:
        book.run(CONNECT)
        pid = json.loads((tmp_path / "demo" / "site.json").read_text())["pid"]
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert children
    until = time.monotonic() + 30
    alive = [pid, *map(int, children)]
    while time.monotonic() < until and any(Path(f"/proc/{each}").exists() for each in alive):
        time.sleep(0.2)
    assert not [each for each in alive if Path(f"/proc/{each}").exists()]
