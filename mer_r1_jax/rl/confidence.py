"""Slow-fast confidence calibration: how sure the model is of its own answer with and without its reasoning.

For each emotion word e of a sampled answer, at the position that predicts the word's first token (its anchor),

    conf_m(c) = log sum over w in V(c) of p_m(w),   c = c(e) the word's category on a wheel,

where p_m conditions on the prompt, the same answer prefix and, for m = slow, the sample's own reasoning; for m = fast,
an empty one. D(e) = conf_slow - conf_fast. R+ is the mean of D over correct words, R- the mean of -D over wrong ones;
both per wheel, then averaged over the wheels that have such words (MER-R1, the calibration section). With
rl.calibration_counts = "category" (ours) a word counts on a wheel only if none before it names the same category there.

The host part works on token ids and never tokenises a sample again; the device part computes logits at anchors only,
for slow and fast in one call.

Shape letters besides those of `mer_r1_jax.omni.batch`: W words of an answer, Q emotion wheels, Z candidate sets, Y
tokens of a candidate set.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.omni.batch import Array
from mer_r1_jax.rl.bound_model import BoundModel
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.tags import AnswerTags

NO_SET = -1  # the word has no candidates on this wheel, or may not be used

# Why a completion or a word has no confidence; counted under these names.
BAD_FORMAT = "bad_format"  # completions without a well-formed answer
MERGED_TAG = "merged_tag"  # completions whose `>` token also holds letters of the answer
TOO_LONG = "too_long"  # completions whose fast scoring context does not fit
SURPLUS_WORDS = "surplus_words"  # words beyond the number that is kept
UNLOCATED_WORDS = "unlocated_words"  # words that are not found among the tokens
REASONS = (BAD_FORMAT, MERGED_TAG, TOO_LONG, SURPLUS_WORDS, UNLOCATED_WORDS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Anchors:
    """Where the words of a batch of sampled answers are predicted, and what counts as naming their category.

    Attributes:
        slow_BGW: int32, index of the word's first token in its completion; the hidden state that predicts that token
            is the anchor. 0 where the word is not used. W counts the answer's words in their order.
        fast_BGW: int32, the same in the fast scoring context.
        set_BGWQ: int32, candidate set of the word on each wheel, NO_SET where there is none.
        correct_BGWQ: bool, the word's category on that wheel is among the truth's.
        fast: the fast scoring contexts, E + the completion's own ids after the token that holds the `>` of `<answer>`,
            up to the last word's first token; nothing where a completion has no confidence.
        repeat_BGWQ: bool, an earlier word of the answer has named the word's category on that wheel, so R+ and R- leave
            the word out there; its confidence is as good as any. None where every word counts.
    """

    slow_BGW: Array
    fast_BGW: Array
    set_BGWQ: Array
    correct_BGWQ: Array
    fast: Continuations
    repeat_BGWQ: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerToScore:
    """What the host knows about one sampled answer.

    Attributes:
        ids: int32 [C], the completion's own ids.
        length: how many of them exist.
        words: its distinct emotion words, lower-case, in order.
        usable: it is well-formed (format reward 1), so that its words may be given confidences.
    """

    ids: np.ndarray
    length: int
    words: Sequence[str]
    usable: bool


def build_anchors(
    answers: Sequence[Sequence[AnswerToScore]],
    truth_categories: Sequence[Sequence[frozenset[str] | set[str]]],
    *,
    tags: AnswerTags,
    category: Callable[[str, int], str | None],
    candidate_sets: Callable[[str], Sequence[int]],
    config: RlConfig,
    fast_contexts: bool = True,
) -> tuple[Anchors, dict[str, int]]:
    """Locates the words of sampled answers and builds their fast scoring contexts. Host code, numpy only.

    Args:
        answers: B prompts of G answers each.
        truth_categories: for each prompt the set of true categories on each of the Q wheels.
        tags: the tags under the run's tokenizer.
        category: (word, wheel) -> category or None (`Wheels.category`).
        candidate_sets: word -> index of its candidate set on each wheel, -1 for none (`CandidateTable.word`).
        config: sizes: words of an answer that get a confidence (W), tokens of a fast scoring context (C).
        fast_contexts: False where words are asked about behind their own reasoning alone: no fast context is made, so
            none is too long, and `Anchors.fast` is empty.

    Returns:
        Anchors with numpy leaves, and how often each of REASONS occurred.
    """
    rows, generations, wheels = len(answers), len(answers[0]), len(truth_categories[0])
    shape_BGW = (rows, generations, config.max_answer_words)
    shape_BGC = (rows, generations, config.max_fast_context)
    slow_BGW, fast_BGW = np.zeros(shape_BGW, np.int32), np.zeros(shape_BGW, np.int32)
    set_BGWQ = np.full((*shape_BGW, wheels), NO_SET, np.int32)
    correct_BGWQ = np.zeros((*shape_BGW, wheels), bool)
    repeat_BGWQ = np.zeros((*shape_BGW, wheels), bool)
    fast_id_BGC, fast_exists_BGC = np.zeros(shape_BGC, np.int32), np.zeros(shape_BGC, bool)
    counts: collections.Counter[str] = collections.Counter({reason: 0 for reason in REASONS})
    for b, group in enumerate(answers):
        for g, answer in enumerate(group):
            words, context = _place(answer, tags, config, counts, fast_contexts)
            fast_id_BGC[b, g, : len(context)] = context
            fast_exists_BGC[b, g, : len(context)] = True
            named: set[tuple[int, str | None]] = set()
            for w, word, slow, fast in words:
                slow_BGW[b, g, w], fast_BGW[b, g, w] = slow, fast
                found = [category(word, q) for q in range(wheels)]
                # A wheel on which the truth has no category can tell neither right from wrong.
                known = [c is not None and bool(true) for c, true in zip(found, truth_categories[b], strict=True)]
                repeat_BGWQ[b, g, w] = [place in named for place in enumerate(found)]
                named.update(enumerate(found))
                set_BGWQ[b, g, w] = np.where(known, candidate_sets(word), NO_SET)
                correct_BGWQ[b, g, w] = [c in true for c, true in zip(found, truth_categories[b], strict=True)]
    anchors = Anchors(
        slow_BGW=slow_BGW,
        fast_BGW=fast_BGW,
        set_BGWQ=set_BGWQ,
        correct_BGWQ=correct_BGWQ,
        fast=Continuations(id_BGC=fast_id_BGC, exists_BGC=fast_exists_BGC),
        # A mean over words pays for synonyms: their confidence is high where the first is said already.
        repeat_BGWQ=repeat_BGWQ if config.calibration_counts == "category" else None,
    )
    return anchors, dict(counts)


def _place(
    answer: AnswerToScore,
    tags: AnswerTags,
    config: RlConfig,
    counts: collections.Counter[str],
    fast_contexts: bool,
) -> tuple[list[tuple[int, str, int, int]], list[int]]:
    """(w, word, slow index, fast index) of the words with a confidence, and the fast scoring context's ids."""
    located = tags.locate(answer.ids, answer.length) if answer.usable else None
    if located is None:
        counts[BAD_FORMAT] += answer.length > 0  # a row that does not exist is nothing to count
        return [], []
    if located.merged:
        counts[MERGED_TAG] += 1
        return [], []
    counts[SURPLUS_WORDS] += max(len(answer.words) - config.max_answer_words, 0)
    kept = answer.words[: config.max_answer_words]
    found = [(w, word, located.first_token[word]) for w, word in enumerate(kept) if word in located.first_token]
    counts[UNLOCATED_WORDS] += len(kept) - len(found)
    if not found:
        return [], []
    if not fast_contexts:
        return [(w, word, slow, 0) for w, word, slow in found], []
    # From behind the token with the `>` of `<answer>`, which the empty think block brings itself, to the last word's
    # first token: no later one is scored.
    own = [int(i) for i in answer.ids[located.opening + 1 : max(slow for _, _, slow in found) + 1]]
    context = [*tags.empty_think, *own]
    if len(context) > config.max_fast_context:
        counts[TOO_LONG] += 1
        return [], []
    # The same token in both rows: what stood behind the reasoning stands behind the empty think block.
    shift = len(tags.empty_think) - (located.opening + 1)
    return [(w, word, slow, slow + shift) for w, word, slow in found], context


def anchor_hidden(h_BGCD: Array, index_BGW: Array) -> Array:
    """Hidden states [B, G, W, D] that predict the tokens at `index` of each continuation.

    Args:
        h_BGCD: hidden states that predict each token of the continuations (`packing.predictor_hidden`).
        index_BGW: int32 token indices.
    """
    return jnp.take_along_axis(h_BGCD, index_BGW[..., None], axis=2)


def set_logprobs(
    model: BoundModel, h: Array, sets: Array, candidate_ids_ZY: Array, *, chunk: int | None = None
) -> Array:
    """log of the probability that the next token is one of a candidate set's, untempered and over the whole vocabulary.

    Args:
        model: the policy.
        h: hidden states [..., D].
        sets: int32 [..., Q], candidate set of each wheel, NO_SET for none.
        candidate_ids_ZY: int32, token ids of each set, -1 where a set has fewer.
        chunk: hidden states whose logits are held at once where whole logits are computed; None chooses.

    Returns:
        float32 [..., Q] in nats, never below log(1e-10); that value too where there is no set.
    """
    return model.gather_logprobs(h, sets=sets, candidate_ids_ZY=candidate_ids_ZY, chunk=chunk).sets


def confidences(
    model: BoundModel,
    slow_h_BGCD: Array,
    fast_h_BGCD: Array,
    anchors: Anchors,
    candidate_ids_ZY: Array,
    *,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """Slow and fast confidence of every word on every wheel, through one call: same code path, dtype and block shape.

    Kernel-shape differences of 0.01-0.07 nats would drown the differences that matter.

    Args:
        model: the policy.
        slow_h_BGCD: hidden states that predict the completions' tokens.
        fast_h_BGCD: hidden states that predict the fast contexts' tokens, from the same packed forward pass.
        anchors: the words.
        candidate_ids_ZY: int32, token ids of each candidate set, -1 where a set has fewer.
        chunk: as in `set_logprobs`.

    Returns:
        slow and fast, float32 [B, G, W, Q] in nats; without meaning where `anchors.set_BGWQ` is NO_SET.
    """
    # [2, B, G, W, D]: slow and fast as one batch, so that one kernel with one block shape scores both.
    h = jnp.stack([anchor_hidden(slow_h_BGCD, anchors.slow_BGW), anchor_hidden(fast_h_BGCD, anchors.fast_BGW)])
    sets = jnp.broadcast_to(anchors.set_BGWQ, (2, *anchors.set_BGWQ.shape))
    both = set_logprobs(model, h, sets, candidate_ids_ZY, chunk=chunk)
    return both[0], both[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedWords:
    """Words of given continuations that a policy is asked about.

    Attributes:
        continuation: the texts, each up to its last word's first token at least.
        index_BGW: int32, index of each word's first token in its continuation.
        set_BGWQ: int32, candidate set of the word on each wheel, NO_SET where there is none.
    """

    continuation: Continuations
    index_BGW: Array
    set_BGWQ: Array


def asked_logprobs(
    model: BoundModel, hidden: Sequence[Array], asked: Sequence[AskedWords], candidate_ids_ZY: Array
) -> tuple[Array, ...]:
    """How sure the policy is of the categories of words, whichever text each stands in, through one call.

    Args:
        model: the policy.
        hidden: for each of `asked` the hidden states [B, G, C, D] that predict its continuation's tokens.
        asked: with the same W and Q each.
        candidate_ids_ZY: int32, token ids of each candidate set, -1 where a set has fewer.

    Returns:
        for each of `asked` float32 [B, G, W, Q] in nats; without meaning where its set is NO_SET.
    """
    # Texts of different lengths have the same number of words, so they meet along G.
    h_BGWD = jnp.concatenate([anchor_hidden(h, one.index_BGW) for h, one in zip(hidden, asked, strict=True)], axis=1)
    set_BGWQ = jnp.concatenate([jnp.asarray(one.set_BGWQ) for one in asked], axis=1)
    logprob_BGWQ = set_logprobs(model, h_BGWD, set_BGWQ, candidate_ids_ZY)
    ends = np.cumsum([one.index_BGW.shape[1] for one in asked])[:-1]
    return tuple(jnp.split(logprob_BGWQ, ends, axis=1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration rewards, [B, G]: R+ and R- in nats (0 where invalid) and which of them are valid."""

    plus_BG: Array
    minus_BG: Array
    plus_valid_BG: Array
    minus_valid_BG: Array


def calibration(slow_BGWQ: Array, fast_BGWQ: Array, anchors: Anchors) -> Calibration:
    """R+ and R- of every completion: means over its words on each wheel, then over the wheels that have such words."""
    difference_BGWQ = slow_BGWQ - fast_BGWQ
    counted_BGWQ = True if anchors.repeat_BGWQ is None else ~anchors.repeat_BGWQ
    plus_BG, plus_valid_BG = _wheel_mean(difference_BGWQ, _correct(anchors) & counted_BGWQ)
    minus_BG, minus_valid_BG = _wheel_mean(-difference_BGWQ, _wrong(anchors) & counted_BGWQ)
    return Calibration(plus_BG=plus_BG, minus_BG=minus_BG, plus_valid_BG=plus_valid_BG, minus_valid_BG=minus_valid_BG)


def calibration_words(anchors: Anchors) -> Array:
    """float32 scalar, the words with a confidence on at least one wheel: what `calibration_loss` averages over."""
    return jnp.sum(jnp.any(anchors.set_BGWQ != NO_SET, axis=-1), dtype=jnp.float32)


def calibration_loss(slow_BGWQ: Array, fast_BGWQ: Array, anchors: Anchors, total_words: Array) -> Array:
    """The arm `sfcc_loss`: relu(fast - slow) on correct words and relu(slow - fast) on wrong ones, averaged over words.

    A word's value is its mean over the wheels on which it has a confidence. The fast side's gradient is stopped.

    Args:
        slow_BGWQ: confidences with a gradient.
        fast_BGWQ: confidences.
        anchors: the words.
        total_words: `calibration_words` of the whole optimizer step, so that micro-batches add up.

    Returns:
        float32 scalar, this micro-batch's share of the step's mean, in nats.
    """
    # Above 0 where the reasoning makes the model less sure of the word, which costs where the word is right.
    difference_BGWQ = jax.lax.stop_gradient(fast_BGWQ) - slow_BGWQ
    loss_BGWQ = jax.nn.relu(jnp.where(anchors.correct_BGWQ, difference_BGWQ, -difference_BGWQ))
    valid_BGWQ = anchors.set_BGWQ != NO_SET
    wheels_BGW = jnp.sum(valid_BGWQ, axis=-1)
    word_BGW = jnp.sum(jnp.where(valid_BGWQ, loss_BGWQ, 0.0), axis=-1) / jnp.maximum(wheels_BGW, 1)
    return jnp.sum(word_BGW) / jnp.maximum(total_words, 1)


def confidence_metrics(slow_BGWQ: Array, fast_BGWQ: Array, anchors: Anchors) -> dict[str, Array]:
    """Mean probability given to the categories of sampled words, over words and wheels.

    Returns:
        float32 scalars confidence/{slow,fast} over all words and confidence/{slow,fast}_{correct,wrong}; 0 where there
        are no such words.
    """
    kinds = {"": anchors.set_BGWQ != NO_SET, "_correct": _correct(anchors), "_wrong": _wrong(anchors)}
    modes = {"slow": slow_BGWQ, "fast": fast_BGWQ}
    return {
        f"confidence/{mode}{kind}": jnp.sum(jnp.where(held, jnp.exp(confidence), 0.0)) / jnp.maximum(jnp.sum(held), 1)
        for mode, confidence in modes.items()
        for kind, held in kinds.items()
    }


def _correct(anchors: Anchors) -> Array:
    return (anchors.set_BGWQ != NO_SET) & anchors.correct_BGWQ


def _wrong(anchors: Anchors) -> Array:
    return (anchors.set_BGWQ != NO_SET) & ~anchors.correct_BGWQ


def _wheel_mean(x_BGWQ: Array, held_BGWQ: Array) -> tuple[Array, Array]:
    """Mean over the words held on a wheel, then over the wheels that hold any; and whether there is one."""
    # Within a wheel first, so that a wheel that knows more of the words has no larger say.
    words_BGQ = jnp.sum(held_BGWQ, axis=-2)
    wheel_BGQ = jnp.sum(jnp.where(held_BGWQ, x_BGWQ, 0.0), axis=-2) / jnp.maximum(words_BGQ, 1)
    wheels_BG = jnp.sum(words_BGQ > 0, axis=-1)
    return jnp.sum(wheel_BGQ, axis=-1) / jnp.maximum(wheels_BG, 1), wheels_BG > 0
