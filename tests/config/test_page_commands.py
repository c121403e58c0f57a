"""Every command that a page shows is one that the command line takes: its flags, its configuration and their values."""

import pytest
from support.page_commands import ROOT, check, shown_commands

from mer_r1_jax.config.build import load_config
from mer_r1_jax.config.schema import ConfigError

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")])
FIVE = ("convert", "validate", "train", "evaluate", "export")
SHOWN = {str(page.relative_to(ROOT)): shown_commands(page) for page in PAGES}


@pytest.fixture(autouse=True)
def in_a_clone(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", [page for page, commands in SHOWN.items() if commands])
def test_commands_of_a_page_are_taken_by_the_command_line(page):
    for command, words in SHOWN[page]:
        check(command, words)


def test_the_pages_a_newcomer_begins_with_show_commands():
    """Otherwise a page whose blocks nobody finds would pass."""
    assert sum(map(len, SHOWN.values())) > 40
    for page in ("README.md", "docs/running.md", "docs/converting.md", "docs/launching.md", "docs/serving.md"):
        assert SHOWN[page], page


def test_the_five_commands_of_your_data_hand_on_what_the_next_one_takes():
    """convert, validate, train, evaluate, export: folders and files are those that the command before has made."""
    shown = SHOWN["docs/your-data.md"][:6]
    labels = next(words for command, words in shown if command == "convert-labels")  # once, before the fourth
    commands, flags = zip(*(one for one in shown if one[0] != "convert-labels"), strict=True)
    assert commands == FIVE and shown[3][0] == "convert-labels"
    converted, checked, trained, scored, served = (
        dict(word.removeprefix("--").partition("=")[::2] for word in words) for words in flags
    )
    files = {f"{converted['out']}/{name}.jsonl" for name in ("sft", "rl", "eval")}  # what `convert` writes
    assert set(checked["data"].split(",")) == files
    assert {trained[f"config.data.{name}_path"] for name in ("sft", "rl", "eval")} == files
    assert converted["root"] == checked["media_root"] == trained["config.data.media_root"]
    assert checked["model"] == trained["config.model.path"] and checked["config"] == trained["config"]
    config = load_config(trained["config"])
    assert scored["model"] == served["run"] == f"{config.train.output_dir}/{config.train.run_name or config.name}"
    assert served["layout"] == "omni" and labels == [f"--root={scored['benchmark_root']}"]


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("convert", ["--from=mer2025", "--rot=MER2025", "--out=data"], "Unknown command line flag 'rot'"),
        ("convert", ["--from=mer2026", "--out=data"], "--from"),
        ("train", ["--config=synthetic", "--config.rl.num_generation=4"], "num_generations"),
        ("train", ["--config=synthetic", "--config.rl.num_generations=1"], "num_generations"),
        ("train", ["--config=omni_7b:v5p:9x9"], "slice 'v5p:9x9'"),
        ("train", ["--config=omni_8b"], "expected a .py file"),
    ],
)
def test_a_command_line_that_is_wrong_is_found(command, words, said):
    with pytest.raises(ConfigError, match=said):
        check(command, words)


def test_commands_are_found_as_pages_write_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nJAX_PLATFORMS=cpu mer-r1 train --config=synthetic \\\n    --config.rl.arm=ad   # an arm\n"
        "vllm serve mer-r1 --port 1\nmer-r1 --help\n"
        "experiments/launch/tpu_vm.sh stop\nsbatch --nodes=2 experiments/launch/slurm.sh --config='a b'\n"
        "python experiments/plan.py --topology=h100:1 && mer-r1 validate --data=x\n```\nmer-r1 nothing\n"
    )
    assert shown_commands(page) == [
        ("train", ["--config=synthetic", "--config.rl.arm=ad"]),
        ("train", ["--config=a b"]),
        ("plan", ["--topology=h100:1"]),
        ("validate", ["--data=x"]),
    ]
