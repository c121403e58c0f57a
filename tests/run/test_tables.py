"""`mer-r1 tables`: what folders of every kind give, the paper's numbers beside it, and what is left out."""

import copy
import json

import numpy as np
import pytest
from support.benchmark_answers import request_of, write_answers
from support.commands import run_command
from support.small_ablation import rescore, write_run

from mer_r1_jax.evaluation.benchmarks.sets import (
    LAYOUTS,
    PAPER_F1,
    PAPER_F1_MEANS,
    PAPER_NINE_MEANS,
    PAPER_WAF,
    metric_of,
)
from mer_r1_jax.evaluation.paper_tables import as_json
from mer_r1_jax.run.table_sources import TablesError, read_tables

NINE = tuple(LAYOUTS)
ONE_OF_EACH = ("ovmerd_plus", "meld", "cmu_mosi")  # of the three metrics


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An evaluation of all nine sets on a handful of clips, by the product's own writers.

    One set of each metric is scored; the others' scores are those, shifted, since scoring takes a second a set.
    """
    folder = write_answers(tmp_path_factory.mktemp("tables") / "out", "nowhere", names=NINE, clips=4)
    scored = {metric_of(name): folder.score(name, request_of(folder.path)) for name in ONE_OF_EACH}
    for place, name in enumerate(name for name in NINE if name not in ONE_OF_EACH):
        score = copy.deepcopy(scored[metric_of(name)])
        for values in score["modes"].values():
            values["headline"]["score"]["value"] = 0.3 + 0.01 * place
        folder.keep(f"scores/{name}.{score['protocol']['key']}.json", score | {"benchmark": name})
    return folder


def table(page, title):
    """A table of the page: name of the row -> column -> text."""
    part = page.split(f"### {title}\n")[1].split("\n### ")[0]
    head, _, *lines = [line for line in part.splitlines() if line.startswith("|")]
    heads = [cell.strip() for cell in head.strip("|").split("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


def printed(capsys, *words):
    assert run_command("tables", *words) == 0
    return capsys.readouterr().out


def test_the_papers_means_are_those_of_its_sets():
    """A number that was copied wrongly shows in a mean."""
    for row, values in PAPER_F1.items():
        assert sum(values) / 5 == pytest.approx(PAPER_F1_MEANS[row], abs=0.0051)
        assert sum((*values, *PAPER_WAF[row])) / 9 == pytest.approx(PAPER_NINE_MEANS[row], abs=0.0151)


def test_an_evaluation_stands_beside_the_paper(evaluated, tmp_path, capsys):
    out = tmp_path / "tables.json"
    page = printed(capsys, f"--folders=mer_r1={evaluated.path}", f"--out={out}")
    official, both, arms = (table(page, title) for title in ("Official scores", "Slow and fast answers", "Arms"))
    scores = {score["benchmark"]: score["modes"] for score in evaluated.scores()}

    assert official["MER-R1, the paper's"]["MER2024"] == "92.96" and official["mer_r1"]["MER2024"] != "92.96"
    assert official["AffectGPT-R1, the paper's"]["mean of nine"] == "75.60"
    assert both["MER-R1 slow, the paper's"]["CH-SIMS v2"] == "88.48"
    assert both["Baseline fast, the paper's"]["mean of nine"] == "71.12"
    headline = {name: scores[name]["slow"]["headline"]["score"]["value"] for name in NINE}
    # Four clips are not the official split, which is said of every score.
    assert official["mer_r1"]["MELD"] == f"{100 * headline['meld']:.2f}*"
    assert official["mer_r1"]["mean of nine"] == f"{100 * sum(headline.values()) / 9:.2f}*"
    assert "MELD slow: 4 clips, the official split has 2610" in page
    # Where a set is scored by hits its F1 is another number.
    fast = scores["meld"]["fast"]["set_f"]["score"]["value"]
    assert both["mer_r1 fast"]["MELD"] == f"{100 * fast:.2f}*"
    assert both["mer_r1 slow"]["CMU-MOSI"] == f"{100 * headline['cmu_mosi']:.2f}*"
    assert arms["mer_r1"]["official mean, the paper's"] == "83.50" and arms["mer_r1"]["F1 mean, the paper's"] == "73.15"
    assert arms["mer_r1"]["official mean of nine"] == official["mer_r1"]["mean of nine"]
    assert arms["mer_r1"]["F1 mean of nine"] == both["mer_r1 slow"]["mean of nine"]
    assert set(arms["rd"].values()) == {"rd", "80.18", "71.15", "–"}

    written = json.loads(out.read_text())
    assert written["paper"]["f1"]["MER-R1 slow"]["meld"] == 48.70
    (row,) = written["ours"]
    assert row["official"]["meld"]["slow"]["value"] == headline["meld"] and row["arm"] == "mer_r1"
    mean = row["official_mean_of_nine"]["slow"]
    assert mean["value"] == pytest.approx(sum(headline.values()) / 9) and mean["complete"] is False


def test_a_mean_lacks_no_set_and_an_arm_is_not_guessed(evaluated, tmp_path, capsys):
    folder = write_answers(tmp_path / "few", "nowhere", names=("meld", "cmu_mosi"), clips=4)
    folder.score("meld", request_of(folder.path))
    (folder.path / "mme_emotion").mkdir()
    page = printed(capsys, f"--folders={folder.path}")
    row = table(page, "Official scores")["few"]
    assert row["mean of nine"] == "–" and row["MER2023"] == "–" and row["MELD"].endswith("*")
    assert table(page, "What was measured")["few"]["arm"] == "–"
    assert "2 things found and in no table." in page and "MME-Emotion: it has tables of its own" in page
    assert "CMU-MOSI: answered and not scored; run mer-r1 evaluate --rescore" in page


def test_an_ablation_is_a_mean_over_its_finished_seeds(tmp_path, capsys):
    for seed, skill in enumerate((0.9, 0.4)):
        write_run(tmp_path / "study" / f"ad_seed{seed}", seed=seed, skill=skill)
    write_run(tmp_path / "study" / "control_permuted_seed0", arm="mer_r1", skill=0.1, permute_rewards=True)
    write_run(tmp_path / "study" / "rd_seed0", finished=False)
    (tmp_path / "study" / "notes").mkdir()
    page = printed(capsys, f"--folders={tmp_path / 'study'}", f"--out={tmp_path / 'page.md'}")
    assert (tmp_path / "page.md").read_text() == page.split("written: ")[0]
    row = table(page, "Arms")["ad"]
    ends = [tmp_path / "study" / f"ad_seed{seed}" / "eval" / "synthetic_00020.json" for seed in range(2)]
    f1 = [json.loads(end.read_text())["slow"]["f1"] for end in ends]
    error = abs(f1[0] - f1[1]) / 2  # standard deviation of two over the root of two
    assert f1[0] != f1[1] and row["slow F1"] == f"{50 * sum(f1):.2f} ± {100 * error:.2f}"
    assert row["seeds"] == "2" and row["clips"] == "A" and row["official mean, the paper's"] == "82.20"
    assert table(page, "Arms")["permuted"]["our row"] == "study/control_permuted"
    assert "A: 8 held-out clips of the synthetic world U, drawn by seed 3" in page
    assert "1 thing found and in no table." in page and "rd\\_seed0: not finished" in page


def test_seeds_of_which_one_could_not_use_a_clip_are_one_row(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "study" / f"ad_seed{seed}", seed=seed)
    end = tmp_path / "study" / "ad_seed1" / "eval" / "synthetic_00020.json"
    content = json.loads(end.read_text())
    end.write_text(json.dumps(content | {"n": 7, "skipped": [{"id": "7", "reason": "decoding took too long"}]}))
    (row,) = read_tables([str(tmp_path / "study")]).rows
    assert row.seeds == 2 and row.data.startswith("7 to 8 held-out clips of the synthetic world U")


def test_folders_of_one_name_are_told_apart_by_the_name_they_are_given(tmp_path):
    for place in "xy":
        write_run(tmp_path / place / "abl" / "ad_seed0")
    x, y = (str(tmp_path / place / "abl") for place in "xy")
    with pytest.raises(TablesError, match="NAME=FOLDER"):
        read_tables([x, y])
    assert [row.name for row in read_tables([f"first={x}", y]).rows] == ["first/ad", "abl/ad"]


def test_a_single_run_shows_its_sft_too_and_never_shares_a_column_with_other_clips(tmp_path):
    write_run(tmp_path / "one", arm="mer_r1", finished=False)
    lab = {
        "world": "U", "seeds": [0, 1], "measures": {},
        "config": {"eval_clips": 30, "width": 8, "rl": {"num_generations": 4, "max_steps": 2}},
        "rows": {"ad": {f"{mode}_{score}": [0.5, 0.7] for mode in ("slow", "fast") for score in ("f1", "recall")}},
    }  # fmt: skip
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "U.json").write_text(json.dumps(lab))
    (tmp_path / "lab" / "other.json").write_text("[]")
    # A second block of seeds with the same settings joins the first; the same seeds again are left out.
    (tmp_path / "lab" / "U_again.json").write_text(json.dumps(lab))
    later = {"ad": {measure: [0.6, 0.6] for measure in lab["rows"]["ad"]}}
    (tmp_path / "lab" / "U_later.json").write_text(json.dumps(lab | {"seeds": [2, 3], "rows": later}))
    (tmp_path / "lab" / "V.json").write_text(json.dumps({"world": 1, "config": {}, "seeds": [], "rows": {"ad": 1}}))
    of_study = {"data": {"synthetic_eval_clips": 4000, "synthetic_seed": 1}, "rl": {"max_steps": 200}}
    (tmp_path / "b").mkdir()
    for seed in (10, 11):
        config = of_study | {"train": {"seed": seed, "run_name": f"sft_seed{seed}"}}
        values = {measure: [0.01 * seed] for measure in lab["rows"]["ad"]}
        content = {"world": "U", "seeds": [seed], "config": config, "rows": {"rd": values}}
        (tmp_path / "b" / f"U_seed{seed}.json").write_text(json.dumps(content))
    (whole,) = read_tables([str(tmp_path / "b")]).rows
    assert whole.seeds == 2 and whole.f1[whole.data, "slow"].value == pytest.approx(0.105)
    assert whole.data == "4000 held-out clips of the synthetic world U, drawn by seed 1, by expected scores"
    tables = read_tables([str(tmp_path / "one"), str(tmp_path / "lab")])
    assert [row.name for row in tables.rows] == ["one", "one before RL", "lab/U/ad"]
    assert [row.arm for row in tables.rows] == ["mer_r1", "sft", "ad"] and len(tables.letters) == 2
    assert tables.rows[0].how == "20 of 20 steps of RL"
    of_lab = tables.rows[2]
    level = of_lab.f1[of_lab.data, "slow"]
    assert level.value == pytest.approx(0.6) and level.error == pytest.approx(np.std([0.5, 0.6, 0.6, 0.7], ddof=1) / 2)
    assert as_json(tables)["ours"][2]["seeds"] == 4
    again, other = tables.left_out
    assert again == f"{tmp_path / 'lab'}: U_again.json: seeds [0, 1] are in U.json too, with the same settings"
    assert "V.json: no results of the lab or the study ('data' is not as they write it)" in other
    # Expected scores and scores against the drawn truths are different columns.
    expected = {"expected_f1": 0.25, "expected_recall": 0.5}
    rescore(tmp_path / "one", **{f"{mode}_{name}": of for mode in ("slow", "fast") for name, of in expected.items()})
    one, before, _ = read_tables([str(tmp_path / "one"), str(tmp_path / "lab")]).rows
    assert one.f1[one.data, "slow"].value == 0.25 and one.official[one.data, "slow"].value == 0.5
    assert one.data == f"{before.data}, by expected scores" and one.score == "expected F1" and before.score == "F1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--folders is empty, expected what mer-r1 evaluate, train, ablate or lab has written; name at least one"),
        (("--folders=nowhere",), "--folders: nowhere is not a folder; expected one that mer-r1 evaluate"),
        (("--folders=.",), "got nothing that is known, expected scores/ (evaluate), eval/ (train)"),
        (("--folders==.",), "got '=.', expected FOLDER or NAME=FOLDER; write the name before the ="),
        (("--folders=.", "--out=x.csv"), "--out: got x.csv, expected a name that ends in .md or .json; rename it"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_way_out(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert run_command("tables", *words) == 2
    assert said in capsys.readouterr().err


def test_two_rows_never_have_one_name(evaluated):
    with pytest.raises(TablesError, match="out would name two rows, expected a name of its own for each"):
        read_tables([str(evaluated.path)] * 2)
