"""What whoever watches the wire learns of answers: the same size to a block, whatever they say and of however many patients."""

import pytest

BLOCK = 4096

FILTERS = [f"pl.col('age') > {n}" for n in (-1, 0, 7, 33.25, 50, 66, 90, 99.999)]
FILTERS += [f"pl.col('sex') == '{sex}'" for sex in "FM"]
ASKS = {
    "count": "count(epsilon=0.5)",
    "mean": "mean('age', epsilon=0.5)",
    "histogram": "histogram('visits', epsilon=0.5)",
}


def wire(serving, monkeypatch):
    """The lengths of all that the site answers from now on."""
    sizes, answer = list[int](), serving.site.gateway.answer

    def noted(envelope):
        response = answer(envelope)
        sizes.append(len(response.body))
        return response

    monkeypatch.setattr(serving.site.gateway, "answer", noted)
    return sizes


@pytest.mark.parametrize("ask", ASKS)
def test_ten_answers_of_one_kind_have_one_size_to_a_block(serving, monkeypatch, ask):
    """Of everybody, of half, of nobody: the released figures, and nothing else, may move it over one edge of a block."""
    mine, found = serving.connect(), set[int]()
    for words in FILTERS:
        job = mine.run(f"import polars as pl\npatients.where({words}).{ASKS[ask]}", "ward").wait()
        sizes = wire(serving, monkeypatch)
        mine.attach(job.id)
        found.add(max(sizes))
        monkeypatch.undo()
    assert max(found) - min(found) <= BLOCK


def test_what_a_session_prints_shows(serving, monkeypatch):
    """The measurement has teeth: what a session prints, which holds no record, moves the size."""
    mine, found = serving.connect(), set[int]()
    for source in ("print('x')", "print('x' * 9000)"):
        job = mine.run(source, "ward").wait()
        sizes = wire(serving, monkeypatch)
        mine.attach(job.id)
        found.add(max(sizes))
        monkeypatch.undo()
    assert max(found) - min(found) > BLOCK
