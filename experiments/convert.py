"""`mer-r1 convert`, as a script of a clone; the command itself is mer_r1_jax/commands/convert.py."""

import sys

from mer_r1_jax.commands.entry import run

if __name__ == "__main__":
    sys.exit(run("convert"))
