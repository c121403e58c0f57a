"""Probes on a policy that hears nothing, sees nothing and reads: what each swap must do is known beforehand."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from absl import app
from support.commands import run_command
from support.subtitle_world import CUES, HELD_OUT, run_config, write_world

from mer_r1_jax.emotion.rewards import category_sets
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.evaluation.answering import extended
from mer_r1_jax.evaluation.probes import (
    ALONE,
    ProbeError,
    _continued,
    _reasonings,
    partners,
    swap_modality,
    swap_reasoning,
)
from mer_r1_jax.evaluation.sample_comparison import CompareError, Comparison, compare_samples, pooled
from mer_r1_jax.evaluation.summary import samples
from mer_r1_jax.run import held_out as held_out_module
from mer_r1_jax.run.policy import PolicyError
from mer_r1_jax.run.train import train
from mer_r1_jax.storage import atomic_files

pytestmark = pytest.mark.timeout(1800)  # a training run, on a busy machine


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The export of a run whose configuration says that it was evaluated on the world's held-out clips."""
    root = tmp_path_factory.mktemp("subtitles")
    world = write_world(root / "world")
    config = run_config(world, root / "runs")
    assert train(config) == 0
    folder = root / "runs" / "subtitles"
    evaluated = dataclasses.replace(config.data, eval_path=str(world / "eval.jsonl"))
    atomic_files.write_json(folder / "config.json", dataclasses.asdict(dataclasses.replace(config, data=evaluated)))
    return folder / "export" / "hf"


@pytest.fixture(scope="module")
def policy(export):
    held_out = held_out_module.open_held_out(export)
    yield held_out
    held_out.setup.source.close()


@pytest.fixture(scope="module")
def prober(policy):
    return policy.prober(seed=3)


@pytest.fixture(scope="module")
def before(policy, prober):
    evaluation = prober.answers(policy.records)
    assert len(evaluation.records) == HELD_OUT
    for mode in ("slow", "fast"):
        np.testing.assert_array_equal(evaluation.scores(mode, "f1"), 1)
    return evaluation


def truths_of(words):
    return [(word,) for word in words]


@pytest.fixture(scope="module")
def wheels():
    return load_wheels()


@pytest.mark.parametrize("seed", range(5))
def test_partners_are_a_derangement_without_shared_categories(wheels, seed):
    truths = truths_of(["happy", "sad", "angry", "joyful"] * 6)
    partner, sharing = partners(truths, wheels, seed)
    assert sorted(partner) == list(range(24)) and sharing == 0
    sets = [category_sets(truth, wheels) for truth in truths]
    for clip, other in enumerate(partner):
        assert not any(a & b for a, b in zip(sets[clip], sets[other], strict=True))
    np.testing.assert_array_equal(partner, partners(truths, wheels, seed)[0])
    assert (partner != partners(truths, wheels, seed + 1)[0]).any()


def test_partners_share_as_little_as_they_must(wheels):
    # Five of eight are happy: at least two of them have to take another happy clip's part.
    truths = truths_of(["happy"] * 5 + ["sad", "angry", "afraid"])
    partner, sharing = partners(truths, wheels, 0)
    assert sharing == 2 and sorted(partner) == list(range(8)) and (partner != np.arange(8)).all()

    def shared(order):
        return sum("happy" in truths[clip] and "happy" in truths[other] for clip, other in enumerate(order))

    least = min(shared(o) for o in itertools.permutations(range(8)) if all(a != b for a, b in enumerate(o)))
    assert sharing == least


def test_forbidden_pairs_leave_a_clip_alone(wheels):
    kinds = np.array([0, 0, 0, 1])  # the last one has nobody of its kind
    partner, _ = partners(truths_of(["happy", "sad", "angry", "happy"]), wheels, 0, kinds[:, None] != kinds)
    assert partner[3] == ALONE and sorted(partner[:3]) == [0, 1, 2] and (partner[:3] != np.arange(3)).all()


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_swapping_what_the_policy_ignores_changes_nothing(prober, before, modality):
    swap = swap_modality(prober, before, modality)
    assert swap.sharing == 0 and not any(swap.left_out.values()) and swap.unchanged < HELD_OUT
    for comparison in swap.comparisons:
        assert len(comparison.ids) == HELD_OUT and comparison.difference.points == 0
        assert not comparison.difference.is_clear


def test_swapping_what_the_policy_reads_costs_everything(prober, before):
    swap = swap_modality(prober, before, "subtitle")
    slow, fast = swap.comparisons
    assert (slow.name, fast.name) == ("slow f1", "fast f1")
    for comparison in swap.comparisons:
        assert (comparison.before.mean(), comparison.after.mean()) == (1, 0)
        assert comparison.difference.points == -100 and comparison.difference.is_clear
    assert swap.unchanged == 0
    json.dumps(swap.as_json())


def test_clips_without_a_part_or_with_broken_media_are_counted(prober, before):
    records = list(before.records)
    records[0] = dataclasses.replace(records[0], subtitle=None)
    records[1] = dataclasses.replace(records[1], videos=())
    records[2] = dataclasses.replace(records[2], videos=("missing.mp4",))
    changed = dataclasses.replace(before, records=tuple(records))
    subtitles = swap_modality(prober, changed, "subtitle")
    assert subtitles.left_out == {"truth on no wheel": 0, "no subtitle": 1, "no partner": 0, "unusable": 1}
    assert set(subtitles.comparisons[0].ids) == {record.id for record in records} - {"eval-0", "eval-2"}
    videos = swap_modality(prober, changed, "video")  # the missing file went to somebody else
    assert videos.left_out == {"truth on no wheel": 0, "no video": 1, "no partner": 0, "unusable": 1}
    assert "eval-2" in videos.comparisons[0].ids and len(videos.comparisons[0].ids) == HELD_OUT - 2
    with pytest.raises(ProbeError, match="audio: 0 of 12 clips have one"):
        silent = tuple(dataclasses.replace(record, audios=()) for record in records)
        swap_modality(prober, dataclasses.replace(before, records=silent), "audio")
    with pytest.raises(ProbeError, match="use_audio_in_video"):
        swap_modality(dataclasses.replace(prober, interleaved=True), before, "video")


def test_answers_follow_another_clips_reasoning(prober, before):
    swap = swap_reasoning(prober, before)
    assert [comparison.name for comparison in swap.comparisons] == ["slow f1", "slow precision", "slow recall"]
    for comparison in swap.comparisons:
        assert comparison.before.mean() == 1 and comparison.after.mean() < 0.1 and comparison.difference.is_clear
    # The answer is what the partner's reasoning leads to, although subtitle, frames and sound are the clip's own.
    assert swap.facts["f1_against_partners_truth"] > 90
    assert swap.facts["own_answer_repeated"] == HELD_OUT
    assert not any(swap.left_out.values()) and swap.sharing == swap.unchanged == 0
    tags = prober.evaluator.answerer.scorer.tags
    for record, prefix in zip(before.records, _reasonings(prober, before)[1], strict=True):
        thought = next(cue[1] for cue in CUES if cue[0] == record.subtitle)
        assert tags.text(prefix) == f"<think>{thought}</think>\n<answer>"
    lengths = [len(tags.ids(reasoning)) for _, reasoning, _ in CUES]
    tokens = swap.facts["reasoning_tokens"]
    assert (tokens["least"], tokens["most"]) == (min(lengths), max(lengths))
    assert tokens["mean"] == pytest.approx(np.mean(lengths))
    json.dumps(swap.as_json())


def test_slow_answers_that_cannot_be_split_are_counted(prober, before):
    slow, tags = list(before.answers["slow"]), prober.evaluator.answerer.scorer.tags
    open_ended = slow[0].ids[:-4]
    slow[0] = dataclasses.replace(slow[0], ids=open_ended)
    merged = np.asarray([*tags.ids("<think>ab</think>\n<answer"), *tags.ids(">happy"), *tags.ids("</answer>")])
    slow[1] = dataclasses.replace(slow[1], ids=merged)
    is_merged = tags.locate(merged, len(merged)).merged
    changed = dataclasses.replace(before, answers={**before.answers, "slow": tuple(slow)})
    swap = swap_reasoning(prober, changed)
    assert swap.left_out["no answer block"] == 1
    assert swap.left_out["answer begins inside the tag's token"] == int(is_merged)
    assert len(swap.comparisons[0].ids) == HELD_OUT - 1 - int(is_merged)
    few = dataclasses.replace(changed, records=before.records[:1], answers={"slow": (slow[0],)})
    with pytest.raises(ProbeError, match="0 of 1 slow answers"):
        swap_reasoning(prober, few)


def test_a_forced_prefix_continues_as_the_rollouts_own(policy, prober, before):
    """An empty think block put behind each prompt gives the ids of fast answers, which the rollout forces itself."""
    tags = prober.evaluator.answerer.scorer.tags
    prefix = np.asarray(tags.empty_think, np.int32)
    answers = _continued(prober, before.records, [prefix] * HELD_OUT)
    for record, fast in zip(before.records, before.answers["fast"], strict=True):
        assert answers[record.id].text == fast.answer.text and answers[record.id].length == fast.answer.length
    _, prompt = next(prober.load(policy.records[:1]))
    longer = extended(prompt, prefix)
    assert longer.next_position == prompt.next_position + len(prefix)
    np.testing.assert_array_equal(longer.position[:, -1], [longer.next_position - 1] * 3)
    np.testing.assert_array_equal(longer.source[-len(prefix) :, 0], -1)
    np.testing.assert_array_equal(longer.ids[-len(prefix) :], prefix)


def test_swap_command_pools_seeds_and_writes_json(policy, tmp_path, capsys):
    out = tmp_path / "swap.json"
    few, opened = dataclasses.replace(policy, records=policy.records[:8]), []

    def open_held_out(*arguments):  # the real one would compile every program again
        opened.append(arguments)
        return few

    arguments = ["--model=a,b", "--what=subtitle", "--limit=8", f"--out={out}"]
    assert run_command("probe", "swap", *arguments, open_held_out=open_held_out) == 0
    assert opened == [("a", "", "", 8), ("b", "", "", 8)]
    printed = capsys.readouterr().out
    assert "−100.0" in printed and "0 partners share a category" in printed
    results = json.loads(out.read_text())
    (slow, fast) = results["together"]["subtitle"]
    assert slow["difference"]["points"] == fast["difference"]["points"] == -100
    assert slow["difference"]["seeds"] == len(slow["by_seed"]) == 2 and slow["difference"]["clips"] == 8
    assert [swap["left_out"]["no subtitle"] for swap in results["by_model"]["subtitle"]] == [0, 0]


def test_held_out_records_are_found_or_asked_for(export, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    with pytest.raises(PolicyError, match="names no held-out records"):
        held_out_module.open_held_out(bare)
    assert run_command("probe", "swap", f"--model={bare}") == 2
    with pytest.raises(app.UsageError, match="--what: got smell"):
        run_command("probe", "swap", f"--model={export}", "--what=smell")


def write_samples(path, slow, fast, *, truth=("happy",), reasoning="three short words", length=20):
    def answer(f1):
        return {"f1": f1, "precision": f1, "recall": f1 / 2, "reasoning": reasoning, "length": length, "words": [f1]}

    rows = [
        {"id": f"clip-{number}", "truth": list(truth), "slow": answer(a), "fast": answer(b)}
        for number, (a, b) in enumerate(zip(slow, fast, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_samples_of_several_seeds_are_compared(tmp_path):
    rng = np.random.default_rng(0)
    start, fast = rng.random(50) / 2, rng.random(50) / 2
    gains = (0.10, 0.06, 0.02)
    one = write_samples(tmp_path / "start.samples.jsonl", start, fast)
    ends = [
        write_samples(tmp_path / f"end{n}.samples.jsonl", start + gain, fast, reasoning="one", length=10)
        for n, gain in enumerate(gains)
    ]
    result = compare_samples([one], ends)
    by_name = {comparison.name: comparison for comparison in result.comparisons}
    slow, gap = by_name["slow f1"], by_name["slow minus fast f1"]
    assert [difference.points for difference in slow.by_seed] == pytest.approx([10, 6, 2])
    assert slow.difference.points == pytest.approx(6) and slow.difference.clips == 50
    assert (slow.difference.low, slow.difference.high) == pytest.approx((6, 6)) and slow.difference.seeds == 3
    assert by_name["slow recall"].difference.points == pytest.approx(3)
    assert by_name["fast f1"].difference.high == 0 and gap.difference.points == pytest.approx(6)
    assert result.gaps["before"].points == pytest.approx(100 * (start - fast).mean())
    assert result.gaps["after"].points == pytest.approx(100 * (start - fast).mean() + 6)
    assert result.gaps["before"].low < result.gaps["before"].points < result.gaps["before"].high
    assert result.reasoning_kept == pytest.approx(1 / 3) and result.lengths["after"]["slow_tokens"] == 10
    assert result.lengths["before"]["distinct_slow_answers"] == [50]
    paired = compare_samples([one, one, one], ends).comparisons[0]
    assert paired.difference == slow.difference and paired.by_seed == slow.by_seed


def test_expected_f1_is_compared_where_every_answer_has_one(tmp_path):
    """It is known of a synthetic world alone; a file without it leaves it out of the whole comparison."""

    def expecting(name, slow, fast):
        plain = write_samples(tmp_path / name, [0.5, 1, 0], [0, 0, 0])
        rows = [json.loads(line) for line in plain.read_text().splitlines()]
        for row, values in zip(rows, zip(slow, fast, strict=True), strict=True):
            row["slow"]["expected_f1"], row["fast"]["expected_f1"] = values
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return plain

    before = expecting("before.jsonl", [0.2, 0.4, 0.6], [0.5, 0.5, 0.5])
    after = expecting("after.jsonl", [0.3, 0.5, 0.7], [0.5, 0.4, 0.3])
    found = {one.name: one.difference.points for one in compare_samples([before], [after]).comparisons}
    assert found["slow expected f1"] == pytest.approx(10) and found["fast expected f1"] == pytest.approx(-10)
    assert found["slow f1"] == 0
    for lacking in (write_samples(tmp_path / "plain.jsonl", [0.5, 1, 0], [0, 0, 0]),
                    expecting("some.jsonl", [0.3, None, 0.7], [0.5, 0.4, 0.3])):  # fmt: skip
        assert not [one for one in compare_samples([before], [lacking]).comparisons if "expected" in one.name]


def test_compare_reads_what_an_evaluation_writes(before, prober, tmp_path, capsys):
    rows = samples(before, prober.wheels)
    path, out = tmp_path / "a.samples.jsonl", tmp_path / "out.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_command("probe", "compare", f"--before={path}", f"--after={path}", f"--out={out}") == 0
    assert "100%" in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["comparisons"][0]["after"] == 100 and results["reasoning_kept"] == 1


def test_samples_that_do_not_belong_together_are_refused(tmp_path, capsys):
    good = write_samples(tmp_path / "good.jsonl", [0.5, 1, 0], [0, 0, 0])
    shorter = write_samples(tmp_path / "shorter.jsonl", [0.5, 1], [0, 0])
    other = write_samples(tmp_path / "other.jsonl", [0.5, 1, 0], [0, 0, 0], truth=["sad"])
    (tmp_path / "scores.json").write_text('{"step": 3}\n')
    (tmp_path / "twice.jsonl").write_text(good.read_text() * 2)
    for after, message in (
        (shorter, "not about the same clips: 1 stand in one of them only, such as clip-2"),
        (other, "disagree about the truth of 3 clips"),
        (tmp_path / "scores.json", "scores.json:1: expected `id`"),
        (tmp_path / "twice.jsonl", "3 clips stand in it twice"),
        (tmp_path / "none.jsonl", "none.jsonl: cannot be read"),
    ):
        with pytest.raises(CompareError, match=message):
            compare_samples([good], [after])
    with pytest.raises(CompareError, match="2 files before and 3 after"):
        compare_samples([good] * 2, [good] * 3)
    assert run_command("probe", "compare", f"--before={good}", f"--after={shorter}") == 2
    assert "not about the same clips" in capsys.readouterr().err
    with pytest.raises(app.UsageError, match="--before and --after"):
        run_command("probe", "compare", f"--before={good}")


def test_seeds_are_pooled_over_common_clips():
    def one(ids, after):
        return Comparison("f1", ids, np.zeros((1, len(ids))), np.asarray([after]))

    both = pooled([one(("a", "b", "c"), [0.1, 0.2, 0.3]), one(("c", "a", "d"), [0.9, 0.5, 0.0])])
    assert both.ids == ("a", "c")
    np.testing.assert_allclose(both.after, [[0.1, 0.3], [0.5, 0.9]])
    assert both.difference.points == pytest.approx(45) and both.difference.seeds == 2
    with pytest.raises(CompareError, match="1 clips in common"):
        pooled([one(("a", "b"), [0, 0]), one(("b", "c"), [0, 0])])
