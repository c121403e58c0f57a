"""Held-out clips whose truth is on no wheel ("neutral") are answered, counted and in no mean, wherever one is made."""

import dataclasses
import json

import numpy as np
import pytest
from support.commands import run_command
from support.finished_run import write_run

from mer_r1_jax.data.records import Record
from mer_r1_jax.emotion.answer_form import parse_answer
from mer_r1_jax.emotion.rewards import answer_rewards
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.evaluation import summary
from mer_r1_jax.evaluation.ablation.arm_comparison import as_json, compare
from mer_r1_jax.evaluation.ablation.results import AblationError, read_result
from mer_r1_jax.evaluation.evaluate import AnswerOf, Evaluation, EvaluationError
from mer_r1_jax.evaluation.probes import ProbeError, Prober, swap_modality
from mer_r1_jax.evaluation.run_report import make_report
from mer_r1_jax.evaluation.sample_comparison import CompareError, compare_samples
from mer_r1_jax.rl.scoring import ScoredAnswer

WHEELS = load_wheels()
GOOD = (("happy",), ("sad", "afraid"), ("angry",), ("happy",))
NEUTRAL = (("neutral",), ("composed-ish",), ("neutral", "none"))
SLOW = ("happy", "sad", "angry", "sad")


def answered(text, truth):
    parsed = parse_answer(text)
    rewards = answer_rewards(parsed.words, truth, WHEELS)
    scored = ScoredAnswer(text=text, parsed=parsed, rewards=rewards, length=9, truncated=False)
    return AnswerOf(scored, np.zeros(9, np.int32), None, None, np.zeros((1, 5), np.float32), confidence=0.0)


def evaluation(truths, word_of=None):
    """Every clip's slow answer is its word of SLOW, every fast one "happy"; the oracle knows the truth."""
    records, slow, fast = [], [], []
    for number, truth in enumerate(truths):
        records.append(
            Record(
                id=f"clip-{number}",
                messages=(),
                videos=(f"{number}.mp4",),
                solution=truth,
                extra={"oracle": list(truth)},
            )
        )
        word = (word_of or SLOW)[number % 4]
        slow.append(answered(f"<think>so</think>\n<answer>{word}</answer>", truth))
        fast.append(answered("<think></think>\n<answer>happy</answer>", truth))
    return Evaluation(tuple(records), {"slow": tuple(slow), "fast": tuple(fast)})


def summarised(truths):
    return summary.summarise(evaluation(truths), WHEELS, benchmark="heldout", phase="rl", step=1)


@pytest.mark.parametrize("more", [NEUTRAL[:1], NEUTRAL[:2], NEUTRAL])
def test_slow_fast_floor_and_ceiling_are_over_the_same_clips(more):
    good, mixed = summarised(GOOD), summarised((*GOOD, *more))
    assert (good["n"], good["n_scored"], good["n_unscorable"]) == (4, 4, 0)
    assert (mixed["n"], mixed["n_scored"], mixed["n_unscorable"]) == (4 + len(more), 4, len(more))
    assert good["oracle_f1"] == mixed["oracle_f1"] == 1.0
    assert good["majority_f1"] == mixed["majority_f1"] > 0
    for mode in ("slow", "fast"):
        for name in ("precision", "recall", "f1"):
            assert good[mode][name] == mixed[mode][name] > 0
    # What says how answers look is over every answer.
    assert mixed["slow"]["mean_words"] == 1.0 and mixed["slow"]["format_rate"] == good["slow"]["format_rate"]


def test_the_gate_is_fitted_on_clips_that_can_be_scored():
    good, mixed = summarised(GOOD), summarised((*GOOD, *NEUTRAL))
    assert good["gate"] == mixed["gate"] and good["gate"]["clips_fitted"] == 2
    assert good["gate"]["slow"]["f1"]["value"] is not None
    assert summarised(GOOD[:3])["gate"]["threshold"] is None
    rows = summary.samples(evaluation(GOOD), WHEELS)
    assert rows[0]["fast"]["confidence"] == 0.0, "what the gate compares stands in the samples"


def test_an_answer_without_a_score_says_so_in_the_samples():
    rows = summary.samples(evaluation((*GOOD, *NEUTRAL[:1])), WHEELS)
    assert [row["slow"]["f1"] is None for row in rows] == [False] * 4 + [True]
    assert rows[4]["slow"]["words"] == ["happy"] and rows[4]["fast"]["precision"] is None


def test_samples_hold_the_voice_and_each_words_confidence_on_each_wheel():
    found = evaluation(GOOD[:1])
    sure_WQ = np.asarray([[0.25, np.nan, 1 / 3]], np.float32)
    answers = {mode: (dataclasses.replace(of[0], confidence_WQ=sure_WQ),) for mode, of in found.answers.items()}
    records = (dataclasses.replace(found.records[0], audios=("0.wav",)),)
    (row,) = summary.samples(dataclasses.replace(found, records=records, answers=answers), WHEELS)
    assert (row["video"], row["audio"]) == ("0.mp4", "0.wav")
    assert row["slow"]["confidences"] == row["fast"]["confidences"] == [[0.25, None, 0.333333]]
    assert summary.samples(found, WHEELS)[0]["audio"] is None


def test_an_evaluation_without_one_score_is_refused():
    with pytest.raises(EvaluationError, match="none of the 3 held-out clips.*emotion.wheel_dir"):
        summarised(NEUTRAL)


def written(folder, truths, word_of=None):
    found = evaluation(truths, word_of)
    scores = summary.summarise(found, WHEELS, benchmark="heldout", phase="rl", step=1)
    return summary.write(folder, scores, summary.samples(found, WHEELS)).with_suffix(".samples.jsonl")


def test_comparisons_are_over_the_clips_that_can_be_scored(tmp_path, capsys):
    for name in ("good_a", "good_b", "mixed_a", "mixed_b", "none"):
        (tmp_path / name).mkdir()
    good = written(tmp_path / "good_a", GOOD), written(tmp_path / "good_b", GOOD, ("happy",) * 4)
    mixed = (
        written(tmp_path / "mixed_a", (*GOOD, *NEUTRAL)),
        written(tmp_path / "mixed_b", (*GOOD, *NEUTRAL), ("happy",) * 4),
    )
    one, two = compare_samples([good[0]], [good[1]]), compare_samples([mixed[0]], [mixed[1]])
    assert [c.as_json() for c in one.comparisons] == [c.as_json() for c in two.comparisons]
    assert one.gaps == two.gaps and (one.unscorable, two.unscorable) == (0, 3)
    assert two.as_json()["unscorable"] == 3
    assert run_command("probe", "compare", f"--before={mixed[0]}", f"--after={mixed[1]}") == 0
    assert "3 clips have a truth on no wheel" in " ".join(capsys.readouterr().out.split())
    rows = mixed[0].read_text().splitlines()[4:]
    (tmp_path / "none" / "x.samples.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(CompareError, match="0 of 3 clips can be scored"):
        compare_samples([tmp_path / "none" / "x.samples.jsonl"], [tmp_path / "none" / "x.samples.jsonl"])


@dataclasses.dataclass(frozen=True, eq=False)
class Parrot(Prober):
    """Answers every clip as `evaluation` does."""

    def answers(self, records):
        found = evaluation([record.solution for record in records])
        return dataclasses.replace(found, records=tuple(records))


def test_clips_without_a_score_are_neither_asked_nor_lent_in_a_probe():
    prober = Parrot(evaluator=None, params={}, load=None, wheels=WHEELS)
    swap = swap_modality(prober, evaluation((*GOOD, *NEUTRAL)), "video")
    assert swap.left_out["truth on no wheel"] == 3
    assert all(comparison.ids == tuple(f"clip-{n}" for n in range(4)) for comparison in swap.comparisons)
    with pytest.raises(ProbeError, match="0 of 3 clips have one and can be scored"):
        swap_modality(prober, evaluation(NEUTRAL), "video")


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A finished run, and the same one with three neutral clips more in every evaluation."""
    root = tmp_path_factory.mktemp("runs")
    good, mixed = (write_run(root / name, clips=4, config={"eval": {"num_examples": 7}}) for name in ("good", "mixed"))
    for path in (mixed / "eval").glob("*.samples.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for number, truth in enumerate(NEUTRAL):
            row = json.loads(json.dumps(rows[0])) | {"id": f"neutral-{number}", "truth": list(truth)}
            for mode in ("slow", "fast"):
                row[mode] |= dict.fromkeys(("precision", "recall", "f1"))
            rows.append(row)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = path.with_name(path.name.replace(".samples.jsonl", ".json"))
        file.write_text(json.dumps(json.loads(file.read_text()) | {"n": 7, "n_scored": 4, "n_unscorable": 3}))
    return good, mixed


def test_an_ablation_is_over_the_clips_that_can_be_scored(two_runs):
    tables = []
    for folder in two_runs:
        sft = dataclasses.replace(read_result(folder, "sft", 0), between=())
        arm = read_result(folder, "baseline", 0)
        tables.append(as_json(compare([sft, arm], ("sft", "baseline"))))
    for part in ("clips", "rows", "versus"):
        assert tables[0][part] == tables[1][part]
    assert [table["runs"][0]["end"]["unscorable"] for table in tables] == [0, 3]


def test_a_run_without_one_score_is_no_row_of_an_ablation(two_runs, tmp_path):
    result = read_result(two_runs[1], "sft", 0)
    samples = {name: row for name, row in result.end.samples.items() if name.startswith("neutral")}
    with pytest.raises(AblationError, match="scored on 0 clip"):
        compare([dataclasses.replace(result, end=dataclasses.replace(result.end, samples=samples))], ("sft",))


def test_the_report_says_how_many_clips_are_in_no_score(two_runs):
    good, mixed = (make_report(folder).read_text() for folder in two_runs)
    assert "(4 clips)" in good and "have a truth on no wheel" not in good
    assert "(4 clips; 3 more cannot be scored)" in mixed and "not scored" in mixed
    assert "3 of 7 held-out clips have a truth on no wheel and are in no score" in mixed
    assert "on 4 held-out clips" in mixed
