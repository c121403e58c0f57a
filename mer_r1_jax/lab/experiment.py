"""One experiment of the lab: scenes, SFT of every seed, RL of every arm from there, and what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mer_r1_jax.config.build import with_values
from mer_r1_jax.config.schema import ConfigError, RlConfig
from mer_r1_jax.evaluation.bootstrap import Difference
from mer_r1_jax.evaluation.over_seeds import crossed_difference
from mer_r1_jax.lab.measures import COMMON_POINT, MEASURES, STOP_BIASES, Examiner
from mer_r1_jax.lab.scenes import draw_scenes
from mer_r1_jax.lab.teaching import SAMPLED, LabArm, fine_tune, reinforce
from mer_r1_jax.lab.worlds import LabConfig
from mer_r1_jax.rl.advantage import ARMS, arm_of

PERMUTED = "permuted"  # the control: `mer_r1` whose rewards are handed out at random within each group
SFT = "sft"  # the row of what RL begins with
SLOW_MINUS_FAST = "slow_minus_fast"  # a measure made of two others
STOPS = 5  # places on an arm's way that are measured, its end included
DRIFT_STEPS = 20  # first steps of RL, over which spreads and drift are averaged: later the arms have parted
OVER_RL = ("recall_spread", "precision_spread")  # of SAMPLED, kept over all steps too, under their name + _over_rl
COMPARED_WITH = ("baseline", "ad")  # arms that others are held against, where they take part


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabResult:
    """What an experiment gave.

    Attributes:
        world: name of the world.
        config: the experiment.
        seeds: of the model, in the order of all values by seed.
        rows: SFT, then every arm -> measure -> float32 [S, N].
        sampled: arm -> SAMPLED over the first DRIFT_STEPS steps of RL (F1 and KL over the last fifth), and OVER_RL over
            all of them, one value a seed.
        paths: arm -> (steps of RL, [recall, precision, F1]) of slow answers, means over seeds.
        stop_curve: points of slow answers after SFT, their end made less and less likely: what a change of length alone
            would give.
        ceiling: expected F1 of one who knows the cues.
        seconds: part -> seconds it took.
    """

    world: str
    config: LabConfig
    seeds: tuple[int, ...]
    rows: dict[str, dict[str, np.ndarray]]
    sampled: dict[str, dict[str, np.ndarray]]
    paths: dict[str, list[tuple[int, list[float]]]]
    stop_curve: list[list[float]]
    ceiling: float
    seconds: dict[str, float]

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in their order."""
        return tuple(name for name in self.rows if name != SFT)

    def values(self, row: str, measure: str) -> np.ndarray:
        """A measure of every seed and clip, [S, N]."""
        if measure == SLOW_MINUS_FAST:
            return self.rows[row]["slow_f1"] - self.rows[row]["fast_f1"]
        return self.rows[row][measure]

    def mean(self, row: str, measure: str) -> float:
        """Mean over seeds and clips."""
        return float(self.values(row, measure).mean(dtype=np.float64))

    def difference(self, row: str, other: str | None, measure: str) -> Difference:
        """A row minus another, seed by seed and clip by clip; the row itself where there is no other."""
        values = self.values(row, measure)
        return crossed_difference(values if other is None else values - self.values(other, measure))


def named_arms(names: Sequence[str], rl: RlConfig) -> list[LabArm]:
    """Arms by name: the product's, a function's dotted path, or `permuted`; `@WEIGHT` behind it is its calibration's.

    Raises:
        ConfigError: an unknown name, or a weight that is none.
        OwnFunctionError: a dotted path without a usable function.
    """
    found: dict[str, LabArm] = {}
    for name in names:
        arm, at, weight = name.partition("@")
        known = "mer_r1" if arm == PERMUTED else arm
        try:
            value = float(weight) if at else rl.calibration_weight
        except ValueError:
            value = weight
        if known not in ARMS and "." not in known:
            raise ConfigError(f"arm: got {arm!r}, expected {', '.join(ARMS)}, {PERMUTED} or module.function")
        arm_of(known)  # a function of the user's is tried on shapes before anything is trained
        config = with_values(rl, {"arm": known, "calibration_weight": value})
        found[name] = LabArm(name=name, arm=known, config=config, permuted=arm == PERMUTED)
    return list(found.values())


def run(
    world: str, config: LabConfig, arms: Sequence[LabArm], seeds: Sequence[int], say: Callable[[str], Any]
) -> LabResult:
    """Makes an experiment.

    Args:
        world: name of the world, for the result.
        config: the experiment.
        arms: those compared.
        seeds: of the model; all see the same scenes.
        say: told what is being done, a line each.
    """
    clock = _Clock(say)
    scenes = draw_scenes(config)
    clock.done("scenes", f"{config.sft_clips} + {config.rl_clips} + {config.eval_clips} scenes drawn")

    start_S = fine_tune(config, scenes.sft, seeds)
    examiner = Examiner(config, scenes.held_out)
    fixed_words_SNW = examiner.fast_answers(start_S)  # waits for SFT
    clock.done("sft", f"SFT: {config.sft.max_steps} steps of {len(seeds)} seeds")

    rows = {SFT: examiner.measure(start_S, fixed_words_SNW)}
    stop_curve = [examiner.operating_point(start_S, bias) for bias in STOP_BIASES]
    paths = {arm.name: [(0, examiner.operating_point(start_S))] for arm in arms}
    clock.done("evaluation", "evaluated after SFT")

    logs, every = [], -(-config.rl.max_steps // STOPS)
    params_AS = None
    for steps, params_AS, log_AStM in reinforce(config, scenes.rl, start_S, seeds, arms, every=every):
        logs.append(log_AStM)
        clock.done("rl", f"RL: step {steps} of {config.rl.max_steps}, {len(arms)} arms x {len(seeds)} seeds")
        for number, arm in enumerate(arms):
            paths[arm.name].append((steps, examiner.operating_point(_of_arm(params_AS, number))))
        clock.done("evaluation")
    for number, arm in enumerate(arms):
        rows[arm.name] = examiner.measure(_of_arm(params_AS, number), fixed_words_SNW)
    clock.done("evaluation", "evaluated after RL")
    return LabResult(
        world=world,
        config=config,
        seeds=tuple(seeds),
        rows=rows,
        sampled=_sampled(np.concatenate(logs, axis=2), [arm.name for arm in arms], every),
        paths=paths,
        stop_curve=stop_curve,
        ceiling=scenes.held_out.ceiling,
        seconds=clock.seconds,
    )


def as_json(result: LabResult, command: str) -> dict[str, Any]:
    """Everything of a result as JSON values; scores are shares in [0, 1], one value a seed, the mean over clips."""

    def plain(values: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
        by_seed = {
            name: of.reshape(len(result.seeds), -1).mean(axis=1, dtype=np.float64) for name, of in values.items()
        }
        return {name: [round(value, 6) for value in column.tolist()] for name, column in by_seed.items()}

    return {
        "command": command,
        "world": result.world,
        "config": dataclasses.asdict(result.config),
        "seeds": list(result.seeds),
        "measures": MEASURES | COMMON_POINT if result.config.common_point else MEASURES,
        "rows": {row: plain(values) for row, values in result.rows.items()},
        "sampled": {arm: plain(values) for arm, values in result.sampled.items()},
        "paths": {arm: [[steps, *point] for steps, point in path] for arm, path in result.paths.items()},
        "stop_curve": result.stop_curve,
        "ceiling": result.ceiling,
        "seconds": {part: round(seconds, 1) for part, seconds in result.seconds.items()},
    }


def _sampled(log_AStM: np.ndarray, names: Sequence[str], last_steps: int) -> dict[str, dict[str, np.ndarray]]:
    """SAMPLED of the first steps, where the arms still sample alike; F1 and KL of the last ones; OVER_RL of all."""
    early = log_AStM[:, :, :DRIFT_STEPS].mean(axis=2)
    late = log_AStM[:, :, -last_steps:].mean(axis=2)
    always = log_AStM.mean(axis=2)
    return {
        arm: {name: (late if name in ("f1", "kl") else early)[number, :, column] for column, name in enumerate(SAMPLED)}
        | {f"{name}_over_rl": always[number, :, SAMPLED.index(name)] for name in OVER_RL}
        for number, arm in enumerate(names)
    }


def _of_arm(params_AS: Any, number: int) -> Any:
    return {name: value[number] for name, value in params_AS.items()}


class _Clock:
    """Adds up the seconds of an experiment's parts, and tells what is done."""

    def __init__(self, say: Callable[[str], Any]):
        self.seconds: dict[str, float] = {}
        self._say, self._begun, self._last = say, time.monotonic(), time.monotonic()

    def done(self, part: str, told: str = "") -> None:
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
        if told:
            self._say(f"{now - self._begun:5.0f} s  {told}")
