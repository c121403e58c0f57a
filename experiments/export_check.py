"""`mer-r1 export-check`, as a script of a clone; the command itself is mer_r1_jax/commands/export_check.py."""

import sys

from mer_r1_jax.commands.entry import run

if __name__ == "__main__":
    sys.exit(run("export-check"))
