"""The report: what the scores say, nothing that runs, the paper's rows marked as the paper's."""

import html.parser
import json
import re
import shutil

import pytest
from support.judge_server import JudgeServer
from support.mme_standin import follow_rule, is_extraction

from mer_r1_jax.evaluation.judge.client import ChatClient
from mer_r1_jax.evaluation.mme.mme_pipeline import Judges, Responses, run
from mer_r1_jax.evaluation.mme.mme_reader import read_benchmark
from mer_r1_jax.evaluation.mme.mme_report import make_mme_report
from mer_r1_jax.evaluation.mme.mme_tasks import MmeError

SCRIPT = "<script>alert(1)</script>"


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text())
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data):
        self.text += data


def hostile(body):
    """A judge whose steps hold a script."""
    text = follow_rule(body)
    return text.replace("Step 1: ", f"Step 1: {SCRIPT.replace('1', 'one')} ") if is_extraction(body) else text


@pytest.fixture(scope="module")
def page(standin, tmp_path_factory):
    """Of two tasks, where model, judge, labels and clip names hold a script."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    for name in ("SA", "IR", "responses"):
        shutil.copytree(standin / name, data / name)
    for file, old, new in (
        ("responses/SA.json", "A calm voice", f"A calm voice {SCRIPT}"),
        ("IR/question/IR.json", '"label": "consoling"', f'"label": "{SCRIPT}"'),
        ("IR/question/IR.json", "MC-EIU/video/dia_3_utt_1_ch.mkv", f"MC-EIU/video/{SCRIPT.replace('/', '')}.mkv"),
    ):
        text = (data / file).read_text()
        assert old in text
        (data / file).write_text(text.replace(old, new))
    benchmark = read_benchmark(data, ["SA", "IR"])
    with JudgeServer(hostile) as server:
        with ChatClient(
            base_url=server.base_url, model=f"judge {SCRIPT}", cache_dir=out / "c", max_failed_frac=1
        ) as judge:
            run(benchmark, Responses(data / "responses", benchmark), out, Judges(judge=judge))
    return Page(out / "report.html"), out


def test_no_script_runs(page):
    found, _ = page
    assert not any(tag in ("script", "link", "iframe") for tag, _ in found.tags)
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and not (name in ("src", "href") and not value.startswith("data:")), tag
    policy = [attributes.get("content", "") for tag, attributes in found.tags if tag == "meta"]
    assert any(content.startswith("default-src 'none'") for content in policy)
    # All of them are there, as text: model, step, label, clip, judge.
    assert found.text.count(SCRIPT) >= 4 and "<script>alert(one)</script>" in found.text


def test_scores_stand_beside_the_papers_rows(page):
    found, out = page
    (score,) = [json.loads(path.read_text()) for path in out.glob("scores.*.json")]
    pooled = score["modes"]["response"]["pooled"]
    assert f"pooled all items together {pooled['rated']} of {pooled['n']}" in found.text
    for metric in ("recognition", "reasoning", "cot"):
        assert f"{pooled['drop'][metric]['score']:.1f}" in found.text
    assert "the paper's, CoT" in found.text and "MER-R1 38.4, 64.6, 51.5; Baseline 27.9, 62.7, 45.3." in found.text
    assert "SA sentiment 2 of 2" in found.text and "62.9 58.7" in found.text
    assert "gemini-3.1-flash-lite-preview" in found.text and "cannot be compared" in found.text
    assert "items are few; the whole set has 6500" in found.text
    assert "no answer: 1 no_response" in found.text  # the clip that was given another name


def test_without_scores_there_is_no_report(tmp_path):
    with pytest.raises(MmeError, match="holds no scores"):
        make_mme_report(tmp_path)
