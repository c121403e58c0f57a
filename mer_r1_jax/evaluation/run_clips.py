"""Held-out clips in a run's report: their own files to play, and what the model says of them before RL and after it."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from mer_r1_jax.emotion.answer_form import MODES
from mer_r1_jax.evaluation.clip_frames import ClipStrip
from mer_r1_jax.evaluation.clip_players import Patience, Player, shown_clips, tell_players
from mer_r1_jax.evaluation.report_kit import Word, WordMarks, percent
from mer_r1_jax.evaluation.run_record import RunRecord, Stages, is_number

VERDICTS = ("wrong", "partly", "correct", "not scored")  # of one answer, by its F1
# What RL did to the answers to a clip, as filters name it, and in words.
BY_RL = {
    "changed": "words changed",
    "same": "words as before",
    "up": "slow F1 higher",
    "down": "slow F1 lower",
}
DEFAULT_EXAMPLES, DEFAULT_MEGABYTES = 24, 8  # of a configuration that does not say


@dataclasses.dataclass(frozen=True)
class Answered:
    """One answer: its words, marked and each with its confidence, its F1, and what that amounts to."""

    words: list[Word]
    f1: float | None
    verdict: str

    @property
    def shown_f1(self) -> str:
        """In hundredths."""
        return percent(self.f1)


@dataclasses.dataclass(frozen=True)
class StageAnswers:
    """What the model said of a clip at one stage; an answer is None where it was not asked for.

    Attributes:
        title: the stage.
        is_end: whether it is the last one, which the clip is sorted by.
        reasoning: of the slow answer, as the file has it.
    """

    title: str
    is_end: bool
    reasoning: Any
    slow: Answered | None
    fast: Answered | None


@dataclasses.dataclass(frozen=True)
class ReportedClip:
    """A clip and all that was said of it. `subtitle` is as the file has it, whatever that is.

    Attributes:
        truth: its words, found or missed by the last slow answer.
        stages: before RL where there was RL, and the last one.
        by_rl: names of BY_RL that hold; none where one of the stages is not on record.
        words: every word of its answers and of the truth, in lower case, one a line: what a filter looks in.
    """

    id: str
    strip: ClipStrip
    players: tuple[Player, ...]
    subtitle: Any
    truth: list[Word]
    stages: tuple[StageAnswers, ...]
    by_rl: tuple[str, ...]
    words: str

    @property
    def verdict(self) -> str:
        """Of the last slow answer."""
        return self.stages[-1].slow.verdict if self.stages[-1].slow else "not scored"


@dataclasses.dataclass(frozen=True)
class ClipSection:
    """The report's part about clips.

    Attributes:
        clips: the first ones of the last evaluation in its order, so that none is hand-picked.
        total: clips of that evaluation.
        at: the stage they were answered at.
        players: which of their files play in the page, in words.
        has_before: whether answers before RL stand beside.
        has_confidences: whether any word has one.
    """

    clips: tuple[ReportedClip, ...]
    total: int
    at: str
    players: str
    has_before: bool
    has_confidences: bool

    OPEN: ClassVar[int] = 6  # clips that are shown at once; the others unfold, so that curves are not far below


def clip_section(
    run: RunRecord,
    stages: Stages,
    media_root: str | os.PathLike | None = None,
    count: int | None = None,
    missing: list[str] | None = None,
    patience: Patience | None = None,
) -> ClipSection:
    """Puts together the clips of a report.

    Args:
        run: the run.
        stages: whose answers are shown.
        media_root: folder of the clips; None = as the configuration has it.
        count: clips shown, the first ones; None = `eval.num_examples`.
        missing: gets a line for what is not there.
        patience: with the clips' files.
    """
    missing = [] if missing is None else missing
    section, emotion = run.config.get("eval", {}), run.config.get("emotion", {})
    count = section.get("num_examples", DEFAULT_EXAMPLES) if count is None else count
    megabytes = section.get("clip_megabytes", DEFAULT_MEGABYTES)
    root = _media_root(run, media_root)
    chosen = dict(itertools.islice(stages.end.samples.items(), count))
    marks = WordMarks(emotion.get("wheel_dir", ""), emotion.get("variant", "unibench"), missing) if chosen else None
    before = stages.start.samples if stages.end_is_rl and stages.start is not None else {}
    files = [(row.get("video"), row.get("audio")) for row in chosen.values()]
    shown = shown_clips(files, root, megabytes, patience)
    clips = []
    for (name, row), seen in zip(chosen.items(), shown, strict=True):
        assert marks is not None  # there is a clip
        if seen.strip.problem:
            missing.append(f"frames of clip {name}: {seen.strip.problem}")
        truth = _words(row.get("truth"))
        earlier = before.get(name)
        told = [_stage("Before RL", False, earlier, truth, marks)] if earlier is not None else []
        told.append(_stage(f"At {named_step(stages)}", True, row, truth, marks))
        said = [_words_of(given, mode) for given in (row, earlier or {}) for mode in MODES]
        clips.append(
            ReportedClip(
                id=name,
                strip=seen.strip,
                players=tuple(p for p in seen.players if p.kind or p.note != seen.strip.problem),
                subtitle=row.get("subtitle"),
                truth=marks.truth(truth, _words_of(row, "slow")),
                stages=tuple(told),
                by_rl=_by_rl(told, said[: len(MODES)] != said[len(MODES) :]) if earlier is not None else (),
                words="\n".join(dict.fromkeys(word.lower() for word in itertools.chain(truth, *said))),
            )
        )
    answers = [answer for clip in clips for stage in clip.stages for answer in (stage.slow, stage.fast) if answer]
    has_confidences = any(word.confidence for answer in answers for word in answer.words)
    if answers and not has_confidences:
        missing.append(
            "confidence word by word: the evaluations of this run do not have it (earlier versions kept none)"
        )
    return ClipSection(
        clips=tuple(clips),
        total=len(stages.end.samples),
        at=named_step(stages),
        players=tell_players(shown, without_home(str(root)), megabytes),
        has_before=any(len(clip.stages) > 1 for clip in clips),
        has_confidences=has_confidences,
    )


def named_step(stages: Stages) -> str:
    """The last stage in words."""
    return f"RL step {stages.rl_step(stages.end)}" if stages.end_is_rl else "the end of SFT"


def without_home(text: str) -> str:
    """Text without the path of the user's home folder."""
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def _stage(title: str, is_end: bool, row: dict[str, Any], truth: Sequence[str], marks: WordMarks) -> StageAnswers:
    slow, fast = (_answer(row.get(mode), truth, marks) for mode in MODES)
    return StageAnswers(title, is_end, _of(row, "slow").get("reasoning"), slow, fast)


def _answer(answer: Any, truth: Sequence[str], marks: WordMarks) -> Answered | None:
    if not isinstance(answer, dict):
        return None
    given = answer.get("f1")
    f1 = float(given) if is_number(given) else None
    verdict = "not scored" if f1 is None else "correct" if f1 > 0.995 else "wrong" if f1 < 0.005 else "partly"
    words = marks.answer(_words(answer.get("words")), truth)
    rows = answer.get("confidences")
    # Fewer rows than words: those beyond rl.max_answer_words have none.
    sure = [_mean(row) for row in rows] if isinstance(rows, list) else []
    words = [
        dataclasses.replace(word, confidence=percent(mean, 0) if mean is not None else "")
        for word, mean in itertools.zip_longest(words, sure[: len(words)])
    ]
    return Answered(words, f1, verdict)


def _by_rl(stages: Sequence[StageAnswers], changed: bool) -> tuple[str, ...]:
    """What RL did to a clip, in names of BY_RL: `changed` is about the words of both answers."""
    before, after = (stage.slow.f1 if stage.slow else None for stage in stages)
    moved = "" if before is None or after is None or before == after else "up" if after > before else "down"
    return tuple(filter(None, ("changed" if changed else "same", moved)))


def _mean(row_Q: Any) -> float | None:
    """A word's probability over the wheels on which it has one."""
    known = [value for value in row_Q if is_number(value)] if isinstance(row_Q, list) else []
    return sum(known) / len(known) if known else None


def _of(row: dict[str, Any], mode: str) -> dict[str, Any]:
    answer = row.get(mode)
    return answer if isinstance(answer, dict) else {}


def _words_of(row: dict[str, Any], mode: str) -> list[str]:
    return _words(_of(row, mode).get("words"))


def _words(given: Any) -> list[str]:
    return [str(word) for word in given or []]


def _media_root(run: RunRecord, given: str | os.PathLike | None) -> Path:
    data = run.config.get("data", {})
    beside_records = os.path.dirname(data.get("eval_path") or "")
    return Path(given or data.get("media_root") or beside_records or data.get("synthetic_dir") or run.path)
