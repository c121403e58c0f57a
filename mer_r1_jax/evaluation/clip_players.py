"""Clips' own files in a report, to be played there: which of them a browser plays, and how many bytes they may take."""

from __future__ import annotations

import base64
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mer_r1_jax.data.paths import MediaPathError, resolve_media
from mer_r1_jax.evaluation.clip_frames import MEDIA, ClipStrip, read_file, strip_of
from mer_r1_jax.faults import StopRequested
from mer_r1_jax.media.decoded import ENCODING
from mer_r1_jax.media.opening import MediaError, media_file
from mer_r1_jax.media.pool import WorkerPool

MEGABYTE = 1_000_000  # bytes
LEFT_OUT = "left out of a page that could not wait for it"

Shown = TypeVar("Shown", "Player", ClipStrip)


@dataclasses.dataclass(frozen=True)
class _Form:
    """A container that browsers play: its type in a page, and what may be in it (FFmpeg's names)."""

    subtype: str
    video: frozenset[str]
    sound: frozenset[str]


_MP4 = _Form("mp4", frozenset({"h264", "hevc", "vp9", "av1"}), frozenset({"aac", "mp3", "opus", "flac"}))
_WEBM = _Form("webm", frozenset({"vp8", "vp9", "av1"}), frozenset({"opus", "vorbis"}))
# FFmpeg's first name of a container -> what Chromium, Firefox and Safari have in common (MDN, "Media containers").
_FORMS = {
    "mov": _MP4,
    "matroska": _WEBM,
    "ogg": _Form("ogg", frozenset(), frozenset({"opus", "vorbis", "flac"})),
    "wav": _Form("wav", frozenset(), frozenset({"pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_f32le"})),
    "mp3": _Form("mpeg", frozenset(), frozenset({"mp3"})),
    "flac": _Form("flac", frozenset(), frozenset({"flac"})),
    "aac": _Form("aac", frozenset(), frozenset({"aac"})),
}
_PLAIN_PIXELS = ("yuv420p", "yuvj420p")  # H.264 with other colours or more bits plays in few browsers


@dataclasses.dataclass(frozen=True)
class Playable:
    """What a browser makes of a file.

    Attributes:
        kind: the page's element, "video" or "audio"; "" where no browser plays the file.
        media_type: such as "video/mp4"; "" likewise.
        note: what does not play, or not everywhere; "" where nothing is amiss.
    """

    kind: str
    media_type: str
    note: str


def playable(encoding: dict[str, str | None], name: str) -> Playable:
    """Judges whether a browser plays a file.

    Args:
        encoding: as `tracks.encoding_of` gives it.
        name: the file's, for its ending: a WebM file is told from other Matroska by nothing else here.
    """
    container = (encoding["container"] or "").split(",")[0]
    video, sound = encoding["video"], encoding["sound"]
    form = _FORMS.get(container)
    if form is None or (form is _WEBM and not name.lower().endswith(".webm")):
        return Playable("", "", f"browsers do not play {container} files")
    if video is None:
        if sound in form.sound:
            return Playable("audio", f"audio/{form.subtype}", "")
        return Playable("", "", f"browsers do not play {sound or 'nothing'} in {container} files")
    if video not in form.video or (video == "h264" and encoding["pixels"] not in _PLAIN_PIXELS):
        return Playable("", "", f"browsers do not play {video} ({encoding['pixels']}) in {container} files")
    note = "plays only where the machine decodes HEVC" if video == "hevc" else ""
    if sound is not None and sound not in form.sound:
        note = "; ".join(filter(None, (note, f"plays without sound: browsers do not play {sound}")))
    return Playable("video", f"video/{form.subtype}", note)


@dataclasses.dataclass(frozen=True)
class Player:
    """One file of a clip as a page plays it, or why it does not.

    Attributes:
        name: its path relative to the media root.
        kind: the page's element, "video" or "audio"; "" where there is none.
        source: a data URI; "" where there is none.
        note: what does not play, or why there is no player; "" where nothing is amiss.
        size: bytes of the file that are in the page; 0 where there is no player.
    """

    name: str
    kind: str = ""
    source: str = ""
    note: str = ""
    size: int = 0


@dataclasses.dataclass(frozen=True)
class ShownClip:
    """What a report shows of a clip: frames, and a player for each of its files."""

    strip: ClipStrip
    players: tuple[Player, ...]


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a page may wait for clips' files; what is not read by then is not in it.

    Attributes:
        seconds: for all files together, the start of the process that reads them among them.
        asked: whether somebody asks for the end before that; looked at before every file and while it is read.
    """

    seconds: float = math.inf
    asked: Callable[[], bool] = lambda: False


def shown_clips(
    clips: Iterable[tuple[str | None, str | None]],
    root: str | os.PathLike,
    megabytes: int,
    patience: Patience | None = None,
) -> list[ShownClip]:
    """Reads clips' files for a report, as training does: in a process with limits, nothing from outside the media root.

    Args:
        clips: paths of the video and of the voice, relative to `root`; None for a clip without. Where both are one file
            it is played once.
        root: the media root.
        megabytes: of files that may stand in the page, in the order of the clips; one that does not fit is left out,
            and a smaller one after it may still come in. 0 = none.
        patience: with the files; None waits for every one of them, within the limits of each.

    Returns:
        One for each clip.
    """
    patience = patience or Patience()
    room, found, began = megabytes * MEGABYTE, [], time.monotonic()

    def is_over() -> bool:
        return patience.asked() or time.monotonic() - began > patience.seconds

    def waited(read: Callable[..., Shown], left_out: Shown, *args: Any) -> Shown:
        """What reading a file gives; `left_out` where the page waits no longer, or not to its end."""
        try:
            return left_out if is_over() else read(*args)
        except StopRequested:  # the pool's, in the middle of a file
            return left_out

    pool = WorkerPool(1, min(MEDIA.decode_timeout, patience.seconds), asked=is_over)
    try:
        for video, audio in clips:
            players = []
            for name in dict.fromkeys(str(name) for name in (video, audio) if name):
                player = Player(name)
                if megabytes:
                    player = waited(_player, Player(name, note=LEFT_OUT), name, root, pool, room)
                room -= player.size
                players.append(player)
            strip = waited(strip_of, ClipStrip(None, None, LEFT_OUT), video, root, pool)
            found.append(ShownClip(strip, tuple(players)))
    finally:
        pool.close()
    return found


def _player(name: str, root: str | os.PathLike, pool: WorkerPool, room: int) -> Player:
    read = read_file(name, ENCODING, root, pool)
    if isinstance(read, str):
        return Player(name, note=read)
    judged = playable(read.facts, name)
    if not judged.kind:
        return Player(name, note=f"no player: {judged.note}")
    try:
        with media_file(resolve_media(root, name), Path(root)) as file:
            size = file.status().st_size
            if size > room:
                return Player(name, note=f"no player: {size / MEGABYTE:.1f} MB are too many for this page")
            data = file.rewound().read(size)
    except (MediaError, MediaPathError, OSError) as error:
        return Player(name, note=f"no player: {Path(name).name} cannot be read ({error})")
    source = f"data:{judged.media_type};base64,{base64.b64encode(data).decode()}"
    return Player(name, judged.kind, source, judged.note, len(data))


def tell_players(clips: Sequence[ShownClip], root: str, megabytes: int) -> str:
    """What plays in a page and what does not, in a sentence or two.

    Args:
        clips: those of the page.
        root: the media root, as it may be shown.
        megabytes: that files might take.
    """
    where = f"Files' paths are below {root}."
    if not megabytes:
        return f"No clip can be played here (eval.clip_megabytes=0). {where}"
    players = [player for clip in clips for player in clip.players]
    inside = [player for player in players if player.kind]
    size = sum(player.size for player in inside) / MEGABYTE
    told = f"{len(inside)} of {len(players)} files of these clips play here: they are in this page, {size:.1f} MB of "
    told += f"at most {megabytes} (eval.clip_megabytes)."
    if len(inside) < len(players):
        told += " The others say why beneath their clip."
    return f"{told} {where}"
