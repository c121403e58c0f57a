"""A bucket on this machine, which the real client libraries are led to, and the parts of the small run."""

import pytest
from support.bucket_server import BucketServer
from support.small_fixtures import compiled, small, small_folder  # noqa: F401


@pytest.fixture(scope="session")
def server():
    """One for all tests: gcsfs keeps the address it has found first."""
    server = BucketServer()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    server.close()


@pytest.fixture
def bucket(server):
    """The server with an empty bucket."""
    server.objects.clear()
    server.requests.clear()
    server.refuse = lambda method, name: None
    return server
