"""`mer-r1 check-in-transformers`, also where this project is not installed: the file is run by its path."""

import pathlib
import runpy

if __name__ == "__main__":
    script = pathlib.Path(__file__).parents[1] / "mer_r1_jax/commands/check_in_transformers.py"
    runpy.run_path(str(script), run_name="__main__")
