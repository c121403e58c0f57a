"""The stand-in, made once."""

import pytest
from support.mme_standin import write_standin
from support.small_fixtures import compiled, small, small_folder  # noqa: F401


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    """Folder of the stand-in; not to be written to."""
    return write_standin(tmp_path_factory.mktemp("mme_standin"))
