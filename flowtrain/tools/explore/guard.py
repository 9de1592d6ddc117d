"""Who may ask: only the page itself, opened with the token of the command.

Other users of this machine reach the server, too, and a browser lets any page of the web send
requests to it. So a request has to show the token, of which a page of another name has no cookie,
whatever machine its name means (DNS rebinding). One that changes or computes anything has to come
from a page of this server. No header allows other origins to read.
"""

import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADMITTED = "flowtrain"  # the key of a request's scope that says that it has shown the token
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

    Cookies of all ports of a host are one jar, so the name has the port that the browser uses. That
    of a tunnel need not be the server's.
    """
    port = host.rpartition(":")[2]
    return f"flowtrain-{port if port.isdecimal() else 80}"


class Guard:
    """Passes a request on to `app` if it has shown the token, and adds the headers of every answer.

    It adds `ADMITTED` to the scope of a request with the token.
    """

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

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
        if (answer := self._answer_without_token(scope, cookie_of(host))) is not None:
            return answer
        scope[ADMITTED] = True
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

    def _answer_without_token(self, scope: Scope, cookie: str) -> Response | None:
        given = scope["query_string"].decode("latin-1").removeprefix("token=")
        if scope["path"] == "/" and self._is_token(given):
            page = RedirectResponse("/", 303)  # so that the token leaves the address bar
            page.set_cookie(cookie, given, httponly=True, samesite="lax")
            return page
        if self._is_token(HTTPConnection(scope).cookies.get(cookie, "")):
            return None
        return refusal(401, "open the address that flowtrain explore has printed: it has a token")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def refusal(status: int, message: str) -> JSONResponse:
    """An error as JSON."""
    return JSONResponse({"error": message}, status)
