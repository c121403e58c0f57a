"""What the lab measures of a policy on held-out clips.

Scores are expected ones, under the exact posterior over the truths given a clip's cues: the draw of the truth, half of
the noise of a score, is out of them. Confidence is compared on words that stay the same whoever is measured, the fast
answers after SFT: an arm's own words change with how many it names.

Shape letters: S seeds, N clips, P tokens of a completion, W words of an answer.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.lab import tiny_policy
from mer_r1_jax.lab.scenes import SCORES, STOP, Clips
from mer_r1_jax.lab.teaching import training_sampling
from mer_r1_jax.lab.worlds import ANSWER_WORDS, LabConfig
from mer_r1_jax.omni.batch import Array
from mer_r1_jax.rl.sampling import SamplingConfig, greedy
from mer_r1_jax.training.state import Params

# Name -> what it is, of each clip; in the order of the JSON. Shares lie in [0, 1].
MEASURES = {
    "slow_recall": "expected recall of slow answers, the most likely token each time",
    "slow_precision": "expected precision of slow answers",
    "slow_f1": "expected F1 of slow answers",
    "fast_recall": "expected recall of fast answers",
    "fast_precision": "expected precision of fast answers",
    "fast_f1": "expected F1 of fast answers",
    "sampled_f1": "expected F1 of slow answers sampled as the paper does, at temperature 0.9 and top-p 0.9",
    "slow_f1_drawn": "F1 of slow answers against the truths that were drawn",
    "fast_f1_drawn": "F1 of fast answers against the truths that were drawn",
    "confidence_right": "probability, behind the slow reasoning, of the category of right words of the fast answers "
    "after SFT; a clip counts by how many of them it has",
    "confidence_wrong": "the same for their wrong words",
    "words": "words of a slow answer",
    "repeats": "words of a slow answer that repeat a category it has named",
}
# Measured where `LabConfig.common_point` asks for it.
COMMON_POINT = {
    "common_f1": "expected F1 of slow answers whose end is made more or less likely, by what is best on the other half "
    "of the clips",
}
TEMPERATURE, TOP_P = 0.9, 0.9  # with which the paper samples answers that are scored
# Added to the logit of the token that ends an answer, to see what a change of length alone would give.
STOP_BIASES = (2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Examiner:
    """Measures policies of one experiment on its held-out clips.

    Attributes:
        config: the experiment.
        clips: held out.
    """

    config: LabConfig
    clips: Clips

    def fast_answers(self, params_S: Params) -> np.ndarray:
        """int32 [S, N, ANSWER_WORDS], the fast answers of each seed's policy: after SFT, the fixed words."""
        return np.asarray(self._fast(params_S))

    def measure(self, params_S: Params, fixed_words_SNW: np.ndarray) -> dict[str, np.ndarray]:
        """MEASURES of each seed's policy, float32 [S, N] each, and COMMON_POINT where it is asked for.

        Args:
            params_S: of the policies.
            fixed_words_SNW: `fast_answers` after SFT.
        """
        found = self._measured(params_S, jnp.asarray(fixed_words_SNW))
        measured = {name: np.asarray(found[name], np.float32) for name in MEASURES}
        if self.config.common_point:
            measured |= {"common_f1": self._common_f1(params_S)}
        return measured

    def _common_f1(self, params_S: Params) -> np.ndarray:
        """COMMON_POINT of each seed's policy, float32 [S, N]: where each stops is taken out, and with it what an arm
        owes to having moved there."""
        f1_BSN = np.stack([np.asarray(self._f1(params_S, jnp.float32(bias)), np.float32) for bias in STOP_BIASES])
        return cross_fitted(f1_BSN)

    def operating_point(self, params_S: Params, stop_bias: float = 0.0) -> list[float]:
        """Expected recall, precision and F1 of slow answers, means over seeds, their end made more or less likely."""
        return np.asarray(self._point(params_S, jnp.float32(stop_bias)), np.float64).mean(axis=0).tolist()

    @functools.cached_property
    def _fast(self):
        return jax.jit(jax.vmap(lambda params: self._answer(params, fast=True)[..., self.config.trace_length :]))

    @functools.cached_property
    def _point(self):
        def point(params: Params, stop_bias: Array) -> Array:
            return self._expected(self._answer(params, stop_bias=stop_bias)).mean(axis=-1)

        return jax.jit(jax.vmap(point, (0, None)))

    @functools.cached_property
    def _f1(self):
        def f1(params: Params, stop_bias: Array) -> Array:
            return self._expected(self._answer(params, stop_bias=stop_bias))[2]

        return jax.jit(jax.vmap(f1, (0, None)))

    @functools.cached_property
    def _measured(self):
        return jax.jit(jax.vmap(self._one))

    def _one(self, params: Params, fixed_words_NW: Array) -> dict[str, Array]:
        """MEASURES of one policy."""
        trace, truth_N = self.config.trace_length, jnp.asarray(self.clips.truth_N)
        slow, fast = self._answer(params), self._answer(params, fast=True)
        nucleus = dataclasses.replace(training_sampling(self.config.rl), temperature=TEMPERATURE, top_p=TOP_P)
        samples = range(self.config.eval_samples)
        sampled_KN = [self._expected(self._answer(params, nucleus, draw=draw))[2] for draw in samples]
        found: dict[str, Array] = {"sampled_f1": sum(sampled_KN[1:], sampled_KN[0]) / len(samples)}
        for mode, token_NP in (("slow", slow), ("fast", fast)):
            expected_3N = self._expected(token_NP)
            found |= {f"{mode}_{name}": expected_3N[row] for row, name in enumerate(("recall", "precision", "f1"))}
            code_N = tiny_policy.answer_code(token_NP[:, trace:])
            found[f"{mode}_f1_drawn"] = jnp.asarray(SCORES[2])[truth_N, code_N]

        # The policy's own reasoning, then the fixed words: word after word, each behind those before it.
        given = jnp.concatenate([slow[:, :trace], fixed_words_NW], axis=-1)
        raw = tiny_policy.logits(params, self._display, given, self.config, answer_only=True)
        probability_NW = jnp.exp(tiny_policy.confidences(raw, fixed_words_NW)[..., 0])
        is_true_NW = (truth_N[:, None] >> tiny_policy.category_of(fixed_words_NW)) & 1 > 0
        said_NW = fixed_words_NW != STOP
        for name, held_NW in (("right", said_NW & is_true_NW), ("wrong", said_NW & ~is_true_NW)):
            total_N = jnp.sum(jnp.where(held_NW, probability_NW, 0.0), axis=-1)
            # Divided by the words of a mean clip, so that the mean over clips is the mean over words.
            found[f"confidence_{name}"] = total_N / jnp.maximum(jnp.sum(held_NW, axis=-1).mean(), 1e-9)

        words_N = jnp.sum(slow[:, trace:] != STOP, axis=-1)
        named_N = jnp.bitwise_count(tiny_policy.answer_code(slow[:, trace:]))
        return found | {"words": words_N, "repeats": words_N - named_N}

    @property
    def _display(self) -> Array:
        return jnp.asarray(self.clips.display_N9)

    def _answer(
        self,
        params: Params,
        how: SamplingConfig | None = None,
        *,
        fast: bool = False,
        stop_bias: Array | float = 0.0,
        draw: int = 0,
    ) -> Array:
        """Completions of all clips, int32 [N, P]; greedy ones without a way of sampling. Draws are counted from 0."""
        how = how or greedy(training_sampling(self.config.rl))
        places = self.config.trace_length + ANSWER_WORDS
        uniform = np.random.default_rng(draw).random(
            (places, len(self.clips.truth_N)), np.float32
        )  # same for all policies
        manner = tiny_policy.Manner(how, fast, stop_bias)
        answers, _ = tiny_policy.sample(params, self._display, uniform, manner, self.config)
        return answers

    def _expected(self, token_NP: Array) -> Array:
        """float32 [3, N], expected recall, precision and F1."""
        code_N = tiny_policy.answer_code(token_NP[:, self.config.trace_length :])
        assert self.clips.expected_3NM is not None
        return jnp.asarray(self.clips.expected_3NM)[:, jnp.arange(len(code_N)), code_N]


def cross_fitted(f1_BSN: np.ndarray) -> np.ndarray:
    """F1 of each seed and clip under the bias that is best, for its seed, on the other half of the clips.

    Args:
        f1_BSN: float32, of every bias, seed and clip; halves are the clips of even and of odd number.

    Returns:
        float32 [S, N].
    """
    found_SN = np.empty(f1_BSN.shape[1:], np.float32)
    seeds = np.arange(f1_BSN.shape[1])
    for half in (0, 1):
        best_S = f1_BSN[:, :, 1 - half :: 2].mean(axis=2, dtype=np.float64).argmax(axis=0)
        found_SN[:, half::2] = f1_BSN[best_S, seeds, half::2]
    return found_SN
