"""What rollout, scoring and losses ask of a model: nothing but these functions (`training/backbone.py` has the rest).

Shape letters are those of `mer_r1_jax.omni.batch`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from mer_r1_jax.kernels.logprobs.api import Scores
from mer_r1_jax.omni.batch import Array, AudioClips, FeatureLayout, Tokens, VisionClips
from mer_r1_jax.omni.text import Cache, Decode, PromptCache


@runtime_checkable
class BoundModel(Protocol):
    """A model around its parameters, inside `jit`: pure functions of arrays.

    The same token must get the same hidden state, up to rounding, from `hidden`, from `prefill` with `contexts`, and
    from `prefill` with `decode`: a completion is sampled by the last and scored by one of the others.
    """

    def encode_media(self, vision: VisionClips | None, audio: AudioClips | None) -> Array | None:
        """Features [B, R, D] of clips, one row for each media token of the prompts; None without clips."""
        ...

    def hidden(self, tokens: Tokens, features_BRD: Array | None, layout: FeatureLayout) -> Array:
        """Hidden states [B, T, D] after the last norm; tokens see earlier ones of their segment, and the prompt."""
        ...

    def prefill(self, tokens: Tokens, features_BRD: Array | None, layout: FeatureLayout) -> tuple[Array, PromptCache]:
        """Those of prompts, and the keys and values that all completions of a prompt look back at."""
        ...

    def contexts(self, id_BGC: Array, segment_BGC: Array, position_BGC: Array, prompt_cache: PromptCache) -> Array:
        """Hidden states [B, G, C, D] of given completions, without running their prompts again.

        C may hold several texts, one behind the other: a token sees the prompt and earlier tokens of its segment.
        """
        ...

    def init_cache(self, rows: int, generations: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache for the completions' own tokens, in the compute dtype unless another is given."""
        ...

    def decode(
        self, token_BG: Array, position_BG: Array, slot: Array, prompt_cache: PromptCache, cache: Cache
    ) -> tuple[Array, Cache]:
        """One token of every completion: hidden states [B, G, D], and the cache with the token in its slot."""
        ...

    def for_decoding(self, prompt_cache: PromptCache, cache: Cache) -> tuple[Decode, PromptCache, Cache]:
        """`decode` for a loop over tokens, and the caches as it takes them: both as they are, or as the platform likes.

        The loop hands the cache back through `Cache.stacked`.
        """
        ...

    def logits(self, h: Array) -> Array:
        """float32 logits [..., N] of hidden states [..., D], over the whole vocabulary."""
        ...

    def gather_logprobs(self, h: Array, token: Array | None = None, **settings: Any) -> Scores:
        """Log-probabilities of tokens or of candidate sets, without the logits of all hidden states in memory.

        Args:
            h: hidden states [..., D].
            token: int32 [...] tokens to score.
            settings: those of `mer_r1_jax.kernels.logprobs.api.gather_logprobs`.
        """
        ...
