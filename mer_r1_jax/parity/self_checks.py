"""What a model must agree with: transformers, and itself by another way to the same numbers.

All on one made-up input that has everything a clip has: words, an image, a video and a voice. So no data are needed,
and a mistake in any part of the model moves some number.

Shape letters as in `omni.batch`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.thinker import Params
from mer_r1_jax.parity.port import run_port
from mer_r1_jax.parity.processor_inputs import ProcessorInputs, shape_of

NEW_TOKENS = 8
# Largest difference of two ways to one number, as a share of the largest number (or of 10, if that is more): a hundred
# roundings of float32 and a few of the others, which round 256 and 2048 times to a factor of two.
LIMITS = {"float32": 2e-4, "bfloat16": 2e-2, "float16": 5e-3}
_MEL_FRAMES, _AUDIO_TOKENS = 100, 25  # one second of voice


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Two ways to the same numbers.

    Attributes:
        name: of the numbers.
        worst: largest difference.
        largest: largest number among them.
        limit: largest difference that is none.
    """

    name: str
    worst: float
    largest: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the limit; never for a number that is not finite."""
        return bool(np.isfinite(self.largest) and self.worst <= self.limit)

    def __str__(self) -> str:
        return f"{self.name}: worst difference {self.worst:.2g} of {self.largest:.3g} (limit {self.limit:.2g})"


def probe_inputs(config: ThinkerConfig, *, seed: int = 0, words: int = 12) -> ProcessorInputs:
    """One row of random words, a second of noise, an image and a video of two frame pairs, each of 2x2 merged patches.

    Args:
        config: ids and sizes of the model.
        seed: of words and media.
        words: text tokens, besides those that frame the media.
    """
    rng = np.random.default_rng(seed)
    side = 2 * config.vision.spatial_merge_size
    text = rng.choice(np.setdiff1d(np.arange(config.text.vocab_size), _special(config)), words)
    framed = [config.audio_start_token_id, *[config.audio_token_id] * _AUDIO_TOKENS, config.audio_end_token_id]
    for token_id, rows in ((config.image_token_id, 4), (config.video_token_id, 8)):
        framed += [config.vision_start_token_id, *[token_id] * rows, config.vision_end_token_id]
    ids_1T = np.asarray([[*text[:2], *framed, *text[2:]]], np.int64)
    patches, values = side * side, config.vision.patch_values
    return ProcessorInputs(
        input_ids=ids_1T,
        attention_mask=np.ones_like(ids_1T),
        pixel_values=rng.standard_normal((patches, values), np.float32),
        image_grid_thw=np.asarray([[1, side, side]]),
        pixel_values_videos=rng.standard_normal((2 * patches, values), np.float32),
        video_grid_thw=np.asarray([[2, side, side]]),
        video_second_per_grid=np.asarray([1.0], np.float32),
        input_features=rng.standard_normal((1, config.audio.num_mel_bins, _MEL_FRAMES), np.float32),
        feature_attention_mask=np.ones((1, _MEL_FRAMES), np.int64),
    )


def against_transformers(directory: str, params: Params, config: ThinkerConfig) -> list[Agreement]:
    """Logits, positions, features of all media and greedy tokens beside transformers', in float32.

    Args:
        directory: Hugging Face directory, read once more by transformers.
        params: as loaded from it.
        config: its architecture, computing in float32.

    Raises:
        ImportError: there is no torch.
    """
    from mer_r1_jax.parity.transformers_reference import run_reference

    inputs = probe_inputs(config)
    theirs = run_reference(directory, inputs, generate=NEW_TOKENS)
    ours = run_port(params, config, inputs, generate=NEW_TOKENS, shape=_with_answer(inputs, config))
    found = []
    for name, expected in theirs.items():
        if name in ("greedy_ids", "position_ids"):
            same = ours[name].shape == expected.shape
            wrong = np.count_nonzero(ours[name] != expected) if same else expected.size
            found.append(Agreement(f"{name}, numbers that differ", float(wrong), float(expected.size), 0.0))
        else:
            found.append(_agreement(name, ours[name], expected, "float32"))
    return found


def cached_against_uncached(params: Params, config: ThinkerConfig) -> Agreement | None:
    """What the cache chose token by token, beside one pass over prompt and answer: how much likelier another was there.

    None where the answer begins with a token that nobody can go on from, such as an end.
    """
    inputs = probe_inputs(config)
    shape = _with_answer(inputs, config)
    chosen_C = run_port(params, config, inputs, generate=NEW_TOKENS, shape=shape)["greedy_ids"][0]
    unusable_C = np.isin(chosen_C, _special(config))
    chosen_C = chosen_C[: int(unusable_C.argmax()) if unusable_C.any() else len(chosen_C)]
    if not len(chosen_C):
        return None
    ids_1T = np.concatenate([inputs.input_ids, chosen_C[None].astype(np.int64)], axis=1)
    whole = dataclasses.replace(inputs, input_ids=ids_1T, attention_mask=np.ones_like(ids_1T))
    logits_TN = run_port(params, config, whole, shape=shape)["logits"][0]
    before_CN = logits_TN[inputs.input_ids.shape[1] - 1 : -1].astype(np.float32)
    given_C = np.take_along_axis(before_CN, chosen_C[:, None].astype(int), axis=1)[:, 0]
    return _agreement(f"{len(chosen_C)} tokens", given_C, before_CN.max(axis=1), config.compute_dtype)


def batch_against_single(params: Params, config: ThinkerConfig) -> Agreement:
    """The logits of two prompts of other lengths in one padded batch, beside those of each alone."""
    singles = [probe_inputs(config), probe_inputs(config, seed=1, words=7)]
    shape = _with_answer(singles[0], config)
    alone = [run_port(params, config, one, shape=shape)["logits"][0] for one in singles]
    together = run_port(params, config, _together(*singles))["logits"]
    rows = [row[-len(own) :] for row, own in zip(together, alone, strict=True)]  # padding is on the left
    return _agreement("logits", np.concatenate(rows), np.concatenate(alone), config.compute_dtype)


def _special(config: ThinkerConfig) -> list[int]:
    return [*config.media_token_ids, *config.eos_token_ids, config.pad_token_id]


def _together(one: ProcessorInputs, other: ProcessorInputs) -> ProcessorInputs:
    """Two rows in one batch, the shorter one padded on its left, as for generation."""
    length = one.input_ids.shape[1]
    parts = {}
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name in ("input_ids", "attention_mask"):
            theirs = np.pad(theirs, ((0, 0), (length - theirs.shape[1], 0)))
        parts[field.name] = mine if field.name == "use_audio_in_video" else np.concatenate([mine, theirs])
    return ProcessorInputs(**parts)


def _with_answer(inputs: ProcessorInputs, config: ThinkerConfig) -> BatchShape:
    """A shape that holds the inputs and an answer: one compiled program serves them all."""
    shape = shape_of(inputs, config)
    return dataclasses.replace(shape, tokens=shape.tokens + NEW_TOKENS)


def _agreement(name: str, got: np.ndarray, expected: np.ndarray, dtype: str) -> Agreement:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        return Agreement(f"{name}, {got.shape} beside {expected.shape}", np.inf, np.inf, 0.0)
    largest = float(np.abs(expected).max(initial=0))
    return Agreement(name, float(np.abs(got - expected).max(initial=0)), largest, LIMITS[dtype] * max(10.0, largest))
