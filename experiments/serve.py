"""`mer-r1 serve`, as a script of a clone; the command itself is mer_r1_jax/commands/serve.py."""

import sys

from mer_r1_jax.commands.entry import run

if __name__ == "__main__":
    sys.exit(run("serve"))
