"""Cases to check an export with: held-out prompts as transformers' processor would give them, and our answers to them.

`mer-r1 check-in-transformers` feeds the cases to transformers' own model. It has to run under several versions
of transformers, so all it needs is in one .npz file.

Shape letters as in `omni.batch`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mer_r1_jax.data.records import Record
from mer_r1_jax.evaluation.evaluate import AnswerOf, Evaluator
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.batch import Prompts
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.parity.processor_inputs import processor_tensors
from mer_r1_jax.rl.packing import Continuations, pack, predictor_hidden
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.atomic_files import writing
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.prompts import uid_of
from mer_r1_jax.training.state import Params

PREFIX = "case{number:03d}."  # of a case's arrays; settings have none


class AgreementError(ValueError):
    """Records that make no cases; the message says why."""


def make_cases(
    evaluator: Evaluator,
    params: Params,
    load: Callable[[Sequence[Record]], Iterator[tuple[Record, Prompt | str]]],
    records: Sequence[Record],
    *,
    use_audio_in_video: bool,
) -> dict[str, np.ndarray]:
    """Answers records greedily (slow) and collects everything needed to check the answers elsewhere.

    Args:
        evaluator: decodes and scores.
        params: of the policy.
        load: prompts of records.
        records: the clips; those whose media cannot be used are left out.
        use_audio_in_video: whether videos are interleaved with their own sound.

    Returns:
        For each case its processor tensors, `completion_ids` int32 [C], `logits` float32 [C, N] (untempered, predicting
        the completion's tokens), `id`, `answer` (its words, sorted), `truncated`, and `overruled`: how many of its
        tokens are not the most likely one because that one is never sampled. Once: `cases`, `eos_ids`, `suppressed_ids`
        (never sampled), `max_new_tokens`, `use_audio_in_video`.

    Raises:
        AgreementError: no record can be used.
    """
    prompts = [(record, prompt) for record, prompt in load(records) if not isinstance(prompt, str)]
    if not prompts:
        raise AgreementError(f"none of the {len(records)} records can be used; their media errors are logged above")
    with jax.default_matmul_precision("highest"):
        answers = evaluator.run(params, iter(prompts), modes=("slow",)).answers["slow"]
        logits = _all_logits(evaluator, params, prompts, answers)
    sampling = evaluator.answerer.sampling
    arrays: dict[str, Any] = {
        "cases": len(prompts),
        "eos_ids": sampling.eos_ids,
        "suppressed_ids": sampling.banned_ids,
        "max_new_tokens": sampling.max_completion_length,
        "use_audio_in_video": use_audio_in_video,
    }
    for number, ((record, prompt), answer) in enumerate(zip(prompts, answers, strict=True)):
        case = _case(record, prompt, answer, logits[number], sampling)
        arrays |= {PREFIX.format(number=number) + name: value for name, value in case.items()}
    return {name: np.asarray(value) for name, value in arrays.items()}


def write_cases(path: str | pathlib.Path, cases: dict[str, Any]) -> None:
    """Writes cases as one compressed .npz file."""
    path = pathlib.Path(path)
    with writing("the cases", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_atomically(path, lambda file: np.savez_compressed(file, **cases))


def _case(
    record: Record, prompt: Prompt, answer: AnswerOf, logits_CN: np.ndarray, sampling: SamplingConfig
) -> dict[str, Any]:
    likeliest_C = logits_CN.argmax(axis=-1)
    overruled_C = (likeliest_C != answer.ids) & np.isin(likeliest_C, sampling.banned_ids)
    return processor_tensors(prompt) | {
        "completion_ids": answer.ids,
        "logits": logits_CN,
        "id": record.id,
        "answer": ", ".join(sorted(answer.answer.parsed.words)),
        "truncated": answer.answer.truncated,
        "overruled": np.count_nonzero(overruled_C),
    }


def _all_logits(
    evaluator: Evaluator,
    params: Params,
    prompts: Sequence[tuple[Record, Prompt]],
    answers: Sequence[AnswerOf],
) -> list[np.ndarray]:
    """float32 [C, N] of each answer: the logits that predict its tokens, from one forward pass as training makes it."""
    backbone, size = evaluator.answerer.programs.backbone, evaluator.buckets[0].rows
    length = evaluator.answerer.sampling.max_completion_length
    forward, found = _forward(backbone), []
    with evaluator.answerer.holding(params) as policy:
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            uids = [uid_of(record.id) for record, _ in batch]
            encoded = policy.encode([prompt for _, prompt in batch], evaluator.buckets, uids)
            id_BGC = np.zeros((size, 1, length), np.int32)
            exists_BGC = np.zeros(id_BGC.shape, bool)
            lengths = [len(answer.ids) for answer in answers[start : start + size]]
            for row, answer in enumerate(answers[start : start + size]):
                id_BGC[row, 0, : lengths[row]] = answer.ids
                exists_BGC[row, 0, : lengths[row]] = True
            completion = put(Continuations(id_BGC=id_BGC, exists_BGC=exists_BGC), backbone.mesh)
            logits_BGCN = jax.device_get(forward(params, encoded, completion))
            found += [logits_BGCN[row, 0, :count] for row, count in enumerate(lengths)]
    return found


def _forward(backbone: Backbone) -> Callable[..., Any]:
    """The jitted logits float32 [B, G, C, N] that predict the tokens of completions."""

    def forward(params: Params, prompts: Prompts, completion: Continuations):
        with backbone.rules():
            model, tokens = backbone.bind(params), prompts.tokens
            packed = pack(tokens, prompts.next_position_B, completion)
            h_BTD = model.hidden(packed, prompts.features_BRD, prompts.layout)
            (h_BGCD,) = predictor_hidden(h_BTD, tokens, completion)
            return model.logits(h_BGCD)

    return jax.jit(forward)
