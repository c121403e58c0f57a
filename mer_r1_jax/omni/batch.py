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
