"""Fills a run's disk again and again, starts the same command each time, and compares its end with a run left alone.

    python tests/run/full_disk.py [--places=export,report,...] [--folder=DIR] [--megabytes=40]

At every place where a run writes (support/killing.py lists them) a file takes all the room that is left on the run's
disk, a small one of its own in memory. Where the system lets nobody mount one, the write fails with ENOSPC instead. An
attempt must end with exit status 2 and a message; then the room is given back. Exit status 0 when every attempt did,
and parameters, optimizer state, export, completions, metrics and evaluations end bit for bit as those of the other run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.killing import WRITING, train  # noqa: E402
from support.run_contents import contents, differences, leftovers  # noqa: E402
from support.small_run import make_data  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", default=",".join(WRITING), help="where to fill the disk, separated by commas")
    parser.add_argument("--folder", help="where to work; a new temporary folder, removed at the end, when not given")
    parser.add_argument("--megabytes", type=int, default=40, help="size of the small disk")
    arguments = parser.parse_args()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="full_disk_"))
    data, alone, small, compiled = (folder / name for name in ("data", "alone", "disk", "compiled"))
    for made in (data, small):
        made.mkdir(parents=True, exist_ok=True)
    make_data(data)
    say(f"a run left alone: exit status {train(data, alone, compiled).returncode}")
    mounted = mount(small, arguments.megabytes)
    say(
        f"a disk of {arguments.megabytes} MB"
        if mounted
        else "no disk could be mounted: writes fail with ENOSPC instead"
    )
    try:
        wrong = walk(arguments.places.split(","), data, small, compiled, mounted)
        ended = train(data, small, compiled)
        say(f"left alone at last: exit status {ended.returncode}")
        expected, found = contents(alone / "small"), contents(small / "small")
        different, left = differences(expected, found), leftovers(small / "small")
    finally:
        if mounted:
            subprocess.run(["umount", str(small)], check=True)
    say(f"{len(expected)} things compared, {len(different)} differ: {', '.join(sorted(different)) or 'all equal'}")
    say(f"left behind: {', '.join(left) or 'nothing'}")
    say(f"attempts that ended otherwise than with status 2 and a message: {', '.join(wrong) or 'none'}")
    if not arguments.folder:
        shutil.rmtree(folder)
    return int(bool(different or left or wrong or ended.returncode))


def walk(places: list[str], data: Path, output: Path, compiled: Path, mounted: bool) -> list[str]:
    """Fills the disk at each place in turn; gives the places where an attempt did not end as it must."""
    filler, wrong = output / "filler", []
    for name in places:
        what = f"fill={filler}" if mounted else "ENOSPC"
        ended = train(data, output, compiled, place=WRITING[name], signal_name=what)
        filler.unlink(missing_ok=True)
        said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        say(f"full at {name}: exit status {ended.returncode}; {said[-1][:240] if said else 'no message'}")
        explained = said and "GiB free" in said[-1] and "could not be" in said[-1] and "Traceback" not in ended.stderr
        if ended.returncode != 2 or not explained:
            wrong.append(name)
            (output.parent / f"{name}.stderr").write_text(ended.stderr)
    return wrong


def mount(folder: Path, megabytes: int) -> bool:
    """Mounts a small disk in memory; False where that is not allowed."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        return subprocess.run(words, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
