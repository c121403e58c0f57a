"""AVI files whose header counts chunks without a picture, as FFmpeg's own muxer writes them beside MP3 sound."""

import av
import pytest
from support.clips import make_clip

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.decode import read_video
from mer_r1_jax.media.opening import MediaError

MEDIA = MediaConfig(min_frames=2, fps=13.0)


@pytest.fixture
def clip(tmp_path):
    path = make_clip(
        tmp_path / "clip.avi",
        seconds=1.7,
        fps=13,
        size=(56, 56),
        video_codec="mpeg4",
        audio_codec="mp3",
        sampling_rate=44_100,
    )
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 23  # one more than there are
    return path


def test_empty_chunk_does_not_make_a_whole_clip_a_cut_one(clip):
    assert len(read_video(clip, MEDIA, 28).frames) == 22


def test_cut_clip_is_told_as_before(clip):
    clip.write_bytes(clip.read_bytes()[: int(0.7 * clip.stat().st_size)])
    with pytest.raises(MediaError, match="of the 23 frames its header announces") as caught:
        read_video(clip, MEDIA, 28)
    assert caught.value.reason == "truncated"
