"""The lab's policy: 15,000 parameters that look at nine displays, reason in a few tokens and answer in words.

What decides on a token is the sum of the embeddings of everything shown and said before it, and one hidden layer on top
of that. A fast answer comes from the same head, behind a reasoning of SKIPPED tokens. Nothing here knows of rewards.

Shape letters: P places of a completion (reasoning, then answer), V vocabulary, H width; `...` any leading axes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.data.synthetic.world import SLOTS
from mer_r1_jax.lab.scenes import COUNT, DISPLAYS, FIRST_WORD, SKIPPED, STOP, VOCABULARY, WORDS_EACH
from mer_r1_jax.lab.worlds import ANSWER_WORDS, LabConfig
from mer_r1_jax.omni.batch import Array
from mer_r1_jax.rl import sampling
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.training.state import Params

NEVER = -1e9  # logit of a token that may not be said here
FLOOR = float(np.log(1e-10))  # of a confidence, as in rl/confidence.py
_INPUT_SCALE = 0.3  # standard deviation of embeddings: a dozen of them add up to about one


def init(config: LabConfig, rng: np.random.Generator) -> Params:
    """Random parameters."""
    width, trace = config.width, config.trace_length
    shapes = {
        "display": (len(SLOTS), DISPLAYS, width),
        "trace": (trace, FIRST_WORD, width),  # a suggestion means something else at another place
        "word": (VOCABULARY - FIRST_WORD, width),  # a word means the same wherever it is said
        "place": (trace + ANSWER_WORDS, width),
        "hidden": (width, width),
        "head": (width, VOCABULARY),
    }
    scales = {"hidden": width**-0.5, "head": width**-0.5}
    drawn = {name: scales.get(name, _INPUT_SCALE) * rng.standard_normal(shape) for name, shape in shapes.items()}
    drawn |= {"hidden_bias": np.zeros(width), "head_bias": np.zeros(VOCABULARY)}
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def logits(params: Params, display: Array, token: Array, config: LabConfig, *, answer_only: bool = False) -> Array:
    """Untempered logits of every token of given completions, float32 [..., P, V]; NEVER where one may not stand.

    Args:
        params: of the policy.
        display: int32 [..., 9], as seen; its leading axes may have length one.
        token: int32 [..., P].
        config: the experiment.
        answer_only: only those of the answer, [..., ANSWER_WORDS, V].
    """
    trace = config.trace_length
    hot = jax.nn.one_hot(token, VOCABULARY)
    embedded = jnp.concatenate(
        [
            jnp.einsum("...pv,pvh->...ph", hot[..., :trace, :FIRST_WORD], params["trace"]),
            hot[..., trace:, FIRST_WORD:] @ params["word"],
        ],
        axis=-2,
    )
    # What came before each place, as a product: XLA's running sums take long to compile and to run on CPUs.
    earlier_PP = np.tri(config.trace_length + ANSWER_WORDS, k=-1, dtype=np.float32)
    before = jnp.einsum("qp,...ph->...qh", earlier_PP, embedded)
    said = jnp.einsum("qp,...pv->...qv", earlier_PP, hot) > 0
    looks = _looks(config)[:, None] | (token[..., :1, None] == SKIPPED)
    state = before + jnp.where(looks, _look(params, display)[..., None, :], 0.0) + params["place"]
    first = trace if answer_only else 0
    return _head(params, state[..., first:, :], (_allowed(config) & ~(said & _IS_WORD))[..., first:, :])


class Manner(NamedTuple):
    """How answers are sampled.

    Attributes:
        sampling: temperature and filters.
        fast: without a reasoning.
        stop_bias: added to the logit of STOP: names more below zero, fewer above.
    """

    sampling: SamplingConfig
    fast: bool = False
    stop_bias: Array | float = 0.0


def sample(params: Params, display: Array, uniform: Array, manner: Manner, config: LabConfig) -> tuple[Array, Array]:
    """Samples completions token by token.

    Args:
        params: of the policy.
        display: int32 [..., 9], as seen; its leading axes may have length one.
        uniform: float32 [P, ...], one number in [0, 1) for each token.
        manner: slow or fast, how often the likeliest.
        config: the experiment.

    Returns:
        Tokens int32 [..., P] and the untempered, unbiased logits that predicted those of the answer,
        float32 [..., ANSWER_WORDS, V].
    """
    how, fast, stop_bias = manner
    trace, leading = config.trace_length, uniform.shape[1:]
    first = trace if fast else 0
    look = jnp.broadcast_to(_look(params, display), (*leading, config.width))
    heard = params["trace"][:, SKIPPED].sum(axis=0) * fast
    bias_V = jnp.zeros(VOCABULARY).at[STOP].set(stop_bias)

    def speak(carry, place):
        heard, said, stopped = carry
        embedding_VH, place_H, allowed_V, looks, uniform = place
        raw = _head(params, heard + looks * look + place_H, allowed_V & ~said)
        token = jnp.where(stopped, STOP, sampling.sample(raw + bias_V, uniform, how)[0])
        said = said | ((token[..., None] == jnp.arange(VOCABULARY)) & _IS_WORD)
        return (heard + embedding_VH[token], said, stopped | (token == STOP)), (token, raw)

    start = (
        jnp.broadcast_to(heard, (*leading, config.width)),
        jnp.zeros((*leading, VOCABULARY), bool),
        jnp.zeros(leading, bool),
    )
    looks_P = jnp.asarray(_looks(config) | fast, jnp.float32)
    places = (_embeddings(params, config), params["place"], jnp.asarray(_allowed(config)), looks_P, uniform)
    _, (token, raw) = jax.lax.scan(speak, start, jax.tree.map(lambda x: x[first:], places))
    skipped = jnp.full((first, *leading), SKIPPED, jnp.int32)
    return jnp.moveaxis(jnp.concatenate([skipped, token]), 0, -1), jnp.moveaxis(raw[trace - first :], 0, -2)


def confidences(logits: Array, token: Array) -> Array:
    """log-probability that the next word is of the said word's category, and that it is this word: [..., 2], in nats.

    Args:
        logits: float32 [..., V], untempered.
        token: int32 [...], words of an answer; values at STOP mean nothing.
    """
    logprob = jax.nn.log_softmax(logits)[..., FIRST_WORD:STOP]
    by_category = jax.nn.logsumexp(logprob.reshape(*logprob.shape[:-1], COUNT, WORDS_EACH), axis=-1)
    word = jnp.minimum(token, STOP - 1) - FIRST_WORD
    of_category = jnp.take_along_axis(by_category, word[..., None] // WORDS_EACH, axis=-1)
    of_word = jnp.take_along_axis(logprob, word[..., None], axis=-1)
    return jnp.maximum(jnp.concatenate([of_category, of_word], axis=-1), FLOOR)


def category_of(token: Array) -> Array:
    """The category of a word, int32 [...]; some category at STOP."""
    return (jnp.minimum(token, STOP - 1) - FIRST_WORD) // WORDS_EACH


def answer_code(answer: Array) -> Array:
    """Code of the categories that an answer [..., ANSWER_WORDS] names, int32 [...]."""
    named = (category_of(answer)[..., None] == jnp.arange(COUNT)) & (answer != STOP)[..., None]
    return jnp.sum(jnp.any(named, axis=-2) << jnp.arange(COUNT), axis=-1)


def spoken(token: Array) -> Array:
    """bool [..., P], the tokens that were sampled: all up to the first STOP, that one included."""
    earlier_PP = np.tri(token.shape[-1], k=-1, dtype=np.float32)
    return jnp.einsum("qp,...p->...q", earlier_PP, (token == STOP).astype(jnp.float32)) == 0


_IS_WORD = (np.arange(VOCABULARY) >= FIRST_WORD) & (np.arange(VOCABULARY) < STOP)


def _allowed(config: LabConfig) -> np.ndarray:
    """bool [P, V]: where each token may stand. An answer has at least one word, so every completion is well-formed."""
    in_trace = np.arange(VOCABULARY) < SKIPPED
    in_answer = np.arange(VOCABULARY) >= FIRST_WORD
    allowed = np.stack([in_trace] * config.trace_length + [in_answer] * ANSWER_WORDS)
    allowed[config.trace_length, STOP] = False
    return allowed


def _looks(config: LabConfig) -> np.ndarray:
    """bool [P], the places at which a slow completion sees the clip."""
    return (np.arange(config.trace_length + ANSWER_WORDS) < config.trace_length) | (not config.answers_from_trace)


def _look(params: Params, display: Array) -> Array:
    """Sum of the displays' embeddings, [..., H]."""
    hot = jax.nn.one_hot(display, DISPLAYS)
    return jnp.einsum("...sd,sdh->...h", hot, params["display"])


def _embeddings(params: Params, config: LabConfig) -> Array:
    """[P, V, H], what a token said at a place adds."""
    trace, word = params["trace"], params["word"]
    pad = VOCABULARY - FIRST_WORD
    in_trace = jnp.pad(trace, ((0, 0), (0, pad), (0, 0)))
    in_answer = jnp.pad(word, ((FIRST_WORD, 0), (0, 0)))
    return jnp.concatenate([in_trace, jnp.broadcast_to(in_answer, (ANSWER_WORDS, *in_answer.shape))])


def _head(params: Params, state: Array, allowed: Array) -> Array:
    """Logits of states [..., H]."""
    active = jax.nn.relu(state)
    active = active + jax.nn.relu(active @ params["hidden"] + params["hidden_bias"])
    return jnp.where(allowed, active @ params["head"] + params["head_bias"], NEVER)
