"""A stand-in for the training set of MER2025: its official layout with short real clips and some of its oddities.

python tests/support/mer2025_standin.py DIR [CLIPS]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.clips import make_clip
from support.unibench_standins import write_csv

OPENSETS = (["happy", "relieved"], ["sad"], ["angry", "disappointed", "hurt"], ["worried"])
REASON = "The brows are drawn together, the voice is low, and the words say it, so this is {words}."
SPOKEN = ("我早就说过了", "I told you so."), ("等一下", "Wait a moment, will you?"), ("", "")
FILMS = 2  # made and copied: a clip's content plays no part


def clip_name(number: int) -> str:
    return f"samplenew3_{number:08d}"


def write_mer2025(root: Path, clips: int = 6, *, reasoned: int = 4) -> Path:
    """Writes the set and returns its folder: `clips` good training clips, one test clip, one candidate.

    Besides: a label without a video (`absent`), one that is no list (`broken`), an empty one (`empty`), one of a clip
    in the test file, a clip without its wav, and a name that leads out of the folder.
    """
    films = [
        (
            make_clip(root / f".films/{n}.mp4", seconds=0.6, size=(56, 56), seed=n),
            make_clip(root / f".films/{n}.wav", seconds=0.6, with_video=False, audio_codec="pcm_s16le"),
        )
        for n in range(FILMS)
    ]
    names = [clip_name(number) for number in range(clips)]
    here = [*names, "broken", "empty", "in_test", "candidate"]
    for folder, ending, kind in (("video", ".mp4", 0), ("audio", ".wav", 1)):
        (root / folder).mkdir(parents=True)
        for number, name in enumerate(here):
            shutil.copy(films[number % FILMS][kind], root / folder / f"{name}{ending}")
    (root / "audio" / f"{names[0]}.wav").unlink()
    (root / "openface_face" / names[0]).mkdir(parents=True)  # face crops, which nothing reads
    shutil.rmtree(root / ".films")
    labels = [[name, str(OPENSETS[number % len(OPENSETS)])] for number, name in enumerate(names)]
    odd = [["absent", "['sad']"], ["broken", "['sad'"], ["empty", "[]"], ["in_test", "['sad']"], ["../out", "['sad']"]]
    write_csv(root / "track2_train_mercaptionplus.csv", ["name", "openset"], labels + odd)
    write_csv(root / "track2_train_ovmerd.csv", ["name", "openset"], labels[:1])
    reasons = [[name, REASON.format(words=", ".join(OPENSETS[n % len(OPENSETS)]))] for n, name in enumerate(names)]
    write_csv(root / "track3_train_mercaptionplus.csv", ["name", "reason"], [*reasons[:reasoned], ["elsewhere", "So."]])
    write_csv(root / "track1_train_disdim.csv", ["name", "discrete"], [[name, "sad"] for name in names])
    write_csv(root / "track2_test.csv", ["name", "openset"], [["in_test", "['calm']"]])
    write_csv(root / "track_all_candidates.csv", ["name"], [["in_test"], ["candidate"]])
    spoken = [[name, *SPOKEN[number % len(SPOKEN)]] for number, name in enumerate(here)]
    write_csv(root / "subtitle_chieng.csv", ["name", "chinese", "english"], spoken)
    return root


if __name__ == "__main__":
    print(write_mer2025(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 6))
