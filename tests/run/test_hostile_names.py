"""Real commands in a real terminal, on names, ids and texts made to be obeyed."""

import json
import re
import shutil

import pytest
from support.small_run import CONFIG_FILE, command, environment
from support.terminal import in_a_terminal

ESCAPES = "\x1b[2J\x07"
WRITTEN = r"\x1b[2J\x07"
STYLES = re.compile(r"\x1b\[[0-9;]*[A-Zm]")  # of Rich's and tqdm's: colours, and the cursor up a line
BRACKETS = "clip [v2].mp4"


def shown(script, *arguments, cache):
    """Runs a command in a terminal; returns its exit code and what came, without styles."""
    code, got = in_a_terminal(command(script, *arguments), environment(cache))
    return code, STYLES.sub("", got.decode(errors="replace")).replace("\r\n", "\n")


@pytest.fixture(scope="module")
def hostile(small_folder, tmp_path_factory):
    """The small run's data with brackets in ids and clips' names, and escapes in what is said."""
    folder = shutil.copytree(small_folder, tmp_path_factory.mktemp("hostile") / "data [x]")
    shutil.copy(folder / "clips/0.mp4", folder / "clips" / BRACKETS)
    for name in ("sft", "rl", "eval"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            row["id"] = f"clip[/{number}] [bold]"
            row["subtitle"] = f"[/b]{ESCAPES}"
        rows[0] |= {"videos": [f"clips/{BRACKETS}"], "audios": [f"clips/{BRACKETS}"]}
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_begins_and_ends_and_its_model_answers(hostile, compiled, tmp_path):
    code, told = shown(
        "train.py",
        f"--config={CONFIG_FILE}:{hostile}",
        f"--config.train.output_dir={tmp_path / 'runs [y]'}",
        "--config.sft.max_steps=1",
        "--config.rl.max_steps=0",
        cache=compiled,
    )
    assert code == 0, told
    assert "\x1b" not in told and "\x07" not in told and "Traceback" not in told
    assert "first prompt, clip[/0] [bold]: 2 frames" in told and f"[/b]{WRITTEN}" in told
    assert str(tmp_path / "runs [y]") in told
    run = next((tmp_path / "runs [y]").iterdir())
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in page and "clip[/0] [bold]" in page and WRITTEN in page
    assert all("\x1b" not in path.read_text() for path in run.glob("logs/*/log.txt"))
    for name, written in ((BRACKETS, BRACKETS), (f"a{ESCAPES}\u202e\n[b].mp4", rf"a{WRITTEN}\u202e\n[b].mp4")):
        clip = tmp_path / name
        shutil.copy(hostile / "clips/0.mp4", clip)
        code, told = shown("infer.py", f"--model={run / 'export/hf'}", f"--video={clip}", "--mode=fast", cache=compiled)
        assert code == 0, told
        assert f"{tmp_path}/{written}: 2 frames, " in told and "\x1b" not in told and "\u202e" not in told


def test_validate_and_errors_name_things_as_they_are(hostile, compiled, tmp_path):
    data = tmp_path / f"d [x] {ESCAPES}.jsonl"
    row = json.loads((hostile / "rl.jsonl").read_text().splitlines()[1])
    broken = row | {"id": f"[/a] {ESCAPES}", "videos": [f"clips/[b] {ESCAPES}.mp4"], f"{ESCAPES}[/c]": 1}
    data.write_text(json.dumps(row) + "\n" + json.dumps(broken) + "\n")
    code, told = shown("validate.py", f"--data={data}", f"--media_root={hostile}", cache=compiled)
    assert code == 1 and "\x1b" not in told and "\x07" not in told and "Traceback" not in told
    assert f"d [x] {WRITTEN}.jsonl:2: " in told and f"[b] {WRITTEN}.mp4" in told.replace("\\\\", "\\")
    code, told = shown("infer.py", f"--model={tmp_path}/[m] {ESCAPES}", "--video=x.mp4", cache=compiled)
    assert code == 2 and "\x1b" not in told and "\x07" not in told and f"[m] {WRITTEN}" in told
