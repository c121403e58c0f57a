"""The tables of an ablation on made-up runs, against sums done by hand."""

import dataclasses
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.finished_run import write_run

from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.evaluation.ablation.ablation_report import tables_of, write
from mer_r1_jax.evaluation.ablation.alikeness import alikeness
from mer_r1_jax.evaluation.ablation.arm_comparison import PAPER_ORDER, as_json, compare
from mer_r1_jax.evaluation.ablation.results import AblationError, SeedResult, read_result
from mer_r1_jax.evaluation.narrative import tell_ablation
from mer_r1_jax.evaluation.run_record import KeptEvaluation
from mer_r1_jax.evaluation.sample_comparison import compare_samples
from mer_r1_jax.training.metrics import read_metrics


def evaluation(slow, fast=None, step=0):
    """An evaluation with those F1 of slow and fast answers, clip by clip; precision is F1 plus 0.1, recall minus."""
    fast = slow if fast is None else fast

    def answer(f1, mode):
        return {"f1": f1, "precision": f1 + 0.1, "recall": f1 - 0.1, "text": f"{mode} {f1}"}

    samples = {
        f"clip-{n}": {"id": f"clip-{n}", "truth": ["happy"], "slow": answer(s, "slow"), "fast": answer(f, "fast")}
        for n, (s, f) in enumerate(zip(slow, fast, strict=True))
    }
    counts = {"mean_words": 1.5, "mean_length": 50.0, "distinct_answers": 3, "format_rate": 1.0, "truncated_rate": 0.0}
    scores = {"benchmark": "heldout", "phase": "rl", "step": step, "n": len(slow)}
    scores |= {"slow": counts | {"f1": float(np.mean(slow))}, "fast": counts | {"f1": float(np.mean(fast))}}
    return KeptEvaluation(scores | {"majority_f1": 0.4, "oracle_f1": 0.9}, samples)


def result(row, seed, slow, fast=None, start=None, sampled=None):
    sampled = sampled or {}
    steps = np.arange(1.0, 5.0) if row != "sft" else np.zeros(0)
    return SeedResult(
        row=row,
        seed=seed,
        run=f"{row}_seed{seed}",
        start=start,
        end=evaluation(slow, fast, 4),
        between=((0, evaluation(slow)), (4, evaluation(slow, fast, 4))) if row != "sft" else (),
        sampled=sampled,
        reward_curve=(steps, 0.1 * steps),
        seconds={"sft": 20.0, "rl": 0.0} if row == "sft" else {"sft": 0.0, "rl": 30.0},
    )


SFT = [result("sft", 0, [1.0, 0.0, 0.5, 0.5]), result("sft", 1, [0.5, 0.5, 0.5, 0.5])]
BASELINE = [
    result("baseline", 0, [1.0, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5]),
    result("baseline", 1, [0.5, 0.5, 0.5, 1.0]),
]
MER_R1 = [result("mer_r1", 0, [1.0, 0.7, 0.7, 1.0]), result("mer_r1", 1, [0.7, 0.7, 0.7, 1.0])]
ROWS = ("sft", "baseline", "mer_r1")


def table(ablation, title):
    found = next(table for table in tables_of(ablation) if table.title == title)
    (head,) = found.heads
    columns = [cell.text for cell in head.cells]
    return [dict(zip(columns, [cell.text for cell in row.cells], strict=True)) for row in found.rows]


def test_means_errors_and_gains_are_those_done_by_hand():
    ablation = compare([*SFT, *BASELINE], ROWS)
    baseline = ablation.row("baseline")
    # Slow F1: seed 0 0.75, seed 1 0.625; their mean 0.6875, standard deviation 0.0884, over the root of two 0.0625.
    assert baseline.means["slow", "f1"].mean == pytest.approx(0.6875)
    assert baseline.means["slow", "f1"].error == pytest.approx(0.0625)
    assert baseline.means["slow", "precision"].mean == pytest.approx(0.7875)
    # SFT has 0.5 for both seeds: gains of 25 and 12.5 points.
    gain = baseline.gain
    assert gain.difference.points == pytest.approx(18.75)
    assert {seed: one.points for seed, one in gain.by_seed.items()} == pytest.approx({0: 25.0, 1: 12.5})
    assert gain.difference.low < 0 < gain.difference.high and not gain.is_clear  # two seeds say little about others
    assert gain.holm_p == gain.difference.p_value  # it is the only gain
    # Slow minus fast: seed 0 0.75 - 0.5, seed 1 nothing.
    assert baseline.slow_minus_fast.points == pytest.approx(12.5)
    assert ablation.row("sft").gain is None and ablation.row("sft").means["slow", "f1"].error == 0
    rows = table(ablation, "Arms")
    assert [row["row"] for row in rows] == ["SFT", "baseline"]
    assert rows[1]["slow F1"] == "68.8 ± 6.2" and rows[1]["slow F1 over SFT"].startswith("+18.8 (")
    assert (rows[1]["paper: F1"], rows[1]["paper: official"]) == ("70.55", "77.87") and rows[0]["paper: F1"] == "–"
    seeds = table(ablation, "Every seed")
    assert [(row["row"], row["seed"], row["slow F1"]) for row in seeds] == [
        ("SFT", "0", "50.0"), ("SFT", "1", "50.0"), ("baseline", "0", "75.0"), ("baseline", "1", "62.5"),
    ]  # fmt: skip
    assert seeds[2]["slow F1 over SFT"].startswith("+25.0 (") and seeds[2]["s of RL"] == "30"


def test_last_stretch_of_rl_is_told():
    def with_middle(run, slow):
        return dataclasses.replace(run, between=(run.between[0], (2, evaluation(slow)), run.between[1]))

    # Seed 0 gains 0.25 on average since step 2, seed 1 loses 0.125: together 6.25 points.
    runs = [with_middle(BASELINE[0], [0.5] * 4), with_middle(BASELINE[1], [0.75] * 4)]
    ablation = compare([*SFT, *runs], ROWS)
    stretch = ablation.row("baseline").stretch
    assert (stretch.first, stretch.last) == (2, 4) and stretch.difference.points == pytest.approx(6.25)
    assert ablation.row("sft").stretch is None
    said = next(paragraph for paragraph in tell_ablation(ablation) if "over SFT" in paragraph)
    assert "In the last stretch of RL, from step 2 to 4, it changes by: baseline +6.2 (" in said
    assert "From SFT to the ceiling there are 40.0 points." in said


def test_arms_are_compared_on_the_seeds_both_have():
    ablation = compare([*SFT, *BASELINE, MER_R1[0]], ROWS, missing=["mer_r1_seed1"])
    (versus,) = ablation.versus
    assert (versus.after, versus.before) == ("mer_r1", "baseline")
    # Seed 0 only: 0.85 - 0.75.
    assert versus.difference.points == pytest.approx(10) and versus.difference.seeds == 1
    assert list(versus.by_seed) == [0] == list(ablation.order_seeds)
    assert ablation.order.expected == ("baseline", "mer_r1") and ablation.order.by_seed == (True,)
    assert table(ablation, "Arms")[2]["seeds"] == "1"
    assert "mer_r1_seed1" in tell_ablation(ablation)[-1]
    assert as_json(ablation)["missing"] == ["mer_r1_seed1"]


def arms(**means):
    """SFT and arms of three seeds that differ by arm, alike on all of 40 clips but for a little noise."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, (3, 40))
    return [
        result(row, seed, (mean + 0.01 * seed + noise[seed]).tolist())
        for row, mean in {"sft": 0.3, **means}.items()
        for seed in range(3)
    ]


def order_said(**means):
    return tell_ablation(compare(arms(**means), ("sft", *means)))[0]


def test_the_order_of_the_paper_is_stated_as_it_is_found():
    right = order_said(baseline=0.4, rd=0.45, ad=0.5, mer_r1=0.55)
    assert "baseline < rd < ad < mer_r1, appears, and is certain" in right
    assert "3 of 3 seeds and in 100% of the bootstrap draws" in right and "4% would be chance" in right
    wrong = order_said(baseline=0.55, rd=0.5, ad=0.45, mer_r1=0.4)
    assert "does not appear in these means" in wrong
    assert re.search(r"from the lowest: mer_r1 4[01]\.\d, ad 4[56]\.\d, rd 5[01]\.\d, baseline 5[56]\.\d\.", wrong)
    assert "0 of 3 seeds and in 0% of the bootstrap draws" in wrong
    assert "commonest order in the draws is mer_r1 < ad < rd < baseline (100%)" in wrong
    runs = arms(baseline=0.4, ad=0.4)
    ahead = [r for r in runs if r.row != "ad"] + [
        result("ad", seed, [f + d for f in runs[3 + seed].clip_scores([f"clip-{n}" for n in range(40)])])
        for seed, d in enumerate((0.03, -0.02, 0.01))
    ]
    unsure = tell_ablation(compare(ahead, ("sft", "baseline", "ad")))[0]
    assert "appears in these means, but is not certain" in unsure and "2 of 3 seeds" in unsure
    assert compare(arms(rd=0.5), ("sft", "rd")).order is None


def test_controls_are_judged_by_what_they_gain():
    rows = ("sft", "mer_r1", "control_permuted", "control_sft", "control_plateau")
    found = compare(arms(mer_r1=0.5, control_permuted=0.3, control_sft=0.4, control_plateau=0.35), rows)
    said = tell_ablation(found)
    permuted, further, plateau = (
        next(p for p in said if words in p) for words in ("permuted", "further", "a fifth more")
    )
    assert "changes by +0.0 (+0.0 to +0.0): rewards that say nothing gain nothing" in permuted
    assert "mer_r1 is +20.0 (+20.0 to +20.0) ahead of it" in permuted
    assert "gains +10.0" in further and "mer_r1 is +10.0" in further and "RL of mer_r1 takes 30 s" in further
    assert "SFT had not come to its end" in plateau
    flat = tell_ablation(compare(arms(mer_r1=0.5, control_permuted=0.4, control_plateau=0.3), rows))
    assert any("RL gains without any information from the rewards" in paragraph for paragraph in flat)
    assert any("no clear gain is left in longer SFT" in paragraph for paragraph in flat)
    against = {(versus.after, versus.before) for versus in found.versus}
    assert against == {("mer_r1", "control_permuted"), ("mer_r1", "control_sft")}


def test_a_start_that_differs_from_the_end_of_sft_is_told():
    same = result("baseline", 0, [1.0] * 4, start=SFT[0].end)
    other = result("mer_r1", 0, [1.0] * 4, start=evaluation([1.0, 0.0, 0.5, 0.25]))
    ablation = compare([SFT[0], same, other], ROWS)
    assert ablation.same_start == {"baseline_seed0": (4, 4), "mer_r1_seed0": (3, 4)}
    assert "mer_r1_seed0 on 3 of 4 clips" in tell_ablation(ablation)[-1]
    alike = tell_ablation(compare([SFT[0], same], ROWS))[-1]
    assert (
        "every run that starts from a checkpoint (1) answers all clips as SFT did" in alike and "one seed only" in alike
    )


def test_runs_that_cannot_stand_in_one_table_are_refused():
    with pytest.raises(AblationError, match="no run of SFT is finished"):
        compare(BASELINE, ROWS)
    with pytest.raises(AblationError, match="not scored on the same clips: 1 stand"):
        compare([SFT[0], result("baseline", 0, [1.0] * 5)], ROWS)
    other = result("baseline", 0, [1.0] * 4)
    other.end.samples["clip-1"]["truth"] = ["sad"]
    with pytest.raises(AblationError, match="disagree about the truth of 1 clips"):
        compare([SFT[0], other], ROWS)


def write_completions(folder, steps=2, groups=6, generations=8, arm="ad", seed=0):
    """Tables of sampled completions as a run writes them, with the advantages the arm's formula gives."""
    rng = np.random.default_rng(seed)
    (folder / "completions").mkdir(parents=True)
    for step in range(1, steps + 1):
        shape = (groups, generations)
        recall, precision = rng.choice([0.0, 0.5, 1.0], shape), rng.choice([0.0, 0.5, 1.0], shape, p=[0.1, 0.2, 0.7])
        plus = np.where(rng.random(shape) < 0.3, np.nan, rng.normal(size=shape))
        columns = {
            "generation": np.tile(np.arange(generations), groups).tolist(),
            "recall": recall.ravel().tolist(),
            "precision": precision.ravel().tolist(),
            "f1": (2 * recall * precision / np.maximum(recall + precision, 1e-9)).ravel().tolist(),
            "format": [1.0] * recall.size,
            "r_plus": [None if np.isnan(value) else value for value in plus.ravel().tolist()],
            "r_minus": [None] * recall.size,
        }
        pq.write_table(pa.table(columns), folder / "completions" / f"completions_{step:05d}.parquet")
    return folder


def test_arms_are_alike_as_far_as_their_advantages_are(tmp_path):
    runs = [write_completions(tmp_path / f"ad_seed{seed}", seed=seed) for seed in range(2)]
    found = alikeness(runs, ["baseline", "rd", "ad", "mer_r1", "sfcc_word", "sfcc_loss"], RlConfig())
    assert found.names == ("baseline", "rd", "ad", "mer_r1", "recall", "precision")
    assert found.runs == 2 and found.answers == 2 * 2 * 6 * 8
    assert all(found.correlation[name, name] == pytest.approx(1) for name in found.names)
    # ad by hand: z of each over its group, ddof 1, added; its correlation with recall's z, run by run.
    expected = []
    for run in runs:
        tables = [pq.read_table(path).to_pydict() for path in sorted(run.glob("completions/*.parquet"))]
        z = {}
        for name in ("recall", "precision"):
            groups = np.asarray([table[name] for table in tables], np.float64).reshape(-1, 8)
            spread = groups.std(axis=1, ddof=1, keepdims=True)
            z[name] = np.where(spread > 0, (groups - groups.mean(axis=1, keepdims=True)) / (spread + 1e-4), 0).ravel()
        expected.append(np.corrcoef(z["recall"] + z["precision"], z["recall"])[0, 1])
    assert found.correlation["ad", "recall"] == pytest.approx(np.mean(expected), abs=1e-5)
    # Recall varies more here, so it owns the sum that is normalised afterwards; normalised apart, both count alike.
    assert found.correlation["rd", "recall"] > found.correlation["rd", "precision"] + 0.05
    assert found.correlation["ad", "recall"] == pytest.approx(found.correlation["ad", "precision"], abs=0.03)
    assert 0.9 < found.correlation["mer_r1", "ad"] < 1 == pytest.approx(found.correlation["rd", "rd"])
    assert alikeness([tmp_path / "nothing"], ["ad"], RlConfig()) is None
    ablation = compare([*SFT, *BASELINE, *MER_R1], ROWS, alike=found)
    rows = table(ablation, "How alike the arms are")
    assert [row["row"] for row in rows] == ["baseline", "rd", "ad", "mer_r1"] and rows[2]["ad"] == "1.000"
    assert rows[1]["recall"] == f"{found.correlation['rd', 'recall']:.3f}"
    said = next(paragraph for paragraph in tell_ablation(ablation) if "same sampled answers" in paragraph)
    assert f"{found.correlation['rd', 'baseline']:.2f} (rd with baseline)" in said and "(mer_r1 with ad)" in said


def test_run_is_read_from_its_folder(tmp_path):
    run = write_run(tmp_path / "baseline_seed3", rl_steps=60, sft_steps=0)
    found = read_result(run, "baseline", 3)
    rewards = [line["reward"] for line in read_metrics(run / "metrics.jsonl") if line["phase"] == "rl"]
    assert found.sampled["reward"] == pytest.approx(np.mean(rewards[-40:])) != pytest.approx(np.mean(rewards))
    rows = [json.loads(line) for line in (run / "eval/synthetic_00060.samples.jsonl").read_text().splitlines()]
    assert found.score("slow", "f1") == pytest.approx(np.mean([row["slow"]["f1"] for row in rows]))
    assert found.clip_scores(["clip-2", "clip-0"], "fast").tolist() == [rows[2]["fast"]["f1"], rows[0]["fast"]["f1"]]
    assert [step for step, _ in found.between] == [0, 30, 60] and found.start.step == 0
    assert 60 < found.seconds["rl"] < 66 and found.seconds["sft"] == 0
    (run / "eval/synthetic_00060.samples.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(AblationError, match="the last evaluation has 1 answers that can be read, expected 8"):
        read_result(run, "baseline", 3)


def test_files_are_whole_and_say_the_same(tmp_path):
    sampled = dict.fromkeys(
        ("reward", "recall", "precision", "f1", "recall_std", "precision_std", "frac_reward_zero_std", "kl"), 0.25
    )
    runs = [
        dataclasses.replace(run, sampled=sampled if run.row != "sft" else {})
        for run in arms(**dict.fromkeys(PAPER_ORDER, 0.5))
    ]
    ablation = compare(runs, ("sft", *PAPER_ORDER))
    paths = write(tmp_path, ablation, "python experiments/ablate.py --out=x", {"arms": ["ad"]}, "A setting.")
    assert sorted(path.name for path in paths) == ["ablation.html", "ablation.json", "ablation.md", "ablation.svg"]
    text = (tmp_path / "ablation.md").read_text()
    page = (tmp_path / "ablation.html").read_text()
    content = json.loads((tmp_path / "ablation.json").read_text())
    for words in ("python experiments/ablate.py --out=x", "A setting.", "The paper's order", "slow F1 over SFT"):
        assert words in text and words in page.replace("&#39;", "'"), words
    tables = tables_of(ablation)
    assert [found.title for found in tables] == [
        "Arms",
        "Comparisons",
        "How they answer",
        "What was sampled",
        "Every seed",
    ]
    for found in tables:
        assert f"### {found.title}" in text and all(len(row.cells) == len(found.heads[0].cells) for row in found.rows)
    assert text.count("\n| SFT |") == 1 + 1 + 3  # arms, answers, three seeds
    assert len(content["runs"]) == 15 and content["rows"][1]["slow"]["f1"]["mean"] == pytest.approx(0.51, abs=0.01)
    assert content["runs"][3]["sampled_at_the_end"]["recall"] == 0.25
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    picture = (tmp_path / "ablation.svg").read_bytes()
    assert picture.startswith(b"<?xml") and write(tmp_path, ablation, "x", {}, "")[0].read_bytes() == picture


def test_a_family_of_comparisons_is_corrected_for_its_number():
    """Six seeds; one arm is far above the baseline, one hardly."""
    rng = np.random.default_rng(5)
    values = {"sft": 0.2, "baseline": 0.4, "rd": 0.41, "ad": 0.6}
    results = []
    for row, level in values.items():
        for seed in range(6):
            f1 = (level + 0.01 * rng.normal() + 0.05 * rng.normal(size=12)).clip(0, 1)
            results.append(result(row, seed, f1.tolist()))
    ablation = compare(results, list(values))
    by_pair = {(versus.after, versus.before): versus for versus in ablation.versus}
    assert by_pair["ad", "baseline"].is_clear and not by_pair["rd", "baseline"].is_clear
    raw = sorted(versus.difference.p_value for versus in ablation.versus)
    assert sorted(versus.holm_p for versus in ablation.versus)[0] == pytest.approx(len(raw) * raw[0])
    told = " ".join(tell_ablation(ablation))
    assert "corrected for their number" in told
    assert {row["clear"] for row in table(ablation, "Comparisons")} == {"yes", "no"}


def test_few_seeds_are_never_called_clear():
    ablation = compare([*SFT, *BASELINE], ROWS)
    told = " ".join(tell_ablation(ablation))
    assert "gain clearly" not in told


def test_texts_may_hold_what_python_takes_for_an_end_of_a_line(tmp_path):
    folder = write_run(tmp_path / "run", clips=4)
    last = sorted((folder / "eval").glob("*.samples.jsonl"))[-1]
    rows = [json.loads(line) for line in last.read_text().split("\n") if line]
    rows[0]["subtitle"] = "Oh.\u2028Really?\x85"
    last.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    found = read_result(folder, "mer_r1", 0)
    assert found.end.samples[rows[0]["id"]]["subtitle"] == rows[0]["subtitle"] and len(found.end.samples) == len(rows)
    assert compare_samples([last], [last]).unscorable == 0


def with_expected(result, by):
    """The same run whose answers can expect so much more than their F1."""
    for sample in result.end.samples.values():
        for mode in ("slow", "fast"):
            sample[mode] |= {"expected_f1": sample[mode]["f1"] + (by if mode == "slow" else 0.0)}
    return result


def test_where_the_clips_world_is_known_runs_are_compared_by_expected_f1():
    sft = [with_expected(result("sft", seed, [0.5, 0.25, 0.5, 0.75]), 0.0) for seed in (0, 1)]
    mer_r1 = [with_expected(result("mer_r1", seed, [0.5, 0.5, 0.5, 0.5]), 0.125) for seed in (0, 1)]
    ablation = compare([*sft, *mer_r1], ROWS)
    row = ablation.row("mer_r1")
    assert ablation.score == as_json(ablation)["score"] == "expected_f1"
    assert row.gain.difference.points == pytest.approx(12.5) and row.slow_minus_fast.points == pytest.approx(12.5)
    assert row.means["slow", "f1"].mean == 0.5 and row.means["slow", "expected_f1"].mean == 0.625
    cells = table(ablation, "Arms")[1]
    assert (cells["slow F1"], cells["slow expected F1"], cells["fast expected F1"]) == (
        "50.0 ± 0.0", "62.5 ± 0.0", "50.0 ± 0.0"
    )  # fmt: skip
    assert cells["slow expected F1 over SFT"].startswith("+12.5")
    assert "Points of slow expected F1 over SFT: mer_r1 +12.5" in " ".join(tell_ablation(ablation))
    # One run without it: all are compared by F1.
    plain = compare([*sft, result("mer_r1", 0, [0.5, 0.5, 0.5, 0.5])], ROWS)
    assert plain.score == "f1" and plain.row("mer_r1").gain.difference.points == pytest.approx(0)
    assert "slow expected F1" not in table(plain, "Arms")[1]
