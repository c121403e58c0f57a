"""Traces of single steps by jax.profiler (`train.profile_steps`): what ran when, on each device and on the host.

A trace goes on until the next step begins, so a checkpoint and an evaluation in between are in it.

A trace lies in `logs/attempt_<n>/profile/<phase>_<step>/` and is opened with xprof, TensorBoard's profile page or, as
`*.trace.json.gz`, Perfetto. It is for looking at: one that cannot be made is named in a warning, and training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

import jax

log = logging.getLogger(__name__)


class StepProfiler:
    """Traces the steps that were asked for, one trace each.

    Args:
        folder: of this attempt's traces.
        phase: "sft" or "rl".
        steps: of the phase, from 1.
    """

    def __init__(self, folder: Path, phase: str, steps: Collection[int]):
        self._folder, self._phase, self._steps = folder, phase, frozenset(steps)
        self._open: int | None = None
        self._last: int | None = None  # the step before

    def begin(self, step: int, wait: Callable[[], None] = lambda: None) -> None:
        """Ends the trace of the step before, and begins one where this step is asked for.

        Args:
            step: that is about to be made.
            wait: comes back when the device is done with the step before, and in a run of several processes when all
                have come; called where that one was to be traced, whether or not its trace could be begun here.
        """
        # The test is on steps, not on `_open`: `wait` is for all processes alike, and a trace may have failed in one.
        if self._last in self._steps:
            wait()  # a step is dispatched long before it has run
            self.end()
        self._last = step
        if step not in self._steps:
            return
        place = self._folder / f"{self._phase}_{step:05d}"
        try:
            jax.profiler.start_trace(str(place))
            self._open = step
        except Exception as error:  # another trace runs, no room, no permission: no reason to stop
            log.warning("%s step %d cannot be profiled: %s. Training goes on.", self._phase, step, error)

    def end(self) -> None:
        """Writes the open trace, where there is one."""
        if self._open is None:
            return
        # The trace counts as closed whatever follows, so a failure is reported once and not at every later step.
        step, self._open = self._open, None
        try:
            jax.profiler.stop_trace()
            log.info("%s step %d was profiled: %s", self._phase, step, self._folder)
        except Exception as error:
            log.warning("the profile of %s step %d cannot be written: %s. Training goes on.", self._phase, step, error)
