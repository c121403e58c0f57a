"""The typed, statically shaped batch every jitted program of the project takes.

Media is padded per clip and lives in the batch row that uses it, and every token says which feature row its embedding
comes from. So nothing inside `jit` scatters packed rows across the batch, and sharding the leading axis `B` shards
everything.

Shape letters, the same in the whole package:

    B rows (one prompt each)      T tokens of a row          D model width
    G completions of a prompt     C tokens of a completion   N vocabulary
    H query heads   K key heads   h head width               L layers
    V vision clips of a row       P frame pairs of a clip    S patches of a frame pair   X values of a patch
    A audio clips of a row        U 200-frame audio units    F mel frames of a unit      M mel bins
    R feature rows of a batch row: V clips x (P * S / 4) rows, then A clips x (U * 50) rows
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = Any  # a numpy array on the host, a jax.Array or tracer on the device

PADDING = 0  # segment of a token that does not exist
PROMPT = 1  # segment of the prompt; completions are 2, 3, ...

MEL_FRAMES_PER_UNIT = 200  # mel frames the audio tower convolves at once
FEATURES_PER_UNIT = 50  # feature rows those frames become: stride 2, then adjacent pairs averaged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionClips:
    """Images and videos of a batch, padded per clip.

    Attributes:
        patches_BVPSX: float32 normalised pixel values; a patch is flattened as (channel, time, y, x) and the patches of
            a frame pair come in 2x2 merge blocks, as transformers' processor lays them out.
        position_BVS2: int32 row and column of each patch in its clip's patch grid, for the 2-D rotary embedding.
        window_BVS: int32 attention window of each patch, -1 for patches that are padding.
        pairs_BV: int32 frame pairs the clip really has (an image has one); 0 marks an absent clip.
    """

    patches_BVPSX: Array
    position_BVS2: Array
    window_BVS: Array
    pairs_BV: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioClips:
    """Audio tracks of a batch, cut into the 200-frame units the audio tower works on.

    Attributes:
        mel_BAUFM: float32 log-mel frames, zero beyond the clip's end.
        frames_BA: int32 mel frames the clip really has; 0 marks an absent clip.
    """

    mel_BAUFM: Array
    frames_BA: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token rows, positions and the attention structure.

    Token i of a row attends to token j of the same row if j is not later in the row, j is not padding, and j is in the
    prompt (segment 1) or in i's own segment. One row so holds a prompt once and, after it, completions that do not see
    each other (the row layout of the method: one prompt, G completions).

    Attributes:
        id_BT: int32 token ids.
        segment_BT: int32, 0 padding, 1 prompt, 2.. completions.
        position_3BT: int32 rotary positions on the time, height and width axes.
        source_BT2: int32 (clip, feature row) each token takes its embedding from; clip -1 means the token's own
            embedding, clips 0..V-1 are vision clips and V..V+A-1 audio clips of the same row.
    """

    id_BT: Array
    segment_BT: Array
    position_3BT: Array
    source_BT2: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts of a batch: token rows and their media (None where the whole batch has none of a kind)."""

    tokens: Tokens
    vision: VisionClips | None = None
    audio: AudioClips | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class BatchShape:
    """One bucket: the static sizes of a batch. A run's buckets are finite, known before it starts, and printed."""

    rows: int
    tokens: int
    vision_clips: int = 0
    frame_pairs: int = 0
    patches: int = 0
    audio_clips: int = 0
    audio_units: int = 0

    @property
    def vision_rows(self) -> int:
        """Feature rows one padded vision clip becomes."""
        return self.frame_pairs * self.patches // 4

    @property
    def audio_rows(self) -> int:
        """Feature rows one padded audio clip becomes."""
        return self.audio_units * FEATURES_PER_UNIT


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureLayout:
    """Static: how many feature rows each clip of a batch row has; vision clips come first, then audio clips.

    Attributes:
        vision_clips, vision_rows: V, and rows of one padded vision clip (P * S / 4).
        audio_clips, audio_rows: A, and rows of one padded audio clip (U * 50).
    """

    vision_clips: int = 0
    vision_rows: int = 0
    audio_clips: int = 0
    audio_rows: int = 0

    @classmethod
    def of(cls, vision: VisionClips | None, audio: AudioClips | None) -> FeatureLayout:
        """The layout of these clips' features."""
        V = A = vision_rows = audio_rows = 0
        if vision is not None:
            _, V, P, S, _ = vision.patches_BVPSX.shape
            vision_rows = P * S // 4
        if audio is not None:
            _, A, U, _, _ = audio.mel_BAUFM.shape
            audio_rows = U * FEATURES_PER_UNIT
        return cls(vision_clips=V, vision_rows=vision_rows, audio_clips=A, audio_rows=audio_rows)

    @classmethod
    def of_batch(cls, batch: Batch | Prompts) -> FeatureLayout:
        """The layout of a batch's features."""
        return cls.of(batch.vision, batch.audio)

    @classmethod
    def of_shape(cls, shape: BatchShape) -> FeatureLayout:
        """The layout of a bucket's features."""
        return cls(
            vision_clips=shape.vision_clips,
            vision_rows=shape.vision_rows if shape.vision_clips else 0,
            audio_clips=shape.audio_clips,
            audio_rows=shape.audio_rows if shape.audio_clips else 0,
        )

    @property
    def rows(self) -> int:
        """R, feature rows of one batch row."""
        return self.vision_clips * self.vision_rows + self.audio_clips * self.audio_rows

    def index(self, source: Array) -> Array:
        """Feature row [...] of (clip, row) pairs [..., 2]; any valid row where the clip is -1."""
        clip, row = source[..., 0], source[..., 1]
        audio_start = self.vision_clips * self.vision_rows
        index = jnp.where(
            clip < self.vision_clips,
            clip * self.vision_rows + row,
            audio_start + (clip - self.vision_clips) * self.audio_rows + row,
        )
        return jnp.where(clip < 0, 0, index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one step, from the host to the update: what every program takes of them.

    They begin with their clips. `encoded` puts the towers' features in the place of the clips, which nothing reads any
    more then; only where a tower is trained do the clips go on into the update, to be encoded inside its gradient.

    Attributes:
        tokens: padded token rows; a row without any prompt token is absent and takes part in nothing.
        vision, audio: the clips; None where there are none, or none any more.
        features_BRD: media features in the compute dtype; None before encoding, and where there are no clips.
        next_position_B: int32, the rotary position that follows each prompt, on all three axes.
        uid_B: uint32 identity of each visit of a prompt; the random bits of its completions follow from it.
        layout: static, how many feature rows each clip has.
    """

    tokens: Tokens
    next_position_B: Array
    uid_B: Array
    vision: VisionClips | None = None
    audio: AudioClips | None = None
    features_BRD: Array | None = None
    layout: FeatureLayout = dataclasses.field(default=FeatureLayout(), metadata={"static": True})

    def encoded(self, features_BRD: Array | None) -> Prompts:
        """These prompts with features in the place of their clips."""
        return dataclasses.replace(self, vision=None, audio=None, features_BRD=features_BRD)
