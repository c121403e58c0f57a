"""Trains: mer-r1 train --config=synthetic [--config.rl.num_generations=8 ...]

Runs SFT and then RL as the configuration says, evaluates slow and fast thinking, exports and writes the report. The
same command started again goes on where the last one stopped. On several hosts it is started on each of them.

--config takes a Python file with get_config(), or the name of a configuration that comes with this package; its
settings are changed by --config.<section>.<field>=VALUE.
"""

from absl import app, flags
from ml_collections import config_flags

from mer_r1_jax.cli import ended, explained
from mer_r1_jax.config.build import from_mapping

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().", lock_config=True)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --config.rl.num_generations=8")
    from mer_r1_jax.parallel.processes import joined
    from mer_r1_jax.run.train import train

    # The outer one explains why the processes of a run could not be joined; the inner one comes before they part.
    with explained(), joined(), explained():
        code = train(from_mapping(_CONFIG.value))
    return ended(code)
