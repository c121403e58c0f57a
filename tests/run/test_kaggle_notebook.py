"""The notebook for Kaggle: its cells run as they stand, on the tiny model and stand-in clips that its first one names.

What installs the package is not run: there is none to install where the tests are.
"""

import ast
import json
from pathlib import Path

import nbformat
import pytest
from support.commands import EXPERIMENTS, load_command
from support.small_run import environment

from mer_r1_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "kaggle_v5e8.ipynb"
SFT_STEPS, RL_STEPS, RANK = 2, 1, 2

pytestmark = pytest.mark.timeout(1800)  # seven commands, each with programs of its own

# The small run's recipe for a model that has sizes of its own.
RECIPE = """
import sys
sys.path.insert(0, {tests!r})
from support import small_config

def get_config():
    config = small_config.get_config({folder!r})
    for name in list(config.model):
        if name.startswith(("text_", "vision_", "audio_")):
            setattr(config.model, name, type(config.model[name])(0))
    config.model.tokenizer_path = config.data.eval_path = ""
    config.sft.train_vision_tower = config.sft.train_audio_tower = False
    config.rl.prompts_per_step = 2
    return config
"""


def parameters(cell):
    """The names that a cell of plain assignments gives values to."""
    targets = [target for line in ast.parse(cell.source).body for target in line.targets]
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


@pytest.fixture(scope="module")
def code():
    """Code cells of the notebook as it is shipped."""
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def work(small_folder, tmp_path_factory):
    return tmp_path_factory.mktemp("kaggle")


@pytest.fixture(scope="module")
def ran(small, small_folder, work, code):
    """The notebook after its run."""
    params = small.backbone.init(seed=0)
    small.backbone.save(work / "model", params, small_folder / "tokenizer", lambda: False)
    (work / "recipe.py").write_text(RECIPE.format(tests=str(ROOT / "tests"), folder=str(small_folder)))
    values = {
        "PACKAGE": "",
        "MODEL": str(work / "model"),
        "CLIPS": str(small_folder),
        "RECORDS": str(small_folder / "rl.jsonl"),
        "SFT_RECORDS": str(work / "sft.jsonl"),
        "SFT_STEPS": SFT_STEPS,
        "RL_STEPS": RL_STEPS,
        "CLIP": str(small_folder / "clips/0.mp4"),
        "SUBTITLE": "I never",
        "WORK": str(work),
        "CONFIG": str(work / "recipe.py"),
        "SETTINGS": [f"--config.model.lora.rank={RANK}", "--config.train.save_steps=1"],
    }
    # The last demonstration's clip is broken, which `validate` rightly refuses.
    demonstrations = (small_folder / "sft.jsonl").read_text().splitlines(keepends=True)
    (work / "sft.jsonl").write_text("".join(demonstrations[:-1]))
    assert parameters(code[0]) == values.keys()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = next(number for number, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    lines = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    settings = environment()
    settings.pop("PYTHONPATH", None)  # it hides torch in a way that Jupyter's SciPy does not bear
    text = load_command("tutorial", EXPERIMENTS).executed(nbformat.writes(notebook), settings)
    return json.loads(text)


def test_it_says_first_that_kaggle_has_never_seen_it(code):
    title = nbformat.read(NOTEBOOK, as_version=4).cells[0].source
    for said in (title, code[0].source, (ROOT / "docs" / "kaggle.md").read_text(encoding="utf-8")):
        assert "never been run on Kaggle" in " ".join(said.replace("**", "").split())


def test_it_is_shipped_without_outputs(code):
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_every_cell_ran(ran):
    cells = [cell for cell in ran["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert "devices: 1" in "".join(cells[2]["outputs"][0]["text"])


def test_it_trained_adapters_in_both_phases_and_left_them_alone_in_checkpoints(ran, work):
    steps = [(row["phase"], row["step"]) for row in read_metrics(work / "runs/adapters/metrics.jsonl")]
    assert steps == [("sft", 1), ("sft", 2), ("rl", 1)]
    host = json.loads((work / f"runs/adapters/checkpoints/{SFT_STEPS + RL_STEPS}/host.json").read_text())
    stored = [name for name in host["arrays"] if name.startswith(("trainable.", "frozen."))]
    assert stored and all("lora_" in name for name in stored)
    assert not (work / "runs/adapters/export").exists()


def test_it_answered_slowly_and_fast_and_took_its_adapters_home(ran, work):
    outputs = ["".join(line for one in cell.get("outputs", ()) for line in one["text"]) for cell in ran["cells"]]
    answered = next(text for cell, text in zip(ran["cells"], outputs, strict=True) if cell["id"] == "answer")
    assert "slow" in answered and "fast" in answered
    described = json.loads((work / "adapters/adapter_config.json").read_text())
    assert described["r"] == RANK
    assert "adapter_model.safetensors: " in outputs[-1]
