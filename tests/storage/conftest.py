"""A bucket on this machine, which the real client libraries are led to, and the parts of the small run."""

import pytest
from support.bucket_server import BucketServer
from support.small_fixtures import compiled, small, small_folder  # noqa: F401
from support.steps import BucketPlace, DiskPlace, save_steps


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


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """Where checkpoints lie: what holds on a disk holds in a bucket."""
    return DiskPlace(tmp_path / "steps") if request.param == "disk" else BucketPlace(request.getfixturevalue("bucket"))


@pytest.fixture
def saved(place):
    """The place with steps 1 and 2."""
    save_steps(place.directory, 1, 2)
    return place
