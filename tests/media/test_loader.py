"""The loader: the same clips with and without workers and cache, and the policies for sound."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
from PIL import Image
from support.media_files import numbered_pictures, write_sound, write_video
from support.prompts import TinyRecord, noise_samples, tiny_thinker

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.decode import read_audio_track, read_video
from mer_r1_jax.media.loader import ClipLoader
from mer_r1_jax.media.mel import log_mel
from mer_r1_jax.media.opening import MediaError

VISION, N_MELS = tiny_thinker().vision, tiny_thinker().audio.num_mel_bins
MEDIA = MediaConfig(video_min_pixels=784, video_max_pixels=6 * 784, decode_workers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of every kind."""
    path = tmp_path_factory.mktemp("clips")
    write_video(path / "both.mp4", numbered_pictures(16), samples=noise_samples(1.0)[None])
    write_video(path / "other.mp4", numbered_pictures(24, (64, 48)), samples=noise_samples(1.5, 1)[None])
    write_video(path / "silent.mp4", numbered_pictures(20))
    write_sound(path / "voice.wav", noise_samples(0.7, 2)[None])
    write_sound(path / "click.wav", noise_samples(0.01)[None])
    Image.new("RGB", (64, 64), (9, 90, 200)).save(path / "face.png")
    return path


def loader(folder, media=MEDIA, cache_dir="", **settings) -> ClipLoader:
    return ClipLoader(dataclasses.replace(media, **settings), VISION, N_MELS, cache_dir, folder)


def record(**columns) -> TinyRecord:
    return TinyRecord(({"role": "user", "content": "?"},), **columns)


EVERYTHING = record(videos=("both.mp4", "other.mp4"), audios=("both.mp4", "voice.wav"), images=("face.png",))


def assert_same(clips, others) -> None:
    """Bit for bit."""
    for kind in ("videos", "images"):
        for clip, other in zip(getattr(clips, kind), getattr(others, kind), strict=True):
            np.testing.assert_array_equal(clip.frames, other.frames)
            assert clip.second_per_grid == other.second_per_grid and clip.grid == other.grid
    for kind in ("audios", "video_audios"):
        for clip, other in zip(getattr(clips, kind), getattr(others, kind), strict=True):
            assert (clip is None) == (other is None)
            if clip is not None:
                np.testing.assert_array_equal(clip.mel, other.mel)
                assert clip.seconds == other.seconds


def test_clips_are_those_of_the_decoder(folder):
    with loader(folder) as clips_of:
        clips = clips_of.load(EVERYTHING)
    video = read_video(folder / "both.mp4", MEDIA, 28)
    np.testing.assert_array_equal(clips.videos[0].frames, video.frames)
    assert clips.videos[0].second_per_grid == np.float32(2 / video.sampled_fps)
    samples = read_audio_track(folder / "voice.wav", MEDIA).samples
    np.testing.assert_array_equal(clips.audios[1].mel, log_mel(samples, N_MELS))
    assert clips.audios[1].seconds == pytest.approx(0.7)
    assert clips.images[0].grid == (1, 4, 4)
    assert clips.silent_audio == clips.audio_cut == 0


def test_workers_and_cache_change_nothing(folder, tmp_path):
    with loader(folder) as plain:
        expected = plain.load(EVERYTHING)
    with loader(folder, decode_workers=2, cache_dir=tmp_path) as cached:
        assert_same(cached.load(EVERYTHING), expected)
        assert (cached.cache.hits, cached.cache.misses) == (0, 5)
        assert_same(cached.load(EVERYTHING), expected)
        assert (cached.cache.hits, cached.cache.misses) == (5, 5)
    with loader(folder, cache_dir=tmp_path) as later:
        assert_same(later.load(EVERYTHING), expected)
        assert later.cache.misses == 0


def test_many_threads_share_few_workers(folder):
    records = [
        EVERYTHING,
        record(videos=("both.mp4",)),
        record(audios=("voice.wav",)),
        record(images=("face.png",)),
    ] * 3
    with loader(folder) as plain:
        expected = [plain.load(item) for item in records]
    results = [None] * len(records)
    with loader(folder, decode_workers=2) as shared:

        def work(number):
            results[number] = shared.load(records[number])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(records))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for clips, other in zip(results, expected, strict=True):
        assert_same(clips, other)


def test_paths_are_relative_to_the_records_file_without_a_root(folder):
    with ClipLoader(MEDIA, VISION, N_MELS) as clips_of:
        clips = clips_of.load(record(videos=("both.mp4",), file=str(folder / "data.jsonl")))
    assert len(clips.videos) == 1


def test_errors_of_workers_are_those_of_the_decoder(folder):
    for name, reason in (("none.mp4", "missing"), ("voice.wav", "no_video")):
        messages = set()
        for workers in (0, 1):
            with loader(folder, decode_workers=workers) as clips_of, pytest.raises(MediaError) as caught:
                clips_of.load(record(videos=(name,)))
            assert caught.value.reason == reason
            messages.add(str(caught.value))
        assert len(messages) == 1


def test_a_missing_track_is_an_error_by_default(folder):
    with (
        loader(folder) as clips_of,
        pytest.raises(MediaError, match="silent.mp4: no audio track.*missing_audio") as caught,
    ):
        clips_of.load(record(videos=("silent.mp4",), audios=("silent.mp4",)))
    assert caught.value.reason == "no_audio"


def test_a_missing_track_can_be_skipped_and_is_counted(folder):
    with loader(folder, missing_audio="skip") as clips_of:
        clips = clips_of.load(record(videos=("silent.mp4",), audios=("silent.mp4", "voice.wav")))
    assert clips.audios[0] is None and clips.audios[1] is not None
    assert clips.silent_audio == 1


def test_a_missing_track_can_be_silence_as_long_as_the_video_and_is_counted(folder):
    with loader(folder, missing_audio="silence") as clips_of:
        clips = clips_of.load(record(videos=("silent.mp4",), audios=("silent.mp4",)))
    assert clips.audios[0].seconds == 20 / 16
    assert clips.audios[0].mel.shape == (125, N_MELS) and (clips.audios[0].mel == -1.5).all()
    assert clips.silent_audio == 1


def test_an_unknown_policy_is_refused(folder):
    with pytest.raises(ValueError, match="media.missing_audio: got 'ignore', expected one of error, skip, silence"):
        loader(folder, missing_audio="ignore")


def test_audio_inside_video_is_the_videos_own(folder):
    with loader(folder) as apart, loader(folder, use_audio_in_video=True) as inside:
        told = [
            one.load(dataclasses.replace(record(videos=("both.mp4",)), use_audio_in_video=say))
            for one, say in ((apart, True), (inside, False))
        ]
        separate = apart.load(record(videos=("both.mp4", "other.mp4"), audios=("both.mp4", "other.mp4", "voice.wav")))
        together = inside.load(record(videos=("both.mp4", "other.mp4"), audios=("both.mp4", "other.mp4", "voice.wav")))
        alone = inside.load(record(videos=("both.mp4",)))
    assert separate.video_audios == (None, None)
    assert [clip is None for clip in together.audios] == [True, True, False]
    for own, other in zip(together.video_audios, separate.audios[:2], strict=True):
        np.testing.assert_array_equal(own.mel, other.mel)
    np.testing.assert_array_equal(alone.video_audios[0].mel, separate.audios[0].mel)
    # What the record says goes before the setting.
    np.testing.assert_array_equal(told[0].video_audios[0].mel, separate.audios[0].mel)
    assert told[1].video_audios == (None,)


def test_long_audio_is_cut_and_counted(folder):
    with loader(folder, max_audio_seconds=0.5) as clips_of:
        clips = clips_of.load(record(audios=("both.mp4", "voice.wav")))
    assert clips.audio_cut == 2
    assert [len(clip.mel) for clip in clips.audios] == [50, 50]


def test_sound_too_short_for_a_token_is_refused(folder):
    with loader(folder) as clips_of, pytest.raises(MediaError, match="click.wav: 160 samples of sound") as caught:
        clips_of.load(record(audios=("click.wav",)))
    assert caught.value.reason == "too_short"
