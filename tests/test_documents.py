"""The documents: no dead link, nothing left out of the reference, examples that work."""

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.commands import EXPERIMENTS, load_command

from mer_r1_jax.config.names import field_names
from mer_r1_jax.config.schema import RlConfig
from mer_r1_jax.config.settings import sections, settings
from mer_r1_jax.rl import advantage, losses
from mer_r1_jax.training import metric_names
from mer_r1_jax.training.progress import SHOWN

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
IGNORED = {".venv", ".venv-test", ".compat", "site", "build", "runs", ".git", "node_modules"}
PAGES = sorted(page for page in ROOT.rglob("*.md") if not IGNORED & set(page.relative_to(ROOT).parts))
LINK = re.compile(r"\]\(([^)\s]+)\)")
METRIC = re.compile(r"(?:data|confidence|rewards|perf|timing_s|answers|completions|sampling|clip_ratio|loss)/[\w./]+")


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(page):
    """What headings of a page are called in links, as GitHub and the site spell it."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_and_pictures_of_a_page_are_there(page):
    dead = []
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            dead.append(target)
    assert not dead


def test_pages_of_the_site_link_only_within_it():
    """Links to files outside docs/ work on GitHub and are dead on the site: such places are named, not linked."""
    for page in DOCS.rglob("*.md"):
        for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
            if not re.match(r"\w+:", target):
                assert (page.parent / target.partition("#")[0]).resolve().is_relative_to(DOCS), (page, target)


def test_every_page_is_in_the_menu_of_the_site():
    def pages(menu):
        return [path for entry in menu for value in entry.values() for path in listed(value)]

    def listed(value):
        return pages(value) if isinstance(value, list) else [value]

    menu = pages(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.parent.name != "plans"}
    assert sorted(menu) == sorted(there | {"plans/README.md"})


def test_the_readme_stays_short_and_says_first_what_it_is():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:40])
    for said in (
        "Teach a multimodal language model",
        "**Status**",
        "pip install",
        "mer-r1 infer",
        "docs/clip.svg",
        "I want",
    ):
        assert said in first, said


def test_the_reference_is_up_to_date_and_holds_every_setting_and_metric():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert text == load_command("reference_page", EXPERIMENTS).page(), "run python experiments/reference_page.py"
    for name in field_names():
        section, _, field = name.rpartition(".")
        part = text.partition(f"\n### {section or 'The run'}\n")[2].partition("\n##")[0]
        assert f"| `{field}` |" in part, name
    assert all(f"`{name}`" in text for names in metric_names.METRICS for name in names)


def test_the_tutorial_s_page_is_that_of_its_notebook():
    notebook = json.loads((DOCS / "tutorial.ipynb").read_text(encoding="utf-8"))
    page, pictures = load_command("tutorial", EXPERIMENTS).page(notebook)
    assert (DOCS / "tutorial.md").read_text(encoding="utf-8") == page, "run python experiments/tutorial.py"
    assert len(pictures) == 3
    for name, content in pictures.items():
        assert (DOCS / name).read_bytes() == content and f"]({name})" in page
    assert {path.name for path in DOCS.glob("tutorial_*")} == set(pictures)


def test_every_setting_has_a_comment_and_every_section_a_line():
    assert [setting.name for setting in settings() if not (setting.comment and setting.kind)] == []
    assert all(sections().values())


def test_metrics_that_the_code_names_are_in_the_reference():
    found = set(SHOWN)
    for folder in ("rl", "training", "run", "data"):
        for path in (ROOT / "mer_r1_jax" / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and METRIC.fullmatch(node.value):
                    found.add(node.value)
    assert len(found) > 25
    assert {name for name in found if not (name.endswith("/") or metric_names.is_known(name))} == set()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("rewards/recall/std", True),
        ("rewards/my_rewards.short/faults", True),
        ("confidence/left_out/bad_format", True),
        ("clip_ratio/low_mean", True),
        ("clip_ratio/low_max", False),
        ("rewards/recall", False),
        ("losses", False),
    ],
)
def test_names_of_metrics_are_matched_whole(name, known):
    assert metric_names.is_known(name) is known


def snippets():
    return re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def example_rewards(seed=0, prompts=3, answers=8):
    recall, precision = np.random.default_rng(seed).uniform(size=(2, prompts, answers)).astype(np.float32)
    floats, flags = jnp.ones((prompts, answers)), jnp.ones((prompts, answers), bool)
    return advantage.Rewards(
        recall_BG=jnp.asarray(recall),
        precision_BG=jnp.asarray(precision),
        f1_BG=floats,
        format_BG=floats,
        valid_BG=flags,
        scored_BG=flags,
    )


def z(x):
    return (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-4)


def test_the_arm_of_the_extending_page_does_what_it_says(monkeypatch):
    """Its function is put into rl/advantage.py's own namespace, its line into the table, as the page tells."""
    function = next(text for text in snippets() if "def recall_twice" in text)
    line = next(text for text in snippets() if '"recall_twice":' in text)
    names = dict(vars(advantage))
    exec(function, names)
    monkeypatch.setattr(advantage, "ARMS", advantage.ARMS | eval("{" + line.strip() + "}", names))
    rewards = example_rewards()
    got = advantage.advantages("recall_twice", rewards, RlConfig())
    expected = 2 * z(np.asarray(rewards.recall_BG)) + z(np.asarray(rewards.precision_BG))
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_functions_of_the_extending_page_are_taken_by_their_dotted_path(tmp_path, monkeypatch):
    arm, loss = (next(text for text in snippets() if f"def {name}" in text) for name in ("recall_alone", "sqrt_length"))
    (tmp_path / "page_functions.py").write_text(arm + loss)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rewards = example_rewards()
    got = advantage.advantages("page_functions.recall_alone", rewards, RlConfig())
    np.testing.assert_allclose(got, z(np.asarray(rewards.recall_BG)), atol=2e-5)
    losses.check_loss_type("page_functions.sqrt_length")
    mask = np.arange(4) < np.array([[4, 1, 0]])[..., None]  # [1, 3, 4]
    token_loss = np.random.default_rng(0).normal(size=mask.shape).astype(np.float32)
    totals = losses.step_totals(mask, np.ones((1, 3), bool))
    value = losses._reduce(token_loss, mask, totals, RlConfig(loss_type="page_functions.sqrt_length"))
    expected = (token_loss[0, 0].sum() / 2 + token_loss[0, 1, 0]) / 3
    np.testing.assert_allclose(value, expected, rtol=1e-6)
