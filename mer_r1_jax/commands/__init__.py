"""The commands of `mer-r1`, one module each: its docstring, its flags and its `main`.

Whatever takes long to import (JAX, transformers, matplotlib, our own modules above them) is imported inside functions,
so that `--help` and mistakes on the command line are answered at once.
"""
