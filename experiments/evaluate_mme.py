"""`mer-r1 evaluate-mme`, as a script of a clone; the command itself is mer_r1_jax/commands/evaluate_mme.py."""

import sys

from mer_r1_jax.commands.entry import run

if __name__ == "__main__":
    sys.exit(run("evaluate-mme"))
