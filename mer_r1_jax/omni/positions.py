"""Rotary positions of a prompt (TMRoPE), token counts of media, and how a video and its own audio alternate.

Host-side numpy, functions of token ids, grids and lengths only. The numbering is that of transformers 5.x, checked
against its `get_rope_index` and `generate`.

Text advances all three axes by one. An image or video block keeps the time of its frame pairs on the first axis and row
and column on the others, an audio block counts on all axes, and whatever follows a block starts one above the largest
position of *the last piece* of that block. Two consequences look like mistakes and are kept, because the released
weights were trained with this numbering:

- a frame that steps over two chunk limits at once (below one frame a second) leaves a chunk of a single token;
- where a video's own audio ends before its frames do, or the other way round, the last piece need not be the furthest
  one, and positions go backwards after the block. New tokens continue from the last token, not from the largest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mer_r1_jax.omni.config import ThinkerConfig

VIDEO, AUDIO = "video", "audio"


class PositionError(ValueError):
    """Token ids and media that do not belong together; says which, what was found and what was expected."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens start..stop of the video's or of the audio's tokens.

    Attributes:
        kind: "video" or "audio".
        start, stop: half-open range within that stream.
    """

    kind: str
    start: int
    stop: int


def audio_token_count(mel_frames: int) -> int:
    """Feature rows and placeholder tokens of an audio clip of that many mel frames: 25 a second."""
    return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1


def vision_token_count(grid: Sequence[int], spatial_merge_size: int = 2) -> int:
    """Feature rows and placeholder tokens of an image or video of (frame pairs, patch rows, patch columns)."""
    pairs, height, width = (int(size) for size in grid)
    return pairs * height * width // spatial_merge_size**2


def frame_times(pairs: int, second_per_grid: float, position_id_per_seconds: int) -> np.ndarray:
    """int32 time position of each frame pair, relative to the block: truncated products in float32.

    Args:
        pairs: frame pairs.
        second_per_grid: seconds from one pair to the next, rounded to float32 like the processor's tensor.
        position_id_per_seconds: positions a second.
    """
    seconds = np.arange(pairs, dtype=np.float32) * np.float32(second_per_grid)
    return (seconds * np.float32(position_id_per_seconds)).astype(np.int32)


def vision_block(grid: Sequence[int], times: np.ndarray, spatial_merge_size: int) -> np.ndarray:
    """int32 [3, tokens] time, row and column of a block's tokens, relative to its start."""
    pairs, height, width = (int(size) for size in grid)
    rows, columns = np.arange(height // spatial_merge_size), np.arange(width // spatial_merge_size)
    axes = np.meshgrid(times[:pairs], rows, columns, indexing="ij")
    return np.stack([axis.reshape(-1) for axis in axes]).astype(np.int32)


def _cuts(times: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Ranges of `times` between multiples of `limit`; one cut raises the limit once, however far a time jumped."""
    ranges, start, chunk = [], 0, 1
    for i, time in enumerate(times.tolist()):
        if time >= chunk * limit:
            ranges.append((start, i))
            start = i
            chunk += 1
    ranges.append((start, len(times)))
    return ranges


def interleave(grid: Sequence[int], second_per_grid: float, audio_tokens: int, config: ThinkerConfig) -> list[Piece]:
    """The order in which the tokens of a video and of its own audio alternate.

    Both streams start at time zero and are cut where their time reaches a multiple of `seconds_per_chunk`; pieces then
    alternate, video first.

    Args:
        grid: frame pairs, patch rows, patch columns.
        second_per_grid: seconds from one frame pair to the next.
        audio_tokens: tokens of the audio clip.
        config: for the two rates and the merge size.

    Returns:
        pieces; together they cover both streams exactly once.
    """
    times = frame_times(int(grid[0]), second_per_grid, config.position_id_per_seconds)
    video = vision_block(grid, times, config.vision.spatial_merge_size)[0]
    limit = int(config.position_id_per_seconds * config.seconds_per_chunk)
    streams = [(VIDEO, _cuts(video, limit)), (AUDIO, _cuts(np.arange(audio_tokens), limit))]
    pieces = []
    for number in range(max(len(ranges) for _, ranges in streams)):
        pieces += [Piece(kind, *ranges[number]) for kind, ranges in streams if number < len(ranges)]
    return pieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaSizes:
    """Sizes of the media in a sequence, from which their positions follow.

    Attributes:
        image_grids, video_grids: (frame pairs, patch rows, patch columns) of each, in reading order.
        second_per_grids: seconds from one frame pair to the next, of each video.
        audio_lengths: mel frames of each audio clip, in reading order.
        use_audio_in_video: every video is interleaved with an audio clip of its own.
    """

    image_grids: Sequence[Sequence[int]] = ()
    video_grids: Sequence[Sequence[int]] = ()
    second_per_grids: Sequence[float] = ()
    audio_lengths: Sequence[int] = ()
    use_audio_in_video: bool = False


def rope_positions(ids_T: np.ndarray, config: ThinkerConfig, media: MediaSizes) -> tuple[np.ndarray, int]:
    """Positions of one unpadded sequence.

    Args:
        ids_T: token ids, placeholders expanded.
        config: for the special ids and rates.
        media: what its placeholders stand for.

    Returns:
        (int32 position_3T, position of the token after the last one, the same on all axes).

    Raises:
        PositionError: placeholders and media do not match.
    """
    return _Walk(np.asarray(ids_T), config, media).run()


class _Walk:
    """One pass over a sequence: a cursor in the ids, one in the positions, and how much of each medium is used."""

    def __init__(self, ids_T: np.ndarray, config: ThinkerConfig, media: MediaSizes):
        self.images, self.videos = ([tuple(grid) for grid in grids] for grids in (media.image_grids, media.video_grids))
        self.audios = [int(length) for length in media.audio_lengths]
        self.second_per_grids, self.use_audio_in_video = list(media.second_per_grids), media.use_audio_in_video
        videos, seconds = len(self.videos), len(self.second_per_grids)
        if seconds < videos:
            raise PositionError(f"{videos} videos but {seconds} values of second_per_grids: expected one for each")
        self.ids, self.config = ids_T, config
        self.used = {"image": 0, "video": 0, "audio": 0}
        self.pieces: list[np.ndarray] = []
        self.cursor = 0  # position of whatever comes next

    def run(self) -> tuple[np.ndarray, int]:
        c, ids = self.config, self.ids
        kinds = {c.image_token_id: self._image, c.video_token_id: self._video, c.audio_token_id: self._audio}
        at = 0
        for start in np.flatnonzero(np.isin(ids, list(kinds))).tolist():
            if start < at:
                continue  # inside a block that is done
            paired = self.use_audio_in_video and self._is_pair(start - 2)
            if not paired and self.use_audio_in_video and ids[start] == c.video_token_id:
                raise PositionError(
                    f"token {start}: a video without audio of its own while use_audio_in_video is set; expected "
                    "vision_start, audio_start, then the interleaved tokens (interleave every video or none)"
                )
            self._text(start - at - (2 if paired else 0))
            at = start + (self._video_with_audio(start) if paired else kinds[int(ids[start])](start))
        self._text(len(ids) - at)
        for kind, given in (("image", self.images), ("video", self.videos), ("audio", self.audios)):
            if self.used[kind] != len(given):
                raise PositionError(
                    f"the sequence has {self.used[kind]} {kind} blocks but {len(given)} were given: "
                    "expected equal numbers"
                )
        position_3T = np.concatenate(self.pieces, axis=1) if self.pieces else np.zeros((3, 0), np.int32)
        return position_3T.astype(np.int32), self.cursor

    def _is_pair(self, at: int) -> bool:
        pair = (self.config.vision_start_token_id, self.config.audio_start_token_id)
        return at >= 0 and tuple(self.ids[at : at + 2].tolist()) == pair

    def _append(self, piece_3T: np.ndarray) -> None:
        if piece_3T.shape[1]:
            self.pieces.append(piece_3T)
            self.cursor = int(piece_3T.max()) + 1

    def _text(self, length: int) -> None:
        self._append(np.broadcast_to(self.cursor + np.arange(length), (3, length)))

    def _pair(self) -> None:
        self._append(np.full((3, 2), self.cursor))

    def _next(self, kind: str, given: list):
        number = self.used[kind]
        if number >= len(given):
            raise PositionError(f"the sequence has more {kind} blocks than the {len(given)} {kind} inputs given")
        self.used[kind] += 1
        return number, given[number]

    def _expect(self, start: int, length: int, tokens: dict[int, int], what: str) -> None:
        """Checks that the `length` ids from `start` on are `tokens` (id -> how many), and that the block ends there."""
        block = self.ids[start : start + length]
        found = {token: int((block == token).sum()) for token in tokens}
        longer = start + length < len(self.ids) and int(self.ids[start + length]) in tokens
        if found != tokens or longer:
            raise PositionError(
                f"token {start}: {what} should become {length} placeholders {tokens} (id: count), but the sequence has "
                f"{found}{' and more' if longer else ''}; were the placeholders expanded for this input?"
            )

    def _image(self, start: int) -> int:
        number, grid = self._next("image", self.images)
        length = vision_token_count(grid, self.config.vision.spatial_merge_size)
        self._expect(start, length, {self.config.image_token_id: length}, f"image {number} of grid {grid}")
        times = np.arange(grid[0], dtype=np.int32) * self.config.position_id_per_seconds
        self._append(vision_block(grid, times, self.config.vision.spatial_merge_size) + self.cursor)
        return length

    def _video_block(self, number: int, grid) -> np.ndarray:
        times = frame_times(grid[0], self.second_per_grids[number], self.config.position_id_per_seconds)
        return vision_block(grid, times, self.config.vision.spatial_merge_size) + self.cursor

    def _video(self, start: int) -> int:
        number, grid = self._next("video", self.videos)
        length = vision_token_count(grid, self.config.vision.spatial_merge_size)
        self._expect(start, length, {self.config.video_token_id: length}, f"video {number} of grid {grid}")
        self._append(self._video_block(number, grid))
        return length

    def _audio(self, start: int) -> int:
        number, frames = self._next("audio", self.audios)
        length = audio_token_count(frames)
        self._expect(start, length, {self.config.audio_token_id: length}, f"audio {number} of {frames} mel frames")
        self._text(length)
        return length

    def _video_with_audio(self, start: int) -> int:
        c = self.config
        number, grid = self._next("video", self.videos)
        audio_number, frames = self._next("audio", self.audios)
        counts = {
            c.video_token_id: vision_token_count(grid, c.vision.spatial_merge_size),
            c.audio_token_id: audio_token_count(frames),
        }
        length = sum(counts.values())
        what = f"video {number} of grid {grid} with audio {audio_number} of {frames} mel frames"
        self._expect(start, length, counts, what)
        if start + length + 2 > len(self.ids):
            raise PositionError(f"token {start}: {what} is not closed by audio_end and vision_end")
        self._pair()
        blocks = {
            VIDEO: self._video_block(number, grid),
            AUDIO: np.broadcast_to(self.cursor + np.arange(counts[c.audio_token_id]), (3, counts[c.audio_token_id])),
        }
        for piece in interleave(grid, self.second_per_grids[number], counts[c.audio_token_id], c):
            self._append(blocks[piece.kind][:, piece.start : piece.stop])
        self._pair()
        return length + 2


def feature_sources(
    ids_T: np.ndarray,
    config: ThinkerConfig,
    *,
    images: Sequence[tuple[int, np.ndarray]] = (),
    videos: Sequence[tuple[int, np.ndarray]] = (),
    audios: Sequence[tuple[int, np.ndarray]] = (),
) -> np.ndarray:
    """Which (clip, feature row) each token takes its embedding from; the k-th placeholder of a kind takes the k-th row.

    Args:
        ids_T: token ids of one row, placeholders expanded.
        config: for the placeholder ids.
        images, videos, audios: (clip number in the row, feature rows of the clip in order) of each, in reading order.

    Returns:
        int32 source_T2, (-1, 0) for ordinary tokens.

    Raises:
        PositionError: the number of placeholders is not the number of feature rows.
    """
    source_T2 = np.zeros((len(ids_T), 2), np.int32)
    source_T2[:, 0] = -1
    for name, token_id, clips in (
        ("image", config.image_token_id, images),
        ("video", config.video_token_id, videos),
        ("audio", config.audio_token_id, audios),
    ):
        at = np.flatnonzero(np.asarray(ids_T) == token_id)
        rows = sum(len(rows) for _, rows in clips)
        if len(at) != rows:
            raise PositionError(f"{len(at)} {name} placeholders for {rows} feature rows of {len(clips)} {name} clips")
        if rows:
            source_T2[at, 0] = np.concatenate([np.full(len(rows), clip) for clip, rows in clips])
            source_T2[at, 1] = np.concatenate([rows for _, rows in clips])
    return source_T2
