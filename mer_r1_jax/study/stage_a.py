"""Stage A of the study: the lab's worlds, blocks of seeds, one summary each. docs/study/protocol.md says why what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from mer_r1_jax.lab import experiment
from mer_r1_jax.lab.worlds import WORLDS, LabConfig, with_settings
from mer_r1_jax.study.hypotheses import CALIBRATED
from mer_r1_jax.study.summaries import StudyError, Summary, as_kept, completed, read_summary, write_summary

SEEDS = tuple(range(200, 216))  # never run but for the registered study, not even to try
SCENES_SEED = 201  # trials of this program have seen 200
BLOCK = 8  # seeds of one summary
COMPARED_IN = ("U", "O", "T")
AT_A_TENTH = (*("baseline", "rd", "ad", "gdpo"), *CALIBRATED, experiment.PERMUTED)
AT_ONE = tuple(f"{arm}@1" for arm in CALIBRATED)
PROMPTS = {8: 12, 4: 24}  # answers a prompt -> prompts a step: as many answers in either case
MEASURED = {"eval_samples": 4, "common_point": True, "data_seed": SCENES_SEED}
# Variant -> its world, settings and arms, beside the comparison of all of them.
VARIANTS: dict[str, tuple[str, Mapping[str, Any], tuple[str, ...]]] = {
    "no_kl": ("U", {"rl.beta": 0.0}, ("baseline", "ad")),
    "count_once": ("T", {"rl.calibration_counts": "category"}, ("ad", "mer_r1", "mer_r1@1")),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """Runs that share one summary.

    Attributes:
        world: of the lab.
        generations: answers a prompt.
        variant: of VARIANTS, or "".
        arms: that are compared.
        seeds: of the policy.
    """

    world: str
    generations: int
    variant: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of its file, without the ending."""
        variant = f"_{self.variant}" if self.variant else ""
        return f"{self.world}_g{self.generations}{variant}_seeds{self.seeds[0]}-{self.seeds[-1]}"

    def config(self, further: Mapping[str, Any]) -> LabConfig:
        """Its experiment, with the settings of a trial.

        Raises:
            ConfigError: one of them cannot be used.
        """
        settings = {
            **MEASURED,
            "rl.num_generations": self.generations,
            "rl.prompts_per_step": PROMPTS[self.generations],
            **(VARIANTS[self.variant][1] if self.variant else {}),
        }
        return with_settings(with_settings(WORLDS[self.world], settings), further)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        seeds: of the policy.
        settings: further ones, of a trial.
        registered: whether it is the registered stage.
    """

    seeds: tuple[int, ...] = SEEDS
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    registered: bool = True

    def blocks(self) -> list[Block]:
        """All blocks, in the order in which they are run: what decides most first."""
        starts = range(0, len(self.seeds), BLOCK)
        parts = [self.seeds[start : start + BLOCK] for start in starts]
        found = [
            Block(world, generations, "", AT_A_TENTH + AT_ONE * (generations == 8), part)
            for generations in PROMPTS
            for world in COMPARED_IN
            for part in parts
        ]
        return found + [
            Block(world, 8, variant, arms, part) for variant, (world, _, arms) in VARIANTS.items() for part in parts
        ]


def make_plan(seeds: Sequence[int], settings: Mapping[str, Any]) -> Plan:
    """The registered stage where no seeds are given, else a trial of it.

    Raises:
        StudyError: a trial of registered seeds, or the registered stage with other settings.
        ConfigError: a setting that cannot be used.
    """
    if not seeds and settings:
        raise StudyError(
            f"--set: got {', '.join(settings)} for the registered seeds, expected none: its settings are those of the "
            "protocol; try other settings on other seeds, such as --seeds=900-901"
        )
    if "rl.num_generations" in settings:
        raise StudyError(
            "--set=rl.num_generations: expected other settings: the stage compares groups of "
            f"{' and '.join(map(str, PROMPTS))}; try one size alone with mer-r1 lab"
        )
    if taken := sorted(set(seeds) & set(SEEDS)):
        raise StudyError(
            f"--seeds: got {', '.join(map(str, taken))}, expected none of {SEEDS[0]} to {SEEDS[-1]}, which are "
            "registered and run once, all together; leave --seeds out to run them, or try with others, such as "
            "--seeds=900-901"
        )
    if settings.get("data_seed") == SCENES_SEED:
        raise StudyError(
            f"--set=data_seed: got {SCENES_SEED}, the seed of the registered scenes, expected another one for a trial, "
            "such as the usual 0"
        )
    plan = Plan(tuple(seeds), {"data_seed": 0, **settings}, registered=False) if seeds else Plan()
    for block in plan.blocks():
        block.config(plan.settings)  # a setting that cannot be used is refused before anything is run
    return plan


def run_stage(plan: Plan, folder: Path, command: str, say: Callable[[str], Any]) -> list[Summary]:
    """Runs the blocks that have no summary yet, and returns all summaries in the order of the blocks.

    Args:
        plan: what is run.
        folder: of the summaries.
        command: kept in each.
        say: told what is being done.

    Raises:
        StudyError: a summary there is not of this plan, or cannot be read.
    """
    blocks = plan.blocks()
    paths = {block: folder / f"{block.name}.json" for block in blocks}
    there = {block: read_block(path, block, plan) for block, path in paths.items() if path.exists()}
    say(f"{len(blocks)} blocks, {len(there)} of them done")
    for number, block in enumerate(blocks, start=1):
        if block in there:
            continue
        say(f"block {number} of {len(blocks)}: {block.name}, {len(block.arms)} arms x {len(block.seeds)} seeds")
        there[block] = _run(block, plan, command, say)
        write_summary(paths[block], there[block])
        say(f"written: {paths[block]} ({paths[block].stat().st_size / 1000:.0f} kB)")
    return [there[block] for block in blocks]


def read_stage(plan: Plan, folder: Path) -> list[Summary]:
    """All summaries of a stage that has ended.

    Raises:
        StudyError: one is missing, is of other settings, or cannot be read.
    """
    return [read_block(folder / f"{block.name}.json", block, plan) for block in plan.blocks()]


def read_block(path: Path, block: Block, plan: Plan) -> Summary:
    """A block's summary.

    Raises:
        StudyError: it is of other settings, seeds or arms, or cannot be read.
    """
    found = read_summary(path)
    expected = {
        "registered": plan.registered,
        "world": block.world,
        "seeds": block.seeds,
        "config": as_kept(block.config(plan.settings)),
        "rows": (experiment.SFT, *block.arms),
    }
    got = {name: getattr(found, name) for name in expected} | {"rows": tuple(found.rows)}
    got["config"] = completed(found.config, LabConfig())
    if differs := [name for name in expected if got[name] != expected[name]]:
        raise StudyError(
            f"{path}: got a summary of other {', '.join(differs)}, expected those of this block; choose another --out, "
            "or move the file away to have the block run again"
        )
    return found


def _run(block: Block, plan: Plan, command: str, say: Callable[[str], Any]) -> Summary:
    config = block.config(plan.settings)
    arms = experiment.named_arms(block.arms, config.rl)
    result = experiment.run(block.world, config, arms, block.seeds, say)
    values = experiment.as_json(result, command)
    rows = {row: measures | values["sampled"].get(row, {}) for row, measures in _distinct(values).items()}
    about = {
        "command": command,
        "seconds": values["seconds"],
        "ceiling": values["ceiling"],
        "device": jax.devices()[0].device_kind,
        "versions": {name: metadata.version(name) for name in ("mer-r1-jax", "jax", "numpy")},
    }
    return Summary("A", plan.registered, block.world, block.variant, block.seeds, as_kept(config), rows, about)


def _distinct(values: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Rows of measures. What was sampled has an F1 of its own, which is none of the held-out clips: left out there."""
    for sampled in values["sampled"].values():
        for name in ("f1", "recall", "precision"):
            sampled.pop(name)
    return values["rows"]
