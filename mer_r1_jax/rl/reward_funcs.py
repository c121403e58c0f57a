"""Reward functions of a user's, called as TRL calls them, in a process of their own with a time limit.

    def politeness(prompts, completions, **columns) -> list[float | None]

One value a completion, None where there is nothing to score. A call that raises, hangs, ends its process or returns
something else is made again on smaller parts, prompt by prompt and at last completion by completion, so that only what
is at fault stays unscored. Values that are compared with each other, those of one prompt's completions, always come
from calls of the same size. A fault is named with its sample and is never a reward of 0.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mer_r1_jax import faults
from mer_r1_jax.data.records import Record
from mer_r1_jax.process_pool import START_SECONDS, Ask, ChildDiedError, ProcessPool

WORKER = (sys.executable, "-m", "mer_r1_jax.rl.reward_worker")
MAX_HANGS = 5  # time-outs and dead processes of a function in one rollout before the rest stays unscored
FAULTS_SHOWN = 3  # faults of a function that are named in one rollout; all are in the table of completions
LARGEST = float(np.finfo(np.float32).max)
GIVEN = ("completion_ids", "id", "videos", "audios", "images", "subtitle", "solution")  # besides a record's own columns
# Names that metrics and the table of completions have already; a function of that name goes by its whole path.
TAKEN = frozenset(
    "recall precision f1 format r_plus r_minus rollout_step id generation completion words truth advantage length "
    "truncated logprob reward_faults".split()
)

log = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """Reward functions that cannot be used; the message names each and says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion as reward functions see it.

    Attributes:
        record: what it answers.
        row, generation: its place in arrays [B, G].
        text: the completion.
        ids: its token ids.
    """

    record: Record
    row: int
    generation: int
    text: str
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scored:
    """What one function gave for the samples of a rollout, in their order.

    Attributes:
        samples: the samples.
        values: float32, NaN where there is no value.
        faults: why not, by sample number; a sample without value and fault was left unscored on purpose (None).
    """

    samples: tuple[Sample, ...]
    values: np.ndarray
    faults: dict[int, str]

    def grid(self, shape_BG: tuple[int, int]) -> np.ndarray:
        """The values as float32 [B, G], NaN where there is none."""
        value_BG = np.full(shape_BG, np.nan, np.float32)
        for sample, value in zip(self.samples, self.values, strict=True):
            value_BG[sample.row, sample.generation] = value
        return value_BG


def metrics_of(scores: Mapping[str, Scored]) -> dict[str, float]:
    """`rewards/<name>/...`: mean and std (absent where nothing was scored), share unscored, number of faults."""
    metrics = {}
    for name, scored in scores.items():
        if not scored.samples:
            continue
        held = scored.values[np.isfinite(scored.values)].astype(np.float64)
        metrics[f"rewards/{name}/unscored"] = 1 - held.size / len(scored.samples)
        metrics[f"rewards/{name}/faults"] = float(len(scored.faults))
        if held.size:
            metrics |= {f"rewards/{name}/mean": held.mean(), f"rewards/{name}/std": held.std()}
    return metrics


def columns_of(scores: Mapping[str, Scored]) -> dict[str, list[Any]]:
    """Columns of the samples' table: each function's values, None where unscored, and `reward_faults`, why not."""
    if not any(scored.samples for scored in scores.values()):
        return {}
    columns: dict[str, list[Any]] = {
        name: [float(value) if np.isfinite(value) else None for value in scored.values]
        for name, scored in scores.items()
    }
    count = len(next(iter(scores.values())).samples)
    columns["reward_faults"] = [
        [f"{name}: {scored.faults[i]}" for name, scored in scores.items() if i in scored.faults] for i in range(count)
    ]
    return columns


def together(parts: Sequence[Mapping[str, Scored]]) -> dict[str, Scored]:
    """The scores of several processes' samples as those of all, one part after another; parts may be empty."""
    joined: dict[str, Scored] = {}
    for part in parts:
        for name, scored in part.items():
            before = joined.get(name, Scored((), np.zeros(0, np.float32), {}))
            # Faults are kept by sample number, which counts on over the parts.
            shifted = {len(before.samples) + number: fault for number, fault in scored.faults.items()}
            values = np.concatenate([before.values, scored.values])
            joined[name] = Scored(before.samples + scored.samples, values, before.faults | shifted)
    return joined


class RewardFunctions:
    """The functions of one run, imported in a process of their own.

    Args:
        paths: `package.module.function`.
        timeout: seconds one call may take.
        max_faulty_rollouts: rollouts in a row in which all of a function's calls failed before the run stops.
        columns: the records' further columns.

    Raises:
        RewardError: for every function that cannot be imported or cannot be called with what there is, in one message.
    """

    def __init__(self, paths: Sequence[str], *, timeout: float, max_faulty_rollouts: int, columns: Sequence[str] = ()):
        self.paths, self.timeout, self._max_faulty_rollouts = tuple(paths), timeout, max_faulty_rollouts
        self.names = short_names(self.paths)
        self._columns = tuple(columns)
        self._faulty_rollouts: collections.Counter[str] = collections.Counter()
        self._takes: list[frozenset[str] | None] = []
        # A reward function that uses JAX must not take the accelerator from the run.
        environment = {"JAX_PLATFORMS": "cpu"}
        self._pool = ProcessPool(WORKER, 1, prepare=self._import, environment=environment, quotes_output=False)
        try:
            self._pool.start()
        except ChildDiedError as error:
            raise RewardError(f"rl.reward_funcs: {', '.join(paths)} could not be imported: {error}") from None

    def close(self) -> None:
        """Ends the process."""
        self._pool.close()

    def score(self, samples: Sequence[Sample], asked: Callable[[], bool] = lambda: False) -> dict[str, Scored]:
        """Asks every function, by its short name, about a rollout's samples; those of one prompt follow one another.

        Args:
            samples: the samples.
            asked: whether the run is to stop; looked at while a call is waited for.

        Raises:
            StopRequested: `asked` said so; the call was left and its process ended.
            RewardError: a function has given nothing but faults for too long.
        """
        scores = {name: self._score(number, samples, asked) for number, name in enumerate(self.names)}
        for path, scored in zip(self.paths, scores.values(), strict=True):
            self._report(path, scored)
        return scores

    def _score(self, number: int, samples: Sequence[Sample], asked: Callable[[], bool]) -> Scored:
        values = np.full(len(samples), np.nan, np.float32)
        faults: dict[int, str] = {}
        # A function that failed throughout the last rollout is given one time-out, not five.
        hangs, limit = 0, 1 if self._faulty_rollouts[self.paths[number]] else MAX_HANGS
        parts = collections.deque([list(range(len(samples)))] if samples else [])
        while parts:
            # Breadth first, so that all parts of one size are asked before any smaller one.
            part = parts.popleft()
            try:
                if hangs >= limit:
                    raise _CallError(f"not asked any more, as {hangs} calls in this rollout ran out of time or crashed")
                answers = self._call(number, [samples[i] for i in part], asked)
            except _CallError as error:
                hangs += error.hung
                # The fault may be one completion's; those beside it are asked again without it.
                smaller = _smaller(part, samples) if hangs < limit else []
                parts.extend(smaller)
                faults |= {} if smaller else dict.fromkeys(part, str(error))
                continue
            for i, answer in zip(part, answers, strict=True):
                if isinstance(answer, dict):
                    faults[i] = answer["fault"]
                elif answer is not None and abs(answer) > LARGEST:
                    faults[i] = f"it returned {answer}, beyond the range of float32"
                elif answer is not None:
                    values[i] = answer
        return Scored(tuple(samples), values, dict(sorted(faults.items())))

    def _call(self, number: int, samples: Sequence[Sample], asked: Callable[[], bool]) -> list[Any]:
        arguments = self._arguments(samples)
        if (taken := self._takes[number]) is not None:
            arguments = {name: value for name, value in arguments.items() if name in taken}
        job = {"function": number, "arguments": arguments, "count": len(samples)}
        faults.here("reward_call", self.paths[number])
        try:
            answer = self._pool.ask(job, self.timeout, lambda head, _: _read(head, len(samples)), asked)
        except TimeoutError:
            raise _CallError(f"it did not return within {self.timeout:g} s (rl.reward_timeout)", hung=True) from None
        except ChildDiedError as error:
            raise _CallError(f"its process ended: {error}", hung=True) from None
        if isinstance(answer, str):
            raise _CallError(answer)
        return answer

    def _arguments(self, samples: Sequence[Sample]) -> dict[str, list[Any]]:
        """Keyword lists, one entry a sample, as TRL gives them for conversational data."""
        records = [sample.record for sample in samples]
        own = {name: [record.extra.get(name) for record in records] for name in self._columns}
        return own | {
            "prompts": [list(record.messages) for record in records],
            "completions": [[{"role": "assistant", "content": sample.text}] for sample in samples],
            "completion_ids": [list(sample.ids) for sample in samples],
            "id": [record.id for record in records],
            "videos": [list(record.videos) for record in records],
            "audios": [list(record.audios) for record in records],
            "images": [list(record.images) for record in records],
            "subtitle": [record.subtitle for record in records],
            "solution": [list(record.solution) for record in records],
        }

    def _import(self, ask: Ask) -> None:
        """Has a new process import the functions; the first one's answer says what they can be called with."""
        try:
            answer = ask({"import": list(self.paths), "path": sys.path}, START_SECONDS)
        except TimeoutError:
            raise ChildDiedError(f"no end of importing after {START_SECONDS:g} s") from None
        if not self._takes:
            self._takes = self._checked(answer)
        elif answer["errors"]:
            raise ChildDiedError(f"started again, it could not import any more: {'; '.join(answer['errors'])}")

    def _checked(self, answer: dict[str, Any]) -> list[frozenset[str] | None]:
        """The names each function takes, None for any."""
        there = {"prompts", "completions", *GIVEN, *self._columns}
        problems = list(answer["errors"])
        if not problems:
            for path, found in zip(self.paths, answer["functions"], strict=True):
                if missing := [name for name in found["needs"] if name not in there]:
                    problems.append(
                        f"{path}: it needs {', '.join(missing)}, but there are only {', '.join(sorted(there))}; "
                        "add the column to the records of data.rl_path, or give the argument a default"
                    )
        reserved = sorted({"prompts", "completions", "completion_ids"} & set(self._columns))
        if reserved:
            problems.append(f"data.rl_path: the column {reserved[0]} has the name of an argument; rename it")
        if problems:
            raise RewardError("rl.reward_funcs cannot be used:\n" + "\n".join(f"  - {line}" for line in problems))
        return [None if found["takes"] is None else frozenset(found["takes"]) for found in answer["functions"]]

    def _report(self, path: str, scored: Scored) -> None:
        """Names what is at fault, and stops a run whose reward is broken rather than unlucky."""
        samples, faults = scored.samples, scored.faults
        for i in list(faults)[:FAULTS_SHOWN]:
            sample = samples[i]
            log.warning(
                "reward %s, sample %s, completion %d: %s; left unscored",
                path, sample.record.id, sample.generation, faults[i],
            )  # fmt: skip
        if len(faults) > FAULTS_SHOWN:
            log.warning("reward %s: %d further completions left unscored", path, len(faults) - FAULTS_SHOWN)
        if not samples:
            return
        # In a row: one rollout with a single value begins the count anew.
        self._faulty_rollouts[path] = self._faulty_rollouts[path] + 1 if len(faults) == len(samples) else 0
        if self._faulty_rollouts[path] >= self._max_faulty_rollouts:
            raise RewardError(
                f"reward {path} gave nothing but faults in {self._faulty_rollouts[path]} rollouts in a row; the run "
                f"stops at rl.max_faulty_rollouts={self._max_faulty_rollouts}. The last: {list(faults.values())[-1]}. "
                "Correct the function and start the same command again"
            )


class _CallError(Exception):
    """A call whose result cannot be used."""

    def __init__(self, reason: str, hung: bool = False):
        super().__init__(reason)
        self.hung = hung


def short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """What the functions are called in metrics and tables: their last name, or the whole path where that is taken."""
    last = [path.rpartition(".")[2] for path in paths]
    return tuple(
        path if last.count(name) > 1 or name in TAKEN else name for path, name in zip(paths, last, strict=True)
    )


def extra_columns(records: Sequence[Record]) -> tuple[str, ...]:
    """Names of the further columns that any of the records has."""
    return tuple(dict.fromkeys(name for record in records for name in record.extra))


def _smaller(part: Sequence[int], samples: Sequence[Sample]) -> list[list[int]]:
    """A part cut by prompts, or by completions where it has one prompt; [] where it is one completion."""
    groups: list[list[int]] = []
    for i in part:
        if groups and samples[groups[-1][0]].row == samples[i].row:
            groups[-1].append(i)
        else:
            groups.append([i])
    if len(groups) == 1:
        groups = [[i] for i in part]
    return groups if len(part) > 1 else []


def _read(head: dict[str, Any], count: int) -> list[Any] | str:
    """What an answer says of `count` completions, or why the call failed.

    Raises:
        ChildDiedError: it is no answer, as the foreign code in that process may have seen to.
    """
    if isinstance(head.get("error"), str):
        return head["error"]
    values = head.get("values")
    if not isinstance(values, list) or len(values) != count or not all(map(_is_answer, values)):
        raise ChildDiedError("it answered with something else than values")
    return values


def _is_answer(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("fault"), str)
    return value is None or type(value) is float and math.isfinite(value)
