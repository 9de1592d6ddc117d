"""The web server of the page: routes, limits of what is sent, and errors as JSON."""

import asyncio
import errno
import functools
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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
from flowtrain.tools.explore import answers, asked
from flowtrain.tools.explore.asked import Refused
from flowtrain.tools.explore.guard import ADMITTED, Guard, refusal
from flowtrain.tools.explore.session import Session
from flowtrain.tools.explore.worker import Check, Worker

Kind = TypeVar("Kind", bound=asked.Request)

LARGEST_JSON = 2**16  # bytes of a request
SMALL_FILE = 2**20  # bytes of a file that arrives beside others
BODY_SECONDS = 30.0  # for a body to arrive
CONNECTIONS = 64

STATIC = Path(__file__).with_name("static")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class TooLarge(Refused):
    """More bytes were sent than are read."""

    status = 413


async def nothing() -> None:
    pass


async def body_of(
    request: Request, limit: int, turn: Callable[[], Awaitable[None]] = nothing
) -> bytes:
    """The body of a request, which awaits its `turn` where it is larger than `SMALL_FILE`.

    Raises `TooLarge` before more than `limit` bytes are read, and `TimeoutError`.
    """
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > limit:
        raise TooLarge(f"more than {limit:,} bytes are not read")
    parts, size = [], 0
    async with asyncio.timeout(BODY_SECONDS):
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise TooLarge(f"more than {limit:,} bytes are not read")
            if size > SMALL_FILE >= size - len(part):
                await turn()
            parts.append(part)
    return b"".join(parts)


async def while_there(request: Request, future: asyncio.Future[Any]) -> Any:
    """The result of a future, which is cancelled where the page has gone. The body was read.

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
    """What a path of the API answers: from which requests, by what, and how soon."""

    kind: type[asked.Request]
    answer: Callable[[Session, Any, Check], Any]
    urgency: int = 0
    media: str | None = None  # None: JSON
    outdates: tuple[str, ...] = ()


TOPICS = {
    "show": _Topic(asked.Show, answers.show, outdates=("facts", "neighbours")),
    "samples": _Topic(asked.Samples, answers.samples, 1),
    "tests": _Topic(asked.Tests, answers.tests, 1),
    "facts": _Topic(asked.Show, answers.facts, 2),
    "neighbours": _Topic(asked.Neighbours, answers.neighbours, 3),
    "png": _Topic(asked.Show, answers.png, 1, "image/png"),
    "latent": _Topic(asked.Show, answers.latent_file, 1, "application/octet-stream"),
    "gif": _Topic(asked.Animation, answers.gif, 1, "image/gif"),
}


def app(session: Session, worker: Worker, token: str) -> ASGIApp:
    """The application, which answers only what `Guard` lets through."""
    # So that files in memory are bounded. One that arrives slowly holds up no other.
    one_large, one_decoded = asyncio.Semaphore(1), asyncio.Semaphore(1)

    async def model(request: Request) -> Response:
        return JSONResponse(answers.describe(session))

    async def upload(request: Request) -> Response:
        async with AsyncExitStack() as held:
            turn = functools.partial(held.enter_async_context, one_large)
            data = await body_of(request, session.largest_file, turn)
            await held.enter_async_context(one_decoded)
            return JSONResponse(await run_in_threadpool(answers.upload, session, data))

    async def compute(request: Request, name: str) -> Response:
        topic = TOPICS[name]
        asked_for = asked.parsed(topic.kind, await body_of(request, LARGEST_JSON))
        future = worker.submit(
            functools.partial(topic.answer, session, asked_for),
            asked_for.tab,
            name,
            asked_for.turn,
            topic.urgency,
            topic.outdates,
        )
        answer = await while_there(request, asyncio.wrap_future(future))
        if topic.media is None:
            return JSONResponse(answer)
        return Response(answer, media_type=topic.media)

    routes = [Route("/api/model", model), Route("/api/upload", upload, methods=["POST"])]
    for name in TOPICS:
        handler = functools.partial(compute, name=name)
        routes.append(Route(f"/api/{name}", handler, methods=["POST"]))
    # Read now, so that no request opens a file.
    for file in sorted(STATIC.iterdir()):
        address = "/" if file.name == "index.html" else f"/{file.name}"
        routes.append(Route(address, _file(file.read_bytes(), TYPES[file.suffix])))
    errors: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        HTTPException: _http_error,
        Refused: _refused,
        TimeoutError: _late,
        ClientDisconnect: _late,
        MemoryError: _no_memory,
        Exception: _failed,
    }
    inner = Starlette(routes=routes, exception_handlers=errors)
    inner.router.redirect_slashes = False  # an address is right or wrong
    return Guard(inner, token)


def _file(content: bytes, media: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return Response(content, media_type=media)

    return answer


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, error.detail)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return refusal(error.status, str(error))


async def _late(request: Request, error: Exception) -> Response:
    return refusal(408, "the request did not arrive in time")


async def _no_memory(request: Request, error: Exception) -> Response:
    return refusal(507, "there is not enough memory for this")


async def _failed(request: Request, error: Exception) -> Response:
    logging.getLogger("flowtrain").error("%s failed", request.url.path, exc_info=error)
    return refusal(500, f"flowtrain failed ({type(error).__name__})")


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises `UserError` where that is impossible."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except (OSError, TypeError, UnicodeError) as error:  # the last two for what is no name
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

    So nobody without it keeps others out, whatever is sent, or not read, or nothing at all.
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
    """How uvicorn answers: by HTTP/1.1 alone, for few connections, without a word of its own."""
    return uvicorn.Config(
        application,
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="critical",
        access_log=False,
        proxy_headers=False,  # what a header says of the client is not believed
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
    )


def serve(application: ASGIApp, at: socket.socket, ready: Callable[[], None]) -> None:
    """Answers until a signal comes. `ready` is called once requests are answered."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    Server(settings(application)).run([at])
    raise RunError("the server has ended")
