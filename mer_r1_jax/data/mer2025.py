"""The training set of MER2025 (MER-Caption+) in its official layout.

    video/NAME.mp4, audio/NAME.wav
    subtitle_chieng.csv                     name, chinese, english
    track2_train_mercaptionplus.csv         name, openset: a Python list; an empty one means neutral
    track3_*.csv                            name, reason
    track2_test.csv                         name, openset: clips that no training file gets
    track_all_candidates.csv                name: the challenge's clips, without labels

Columns are those that the authors' own code reads (zeroQiaoba/AffectGPT, toolkit and MERTools).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mer_r1_jax.data.conversion import Account, ConversionError, Draft, LabelError, present, read_table, words_of

LABELS = "track2_train_mercaptionplus.csv"
TEST = "track2_test.csv"
CANDIDATES = "track_all_candidates.csv"
SUBTITLES = "subtitle_chieng.csv"
REASONS = "track3_*.csv"
LANGUAGES = ("english", "chinese", "none")
NEUTRAL = "neutral"


def read_mer2025(root: str | os.PathLike, account: Account, language: str = "english") -> Iterator[Draft]:
    """Yields the clips of the set: those with labels, then its test clips, then the candidates that are neither.

    Args:
        root: the set's folder.
        account: is given clips that are left out and what others lack.
        language: of the subtitles; `none` leaves them out.

    Raises:
        ConversionError: a file that is needed is not there, or cannot be read.
    """
    root = Path(root)
    if not (root / LABELS).is_file():
        raise ConversionError(f"--root: got {root}, expected a folder with {LABELS}, video/ and audio/; correct it")
    subtitles = _subtitles(root, language, account)
    reasons = _reasons(root, account)
    test = list(read_table(root / TEST, ("name", "openset"), account)) if (root / TEST).is_file() else []
    in_test = {_name(row) for _, row in test}
    seen: set[str] = set()
    for number, row in read_table(root / LABELS, ("name", "openset"), account):
        name = _name(row) or f"{LABELS}:{number}"
        if name in in_test:
            account.leave_out(f"training clips that are in {TEST} too", name)
            continue
        draft = _draft(root, name, subtitles, account)
        if draft is None or not _label(draft, row["openset"], account):
            continue
        seen.add(name)
        if name in reasons:
            draft.row["reasoning"] = reasons[name]
        else:
            draft.remarks.append(f"no row in {REASONS}, so for RL or evaluation only")
        yield draft
    for name in reasons.keys() - seen:
        account.notice(f"reasons of clips that are no training clip here ({REASONS})", name)
    yield from _held_out(root, test, in_test, subtitles, account)


def _held_out(
    root: Path, test: list, in_test: set[str], subtitles: dict[str, str], account: Account
) -> Iterator[Draft]:
    """The test clips with their labels, and candidates without."""
    for number, row in test:
        name = _name(row) or f"{TEST}:{number}"
        draft = _draft(root, name, subtitles, account, "test")
        if draft is not None and _label(draft, row["openset"], account):
            yield draft
    if (root / CANDIDATES).is_file():
        for number, row in read_table(root / CANDIDATES, ("name",), account):
            name = _name(row) or f"{CANDIDATES}:{number}"
            draft = None if name in in_test else _draft(root, name, subtitles, account, "candidates")
            if draft is not None:
                yield draft


def _draft(root: Path, name: str, subtitles: dict[str, str], account: Account, split: str = "") -> Draft | None:
    """A clip with what is shown of it, or None where it has no video."""
    video, voice = f"video/{name}.mp4", f"audio/{name}.wav"
    if not present(root, video):
        account.leave_out("no video/NAME.mp4", name)
        return None
    draft = Draft(name=name, row={"videos": [video], "audios": [voice]}, split=split)
    if not present(root, voice):
        draft.row["audios"] = [video]
        draft.remarks.append("no audio/NAME.wav, so the video's own sound")
    if text := subtitles.get(name, ""):
        draft.row["subtitle"] = text
    elif subtitles:
        draft.remarks.append(f"no text in {SUBTITLES}")
    return draft


def _label(draft: Draft, openset: Any, account: Account) -> bool:
    """Adds a clip's emotion words, and says whether it has any that can be read."""
    try:
        words = words_of([] if openset is None else openset)
    except LabelError as error:
        account.leave_out(f"`openset` holds {error}", draft.name)
        return False
    if not words:
        draft.remarks.append("an empty `openset`, which the set's authors read as neutral")
    draft.row["solution"] = words or [NEUTRAL]
    return True


def _subtitles(root: Path, language: str, account: Account) -> dict[str, str]:
    if language == "none":
        return {}
    path = root / SUBTITLES
    if not path.is_file():
        raise ConversionError(f"got no {path}, expected the subtitles; put it there, or say --language=none")
    rows = read_table(path, ("name", language), account, texts=("name", language))
    return {_name(row): str(row[language] or "").strip() for _, row in rows}


def _reasons(root: Path, account: Account) -> dict[str, str]:
    """name -> how the emotions show; of two rows the first counts."""
    found: dict[str, str] = {}
    for path in sorted(root.glob(REASONS)):
        for number, row in read_table(path, ("name", "reason"), account, texts=("name", "reason")):
            name, reason = _name(row), str(row["reason"] or "").strip()
            if not name or not reason:
                account.leave_out(f"a row of {path.name} without a name or a reason", name or f"{path.name}:{number}")
            elif found.setdefault(name, reason) != reason:
                account.leave_out(f"a second reason of a clip ({REASONS})", name)
    return found


def _name(row: dict[str, Any]) -> str:
    return str(row["name"] or "").strip()
