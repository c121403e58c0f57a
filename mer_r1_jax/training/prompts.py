"""From records to batches on the host: prompts are built in the loading threads, buckets are known before the run."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mer_r1_jax.config.schema import MediaConfig, RunConfig
from mer_r1_jax.data.prefetch import LoadedItem
from mer_r1_jax.data.records import Record
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.media.clips import Clips, interleaves, merge_factor, sound_remarks
from mer_r1_jax.media.collate import bucket_for, collate
from mer_r1_jax.media.frames import FRAME_FACTOR, most_cells, video_pixels
from mer_r1_jax.media.loader import ClipLoader
from mer_r1_jax.media.prompt import Prompt, PromptBuilder
from mer_r1_jax.media.seen_clips import ClipFingerprints
from mer_r1_jax.omni.batch import MEL_FRAMES_PER_UNIT, BatchShape, FeatureLayout, Prompts
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.parallel import processes

BUCKETS = 4  # token lengths planned when the configuration names none
HOP = 160  # samples between two mel frames
MOST_SAID = 20  # records whose odd sound is logged

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoadedPrompt:
    """A prompt with the counts its clips bring.

    Attributes:
        prompt: the prompt.
        silent_audio, audio_cut: audio tracks that are missing, or were longer than allowed.
        audio_filled, mute_audio, cancelled_audio: as `media.clips.Clips` has them.
    """

    prompt: Prompt
    silent_audio: int
    audio_cut: int
    audio_filled: float = 0.0
    mute_audio: int = 0
    cancelled_audio: int = 0


class PromptSource:
    """Turns records into prompts; safe to call from several threads."""

    def __init__(self, config: RunConfig, tokenizer: Any, thinker: ThinkerConfig):
        self.thinker = thinker
        self._said: set[str] = set()
        self.clips = ClipFingerprints()  # a run puts those in that its folder keeps
        self._media_root = config.data.media_root
        self.loader = ClipLoader(
            config.media, thinker.vision, thinker.audio.num_mel_bins, config.data.cache_dir, config.data.media_root
        )
        self._builder = PromptBuilder(
            tokenizer, config.media, thinker, config.data.system_prompt, config.data.max_prompt_length
        )

    def load(self, record: Record) -> LoadedPrompt:
        """Decodes a record's clips and builds its prompt.

        Raises:
            MediaError: for a clip that cannot be used.
            PromptError: for a record that cannot become a prompt, such as one longer than the cap.
            ClipChangedError: for a clip that is not the one this run saw under its name.
        """
        # Fingerprints are compared before decoding and kept after it, so that only usable clips count as seen.
        seen = self.clips.check(record, Path(self._media_root or Path(record.file).parent))
        clips = self.loader.load(record)
        self._say(record, clips)
        self.clips.add(seen)
        prompt = self._builder.build(record, clips)
        return LoadedPrompt(
            prompt,
            silent_audio=clips.silent_audio,
            audio_cut=clips.audio_cut,
            audio_filled=clips.audio_filled,
            mute_audio=clips.mute_audio,
            cancelled_audio=clips.cancelled_audio,
        )

    def _say(self, record: Record, clips: Clips) -> None:
        """Logs what is odd about a record's sound, once; the metrics count it at every visit."""
        if record.id in self._said or len(self._said) >= MOST_SAID:
            return
        for got, _, mend in sound_remarks(clips):
            self._said.add(record.id)
            log.warning("%s: %s; %s", printable(record.id, 80), got, mend)
            if len(self._said) == MOST_SAID:
                log.warning("further clips with odd sound are only counted, in data/* of metrics.jsonl")

    def close(self) -> None:
        """Ends the decoding workers."""
        self.loader.close()


def plan_buckets(config: RunConfig, thinker: ThinkerConfig, records: Sequence[Record], rows: int) -> list[BatchShape]:
    """The shapes batches of these records can have, from the configuration's limits alone: no clip is opened.

    Args:
        config: media limits and prompt lengths.
        thinker: patch sizes.
        records: every record of the phase; they say how many clips a row can hold.
        rows: rows of every batch.
    """
    # A shape is a compiled program, so there are few, known before the first clip is opened.
    cap = config.data.max_prompt_length
    lengths = config.data.prompt_buckets or sorted({-(-cap * step // BUCKETS) for step in range(1, BUCKETS + 1)})
    # Every row has room for as many clips as any record has, each as large as the limits allow.
    videos = max(len(record.videos) for record in records)
    images = max(len(record.images) for record in records)
    audios = max(_audio_clips(record, config.media) for record in records)
    pairs, patches = _vision_limits(config.media, thinker, bool(videos), bool(images))
    mel_frames = -(-int(config.media.max_audio_seconds * config.media.sampling_rate) // HOP)
    return [
        BatchShape(
            rows=rows,
            tokens=length,
            vision_clips=videos + images,
            frame_pairs=pairs,
            patches=patches,
            audio_clips=audios,
            audio_units=-(-mel_frames // MEL_FRAMES_PER_UNIT) if audios else 0,
        )
        for length in lengths
    ]


def _audio_clips(record: Record, media: MediaConfig) -> int:
    if not interleaves(record, media):
        return len(record.audios)
    # Here every video brings its own track, so its file among the audios adds none.
    return len(record.videos) + sum(name not in record.videos for name in record.audios)


def _vision_limits(media: MediaConfig, thinker: ThinkerConfig, videos: bool, images: bool) -> tuple[int, int]:
    """Most frame pairs of a clip, and most patches of a frame pair, whole merge blocks each."""
    vision = thinker.vision
    # A frame's own limit is highest where frames are fewest; a clip may have fewer of them than media.min_frames.
    limits = [(media.video_min_pixels, video_pixels(FRAME_FACTOR, media))] if videos else []
    limits += [(media.image_min_pixels, media.image_max_pixels)] if images else []
    pairs = -(-media.max_frames // vision.temporal_patch_size) if videos else int(images)
    factor, ratio = merge_factor(vision), media.max_aspect_ratio
    cells = max((most_cells(least, most, factor, ratio) for least, most in limits), default=0)
    return pairs, cells * vision.merge_unit


def loaded_rows(
    loaded: Sequence[LoadedItem], buckets: Sequence[BatchShape], thinker: ThinkerConfig
) -> tuple[Prompts, int]:
    """The host batch of a step's prompts, and how many real tokens it has; a broken clip's row stays, empty."""
    prompts = [visit.clips.prompt if visit.clips else None for visit in loaded]
    rows = prompt_rows(prompts, buckets, thinker, [visit.item.uid for visit in loaded])
    return rows, sum(len(prompt.ids) for prompt in prompts if prompt is not None)


def prompt_rows(
    prompts: Sequence[Prompt | None], buckets: Sequence[BatchShape], thinker: ThinkerConfig, uids: Sequence[int]
) -> Prompts:
    """Pads prompts to their bucket; None keeps the place of a broken clip's row.

    In a run of several processes these are the rows that this one loads, and all of them take the largest bucket that
    one of them needs.

    Args:
        prompts: at most a bucket's rows.
        buckets: of this phase.
        thinker: for padding.
        uids: uint32 identity of each prompt's visit.
    """
    shape = bucket_for(prompts, buckets)
    # All processes run one program, so all take the largest bucket that any of them needs.
    if len(buckets) > 1:
        shape = buckets[max(processes.exchange("the size of a batch", buckets.index(shape)))]
    next_position_B, uid_B = np.zeros(shape.rows, np.int32), np.zeros(shape.rows, np.uint32)
    for row, (prompt, uid) in enumerate(zip(prompts, uids, strict=True)):
        if prompt is not None:
            next_position_B[row], uid_B[row] = prompt.next_position, uid
    batch = collate(prompts, shape, thinker)
    return Prompts(
        tokens=batch.tokens,
        next_position_B=next_position_B,
        uid_B=uid_B,
        vision=batch.vision,
        audio=batch.audio,
        layout=FeatureLayout.of_batch(batch),
    )


def uid_of(name: str) -> int:
    """uint32 identity of something with a name, the same on every host and in every run."""
    # Not `hash`, which differs from process to process.
    return zlib.crc32(name.encode())
