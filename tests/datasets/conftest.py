"""No test of a data set leaves this machine."""

import socket

import pytest


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path_factory):
    """No test reaches the network, a proxy or the user's own cache."""
    connect = socket.socket.connect

    def local(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost"), address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("FLOWTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
