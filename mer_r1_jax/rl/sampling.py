"""Sampling one token per row: filters, inverse-CDF draws, and random bits that belong to a sample, not to a batch.

Shape letters are those of `mer_r1_jax.omni.batch`; `...` stands for any leading axes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.omni.batch import Array

BLOCK = 128  # tokens of one block of the two-level inverse CDF
GREEDY = 0.0  # the temperature at which the most likely token is taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a group of completions is sampled. Static and hashable: part of the compiled program.

    Filters are applied to the distribution at `temperature`, in the order top-k, top-p, min-p (transformers' order).
    Tokens that tie with the last one kept by top-k or top-p are kept too.

    Attributes:
        max_completion_length: tokens sampled at most, the end token included and a forced prefix not.
        eos_ids: a completion ends with the first of these.
        banned_ids: never sampled (media placeholders and other special tokens).
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: tokens kept, 0 = all.
        top_p: probability mass kept, in (0, 1].
        min_p: tokens less likely than this share of the most likely one are dropped, in [0, 1).
        num_generations: completions of each prompt (G).
        forced_ids: ids that every completion is made to start with: the empty think block of fast answers.

    Raises:
        ValueError: a value is out of its range, or an end token is banned.
    """

    max_completion_length: int
    eos_ids: tuple[int, ...]
    banned_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_generations: int = 1
    forced_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {self.max_completion_length}, expected at least 1 token")
        if not self.eos_ids:
            raise ValueError("eos_ids is empty: without an end token every completion would run into the length cap")
        if banned := sorted(set(self.eos_ids) & set(self.banned_ids)):
            raise ValueError(f"end token ids {banned} are banned: take them out of banned_ids")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a probability mass in (0, 1], 1 being off")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p is {self.min_p}, expected a share in [0, 1), 0 being off")
        if self.num_generations < 1:
            raise ValueError(f"num_generations is {self.num_generations}, expected at least 1 completion of a prompt")


def greedy(sampling: SamplingConfig, forced_ids: tuple[int, ...] = ()) -> SamplingConfig:
    """The same for one answer a prompt, each token the most likely one, after a forced prefix."""
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return dataclasses.replace(sampling, temperature=GREEDY, num_generations=1, forced_ids=forced_ids, **off)


def uniforms(key: Array, prompt_uid_B: Array, generations: int, length: int) -> Array:
    """One uniform number per token, a function of (key, prompt, generation, token index) alone.

    So a sample does not change with the batch, the row or the host it is decoded in.

    Args:
        key: of this rollout: the run's key with the number of rollouts before it folded in.
        prompt_uid_B: uint32, a number that identifies the prompt in the data set.
        generations: completions of a prompt (G).
        length: tokens of a completion (C).

    Returns:
        float32 [B, G, C] in [0, 1).
    """

    def draw(uid, generation, token):
        token_key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, uid), generation), token)
        return jax.random.uniform(token_key, (), jnp.float32)

    # One key a token: a longer or chunked rollout draws the same numbers for its first tokens.
    over_tokens = jax.vmap(draw, (None, None, 0))
    over_generations = jax.vmap(over_tokens, (None, 0, None))
    over_prompts = jax.vmap(over_generations, (0, None, None))
    return over_prompts(prompt_uid_B, jnp.arange(generations), jnp.arange(length))


def sample(logits: Array, uniform: Array, config: SamplingConfig) -> tuple[Array, Array, Array]:
    """Samples a token from each row of logits.

    Args:
        logits: float32 [..., N], untempered.
        uniform: float32 [...], one number in [0, 1) per row; unused when greedy.
        config: filters and temperature.

    Returns:
        token int32 [...]; its log-probability under the untempered distribution over the whole vocabulary, float32
        [...]; its log-probability under the distribution it was drawn from, float32 [...] (0 when greedy).
    """
    # Bans, temperature and filters shape what is drawn; what the model itself gives the token is told untouched.
    allowed = logits + banned_bias(config.banned_ids, logits.shape[-1])
    if config.temperature == GREEDY:
        token = _most_likely(allowed)
        sampling_logprob = jnp.zeros(token.shape, jnp.float32)
    else:
        token, sampling_logprob = _draw(_filtered(allowed / config.temperature, config), uniform)
    logprob = _pick(logits, token) - jax.nn.logsumexp(logits, axis=-1)
    return token, logprob, sampling_logprob


def _most_likely(logits: Array) -> Array:
    """Argmax int32 [...] as two plain reductions: they vectorise, XLA's argmax does not (4 times as slow on a CPU)."""
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    # Of equal ones the first, as argmax; a row of NaN equals nothing and gives the last id, which is still an id.
    best = jnp.where(logits == jnp.max(logits, axis=-1, keepdims=True), index, logits.shape[-1] - 1)
    return jnp.min(best, axis=-1)


def banned_bias(banned_ids: tuple[int, ...], vocabulary: int) -> np.ndarray:
    """float32 [N] to add to logits: minus infinity on banned ids, 0 elsewhere.

    Raises:
        ValueError: an id is outside the vocabulary, or nothing is left to sample.
    """
    bias = np.zeros(vocabulary, np.float32)
    outside = [i for i in banned_ids if not 0 <= i < vocabulary]
    if outside:
        raise ValueError(f"banned ids {outside[:8]} are outside the vocabulary of {vocabulary} tokens")
    bias[list(banned_ids)] = -np.inf
    if np.isneginf(bias).all():
        raise ValueError("every token of the vocabulary is banned: leave at least one to sample")
    return bias


def _filtered(scaled: Array, config: SamplingConfig) -> Array:
    """Tempered logits [..., N] with the tokens that top-k, top-p and min-p drop set to minus infinity."""
    if 0 < config.top_k < scaled.shape[-1]:
        scaled = jnp.where(_top(scaled, jnp.ones_like(scaled), config.top_k), scaled, -jnp.inf)
    if config.top_p < 1:
        # Probabilities times one factor, and `reach` times the same: nothing has to be normalised.
        weight = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
        reach = config.top_p * jnp.sum(weight, axis=-1, keepdims=True)
        scaled = jnp.where(_top(scaled, weight, reach), scaled, -jnp.inf)
    if config.min_p > 0:
        # p < min_p x p_max, as logits.
        floor = jnp.max(scaled, axis=-1, keepdims=True) + np.log(config.min_p)
        scaled = jnp.where(scaled < floor, -jnp.inf, scaled)
    return scaled


def _top(values: Array, amount: Array, reach: Array | float) -> Array:
    """bool [..., N], the fewest largest values whose amounts add up to `reach`, and those that tie with the last.

    They are the values at or above a threshold, found exactly by bisection over the bits of a float32: 32 sums over the
    vocabulary, where sorting it takes ten times as long.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    key = jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)  # integers in the order of the floats

    def halve(_, bounds):
        low, high = bounds  # keys from `low` on are enough, those from `high` on are not
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        enough = jnp.sum(jnp.where(key >= middle, amount, 0.0), axis=-1, keepdims=True) >= reach
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    limits = np.iinfo(np.int32)
    bounds = jnp.full_like(key[..., :1], limits.min), jnp.full_like(key[..., :1], limits.max)
    return key >= jax.lax.fori_loop(0, 32, halve, bounds)[0]


def _draw(scaled: Array, uniform: Array) -> tuple[Array, Array]:
    """Inverse CDF from one uniform per row: token int32 [...] and its log-probability float32 [...].

    In two levels, blocks and then tokens of one block: a running sum over the whole vocabulary is slow on every
    backend, and a draw of Gumbel noise would need a random number and a logarithm per vocabulary entry.
    """
    count = scaled.shape[-1]
    blocks = -(-count // BLOCK)
    # Relative to the peak no exponential overflows; the padding of the last block weighs 0 and is never drawn.
    peak = jnp.max(scaled, axis=-1, keepdims=True)
    weight = jnp.exp(scaled - peak)
    weight = jnp.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, blocks * BLOCK - count)])
    weight = weight.reshape(*weight.shape[:-1], blocks, BLOCK)
    block_weight = jnp.sum(weight, axis=-1)
    block_sum = jnp.cumsum(block_weight, axis=-1)
    total = block_sum[..., -1]
    target = uniform * total
    block = _interval(block_weight, block_sum, target)
    # What lies before the block; the rest of the target is looked for inside it.
    before = _pick(block_sum, block) - _pick(block_weight, block)
    inside = jnp.take_along_axis(weight, block[..., None, None], axis=-2)[..., 0, :]
    token = block * BLOCK + _interval(inside, jnp.cumsum(inside, axis=-1), target - before)
    return token, _pick(scaled, token) - peak[..., 0] - jnp.log(total)


def _interval(weight: Array, running: Array, target: Array) -> Array:
    """Index [...] of the interval of the running sum [..., n] that holds the target, never one of weight zero.

    Rounding can leave the target at or beyond the end of the running sum; the last interval with any weight is meant.
    """
    index = jnp.sum(running <= target[..., None], axis=-1)
    count = weight.shape[-1]
    last = count - 1 - jnp.argmax(jnp.flip(weight > 0, axis=-1), axis=-1)
    index = jnp.minimum(index, last).astype(jnp.int32)
    # `target - before` can round to just below 0 or above an interval's edge: step on to the next one with weight.
    following = (jnp.arange(count) >= index[..., None]) & (weight > 0)
    return jnp.argmax(following, axis=-1).astype(jnp.int32)


def _pick(values: Array, index: Array) -> Array:
    """values [..., n] at index [...]."""
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]
