"""Kills a run again and again, starts the same command each time, and compares its end with a run left alone.

    python tests/run/kill_resume.py [--places=decode,export,...] [--folder=DIR]

At every place (support/killing.py lists them) the process sends itself SIGKILL. Exit status 0 when parameters,
optimizer state, export, sampled completions, metrics and evaluations end bit for bit as those of the other run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.killing import PLACES, train  # noqa: E402
from support.run_contents import contents, differences, leftovers  # noqa: E402
from support.small_run import make_data  # noqa: E402

SHOWN = ("export: model.safetensors", "eval: heldout_00046.json", "completions: completions_00006.parquet")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", default=",".join(PLACES), help="where to kill, separated by commas")
    parser.add_argument("--folder", help="where to work; a new temporary folder, removed at the end, when not given")
    arguments = parser.parse_args()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="kill_resume_"))
    data, alone, killed, compiled = (folder / name for name in ("data", "alone", "killed", "compiled"))
    data.mkdir(parents=True, exist_ok=True)
    make_data(data)
    say(f"a run left alone: exit status {train(data, alone, compiled).returncode}")
    for name in arguments.places.split(","):
        status = train(data, killed, compiled, place=PLACES[name]).returncode
        say(f"killed at {name}: exit status {status}")
        if status != -9:
            say(f"expected -9: the run never came to {PLACES[name]!r}; see {killed}.log")
            return 1
    say(f"left alone at last: exit status {train(data, killed, compiled).returncode}")
    expected, found = contents(alone / "small"), contents(killed / "small")
    different, left = differences(expected, found), leftovers(killed / "small")
    say(f"{len(expected)} things compared, {len(different)} differ: {', '.join(sorted(different)) or 'all equal'}")
    say(f"left behind: {', '.join(left) or 'nothing'}")
    for name in SHOWN:
        say(f"{name}: {found.get(name, 'missing')}")
    if not arguments.folder:
        shutil.rmtree(folder)
    return int(bool(different or left))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
