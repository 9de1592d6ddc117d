"""A running server of the explorer, and requests to it that a browser would not send."""

import contextlib
import http.client
import json
import socket
import threading
import time

import uvicorn

from flowtrain.explore import guard, server
from flowtrain.explore.worker import Worker

TAB = "abcdefgh12"


class Running:
    """A server in a thread, on a free port of this machine."""

    def __init__(self, session, token=None, hosts="own"):
        self.session = session
        self.worker = Worker(session.idle)
        at = server.listening("127.0.0.1", 0)
        self.port = at.getsockname()[1]
        names = guard.names_of("127.0.0.1", self.port) if hosts == "own" else hosts
        application = server.app(session, self.worker, names, token)
        self.server = uvicorn.Server(server.settings(application))
        self.thread = threading.Thread(target=self.server.run, args=([at],), daemon=True)
        self.thread.start()
        self.turn = 0

    @property
    def host(self):
        return f"127.0.0.1:{self.port}"

    @property
    def url(self):
        return f"http://{self.host}/"

    def end(self):
        self.server.should_exit = True
        self.thread.join(20)
        self.worker.end()

    def request(self, method, path, body=None, headers=None):
        """Status, headers and body of an answer. The path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True)
            sent = {"Host": self.host, "Origin": f"http://{self.host}", **(headers or {})}
            if body is not None and "Content-Length" not in sent:
                sent["Content-Length"] = str(len(body))
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def get(self, path, headers=None):
        return self.request("GET", path, headers=headers)

    def post(self, topic, fields, headers=None, raw=None):
        """Status and JSON of an answer to a request of a tab."""
        self.turn += 1
        body = raw
        if raw is None:
            body = json.dumps({"tab": TAB, "turn": self.turn, **fields}).encode()
        status, _, answer = self.request("POST", f"/api/{topic}", body, headers)
        return status, json.loads(answer)

    def ask(self, topic, **fields):
        """The JSON of an answer that is no error."""
        status, answer = self.post(topic, fields)
        assert status == 200, answer
        return answer

    def raw(self, data, wait=5.0):
        """What comes back for bytes that may be no HTTP."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            parts = []
            with contextlib.suppress(TimeoutError, ConnectionError):
                while part := connection.recv(65536):
                    parts.append(part)
            return b"".join(parts)


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
