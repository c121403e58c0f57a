"""From a record's paths to decoded clips: worker processes, time limit, cache, and the policy for missing audio."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from mer_r1_jax import faults
from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.cache import ClipCache
from mer_r1_jax.media.clips import AudioInput, Clips, VisionInput, interleaves, laid_out, merge_factor
from mer_r1_jax.media.decoded import AUDIO, IMAGE, VIDEO, Entry, decode_file
from mer_r1_jax.media.mel import log_mel
from mer_r1_jax.media.opening import MediaError, check_present, file_key
from mer_r1_jax.media.pool import ATTEMPTS, WorkerPool
from mer_r1_jax.omni.config import VisionConfig
from mer_r1_jax.process_pool import START_SECONDS

MISSING_AUDIO = ("error", "skip", "silence")
SILENCE_SECONDS = 1.0  # length of silence for an audio file of its own that has no track


class ClipLoader:
    """Decodes the media of records. Safe to use from several threads; the result depends on files and settings alone.

    A record shows what it lists: `videos` their frames, `audios` the sound of a file, which may be a video file. With
    `media.use_audio_in_video`, or where the record says so, every video brings its own sound, interleaved, and an
    `audios` entry that names the same file is that sound and not a second item.
    """

    def __init__(
        self,
        media: MediaConfig,
        vision: VisionConfig,
        n_mels: int,
        cache_dir: str | Path = "",
        media_root: str | Path = "",
    ):
        """
        Args:
            media: sampling, limits, workers and policies.
            vision: patch sizes.
            n_mels: mel bins of the audio tower.
            cache_dir: folder of decoded clips; "" keeps none.
            media_root: folder the records' paths are relative to; "" means each record's own file's folder.
        """
        if media.missing_audio not in MISSING_AUDIO:
            valid = ", ".join(MISSING_AUDIO)
            raise ValueError(f"media.missing_audio: got {media.missing_audio!r}, expected one of {valid}")
        self.media, self.vision, self.n_mels, self.media_root = media, vision, n_mels, media_root
        self._factor = merge_factor(vision)
        self.cache = ClipCache(cache_dir, media, self._factor, n_mels) if str(cache_dir) else None
        self._pool = WorkerPool(media.decode_workers, media.decode_timeout) if media.decode_workers else None

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool:
            self._pool.close()

    def longest_load(self, records) -> float:
        """Seconds that its own limits let the load of any of these records take, and one file's more."""
        files = max(2 * len(record.videos) + len(record.audios) + len(record.images) for record in records)
        return (1 + files) * ATTEMPTS * (START_SECONDS + self.media.decode_timeout)

    def load(self, record) -> Clips:
        """Decodes everything a record lists.

        Args:
            record: a `data.records.Record`; `videos`, `audios`, `images`, `use_audio_in_video` and `file` are
                used.

        Raises:
            MediaError: for the first file that cannot be used.
        """
        root = Path(self.media_root or Path(record.file).parent)
        videos = [self._entry(root, name, VIDEO) for name in record.videos]
        keys = [file_key(root / name) for name in record.videos]
        seconds = {key: entry.facts["duration"] for key, entry in zip(keys, videos, strict=True)}
        interleaved = set(seconds) if interleaves(record, self.media) else set()
        own = [
            self._audio(root, name, seconds[key]) if interleaved else None
            for name, key in zip(record.videos, keys, strict=True)
        ]
        others = [
            None if key in interleaved else self._audio(root, name, seconds.get(key, SILENCE_SECONDS))
            for name, key in ((name, file_key(root / name)) for name in record.audios)
        ]
        tracks = [track for track in own + others if track is not None]
        return Clips(
            videos=tuple(self._vision(entry) for entry in videos),
            video_audios=tuple(track and track.clip for track in own),
            audios=tuple(track and track.clip for track in others),
            images=tuple(self._vision(self._entry(root, name, IMAGE)) for name in record.images),
            silent_audio=sum(track.silent for track in tracks),
            audio_cut=sum(track.cut for track in tracks),
            audio_filled=float(sum(track.filled for track in tracks)),
            mute_audio=sum(track.mute for track in tracks),
            cancelled_audio=sum(track.cancelled for track in tracks),
        )

    def _vision(self, entry: Entry) -> VisionInput:
        return laid_out(entry.arrays["frames"], entry.facts["fps"], self.vision)

    def _audio(self, root: Path, name: str, seconds: float) -> _Track:
        """Loads an audio track; one that is missing is treated as `media.missing_audio` says."""
        try:
            entry = self._entry(root, name, AUDIO)
        except MediaError as error:
            if error.reason != "no_audio" or self.media.missing_audio == "error":
                raise
            if self.media.missing_audio == "skip":
                return _Track(None, silent=True)
            samples = np.zeros(round(min(seconds, self.media.max_audio_seconds) * self.media.sampling_rate), np.float32)
            mel = log_mel(samples, self.n_mels, self.media.sampling_rate)
            return _Track(AudioInput(mel, samples.size / self.media.sampling_rate), silent=True)
        clip = AudioInput(entry.arrays["mel"], entry.facts["samples"] / self.media.sampling_rate)
        if clip.rows < 1:
            raise MediaError(
                root / name,
                "too_short",
                f"{entry.facts['samples']} samples of sound",
                "enough for one audio token (321 samples at 16 kHz)",
                "Leave the clip out, or list no audio for it.",
            )
        facts = entry.facts
        return _Track(
            clip,
            cut=bool(facts["cut"]),
            filled=facts["filled"],
            mute=bool(facts["silent"]),
            cancelled=bool(facts["cancelled"]),
        )

    def _entry(self, root: Path, name: str, kind: str) -> Entry:
        """Takes a file's entry from the cache, or decodes the file."""
        path = str(root / name)
        faults.here("decode", path)
        if self.cache is None:
            check_present(path, root)
            return self._decode(path, root, kind)
        key = self.cache.key(path, kind, root)
        entry = self.cache.get(key)
        if entry is None:
            entry = self._decode(path, root, kind)
            if self.cache.key(path, kind, root) == key:  # else the file was changed while it was decoded
                self.cache.put(key, entry)
        return entry

    def _decode(self, path: str, root: Path, kind: str) -> Entry:
        job: dict[str, Any] = dict(path=path, kind=kind, factor=self._factor, n_mels=self.n_mels, root=str(root))
        if self._pool is None:
            return decode_file(media=self.media, **job)
        return self._pool.decode(job | {"media": dataclasses.asdict(self.media)})


@dataclasses.dataclass(frozen=True)
class _Track:
    """An audio track as loaded: its clip (None when skipped) and what has to be counted about it."""

    clip: AudioInput | None
    silent: bool = False
    cut: bool = False
    filled: float = 0.0
    mute: bool = False
    cancelled: bool = False
