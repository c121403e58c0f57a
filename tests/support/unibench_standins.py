"""Writes each MER-UniBench set's official layout, with a few real clips: python tests/support/unibench_standins.py DIR

Folders, file names, columns, corpora and label types are those of the official data; names follow each set's habit.
The clips are small films with a tone, so scores mean nothing. Labels are pickled npz, as published, until they are
converted.
"""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.clips import make_clip  # noqa: E402

from mer_r1_jax.evaluation.benchmarks.sets import LAYOUTS, SetLayout  # noqa: E402

CLIPS = 3  # of each set's test split
SUBTITLES = ("I never wanted it", "the words are worried", "what a joyful person")
OPENSETS = (["happy", "calm"], ["sad", "afraid"], ["angry"])
HIT_LABELS = {
    "mer2023": ("happy", "sad", "angry"),
    "mer2024": ("worried", "surprise", "happy"),
    "meld": (1, 2, 5),  # joy, sadness, fear
    "iemocap": (0, 1, 3),  # happy, sad, anger
}
VALENCES = (1.4, -0.6, 0.8)
_NAMES = {
    "meld": "dia{n}_utt{n}",
    "iemocap": "Ses05F_impro0{n}_F00{n}",
    "cmu_mosi": "-3g5yACwYnA_{n}",
    "cmu_mosei": "-cEhr0cQcDM[{n}]",
    "ch_sims": "video_0001_000{n}",
    "ch_sims_v2": "aqgy3_0001_0000{n}",
}


def clip_name(set_name: str, number: int) -> str:
    """A name as the set has them."""
    return _NAMES.get(set_name, "sample_0000000{n}").format(n=number)


def write_sets(root: Path, names=tuple(LAYOUTS), clips: int = CLIPS, spoken=SUBTITLES) -> Path:
    """Writes the official folders of the sets below a root, and returns it; `spoken` are the clips' subtitles."""
    films = _films(root / ".films", clips)
    for name in names:
        write_set(root, LAYOUTS[name], films, spoken)
    shutil.rmtree(root / ".films")
    return root


def write_set(root: Path, layout: SetLayout, films: list[tuple[Path, Path, Path]], spoken=SUBTITLES) -> None:
    """One set's folder; films are (mp4, avi, wav) of each clip."""
    folder = root / layout.folder
    names = [clip_name(layout.name, number) for number in range(len(films))]
    ending = ".avi" if layout.name == "iemocap" else ".mp4"
    for name, (mp4, avi, wav) in zip(names, films, strict=True):
        for kind, film, tail in ((layout.video, avi if ending == ".avi" else mp4, ending), (layout.audio, wav, ".wav")):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(film, folder / kind / f"{name}{tail}")
    subtitles = [spoken[number % len(spoken)] for number in range(len(films))]
    columns = ["name", layout.subtitle_column]
    if layout.subtitles.startswith("transcription"):
        columns = ["name", "chinese", "english"]
    write_csv(
        folder / layout.subtitles,
        columns,
        [[n, *[s] * (len(columns) - 1)] for n, s in zip(names, subtitles, strict=True)],
    )
    write_labels(folder, layout, names)


def write_labels(folder: Path, layout: SetLayout, names: list[str]) -> None:
    """The set's label file, as published."""
    if layout.metric == "set_f1":
        rows = [[name, str(OPENSETS[number % len(OPENSETS)])] for number, name in enumerate(names)]
        write_csv(folder / layout.labels, ["name", "openset"], rows)
        return
    if layout.metric == "hit":
        labels = HIT_LABELS[layout.name]
        corpus = {name: {"emo": labels[n % len(labels)]} for n, name in enumerate(names)}
        if layout.name.startswith("mer"):
            corpus = {name: row | {"val": -10} for name, row in corpus.items()}
    else:
        corpus = {name: {"emo": 0, "val": np.float32(VALENCES[n % len(VALENCES)])} for n, name in enumerate(names)}
    train = {f"train_{number}": dict(row) for number, row in enumerate(corpus.values())}
    if layout.prefix:  # one corpus of all sessions
        corpora = {layout.split: {f"Ses0{n}F_impro01_F000": row for n, row in enumerate(train.values(), 1)} | corpus}
    else:
        corpora = {"train_corpus": train, "val_corpus": {}, layout.split: corpus}
    np.savez_compressed(folder / layout.labels, **corpora)


def write_csv(path: Path, columns: list[str], rows: list[list[str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def _films(folder: Path, clips: int) -> list[tuple[Path, Path, Path]]:
    made = []
    for number in range(clips):
        options = {"seconds": 0.6, "size": (56, 56), "frequency": 200.0 + 100 * number, "seed": number}
        mp4 = make_clip(folder / f"{number}.mp4", **options)
        avi = make_clip(folder / f"{number}.avi", **options, video_codec="mpeg4", audio_codec="pcm_s16le")
        wav = make_clip(folder / f"{number}.wav", **options, with_video=False, audio_codec="pcm_s16le")
        made.append((mp4, avi, wav))
    return made


if __name__ == "__main__":
    print(write_sets(Path(sys.argv[1])))
