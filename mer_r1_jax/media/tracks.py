"""Which of a file's tracks is watched and heard, and when the clip begins on the file's clock."""

from __future__ import annotations

from av.stream import Disposition

from mer_r1_jax.media.errors import MediaError

DEFAULT_WEIGHT = 5_000_000  # what FFmpeg's command adds to a default track's pixels or channels
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails  # cover art and previews are no video


def video_track(path, container):
    """Returns the video track to watch: the one FFmpeg's command would take.

    Raises:
        MediaError: the file has none (cover art is none), or the chosen one is in a codec FFmpeg does not know.
    """
    tracks = [track for track in container.streams.video if not track.disposition & _PICTURES]
    if not tracks:
        raise MediaError(path, "no_video", "no video track", "one", "List the file under `audios` if it is audio only.")
    return _checked(path, max(tracks, key=_video_score), "video")


def sound_track(path, container):
    """Returns the sound track to hear: the one FFmpeg's command, and through it librosa, would take.

    Raises:
        MediaError: reason "no_audio" when the file has none; or the chosen one is in a codec FFmpeg does not know.
    """
    tracks = list(container.streams.audio)
    if not tracks:
        raise MediaError(
            path, "no_audio", "no audio track", "one", "Add one, or set media.missing_audio to skip or silence."
        )
    return _checked(path, max(tracks, key=_sound_score), "audio")


def clip_start(path, container) -> float | None:
    """Returns the second of the file's clock at which the clip begins: where the first of its two tracks does.

    Other tracks do not count. None where neither says when it begins.
    """
    starts = []
    for choose in (video_track, sound_track):
        try:
            track = choose(path, container)
        except MediaError:
            continue
        if track.start_time is not None and track.time_base is not None:
            starts.append(float(track.start_time * track.time_base))
    return min(starts, default=None)


def _video_score(track) -> tuple[bool, bool, int]:
    context = track.codec_context
    size = context.width * context.height if context is not None else 0
    return _score(track, size)


def _sound_score(track) -> tuple[bool, bool, int]:
    context = track.codec_context
    return _score(track, context.channels if context is not None else 0)


def _score(track, size: int) -> tuple[bool, bool, int]:
    """FFmpeg's order: tracks that hold something, then the sum of size and default flag. `max` keeps the first."""
    return track.codec_context is not None, track.start_time is not None, size + DEFAULT_WEIGHT * is_default(track)


def is_default(track) -> bool:
    """Whether the file marks a track as the one to play."""
    return bool(track.disposition & Disposition.default)


def _checked(path, track, kind: str):
    if track.codec_context is None:
        raise MediaError(
            path, "unknown_codec", f"a {kind} track in a codec FFmpeg does not know", "a usual one", "Re-encode it."
        )
    return track
