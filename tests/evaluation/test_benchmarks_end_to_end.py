"""evaluate.py on stand-ins of the nine sets and held-out clips: killed half-way, gone on, scored again, refused."""

import collections
import functools
import json
import shutil
import subprocess

import jax
import numpy as np
import pytest
from support.commands import run_command
from support.judge_server import JudgeServer
from support.killing import INTERRUPT
from support.small_run import CONFIG_FILE, HELD_OUT, command, environment
from support.unibench_standins import CLIPS, clip_name, write_csv, write_sets

from mer_r1_jax.evaluation.benchmarks.benchmark_folder import BenchmarkFolder
from mer_r1_jax.evaluation.benchmarks.sets import LAYOUTS, title_of
from mer_r1_jax.evaluation.evaluate import Evaluator
from mer_r1_jax.evaluation.gate import confidence_of_line, is_sure
from mer_r1_jax.omni.hf.export import ExportSettings, export_model
from mer_r1_jax.run.asking import open_policy
from mer_r1_jax.run.policy import write_settings
from mer_r1_jax.training.state import nest

pytestmark = pytest.mark.timeout(1800)  # a process and many small programs, on a busy machine

# Each set has three clips and a batch two rows: the third batch is the first half of the second set.
KILLED_AT = "answers_appended 3"
CONFIDENCES = ("confidences", "confidence")  # of other batches: equal but for rounding
BROKEN = ("ch_sims", clip_name("ch_sims", 2))


@pytest.fixture(scope="module")
def export(small, trained, tmp_path_factory):
    """A tiny model in Hugging Face format."""
    folder = tmp_path_factory.mktemp("model") / "export"
    export_model(
        folder, small.backbone.config, nest(trained), ExportSettings(source=small.tokenizer_path, overwrite=True)
    )
    write_settings(folder, small.config)
    return folder


@pytest.fixture(scope="module")
def root(small_folder, tmp_path_factory):
    """The nine sets with converted labels, one clip of which is broken, and held-out clips of a world."""
    # The films are those the model was trained on, and so is what is said in them: there are words to score.
    root = write_sets(tmp_path_factory.mktemp("sets"), spoken=("", "I never", ""))
    assert run_command("convert_labels", f"--root={root}") == 0
    name, clip = BROKEN
    (root / LAYOUTS[name].folder / LAYOUTS[name].video / f"{clip}.mp4").write_bytes(b"")
    shutil.copytree(small_folder / "clips", root / "synthetic/clips")
    shutil.copy(small_folder / "eval.jsonl", root / "synthetic")
    return root


def evaluate(*arguments, **names):
    """The command in this process, on one device."""
    names.setdefault("open_policy", functools.partial(open_policy, devices=jax.devices()[:1]))
    return run_command("evaluate", *arguments, **names)


def arguments_of(export, root, out):
    return [f"--model={export}", "--benchmark=mer_unibench,synthetic", f"--benchmark_root={root}", f"--out={out}"]


@pytest.fixture(scope="module")
def resumed(export, root, small_folder, compiled, tmp_path_factory):
    """(folder, answer files at the kill, (benchmark, clip, mode) asked after it)."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    arguments = arguments_of(export, root, out)
    # With a configuration that has worker processes decode ahead; nothing else is different from the model's own.
    script = command("evaluate.py", *arguments, f"--config={CONFIG_FILE}:{small_folder}")
    words = [script[0], str(INTERRUPT), KILLED_AT, "SIGKILL", *script[1:]]
    ended = subprocess.run(words, env=environment(compiled), capture_output=True, text=True, timeout=900)
    assert ended.returncode == -9, ended.stderr
    torn = out / "answers/mer2023.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"id": "' + clip_name("mer2023", 2).encode())
    killed = {file.stem: file.read_bytes() for file in sorted((out / "answers").glob("*.jsonl"))}
    asked = []
    answer = Evaluator._answer

    def counted(self, policy, batch, modes, stop):
        asked.extend((record.file, record.id, mode) for record, _ in batch for mode in modes)
        return answer(self, policy, batch, modes, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "_answer", counted)
        assert evaluate(*arguments) == 0
    return out, killed, asked


def scores_of(out):
    return {file.name: json.loads(file.read_text()) for file in sorted((out / "scores").glob("*.json"))}


def test_a_killed_evaluation_goes_on_without_asking_twice(resumed):
    out, killed, asked = resumed
    assert sorted(killed) == ["mer2023", "ovmerd_plus"]
    there = {name: content[: content.rfind(b"\n") + 1] for name, content in killed.items()}
    assert [content.count(b"\n") - 1 for content in there.values()] == [4, 2 * CLIPS]
    for name, content in there.items():
        assert (out / "answers" / f"{name}.jsonl").read_bytes().startswith(content)
    expected = 2 * (9 * CLIPS - 1 + HELD_OUT)  # one clip of the sets and one of the world are broken
    assert len(asked) == len(set(asked)) == expected - 4 - 2 * CLIPS
    lines = [key for name in (*LAYOUTS, "synthetic") for key in BenchmarkFolder(out).read_answers(name)[1]]
    assert len(lines) == expected


def test_every_benchmark_is_scored_with_its_counts(resumed):
    out, _, _ = resumed
    found = {score["benchmark"]: score for score in scores_of(out).values()}
    assert set(found) == {*LAYOUTS, "synthetic"}
    for name, score in found.items():
        labelled = HELD_OUT + 1 if name == "synthetic" else CLIPS
        answered = labelled - (name in (BROKEN[0], "synthetic"))
        for scores in score["modes"].values():
            assert (scores["n_labelled"], scores["n_answered"]) == (labelled, answered)
            assert scores["headline"]["score"]["clips"] == answered == score["slow_minus_fast"]["n_common"]
        assert score["protocol"]["words"] == "answer" and "shipped" in score["protocol"]["wheels"]
    assert list(found[BROKEN[0]]["coverage"]["unusable"]) == [BROKEN[1]]
    assert found["synthetic"]["modes"]["slow"]["clip_f1"]["score"]["value"] is not None
    html = (out / "report.html").read_text()
    assert f"could not be read, not asked: 1 ({BROKEN[1]})" in html and "MER-R1" in html


def test_rescoring_touches_no_model_and_gives_the_same(resumed):
    out, _, _ = resumed
    before = scores_of(out)
    shutil.rmtree(out / "scores")
    arguments = ["--benchmark=mer_unibench,synthetic", f"--out={out}", "--rescore"]
    assert evaluate(*arguments, open_policy=None) == 0
    assert scores_of(out) == before


def test_gated_answers_ask_slowly_where_the_fast_answer_is_unsure_and_nowhere_else(
    resumed, export, root, tmp_path, capsys
):
    names = ("ovmerd_plus", "cmu_mosi", "synthetic")  # words, numbers, a world: a gate goes by no truth
    usual = {name: BenchmarkFolder(resumed[0]).read_answers(name)[1] for name in names}
    sure = [confidence_of_line(line) for lines in usual.values() for (_, mode), line in lines.items() if mode == "fast"]
    sure = np.sort([one for one in sure if one is not None])
    # In the widest gap, where no rounding of other batches decides.
    gap = int(np.argmax(np.diff(sure)))
    threshold = float(sure[gap : gap + 2].mean())
    out = tmp_path / "out"
    arguments = [f"--model={export}", f"--benchmark={','.join(names)}", f"--benchmark_root={root}", f"--out={out}"]
    assert evaluate(*arguments, "--mode=auto", f"--threshold={threshold}") == 0
    taken = collections.Counter()
    for name in names:
        lines = BenchmarkFolder(out).read_answers(name)[1]
        fast = {key: line for key, line in usual[name].items() if key[1] == "fast"}
        unsure = {clip for (clip, _), line in fast.items() if not is_sure(confidence_of_line(line), threshold)}
        expected = fast | {(clip, "slow"): usual[name][clip, "slow"] for clip in unsure}
        assert lines.keys() == expected.keys()
        for key, line in lines.items():
            assert {n: v for n, v in line.items() if n not in CONFIDENCES} == {
                n: v for n, v in expected[key].items() if n not in CONFIDENCES
            }
            assert line["confidence"] == pytest.approx(expected[key]["confidence"], abs=1e-4)
        taken += collections.Counter(n_fast=len(fast) - len(unsure), n_slow=len(unsure))
    assert taken["n_fast"] and taken["n_slow"]
    found = {score["benchmark"]: score for score in scores_of(out).values()}
    assert sum((collections.Counter(score["auto"]) for score in found.values()), collections.Counter()) == (
        taken + collections.Counter(threshold=threshold * len(names))
    )
    assert "Gated answers (auto)" in (out / "report.html").read_text()
    before = scores_of(out)
    assert evaluate(*arguments[1:], "--rescore", open_policy=None) == 0  # by the threshold they were asked with
    assert scores_of(out) == before
    # Of unsure clips without a slow answer the gate has none: what is left would be the clips the model is sure of.
    capsys.readouterr()
    assert evaluate(*arguments[1:], "--rescore", "--mode=auto", "--threshold=1", open_policy=None) == 0
    said = capsys.readouterr().out
    for name, score in ((score["benchmark"], score) for score in scores_of(out).values()):
        lines = BenchmarkFolder(out).read_answers(name)[1]
        lacking = sum(
            (clip, "slow") not in lines and not is_sure(confidence_of_line(line), 1.0)
            for (clip, mode), line in lines.items()
            if mode == "fast"
        )
        assert score["n_unsure_without_slow"] == lacking
        assert ("auto" in score) == ("auto" in score["modes"]) == (not lacking)
        assert (f"Gated answers of {title_of(name)} are not scored: {lacking} of " in said) == bool(lacking)
    assert "are not scored" in said and "are not scored" in (out / "report.html").read_text()
    # Where both answers are there, any threshold can be tried without the model.
    shutil.copytree(resumed[0], both := tmp_path / "both")
    again = ["--benchmark=synthetic", f"--out={both}", "--rescore"]
    assert evaluate(*again, "--mode=auto", "--threshold=1", open_policy=None) == 0
    (score,) = (score for score in scores_of(both).values() if score["benchmark"] == "synthetic")
    assert score["auto_minus_slow"]["headline"]["score"]["points"] == 0
    for words, said in (
        (["--threshold=0.5"], "--threshold: got it beside --mode=both, expected --mode=auto"),
        (["--mode=auto"], "got neither --threshold nor --model"),
        (["--mode=auto", "--benchmark=mme_emotion", "--threshold=1"], "--mode: got auto for mme_emotion"),
        ([f"--model={export}", "--mode=auto"], "got a model without a fitted threshold"),
    ):
        assert evaluate(*again, *words, open_policy=None) == 2
        assert said in capsys.readouterr().err


def test_an_extractor_is_a_protocol_of_its_own_and_asked_once(resumed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(resumed[0], out)
    with JudgeServer(lambda body: "positive" if "Emotion words" in str(body) else "[happy]") as server:
        arguments = ["--benchmark=synthetic,cmu_mosi", f"--out={out}", "--rescore", "--words=extractor"]
        arguments += ["--polarity=extractor", f"--extractor_url={server.base_url}", "--extractor_model=rule"]
        assert evaluate(*arguments, open_policy=None) == 0
        asked = len(server.requests)
        assert evaluate(*arguments, open_policy=None) == 0
        assert len(server.requests) == asked > 0
    by_extractor = [score for score in scores_of(out).values() if score["protocol"]["words"] == "extractor"]
    assert sorted(score["benchmark"] for score in by_extractor) == ["cmu_mosi", "synthetic"]
    assert len(scores_of(out)) == len(scores_of(resumed[0])) + 2
    assert "Protocols: their scores do not compare" in (out / "report.html").read_text()
    assert evaluate("--benchmark=synthetic", f"--out={out}", "--rescore", "--words=extractor", open_policy=None) == 2


def test_a_configuration_says_how_clips_are_asked(resumed, export, root, small_folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(resumed[0], out)
    arguments = [f"--model={export}", "--benchmark=meld", f"--benchmark_root={root}", f"--out={out}"]
    arguments += [f"--config={CONFIG_FILE}:{small_folder}"]
    answers = (out / "answers/meld.jsonl").read_bytes()
    assert evaluate(*arguments) == 0  # the model's own settings: nothing is left to ask
    assert (out / "answers/meld.jsonl").read_bytes() == answers
    arguments += ["--config.media.max_frames=4", "--config.data.question=Which?"]
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])  # ml_collections looks for overrides there
    assert evaluate(*arguments) == 2
    told = capsys.readouterr().err
    assert "media.max_frames: there 2, now 4" in told and "prompt.question: there 'Feel?', now 'Which?'" in told


def test_answers_of_another_model_or_to_other_clips_are_refused(resumed, export, root, tmp_path, capsys):
    out, other, changed = tmp_path / "out", tmp_path / "model", tmp_path / "sets"
    shutil.copytree(resumed[0], out)
    shutil.copytree(export, other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    shutil.copytree(root, changed)
    folder = changed / LAYOUTS["meld"].folder
    write_csv(folder / LAYOUTS["meld"].subtitles, ["name", "english"], [[clip_name("meld", 0), "Something else"]])
    answers = (out / "answers/meld.jsonl").read_bytes()
    arguments = ["--benchmark=meld", f"--out={out}"]
    assert evaluate(f"--model={other}", f"--benchmark_root={root}", *arguments) == 2
    assert "holds answers made from something else" in (told := capsys.readouterr().err) and "model.config" in told
    (out / "answers/meld.jsonl").rename(out / "answers/elsewhere.jsonl")  # no benchmark of one folder by another model
    assert evaluate(f"--model={other}", f"--benchmark_root={root}", *arguments) == 2
    assert "model.config" in capsys.readouterr().err and not (out / "answers/meld.jsonl").exists()
    (out / "answers/elsewhere.jsonl").rename(out / "answers/meld.jsonl")
    assert evaluate(f"--model={export}", f"--benchmark_root={changed}", *arguments) == 2
    assert "are to other questions, subtitles, files or labels" in capsys.readouterr().err
    assert (out / "answers/meld.jsonl").read_bytes() == answers
    assert evaluate(f"--model={export}", "--benchmark=iemocap_six", f"--out={out}") == 2
    assert "got 'iemocap_six', expected some of mer_unibench" in capsys.readouterr().err
