"""The server that the tests of the page and of its requests share."""

import contextlib

import pytest
from explore_helpers import Running, a_session, until


@pytest.fixture(scope="module")
def running():
    session = a_session()
    session.read_data()
    with contextlib.closing(Running(session)) as running:
        until(lambda: session.data.progress == 1)
        yield running
