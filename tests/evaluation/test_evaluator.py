"""Evaluations of a small policy on real clips: both modes, clips left out, and what is written of them."""

import dataclasses
import json

import numpy as np
import pytest
from support.small_run import visits_of, with_config

from mer_r1_jax.data.synthetic.oracle import Oracle
from mer_r1_jax.data.synthetic.world import WorldConfig, load_lexicon
from mer_r1_jax.emotion.answer_form import parse_answer
from mer_r1_jax.emotion.rewards import answer_rewards
from mer_r1_jax.evaluation import summary
from mer_r1_jax.evaluation.evaluate import EvaluationError
from mer_r1_jax.evaluation.gate import confidence_of
from mer_r1_jax.evaluation.second_looks import SecondLooks
from mer_r1_jax.run.asking import eval_buckets, eval_length, load_prompts, make_answerer, make_evaluator
from mer_r1_jax.run.inference import Reader
from mer_r1_jax.training.signals import StopRequested
from mer_r1_jax.training.stopping import Stop

SCORES = {
    "precision", "recall", "f1", "confidence_correct", "confidence_wrong", "distinct_answers", "mean_words",
    "mean_length", "format_rate", "truncated_rate",
}  # fmt: skip


@pytest.fixture(scope="module")
def evaluator(small):
    return make_evaluator(small, small.data.rl)


def prompts_of(small, numbers):
    """Records with prompts; None in place of a number is a clip that broke."""
    visits = visits_of(small, small.data.rl, numbers)
    return [(visit.record, visit.clips.prompt if visit.clips else "truncated") for visit in visits]


@pytest.fixture(scope="module")
def evaluation(small, trained, evaluator):
    """Of the six clips the policy has learnt; batches of two."""
    return evaluator.run(trained, iter(prompts_of(small, range(6))))


def test_both_modes_answer_every_clip_in_order(small, evaluation):
    assert [record.id for record in evaluation.records] == [record.id for record in small.data.rl]
    assert set(evaluation.answers) == {"slow", "fast"} and evaluation.skipped == ()
    forced = small.tags.empty_think
    for mode, answers in evaluation.answers.items():
        assert len(answers) == 6
        for record, answer in zip(evaluation.records, answers, strict=True):
            scored = answer.answer
            assert parse_answer(scored.text) == scored.parsed
            again = answer_rewards(scored.parsed.words, record.solution, small.wheels)
            assert (again.precision, again.recall, again.f1) == (
                scored.rewards.precision, scored.rewards.recall, scored.rewards.f1
            )  # fmt: skip
            assert scored.text.startswith("<think></think>\n<answer>") == (mode == "fast")
            assert (tuple(answer.ids[: len(forced)]) == forced) == (mode == "fast")
            assert len(answer.ids) == scored.length
    # What it has learnt by heart it knows.
    assert evaluation.scores("slow", "f1").mean() > 0.3


def test_confidence_is_the_probability_of_the_words_categories(evaluation):
    for answers in evaluation.answers.values():
        for answer in answers:
            right, wrong = answer.confidence_correct, answer.confidence_wrong
            assert all(value is None or 0 < value <= 1 for value in (right, wrong))
            if answer.answer.rewards.f1 == 1:
                assert right is not None and wrong is None


def test_what_a_gate_goes_by_is_the_same_with_and_without_a_truth(small, trained, evaluation):
    """The confidence of an answer is over all wheels of its words, also those on which its truth has no category."""
    unknown = [dataclasses.replace(record, solution=("neutral",)) for record in evaluation.records]
    prompts = [(record, prompt) for record, (_, prompt) in zip(unknown, prompts_of(small, range(6)), strict=True)]
    blind = make_evaluator(small, small.data.rl).run(trained, iter(prompts))
    reader = Reader(make_answerer(small, eval_length(small.config)), eval_buckets(small), small.wheels)
    alone = [answers for _, answers in reader.batches(trained, iter(prompts), ("fast",), [])]
    alone = [answer for answers in alone for answer in answers["fast"]]
    for one, other, by_itself in zip(evaluation.answers["fast"], blind.answers["fast"], alone, strict=True):
        assert np.isnan(other.confidence_WQ).all()
        assert one.confidence == other.confidence == pytest.approx(confidence_of(by_itself.probabilities), rel=1e-5)
    assert any(one.confidence for one in evaluation.answers["fast"])


def test_a_slow_answer_too_long_for_a_fast_context_keeps_its_confidences(small, trained, evaluation):
    """They are asked for behind its own reasoning. A fast answer is its own fast context, and has none."""
    room = len(small.tags.empty_think)  # for no word
    short = with_config(small, rl={"max_fast_context": room})
    found = make_evaluator(short, short.data.rl).run(trained, iter(prompts_of(short, range(6))))
    asked = 0
    for one, usual in zip(found.answers["slow"], evaluation.answers["slow"], strict=True):
        np.testing.assert_allclose(one.confidence_WQ, usual.confidence_WQ, rtol=1e-4)
        asked += (~np.isnan(usual.confidence_WQ)).sum()
    assert asked > 6
    assert all(np.isnan(one.confidence_WQ).all() for one in found.answers["fast"])


def test_answers_do_not_depend_on_the_batch_they_are_in(small, trained, evaluator, evaluation):
    turned = evaluator.run(trained, iter(prompts_of(small, [5, 0, 3])))
    for mode, answers in turned.answers.items():
        expected = [evaluation.answers[mode][number].answer.text for number in (5, 0, 3)]
        assert [answer.answer.text for answer in answers] == expected


def looked_again(small, trained, modes=("slow", "fast"), **looks):
    """The six clips asked with second looks."""
    evaluator = make_evaluator(small, small.data.rl, SecondLooks(**looks))
    return evaluator.run(trained, iter(prompts_of(small, range(6))), modes)


@pytest.mark.parametrize("mode", ["slow", "fast"])
def test_the_confidence_in_fixed_words_is_that_in_ones_own_where_they_are_the_same(small, trained, evaluation, mode):
    """The fast answer's words at once, and the slow answer's behind its reasoning: each has a confidence already."""
    own = {
        record.id: answer.answer.parsed.words
        for record, answer in zip(evaluation.records, evaluation.answers[mode], strict=True)
    }
    found = looked_again(small, trained, fixed_words=own)
    asked = 0
    for slow, answer in zip(found.answers["slow"], found.answers[mode], strict=True):
        if slow.answer.parsed.format_reward == 0 or not answer.answer.parsed.words:
            assert slow.fixed is answer.fixed is None or answer.answer.parsed.words
            continue
        asked += 1
        assert answer.fixed is not None
        for kind in ("correct", "wrong"):
            fixed, known = getattr(answer.fixed, kind), getattr(answer, f"confidence_{kind}")
            assert (fixed is None) == (known is None) and (fixed is None or abs(fixed - known) < 2e-4), kind
    assert asked >= 4
    # Asking again changes no answer.
    for mode, answers in evaluation.answers.items():
        assert [a.answer.text for a in found.answers[mode]] == [a.answer.text for a in answers]


def test_samples_of_almost_no_temperature_are_the_greedy_answer_and_others_are_not(small, trained):
    cold = looked_again(small, trained, ("fast",), num_samples=3, temperature=1e-4, top_p=1.0)
    for answer in cold.answers["fast"]:
        assert [given.text for given in answer.sampled] == [answer.answer.text] * 3 and answer.fixed is None
    warm = looked_again(small, trained, num_samples=3)  # also asks the fast answers' own words
    texts = [given.text for answer in warm.answers["slow"] for given in answer.sampled]
    assert len(texts) == 18 and len(set(texts)) > 6
    scores = summary.summarise(warm, small.wheels, benchmark="heldout", phase="rl", step=1)
    f1 = [[given.rewards.f1 for given in answer.sampled] for answer in warm.answers["slow"]]
    assert scores["slow"]["sampled_f1"] == pytest.approx(np.mean(f1))
    rows = summary.samples(warm, small.wheels)
    assert [row["slow"]["sampled_f1"] for row in rows] == pytest.approx(np.mean(f1, axis=1))
    asked = [answer.fixed for answer in warm.answers["fast"] if answer.fixed is not None]
    right = [fixed.correct for fixed in asked if fixed.correct is not None]
    assert scores["fast"]["fixed_confidence_correct"] == pytest.approx(np.mean(right))


def test_expected_scores_need_cues_and_are_the_oracles(small, evaluation):
    oracle = Oracle(WorldConfig(), load_lexicon(), small.wheels)
    assert summary.expected_scores(evaluation, None) is summary.expected_scores(evaluation, oracle) is None
    cues = [[n % 9] * 9 for n in range(6)]
    told = dataclasses.replace(
        evaluation,
        records=tuple(
            dataclasses.replace(record, extra=record.extra | {"cues": cue})
            for record, cue in zip(evaluation.records, cues, strict=True)
        ),
    )
    expected = summary.expected_scores(told, oracle)
    scores = summary.summarise(told, small.wheels, expected, benchmark="heldout", phase="rl", step=1)
    rows = summary.samples(told, small.wheels, expected)
    for mode, answers in told.answers.items():
        f1 = [oracle.expected(cue, a.answer.parsed.words).f1 for cue, a in zip(cues, answers, strict=True)]
        assert [row[mode]["expected_f1"] for row in rows] == pytest.approx(f1)
        assert scores[mode]["expected_f1"] == pytest.approx(np.mean([f1[n] for n in told.scored]))


def test_clips_that_broke_are_left_out_and_listed(small, trained, evaluator, evaluation):
    prompts = prompts_of(small, [0, None, 2, 3])
    partly = evaluator.run(trained, iter(prompts))
    assert [record.id for record in partly.records] == ["clip-0", "clip-2", "clip-3"]
    assert [(record.id, reason) for record, reason in partly.skipped] == [(prompts[1][0].id, "truncated")]
    for mode in ("slow", "fast"):
        kept = [evaluation.answers[mode][number].answer.text for number in (0, 2, 3)]
        assert [answer.answer.text for answer in partly.answers[mode]] == kept
    scores = summary.summarise(partly, small.wheels, benchmark="heldout", phase="rl", step=3)
    assert scores["n"] == 3 and scores["skipped"] == [{"id": prompts[1][0].id, "reason": "truncated"}]
    np.testing.assert_allclose(scores["slow"]["f1"], partly.scores("slow", "f1").mean())


def test_no_usable_clip_at_all_is_an_error(small, trained, evaluator):
    with pytest.raises(EvaluationError, match="none of the 2 held-out clips can be used, the first for: truncated"):
        evaluator.run(trained, iter(prompts_of(small, [None, None])))


def test_one_mode_alone_gives_the_same_answers(small, trained, evaluator, evaluation):
    fast = evaluator.run(trained, iter(prompts_of(small, [0, 1])), modes=("fast",))
    assert set(fast.answers) == {"fast"}
    expected = [answer.answer.text for answer in evaluation.answers["fast"][:2]]
    assert [answer.answer.text for answer in fast.answers["fast"]] == expected


def test_evaluation_stops_between_batches_when_asked(small, trained, evaluator):
    looked = []

    class Asked(Stop):
        def check(self):
            looked.append(1)
            if len(looked) == 4:
                raise StopRequested("SIGTERM asked the run to stop")

    with pytest.raises(StopRequested):
        evaluator.run(trained, iter(prompts_of(small, range(6))), stop=Asked())
    assert len(looked) == 4


def test_broken_file_is_loaded_as_its_reason(small, tmp_path):
    record = small.data.eval[0]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(b"")
    broken = dataclasses.replace(record, videos=("cut.mp4",), audios=("cut.mp4",), file=str(tmp_path / "eval.jsonl"))
    loaded = list(load_prompts(small, (broken, record)))
    assert loaded[0] == (broken, "empty")
    assert loaded[1][1].id == record.id


def test_rows_of_an_evaluation_are_what_the_devices_can_share(small):
    assert {bucket.rows for bucket in eval_buckets(small)} == {small.config.eval.prompts_per_batch}


def test_summary_and_samples_have_the_fields_their_readers_take(small, evaluation, tmp_path):
    scores = summary.summarise(evaluation, small.wheels, benchmark="heldout", phase="rl", step=7)
    rows = summary.samples(evaluation, small.wheels)
    path = summary.write(tmp_path, scores, rows)
    assert path.name == "heldout_00007.json"
    written = json.loads(path.read_text())
    assert written.keys() == {
        "step", "phase", "benchmark", "n", "n_scored", "n_unscorable", "skipped", "slow", "fast", "majority_answer",
        "majority_f1", "oracle_f1", "gate",
    }  # fmt: skip
    assert 0 <= written["gate"]["threshold"] <= 1 and written["gate"]["records_measured"] == 3  # the other half
    assert (written["step"], written["phase"], written["benchmark"], written["n"]) == (7, "rl", "heldout", 6)
    assert written["slow"].keys() == written["fast"].keys() == SCORES
    assert written["slow"]["format_rate"] is not None and written["fast"]["format_rate"] is None
    assert written["oracle_f1"] is None  # these records know no oracle
    assert 0 < written["majority_f1"] < 1 and written["majority_answer"]
    for mode in ("slow", "fast"):
        answers = [answer.answer for answer in evaluation.answers[mode]]
        assert written[mode]["f1"] == pytest.approx(np.mean([answer.rewards.f1 for answer in answers]))
        assert written[mode]["mean_length"] == pytest.approx(np.mean([answer.length for answer in answers]))
        assert written[mode]["distinct_answers"] == len({tuple(sorted(answer.parsed.words)) for answer in answers})
    lines = [json.loads(line) for line in (tmp_path / "heldout_00007.samples.jsonl").read_text().splitlines()]
    assert lines == rows and [line["id"] for line in lines] == [record.id for record in evaluation.records]
    first = lines[0]
    assert first["video"] == "clips/0.mp4" and first["subtitle"] is None and first["truth"] == ["happy"]
    assert {"text", "reasoning", "words", "categories", "precision", "recall", "f1"} <= first["slow"].keys()
    assert len(first["slow"]["categories"]) == 5


def test_oracle_is_a_ceiling_where_every_record_knows_it(small, evaluation):
    known = dataclasses.replace(
        evaluation,
        records=tuple(
            dataclasses.replace(record, extra={"oracle": list(record.solution) if number else ["sad"]})
            for number, record in enumerate(evaluation.records)
        ),
    )
    scores = summary.summarise(known, small.wheels, benchmark="heldout", phase="rl", step=7)
    assert scores["oracle_f1"] == pytest.approx(5 / 6)
