"""Scores from answers alone: protocols, official agreement, intervals, counts."""

import dataclasses
import json

import numpy as np
import pytest
from support import official_data
from support.judge_server import JudgeServer
from support.official_data import needs_official_data

from mer_r1_jax.emotion import official_scores
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.evaluation import bootstrap
from mer_r1_jax.evaluation.benchmarks import analysis, benchmark_scores
from mer_r1_jax.evaluation.benchmarks.benchmark_scores import Scorer, score_benchmark
from mer_r1_jax.evaluation.benchmarks.sets import BenchmarkError
from mer_r1_jax.evaluation.benchmarks.tables import ungated
from mer_r1_jax.evaluation.benchmarks.word_protocol import (
    OFFICIAL_WHEELS,
    POLARITY_VERSION,
    WORDS_VERSION,
    extract,
    make_scoring,
    wheels_digest,
)
from mer_r1_jax.evaluation.judge.client import ChatClient

OFFICIAL = str(official_data.WHEELS)
WORDS = ("happy", "sad", "angry", "surprised", "calm", "afraid", "bored", "neutral", "unheard")


@pytest.fixture(scope="module")
def wheels():
    return load_wheels()


def answer(clip, mode, words, truth, *, confidence=None, text=None, tokens=10):
    """A line of an answer file; the confidence is that of every word on every wheel."""
    block = ", ".join(words)
    return {
        "id": clip,
        "mode": mode,
        "truth": truth,
        "text": f"<think>because</think>\n<answer>{block}</answer>" if text is None else text,
        "answer": block if text is None else None,
        "words": list(words),
        "confidences": [[confidence] * 5 for _ in words],
        "tokens": tokens,
        "well_formed": True,
        "truncated": False,
    }


def drawn_words(rng, count):
    return [list(rng.choice(WORDS, size=rng.integers(0, 4), replace=False)) for _ in range(count)]


@pytest.mark.parametrize("variant", ["unibench", "mer2026"])
def test_resampled_scores_are_the_official_ones_over_all_clips(variant):
    wheels = dataclasses.replace(load_wheels(), variant=variant)
    rng = np.random.default_rng(0)
    predictions, truths = drawn_words(rng, 40), drawn_words(rng, 40)
    labels = [str(rng.choice(WORDS)) for _ in range(40)]
    sentiments = [str(rng.choice(["positive", "negative", "neutral", "mixed"])) for _ in range(40)]
    values = [float(value) for value in rng.choice([-1.5, -0.5, 0, 0.5, 2], 40)]
    expected = official_scores.set_f1(predictions, truths, wheels)
    found = benchmark_scores.set_f(predictions, truths, wheels).point()
    assert found == pytest.approx({n: getattr(expected, n) for n in ("score", "precision", "recall")}, rel=1e-12)
    found = benchmark_scores.hit(predictions, labels, wheels).point()["score"]
    assert found == pytest.approx(official_scores.hit(predictions, labels, wheels).score, rel=1e-12)
    expected, found = official_scores.waf(sentiments, values), benchmark_scores.waf(sentiments, values).point()
    assert (found["score"], found["accuracy"]) == pytest.approx((expected.score, expected.accuracy), rel=1e-12)


@pytest.mark.parametrize("variant", ["unibench", "mer2026"])
def test_undefined_scores_stay_undefined(variant):
    wheels = dataclasses.replace(load_wheels(), variant=variant)
    for predictions, truths in (([["happy"], []], [["sad"], ["angry"]]), ([["happy"]] * 2, [["neutral"]] * 2)):
        expected = official_scores.set_f1(predictions, truths, wheels).score
        summed = benchmark_scores.set_f(predictions, truths, wheels)
        np.testing.assert_equal(summed.point()["score"], expected)
        interval = bootstrap.intervals(summed)["score"]
        assert (interval.value, interval.low) == ((None, None) if variant == "unibench" else (0, 0))
    assert bootstrap.intervals(benchmark_scores.waf(["positive"], [0.0]))["score"].value is None


def test_an_interval_is_that_of_scores_computed_anew(wheels):
    rng = np.random.default_rng(1)
    predictions, truths = drawn_words(rng, 30), drawn_words(rng, 30)
    summed = benchmark_scores.set_f(predictions, truths, wheels)
    interval = bootstrap.intervals(summed, seed=3, resamples=400)["score"]
    again = []
    draws = np.random.default_rng(3).integers(30, size=(400, 30))
    for drawn in draws:
        again.append(official_scores.set_f1([predictions[i] for i in drawn], [truths[i] for i in drawn], wheels).score)
    defined = [value for value in again if np.isfinite(value)]
    assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(defined, [2.5, 97.5])), rel=1e-9)
    assert interval.undefined == pytest.approx(1 - len(defined) / 400) and interval.low < interval.value < interval.high


def test_slow_and_fast_are_compared_over_the_same_draws(wheels):
    rng = np.random.default_rng(2)
    truths = [[str(rng.choice(["happy", "sad", "angry"]))] for _ in range(50)]
    hits = [word if rng.random() < 0.6 else ["bored"] for word in truths]
    better = [word if rng.random() < 0.5 else given for word, given in zip(truths, hits, strict=True)]
    after, before = (benchmark_scores.set_f(words, truths, wheels) for words in (better, hits))
    same = bootstrap.paired(before, before)["score"]
    assert (same.points, same.low, same.high) == (0, 0, 0)
    gain = bootstrap.paired(after, before)["score"]
    apart = [bootstrap.intervals(one)["score"] for one in (after, before)]
    unpaired = 100 * np.hypot(*(interval.high - interval.low for interval in apart))
    assert gain.is_clear and gain.clips == 50 and gain.high - gain.low < 0.8 * unpaired
    assert bootstrap.paired(before, after)["score"].points == pytest.approx(-gain.points)
    with pytest.raises(ValueError, match="got 50 and 49 clips"):
        bootstrap.paired(after, before.picked(range(49)))


def test_a_benchmark_counted_by_hand(wheels):
    truths = {"a": "happy", "b": "sad", "c": "angry", "d": "neutral", "e": "sad"}
    given = {
        "a": {"slow": ["happy"], "fast": ["happy", "sad"]},
        "b": {"slow": ["happy"], "fast": ["sad"]},
        "c": {"slow": [], "fast": ["angry"]},
        "d": {"slow": ["calm"], "fast": []},
    }
    answers = {
        (clip, mode): answer(clip, mode, words, truths[clip], confidence=0.9 if truths[clip] in words else 0.4)
        for clip, by_mode in given.items()
        for mode, words in by_mode.items()
    }
    scoring = make_scoring("answer", "wheels", wheels, "", None)
    result = score_benchmark("meld", answers, truths, Scorer(scoring, wheels), wheels_digest(wheels))
    slow, fast = result["modes"]["slow"], result["modes"]["fast"]
    # Three answered clips can be scored: "neutral" has no category.
    assert slow["headline"]["score"]["value"] == slow["score"] == pytest.approx(1 / 3) and slow["n_scored"] == 3
    assert fast["score"] == 1 and slow["score_with_unanswered_as_empty"] == pytest.approx(1 / 4)
    assert (slow["n_labelled"], slow["n_answered"], slow["n_unanswered"]) == (5, 4, 1)
    assert slow["set_f"]["precision"]["value"] == slow["set_f"]["recall"]["value"] == pytest.approx(1 / 3)
    assert fast["set_f"]["precision"]["value"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert result["slow_minus_fast"]["headline"]["score"]["points"] == pytest.approx(-200 / 3)
    assert result["slow_minus_fast"]["n_common"] == 4 and slow["n_without_words"] == 1
    assert slow["confidence_correct"]["value"] == pytest.approx(0.9)
    assert slow["confidence_wrong"]["value"] == pytest.approx(0.4)  # of b, and of d: calm is not neutral
    assert result["references"]["oracle_f1"] is None and result["references"]["majority_answer"]
    happy = next(row for row in slow["by_category"] if row["category"] == wheels.category("happy", 0))
    assert (happy["true"], happy["predicted"], happy["precision"], happy["recall"]) == (1, 2, 0.5, 1.0)
    json.dumps(result, allow_nan=False)
    elsewhere = score_benchmark("meld", answers, truths, Scorer(scoring, wheels), "other wheels")
    assert (
        elsewhere["modes"]["slow"]["confidence_correct"] is None
        and elsewhere["modes"]["slow"]["score"] == slow["score"]
    )


def test_a_gate_is_fitted_where_there_are_both_answers_and_confidences(wheels):
    answers, truths = {}, {}
    for number in range(12):
        clip, truths[clip] = f"clip-{number}", "sad"
        sure = number % 3 > 0  # fast is right where it is sure, slow everywhere else
        fast, slow = (["sad"], ["happy"]) if sure else (["happy"], ["sad"])
        answers[clip, "fast"] = answer(clip, "fast", fast, "sad", confidence=0.9 if sure else 0.3, tokens=7)
        answers[clip, "slow"] = answer(clip, "slow", slow, "sad", confidence=0.5, tokens=40)
    truths["neutral"] = "neutral"
    for mode in ("slow", "fast"):
        answers["neutral", mode] = answer("neutral", mode, ["calm"], "neutral", confidence=0.1)
    scoring = make_scoring("answer", "wheels", wheels, "", None)
    gate = score_benchmark("meld", answers, truths, Scorer(scoring, wheels), wheels_digest(wheels))["gate"]
    assert (gate["clips_fitted"], gate["clips_measured"]) == (6, 6)
    assert gate["threshold"] == pytest.approx(0.6) and gate["fitted"]["f1"]["value"] == 1
    fast = gate["fitted"]["coverage"]["value"]
    assert gate["fast"]["f1"]["value"] == pytest.approx(fast) == pytest.approx(1 - gate["slow"]["f1"]["value"])
    assert gate["fitted"]["tokens"]["value"] == pytest.approx(7 + 40 * (1 - fast))
    elsewhere = score_benchmark("meld", answers, truths, Scorer(scoring, wheels), "other wheels")
    alone = {key: line for key, line in answers.items() if key[1] == "fast"}
    assert "gate" not in elsewhere, "its confidences are of other wheels"
    assert "gate" not in score_benchmark("meld", alone, truths, Scorer(scoring, wheels), wheels_digest(wheels))


def test_gated_answers_are_a_mode_of_their_own(wheels):
    """Surely right, unsure and helped by the slow answer, unsure and hurt, wordless, not to be asked slowly."""
    given = {
        "sure": (["sad"], 0.9, None),
        "helped": (["happy"], 0.3, ["sad"]),
        "hurt": (["sad"], 0.5, ["happy"]),
        "wordless": ([], None, ["sad"]),
        "lost": (["sad"], 0.2, None),
    }
    truths, answers = dict.fromkeys(given, "sad"), {}
    for clip, (fast, confidence, slow) in given.items():
        line = answer(clip, "fast", fast, "sad", confidence=confidence, tokens=7)
        # Of a kept answer the one number counts; those kept before there was one have the wheels' alone.
        answers[clip, "fast"] = line if clip == "hurt" else line | {"confidence": confidence, "confidences": []}
        if slow is not None:
            answers[clip, "slow"] = answer(clip, "slow", slow, "sad", confidence=0.1, tokens=40)
    scorer = Scorer(make_scoring("answer", "wheels", wheels, "", None), wheels)
    found = score_benchmark("meld", answers, truths, scorer, "other wheels", threshold=0.6, unusable=["lost"])
    assert list(found["modes"]) == ["fast", "auto"], "slow answers are those of hard clips alone"
    assert (found["n_slow_without_score"], found["n_unsure_without_slow"], found["threshold"]) == (3, 0, 0.6)
    assert ungated(found).startswith("Slow answers of MELD have no score of their own: there are 3, and not of every")
    auto = found["modes"]["auto"]
    assert (auto["n_answered"], auto["n_unanswered"], auto["score"]) == (4, 1, 0.75)
    assert auto["mean_tokens"] == (7 + 3 * 47) / 4
    assert found["auto"] == {"threshold": 0.6, "n_fast": 1, "n_slow": 3} and found["slow_minus_fast"] == {}
    assert found["auto_minus_fast"]["headline"]["score"]["points"] == pytest.approx(100 * (3 - 2) / 4)
    assert found["auto_minus_fast"]["n_common"] == 4 and "auto_minus_slow" not in found
    assert found["n_fast_without_confidence"] == 1, "that of `hurt`, compared with others of another kind"
    json.dumps(found, allow_nan=False)
    # What a gate wants and nobody asked for is no matter of that clip alone: the sure ones would be left.
    partly = score_benchmark("meld", answers, truths, scorer, "other wheels", threshold=0.6)
    assert list(partly["modes"]) == ["fast"] and "auto" not in partly and partly["n_unsure_without_slow"] == 1
    assert ungated(partly).startswith("Gated answers of MELD are not scored: 1 of 5 fast answers are less sure")
    alone = {key: line for key, line in answers.items() if key[1] == "slow"}
    slow_only = score_benchmark("meld", alone, truths, scorer, "other wheels", threshold=0.6)
    assert list(slow_only["modes"]) == ["slow"] and "there is no fast one" in ungated(slow_only)
    # Where slow answers were asked of all, one clip that could not be read costs no other its score.
    answers["sure", "slow"] = answer("sure", "slow", ["sad"], "sad", confidence=0.1, tokens=40)
    most = score_benchmark("meld", answers, truths, scorer, "other wheels", threshold=0.6, unusable=["lost"])
    assert list(most["modes"]) == ["slow", "fast", "auto"] and most["slow_minus_fast"]["n_common"] == 4
    assert ungated(most) == "" and most["n_slow_without_score"] == 0
    for clip in ("sure", "lost"):
        answers[clip, "slow"] = answer(clip, "slow", ["happy"], "sad", confidence=0.1, tokens=40)
    whole = score_benchmark("meld", answers, truths, scorer, "other wheels", threshold=0.6)
    assert list(whole["modes"]) == ["slow", "fast", "auto"] and whole["auto"]["n_slow"] == 4
    assert whole["auto_minus_slow"]["headline"]["score"]["points"] == pytest.approx(100 * (3 - 2) / 5)
    assert "auto" not in score_benchmark("meld", answers, truths, scorer, "other wheels")["modes"]


def test_what_cannot_be_scored_says_so(wheels):
    scoring = make_scoring("answer", "wheels", wheels, "", None)
    with pytest.raises(BenchmarkError, match="MELD: there is no answer to score"):
        score_benchmark("meld", {}, {"a": "happy"}, Scorer(scoring, wheels))
    with pytest.raises(BenchmarkError, match="the answer of a lacks truth, text"):
        score_benchmark("meld", {("a", "slow"): {"id": "a", "mode": "slow"}}, {"a": "sad"}, Scorer(scoring, wheels))


def test_confusion_and_calibration_by_hand(wheels):
    joy, sadness, anger = (wheels.category(word, 0) for word in ("happy", "sad", "angry"))
    table = analysis.confusion([["happy"], ["sad", "angry"], []], [["happy"], ["happy"], ["happy"]], wheels)
    row = dict(zip(table["columns"], table["counts"][table["rows"].index(joy)], strict=True))
    assert (row[joy], row[sadness], row[anger], row["none"]) == (1, 0.5, 0.5, 1)
    table = analysis.polarity_confusion(["positive", "odd", "negative", "positive"], [1, 2, -1, 0])
    assert table["counts"] == [[1, 1, 0], [0, 0, 1]]
    curve = analysis.calibration([(np.array([0.92, 0.98, 0.31]), np.array([True, False, False])), (np.zeros(0),) * 2])
    assert (
        curve["count"] == [1, 2] and curve["correct"] == [0, 0.5] and curve["confidence"] == pytest.approx([0.31, 0.95])
    )
    assert curve["ece"] == pytest.approx((0.31 + 2 * 0.45) / 3)
    assert analysis.calibration([])["ece"] is None


@needs_official_data
def test_protocols_have_keys_of_their_own(wheels):
    class Named:
        model = "some-llm"

    made = [
        make_scoring(words, polarity, used, folder, Named())
        for words, polarity, used, folder in (
            ("answer", "wheels", wheels, ""),
            ("extractor", "wheels", wheels, ""),
            ("answer", "extractor", wheels, ""),
            ("answer", "wheels", load_wheels(OFFICIAL), OFFICIAL),
            ("answer", "wheels", load_wheels(OFFICIAL, "mer2026"), OFFICIAL),
        )
    ]
    assert len({scoring.key for scoring in made}) == len(made)
    assert "shipped" in made[0].wheels and "official" in made[3].wheels and "official" in made[4].wheels
    assert len(OFFICIAL_WHEELS) == 2 and made[0].extractor == ""
    assert WORDS_VERSION in made[1].describe() and POLARITY_VERSION in made[2].describe()
    with pytest.raises(BenchmarkError, match="--extractor_url"):
        make_scoring("extractor", "wheels", wheels, "", None)


def reply(body):
    """An extractor's reply by a rule: words it finds, in the official form; polarity by the first word."""
    said = body["messages"][-1]["content"]
    if said.startswith("Emotion words"):
        return "positive" if "happy" in said else "I would say negative"
    return "Output: [" + ", ".join(word.upper() for word in ("happy", "sad") if word in said) + "]"


def test_the_extractor_reads_answers_once_and_its_failures_are_counted(wheels, tmp_path):
    lines = [
        answer("a", "slow", ["happy", "x"], 1.0),
        answer("b", "slow", ["happy", "x"], -1.0),
        answer("c", "slow", [], 1.0, text="<think>not happy at all</think> She is sad."),
        answer("d", "slow", [], 0.5),
        answer("e", "slow", ["poison"], -1.0),
    ]
    with JudgeServer(reply, fault_of=lambda body: "500" if "poison" in str(body) else "") as server:
        settings = {"base_url": server.base_url, "model": "rule", "cache_dir": tmp_path, "max_failed_frac": 0.5}
        for attempt in range(2):
            with ChatClient(**settings, max_retries=1, backoff=0.01) as client:
                scoring = make_scoring("extractor", "extractor", wheels, "", client)
                found = extract(lines, "waf", scoring, wheels, client)
            assert found.words == (("happy",), ("happy",), ("sad",), (), None)
            # "I would say negative" is not one of the three words, and counts as the official code has it.
            assert found.polarities == ("positive", "positive", "neutral", "neutral", None)
            assert sum(found.failures.values()) == 1
            assert len(server.asked) == 4 and set(server.asked.values()) == {1}, attempt
        asked = [request.text for request in server.requests if not request.fault]
    assert not any("not happy at all" in text for text in asked)  # reasoning is not an answer
    assert any("<description>\nShe is sad.\n</description>" in text for text in asked)
