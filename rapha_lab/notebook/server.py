"""What the front end asks the Jupyter server: sites, jobs, signatures, and the check for patients' rows.

It works without a kernel, holds the researcher's key handle through the client, and never a record. Every
handler is authenticated; whatever waits for a site or reads the disk does so in a thread.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import responses
from typing import Any, TypeVar

import tornado.web
from jupyter_server.base.handlers import APIHandler
from jupyter_server.serverapp import ServerApp
from jupyter_server.utils import url_path_join

from rapha_lab.notebook.hygiene import find_rows
from rapha_lab.protocol.errors import RaphaError

__all__ = ["ROUTES"]

PATIENCE = 20.0
_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="rapha-lab")
_Answer = TypeVar("_Answer")


def known_sites() -> list[Any]:
    """The sites this machine knows; imported late, so that Jupyter starts as fast as before."""
    from rapha_lab.client import site

    return site.known()


def verify_output(data: dict[str, Any], metadata: dict[str, Any]) -> tuple[bool, str]:
    """Whether an output is signed by the site it names, and if not, why."""
    from rapha_lab.client import releases

    return releases.verify_output(data, metadata)


async def in_thread(call: Callable[..., _Answer], *args: Any) -> _Answer:
    """The answer of a call that may block; after `PATIENCE` seconds, a TimeoutError."""
    future = asyncio.get_running_loop().run_in_executor(_threads, call, *args)
    return await asyncio.wait_for(future, PATIENCE)


class Handler(APIHandler):
    """Answers in JSON; a failure is a sentence, never a traceback."""

    def answer(self, content: Any) -> None:
        """Send `content` as JSON; it changes all the time, so no cache may keep it."""
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps(content, allow_nan=False))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Say what went wrong in one sentence; the rest is in the server's log."""
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"message": self._sentence(status_code, kwargs.get("exc_info"))}))

    def _sentence(self, status_code: int, exc_info: Any) -> str:
        error = exc_info[1] if exc_info else None
        if isinstance(error, TimeoutError):
            return "The site did not answer in time."
        if isinstance(error, RaphaError):
            return str(error)
        if isinstance(error, tornado.web.HTTPError) and error.reason:
            return error.reason
        return f"The Jupyter server could not answer: {responses.get(status_code, 'error').lower()}."

    def body(self, *fields: str) -> list[Any]:
        """The fields of the JSON object that was sent; 400 if it is none or one is missing."""
        content = self.get_json_body()
        if not isinstance(content, dict) or not all(field in content for field in fields):
            raise tornado.web.HTTPError(400, reason=f"The request needs the fields {', '.join(fields)}.")
        return [content[field] for field in fields]


class Sites(Handler):
    """GET: one card for each known site, whether it answers or not."""

    @tornado.web.authenticated
    async def get(self) -> None:
        sites = await in_thread(known_sites)
        self.answer(await asyncio.gather(*map(_card, sites)))


async def _card(site: Any) -> dict[str, Any]:
    try:
        return await in_thread(site.card)
    except (RaphaError, OSError) as error:
        # OSError includes TimeoutError; one silent site must not hide the others.
        return {
            "name": str(getattr(site, "name", "")),
            "url": str(getattr(site, "url", "")),
            "simulated": bool(getattr(site, "simulated", False)),
            "verdict": {"status": "not known now", "reasons": [str(error) or "It did not answer in time."]},
            "measurement": "",
            "policy": {"name": "", "hash": "", "signers": [], "expires": ""},
            "tier": None,
            "alive": False,
            "datasets": [],
        }


class Jobs(Handler):
    """GET: the jobs of all sites that answer, newest first as each site lists them."""

    @tornado.web.authenticated
    async def get(self) -> None:
        sites = await in_thread(known_sites)
        lists = await asyncio.gather(*map(_jobs, sites))
        self.answer([job for jobs in lists for job in jobs])


async def _jobs(site: Any) -> list[dict[str, Any]]:
    try:
        return await in_thread(site.jobs)
    except (RaphaError, OSError):
        return []


class Cancel(Handler):
    """POST: ask a site to cancel a job; what ran is settled and stays spent."""

    @tornado.web.authenticated
    async def post(self, name: str, job: str) -> None:
        site = next((site for site in await in_thread(known_sites) if site.name == name), None)
        if site is None:
            raise tornado.web.HTTPError(410, reason=f"No site of the name {name} is known on this computer.")
        await in_thread(site.cancel, job)
        self.answer({"cancelled": True})


class Verify(Handler):
    """POST {data, metadata} of an output: whether the site it names signed it, and if not, why."""

    @tornado.web.authenticated
    async def post(self) -> None:
        data, metadata = self.body("data", "metadata")
        verified, reason = await in_thread(verify_output, data, metadata)
        self.answer({"verified": bool(verified), "reason": str(reason)})


class Check(Handler):
    """POST {cells} of a notebook: which outputs look like patients' rows. Nothing of them is kept."""

    @tornado.web.authenticated
    async def post(self) -> None:
        (cells,) = self.body("cells")
        self.answer(await in_thread(find_rows, cells))


ROUTES: list[tuple[str, type[Handler]]] = [
    ("sites", Sites),
    ("jobs", Jobs),
    ("jobs/([^/]+)/([^/]+)/cancel", Cancel),
    ("verify", Verify),
    ("check", Check),
]


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "rapha_lab.notebook.server"}]


def _load_jupyter_server_extension(server: ServerApp) -> None:
    base = server.web_app.settings["base_url"]
    routes = [(url_path_join(base, "rapha-lab", path), handler) for path, handler in ROUTES]
    server.web_app.add_handlers(".*$", routes)
