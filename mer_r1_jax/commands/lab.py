"""Tries arms in two minutes, without a model: mer-r1 lab [--world=U] [--arm=my_module.my_advantage]

The synthetic world's scenes and the product's own advantages on a policy of 15,000 parameters: SFT on labels with
slips, then RL with every arm on clean truths, all seeds and arms as one program. Prints slow and fast scores and what
the arms differ in over seeds; writes them as WORLD.json, WORLD.md and WORLD.svg, where an arm is a path in the plane
of recall and precision.

Arms are those of rl.arm, functions of your own among them. A weight behind @ is the calibration's (mer_r1@1); permuted
is mer_r1 with its rewards permuted within each group, which has to gain nothing.
"""

import pathlib

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import as_typed, explained
from mer_r1_jax.config.command_line import named_values, seed_numbers
from mer_r1_jax.lab.worlds import PURPOSES, WORLDS, with_settings
from mer_r1_jax.storage.atomic_files import writing

ARMS = (
    *("baseline", "rd", "ad", "mer_r1", "sfcc_word", "sfcc_recall_only", "sfcc_reward_space", "sfcc_mixed"),
    "permuted",
)
_WORLD = flags.DEFINE_enum(
    "world", "default", list(WORLDS), "; ".join(f"{name}: {purpose}" for name, purpose in PURPOSES.items())
)
_ARMS = flags.DEFINE_list("arms", list(ARMS), "arms that are compared")
_ARM = flags.DEFINE_list("arm", [], "further ones, compared with those: my_module.my_advantage")
_SEEDS = flags.DEFINE_list("seeds", ["0-7"], "seeds of the policy, one by one or from the first to the last")
_SET = flags.DEFINE_multi_string("set", [], "a setting, such as rl.beta=0, world.label_gain=0.6 or width=64")
_OUT = flags.DEFINE_string("out", "runs/lab", "folder of the files")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --set=rl.beta=0")
    with explained():
        seeds = seed_numbers(_SEEDS.value)
        config = with_settings(WORLDS[_WORLD.value], named_values(_SET.value))
        from mer_r1_jax.lab import experiment, lab_report

        arms = experiment.named_arms([*_ARMS.value, *_ARM.value], config.rl)
        folder = pathlib.Path(_OUT.value)
        with writing("the lab's files", folder):
            folder.mkdir(parents=True, exist_ok=True)
        result = experiment.run(_WORLD.value, config, arms, seeds, screen.console(stderr=True).print)
        screen.say(lab_report.text(result))
        written = lab_report.write(folder, result, as_typed("lab"))
        screen.say(f"written: {', '.join(map(str, written))}")
    return 0
