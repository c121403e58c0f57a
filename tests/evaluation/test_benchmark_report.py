"""The benchmark report, from answers that were made up: tables, protocols apart, escaping, pictures, gaps."""

import re

import pytest
from support import official_data
from support.benchmark_answers import request_of, write_answers
from support.official_data import needs_official_data
from support.unibench_standins import write_sets

from mer_r1_jax.evaluation.benchmarks.benchmark_folder import BenchmarkFolder
from mer_r1_jax.evaluation.benchmarks.benchmark_report import make_benchmark_report
from mer_r1_jax.evaluation.benchmarks.sets import LAYOUTS, PAPER_ROWS, BenchmarkError
from mer_r1_jax.evaluation.benchmarks.tables import Columns, analysis_tables, main_table

OFFICIAL = str(official_data.WHEELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All nine sets and the synthetic world, scored by one protocol."""
    root = tmp_path_factory.mktemp("report")
    write_sets(root / "sets")
    folder = write_answers(root / "out", root / "sets", clips=40)
    for name in request_of(folder.path).benchmarks:
        folder.score(name, request_of(folder.path))
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return make_benchmark_report(folder.path, 2).read_text()


def test_our_columns_stand_beside_the_papers_which_are_marked(folder, html):
    table = main_table(Columns(folder.scores()))
    assert [row.cells[0].text for row in table.rows] == [
        *(layout.title for layout in LAYOUTS.values()),
        "Mean of the nine",
    ]
    for number, row in enumerate(table.rows[:9]):
        assert [cell.text for cell in row.cells if cell.kind == "paper"] == [
            f"{values[number]:.2f}" for values in PAPER_ROWS.values()
        ]
        score = next(s for s in folder.scores() if s["benchmark"] == list(LAYOUTS)[number])
        headline = score["modes"]["slow"]["headline"]["score"]
        assert row.cells[2].text == f"{100 * headline['value']:.2f}"
        assert row.cells[2].note.startswith(f"[{100 * headline['low']:.2f}, {100 * headline['high']:.2f}]")
    nine = [s["modes"]["slow"]["headline"]["score"]["value"] for s in folder.scores() if s["benchmark"] in LAYOUTS]
    assert table.rows[9].cells[2].text == f"{100 * sum(nine) / 9:.2f}"
    assert "the paper&#39;s numbers, not ours" in html or "the paper's numbers, not ours" in html
    assert "83.50" in html and "61.80" in html
    paper = re.findall(r'<td class="paper">([\d.]+)</td>', html)
    assert len(paper) == 3 * 10 + 4 * 6


def test_the_report_is_one_file_and_escapes_what_models_write(html):
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<b>bold</b>" not in html and "&lt;b&gt;bold&lt;/b&gt;" in html
    assert not re.search(r'(?:src|href)="(?!data:)', html) and "default-src 'none'" in html
    assert html.count("data:image/svg+xml") == 10 and html.count("data:image/jpeg") == 20


def test_only_differences_that_exclude_zero_are_bold(folder, html):
    rows = [row for table in analysis_tables(Columns(folder.scores())) for row in table.rows]
    compared = [row.cells[3].note for row in rows if row.cells[3].note]
    assert 0 < html.count('class="decided"') == sum(row.kind == "decided" for row in rows) < len(compared)
    for row in rows:  # an interval on both sides of zero shows both signs
        note = row.cells[3].note
        assert row.kind != "decided" or ("−" in note) != ("+" in note), row


def test_counts_and_gaps_are_told(html):
    assert "no video file, not asked: 1 (gone)" in html and "could not be read, not asked: 1 (broken)" in html
    assert "score with unanswered clips as empty answers" in html
    assert "Not the official test split" in html and "Few clips" in html and "shipped with this program" in html
    assert "for the best constant answer" in html and "100.00 for one who knows the cues" in html
    assert "40 clips answered both ways" in html and "Confidence, wrong categories" in html


@needs_official_data
def test_protocols_never_share_a_column(folder, tmp_path):
    two = BenchmarkFolder(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "answers").symlink_to(folder.path / "answers")
    request = request_of(two.path)
    for name in ("meld", "cmu_mosi"):
        two.score(name, request)
    two.score("meld", request_of(two.path, wheel_dir=OFFICIAL))
    two.score("meld", request_of(two.path, wheel_dir=OFFICIAL, variant="mer2026"))
    columns = Columns(two.scores())
    assert len(columns.protocols) == 3 and len(columns.heads) == 6
    rows = {row.cells[0].text: row.cells[2:8] for row in main_table(columns).rows}
    filled = {title: [cell.text != "–" for cell in cells] for title, cells in rows.items()}
    assert filled["MELD"] == [True] * 6 and sum(filled["CMU-MOSI"]) == 2 and not any(filled["Mean of the nine"])
    # Official wheels put "fear" among happy; the corrected table does not: the columns differ.
    assert len({cell.text for cell in rows["MELD"]}) > 2
    html = make_benchmark_report(two.path, 0).read_text()
    assert "Protocols: their scores do not compare" in html and "official" in html
    for letter in "ABC":
        assert html.count(f'<th class="slow">slow · {letter}</th>') == 1
    # Confidences were made with other wheels than these: none are shown rather than wrong ones.
    official = next(s for s in two.scores() if "official" in s["protocol"]["wheels"])
    assert official["modes"]["slow"]["confidence_correct"] is None


def test_a_report_of_nothing_and_of_moved_clips(folder, tmp_path):
    with pytest.raises(BenchmarkError, match="holds no scores"):
        make_benchmark_report(tmp_path)
    out = tmp_path / "out"
    moved = write_answers(out, tmp_path / "nowhere", names=("ch_sims",), clips=2)
    moved.score("ch_sims", request_of(out))
    html = make_benchmark_report(out).read_text()
    assert "Not in this report" in html and "is not in the media folder" in html
