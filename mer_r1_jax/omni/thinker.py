"""The Thinker: two media towers, the merge of their features into token rows, and the text decoder.

The module exists at the edges only: `init_params` makes a plain nested dict of arrays, programs are jitted over such
dicts, and inside `bind(graphdef, params)` gives the module back.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mer_r1_jax.kernels.logprobs.api import Scores
from mer_r1_jax.omni.audio import AudioTower
from mer_r1_jax.omni.batch import AudioClips, FeatureLayout, Tokens, VisionClips
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.layers import Settings, constrain
from mer_r1_jax.omni.text import BTD, Cache, Decode, PromptCache, TextDecoder
from mer_r1_jax.omni.vision import VisionTower

Params = dict[str, Any]


class Thinker(nnx.Module):
    """Qwen2.5-Omni's Thinker.

    Attributes:
        config: its ThinkerConfig.
        audio, vision, text: the towers and the decoder.
    """

    def __init__(self, config: ThinkerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        settings = Settings(config.param_dtype, config.compute_dtype, config.initializer_range, config.adapters)
        common: dict[str, Any] = dict(settings=settings, remat=config.remat, rngs=rngs)
        self.audio = AudioTower(config.audio, **common)
        self.vision = VisionTower(config.vision, **common)
        self.text = TextDecoder(config.text, tied=config.tie_word_embeddings, **common)

    def encode_media(self, vision: VisionClips | None, audio: AudioClips | None) -> jax.Array | None:
        """Runs the towers.

        Returns:
            features_BRD in the compute dtype, V * (P * S / 4) vision rows and then A * (U * 50) audio rows, clip after
            clip; None when there is neither kind.
        """
        towers = [(self.vision, vision), (self.audio, audio)]
        parts = [tower(clips) for tower, clips in towers if clips is not None]
        parts = [part.reshape(part.shape[0], -1, part.shape[-1]) for part in parts if part.shape[1]]
        if not parts:
            return None
        return constrain(jnp.concatenate(parts, axis=1), BTD)

    @jax.named_scope("embed")
    def embed(self, tokens: Tokens, features_BRD: jax.Array | None, layout: FeatureLayout) -> jax.Array:
        """Embeddings x_BTD: the token's own, or the feature row of the same batch row that it points to.

        Raises:
            ValueError: features that do not have the layout's number of rows.
        """
        x_BTD = constrain(self.text.embed(tokens.id_BT), BTD)
        if features_BRD is None:
            return x_BTD
        if features_BRD.shape[1] != layout.rows:
            raise ValueError(f"features of shape {features_BRD.shape}: the layout {layout} has {layout.rows} rows")
        index_BT = layout.index(tokens.source_BT2)
        media_BTD = jnp.take_along_axis(features_BRD, index_BT[..., None], axis=1, mode="clip")
        is_media_BT1 = tokens.source_BT2[..., :1] >= 0
        return constrain(jnp.where(is_media_BT1, media_BTD.astype(x_BTD.dtype), x_BTD), BTD)

    def hidden(self, tokens: Tokens, features_BRD: jax.Array | None, layout: FeatureLayout) -> jax.Array:
        """Hidden states h_BTD after the final norm; those of padding tokens are finite and mean nothing."""
        x_BTD = self.embed(tokens, features_BRD, layout)
        return self.text.rows(x_BTD, tokens.segment_BT, tokens.position_3BT, keep=False)[0]

    def logits(self, h: jax.Array) -> jax.Array:
        """float32 logits[..., N] of hidden states h[..., D]."""
        return self.text.logits(h)

    def gather_logprobs(self, h: jax.Array, token: jax.Array | None = None, **settings: Any) -> Scores:
        """Scores of hidden states h[..., D] without the logits of all of them in memory.

        Args:
            h: hidden states.
            token: int32 [...] tokens to score.
            settings: sets, candidate_ids_ZY, mask, temperature, entropy_gradient, chunk, implementation of
                `mer_r1_jax.kernels.logprobs.api.gather_logprobs`.
        """
        return self.text.gather_logprobs(h, token, **settings)

    def prefill(
        self, tokens: Tokens, features_BRD: jax.Array | None, layout: FeatureLayout
    ) -> tuple[jax.Array, PromptCache]:
        """Hidden states h_BTD of the prompts, and the keys and values that completions will look back at."""
        x_BTD = self.embed(tokens, features_BRD, layout)
        h_BTD, cache = self.text.rows(x_BTD, tokens.segment_BT, tokens.position_3BT, keep=True)
        assert cache is not None  # it was asked for
        return h_BTD, cache

    def init_cache(self, rows: int, generations: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache for `length` own tokens of `generations` completions in each of `rows` rows.

        `dtype` defaults to the compute dtype.
        """
        text = self.config.text
        shape = (text.num_hidden_layers, rows, generations, length, text.num_key_value_heads, text.head_dim)
        empty = constrain(
            jnp.zeros(shape, dtype or self.config.compute_dtype),
            ("layers", "batch", "group", "length", "kv_heads", "head_dim"),
        )
        return Cache(k_LBGCKh=empty, v_LBGCKh=empty)

    def decode(
        self, token_BG: jax.Array, position_BG: jax.Array, slot: jax.Array, prompt_cache: PromptCache, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """One token of every completion.

        Args:
            token_BG, position_BG: int32; the position counts on all three axes.
            slot: int32 scalar, the token's place among its completion's own; slots before it have to be written.
            prompt_cache: of the rows' prompts, one for all completions of a row.
            cache: of the completions; donate it.

        Returns:
            (h_BGD after the final norm, the cache with the token).
        """
        x_BGD = self.text.embed(token_BG)
        return self.text.token(x_BGD, position_BG, slot, prompt_cache, cache)

    def for_decoding(self, prompt_cache: PromptCache, cache: Cache) -> tuple[Decode, PromptCache, Cache]:
        """How a loop over tokens decodes, and the caches as it reads them; call it outside the loop.

        Where the platform copies slices of stacked arrays, layers and caches are taken apart once, which takes the
        decoder's layers once more in memory for as long as the loop runs.

        Returns:
            a function like `decode`, and the caches for it; `Cache.stacked` undoes what is done to the second.
        """
        if not self.text.slices_are_copied():
            return self.decode, prompt_cache, cache
        layers = self.text.unstacked_layers()

        def decode(token_BG, position_BG, slot, prompt_cache, cache):
            return self.text.token_by_layers(layers, self.text.embed(token_BG), position_BG, slot, prompt_cache, cache)

        return decode, prompt_cache.unstacked(), cache.unstacked()

    def contexts(
        self, id_BGC: jax.Array, segment_BGC: jax.Array, position_BGC: jax.Array, prompt_cache: PromptCache
    ) -> jax.Array:
        """Hidden states h_BGCD of given completions, all tokens at once, without running their prompts again.

        Args:
            id_BGC: int32 tokens.
            segment_BGC: int32, PADDING where there is no token; a token sees its prompt and what is before it in its
                segment.
            position_BGC: int32, for all three axes.
            prompt_cache: of the rows' prompts.
        """
        return self.text.contexts(self.text.embed(id_BGC), segment_BGC, position_BGC, prompt_cache)


def abstract_thinker(config: ThinkerConfig) -> tuple[nnx.GraphDef, Params, dict[str, Any]]:
    """The Thinker without numbers.

    Returns:
        (graphdef for `bind`; nested dict of jax.ShapeDtypeStruct; the same tree of logical axis names, one tuple a
        parameter, "layers" first for stacked ones).
    """
    graphdef, state = _abstract(config)
    axes: dict[Any, Any] = {}
    for path, param in nnx.to_flat_state(state):
        node = axes
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = ("layers",) * ("layers" in path) + param.get_metadata("axes")
    return graphdef, nnx.to_pure_dict(state), axes


@functools.lru_cache(maxsize=16)
def _abstract(config: ThinkerConfig):
    return nnx.split(nnx.eval_shape(lambda: Thinker(config, rngs=nnx.Rngs(0))))


def init_params(config: ThinkerConfig, key: jax.Array) -> Params:
    """Random parameters as a nested dict; pure, so it can be jitted with `out_shardings`.

    Kernels and tables are normal with `initializer_range`, biases zero, norm scales one.
    """
    return nnx.to_pure_dict(nnx.split(Thinker(config, rngs=nnx.Rngs(params=key)))[1])


def bind(graphdef: nnx.GraphDef, params: Params) -> Thinker:
    """The module over these parameters; cheap, meant for the inside of a jitted function."""
    return nnx.merge(graphdef, params)
