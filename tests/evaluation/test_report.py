"""The report: it says what the files say, needs no network, runs nothing, and hides nothing that is missing."""

import base64
import html
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.finished_run import write_clip, write_run
from support.report_page import OURS, Page

from mer_r1_jax.evaluation import figures
from mer_r1_jax.evaluation.bootstrap import Difference
from mer_r1_jax.evaluation.clip_frames import clip_strips
from mer_r1_jax.evaluation.narrative import tell_run, verdict, warnings_of
from mer_r1_jax.evaluation.run_record import (
    KeptEvaluation,
    ReportError,
    RunRecord,
    f1_difference,
    read_run,
    stages_of,
)
from mer_r1_jax.evaluation.run_report import make_report


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def page(run_folder):
    return Page(make_report(run_folder))


def scores_of(folder, step):
    return json.loads((folder / "eval" / f"synthetic_{step:05d}.json").read_text())


def test_report_shows_the_scores_of_start_and_end(run_folder, page):
    start, end = scores_of(run_folder, 60), scores_of(run_folder, 100)
    row = " ".join(f"{100 * scores[mode]['f1']:.1f}" for scores in (start, end) for mode in ("slow", "fast"))
    cells = re.sub(r"<[^>]+>", " ", (run_folder / "report.html").read_text())
    assert f"F1 {row}" in re.sub(r"\s+", " ", cells)
    assert f"slow answers scored F1 {100 * start['slow']['f1']:.1f}" in page.text
    assert f"After RL step 40, slow answers score F1 {100 * end['slow']['f1']:.1f}" in page.text
    assert "60 steps of supervised fine-tuning" in page.text and "mer_r1 advantage" in page.text
    assert "(happy, sad) would score 31.0" in page.text and "reaches 85.0" in page.text


def test_report_is_self_contained(page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert len(page.all("script")) == 1 and not page.all("link") and not page.all("iframe")
    assert page.all("meta")[2]["content"].startswith("default-src 'none'")
    sources = [attributes["src"][:22] for attributes in page.all("img")]
    assert sources.count("data:image/svg+xml;bas") == 4  # held-out, training, health, SFT
    assert sources.count("data:image/jpeg;base64") == 8  # one strip a clip


def test_report_shows_every_clip_with_both_answers_and_truth(run_folder, page):
    assert "clip-7" in page.text and "“line 7”" in page.text and "1.0 s" in page.text
    rows = [json.loads(line) for line in (run_folder / "eval" / "synthetic_00100.samples.jsonl").open()]
    wrong = sum(row["slow"]["f1"] == 0 for row in rows)
    source = (run_folder / "report.html").read_text()
    slow_rows = re.findall(r'class="answer slow-row".*?</div>', source, re.DOTALL)
    assert len(slow_rows) == len(rows)
    assert sum("verdict wrong" in row for row in slow_rows) == wrong
    missed = sum(len(row["truth"]) for row in rows if row["slow"]["f1"] == 0)
    assert source.count('<span class="word missed">') == missed + 1  # and once in the legend


def test_html_and_scripts_in_a_completion_are_escaped(tmp_path):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"
    folder = write_run(tmp_path / "run", clips=2, reasoning=attack)
    rows = folder / "eval" / "synthetic_00100.samples.jsonl"
    hostile = [json.loads(line) for line in rows.open()]
    for row in hostile:
        row["subtitle"] = row["id"] = row["slow"]["words"][0] = row["truth"][0] = f"{row['id']}{attack}"
    rows.write_text("".join(json.dumps(row) + "\n" for row in hostile))
    page = Page(make_report(folder))
    assert page.scripts == [OURS] and "49" not in page.text.split("Clips, answers")[1].split("Scores on held")[0]
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert "<script>alert(1)</script>" in page.text  # shown, as text
    assert html.escape("<script>") in (folder / "report.html").read_text()


ATTACKS = [
    "<script>document.title=1</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><style>body{background:url(http://127.0.0.1:9/x)}",
    "</pre></details><script>alert(1)</script>",
    "{{ 7*7 }}{% raw %}<!--",
    "javascript:alert(1)",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_of_a_run_acts_in_its_report_wherever_it_stands(tmp_path, attack):
    """In the configuration, the environment, names of metrics and records, and where a number is expected."""
    settings = {"name": attack, "train": {"run_name": attack}, "data": {"question": attack}}
    folder = write_run(tmp_path / "run", clips=2, rl_steps=4, config=settings)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = {f"rewards/{attack}/mean": 1.0, f"rewards/{attack}/unscored": 0.0, f"rewards/{attack}/faults": 0.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | own) + "\n" for line in lines))
    environment = json.loads((folder / "env.json").read_text())
    (folder / "env.json").write_text(json.dumps(environment | {attack: attack}))
    for path in (folder / "eval").glob("*[0-9].json"):
        names = {"majority_answer": [attack], "skipped": [{"id": attack, "reason": attack}]}
        path.write_text(json.dumps(json.loads(path.read_text()) | names))
    for path in (folder / "eval").glob("*.samples.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row |= {"video": attack, "audio": attack, "subtitle": {"a": [attack]}}
            row["fast"] |= {"text": attack, "words": [attack], "reasoning": [attack], "confidences": [[attack], attack]}
        rows[1]["slow"] |= {"f1": attack, "words": attack}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(make_report(folder))
    acting = {"script", "iframe", "object", "embed", "link", "base", "form", "a"} & {tag for tag, _ in page.tags}
    assert acting == {"script"} and page.scripts == [OURS] and len(page.all("style")) == 1
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        sources = [value for name, value in attributes.items() if name in ("src", "href", "action", "style")]
        assert not any(re.match(r"\s*(javascript|http|//)", value or "") for value in sources)
    assert " ".join(attack.split()) in page.text  # shown, as text


def test_reward_functions_of_ones_own_have_curves(tmp_path):
    folder = write_run(tmp_path / "run", clips=1, rl_steps=4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = {"rewards/politeness/mean": 0.3, "rewards/politeness/unscored": 0.25, "rewards/politeness/faults": 2}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | own) + "\n" for line in lines))
    page = Page(make_report(folder))
    assert "Reward functions of this run's own" in page.text and "Unscored: politeness 25.0%." in page.text
    assert sum(tag["src"].startswith("data:image/svg") for tag in page.all("img")) == 5  # held-out, training, own, …


def test_slow_answers_below_the_constant_answer_have_covered_nothing(tmp_path):
    folder = write_run(tmp_path / "run", clips=1, rl_steps=4)
    run = read_run(folder)
    end = stages_of(run, "synthetic").end
    end.scores["majority_f1"], end.scores["oracle_f1"], end.scores["slow"]["f1"] = 0.4, 0.8, 0.5
    assert "Slow thinking has covered 25% of the way" in "".join(tell_run(run))
    end.scores["slow"]["f1"] = 0.1
    assert "Slow thinking is still below the first of the two." in "".join(tell_run(run))


def test_missing_and_broken_pieces_are_named(tmp_path):
    folder = write_run(tmp_path / "run", clips=3)
    (folder / "clips" / "1.mp4").unlink()
    (folder / "clips" / "2.mp4").write_bytes(b"not a video")
    (folder / "eval" / "synthetic_00080.json").write_text("{")
    (folder / "eval" / "other_00080.json").write_text('{"step": 3}')
    (folder / "eval" / "synthetic_00060.samples.jsonl").unlink()
    (folder / "completions" / "completions_00040.parquet").write_bytes(b"PAR1")
    (folder / "env.json").unlink()
    text = Page(make_report(folder)).text
    assert "frames of clip clip-1: clips/1.mp4 is not in the media folder" in text
    assert "frames of clip clip-2: 2.mp4 cannot be shown" in text
    assert "synthetic_00080.json cannot be read" in text
    assert "other_00080.json lacks benchmark, phase or step" in text
    assert "there is no synthetic_00060.samples.jsonl" in text
    assert "completions_00040.parquet cannot be read" in text
    assert "there is no env.json" in text


def test_report_of_a_run_that_only_began(tmp_path):
    (tmp_path / "run").mkdir()
    text = Page(make_report(tmp_path / "run")).text
    assert "No training step is on record." in text and "not evaluated on held-out clips" in text
    assert "there is no config.json" in text and "no evaluation was written" in text
    with pytest.raises(ReportError, match="is not a folder"):
        make_report(tmp_path / "nowhere")


def test_report_of_sft_alone(tmp_path):
    folder = write_run(tmp_path / "run", clips=2)
    (folder / "metrics.jsonl").write_text(
        "".join(line for line in (folder / "metrics.jsonl").open() if '"sft"' in line)
    )
    for path in [*folder.glob("eval/synthetic_00080*"), *folder.glob("eval/synthetic_00100*")]:
        path.unlink()
    for path in folder.glob("eval/synthetic_00060*"):
        path.write_text(path.read_text().replace('"phase": "rl"', '"phase": "sft"'))
    text = Page(make_report(folder)).text
    assert "At the end, slow answers scored F1" in text and "After SFT (step 60)" in text
    assert "RL curves: metrics.jsonl has no line of that phase" in text


def test_a_clip_outside_the_media_folder_is_not_shown(tmp_path):
    folder = write_run(tmp_path / "run", clips=1)
    write_clip(tmp_path / "private.mp4")
    rows = folder / "eval" / "synthetic_00100.samples.jsonl"
    rows.write_text(rows.read_text().replace("clips/0.mp4", "../private.mp4"))
    page = Page(make_report(folder))
    assert "'..' in '../private.mp4'" in page.text
    assert not [a for a in page.all("img") if a["src"].startswith("data:image/jpeg")]


def test_secrets_and_the_home_folder_are_not_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-planted-secret")
    home = os.path.expanduser("~")
    folder = write_run(tmp_path / "run", clips=1, config={"data": {"rl_path": f"{home}/mine/rl.jsonl"}})
    source = make_report(folder, media_root=folder).read_text()
    assert "planted" not in source and f"{home}/mine" not in source and "~/mine/rl.jsonl" in source


def evaluation(step, slow_f1, fast_f1=None, phase="rl", **scores):
    fast_f1 = slow_f1 if fast_f1 is None else fast_f1
    pairs = enumerate(zip(slow_f1, fast_f1, strict=True))
    samples = {str(number): {"slow": {"f1": slow}, "fast": {"f1": fast}} for number, (slow, fast) in pairs}
    means = {"slow": {"f1": float(np.mean(slow_f1))}, "fast": {"f1": float(np.mean(fast_f1))}}
    described = {"benchmark": "b", "phase": phase, "step": step, "n": len(slow_f1)}
    return KeptEvaluation(described | means | scores, samples)


def test_paired_difference_and_its_interval():
    rng = np.random.default_rng(0)
    old = rng.random(400)
    noise = rng.normal(0.05, 0.1, 400)
    difference = f1_difference(evaluation(9, old + noise), "slow", evaluation(0, old), "slow")
    assert difference.points == pytest.approx(100 * noise.mean())
    half_width = 1.96 * 100 * noise.std() / np.sqrt(400)  # of the paired differences, not of the scores
    assert difference.high - difference.points == pytest.approx(half_width, rel=0.1)
    assert difference.points - difference.low == pytest.approx(half_width, rel=0.1)
    assert difference.is_clear and difference.clips == 400
    assert not Difference(1.0, -0.5, 2.5, 10).is_clear
    assert f1_difference(evaluation(9, [0.5]), "slow", evaluation(0, [0.5]), "slow") is None
    assert f1_difference(evaluation(9, [0.5, 1]), "fast", KeptEvaluation({}, {}), "slow") is None


def record_of(evaluations, sft_lines=(), **config):
    metrics = {"sft": [{"step": step} for step in sft_lines], "rl": []}
    return RunRecord(Path("run"), config, {}, metrics, {"b": list(evaluations)}, None, ())


def test_stages_are_start_of_rl_and_end_in_steps_of_both_phases():
    sft, start, middle, end = (
        evaluation(step, [1, 1], phase=phase) for step, phase in ((60, "sft"), (60, "rl"), (65, "rl"), (69, "rl"))
    )
    lines = range(1, 61)
    stages = stages_of(record_of([sft, start, middle, end], lines), "b")
    assert (stages.start, stages.end, stages.end_is_rl, stages.sft_steps) == (start, end, True, 60)
    assert (stages.rl_step(sft), stages.rl_step(start), stages.rl_step(end)) == (0, 0, 9)
    assert stages_of(record_of([sft, end], lines), "b").start is sft
    assert stages_of(record_of([middle, end], lines), "b").start is None  # a trained policy is no start
    stages = stages_of(record_of([sft, start], lines), "b")
    assert (stages.start, stages.end, stages.end_is_rl) == (start, start, False)
    with pytest.raises(AssertionError):  # a benchmark that was never evaluated is in no record
        stages_of(record_of([]), "b")
    # Steps 57 to 60 fell between two lines of metrics.jsonl.
    every_eighth = record_of([start, end], range(8, 57, 8), train={"logging_steps": 8})
    assert stages_of(every_eighth, "b").start is start and stages_of(every_eighth, "b").rl_step(end) == 9
    without_sft = [evaluation(0, [1, 1]), evaluation(9, [1, 1])]
    stages = stages_of(record_of(without_sft), "b")
    assert stages.start is without_sft[0] and stages.rl_step(stages.end) == 9


def test_summary_does_not_claim_what_the_interval_leaves_open(tmp_path):
    folder = write_run(tmp_path / "run", clips=4)
    record = read_run(folder)
    rng = np.random.default_rng(1)
    slow, fast = rng.random(50), rng.random(50)
    record.evaluations["synthetic"][:] = [evaluation(60, slow, fast), evaluation(100, rng.permutation(slow), fast)]
    text = " ".join(tell_run(record))
    assert "Slow now stands not clearly apart from fast" in text
    assert "did not clearly change slow F1" in text and "raised" not in text and "lowered" not in text
    record.evaluations["synthetic"][:] = [evaluation(60, slow, fast), evaluation(100, slow - 0.2, fast)]
    assert "RL lowered slow F1, −20.0 points" in " ".join(tell_run(record))


def test_the_verdict_says_who_is_ahead_before_and_after_rl():
    rng = np.random.default_rng(2)
    slow, noise = rng.random(200), rng.normal(0, 0.05, 200)
    behind, ahead = evaluation(60, slow, slow + 0.1 + noise), evaluation(100, slow, slow - 0.2 + noise)
    even = evaluation(60, slow, slow + noise)
    lines = range(1, 61)
    turned = verdict(stages_of(record_of([behind, ahead], lines), "b"))
    assert turned.startswith("RL turned the order round, as the paper has it. Before RL fast answers are ahead, −9.7 (")
    assert "; after it slow answers are ahead, +20.3 (" in turned
    assert turned.endswith(
        "In points of F1, slow minus fast, 95% intervals over 200 held-out clips: of this one run, as another seed may "
        "differ by more."
    )
    unclear = verdict(stages_of(record_of([even, ahead], lines), "b"))
    assert "Before RL neither is clearly ahead" in unclear and "turned" not in unclear
    for kept in (behind, ahead):
        for sample in kept.samples.values():
            for mode in ("slow", "fast"):
                sample[mode]["expected_f1"] = 0.5 + 0.1 * (mode == "fast") + 0.01 * sample[mode]["f1"]
    by_expected = verdict(stages_of(record_of([behind, ahead], lines), "b"))
    assert "after it fast answers are ahead, −9.8" in by_expected and "points of expected F1," in by_expected
    for sample in behind.samples.values():  # as an earlier version left it
        for mode in ("slow", "fast"):
            del sample[mode]["expected_f1"]
    assert verdict(stages_of(record_of([behind, ahead], lines), "b")) == turned
    alone = verdict(stages_of(record_of([behind], lines), "b"))
    assert alone.startswith("At the end fast answers are ahead")
    assert verdict(stages_of(record_of([evaluation(60, [0.5])]), "b")) == ""


def test_warnings_name_collapse_floor_and_skipped_updates(tmp_path):
    record = read_run(write_run(tmp_path / "run", clips=4))
    assert any("updates skipped because a loss or gradient was not finite: 1" in line for line in warnings_of(record))
    assert any("for a clip that broke: 2." in line for line in warnings_of(record))  # of steps 20 and 40
    assert any("only 4 held-out clips" in line for line in warnings_of(record))
    slow = {"f1": 0.3, "distinct_answers": 2, "format_rate": 0.5, "truncated_rate": 0.5}
    record.evaluations["synthetic"][:] = [evaluation(100, [0.3] * 200, slow=slow, majority_f1=0.31)]
    text = "\n".join(warnings_of(record))
    assert "no better than the same majority answer" in text and "only 2 distinct slow answers" in text
    assert "50% of the slow answers are not in the think/answer format" in text
    assert "50% of the slow answers were cut" in text and "held-out clips;" not in text


def test_curves_survive_nan_infinity_and_single_points():
    line = figures.Line([1, 2, 3], [float("nan"), float("inf"), 1.0], "", "#000000")
    flat = figures.Line(list(range(30)), [0.001] * 30, "flat", "#000000")
    assert figures.draw([figures.Panel("a", (line,)), figures.Panel("b", (flat, line))], 2).startswith("data:image/svg")
    values = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(figures.smooth(values), [1, 2, 4, 4])
    assert np.isnan(figures.smooth(np.array([np.nan, np.nan]))).all()


def test_frame_strip_shows_first_to_last_frame(tmp_path):
    write_clip(tmp_path / "a.mp4", size=48)
    (shown,) = clip_strips(["a.mp4"], tmp_path)
    source, seconds = shown.source, shown.seconds
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("L"), float)
    assert strip.shape == (84, 4 * 84 + 6) and seconds == pytest.approx(1.0, abs=0.05)
    levels = [strip[20:64, 86 * n + 20 : 86 * n + 64].mean() for n in range(4)]
    assert levels == pytest.approx([0, 60, 120, 180], abs=8)  # frames 0, 3, 6, 9 of the rising grey
