"""The one way in which a policy answers prompts: pad, encode, decode greedily, and ask how sure it is of each word.

    with answerer.holding(params) as policy:
        prompts = policy.encode(clips, buckets, uids)       # once for every mode
        answers = policy.answer(prompts, "slow")
        scored = policy.score(answers, truths)

Evaluation, inference, probes, benchmarks, MME-Emotion and the check of an export all come through here; they differ in
where prompts come from and in what is kept of an answer.

Shape letters are those of `omni.batch` and `rl.confidence`. G is 1 but where answers are sampled.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.batch import Array, BatchShape, Prompts
from mer_r1_jax.parallel.rows import local_rows, put
from mer_r1_jax.rl.confidence import NO_SET
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.rollout import Completions, check_finite
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.rl.scoring import AnswerScorer, ScoredGroups
from mer_r1_jax.training.prompts import prompt_rows
from mer_r1_jax.training.rl_step import RlPrograms, Watch
from mer_r1_jax.training.state import Params
from mer_r1_jax.training.stopping import NEVER, Stop

LENGTH_STEP = 64  # lengths that follow from clips or answers grow in such steps, so that few programs are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """One mode's answers to a batch.

    Attributes:
        mode: slow or fast.
        prompts: what was asked, encoded.
        completions: on the devices.
        host: this process's rows of them, as numpy arrays.
    """

    mode: str
    prompts: Prompts
    completions: Completions
    host: Completions


@dataclasses.dataclass(frozen=True, eq=False)
class Confidence:
    """How sure the policy is of the words of answers.

    Attributes:
        groups: the answers, read and scored.
        probability_BWQ: float32, given to the category of each word on each wheel where it was said; NaN where the
            word, or its truth, has none there.
    """

    groups: ScoredGroups
    probability_BWQ: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Answerer:
    """What it takes to have prompts answered by some parameters.

    Attributes:
        programs: the jitted programs of the run.
        scorer: reads and scores answers.
        candidate_ids_ZY: int32 candidate sets of the confidences.
        sampling: how answers are decoded: greedily.
    """

    programs: RlPrograms
    scorer: AnswerScorer
    candidate_ids_ZY: np.ndarray
    sampling: SamplingConfig

    @contextlib.contextmanager
    def holding(self, params: Params) -> Iterator[AnsweringPolicy]:
        """The policy of these parameters, which lie ready for decoding while it lasts."""
        with self.programs.rollout_params(params) as decoding:
            yield AnsweringPolicy(self, params, decoding)


@dataclasses.dataclass(frozen=True, eq=False)
class AnsweringPolicy:
    """A policy that answers; `Answerer.holding` makes one.

    Attributes:
        answerer: its programs and reader.
        params: as training lays them out: encoding and scoring take those.
        decoding: the same as decoding wants them.
    """

    answerer: Answerer
    params: Params
    decoding: Params

    def encode(self, clips: Sequence[Prompt], buckets: Sequence[BatchShape], uids: Sequence[int]) -> Prompts:
        """Pads prompts to the smallest bucket that holds them and encodes their clips.

        Args:
            clips: at most a bucket's rows; in a run of several processes those of this one.
            buckets: shapes, smallest first.
            uids: uint32 identity of each.
        """
        programs = self.answerer.programs
        host = prompt_rows(clips, buckets, programs.backbone.config, uids)
        return programs.encode(self.params, put(host, programs.backbone.mesh))

    def answer(
        self,
        prompts: Prompts,
        mode: str = "slow",
        stop: Stop = NEVER,
        *,
        sampling: SamplingConfig | None = None,
        key: Array | None = None,
        watch: Watch | None = None,
    ) -> Answers:
        """Decodes answers to every prompt: after reasoning, or at once behind an empty think block.

        Args:
            prompts: encoded.
            mode: slow or fast.
            stop: asked while it decodes.
            sampling: None decodes one answer greedily.
            key: of the random bits; greedy decoding draws none, so any will do.
            watch: shown what is sampled so far, where it is decoded in chunks (`RlPrograms.sample`).

        Raises:
            RolloutError: the model's scores are not finite.
            StopRequested: a signal ended the decoding.
        """
        answerer, programs = self.answerer, self.answerer.programs
        forced_ids = answerer.scorer.tags.empty_think if mode == "fast" else ()
        sampling = dataclasses.replace(sampling or answerer.sampling, forced_ids=forced_ids)
        key = jax.random.key(0) if key is None else key
        completions = programs.sample(self.decoding, prompts, key, sampling, stop, watch)
        host = local_rows(completions, programs.backbone.mesh)
        check_finite(host)
        return Answers(mode, prompts, completions, host)

    def score(
        self, answers: Answers, truths: Sequence[Sequence[str] | None], *, require_format: bool = True
    ) -> Confidence:
        """Reads answers, holds them against truths and asks how sure the policy is of each word.

        Args:
            answers: of this policy.
            truths: words, row by row; rows without one are padding.
            require_format: a slow answer that is not well-formed has no confidences. (A fast one never is.)
        """
        answerer, programs = self.answerer, self.answerer.programs
        mesh, host = programs.backbone.mesh, answers.host
        padded = [*truths, *[None] * (len(host.length_BG) - len(truths))]
        groups = answerer.scorer.groups(host, padded, require_format=require_format and answers.mode == "slow")
        completion = Continuations(id_BGC=answers.completions.id_BGC, exists_BGC=answers.completions.exists_BGC)
        slow_BGWQ, _ = programs.score(
            self.params, answers.prompts, completion, put(groups.anchors, mesh), answerer.candidate_ids_ZY
        )
        probability_BWQ = np.exp(local_rows({"slow_BGWQ": slow_BGWQ}, mesh)["slow_BGWQ"])[:, 0]
        held_BWQ = groups.anchors.set_BGWQ[:, 0] != NO_SET
        return Confidence(groups, np.where(held_BWQ, probability_BWQ, np.nan))


def extended(prompt: Prompt, ids: np.ndarray) -> Prompt:
    """A prompt followed by text tokens, which take the positions a completion would: a forced prefix of its own.

    Other than the prefix of a mode, it differs from clip to clip and takes nothing from the length of the answer.
    """
    count = len(ids)
    position = np.broadcast_to(prompt.next_position + np.arange(count, dtype=np.int32), (3, count))
    source = np.tile(np.asarray([-1, 0], np.int32), (count, 1))
    return dataclasses.replace(
        prompt,
        ids=np.concatenate([prompt.ids, np.asarray(ids, np.int32)]),
        position=np.concatenate([prompt.position, position], axis=1).astype(np.int32),
        source=np.concatenate([prompt.source, source]).astype(np.int32),
        next_position=prompt.next_position + count,
    )
