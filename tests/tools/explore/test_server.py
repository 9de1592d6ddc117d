"""The server of the explorer: requests of the page, and hostile ones over a real socket."""

import asyncio
import contextlib
import io
import json
import threading
from unittest.mock import Mock

import pytest
from coding_helpers import claiming
from explore_helpers import TAB, TOKEN, Running, a_session, a_waiting_session, until
from helpers import images
from PIL import Image
from PIL.ExifTags import Base
from starlette.requests import Request

from flowtrain.datasets.base import OtherSize
from flowtrain.pictures.lossless import encoded
from flowtrain.tools.explore import answers, guard, requests
from flowtrain.tools.explore import server as serving
from flowtrain.tools.explore.background import Background
from flowtrain.tools.explore.command import explore
from flowtrain.tools.explore.session import READING, UPLOADS

pytestmark = pytest.mark.run

SAMPLE = {"kind": "sample", "seed": 0, "index": 3, "temperatures": [1.0, 1.0], "label": None}
PLACE = {"source": SAMPLE}


def png(size=(8, 8), mode="L", value=9, kind="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size, value).save(buffer, kind)
    return buffer.getvalue()


def head(running, topic, *lines):
    """The head of a request as the page sends it."""
    first = [f"POST /api/{topic} HTTP/1.1", f"Host: {running.host}"]
    first += [f"Origin: http://{running.host}", f"Cookie: {running.cookie}"]
    return "\r\n".join([*first, *lines, "", ""]).encode()


def test_the_page_and_its_parts(running):
    for file in serving.STATIC.iterdir():
        status, headers, body = running.get("/" if file.name == "index.html" else f"/{file.name}")
        assert (status, body) == (200, file.read_bytes())
        assert headers["content-type"] == serving.TYPES[file.suffix]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
        text = body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not any(word in text for word in ("http:", "https:", "//cdn")), file
    status, _, body = running.get("/api/model")
    described = json.loads(body)
    assert status == 200
    assert described["shape"] == [1, 8, 8] and described["grey"] == 17
    levels = [{"words": words, "entries": 32} for words in ("2 x 4 x 4", "8 x 2 x 2")]
    assert described["levels"] == levels
    assert described["test"] == 180 and described["principal"] == [8, 8]


def test_files_are_made(running):
    other = {"kind": "test", "index": 1}
    for topic, fields in (
        ("png", {"place": PLACE}),
        ("gif", {"place": {**PLACE, "other": other}, "steps": 4}),
    ):
        body = json.dumps({"tab": "ofdownloads", "turn": 0, **fields}).encode()
        status, headers, data = running.request("POST", f"/api/{topic}", body)
        assert (status, headers["content-type"]) == (200, f"image/{topic}")
        image = Image.open(io.BytesIO(data))
        assert image.size == (32, 32) if topic == "png" else image.n_frames == 6


def test_images_that_are_dropped_in(running):
    answer = running.post("upload", {}, raw=png((20, 10), "RGB", (255, 255, 255)))[1]
    assert answer["said"] == (
        "20 x 10 pixels, cropped to the centre, resized to 8 x 8, made grey, reduced to 17 levels"
    )
    source = {"kind": "upload", "id": answer["id"]}
    assert running.ask("show", place={"source": source})["image"] == answer["image"]
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[Base.Orientation] = 6  # a turned photograph
    Image.new("L", (20, 10)).save(buffer, "JPEG", exif=exif)
    said = running.post("upload", {}, raw=buffer.getvalue())[1]["said"]
    assert said.startswith("10 x 20 pixels, ")


def test_nothing_is_downloaded_unasked():
    session, folder = a_waiting_session()
    with contextlib.closing(Running(session)) as running:
        described = json.loads(running.get("/api/model")[2])
        assert described["waits"] and folder in described["data"]
        status, described = running.post("data", {})
        assert status == 200 and not described["waits"] and described["data"] == READING
        until(lambda: isinstance(session.data, Background))
        assert running.post("data", {})[1]["test"] == 180  # and nothing is read again


def held(running, monkeypatch):
    """Events: an image has begun, which takes until it is given up, and it was."""
    begun, stopped = threading.Event(), threading.Event()

    def image(place, check):
        begun.set()
        try:
            until(check)
        finally:
            stopped.set()

    monkeypatch.setattr(running.session, "image", image)
    return begun, stopped


def test_a_request_ends_with_the_server(monkeypatch):
    running, answers = Running(a_session()), []
    begun, _ = held(running, monkeypatch)
    ask = threading.Thread(target=lambda: answers.append(running.post("show", {"place": PLACE})))
    ask.start()
    assert begun.wait(20)
    running.close()
    ask.join()
    assert answers == [(503, {"error": "flowtrain explore was ended"})]


def test_another_name_needs_the_token_of_its_own(running):
    """A page whose name was made to mean this machine has no cookie (DNS rebinding). A tunnel has
    another port, and its cookie is set by the address with the token.
    """
    for name in ("evil.example", f"localhost:{running.port}", "localhost:1"):
        own = {"Host": name, "Origin": f"http://{name}", "Cookie": None}
        assert running.get("/", own)[0] == running.post("show", {}, own)[0] == 401
        _, answer, _ = running.get(f"/?token={TOKEN}", own)
        own["Cookie"] = answer["set-cookie"].split(";")[0]
        assert running.get("/", own)[0] == 200
        assert running.post("show", {"place": PLACE}, own)[0] == 200
    for host in (None, f"{running.host}@x"):
        assert running.get("/", {"Host": host})[0] in (400, 401)


def test_other_origins_are_refused(running):
    own = f"http://{running.host}"
    for origin in (
        *("http://evil.example", "null", None, "", "http://127.0.0.1", "http://127.0.0.1:1"),
        *("file://", f"{own}.evil.example", f"{own}/"),
    ):
        for topic in ("show", "upload"):
            status, answer = running.post(topic, {"place": PLACE}, {"Origin": origin})
            assert status == 403 and "page" in answer["error"], origin
    https = {"Origin": f"https://{running.host}"}  # of a proxy
    assert running.post("show", {"place": PLACE}, https)[0] == 200
    for site in ("cross-site", "same-site"):
        other = {"Sec-Fetch-Site": site}
        assert running.get("/api/model", other)[0] == 403
        assert running.post("show", {"place": PLACE}, other)[0] == 403
        assert running.get("/", other)[0] == 200  # a link may lead here
    status, headers, _ = running.request("OPTIONS", "/api/show", headers={"Origin": "http://evil"})
    assert status == 403 and "access-control-allow-origin" not in headers


def test_requests_without_the_token_are_refused(running):
    without = {"Cookie": None}
    for path in ("/", "/api/model", "/main.js", "/?token=", "/?token=wrong", "/?token=A-secret"):
        status, headers, body = running.get(path, without)
        assert status == 401 and b"token" in body and "set-cookie" not in headers
    name = guard.cookie_of(running.host)
    for cookie in (f"{name}=wrong", name, "=;=", f'{name}="', f"{name}={TOKEN[:-1]}", "\xff=\xff"):
        assert running.get("/", {"Cookie": cookie})[0] == 401
    assert running.post("show", {"place": PLACE}, without)[0] == 401
    status, headers, _ = running.get(f"/?token={TOKEN}", without)
    assert (status, headers["location"]) == (303, "/")
    assert "HttpOnly" in headers["set-cookie"] and "SameSite=lax" in headers["set-cookie"]
    # Cookies of others are not in the way.
    for other in (
        *('theme={"a": 1, "b": [2]}', "a:b=1", "\xe9=\xff", f"flowtrain={TOKEN}1"),
        f"{guard.cookie_of('127.0.0.1:1')}=of another explorer",
    ):
        for cookie in (f"{other}; {running.cookie}", f"{running.cookie}; {other}"):
            assert running.get("/", {"Cookie": cookie})[0] == 200


def test_the_command_prints_the_token_and_hands_on_its_options(monkeypatch, capsys):
    made = []

    def serve(application, at, ready, stop):
        at.close()
        ready()

    monkeypatch.setattr(serving, "app", lambda *args: made.append(args))
    monkeypatch.setattr(serving, "serve", serve)
    explore(model="glow_digits", browser=False, weights="raw", trust_code=True)
    ((session, _, token),) = made
    assert f"/?token={token}" in capsys.readouterr().out.replace("\n", "")
    body = json.dumps({"tab": TAB, "turn": 0, "place": PLACE}).encode()
    shown = requests.parsed(requests.Show, body)
    expected = "flowtrain decode glow_digits latent.npz --out images --weights raw --trust-code"
    assert answers.show(session, shown, lambda: None)["command"] == expected


def test_no_path_leads_to_a_file(running):
    for path in (
        *("/../session.py", "/%2e%2e/session.py", "/..%2fsession.py", "//etc/passwd", "/api/"),
        *("/index.html", "/main.js/", "/main.js%00", "/main.js/../server.py", "/" + "a" * 10000),
    ):
        status, _, body = running.get(path)
        assert status in (400, 404, 405) and b"import" not in body, path
    for method, path in (("PUT", "/"), ("GET", "/api/show"), ("POST", "/api/model")):
        assert running.request(method, path)[0] in (400, 404, 405), (method, path)


MOVE = {"level": 0, "component": 0, "amount": 1.0}
NAN = float("nan")
DRAWN = {"seed": 0, "temperatures": [1.0, 1.0], "start": 0, "count": 1}
EDITS = [
    *({"way": way, "other": SAMPLE} for way in (NAN, float("inf"), 1.5)),
    {"other": SAMPLE, "from_other": [True]},
    {"path": "/etc/passwd"},
    *({"principal": [{**MOVE, "amount": amount}]} for amount in (1e6, NAN)),
    *({"principal": [{**MOVE, **place}]} for place in ({"level": 2}, {"component": 8})),
    {"principal": [MOVE] * 65},
    {"attributes": [{"name": "../x", "amount": 1.0}]},
    {"to_class": {"label": 0, "amount": 1.0}},
]
SOURCES = [
    *({**SAMPLE, "seed": seed} for seed in (2**53, 10**4000, 0.5, "0")),
    *({**SAMPLE, "index": index} for index in (-1, True, 2**21)),
    *({**SAMPLE, "temperatures": each} for each in ([1e9, 1.0], [-1.0, 1.0])),
    *({**SAMPLE, "temperatures": [1.0] * count} for count in (0, 3, 10**4)),
    {**SAMPLE, "label": 0},
    *({"kind": "upload", "id": name} for name in ("../../../etc/passwd", "0" * 32)),
    {"kind": "file", "path": "/etc/passwd"},
    {"kind": "test", "index": 180},
]
HOSTILE = [
    *(("show", {"place": {**PLACE, **edit}}) for edit in EDITS),
    *(("show", {"place": {"source": source}}) for source in SOURCES),
    *(
        ("samples", {**DRAWN, **each})
        for each in ({"count": 10**6}, {"start": 10**6}, {"count": 0})
    ),
    *(("gif", {"place": {**PLACE, "other": SAMPLE}, "steps": steps}) for steps in (1000, 10**9)),
    ("gif", {"place": PLACE, "steps": 4}),
    *(("show", {"place": PLACE, **each}) for each in ({"tab": "../../etc"}, {"turn": -1})),
    ("show", {}),
    ("tests", {"start": 0, "count": 10**6}),
    ("neighbours", {"place": PLACE, "by": "__import__"}),
]
NO_REQUESTS = [
    *(b"", b"{", b"[]", b"null", b"\xff\xfe", b'"' + b"a" * 60000, b"[" * 60000),
    b'{"tab":' * 8000,
    b'{"tab": "abcdefgh", "turn": ' + b"9" * 60000 + b"}",
    b'{"tab": "abcdefgh", "turn": 1e999, "place": {}}',
]


def test_hostile_requests_are_refused_in_a_sentence(running):
    found = [(fields, running.post(topic, fields)) for topic, fields in HOSTILE]
    found += [(body[:30], running.post("show", {}, raw=body)) for body in NO_REQUESTS]
    for fields, (status, answer) in found:
        assert status == 400 and set(answer) == {"error"}, (str(fields)[:500], answer)
        assert 0 < len(answer["error"]) < 400 and "Traceback" not in answer["error"]
    assert running.ask("show", place=PLACE)["image"]  # and it goes on


def test_large_bodies_are_not_read(running):
    for topic, limit in (("show", serving.LARGEST_JSON), ("upload", running.session.largest_file)):
        said = {"Content-Length": str(limit + 1)}  # and nothing comes
        status, _, body = running.request("POST", f"/api/{topic}", None, said)
        assert status == 413 and b"bytes" in body
        said = {"Content-Length": "9" * 19}
        assert running.request("POST", f"/api/{topic}", None, said)[0] in (400, 413)
    chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    chunked = head(running, "show", "Transfer-Encoding: chunked")
    with running.connect(chunked + 3 * chunk) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_bad_images_are_refused(running):
    unreadable, unknown = "cannot be read as an image", "cannot identify"
    for data, message in (
        (b"", unknown),
        (b"GIF89a", unreadable),
        (png()[:60], unreadable),
        (png()[:-20] + b"\0" * 8, unreadable),
        (png((90, 90), kind="JPEG")[:-90], unreadable),  # its header is sound
        (b"%!PS-Adobe\n", unknown),  # Pillow would start Ghostscript
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", unknown),
        (claiming(png(), 2000, 2000), "too many for --max-memory"),
        (claiming(png(), 2**31 - 1, 2**31 - 1), unreadable),
        (claiming(png(), 20000, 20000), unreadable),
        (claiming(png(), 1000, 1000), unreadable),
        (png((0x7FFF, 65)), "too many for --max-memory"),
    ):
        status, answer = running.post("upload", {}, raw=data)
        assert status == 400 and message in answer["error"], (data[:30], answer)


def test_uploads_are_bounded(running):
    files = [encoded(x, "PNG") for x in images(UPLOADS + 2, (1, 8, 8))]
    names = [running.post("upload", {}, raw=file)[1]["id"] for file in files]
    places = [{"source": {"kind": "upload", "id": name}} for name in (names[1], *names[2::63])]
    status, answer = running.post("show", {"place": places[0]})
    assert status == 400 and "drop it in again" in answer["error"]
    assert all(running.ask("show", place=each) for each in places[1:])


def test_a_failure_shows_no_traceback(running, monkeypatch, caplog):
    for error, status, message in (
        (ZeroDivisionError("secret"), 500, "flowtrain failed (ZeroDivisionError)"),
        (OtherSize("the image is 9x8"), 400, "the image is 9x8"),  # if data.resize is exact
        (MemoryError(), 507, "there is not enough memory for this"),
    ):
        monkeypatch.setattr(answers, "url", Mock(side_effect=error))
        assert running.post("show", {"place": PLACE}) == (status, {"error": message})
    assert "secret" in caplog.text  # the console has it


def test_a_body_that_does_not_come(running, monkeypatch):
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.05)
    status, _, body = running.request("POST", "/api/show", None, {"Content-Length": "5"})
    assert status == 408 and b"in time" in body


@pytest.mark.parametrize("size", [100, serving.SMALL_FILE // 2])
def test_files_that_arrive_slowly_hold_up_no_other(size, running):
    with contextlib.ExitStack() as slow:
        for _ in range(5):
            start = head(running, "upload", f"Content-Length: {size + 1}") + b" " * size
            slow.enter_context(running.connect(start))
        assert running.post("upload", {}, raw=png())[0] == 200


@pytest.mark.parametrize("parts, turns", [([serving.SMALL_FILE], 0), ([2**19] * 5, 1)])
def test_large_files_arrive_in_turn(parts, turns):
    sent = [{"type": "http.request", "body": bytes(part), "more_body": True} for part in parts]
    sent[-1]["more_body"] = False
    awaited = []

    async def receive():
        return sent.pop(0)

    async def turn():
        awaited.append(1)

    request = Request({"type": "http", "headers": []}, receive)
    body = asyncio.run(serving.body_of(request, sum(parts), turn))
    assert (len(body), len(awaited)) == (sum(parts), turns)


def test_work_for_a_closed_page_is_given_up(running, monkeypatch):
    begun, stopped = held(running, monkeypatch)
    body = json.dumps({"tab": "pagegone", "turn": 0, "place": PLACE}).encode()
    with running.connect(head(running, "show", f"Content-Length: {len(body)}") + body):
        assert begun.wait(20)
    assert stopped.wait(20)


def test_connections_without_the_token_make_room(running):
    with contextlib.ExitStack() as idle:
        for i in range(serving.CONNECTIONS + 5):
            data = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" if i % 2 else b"GET"
            idle.enter_context(running.connect(data))
        assert running.get("/")[0] == 200
