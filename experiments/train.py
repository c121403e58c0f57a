"""Trains: python experiments/train.py --config=experiments/configs/synthetic.py [--config.rl.num_generations=8 ...]

Runs SFT and then RL as the configuration says, evaluates slow and fast thinking, exports and writes the report. The
same command started again goes on where the last one stopped. On several hosts it is started on each of them.

Every field of mer_r1_jax/config/schema.py, where each has its comment, is a flag: --config.<section>.<field>=VALUE.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from mer_r1_jax.cli import ended, explained, parse_flags
from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.parallel.processes import joined
from mer_r1_jax.run.train import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().", lock_config=True)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --config.rl.num_generations=8")
    # The outer one explains why the processes of a run could not be joined; the inner one comes before they part.
    with explained(), joined(), explained():
        code = train(from_mapping(_CONFIG.value))
    return ended(code)


if __name__ == "__main__":
    sys.exit(app.run(main, flags_parser=parse_flags))
