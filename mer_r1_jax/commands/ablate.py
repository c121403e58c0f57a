"""Compares arms over seeds: SFT once a seed, every arm from that checkpoint with the same steps, one table.

mer-r1 ablate --config=synthetic --arms=baseline,rd,ad,mer_r1 --seeds=0,1,2 --out=DIR
    [--controls=permuted,sft,plateau --control_sft_steps=800] [--parallel=2] [--config.rl.max_steps=...]

Every run is a folder of --out, as `mer-r1 train` makes it. The same command started again goes on where it stopped and
runs nothing twice; further arms, seeds and controls may be added, other settings are refused. At its end, and at each
stop, it writes ablation.md, ablation.svg, ablation.html and ablation.json from what is finished.
"""

import pathlib

from absl import app, flags
from ml_collections import config_flags

from mer_r1_jax import screen
from mer_r1_jax.cli import as_typed, explained
from mer_r1_jax.config.build import from_mapping

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().", lock_config=True)
_ARMS = flags.DEFINE_list("arms", ["baseline", "rd", "ad", "mer_r1"], "arms that are compared (rl.arm)")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds every arm is run with (train.seed)")
_CONTROLS = flags.DEFINE_list(
    "controls",
    [],
    "permuted: mer_r1 with the rewards permuted within each group, so that they say nothing; sft: further SFT in place "
    "of RL; plateau: SFT from the start with a fifth more steps, to see whether it had come to its end",
)
_CONTROL_SFT_STEPS = flags.DEFINE_integer(
    "control_sft_steps", 0, "steps of the control sft: what RL costs, in SFT steps", 0, 1_000_000_000
)
_CONTROL_SFT_LEARNING_RATE = flags.DEFINE_float(
    "control_sft_learning_rate", 0.0, "its peak; 0 = that of SFT", 0.0, 10.0
)
_PARALLEL = flags.DEFINE_integer("parallel", 1, "runs at once, each on its share of the cores; only on CPUs", 1, 1024)
_OUT = flags.DEFINE_string("out", None, "folder of the runs and the tables", required=True)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --config.rl.max_steps=100")
    from mer_r1_jax.run.ablation import ablate
    from mer_r1_jax.run.ablation_plan import Controls, make_plan

    with explained():
        plan = make_plan(
            from_mapping(_CONFIG.value),
            pathlib.Path(_OUT.value).absolute(),
            _ARMS.value,
            _SEEDS.value,
            Controls(_CONTROLS.value, _CONTROL_SFT_STEPS.value, _CONTROL_SFT_LEARNING_RATE.value),
        )
        return ablate(plan, _PARALLEL.value, as_typed("ablate"), screen.console(stderr=True))
