"""The order in which prompts are seen: one global order, sliced by process, resumed exactly.

grain gives the order: a shuffle whose every entry can be computed from (seed, index) alone, reseeded each epoch and
repeated for ever. So the whole state of the stream is the global index of the next prompt, whatever the number of
processes; and a prompt, with all completions sampled for it, belongs to exactly one process.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import grain

from mer_r1_jax.data.records import Record, dataset_hash

STATE_VERSION = 1
BATCHES_CACHED = 8  # prefetching looks two or three ahead
_SETTINGS = "sft.prompts_per_step, or rl.prompts_per_step x rl.steps_per_generation"


class StreamError(ValueError):
    """Sizes that no stream of prompts can have."""


class ResumeError(StreamError):
    """A data state that does not belong to the stream it is given to; the message shows the difference."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One visit of a prompt.

    Attributes:
        record: the prompt.
        epoch: 0-based pass over the data set this visit belongs to.
        global_index: place of the visit in the global order, over all epochs and processes.
    """

    record: Record
    epoch: int
    global_index: int

    @functools.cached_property
    def uid(self) -> int:
        """uint32 that identifies the visit wherever its row lies: seeds the random bits of its completions.

        The epoch takes part because a batch may hold the last visits of one epoch and the first of the next: without it
        a prompt visited in both would get the same completions twice.
        """
        digest = hashlib.sha256(f"{self.epoch}/{self.record.id}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:4], "little")

    def __iter__(self):
        return iter((self.record, self.epoch, self.global_index))


class PromptStream:
    """An endless stream of prompts; each call of `next` gives this process its share of a batch: the prompts of
    one step of SFT, or of one rollout, which several updates may share.

    Args:
        records: the data set, the same on every process.
        prompts_at_once: prompts of one step of SFT, or of one rollout, over all processes.
        seed: decides the order.
        process_index, process_count: which slice of every batch this process gets.

    Raises:
        StreamError: for an empty data set, a batch larger than the data set, or one the processes cannot share evenly.
    """

    def __init__(
        self,
        records: Sequence[Record],
        prompts_at_once: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        _check_sizes(len(records), prompts_at_once, process_index, process_count)
        self.records = records
        self.prompts_at_once = prompts_at_once
        self.seed = seed
        self.local_prompts = prompts_at_once // process_count
        self.process_index = process_index
        self.dataset_hash = dataset_hash(records)
        # Hashed, because grain seeds epoch e with seed + e: runs with neighbouring seeds would share epochs.
        order_seed = int.from_bytes(hashlib.sha256(f"prompt order {seed}".encode()).digest()[:4], "little")
        order = grain.MapDataset.source(range(len(records))).shuffle(seed=order_seed).repeat()
        # Cached, because an index of a very small data set costs grain milliseconds and prefetching asks repeatedly.
        self._record_index = functools.lru_cache(maxsize=BATCHES_CACHED * prompts_at_once)(
            functools.partial(_at, order)
        )
        self._next_index = 0

    def __iter__(self):
        return self

    def __next__(self) -> list[Item]:
        return self.next()

    @property
    def next_index(self) -> int:
        """Global index of the first prompt of the next batch."""
        return self._next_index

    @property
    def epoch(self) -> float:
        """Passes over the data set made so far."""
        return self._next_index / len(self.records)

    def item(self, global_index: int) -> Item:
        """The visit at a place of the global order; the same on every process."""
        record = self.records[self._record_index(global_index)]
        return Item(record, global_index // len(self.records), global_index)

    def peek(self, batch: int = 0) -> list[Item]:
        """What `next` will return `batch` calls from now, without moving on."""
        first = self._next_index + batch * self.prompts_at_once + self.process_index * self.local_prompts
        return [self.item(index) for index in range(first, first + self.local_prompts)]

    def next(self) -> list[Item]:
        """This process's prompts of the next batch, in global order."""
        items = self.peek()
        self._next_index += self.prompts_at_once
        return items

    def state(self) -> dict[str, Any]:
        """What has been consumed, as JSON-able data; the same on every process and for any number of them."""
        return {
            "version": STATE_VERSION,
            "next_index": self._next_index,
            "seed": self.seed,
            "num_records": len(self.records),
            "dataset_hash": self.dataset_hash,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, possibly with other numbers of processes or prompts at once.

        Raises:
            ResumeError: when the state is of another data set, seed or version.
        """
        ours = self.state()
        if set(state) != set(ours):
            raise ResumeError(f"data state: got the fields {sorted(state)}; expected {sorted(ours)}; it is damaged")
        differences = [name for name in ours if name != "next_index" and state[name] != ours[name]]
        if differences:
            listed = ", ".join(f"{name}: {state[name]!r} then, {ours[name]!r} now" for name in differences)
            raise ResumeError(
                f"the checkpoint's data state is of another data set or order ({listed}); expected the same records in "
                "the same sequence and the same seed; to mend it, restore the data files or start a new run"
            )
        index = state["next_index"]
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ResumeError(f"data state: next_index: got {index!r}; expected a whole number of at least 0")
        self._next_index = index


def batches_for_epochs(num_records: int, prompts_at_once: int, num_train_epochs: float) -> int:
    """Batches that visit every record `num_train_epochs` times, the last one filled up from the next epoch."""
    return math.ceil(num_records * num_train_epochs / prompts_at_once)


def _check_sizes(num_records: int, prompts_at_once: int, process_index: int, process_count: int) -> None:
    if not num_records:
        raise StreamError("records: got none; expected at least one; to mend it, check the data file")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise StreamError(f"process_index: got {process_index}; expected 0 to process_count - 1 = {process_count - 1}")
    if prompts_at_once < 1 or prompts_at_once % process_count:
        raise StreamError(
            f"prompts_at_once: got {prompts_at_once} ({_SETTINGS}); expected a positive multiple of the "
            f"{process_count} process(es), because no prompt's completions may span two; to mend it, make that "
            f"{max(process_count, prompts_at_once // process_count * process_count)}"
        )
    if prompts_at_once > num_records:
        raise StreamError(
            f"prompts_at_once: got {prompts_at_once} ({_SETTINGS}); expected at most the {num_records} records of the "
            "data set; to mend it, lower it or add records"
        )


def _at(order: grain.MapDataset[int], index: int) -> int:
    record = order[index]
    assert record is not None  # nothing was filtered out of the order
    return record
