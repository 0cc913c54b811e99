"""A cell has no files, in the rehearsal as at the site: what opens one fails before anything is paid for."""

from __future__ import annotations

from pathlib import Path

import pytest
from ward import Ward

import rapha_lab
from rapha_lab.client.rehearsal import Rehearsal
from rapha_lab.protocol.errors import CellError
from rapha_lab.protocol.schema import Schema
from rapha_lab.session import parcels

SCHEMA = Schema.load(Path(rapha_lab.__file__).parent / "demo" / "flchain.toml")
CELL = """
import os
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import polars as pl

def tried(act):
    try:
        act()
    except BaseException as error:
        return type(error).__name__, str(error)
    return "passed", ""

figure = plt.figure()
told = {
    "write": tried(lambda: open("a.txt", "w")),
    "read": tried(lambda: open(r"FOLDER/here.csv")),
    "path": tried(lambda: Path(r"FOLDER/here.csv").read_text()),
    "array": tried(lambda: np.save("a.npy", np.zeros(2))),
    "figure": tried(lambda: figure.savefig("a.png")),
    "folder": tried(lambda: os.makedirs("runs", exist_ok=True)),
    "listing": tried(lambda: os.listdir(".")),
    "flags": tried(lambda: os.open("a.bin", os.O_CREAT | os.O_WRONLY)),
}
plt.close(figure)
kinds = sorted({kind for kind, _ in told.values()})
texts = [text for _, text in told.values()]
"""


def test_what_opens_a_file_fails_in_words_of_the_site(serving: Ward, tmp_path: Path) -> None:
    """Reading a file that is there, too: it is not there."""
    (tmp_path / "here.csv").write_text("a")
    cell = CELL.replace("FOLDER", str(tmp_path))
    rehearsal = Rehearsal()
    rehearsal.run(cell, SCHEMA, epsilon=None)
    there = serving.connect().run(cell, "ward", session="files", outputs=["kinds", "texts"]).wait()
    assert rehearsal.namespace["kinds"] == ["PermissionError"]
    assert parcels.unpack(there.values, there.blob) == {
        "kinds": ["PermissionError"],
        "texts": rehearsal.namespace["texts"],
    }
    assert (tmp_path / "here.csv").read_text() == "a"


def test_an_import_and_a_drawing_read_what_they_need() -> None:
    """Fonts, data of libraries and an import's cache are none of the cell's files."""
    cell = """
import matplotlib.pyplot as plt
import xml.dom.minidom, scipy.stats
plt.title("$x^2$")
plt.show()
"""
    Rehearsal().run(cell, SCHEMA, epsilon=None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import numpy; numpy.load('a.npy')", "Its records are patients"),
        ("import tensorboard", "leave it out"),
        ("import lightning", "patients.train.loader"),
        ("import torchvision", "load_state_dict"),
        ("import torch; torch.nn.Linear(1, 1).weight.grad_sample", "stays at the site"),
    ],
)
def test_the_error_says_what_to_write_instead(line: str, said: str) -> None:
    """One hint, the one that is meant."""
    with pytest.raises(CellError) as caught:
        Rehearsal().run(line, SCHEMA, epsilon=None)
    assert said in caught.value.traceback[-1]
    assert not any("installs none" in told for told in caught.value.traceback)
