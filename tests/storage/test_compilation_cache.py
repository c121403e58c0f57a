"""Compiled programs are kept for the next start: on by default, where the setting says, and never where the user's own
word to jax says otherwise."""

import logging

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from mer_r1_jax.config.schema import ConfigError
from mer_r1_jax.storage import compilation_cache
from mer_r1_jax.storage.compilation_cache import use


@pytest.fixture(autouse=True)
def cache_as_users_have_it(monkeypatch):
    """For programs of any size, and without the folder that the other tests share."""
    names = ("jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_dir")
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (True, 0.0, None), strict=True):
        jax.config.update(name, value)
    jax_cache.reset_cache()
    monkeypatch.setattr(compilation_cache, "_ours", [None])
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


@pytest.fixture
def hits():
    """Names of the cache's events, as they come."""
    seen = []

    def listen(name, **_):
        seen.append(name.rpartition("/")[2])

    jax.monitoring.register_event_listener(listen)
    yield seen
    jax.monitoring.unregister_event_listener(listen)


def compile_one():
    """What a process does that has not compiled it yet."""
    jax.clear_caches()
    return float(jax.jit(lambda x: jnp.sin(x) + 41)(0.0))


def test_the_next_start_loads_what_this_one_compiled(tmp_path, hits):
    folder = use(str(tmp_path), jax.devices())
    assert folder.parent == tmp_path
    assert folder.name.startswith("cpu-")  # of this kind of processor
    assert compile_one() == 41
    assert "cache_misses" in hits and "cache_hits" not in hits
    files = sorted(folder.iterdir())
    assert files
    hits.clear()
    jax_cache.reset_cache()
    assert compile_one() == 41
    assert "cache_hits" in hits and "cache_misses" not in hits
    assert sorted(folder.iterdir()) == files


def test_it_is_on_by_default_in_the_user_s_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = use("", jax.devices())
    assert folder.parent == tmp_path / ".cache/mer-r1-jax/compiled"
    assert folder.stat().st_mode & 0o077 == 0  # nobody else can put programs there
    compile_one()
    assert list(folder.iterdir())
    assert use("", jax.devices()) == folder  # a second setup of this process


def test_none_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert use("", jax.devices())
    assert use("none", jax.devices()) is None
    (folder,) = (tmp_path / ".cache/mer-r1-jax/compiled").iterdir()
    compile_one()
    assert not list(folder.iterdir())


def test_what_the_user_told_jax_comes_before_the_default(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert use("", jax.devices()) is None
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "mine")
    assert use(str(tmp_path / "named"), jax.devices()).parent == tmp_path / "named"


def test_programs_for_devices_that_are_not_here_are_not_kept(tmp_path):
    assert use(str(tmp_path / "kept"), [object()]) is None
    assert not (tmp_path / "kept").exists()


def test_a_folder_that_cannot_be_written_to_is_an_error_where_it_was_named(tmp_path, monkeypatch, caplog):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(
        ConfigError, match=r"compilation_cache_dir: got .*file.*expected a folder.*name another, or none"
    ):
        use(str(file), jax.devices())
    monkeypatch.setenv("HOME", str(file))
    with caplog.at_level(logging.WARNING):
        assert use("", jax.devices()) is None  # a home without room for it is no reason to stop
    assert "compiled programs are not kept" in caplog.text
    assert compile_one() == 41


def test_machines_with_other_processors_share_nothing(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(compilation_cache, "_CPU_INFO", info)
    folders = []
    for flags, clock in (("avx avx2", 1), ("avx", 1), ("avx avx2", 2)):
        info.write_text(f"model name\t: A\nflags\t\t: {flags}\ncpu MHz\t\t: {clock}\n" * 2)
        folders.append(use(str(tmp_path / "kept"), jax.devices()))
    assert folders[0] == folders[2] != folders[1]  # the clock of the moment says nothing


def test_hosts_of_one_run_keep_nothing_unless_they_share_a_folder(tmp_path, monkeypatch, caplog):
    """jax has the first process alone write, so the others would never find anything in homes of their own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(compilation_cache.processes, "count", lambda: 2)
    assert use("", jax.devices()) is None
    assert "name a folder that all hosts share" in caplog.text
    assert use(str(tmp_path / "shared"), jax.devices()).parent == tmp_path / "shared"
