"""A running server of the explorer, and requests to it that a browser would not send."""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time

import torch
from coding_helpers import loaded
from helpers import a_config, seeded, tiny_flow

from flowtrain.checkpoints.load import load_model, model_hash
from flowtrain.data.splits import DataSet
from flowtrain.latents import directions
from flowtrain.latents.directions import Direction
from flowtrain.tools.explore import guard, server
from flowtrain.tools.explore.session import Session
from flowtrain.tools.explore.worker import Worker

TAB = "abcdefgh12"
TOKEN = "a-secret"
MEMORY = 2**25


def a_session(memory=MEMORY, name="glow_digits"):
    """The session of a trained model. Its data are not read yet."""
    model = load_model(name, torch.device("cpu"))
    return Session(model, name, lambda: DataSet(model.config.data), memory)


def a_waiting_session():
    """A session whose images would have to be downloaded first, and the folder for them."""
    session = a_session()
    data = DataSet(session.model.config.data)
    data.test_images = dataclasses.replace(data.test_images, at_hand=lambda: False)
    session._read_data = lambda: data
    session.read_data()
    return session, str(data.config.root)


def class_session(folder, name="glow"):
    """A tiny model with three classes and an attribute, whose data are not there."""
    flow = tiny_flow(name, (1, 4, 4), classes=3).requires_grad_(False)
    if name == "glow":
        flow.class_prior.mean += 2 * torch.randn(flow.class_prior.mean.shape, generator=seeded(1))
    config = a_config(name, data={"name": "npz", "path": str(folder / "no.npz")})
    model = loaded(flow, config, folder / "tiny.safetensors")
    vector = torch.nn.functional.normalize(torch.randn(16, generator=seeded(2)), dim=0)
    thick = Direction("thick", vector, -1.0, 2.0, "difference", 0.9, 0.01, 100)
    directions.save(directions.file_of(model), [thick], model_hash(model))
    return Session(model, "tiny", lambda: DataSet(config.data), MEMORY)


class Running:
    """A server in a thread, on a free port of this machine."""

    def __init__(self, session):
        self.session, self.turn = session, 0
        self.worker = Worker(session.idle)
        at = server.listening("127.0.0.1", 0)
        self.port = at.getsockname()[1]
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}/?token={TOKEN}"
        self.cookie = f"{guard.cookie_of(self.host)}={TOKEN}"
        application = server.app(session, self.worker, TOKEN)
        config = server.settings(application)
        self.server = server.Server(config, lambda: None, self.worker.stop)
        self.thread = threading.Thread(target=self.server.run, args=([at],), daemon=True)
        self.thread.start()

    def close(self):
        self.server.should_exit = True
        self.thread.join(20)
        self.worker.end()

    def request(self, method, path, body=None, headers=None):
        """Status, headers and body of a response. The path is sent as it is."""
        own = {"Host": self.host, "Origin": f"http://{self.host}", "Cookie": self.cookie}
        if body is not None:
            own["Content-Length"] = str(len(body))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True)
            for name, value in {**own, **(headers or {})}.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def get(self, path, headers=None):
        return self.request("GET", path, headers=headers)

    def post(self, topic, fields, headers=None, raw=None):
        """Status and JSON of a response to a request of a tab."""
        self.turn += 1
        body = raw
        if raw is None:
            body = json.dumps({"tab": TAB, "turn": self.turn, **fields}).encode()
        status, _, answer = self.request("POST", f"/api/{topic}", body, headers)
        return status, json.loads(answer)

    def ask(self, topic, **fields):
        """The JSON of a response that is no error."""
        status, answer = self.post(topic, fields)
        assert status == 200, answer
        return answer

    def connect(self, data):
        """A connection that has sent bytes."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(data)
        return connection


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
