"""The cache: keyed by content and settings, whole or made again, and never in the way."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil

import numpy as np
import pytest
from support.media_files import numbered_pictures, write_video
from support.prompts import TinyRecord, noise_samples, tiny_thinker

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.decoded import CorruptEntryError, Entry
from mer_r1_jax.media.loader import ClipLoader

VISION = tiny_thinker().vision
MEDIA = MediaConfig(video_min_pixels=784, video_max_pixels=6 * 784, decode_workers=0)
RECORD = TinyRecord((), videos=("clip.mp4",), audios=("clip.mp4",))


@pytest.fixture
def folder(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered_pictures(16), samples=noise_samples(1.0)[None])
    return tmp_path


def load(folder, media=MEDIA, n_mels=128, record=RECORD):
    """Loads the record with a fresh loader; returns the clips and the cache."""
    with ClipLoader(media, VISION, n_mels, folder / "cache", folder) as loader:
        return loader.load(record), loader.cache


def entries(folder) -> list:
    return sorted(path for path in (folder / "cache").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("change", "misses"),
    [
        ({"fps": 3.0}, 1),
        ({"min_frames": 6}, 1),
        ({"max_frames": 2}, 1),
        ({"video_max_pixels": 4 * 784}, 1),
        ({"video_min_pixels": 2 * 784}, 1),
        ({"video_total_pixels": 10**6}, 1),
        ({"max_aspect_ratio": 4.0}, 1),
        ({"max_audio_seconds": 0.5}, 1),
        ({"max_clip_seconds": 20.0}, 2),
        ({"decode_timeout": 5.0}, 0),
        ({"image_max_pixels": 784}, 0),
        ({"missing_audio": "skip"}, 0),
    ],
)
def test_settings_that_shape_a_clip_are_part_of_its_key(folder, change, misses):
    load(folder)
    _, cache = load(folder, dataclasses.replace(MEDIA, **change))
    assert (cache.misses, cache.hits) == (misses, 2 - misses)


def test_mel_bins_are_part_of_the_key(folder):
    load(folder)
    clips, cache = load(folder, n_mels=80)
    assert cache.misses == 1 and clips.audios[0].mel.shape[1] == 80


def test_content_counts_and_names_do_not(folder):
    clips, _ = load(folder)
    shutil.copy(folder / "clip.mp4", folder / "copy.mp4")
    _, cache = load(folder, record=dataclasses.replace(RECORD, videos=("copy.mp4",), audios=("copy.mp4",)))
    assert cache.misses == 0
    write_video(folder / "clip.mp4", 255 - numbered_pictures(16), samples=noise_samples(1.0, 5)[None])
    changed, cache = load(folder)
    assert cache.misses == 2
    assert (changed.videos[0].frames != clips.videos[0].frames).any()


def test_a_file_that_changes_under_a_running_loader_is_read_again(folder):
    with ClipLoader(MEDIA, VISION, 128, folder / "cache", folder) as loader:
        before = loader.load(RECORD)
        write_video(folder / "clip.mp4", numbered_pictures(16)[::-1], samples=noise_samples(1.2)[None])
        after = loader.load(RECORD)
    assert (before.videos[0].frames != after.videos[0].frames).any()


DAMAGE = {
    "emptied": lambda data: b"",
    "cut in its head": lambda data: data[:10],
    "cut in its body": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one byte long": lambda data: data + b"\0",
    "another file": lambda data: b"not an entry at all, but long enough",
    "a bit of its body": lambda data: data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:],
    "a bit of its head": lambda data: data[:20] + bytes([data[20] ^ 4]) + data[21:],
    "a bit of its checksum": lambda data: data[:8] + bytes([data[8] ^ 128]) + data[9:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_noticed_and_made_again(folder, damage, caplog):
    whole, _ = load(folder)
    originals = {path: path.read_bytes() for path in entries(folder)}
    assert len(originals) == 2
    for path, data in originals.items():
        path.write_bytes(DAMAGE[damage](data))
    clips, cache = load(folder)
    assert cache.corrupt == 2 and cache.misses == 2
    assert "damaged cache entry" in caplog.text
    np.testing.assert_array_equal(clips.videos[0].frames, whole.videos[0].frames)
    np.testing.assert_array_equal(clips.audios[0].mel, whole.audios[0].mel)
    assert {path: path.read_bytes() for path in entries(folder)} == originals


def test_every_flipped_bit_of_an_entry_is_noticed():
    data = Entry({"mel": np.arange(12, dtype=np.float32).reshape(3, 4)}, {"samples": 480, "cut": False}).to_bytes()
    read = Entry.from_bytes(data)
    assert read.facts == {"samples": 480, "cut": False}
    np.testing.assert_array_equal(read.arrays["mel"], np.arange(12).reshape(3, 4))
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptEntryError):
            Entry.from_bytes(bytes(flipped))


def test_loaded_arrays_cannot_be_written_to(folder):
    load(folder)
    clips, _ = load(folder)
    with pytest.raises(ValueError):
        clips.audios[0].mel[0, 0] = 1.0


def test_a_full_disk_leaves_no_half_entries_and_stops_nothing(folder, monkeypatch, caplog):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    clips, cache = load(folder)
    assert len(clips.videos) == len(clips.audios) == 1
    assert entries(folder) == []
    assert caplog.text.count("cannot be cached") == 1 and "No space left" in caplog.text


def test_an_impossible_cache_folder_stops_nothing(folder):
    (folder / "cache").write_text("a file where the folder should be")
    clips, cache = load(folder)
    assert len(clips.videos) == 1 and cache.hits == 0


def test_broken_files_are_not_cached(folder):
    (folder / "clip.mp4").write_bytes(b"broken" * 100)
    for _ in range(2):
        with pytest.raises(ValueError, match="clip.mp4"):
            load(folder)
    assert not (folder / "cache").exists() or entries(folder) == []
