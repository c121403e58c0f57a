"""Decoded clips of the next prompts, loaded ahead of use, with broken ones set aside.

Running ahead changes nothing about what a step sees: the saved state counts what was *consumed*, and whether a record
is quarantined is decided when it is consumed, in order.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from mer_r1_jax.data.pipeline import Item, PromptStream
from mer_r1_jax.data.quarantine import BrokenClip, Quarantine
from mer_r1_jax.data.records import Record
from mer_r1_jax.data.threads import DaemonThreads
from mer_r1_jax.faults import StopRequested
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.media.prompt import PromptError
from mer_r1_jax.parallel import processes
from mer_r1_jax.process_pool import POLL_SECONDS, Countdown

COUNTED = ("silent_audio", "audio_cut", "audio_filled", "mute_audio", "cancelled_audio")  # of `media.clips.Clips`
METRICS = ("data/skipped", *(f"data/{name}" for name in COUNTED), "data/decode_ms")


class StalledLoadError(RuntimeError):
    """The loader itself stands still: it neither returned nor timed out within the watchdog's limit."""


@dataclasses.dataclass(frozen=True)
class LoadedItem:
    """One visit of a prompt with its decoded clips.

    Attributes:
        item: the visit.
        clips: what the loader returned, None for a record that is quarantined or timed out.
        broken: why there are none, else None. Its row keeps its place with weight zero.
        decode_ms: milliseconds the load took, 0 where nothing was loaded.
    """

    item: Item
    clips: Any | None
    broken: BrokenClip | None
    decode_ms: float

    @property
    def record(self) -> Record:
        """The prompt's record."""
        return self.item.record

    @property
    def weight(self) -> float:
        """1 for a usable row, 0 for one without clips."""
        return 0.0 if self.clips is None else 1.0


class ClipPrefetcher:
    """Loads the clips of a stream's next prompts in the background and hands them out in order.

    Args:
        stream: decides which prompts come; advanced by `next` only.
        loads: loads the clips.
        quarantine: list of broken clips; grows as broken records are consumed.
        prompts_ahead: prompts loaded beyond the step handed out, the bound on host memory.
        counted: whether this process's rows go into the counts; not where another process loads the same ones.
    """

    def __init__(
        self,
        stream: PromptStream,
        loads: LoadThreads,
        quarantine: Quarantine,
        *,
        prompts_ahead: int,
        counted: bool = True,
    ):
        if prompts_ahead < 0:
            raise ValueError(f"got prompts_ahead {prompts_ahead}; expected at least 0")
        self.stream = stream
        self.quarantine = quarantine
        self._threads = loads
        self._prompts_ahead = prompts_ahead
        self._counted = counted
        self._loads: dict[int, _Load] = {}
        self._metrics = dict.fromkeys(METRICS, 0.0)

    def __enter__(self) -> ClipPrefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def next(self, step: int, asked: Callable[[], bool] = lambda: False) -> list[LoadedItem]:
        """This process's prompts of the next step with their clips, in global order.

        Args:
            step: the training step they are for, noted in the quarantine list.
            asked: whether to stop waiting for clips; looked at while one is waited for.

        Raises:
            QuarantineLimitError: when more clips are broken than allowed.
            StalledLoadError: when the loader stands still; names the record.
            PromptError: for a record that cannot become a prompt, with its file and line.
            StopRequested: on all processes when one of them stopped waiting. The `state` taken before still holds.
        """
        self._schedule()
        known = len(self.quarantine)
        try:
            loaded = [self._consume(item, step, asked) for item in self.stream.peek()]
        except StopRequested:
            loaded = None
        loaded, self._metrics = self._agreed(loaded, self.quarantine.clips[known:])
        self.quarantine.check()
        self.stream.next()
        for visit in loaded:
            self._loads.pop(visit.item.global_index, None)
        return loaded

    def metrics(self) -> dict[str, float]:
        """Counts of the last step, over all processes: rows skipped, what `COUNTED` names of the clips' sound, mean
        decoding time (ms)."""
        return dict(self._metrics)

    def state(self) -> dict[str, Any]:
        """What was consumed and which clips were found broken, as JSON-able data."""
        return {"stream": self.stream.state(), "quarantine": self.quarantine.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; what was loaded ahead is thrown away.

        Raises:
            ResumeError: when the state is of another data set or seed.
        """
        self.stream.restore(state["stream"])
        self.quarantine.restore(state["quarantine"])
        self._cancel()

    def close(self) -> None:
        """Drops what was loaded ahead and ends the threads once their current load returns."""
        self._cancel()
        self._threads.close()

    def _cancel(self) -> None:
        for load in self._loads.values():
            load.future.cancel()
        self._loads.clear()

    def _agreed(
        self, loaded: list[LoadedItem] | None, found: tuple[BrokenClip, ...]
    ) -> tuple[list[LoadedItem], dict[str, float]]:
        """The step's rows and counts once every process has told which clips it found broken, or whole again.

        `loaded` is None where this process stopped waiting for them.
        """
        visits = loaded or []
        own = [_counts_of(visit) for visit in visits] if self._counted else []
        found += tuple(visit.broken for visit in visits if visit.broken is not None and visit.broken.again)
        whole = {visit.record.id for visit in visits if visit.clips is not None}
        recovered = [clip.id for clip in self.quarantine.timed_out if clip.id in whole]
        said = processes.exchange("the clips of a step", None if loaded is None else (found, recovered, own))
        if None in said:
            raise StopRequested("a signal came while clips were waited for")
        # Of two processes that load the same row, a time limit may have passed in one.
        fallen = {clip.id: clip for clips, _, _ in said for clip in clips}
        self.quarantine.extend(clip for clips, _, _ in said for clip in clips)
        self.quarantine.recovered({name for _, names, _ in said for name in names} - set(fallen))
        loaded = [
            dataclasses.replace(visit, clips=None, broken=fallen[visit.record.id])
            if visit.clips is not None and visit.record.id in fallen
            else visit
            for visit in visits
        ]
        return loaded, _count([counts for _, _, rows in said for counts in rows])

    def _schedule(self) -> None:
        """Starts loads, in order, for the step at hand and `prompts_ahead` prompts after it."""
        wanted = self.stream.local_prompts + self._prompts_ahead
        steps = -(-wanted // self.stream.local_prompts)
        upcoming = [item for step in range(steps) for item in self.stream.peek(step)][:wanted]
        for item in upcoming:
            if item.global_index not in self._loads and item.record.id not in self.quarantine:
                self._loads[item.global_index] = self._threads.submit(item.record)

    def _consume(self, item: Item, step: int, asked: Callable[[], bool]) -> LoadedItem:
        record = item.record
        # A record quarantined after its next visit was loaded stays quarantined: a resumed run would not load it.
        if record.id in self.quarantine:
            return LoadedItem(item, None, self.quarantine[record.id], 0.0)
        load = self._loads[item.global_index]
        try:
            clips = load.wait(self._threads.stall_seconds, asked)
        except MediaError as error:
            return LoadedItem(item, None, self.quarantine.refuse(record, error, step), load.milliseconds)
        except StalledLoadError as error:
            raise StalledLoadError(
                f"{record.where}: {record.id}: {error}; expected the loader to answer or time out by itself. To mend "
                "it, look at the clip with `mer-r1 validate` and at the machine's load; then start again"
            ) from None
        except PromptError as error:
            raise PromptError(f"{record.where}: {error}") from error
        except Exception as error:
            error.add_note(f"while loading the clips of {record.id} ({record.where})")
            raise
        return LoadedItem(item, clips, None, load.milliseconds)


def _counts_of(visit: LoadedItem) -> tuple[float, ...]:
    """Of one row: whether it is skipped, what `COUNTED` names, milliseconds of its load."""
    clips = visit.clips
    return clips is None, *(getattr(clips, name, 0) for name in COUNTED), visit.decode_ms


def _count(rows: list[tuple[float, ...]]) -> dict[str, float]:
    """Metrics of one step's rows."""
    *counts, decode_ms = zip(*rows, strict=True)
    times = [milliseconds for milliseconds in decode_ms if milliseconds]
    sums = {name: float(sum(values)) for name, values in zip(METRICS, counts, strict=False)}
    return sums | {"data/decode_ms": sum(times) / len(times) if times else 0.0}


class LoadThreads:
    """Threads that load the clips of records.

    Args:
        load: decodes the clips of a record (and may go on to build its prompt), raising MediaError for those that
            cannot be used.
        count: loads that run at once (`media.decode_workers`).
        stall_seconds: how long one load may be waited for before the loader counts as stalled; above its own limit.
    """

    def __init__(self, load: Callable[[Record], Any], count: int, stall_seconds: float):
        if count < 1 or stall_seconds <= 0:
            raise ValueError(f"got {count} threads, stall_seconds {stall_seconds}; expected at least 1, and a time")
        self.stall_seconds = stall_seconds
        self._load = load
        self._threads = DaemonThreads(count, "clip-load")

    def submit(self, record: Record) -> _Load:
        """Hands over a record."""
        return _Load(self._threads, self._load, record)

    def close(self) -> None:
        """Ends the threads once their current load returns."""
        self._threads.close()


class _Load:
    """One load under way, and the milliseconds it took."""

    def __init__(self, threads: DaemonThreads, load: Callable[[Record], Any], record: Record):
        self.milliseconds = 0.0
        self.future = threads.submit(self._timed, load, record)

    def _timed(self, load: Callable[[Record], Any], record: Record) -> Any:
        began = time.monotonic()
        try:
            return load(record)
        finally:
            self.milliseconds = 1e3 * (time.monotonic() - began)

    def wait(self, seconds: float, asked: Callable[[], bool]) -> Any:
        """The result, once there; `seconds` count from now, and again from when the load is seen to have begun.

        Raises:
            StalledLoadError: they are over.
            StopRequested: `asked` said so before the result was there.
        """
        countdown, begun = Countdown(seconds), False
        while not self.future.done():
            if not begun and self.future.running():
                countdown, begun = Countdown(seconds), True
            if not countdown.left():
                raise StalledLoadError(
                    f"its load has not ended after {seconds:g} s"
                    if begun
                    else f"its load did not begin within {seconds:g} s, others hold all threads"
                )
            if asked():
                raise StopRequested("a signal came while clips were waited for")
            concurrent.futures.wait([self.future], timeout=min(POLL_SECONDS, seconds))
        return self.future.result()
