"""Decoded clips of the next prompts, loaded ahead of use, with broken ones set aside.

Running ahead changes nothing about what a step sees: the saved state counts what was *consumed*, and whether a record
is quarantined is decided when it is consumed, in order.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from mer_r1_jax.child import START_SECONDS
from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.data.pipeline import Item, PromptStream
from mer_r1_jax.data.quarantine import BrokenClip, Quarantine
from mer_r1_jax.data.records import Record
from mer_r1_jax.media.errors import MediaError, PromptError
from mer_r1_jax.media.pool import ATTEMPTS
from mer_r1_jax.parallel import processes
from mer_r1_jax.stop_requested import StopRequested

POLL_SECONDS = 0.2  # between two looks, while a clip is waited for, at whether the run is to stop
COUNTED = ("silent_audio", "audio_cut", "audio_filled", "mute_audio", "cancelled_audio")  # of `media.clips.Clips`
METRICS = ("data/skipped", *(f"data/{name}" for name in COUNTED), "data/decode_ms")


class StalledLoadError(RuntimeError):
    """The loader itself stands still: it neither returned nor timed out within the watchdog's limit."""


@dataclasses.dataclass(frozen=True)
class LoadedItem:
    """One visit of a prompt with its decoded clips.

    Attributes:
        item: the visit.
        clips: what the loader returned, None for a quarantined record.
        broken: why the record is quarantined, else None. Its row keeps its place with weight zero.
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
        """1 for a usable row, 0 for a quarantined one."""
        return 0.0 if self.clips is None else 1.0


class ClipPrefetcher:
    """Loads the clips of a stream's next prompts in the background and hands them out in order.

    Args:
        stream: decides which prompts come; advanced by `next` only.
        load: decodes the clips of a record (and may go on to build its prompt), raising MediaError for those that
            cannot be used; called in threads.
        quarantine: list of broken clips; grows as broken records are consumed.
        prompts_ahead: prompts loaded beyond the step handed out, the bound on host memory.
        threads: loads that run at once (`media.decode_workers`).
        stall_seconds: how long one load may run before the loader counts as stalled; above its own time limit.
        counted: whether this process's rows go into the counts; not where another process loads the same ones.
    """

    def __init__(
        self,
        stream: PromptStream,
        load: Callable[[Record], Any],
        quarantine: Quarantine,
        *,
        prompts_ahead: int,
        threads: int,
        stall_seconds: float,
        counted: bool = True,
    ):
        if prompts_ahead < 0 or threads < 1 or stall_seconds <= 0:
            raise ValueError(
                f"got prompts_ahead {prompts_ahead}, threads {threads}, stall_seconds {stall_seconds}; expected at "
                "least 0 and 1, and a positive time"
            )
        self.stream = stream
        self.quarantine = quarantine
        self._prompts_ahead = prompts_ahead
        self._stall_seconds = stall_seconds
        self._counted = counted
        self._loads: dict[int, _Load] = {}
        self._metrics = dict.fromkeys(METRICS, 0.0)
        self._threads = _LoadThreads(load, threads)

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
        """The step's rows and counts once every process has told which clips it found broken.

        `loaded` is None where this process stopped waiting for them.
        """
        own = [_counts_of(visit) for visit in loaded or ()] if self._counted else []
        said = processes.exchange("the clips of a step", None if loaded is None else (found, own))
        if None in said:
            raise StopRequested("a signal came while clips were waited for")
        for clips, _ in said:
            self.quarantine.extend(clips)
        # Of two processes that load the same row, a time limit may have passed in one.
        fallen = {clip.id for clips, _ in said for clip in clips}
        loaded = [
            dataclasses.replace(visit, clips=None, broken=self.quarantine[visit.record.id])
            if visit.clips is not None and visit.record.id in fallen
            else visit
            for visit in loaded
        ]
        return loaded, _count([counts for _, rows in said for counts in rows])

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
            clips = load.wait(self._stall_seconds, asked)
        except MediaError as error:
            return LoadedItem(item, None, self.quarantine.add(record, error, step), load.milliseconds)
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


def stall_limit(media: MediaConfig, records: Iterable[Record]) -> float:
    """Seconds after which a load counts as stalled: more than the loader's own limits let any record take."""
    files = max(2 * len(record.videos) + len(record.audios) + len(record.images) for record in records)
    return (1 + files) * ATTEMPTS * (START_SECONDS + media.decode_timeout)


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


class _Load:
    """One load under way: its future, and when it began and ended."""

    def __init__(self, record: Record):
        self.record = record
        self.future: concurrent.futures.Future = concurrent.futures.Future()
        self.began = threading.Event()
        self.began_at = 0.0
        self.milliseconds = 0.0

    def run(self, load: Callable[[Record], Any]) -> None:
        """Runs the load in the calling thread and keeps its result or error."""
        if not self.future.set_running_or_notify_cancel():
            return
        self.began_at = time.monotonic()
        self.began.set()
        try:
            result, error = load(self.record), None
        except BaseException as caught:  # noqa: B036 - handed over to the thread that waits
            result, error = None, caught
        self.milliseconds = 1e3 * (time.monotonic() - self.began_at)
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)

    def wait(self, seconds: float, asked: Callable[[], bool]) -> Any:
        """The result, once there; `seconds` count from when the load began, or from now while it queues.

        Raises:
            StalledLoadError: they are over.
            StopRequested: `asked` said so before the result was there.
        """
        since = time.monotonic()
        while not self.future.done():
            begun = self.began.is_set()
            if (self.began_at if begun else since) + seconds <= time.monotonic():
                raise StalledLoadError(
                    f"its load has not ended after {seconds:g} s"
                    if begun
                    else f"its load did not begin within {seconds:g} s, others hold all threads"
                )
            if asked():
                raise StopRequested("a signal came while clips were waited for")
            concurrent.futures.wait([self.future], timeout=min(POLL_SECONDS, seconds))
        return self.future.result()


class _LoadThreads:
    """Daemon threads that run loads first come, first served.

    Not a ThreadPoolExecutor: that one joins its threads when Python exits, and a stalled load would keep the process.
    """

    def __init__(self, load: Callable[[Record], Any], count: int):
        self._load = load
        self._queue: queue.SimpleQueue[_Load | None] = queue.SimpleQueue()
        self._count = count
        for number in range(count):
            threading.Thread(target=self._work, name=f"clip-load-{number}", daemon=True).start()

    def submit(self, record: Record) -> _Load:
        load = _Load(record)
        self._queue.put(load)
        return load

    def close(self) -> None:
        for _ in range(self._count):
            self._queue.put(None)

    def _work(self) -> None:
        while (load := self._queue.get()) is not None:
            load.run(self._load)
