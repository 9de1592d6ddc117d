"""The web server of the page: routes, limits of requests, and errors as JSON."""

import asyncio
import errno
import functools
import ipaddress
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from flowtrain.errors import RunError, UserError, cut, short
from flowtrain.tools.explore import answers, requests
from flowtrain.tools.explore.guard import ADMITTED, Guard, refusal
from flowtrain.tools.explore.requests import Refused
from flowtrain.tools.explore.session import READING, Session
from flowtrain.tools.explore.worker import Check, Worker

LARGEST_JSON = 2**16  # bytes of a request
SMALL_FILE = 2**20  # bytes of a file that arrives beside others
BODY_SECONDS = 30.0  # for a body to arrive
CONNECTIONS = 64
WRONG = (UserError, RunError)  # whose message is for the user

STATIC = Path(__file__).with_name("static")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


async def body_of(
    request: Request, limit: int, turn: Callable[[], Awaitable[None]] | None = None
) -> bytes:
    """The body of a request. One larger than `SMALL_FILE` awaits its `turn`.

    Raises `Refused` before more than `limit` bytes are read, and `TimeoutError`.
    """
    too_large = Refused(f"more than {limit:,} bytes are not read", 413)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    parts, size = [], 0
    async with asyncio.timeout(BODY_SECONDS):
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            if turn and size > SMALL_FILE >= size - len(part):
                await turn()
            parts.append(part)
    return b"".join(parts)


async def while_there(request: Request, future: asyncio.Future[Any]) -> Any:
    """The result of a future, which is cancelled if the page is closed. The body was read.

    Raises `ClientDisconnect` then.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch: asyncio.Future[Any] = asyncio.ensure_future(gone())
    try:
        await asyncio.wait([future, watch], return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise ClientDisconnect
        return future.result()
    finally:
        watch.cancel()
        future.cancel()


class _Topic(NamedTuple):
    """A path of the API: the type of its requests, their function, and how soon it runs."""

    kind: type[requests.Request]
    answer: Callable[[Session, Any, Check], Any]
    urgency: int = 0
    media: str | None = None  # None: JSON
    outdates: tuple[str, ...] = ()


TOPICS = {
    "show": _Topic(requests.Show, answers.show, outdates=("facts", "neighbours", "ends")),
    "samples": _Topic(requests.Samples, answers.samples, 1),
    "tests": _Topic(requests.Tests, answers.tests, 1),
    "facts": _Topic(requests.Show, answers.facts, 2),
    "neighbours": _Topic(requests.Neighbours, answers.neighbours, 3),
    "ends": _Topic(requests.Ends, answers.ends, 4),
    "png": _Topic(requests.Show, answers.png, 1, "image/png"),
    "latent": _Topic(requests.Show, answers.latent_file, 1, "application/octet-stream"),
    "gif": _Topic(requests.Animation, answers.gif, 1, "image/gif"),
}


def read_data(session: Session, worker: Worker, download: bool) -> None:
    """Reads the session's data in a thread, which keeps no process alive."""
    session.data, session.waits = READING, False

    def read() -> None:
        session.read_data(download)
        worker.wake()

    threading.Thread(target=read, daemon=True).start()


def app(session: Session, worker: Worker, token: str) -> ASGIApp:
    """The application behind its `Guard`."""
    # So that files in memory are bounded. One that arrives slowly holds up no other.
    one_large, one_decoded = asyncio.Semaphore(1), asyncio.Semaphore(1)

    async def model(request: Request) -> Response:
        return JSONResponse(answers.describe(session))

    async def data(request: Request) -> Response:
        if session.waits:
            read_data(session, worker, download=True)
        return JSONResponse(answers.describe(session))

    async def upload(request: Request) -> Response:
        async with AsyncExitStack() as held:
            turn = functools.partial(held.enter_async_context, one_large)
            data = await body_of(request, session.largest_file, turn)
            await held.enter_async_context(one_decoded)
            return JSONResponse(await run_in_threadpool(answers.upload, session, data))

    async def compute(request: Request, name: str) -> Response:
        topic = TOPICS[name]
        parsed = requests.parsed(topic.kind, await body_of(request, LARGEST_JSON))
        call = functools.partial(topic.answer, session, parsed)
        future = worker.submit(call, parsed.tab, name, parsed.turn, topic.urgency, topic.outdates)
        answer = await while_there(request, asyncio.wrap_future(future))
        if topic.media is None:
            return JSONResponse(answer)
        return Response(answer, media_type=topic.media)

    routes = [Route("/api/model", model), Route("/api/upload", upload, methods=["POST"])]
    routes.append(Route("/api/data", data, methods=["POST"]))
    for name in TOPICS:
        handler = functools.partial(compute, name=name)
        routes.append(Route(f"/api/{name}", handler, methods=["POST"]))
    # Read now, so that no request opens a file.
    for file in sorted(STATIC.iterdir()):
        content = Response(file.read_bytes(), media_type=TYPES[file.suffix])
        address = "/" if file.name == "index.html" else f"/{file.name}"
        routes.append(Route(address, content, methods=["GET"]))
    handled: list[Any] = [HTTPException, Refused, *WRONG, TimeoutError, ClientDisconnect]
    inner = Starlette(
        routes=routes, exception_handlers=dict.fromkeys([*handled, MemoryError, Exception], _failed)
    )
    inner.router.redirect_slashes = False  # an address is right or wrong
    return Guard(inner, token)


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return refusal(error.status_code, error.detail)
    if isinstance(error, Refused):
        return refusal(error.status, str(error))
    if isinstance(error, WRONG):
        return refusal(400, short(error))
    if isinstance(error, TimeoutError | ClientDisconnect):
        return refusal(408, "the request did not arrive in time")
    if isinstance(error, MemoryError):
        return refusal(507, "there is not enough memory for this")
    logging.getLogger("flowtrain").error("%s failed", request.url.path, exc_info=error)
    return refusal(500, f"flowtrain failed ({type(error).__name__})")


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises `UserError` if that is impossible."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except (OSError, TypeError, UnicodeError) as error:  # the last two for an impossible name
        why = (error.strerror if isinstance(error, OSError) else None) or short(error)
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(
                f"--port {port}: it is in use; give another one, or none for any that is free"
            ) from None
        raise UserError(
            f"--host {cut(host)}: no server can listen there at port {port} ({cut(why)})"
        ) from None


class Connection(H11Protocol):
    """A connection, which makes room for a newer one until it has shown the token.

    So nobody without it keeps others out, by sending or by waiting.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.began = self.loop.time()
        those: Any = self.connections
        there = [each for each in those if not each.transport.is_closing()]
        strangers = [each for each in there if ADMITTED not in (each.scope or {})]
        if len(there) >= CONNECTIONS:
            min(strangers, key=lambda each: each.began).transport.abort()


def settings(application: ASGIApp) -> uvicorn.Config:
    """The settings of uvicorn: HTTP/1.1 alone, few connections, and no output of its own."""
    return uvicorn.Config(
        application,
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="critical",
        access_log=False,
        proxy_headers=False,  # a header about the client is not believed
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
    )


class Server(uvicorn.Server):
    """Calls `ready` once it serves, and `stop` before it closes connections, so that requests get
    an answer.
    """

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], stop: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._ready, self._stop = ready, stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stop()
        await super().shutdown(sockets)


def serve(
    application: ASGIApp, at: socket.socket, ready: Callable[[], None], stop: Callable[[], None]
) -> None:
    """Serves until a signal comes."""
    Server(settings(application), ready, stop).run([at])
    raise RunError("the server has ended")
