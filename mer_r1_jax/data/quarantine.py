"""Clips that broke during training: listed, counted, saved with the checkpoint, and limited.

A broken clip's row stays in its batch with weight zero; no other clip takes its place. Once listed, a clip is not
decoded again, so a run and its resumed copy agree even where a clip broke by time-out. A first time-out costs the visit
only, since it often is the machine's fault; a second one, at the next visit, breaks the clip.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from mer_r1_jax.data.records import Record

MAX_LISTED = 10  # clips an error message names
TIMEOUTS_APART = 10  # clips may have timed out once without a say in the limit; more, and the disk stands still


class QuarantineError(ValueError):
    """A limit or a saved list that cannot be used."""


class QuarantineLimitError(RuntimeError):
    """More clips broke than the configuration allows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BrokenClip:
    """A record whose media could not be used.

    Attributes:
        id, file, line: the record and where it was read.
        reason: short slug of what was wrong, e.g. `truncated`; see `media.opening.MediaError`.
        message: the whole error.
        step: training step at which it was first met.
        again: it timed out and is loaded again at its next visit.
    """

    id: str
    file: str
    line: int
    reason: str
    message: str
    step: int
    again: bool = False


class Quarantine:
    """The list of broken clips of a run.

    Args:
        num_records: records of an epoch, over all processes.
        max_fraction: share of them that may break before the run stops (`data.max_quarantined_fraction`).
    """

    def __init__(self, num_records: int, max_fraction: float):
        if not 0 <= max_fraction <= 1:
            raise QuarantineError(f"max_quarantined_fraction: got {max_fraction}; expected a share from 0 to 1")
        self.num_records = num_records
        self.max_fraction = max_fraction
        self._clips: dict[str, BrokenClip] = {}
        self._timed_out: dict[str, BrokenClip] = {}

    def __len__(self) -> int:
        return len(self._clips)

    def __contains__(self, record_id: str) -> bool:
        return record_id in self._clips

    def __getitem__(self, record_id: str) -> BrokenClip:
        return self._clips[record_id]

    @property
    def clips(self) -> tuple[BrokenClip, ...]:
        """The broken clips in the order they were met."""
        return tuple(self._clips.values())

    @property
    def timed_out(self) -> tuple[BrokenClip, ...]:
        """Clips that timed out once and have not been visited again."""
        return tuple(self._timed_out.values())

    @property
    def fraction(self) -> float:
        """Share of an epoch's records that are broken."""
        return len(self._clips) / max(1, self.num_records)

    def refuse(self, record: Record, error: Exception, step: int) -> BrokenClip:
        """Lists a record whose clips could not be loaded; after its first time-out only as one to be loaded again."""
        if getattr(error, "reason", None) != "timeout" or record.id in self._timed_out:
            return self.add(record, error, step)
        self._timed_out[record.id] = dataclasses.replace(_broken(record, error, step), again=True)
        return self._timed_out[record.id]

    def add(self, record: Record, error: Exception, step: int) -> BrokenClip:
        """Lists a record; one that is listed already keeps its first entry. `check` is a call of its own."""
        self.extend([_broken(record, error, step)])
        return self._clips[record.id]

    def extend(self, clips: Iterable[BrokenClip]) -> None:
        """Lists clips that other processes found broken, or that timed out there."""
        for clip in clips:
            if not clip.again:
                self._clips.setdefault(clip.id, clip)
                self._timed_out.pop(clip.id, None)
            elif clip.id not in self._clips:
                self._timed_out.setdefault(clip.id, clip)

    def recovered(self, record_ids: Iterable[str]) -> None:
        """Forgets that clips timed out, now that they were loaded."""
        for record_id in record_ids:
            self._timed_out.pop(record_id, None)

    def check(self) -> None:
        """Stops the run when too many clips are broken.

        Raises:
            QuarantineLimitError: with the counts by reason and by data file, and the clips themselves.
        """
        out = len(self) + max(0, len(self._timed_out) - TIMEOUTS_APART)
        if out / max(1, self.num_records) <= self.max_fraction and not 0 < self.num_records <= len(self):
            return  # where all are broken nothing is left to learn from, whatever may break
        clips = self.clips if out == len(self) else self.clips + self.timed_out
        reasons, files = (
            ", ".join(f"{name} {count}" for name, count in collections.Counter(names).most_common(MAX_LISTED))
            for names in ([clip.reason for clip in clips], [clip.file for clip in clips])
        )
        listed = [f"  {clip.file}:{clip.line}: {clip.id}: {clip.message}" for clip in clips[:MAX_LISTED]]
        if len(clips) > MAX_LISTED:
            listed.append(f"  ... and {len(clips) - MAX_LISTED} more")
        raise QuarantineLimitError(
            "\n".join(
                [
                    f"{len(clips)} of {self.num_records} clips ({len(clips) / max(1, self.num_records):.1%}) are broken"
                    f"{' or timed out' * (out > len(self))}; expected at most "
                    f"data.max_quarantined_fraction = {self.max_fraction:.1%}. By reason: {reasons}. By data file: "
                    f"{files}. To mend it, repair or remove the clips below (`mer-r1 validate` finds all of them "
                    "before a run), or raise the limit:",
                    *listed,
                ]
            )
        )

    def state(self) -> list[dict[str, Any]]:
        """The list as JSON-able data, for checkpoints."""
        clips = [dataclasses.asdict(clip) for clip in self.clips + self.timed_out]
        return [{name: value for name, value in clip.items() if name != "again" or value} for clip in clips]

    def restore(self, *states: Iterable[dict[str, Any]]) -> None:
        """Replaces the list by the union of the states, e.g. of several processes, first met first."""
        try:
            clips = [BrokenClip(**entry) for state in states for entry in state]
        except TypeError as error:
            names = ", ".join(field.name for field in dataclasses.fields(BrokenClip))
            raise QuarantineError(f"quarantine state: {error}; expected entries of {names}; it is damaged") from error
        self._clips, self._timed_out = {}, {}
        self.extend(sorted(clips, key=lambda clip: (clip.step, clip.id)) if len(states) > 1 else clips)


def _broken(record: Record, error: Exception, step: int) -> BrokenClip:
    reason = getattr(error, "reason", type(error).__name__)
    return BrokenClip(id=record.id, file=record.file, line=record.line, reason=reason, message=str(error), step=step)
