"""The page as a web application: what may ask, and what is answered."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import DomergeError, OptionError, printable
from ..pages.render import rendered
from .explorer import Asked, Explorer, offered
from .trial import MOST_CHARACTERS, MOST_TOKENS, Prompt
from .views import adapters_of, figures_of, interference_of, losses_of

__all__ = ["app"]

HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def app(explorer: Explorer, token: str, port: int) -> Starlette:
    """Only requests with the token to this port of the loopback interface are answered."""
    routes = [
        Route("/", functools.partial(_page, explorer)),
        Route("/figures", _posted(functools.partial(_figures, explorer)), methods=["POST"]),
        Route("/loss", _posted(functools.partial(_loss, explorer)), methods=["POST"]),
        Route("/text", _posted(functools.partial(_text, explorer)), methods=["POST"]),
        Route("/save", _posted(functools.partial(_save, explorer)), methods=["POST"]),
    ]
    guard = Middleware(_Guard, token=token, hosts=[f"127.0.0.1:{port}", f"localhost:{port}"])
    return Starlette(routes=routes, middleware=[guard])


class _Guard:
    """Refuses what does not come from the page: a wrong token, another host's name (which is how
    other sites reach this machine), another site's page."""

    def __init__(self, app: ASGIApp, token: str, hosts: list[str]) -> None:
        self._app, self._token, self._hosts = app, token.encode(), hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self._problem(scope)):
            refusal = PlainTextResponse(f"{problem}\n", 403, HEADERS)
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        headers = {k: v.decode("latin-1") for k, v in scope["headers"]}
        if headers.get(b"host") not in self._hosts:
            return "this page is for this machine alone"
        origins = [f"http://{host}" for host in self._hosts]
        if b"origin" in headers and headers[b"origin"] not in origins:
            return "another site's page asked for this"
        if scope["method"] == "GET":
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        else:
            given = headers.get(b"authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode("latin-1", "replace"), self._token):
            return "open the address that domerge-fast explore has printed"
        return None


def _page(explorer: Explorer, request: Request) -> Response:
    page = rendered(
        "explore.html",
        names=adapters_of(explorer),
        methods=offered(),
        figures=interference_of(explorer),
        has_model=explorer.has_model,
        has_texts=explorer.has_texts,
        most_tokens=MOST_TOKENS,
        most_characters=MOST_CHARACTERS,
        folder=printable(str(explorer.output)),
    )
    return HTMLResponse(page, headers=HEADERS)


Answer = Callable[[Mapping[str, Any]], dict[str, Any]]


def _posted(answer: Answer) -> Callable[[Request], Any]:
    """Answers JSON to JSON, or one line of what is wrong with status 422."""

    async def endpoint(request: Request) -> Response:
        try:
            asked = await request.json()
        except ValueError:
            return JSONResponse({"error": "the request is no JSON"}, 400, HEADERS)
        try:
            if not isinstance(asked, dict):
                raise OptionError("request", "is no JSON object", "reload the page")
            found = await run_in_threadpool(answer, asked)
        except DomergeError as error:
            return JSONResponse({"error": str(error)}, 422, HEADERS)
        return JSONResponse(found, headers=HEADERS)

    return endpoint


def _asked(explorer: Explorer, plain: Mapping[str, Any]) -> Asked:
    return Asked.of(plain, len(explorer.adapters))


def _figures(explorer: Explorer, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, and the figures that show them; or that the method is still being prepared."""
    asked = _asked(explorer, plain)
    found = explorer.figures(asked)
    if found is None:
        done, total = explorer.done(asked.method)
        return {"preparing": f"Preparing, {100 * done // total} % …"}
    ready, measured = found
    return {
        "norm": measured.norm,
        "cosines": measured.cosines,
        "shares": measured.shares,
        "scale": ready.scale,
        "html": figures_of(explorer, ready, measured),
    }


def _loss(explorer: Explorer, plain: Mapping[str, Any]) -> dict[str, Any]:
    """By text, of the merge; once they are known also of the model alone and of each adapter."""
    alone = explorer.alone()
    if alone is None:
        return {"preparing": "Computing losses …"}
    losses = explorer.loss(_asked(explorer, plain))
    return {"losses": losses, "html": losses_of(explorer, losses, alone)}


def _text(explorer: Explorer, plain: Mapping[str, Any]) -> dict[str, Any]:
    """What the model writes, which the page shows as text."""
    prompt = Prompt.of(plain.get("prompt"), plain.get("tokens"))
    return {"text": explorer.text(_asked(explorer, plain), prompt, plain.get("of"))}


def _save(explorer: Explorer, plain: Mapping[str, Any]) -> dict[str, Any]:
    place = explorer.save(_asked(explorer, plain), plain.get("name"), plain.get("form"))
    return {"written": printable(str(place))}
