"""The nine sets of MER-UniBench: where their official folders keep what, how each is scored, what the paper reports.

Folder, file and column names are those of the released loaders (zeroQiaoba/AffectGPT, config.py and
my_affectgpt/datasets). Labels are pickled npz there; `mer-r1 convert-labels` writes the CSV that is read here.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence


class BenchmarkError(ValueError):
    """A benchmark that cannot be read, answered or scored as asked."""


SYNTHETIC = "synthetic"  # the synthetic world's held-out clips

SET_F1, HIT, WAF = "set_f1", "hit", "waf"
_SIX = ("neutral", "angry", "happy", "sad", "worried", "surprise")
_SUBTITLES = "transcription-engchi-polish.csv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetLayout:
    """One set's official folder.

    Attributes:
        name: as given to --benchmark.
        title: as it is printed.
        folder: below the benchmark root.
        video, audio: folders of <name>.mp4 or .avi, and of <name>.wav.
        labels: label file: a CSV, or the official npz that has to be converted to one.
        split: the corpus inside the npz that is the test split; "" for a CSV that holds nothing else.
        prefix: what names of the test split begin with, where the corpus holds more.
        label_column: column of the truth.
        categories: the labels, in the order that integer labels count; () where truths are not single labels.
        subtitles, subtitle_column: CSV of the subtitles, by `name`.
        metric: set_f1 | hit | waf.
        size: clips of the official test split.
    """

    name: str
    title: str
    folder: str
    video: str = "video"
    audio: str = "audio"
    labels: str = "label.npz"
    split: str = "test_corpus"
    prefix: str = ""
    label_column: str
    categories: tuple[str, ...] = ()
    subtitles: str = _SUBTITLES
    subtitle_column: str = "english"
    metric: str
    size: int


_LAYOUTS = (
    SetLayout(
        name="ovmerd_plus",
        title="OV-MERD+",
        folder="ovmerdplus-process",
        labels="ovlabel.csv",
        split="",
        label_column="openset",
        subtitles="subtitle_eng.csv",
        subtitle_column="sentence",
        metric=SET_F1,
        size=532,
    ),
    SetLayout(
        name="mer2023",
        title="MER2023",
        folder="mer2023-dataset-process",
        labels="label-6way.npz",
        split="test1_corpus",
        label_column="emo",
        categories=_SIX,
        metric=HIT,
        size=411,
    ),
    SetLayout(
        name="mer2024",
        title="MER2024",
        folder="mer2024-dataset-process",
        labels="label-6way.npz",
        split="test1_corpus",
        label_column="emo",
        categories=_SIX,
        subtitles="transcription_merge.csv",
        subtitle_column="chinese",
        metric=HIT,
        size=1169,
    ),
    SetLayout(
        name="meld",
        title="MELD",
        folder="meld-process",
        video="subvideo",
        audio="subaudio",
        label_column="emo",
        categories=("anger", "joy", "sadness", "neutral", "disgust", "fear", "surprise"),
        metric=HIT,
        size=2610,
    ),
    SetLayout(
        name="iemocap",
        title="IEMOCAP",
        folder="iemocap-process",
        video="subvideo-tgt",
        audio="subaudio",
        labels="label_4way.npz",
        split="whole_corpus",
        prefix="Ses05",
        label_column="emo",
        categories=("happy", "sad", "neutral", "anger"),
        metric=HIT,
        size=1241,
    ),
    SetLayout(
        name="cmu_mosi",
        title="CMU-MOSI",
        folder="cmumosi-process",
        video="subvideo",
        audio="subaudio",
        label_column="val",
        metric=WAF,
        size=686,
    ),
    SetLayout(
        name="cmu_mosei",
        title="CMU-MOSEI",
        folder="cmumosei-process",
        video="subvideo_new",
        audio="subaudio",
        label_column="val",
        metric=WAF,
        size=4659,
    ),
    SetLayout(
        name="ch_sims",
        title="CH-SIMS",
        folder="sims-process",
        label_column="val",
        metric=WAF,
        size=457,
    ),
    SetLayout(
        name="ch_sims_v2",
        title="CH-SIMS v2",
        folder="simsv2-process",
        video="video_new",
        label_column="val",
        metric=WAF,
        size=1034,
    ),
)
LAYOUTS = {layout.name: layout for layout in _LAYOUTS}
BENCHMARKS = (*LAYOUTS, SYNTHETIC)
GROUPS = {"mer_unibench": tuple(LAYOUTS)}  # names that stand for several benchmarks

# MER-R1 (arXiv 2606.27652), in points: the main table in the order of the sets, and its mean.
PAPER_ROWS: dict[str, tuple[float, ...]] = {
    "AffectGPT-R1": (64.08, 81.88, 80.89, 57.53, 65.71, 80.29, 80.64, 85.70, 83.75),
    "Baseline": (66.86, 78.16, 82.70, 61.45, 67.28, 83.48, 86.31, 87.78, 86.84),
    "MER-R1": (70.68, 88.60, 92.96, 71.90, 78.10, 86.06, 86.73, 88.04, 88.48),
}
PAPER_MEANS = {"AffectGPT-R1": 75.60, "Baseline": 77.87, "MER-R1": 83.50}
# Set-level F on the sets whose truths are categories, slow and fast, and their mean.
PAPER_F1_SETS = ("ovmerd_plus", "mer2023", "mer2024", "meld", "iemocap")
PAPER_F1: dict[tuple[str, str], tuple[float, ...]] = {
    ("Baseline", "fast"): (66.87, 61.92, 64.37, 46.18, 53.13),
    ("Baseline", "slow"): (66.86, 60.58, 65.06, 46.20, 51.86),
    ("MER-R1", "fast"): (70.10, 64.41, 67.21, 46.89, 55.71),
    ("MER-R1", "slow"): (70.68, 65.43, 68.46, 48.70, 55.73),
}
PAPER_F1_MEANS = {
    ("Baseline", "fast"): 58.49,
    ("Baseline", "slow"): 58.11,
    ("MER-R1", "fast"): 60.86,
    ("MER-R1", "slow"): 61.80,
}
# The same table's weighted F on the four sets of sentiment, and its mean over all nine.
PAPER_WAF_SETS = ("cmu_mosi", "cmu_mosei", "ch_sims", "ch_sims_v2")
PAPER_WAF: dict[tuple[str, str], tuple[float, ...]] = {
    ("Baseline", "fast"): (86.03, 86.47, 87.48, 87.60),
    ("Baseline", "slow"): (83.48, 86.31, 87.78, 86.84),
    ("MER-R1", "fast"): (85.30, 87.43, 88.57, 87.49),
    ("MER-R1", "slow"): (86.06, 86.73, 88.04, 88.48),
}
PAPER_NINE_MEANS = {
    ("Baseline", "fast"): 71.12,
    ("Baseline", "slow"): 70.55,
    ("MER-R1", "fast"): 72.57,
    ("MER-R1", "slow"): 73.15,
}


def title_of(name: str) -> str:
    """How a benchmark is printed."""
    return LAYOUTS[name].title if name in LAYOUTS else "Synthetic world"


def metric_of(name: str) -> str:
    """set_f1, hit or waf."""
    return LAYOUTS[name].metric if name in LAYOUTS else SET_F1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be evaluated, and how it is scored.

    Attributes:
        benchmarks: names, in order.
        modes: in which clips are asked: slow, fast or both. Whatever has been answered is scored.
        out: folder of answers, scores and report.
        root: folder of the sets' official folders.
        limit: first so many clips of each; 0 = all.
        words, polarity: of the protocol.
        wheel_dir, variant: wheels to score with; "" = the model's own.
        threshold: of gated answers (`gate.Auto`), in [0, 1]: besides `modes`, fast among them, clips are asked slowly
            whose fast answer the model is less sure of. None = they are not asked for.
    """

    benchmarks: tuple[str, ...]
    modes: tuple[str, ...]
    out: pathlib.Path
    root: str = ""
    limit: int = 0
    words: str = "answer"
    polarity: str = "wheels"
    wheel_dir: str = ""
    variant: str = ""
    threshold: float | None = None


def benchmark_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Names of benchmarks, groups spelled out.

    Raises:
        BenchmarkError: an unknown name, or none.
    """
    names: list[str] = []
    for text in texts:
        if text not in BENCHMARKS and text not in GROUPS:
            raise BenchmarkError(f"--benchmark: got {text!r}, expected some of {', '.join((*GROUPS, *BENCHMARKS))}")
        names += GROUPS.get(text, (text,))
    if not names:
        raise BenchmarkError(f"--benchmark is empty, expected some of {', '.join((*GROUPS, *BENCHMARKS))}")
    return tuple(dict.fromkeys(names))
