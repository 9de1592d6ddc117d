"""The server that the tests of the page and of its requests share."""

import pytest
from explore_helpers import Running, a_session, until


@pytest.fixture(scope="module")
def running():
    session = a_session()
    running = Running(session)
    session.read_data()
    running.worker.wake()
    until(lambda: session.data.progress == 1)
    yield running
    running.end()
