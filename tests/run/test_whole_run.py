"""The training command as a user meets it: a small run from clips to export, stopped and killed, and asked."""

import json
import re
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.clips import make_clip
from support.killing import PLACES, train
from support.run_contents import checkpoint, contents, differences, leftovers
from support.small_run import run_command

from mer_r1_jax.omni.hf.load import load_params
from mer_r1_jax.omni.hf.sums import SUMS_FILE
from mer_r1_jax.run.inference import answer, clip_record
from mer_r1_jax.run.policy import load_policy, open_model
from mer_r1_jax.training.metric_names import is_known
from mer_r1_jax.training.metrics import read_metrics
from mer_r1_jax.training.signals import EXIT_SAVED
from mer_r1_jax.training.state import flatten

pytestmark = pytest.mark.timeout(1800)  # seven processes, on a busy machine

SFT_STEPS, RL_STEPS = 40, 6


@pytest.fixture(scope="session")
def alone(small_folder, compiled):
    """The folder of a run that nothing disturbed."""
    output = small_folder / "alone"
    ended = train(small_folder, output, compiled)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    return output / "small", ended


@pytest.fixture(scope="session")
def disturbed(small_folder, compiled):
    """The same command, stopped twice by SIGTERM and killed four times; (folder, [(place, exit status, stderr)])."""
    output = small_folder / "disturbed"
    attempts = []
    for name, place, signal_name in (
        ("SIGTERM in SFT", "update_dispatched 6", "SIGTERM"),
        ("SIGKILL in sft_saved", PLACES["sft_saved"], "SIGKILL"),
        ("SIGKILL in reward", PLACES["reward"], "SIGKILL"),
        ("SIGTERM in evaluation", "evaluation_scores 1", "SIGTERM"),
        ("SIGKILL in rl_update", PLACES["rl_update"], "SIGKILL"),
        ("SIGKILL in export", PLACES["export"], "SIGKILL"),
    ):
        ended = train(small_folder, output, compiled, place=place, signal_name=signal_name)
        attempts.append((name, ended.returncode, ended.stderr))
    ended = train(small_folder, output, compiled)
    assert ended.returncode == 0, ended.stderr
    return output / "small", attempts


def test_run_left_alone_leaves_what_the_report_says(alone):
    run, ended = alone
    for name in ("config.json", "env.json", "metrics.jsonl", "report.html", "export/hf/mer_r1.json", "logs/attempt_1"):
        assert (run / name).exists(), name
    steps = [SFT_STEPS, SFT_STEPS + 3, SFT_STEPS + RL_STEPS]
    expected = {f"heldout_{step:05d}{end}" for step in steps for end in (".json", ".samples.jsonl")}
    assert {path.name for path in (run / "eval").iterdir()} == expected
    assert len(list((run / "completions").iterdir())) == RL_STEPS
    assert leftovers(run) == []
    said = " ".join(ended.stdout.split())
    assert "held-out clips" in said and str(run / "report.html") in said and "always the same answer: F1" in said
    told = " ".join(ended.stderr.split())
    assert "shapes this run can compile: SFT: 4 rows x 64 prompt tokens" in told
    assert "first prompt, clip-0: 2 frames, 0.5 s audio" in told and "<|VIDEO|>" in told


def test_broken_clips_are_counted_and_not_replaced(alone):
    run, _ = alone
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["phase"] == "sft"]
    # Seven records, four a step: the broken one comes in every second step or so, and is skipped each time. Where one
    # epoch ends and the next begins inside a step it may come twice.
    skipped = [line["data/skipped"] for line in lines]
    assert min(skipped) == 0 and max(skipped) <= 2 and sum(skipped) == pytest.approx(SFT_STEPS * 4 / 7, abs=2)
    host = json.loads((run / "checkpoints" / str(SFT_STEPS + RL_STEPS) / "host.json").read_text())["host"]
    assert host["data"]["quarantine"] == []  # of RL, whose clips are whole
    scores = json.loads((run / "eval" / f"heldout_{SFT_STEPS:05d}.json").read_text())
    assert scores["n"] == 4 and scores["skipped"] == [{"id": "broken held-out", "reason": "empty"}]


def test_metrics_have_the_names_their_readers_know(alone):
    lines = read_metrics(alone[0] / "metrics.jsonl")
    sft, rl = ([line for line in lines if line["phase"] == phase] for phase in ("sft", "rl"))
    assert [line["step"] for line in sft] == list(range(1, SFT_STEPS + 1))
    assert [line["step"] for line in rl] == list(range(1, RL_STEPS + 1))
    assert [name for line in lines for name in line if not is_known(name)] == [], "the reference lacks them"
    common = {"loss", "grad_norm", "learning_rate", "num_tokens", "step_time", "perf/throughput", "skipped_steps"}
    common |= {"data/skipped", "data/silent_audio", "data/audio_cut", "data/decode_ms"}
    common |= {"data/audio_filled", "data/mute_audio", "data/cancelled_audio"}
    assert common | {"loss/slow", "loss/fast"} <= sft[0].keys()
    rewards = ("recall", "precision", "f1", "format", "r_plus", "r_minus")
    expected = common | {f"rewards/{name}/{kind}" for name in rewards for kind in ("mean", "std")}
    expected |= {"reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "beta", "policy_loss"}
    expected |= {f"clip_ratio/{name}_mean" for name in ("low", "high", "region")}
    expected |= {f"completions/{name}_length" for name in ("mean", "min", "max", "mean_terminated")}
    expected |= {"completions/clipped_ratio", "sampling/sampling_logp_difference/mean"}
    expected |= {"confidence/slow", "confidence/fast", "timing_s/gen", "timing_s/reward"}
    assert expected <= rl[0].keys()
    assert rl[0]["kl"] < 1e-9 < rl[-1]["kl"]  # the first update starts from the reference, the last one has moved
    np.testing.assert_allclose([line["beta"] for line in rl], [0.04, 0.03, 0.02, 0.01, 0.01, 0.01], rtol=1e-6)
    np.testing.assert_allclose(
        [line["learning_rate"] for line in rl], 1e-3 * np.array([5, 5, 4, 3, 2, 1]) / 5, rtol=1e-6
    )
    assert sft[-1]["loss"] < 0.3 * sft[0]["loss"]
    assert np.ptp([line["reward"] for line in rl]) > 0 and rl[0]["rewards/f1/std"] > 0
    tokens = [line["num_tokens"] for line in sft]
    assert all(later > earlier for earlier, later in zip(tokens, tokens[1:], strict=False))


def test_signal_saves_and_ends_with_the_documented_status(disturbed):
    _, attempts = disturbed
    name, status, told = attempts[0]
    assert (name, status) == ("SIGTERM in SFT", EXIT_SAVED)
    assert "SIGTERM received" in told
    saved = re.search(r"goes on from checkpoint (\d+)", told)
    assert saved and int(saved.group(1)) in (6, 7)  # between two regular ones
    assert f"going on after sft step {saved.group(1)}" in attempts[1][2]


def test_signal_inside_an_evaluation_loses_no_step(disturbed):
    _, attempts = disturbed
    name, status, told = attempts[3]
    assert (name, status) == ("SIGTERM in evaluation", EXIT_SAVED)
    assert f"goes on from checkpoint {SFT_STEPS + 3}" in told
    assert "going on after rl step 3" in attempts[4][2]


def test_disturbed_run_ends_bit_for_bit_as_the_one_left_alone(alone, disturbed):
    run, attempts = disturbed
    assert [status for name, status, _ in attempts if "SIGKILL" in name] == [-9] * 4
    expected, found = contents(alone[0]), contents(run)
    assert differences(expected, found) == []
    assert len(found) > 100 and any("opt_state" in name for name in found)
    assert leftovers(run) == []


def test_no_decoding_process_outlives_its_run(disturbed):
    """Of the killed attempts either: workers watch their parent."""
    deadline = time.monotonic() + 10
    while workers := _orphaned_workers():
        assert time.monotonic() < deadline, workers
        time.sleep(0.5)


def _orphaned_workers():
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    return [row for row in rows if "mer_r1_jax.media.pool" in row[2] and row[1] == "1"]


def test_finished_run_started_again_changes_nothing(disturbed, small_folder, compiled):
    run, _ = disturbed
    before = contents(run)
    ended = train(small_folder, run.parent, compiled)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr
    assert f"going on after rl step {RL_STEPS}" in ended.stderr
    assert differences(before, contents(run)) == []


def test_changed_setting_is_shown_and_refused(alone, small_folder, compiled):
    run, _ = alone
    ended = train(small_folder, run.parent, compiled, "--config.rl.beta=0.1", "--config.train.save_steps=2")
    assert ended.returncode == 2
    assert "rl.beta: 0.04 in the run, 0.1 now" in ended.stderr and "choose another train.run_name" in ended.stderr
    assert "save_steps" not in ended.stderr  # that one may change
    assert "Traceback" not in ended.stderr


NO_SIZES = [
    f"--config.model.{part}_{name}=0"
    for part in ("text", "vision", "audio")
    for name in ("hidden_size", "layers", "heads", "mlp_size", "kv_heads")
    if part == "text" or name != "kv_heads"
]


def test_updates_that_are_not_finite_are_left_out_and_stop_the_run(alone, small_folder, compiled, tmp_path):
    """Weights that are finite and overflow, trained on: nothing is learnt, steps count, the third stops the run."""
    run, _ = alone
    poisoned = tmp_path / "poisoned"
    shutil.copytree(run / "export/hf", poisoned)
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38
    (poisoned / SUMS_FILE).unlink()  # changed on purpose
    save_file(tensors, poisoned / "model.safetensors", metadata={"format": "pt"})
    ended = train(
        small_folder,
        tmp_path / "runs",
        compiled,
        *NO_SIZES,
        f"--config.model.path={poisoned}",
        "--config.train.max_nonfinite_steps=3",
    )
    assert ended.returncode == 2, ended.stderr
    assert "sft step 3: 3 updates in a row had a loss or gradient that is not finite" in ended.stderr
    assert "train.max_nonfinite_steps=3" in ended.stderr and "Traceback" not in ended.stderr
    lines = read_metrics(tmp_path / "runs/small/metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [1, 2, 3]
    assert all(np.isnan(line["loss"]) for line in lines)


def readings_of(model, clip, overrides=None, **shown):
    setup, params = open_model(model, {"media.missing_audio": "skip", **(overrides or {})}, devices=jax.devices()[:1])
    try:
        record = clip_record(clip, "Feel?", "I never", **({"frames": True, "audio": True} | shown))
        return answer(setup, params, record)
    finally:
        setup.source.close()


@pytest.fixture(scope="session")
def other_clip(tmp_path_factory):
    """A clip of another size, frame rate, length, container and codecs than those trained on."""
    path = tmp_path_factory.mktemp("clips") / "other.avi"
    return make_clip(
        path, seconds=1.7, fps=13, size=(150, 150), video_codec="mpeg4", audio_codec="mp3", sampling_rate=44_100
    )


def test_run_and_its_export_answer_alike(alone, other_clip):
    run, _ = alone
    prompt, from_run = readings_of(run, other_clip)
    _, from_export = readings_of(run / "export/hf", other_clip)
    assert from_run == from_export
    assert [reading.mode for reading in from_run] == ["slow", "fast"]
    assert prompt.stats["frames"] == 2 and prompt.stats["audio_seconds"] == 0.5
    slow, fast = from_run
    assert fast.text.startswith("<think></think>\n<answer>") and fast.reasoning in (None, "")
    assert slow.text and any(reading.words for reading in from_run)
    for reading in from_run:
        assert reading.categories.keys() == set(reading.words) >= reading.probabilities.keys()
        assert all(len(categories) == 5 for categories in reading.categories.values())
        assert all(0 <= probability <= 1 for probability in reading.probabilities.values())


def test_clip_without_sound_and_of_another_shape_is_answered(alone, tmp_path):
    clip = make_clip(tmp_path / "tall.mkv", seconds=0.9, fps=24, size=(240, 100), with_audio=False)
    prompt, readings = readings_of(alone[0] / "export/hf", clip)
    assert not prompt.audio and prompt.stats["frames"] == 2 and len(readings) == 2
    assert "<|AUDIO|>" not in prompt.text


def test_infer_prints_json_that_names_words_categories_and_confidences(alone, other_clip, compiled):
    run, _ = alone
    ended = run_command(
        "infer.py", f"--model={run}", f"--video={other_clip}", "--subtitle=I never", "--question=Feel?", "--json",
        cache=compiled,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    printed = json.loads(ended.stdout)
    _, readings = readings_of(run, other_clip)
    assert [row["mode"] for row in printed] == ["slow", "fast"]
    for row, reading in zip(printed, readings, strict=True):
        assert row.keys() == {"mode", "reasoning", "answer", "categories", "confidences", "truncated", "text"}
        assert row["text"] == reading.text and row["answer"] == list(reading.words)
        assert list(row["categories"]) == row["answer"] and list(row["confidences"]) == row["answer"]


def test_infer_prints_a_table_for_people(alone, other_clip, compiled):
    ended = run_command(
        "infer.py", f"--model={alone[0] / 'export/hf'}", f"--video={other_clip}", "--mode=fast", cache=compiled
    )
    assert ended.returncode == 0, ended.stderr
    assert "2 frames, 0.5 s of audio" in ended.stdout and "fast" in ended.stdout and "slow" not in ended.stdout


def test_newest_checkpoint_is_what_export_and_load_policy_take(alone, tmp_path, compiled):
    run, _ = alone
    config, params, tokenizer_path = load_policy(run)
    flat = flatten(params)
    described = checkpoint(run, SFT_STEPS + RL_STEPS)
    assert {name.partition(".")[2] for name in described if name.startswith(("trainable.", "frozen."))} == flat.keys()
    exported = flatten(load_params(run / "export/hf", config))
    assert exported.keys() == flat.keys()
    for name, leaf in flat.items():
        np.testing.assert_array_equal(leaf, exported[name], err_msg=name)
    assert (tokenizer_path / "tokenizer.json").is_file()
    ended = run_command("export.py", f"--run={run}", f"--out={tmp_path / 'out'}", "--dtype=float32", cache=compiled)
    assert ended.returncode == 0, ended.stderr
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (run / "export/hf" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model={run}", "--video={folder}/none.mp4"], ["none.mp4", "no such file"]),
        (
            ["--model={folder}/nothing", "--video={clip}"],
            ["nothing", "expected a run's folder, or a Hugging Face directory"],
        ),
        (["--model={folder}/cut", "--video={clip}"], ["model.safetensors"]),
    ],
)
def test_infer_explains_what_it_cannot_use(alone, other_clip, compiled, tmp_path, arguments, words):
    run, _ = alone
    (tmp_path / "cut").mkdir()
    for file in (run / "export/hf").iterdir():
        content = file.read_bytes()
        (tmp_path / "cut" / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    values = {"run": str(run), "folder": str(tmp_path), "clip": str(other_clip)}
    ended = run_command("infer.py", *(argument.format(**values) for argument in arguments), cache=compiled)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr and ended.stderr.count("error:") == 1
    for word in words:
        assert word in ended.stderr
