"""Access for the page alone, opened with the token of the command.

Other users of this machine reach the server, too, and a browser lets any page of the web send
requests to it. So a request has to show the token. A page of another name has no cookie with it,
whatever machine its name means (DNS rebinding). A request that computes anything has to come from a
page of this server. No header allows other origins to read.
"""

import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADMITTED = "flowtrain"  # a key in the scope of a request that has shown the token
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


def cookie_of(host: str) -> str:
    """The name of the cookie for a value of `Host`.

    Cookies of all ports of a host are one jar, so the name has the port that the browser uses. The
    port of a tunnel need not be the server's.
    """
    port = host.rpartition(":")[2]
    return f"flowtrain-{port if port.isdecimal() else 80}"


class Guard:
    """Passes requests with the token on to `app`, and adds `HEADERS` to every response.

    It adds `ADMITTED` to their scope.
    """

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        response = self._without_token(scope) or self._from_elsewhere(scope)
        await (response or self.app)(scope, receive, send_with_headers)

    def _without_token(self, scope: Scope) -> Response | None:
        """The response in place of the app's, or None for a request with the token."""
        cookie = cookie_of(Headers(scope=scope).get("host", "").lower())
        given = scope["query_string"].decode("latin-1").removeprefix("token=")
        if scope["path"] == "/" and self._is_token(given):
            page = RedirectResponse("/", 303)  # so that the token leaves the address bar
            page.set_cookie(cookie, given, httponly=True, samesite="lax")
            return page
        if not self._is_token(HTTPConnection(scope).cookies.get(cookie, "")):
            message = "open the address that flowtrain explore has printed: it has a token"
            return refusal(401, message)
        scope[ADMITTED] = True
        return None

    def _from_elsewhere(self, scope: Scope) -> Response | None:
        """The refusal of a request from another page, or None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        origins = (f"http://{host}", f"https://{host}")  # https: a proxy that keeps the host
        reads = scope["method"] in ("GET", "HEAD")
        site = headers.get("sec-fetch-site", "none")
        if (reads or headers.get("origin") in origins) and (
            scope["path"] == "/" or site in ("none", "same-origin")
        ):
            return None
        return refusal(403, "only the page may send requests")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)
