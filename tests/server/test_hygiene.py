"""The check for patients' rows, measured on sixty notebooks."""

import pytest
from corpus import CLEAN, LEAKY, corpus

from rapha_lab.notebook.hygiene import find_rows


def _judged(seed):
    return [(name, leaks, find_rows(cells)) for name, leaks, cells in corpus(seed)]


def test_the_corpus_is_half_leaky_and_half_clean():
    """Thirty each."""
    assert (len(LEAKY), len(CLEAN)) == (30, 30)


@pytest.mark.parametrize("seed", [20, 21, 22])
def test_at_least_95_percent_of_leaky_notebooks_are_found(seed):
    """Recall over the thirty leaky notebooks."""
    missed = [name for name, leaks, found in _judged(seed) if leaks and not found]
    assert len(missed) <= 0.05 * len(LEAKY), missed


@pytest.mark.parametrize("seed", [20, 21, 22])
def test_at_most_5_percent_of_clean_notebooks_are_doubted(seed):
    """False alarms over the thirty clean notebooks."""
    doubted = [(name, found) for name, leaks, found in _judged(seed) if not leaks and found]
    assert len(doubted) <= 0.05 * len(CLEAN), doubted


def test_a_finding_names_cell_output_and_reason():
    """So that the notebook can show where and say why."""
    (cells,) = [cells for name, _, cells in corpus() if name.endswith("pandas_head")]
    assert find_rows(cells) == [
        {"cell": "c0", "index": 0, "reason": "its column patient_id looks like an identifier of patients."}
    ]


def test_rows_pasted_into_a_cell_are_found_in_the_cell_itself():
    """Markdown and string literals count; their index is -1."""
    (cells,) = [cells for name, _, cells in corpus() if name.endswith("markdown_paste")]
    assert [found["index"] for found in find_rows(cells)] == [-1]


def test_reading_real_rows_into_a_mock_name_is_found():
    """A name that held mock patients and now holds a file's rows is no excuse."""
    (cells,) = [cells for name, _, cells in corpus() if name.endswith("mock_patients")]
    cells[1]["source"] = "mock = pl.read_csv('real.csv')\nmock"
    cells[1]["outputs"] = cells[0]["outputs"]
    assert [found["cell"] for found in find_rows(cells)] == ["c1"]


@pytest.mark.parametrize(
    ("text", "doubted"),
    [
        ("patient_id,score,predicted\n11,0.3,0\n12,0.8,1\n13,0.4,0\n", True),
        ("patient_id  age  sex\n0  0  12\n", False),
        ("feature,coef,se\nage,0.1,0.01\nsex,0.3,0.02\ncreatinine,0.2,0.01\n", False),
        ("sex,icd,n\nF,I10,40\nM,I10,55\nF,E11,23\n", False),
    ],
)
def test_scores_by_patient_are_rows_and_tables_of_groups_are_not(text, doubted):
    """An identifier outweighs a column of scores; without one, statistics and counts pass."""
    output = {"output_type": "stream", "text": text}
    found = find_rows([{"id": "c", "cell_type": "code", "source": "", "outputs": [output]}])
    assert bool(found) is doubted


@pytest.mark.parametrize("text", ["", "[" * 5000, '{"a": ' * 500, "│" * 1000, "a,b,c\n" * 3, "\x1b[31m"])
def test_odd_text_is_read_without_an_error(text):
    """The check never stops a notebook from being saved."""
    output = {"output_type": "stream", "text": text}
    assert find_rows([{"id": "c", "cell_type": "code", "source": text, "outputs": [output]}]) == []
