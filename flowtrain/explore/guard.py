"""Who may ask: only the page itself, opened on this machine or with the token of the command.

A browser lets any page of the web send requests to this machine. So a request has to name this
server as its host, which a page of another name cannot (DNS rebinding), and one that changes or
computes anything has to come from a page of this server. No header allows other origins to read.
"""

import hmac
import ipaddress
import socket
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "flowtrain"
# The page and its parts come from this server alone, and no other page may frame it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_of(host: str, port: int) -> set[str] | None:
    """The values of `Host` that mean this server. None where it listens on all addresses.

    Then it has a token, which no page of another name has.
    """
    if host in ("0.0.0.0", "::"):
        return None
    names = {host, "localhost", "127.0.0.1", "::1"} if is_loopback(host) else {host}
    names |= set() if is_loopback(host) else {socket.gethostname(), socket.getfqdn()}
    written = {f"[{name}]" if ":" in name else name for name in names}
    return {f"{name}:{port}".lower() for name in written} | (written if port == 80 else set())


class Guard:
    """Passes a request on to `app` if it may ask, and adds the headers of every answer.

    Args:
        hosts: The values of `Host` that mean this server, or None for all.
        token: What a page has to show where others can reach the server.
    """

    def __init__(self, app: ASGIApp, hosts: set[str] | None, token: str | None):
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer = self._answer(scope)
        await (answer or self.app)(scope, receive, send_with_headers)

    def _answer(self, scope: Scope) -> Response | None:
        """What is answered in place of the app, or None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if len(headers.getlist("host")) != 1 or (self.hosts is not None and host not in self.hosts):
            return refusal(421, "this server has another name")
        if (answer := self._answer_without_token(scope, headers)) is not None:
            return answer
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin not in (
            f"http://{host}",
            f"https://{host}",  # of a tunnel or proxy that keeps the host
        ):
            return refusal(403, "requests come from the page alone")
        site = headers.get("sec-fetch-site", "none")
        if scope["path"] != "/" and site not in ("none", "same-origin"):
            return refusal(403, "requests come from the page alone")
        return None

    def _answer_without_token(self, scope: Scope, headers: Headers) -> Response | None:
        if self.token is None:
            return None
        given = scope["query_string"].decode("latin-1").removeprefix("token=")
        if scope["path"] == "/" and self._is_token(given):
            page = RedirectResponse("/", 303)  # so that the token leaves the address bar
            page.set_cookie(COOKIE, given, httponly=True, samesite="lax")
            return page
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        if COOKIE in cookies and self._is_token(cookies[COOKIE].value):
            return None
        return refusal(401, "open the address that flowtrain explore has printed: it has a token")

    def _is_token(self, given: str) -> bool:
        assert self.token is not None
        return hmac.compare_digest(given.encode(), self.token.encode())


def refusal(status: int, message: str) -> JSONResponse:
    """An error as JSON."""
    return JSONResponse({"error": message}, status)
