"""Does a policy use what it is given? Held-out clips are answered again with one thing of another clip in its place.

A swapped video, sound or subtitle should cost F1 if the policy looks, listens and reads; a swapped reasoning should
cost F1 if the answer follows from it. Truths stay the clip's own, answers are greedy, and scores are compared clip by
clip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from mer_r1_jax.data.records import Record
from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.emotion.rewards import answer_rewards, category_sets
from mer_r1_jax.emotion.wheels import Wheels
from mer_r1_jax.evaluation.answering import LENGTH_STEP, extended
from mer_r1_jax.evaluation.evaluate import Evaluation, Evaluator, batched
from mer_r1_jax.evaluation.sample_comparison import SCORES, Comparison
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.rl.rollout import STOP_LENGTH
from mer_r1_jax.rl.scoring import ScoredAnswer
from mer_r1_jax.training.prompts import uid_of
from mer_r1_jax.training.state import Params

MODALITIES = {"video": "videos", "audio": "audios", "subtitle": "subtitle"}  # a record's field of each
ALONE = -1  # a clip without a partner
NO_WHEEL = "truth on no wheel"  # clips without a score: neither asked nor lent to others


class ProbeError(ValueError):
    """A probe that cannot be made on these records; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prober:
    """A policy that can be asked about records.

    Attributes:
        evaluator: decodes and scores.
        params: of the policy.
        load: prompts of records; a clip that cannot be used comes as the reason.
        wheels: emotion wheels.
        interleaved: a video brings its own sound (`media.use_audio_in_video`), so the two cannot be swapped apart.
        seed: of the partners and of the intervals.
    """

    evaluator: Evaluator
    params: Params
    load: Callable[[Sequence[Record]], Iterator[tuple[Record, Prompt | str]]]
    wheels: Wheels
    interleaved: bool = False
    seed: int = 0

    def answers(self, records: Sequence[Record]) -> Evaluation:
        """Slow and fast answers to records."""
        return self.evaluator.run(self.params, self.load(records))


@dataclasses.dataclass(frozen=True, eq=False)
class Swap:
    """What another clip's part did to the scores.

    Attributes:
        part: video, audio, subtitle or reasoning.
        comparisons: scores before and after.
        left_out: clips that are in no score, by reason.
        sharing: clips whose partner's truth shares a category with their own on some wheel.
        unchanged: clips whose partner's part is the same as their own; they stay in the scores.
        facts: further numbers.
    """

    part: str
    comparisons: tuple[Comparison, ...]
    left_out: dict[str, int]
    sharing: int
    unchanged: int
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Everything, in points."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"comparisons": [comparison.as_json() for comparison in self.comparisons]}


def partners(
    truths: Sequence[Sequence[str]], wheels: Wheels, seed: int, forbidden: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """Gives every clip another one, each clip to exactly one, whose truth has as little in common as possible.

    Of all derangements those with the fewest pairs that share a category come first, then those whose pairs share the
    least; among equals the seed decides.

    Args:
        truths: true words of each clip.
        wheels: the wheels.
        seed: of the choice.
        forbidden: bool [clips, clips], pairs that must not be, besides a clip and itself.

    Returns:
        int [clips], the partner or ALONE; and how many pairs share a category on some wheel.
    """
    clips = len(truths)
    sets = [category_sets(truth, wheels) for truth in truths]
    overlap = np.mean([_overlap([per_wheel[k] for per_wheel in sets]) for k in range(len(wheels))], axis=0)
    forbidden = np.eye(clips, dtype=bool) | (forbidden if forbidden is not None else False)
    # One sharing pair outweighs all overlaps together, and one forbidden pair outweighs everything.
    tie_break = 1e-3 / clips * np.random.default_rng(seed).random((clips, clips))
    cost = clips * (overlap > 0) + overlap + tie_break
    rows, columns = linear_sum_assignment(np.where(forbidden, clips * (clips + 2), cost))
    partner = np.where(forbidden[rows, columns], ALONE, columns)
    held = partner != ALONE
    return partner, int(np.count_nonzero(overlap[rows[held], partner[held]]))


def _overlap(sets: list[frozenset[str]]) -> np.ndarray:
    """float64 [clips, clips]: shared categories as a share of both clips' together, on one wheel."""
    names = sorted(frozenset().union(*sets))
    has = np.asarray([[name in held for name in names] for held in sets], np.float64).reshape(len(sets), len(names))
    shared = has @ has.T
    either = has.sum(axis=1)[:, None] + has.sum(axis=1)[None, :] - shared
    return shared / np.maximum(either, 1)


def swap_modality(prober: Prober, before: Evaluation, modality: str) -> Swap:
    """Every clip is answered with another clip's frames, sound or subtitle.

    Args:
        prober: the policy.
        before: its answers to the clips as they are.
        modality: video, audio or subtitle.

    Raises:
        ProbeError: too few clips have that modality, or it cannot be swapped by itself.
    """
    field = MODALITIES[modality]
    if prober.interleaved and modality != "subtitle":
        raise ProbeError(
            f"{modality}: media.use_audio_in_video shows a video with its own sound, so neither can be swapped alone"
        )
    scorable = [before.records[place] for place in before.scored]
    held = [record for record in scorable if getattr(record, field)]
    if len(held) < 2:
        raise ProbeError(
            f"{modality}: {len(held)} of {len(before.records)} clips have one and can be scored, expected at least two"
        )
    parts = [getattr(record, field) for record in held]
    counts = np.asarray([1 if modality == "subtitle" else len(part) for part in parts])
    # Messages may have a placeholder for each clip, so a partner has to bring as many.
    partner, sharing = partners(
        [record.solution for record in held], prober.wheels, prober.seed, counts[:, None] != counts[None, :]
    )
    chosen = np.flatnonzero(partner != ALONE)
    swapped = [dataclasses.replace(held[clip], **{field: parts[partner[clip]]}) for clip in chosen]
    after = prober.answers(swapped)
    # Clips whose borrowed part cannot be used are missing from `after`, and so from both sides of the comparison.
    ids = tuple(record.id for record in after.records)
    return Swap(
        part=modality,
        comparisons=tuple(
            Comparison(f"{mode} f1", ids, _scores(before, ids, mode), _scores(after, ids, mode), prober.seed)
            for mode in MODES
        ),
        left_out={
            NO_WHEEL: len(before.records) - len(scorable),
            f"no {modality}": len(scorable) - len(held),
            "no partner": len(held) - len(chosen),
            "unusable": len(after.skipped),
        },
        sharing=sharing,
        unchanged=sum(parts[clip] == parts[partner[clip]] for clip in chosen),
    )


def _scores(evaluation: Evaluation, ids: Sequence[str], mode: str) -> np.ndarray:
    """float64 [1, clips]: F1 of the clips named, in that order."""
    by_id = dict(zip((record.id for record in evaluation.records), evaluation.scores(mode, "f1"), strict=True))
    return np.asarray([[by_id[clip] for clip in ids]])


def swap_reasoning(prober: Prober, before: Evaluation) -> Swap:
    """Every clip's slow answer is decoded after another clip's reasoning, and, to compare, after its own.

    Forced are a sampled completion's own ids up to the token that holds the `>` of `<answer>`; nothing is tokenised
    again. Own and other reasoning take the same way, so they differ in whose reasoning it is and in nothing else.

    Args:
        prober: the policy.
        before: its answers to the clips as they are.

    Raises:
        ProbeError: fewer than two slow answers have a reasoning that can be forced.
    """
    kept, prefixes, left_out = _reasonings(prober, before)
    records = [before.records[clip] for clip in kept]
    if len(records) < 2:
        raise ProbeError(f"reasoning: {len(records)} of {len(before.records)} slow answers can be split, expected two")
    partner, sharing = partners([record.solution for record in records], prober.wheels, prober.seed)
    own = _continued(prober, records, prefixes)
    other = _continued(prober, records, [prefixes[clip] for clip in partner])
    # Each pass loads the clips anew and may fail on others, so only clips that both passes answered are compared.
    present = [clip for clip, record in enumerate(records) if record.id in own and record.id in other]
    left_out["unusable"] = len(records) - len(present)
    ids = tuple(records[clip].id for clip in present)

    def scores(answers: dict[str, ScoredAnswer], name: str) -> np.ndarray:
        return np.asarray([[getattr(answers[clip].rewards, name) for clip in ids]])

    sampled = {record.id: answer.answer for record, answer in zip(before.records, before.answers["slow"], strict=True)}
    partner_truths = [records[partner[clip]].solution for clip in present]
    # This F1 is high where the answer says what the borrowed reasoning leads to.
    follows = [
        answer_rewards(other[clip].parsed.words, truth, prober.wheels).f1
        for clip, truth in zip(ids, partner_truths, strict=True)
    ]
    return Swap(
        part="reasoning",
        comparisons=tuple(
            Comparison(f"slow {name}", ids, scores(own, name), scores(other, name), prober.seed) for name in SCORES
        ),
        left_out=left_out,
        sharing=sharing,
        unchanged=sum(np.array_equal(prefixes[clip], prefixes[partner[clip]]) for clip in present),
        facts={
            "reasoning_tokens": _length_statistics(prober, before),
            "own_answer_repeated": sum(own[clip].parsed.words == sampled[clip].parsed.words for clip in ids),
            "f1_against_partners_truth": 100 * float(np.mean(follows)),
        },
    )


def _reasonings(prober: Prober, before: Evaluation) -> tuple[list[int], list[np.ndarray], dict[str, int]]:
    """Clips whose slow answer can be split, its ids up to the answer, and the others by reason."""
    tags = prober.evaluator.answerer.scorer.tags
    kept, prefixes = [], []
    scored = before.scored
    left_out = {
        NO_WHEEL: len(before.records) - len(scored),
        "no answer block": 0,
        "answer begins inside the tag's token": 0,
    }
    for clip in scored:
        answer = before.answers["slow"][clip]
        located = tags.locate(answer.ids, len(answer.ids))
        if located is None:
            left_out["no answer block"] += 1
        elif located.merged:
            left_out["answer begins inside the tag's token"] += 1
        else:
            kept.append(clip)
            prefixes.append(answer.ids[: located.opening + 1])
    return kept, prefixes, left_out


def _length_statistics(prober: Prober, before: Evaluation) -> dict[str, float]:
    """Tokens of the slow answers' reasoning: what stands before the answer, without an empty think block's tokens."""
    tags = prober.evaluator.answerer.scorer.tags
    found = [tags.locate(answer.ids, len(answer.ids)) for answer in before.answers["slow"]]
    tokens = [max(0, located.opening + 1 - len(tags.empty_think)) for located in found if located is not None]
    quantiles = np.percentile(tokens, [0, 5, 50, 95, 100])
    names = ("least", "percentile_5", "median", "percentile_95", "most")
    return {"mean": float(np.mean(tokens))} | dict(zip(names, map(float, quantiles), strict=True))


def _continued(prober: Prober, records: Sequence[Record], prefixes: Sequence[np.ndarray]) -> dict[str, ScoredAnswer]:
    """Greedy answers by clip, the prefix included, each after its forced prefix."""
    evaluator = prober.evaluator
    # One length for all: a bucket for the prefixes of each batch would be a program each.
    added = -(-max(len(prefix) for prefix in prefixes) // LENGTH_STEP) * LENGTH_STEP
    buckets = [dataclasses.replace(bucket, tokens=bucket.tokens + added) for bucket in evaluator.buckets]
    prefix_of = {record.id: prefix for record, prefix in zip(records, prefixes, strict=True)}
    answers = {}
    with evaluator.answerer.holding(prober.params) as policy:
        for batch in batched(prober.load(records), buckets[0].rows, []):
            prompts = [extended(prompt, prefix_of[record.id]) for record, prompt in batch]
            uids = [uid_of(record.id) for record, _ in batch]
            host = policy.answer(policy.encode(prompts, buckets, uids)).host
            for row, (record, _) in enumerate(batch):
                prefix, length = prefix_of[record.id], int(host.length_BG[row, 0])
                ids = np.concatenate([prefix, host.id_BGC[row, 0, :length]])
                truncated = bool(host.stop_BG[row, 0] == STOP_LENGTH)
                scorer = evaluator.answerer.scorer
                answers[record.id] = scorer.answer(ids, len(ids), truncated, record.solution)
    return answers
