"""The one way in which a policy answers prompts: pad, encode, decode greedily, and ask how sure it is of each word.

    with answerer.holding(params) as policy:
        prompts = policy.encode(clips, buckets, uids)       # once for every mode
        answers = policy.answer(prompts, "slow")
        groups = policy.read(answers, truths)               # on the host
        (probability,) = policy.probabilities(prompts, [own_words(answers, groups)])

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
from mer_r1_jax.rl.confidence import NO_SET, AskedWords
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
        # Training would skip such a step, but an answer drawn from NaN would be read and scored like any other.
        check_finite(host)
        return Answers(mode, prompts, completions, host)

    def read(
        self, answers: Answers, truths: Sequence[Sequence[str] | None], *, require_format: bool = True
    ) -> ScoredGroups:
        """Reads answers on the host and holds them against truths.

        Args:
            answers: of this policy.
            truths: words, row by row; rows without one are padding.
            require_format: a slow answer that is not well-formed has no confidences. (A fast one never is.)
        """
        padded = [*truths, *[None] * (len(answers.host.length_BG) - len(truths))]
        slow = answers.mode == "slow"
        # The words of a slow answer are asked about behind its own reasoning (`own_words`), so however long the answer
        # is, it needs no fast context.
        return self.answerer.scorer.groups(
            answers.host, padded, require_format=require_format and slow, fast_contexts=not slow
        )

    def probabilities(self, prompts: Prompts, asked: Sequence[AskedWords]) -> list[np.ndarray]:
        """What the policy gives to the categories of words, all texts in one forward pass behind the prompts.

        Args:
            prompts: encoded.
            asked: with numpy leaves, this process's rows.

        Returns:
            for each of `asked` float32 [B, G, W, Q]; NaN where its set is NO_SET.
        """
        answerer, programs = self.answerer, self.answerer.programs
        mesh = programs.backbone.mesh
        found = programs.ask(self.params, prompts, put(tuple(asked), mesh), answerer.candidate_ids_ZY)
        # A name ending in the axes says how rows are cut among processes.
        own_rows = local_rows({f"{number}_BGWQ": value for number, value in enumerate(found)}, mesh)
        return [
            np.where(one.set_BGWQ != NO_SET, np.exp(own_rows[f"{number}_BGWQ"]), np.nan)
            for number, one in enumerate(asked)
        ]

    def score(
        self, answers: Answers, truths: Sequence[Sequence[str] | None], *, require_format: bool = True
    ) -> np.ndarray:
        """How sure the policy is of the words of its answers: float32 [B, W, Q], NaN where a word has no candidates.

        Arguments as of `read`.
        """
        groups = self.read(answers, truths, require_format=require_format)
        return self.probabilities(answers.prompts, [own_words(answers, groups)])[0][:, 0]


def own_words(answers: Answers, groups: ScoredGroups) -> AskedWords:
    """The words of answers, to be asked about where they were said."""
    anchors = groups.anchors
    if answers.mode == "fast":
        # An answer behind an empty think block is its own fast context, which ends with the last word and is short.
        return AskedWords(continuation=anchors.fast, index_BGW=anchors.fast_BGW, set_BGWQ=anchors.set_BGWQ)
    host = answers.host
    exists_BGC = np.arange(host.id_BGC.shape[-1]) < host.length_BG[..., None]
    return AskedWords(
        continuation=Continuations(id_BGC=host.id_BGC, exists_BGC=exists_BGC),
        index_BGW=anchors.slow_BGW,
        set_BGWQ=anchors.set_BGWQ,
    )


def beside(one: AskedWords, other: AskedWords) -> AskedWords:
    """Two texts of every prompt as two of its continuations, the shorter ones padded: they never see each other.

    As sets of their own they would lie in one row, whose attention grows with the square of all their lengths.
    """
    longest = max(text.continuation.id_BGC.shape[-1] for text in (one, other))

    def joined(name: str) -> np.ndarray:
        parts = [np.asarray(getattr(text.continuation, name)) for text in (one, other)]
        room = [(0, 0), (0, 0)]
        return np.concatenate([np.pad(part, [*room, (0, longest - part.shape[-1])]) for part in parts], axis=1)

    return AskedWords(
        continuation=Continuations(id_BGC=joined("id_BGC"), exists_BGC=joined("exists_BGC")),
        index_BGW=np.concatenate([one.index_BGW, other.index_BGW], axis=1),
        set_BGWQ=np.concatenate([one.set_BGWQ, other.set_BGWQ], axis=1),
    )


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
