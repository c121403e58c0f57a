"""Checkpoints under a bucket's own faults, written by Orbax, TensorStore and gcsfs over HTTP: what counts, and when."""

import gc
import itertools
import logging

import pytest
from support.steps import (
    HOST,
    MANIFEST,
    BucketPlace,
    file_of,
    files_of,
    restored_step,
    save_steps,
    small_arrays,
)

from mer_r1_jax.storage.checkpoints import CheckpointError, Checkpoints
from mer_r1_jax.storage.run_lock import liveness

RUN = "gs://bucket/runs/one"
ADDRESS = f"{RUN}/checkpoints"


@pytest.fixture
def place(bucket):
    return BucketPlace(bucket)


def test_the_manifest_is_written_last_and_a_step_holds_one_save(bucket, place):
    checkpoints = save_steps(ADDRESS, 3)
    written = [name for method, name in bucket.requests if method == "POST"]
    assert written[-1] == "runs/one/checkpoints/3/manifest.json" and len(written) > 8
    checkpoints.save(3, small_arrays(3), HOST | {"step": 3})
    assert len({name.split("/")[1] for name in files_of(place, 3)}) == 2  # the manifest and one save
    assert restored_step(ADDRESS) == 3


def test_a_save_that_ends_at_any_write_leaves_a_valid_checkpoint(bucket, place):
    # Step 1 is old, step 2 is replaced, step 3 is an abandoned future: the save does all that a save can do.
    save_steps(ADDRESS, 1, 2, 3)
    start, outcomes = place.state(), []
    for end_at in range(1, 200):
        place.reset(start)
        left = itertools.count(end_at, -1)
        bucket.refuse = lambda method, name, left=left: 403 if method != "GET" and next(left) <= 0 else None
        checkpoints = Checkpoints(ADDRESS, max_to_keep=1)
        try:
            checkpoints.save(2, small_arrays(2), HOST | {"step": 2})
        except CheckpointError:
            pass
        bucket.refuse = lambda method, name: None
        outcomes.append(restored_step(ADDRESS))
        checkpoints.clear()  # as the run's next start does
        assert restored_step(ADDRESS) == outcomes[-1]
        assert all(len({name.split("/")[1] for name in files_of(place, step)}) in (0, 2) for step in (1, 2, 3))
        if next(left) > 0:
            break
    assert len(outcomes) > 15 and set(outcomes) == {2, 3} and outcomes[-1] == 2
    assert outcomes == sorted(outcomes, reverse=True)  # once the new step counts, it stays


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 60_000])
def test_where_a_manifest_is_harmed_nothing_is_cleared(saved, text):
    saved.put(f"2/{MANIFEST}", text)
    before = saved.state()
    assert restored_step(ADDRESS) == 1
    Checkpoints(ADDRESS).clear()
    assert saved.state() == before  # nobody knows what is left over


def test_a_save_that_is_refused_half_way_leaves_what_was_there(bucket, place):
    checkpoints = save_steps(ADDRESS, 1)
    before = place.state()
    bucket.refuse = lambda method, name: 403 if method == "POST" and name.endswith(("host.json",)) else None
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved in gs://bucket.*host.json cannot be written"):
        checkpoints.save(2, small_arrays(2), HOST)
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        checkpoints.save(1, small_arrays(9), HOST)
    bucket.refuse = lambda method, name: None
    assert restored_step(ADDRESS) == 1 and place.state() != before
    checkpoints.clear()
    assert place.state() == before and restored_step(ADDRESS) == 1


def test_a_save_that_failed_holds_no_view_of_what_was_sent(bucket):
    # In a cycle such a view ends the process on Python 3.12.0 and 3.12.1 (CPython issue 111049).
    posts = itertools.count(1)  # of one object: the first begins it, the second brings the data
    bucket.refuse = lambda method, name: (
        403 if method == "POST" and name.endswith("/_METADATA") and next(posts) >= 2 else None
    )
    with pytest.raises(CheckpointError, match="step 1 could not be saved.*Forbidden") as failure:
        save_steps(ADDRESS, 1)
    views = [one for one in gc.get_objects() if isinstance(one, memoryview)]
    assert not [view for view in views if "BytesIOBuffer" in repr(type(released_or_source(view)))], failure


def released_or_source(view):
    try:
        return view.obj
    except ValueError:  # it was released
        return None


def test_arrays_that_are_refused_are_an_error_of_the_save(bucket):
    bucket.refuse = lambda method, name: 403 if method == "POST" and "ocdbt" in name else None
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        save_steps(ADDRESS, 1)


@pytest.mark.parametrize("part", ["manifest.json", "host.json", "/d/"])
def test_an_object_that_may_not_be_read_makes_its_step_damaged(bucket, saved, caplog, part):
    bucket.refuse = lambda method, name: 403 if method == "GET" and "checkpoints/2/" in name and part in name else None
    with caplog.at_level(logging.WARNING):
        assert restored_step(ADDRESS) == 1
    assert "checkpoints/2 is damaged and ignored" in caplog.text and "cannot be read" in caplog.text


def test_a_bucket_that_cannot_be_listed_is_no_empty_one(bucket, saved):
    bucket.refuse = lambda method, name: 403
    with pytest.raises(RuntimeError, match="gs://bucket/runs/one/checkpoints cannot be listed"):
        restored_step(ADDRESS)


def test_a_reader_writes_nothing_and_says_who_owns_the_run(bucket, saved):
    saved.put("3/save-20260101T000000-00000000/host.json", b"half saved")
    bucket.put("runs/one/owner.json", b'{"attempt": 4, "since": "2026-01-01", "token": "x"}')
    before = dict(bucket.objects)
    bucket.requests.clear()
    assert restored_step(ADDRESS) == 2
    assert liveness(RUN) == "may be live: attempt 4 has written it since 2026-01-01"
    assert {method for method, _ in bucket.requests} <= {"GET", "READ"} and bucket.objects == before
    for content in (b"[" * 60_000, b"[]", b""):
        bucket.put("runs/one/owner.json", content)
        assert liveness(RUN) is None


def test_content_that_breaks_on_its_way_makes_its_step_damaged(bucket, saved, caplog, monkeypatch):
    broken = f"runs/one/checkpoints/{file_of(saved, 2, 'host.json')}"
    content = bucket._content

    def flipped(name, headers):
        status, about, data = content(name, headers)
        return status, about, data.replace(b'"next": 7', b'"next": 6') if name == broken else data

    monkeypatch.setattr(bucket, "_content", flipped)
    with caplog.at_level(logging.WARNING):
        assert restored_step(ADDRESS) == 1
    assert "2 is damaged and ignored: host.json cannot be read" in caplog.text  # though it is valid JSON
