"""The Jupyter server extension: authenticated, patient, and without a traceback."""

import asyncio
import json
import threading

import pytest
from tornado.httpclient import HTTPClientError

from rapha_lab.notebook import server
from rapha_lab.protocol.errors import SiteError

POSTS = {"verify": {"data": {}, "metadata": {}}, "check": {"cells": []}, "jobs/demo/1/cancel": {}}


def _path(pattern):
    return pattern.replace("([^/]+)/([^/]+)", "demo/1")


class StubSite:
    """A site that behaves as badly as a test needs: the real one does not fail on demand."""

    name, url, simulated = "far", "https://far.example", False

    def __init__(self, act):
        self._act = act

    def card(self):
        return self._act()

    jobs = card

    def cancel(self, job):
        self._act()


def _raise(error):
    raise error


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in server.ROUTES])
async def test_a_stranger_is_turned_away_at_every_endpoint(pattern, jp_fetch):
    """Without the token, every route of ROUTES answers 403."""
    path = _path(pattern)
    body = POSTS.get(path)
    with pytest.raises(HTTPClientError) as refused:
        await jp_fetch(
            "rapha-lab",
            path,
            method="GET" if body is None else "POST",
            body=None if body is None else json.dumps(body),
            headers={"Authorization": "token wrong"},
        )
    assert refused.value.code == 403


async def test_every_route_of_ours_is_in_the_walk(jp_serverapp):
    """No handler of this package answers under a route that the walk above does not know."""
    ours = {
        rule.target
        for router in jp_serverapp.web_app.default_router.rules
        for rule in router.target.rules
        if getattr(rule.target, "__module__", "") == server.__name__
    }
    assert ours == {handler for _, handler in server.ROUTES}


async def test_a_machine_that_knows_no_site_gets_empty_lists(jp_fetch):
    """Nothing is known, so nothing is listed; that is no error."""
    for path in ("sites", "jobs"):
        response = await jp_fetch("rapha-lab", path)
        assert json.loads(response.body) == []


async def test_an_unsigned_output_is_not_verified(jp_fetch):
    """The answer is no, with a sentence."""
    body = json.dumps({"data": {"text/plain": "0.99"}, "metadata": {}})
    response = await jp_fetch("rapha-lab", "verify", method="POST", body=body)
    answer = json.loads(response.body)
    assert answer["verified"] is False
    assert answer["reason"].endswith(".")


async def test_a_silent_site_hides_no_other(jp_fetch, monkeypatch):
    """One site's failure becomes its card; the other card stands beside it."""
    good = StubSite(lambda: {"name": "near"})
    bad = StubSite(lambda: _raise(SiteError("The site does not answer.")))
    monkeypatch.setattr(server, "known_sites", lambda: [bad, good])
    cards = json.loads((await jp_fetch("rapha-lab", "sites")).body)
    assert [card["name"] for card in cards] == ["far", "near"]
    assert cards[0]["alive"] is False
    assert cards[0]["verdict"]["reasons"] == ["The site does not answer."]


async def test_a_site_that_hangs_is_given_up(jp_fetch, monkeypatch):
    """Its card says so in time, and the server has answered others meanwhile."""
    release = threading.Event()
    monkeypatch.setattr(server, "PATIENCE", 0.2)
    monkeypatch.setattr(server, "known_sites", lambda: [StubSite(release.wait)])
    (card,) = json.loads((await jp_fetch("rapha-lab", "sites")).body)
    release.set()
    assert card["alive"] is False


async def test_the_event_loop_is_never_blocked(jp_fetch, monkeypatch):
    """While a site sleeps in its thread, the loop serves another request."""
    entered, release = threading.Event(), threading.Event()

    def sleep():
        entered.set()
        release.wait(10)
        return {"name": "far"}

    monkeypatch.setattr(server, "known_sites", lambda: [StubSite(sleep)])
    waiting = asyncio.ensure_future(jp_fetch("rapha-lab", "sites"))
    while not entered.is_set():
        await asyncio.sleep(0.01)
    await jp_fetch("rapha-lab", "check", method="POST", body=json.dumps({"cells": []}))
    assert not waiting.done()
    release.set()
    assert json.loads((await waiting).body) == [{"name": "far"}]


async def test_a_bug_is_answered_without_a_traceback(jp_fetch, monkeypatch):
    """Whatever breaks, the browser reads one sentence and no line of code."""
    monkeypatch.setattr(server, "known_sites", lambda: _raise(RuntimeError("secret detail")))
    with pytest.raises(HTTPClientError) as failed:
        await jp_fetch("rapha-lab", "sites")
    reply = failed.value.response.body.decode()
    assert failed.value.code == 500
    assert set(json.loads(reply)) == {"message"}
    assert "secret detail" not in reply
    assert "Traceback" not in reply


async def test_cancelling_at_an_unknown_site_says_so(jp_fetch):
    """410 and a sentence, since 404 would read as an extension that is not there."""
    with pytest.raises(HTTPClientError) as failed:
        await jp_fetch("rapha-lab", "jobs", "nowhere", "1", "cancel", method="POST", body="{}")
    assert failed.value.code == 410
    assert "nowhere" in json.loads(failed.value.response.body)["message"]


async def test_a_malformed_request_names_the_missing_fields(jp_fetch):
    """400, and which fields are wanted."""
    with pytest.raises(HTTPClientError) as failed:
        await jp_fetch("rapha-lab", "verify", method="POST", body=json.dumps([1]))
    assert failed.value.code == 400
    assert "data, metadata" in json.loads(failed.value.response.body)["message"]


async def test_rows_are_found_through_the_endpoint(jp_fetch):
    """The check of a notebook's cells comes back with cell, output and reason."""
    table = "patient_id,age,sex\n1,50,F\n2,61,M\n3,47,F\n"
    cell = {
        "id": "c",
        "cell_type": "code",
        "source": "",
        "outputs": [{"output_type": "stream", "text": table}],
    }
    response = await jp_fetch("rapha-lab", "check", method="POST", body=json.dumps({"cells": [cell]}))
    (found,) = json.loads(response.body)
    assert (found["cell"], found["index"]) == ("c", 0)
    assert "patient_id" in found["reason"]
