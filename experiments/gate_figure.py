"""Draws docs/gate.svg: what a gate between fast and slow answers risks and costs, at a run's last evaluation.

python experiments/gate_figure.py --run=runs/synthetic
"""

import base64
import pathlib
import sys

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.evaluation.gate_figure import gate_figure
from mer_r1_jax.evaluation.run_record import read_run
from mer_r1_jax.storage import atomic_files

_RUN = flags.DEFINE_string("run", None, "A run's folder.", required=True)
_OUT = flags.DEFINE_string("out", "docs/gate.svg", "Where the picture goes.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --run=runs/synthetic")
    (evaluations,) = read_run(pathlib.Path(_RUN.value)).evaluations.values()
    figure = gate_figure(evaluations[-1].scores.get("gate"))
    if figure is None:
        raise app.UsageError(f"--run={_RUN.value}: its last evaluation fitted no threshold")
    # The report holds the picture as a data URI; a page of its own takes the file in it.
    picture = base64.b64decode(figure.source.partition("base64,")[2])
    atomic_files.write_atomically(pathlib.Path(_OUT.value), lambda file: file.write(picture))
    screen.say(figure.caption)
    return 0


if __name__ == "__main__":
    sys.exit(app.run(main))
