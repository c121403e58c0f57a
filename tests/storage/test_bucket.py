"""Objects in a bucket are what was written, or an error: nothing is read or written unchecked."""

import numpy as np
import pytest

from mer_r1_jax.storage import bucket as storage
from mer_r1_jax.storage.bucket import BucketError, fetch_file


def flipped(data):
    return bytes([data[0] ^ 1, *data[1:]])


@pytest.mark.parametrize("size", [1, 1000, (1 << 24) + 1], ids=["a byte", "small", "in parts"])
def test_a_bit_that_flips_on_the_way_is_noticed_both_ways(bucket, tmp_path, monkeypatch, size):
    file, content, put = tmp_path / "file", bucket._content, bucket.put
    file.write_bytes(np.random.default_rng(0).bytes(size))
    storage.upload(file, "gs://bucket/file")
    assert storage.read("gs://bucket/file") == file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "put", lambda name, data: put(name, flipped(data)))
        with pytest.raises(BucketError, match="gs://bucket/file cannot be written: ChecksumError"):
            storage.upload(file, "gs://bucket/file")
    storage.upload(file, "gs://bucket/file")

    def broken(name, headers):
        status, about, data = content(name, headers)
        return status, about, flipped(data)

    monkeypatch.setattr(bucket, "_content", broken)
    with pytest.raises(BucketError, match=f"gs://bucket/file: got {size} bytes that are not the {size} bytes"):
        storage.read("gs://bucket/file")
    with pytest.raises(BucketError, match=f"gs://bucket/file: got {size} bytes that are not the {size} bytes"):
        fetch_file("gs://bucket/file", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("data", [b"", b"\r", b"end\r", b"end\r\n", b"one\n--==0==\ntwo", b"one\r\n--==0==--", b"\n\n"])
def test_an_object_is_what_was_written_whatever_it_holds(bucket, tmp_path, data):
    storage.write("gs://bucket/written", data)
    (tmp_path / "file").write_bytes(data)
    storage.upload(tmp_path / "file", "gs://bucket/uploaded")
    assert bucket.objects["written"].data == bucket.objects["uploaded"].data == data
    assert storage.read("gs://bucket/written") == data


def test_an_object_that_is_replaced_while_it_is_read_is_read_again(bucket, monkeypatch):
    bucket.put("a", b"one")
    content = bucket._content

    def replaced(name, headers):
        if bucket.objects["a"].data == b"one":
            bucket.put("a", b"two")
        return content(name, headers)

    monkeypatch.setattr(bucket, "_content", replaced)
    assert storage.read("gs://bucket/a") == b"two"


def test_a_failure_lets_go_of_what_all_that_led_to_it_holds():
    def fails(cause=None):
        held = bytearray(8)
        raise ValueError(len(held)) from cause

    def caught(call, *arguments):
        try:
            call(*arguments)
        except Exception as error:
            return error

    first, second = caught(fails), caught(fails)
    group = ExceptionGroup("both", [first, second])
    last = caught(fails, group)
    storage.let_go(last)
    for error in (first, second, last):
        frame = error.__traceback__.tb_next.tb_frame
        assert frame.f_code.co_name == "fails" and "held" not in frame.f_locals
