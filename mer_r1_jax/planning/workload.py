"""How much work a plan is for: sizes that a run would read off its data, and the paper's where there is none yet."""

from __future__ import annotations

import dataclasses

from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.data.records import Record

ANSWERING = "answer"  # what a plan has in place of a run's phases where a model only answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What the data brings to the shapes of programs and to the length of an epoch.

    Attributes:
        sft_records, rl_records: prompts; the paper's split of MER-Caption+.
        videos, audios, images: clips of a prompt: a video and, as an item of its own, its audio track.
        slow_target, fast_target: tokens SFT targets are padded to; 0 takes the caps of the configuration.
    """

    sft_records: int = 5_000
    rl_records: int = 26_327
    videos: int = 1
    audios: int = 1
    images: int = 0
    slow_target: int = 0
    fast_target: int = 0

    def record(self) -> Record:
        """A record with so many clips."""
        return Record(
            id="planned",
            messages=({"role": "user", "content": ""},),
            videos=tuple(f"{n}.mp4" for n in range(self.videos)),
            audios=tuple(f"{n}.wav" for n in range(self.audios)),
            images=tuple(f"{n}.png" for n in range(self.images)),
        )

    def target_lengths(self, config: RunConfig) -> tuple[int, int]:
        """Padded tokens of slow and fast SFT targets; a fast one is 0 when none are mixed in."""
        fast = self.fast_target or config.rl.max_fast_context
        return self.slow_target or config.sft.max_completion_length, fast if config.sft.fast_fraction else 0


class PrefixTokens:
    """Stands in for a tokenizer that is not there: a text opens with the token of its first letters.

    The candidate table so has about the width a real tokenizer gives it; nothing else of a plan depends on it.
    """

    # The shipped wheels then make a table of 2,064 columns; Qwen's 151,643 tokens make one of 2,017.
    LETTERS = 5

    def __init__(self, vocabulary: int):
        self._vocabulary, self._ids = vocabulary, {}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The first token alone."""
        letters = self.LETTERS + text.startswith(" ")
        return [self._ids.setdefault(text[:letters], len(self._ids) % self._vocabulary)]
