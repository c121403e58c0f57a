"""Official label files as CSV: mer-r1 convert-labels --labels=FILE.npz[,FILE.npz] | --root=DIR

MER-UniBench keeps labels as Python pickles inside npz, and opening a pickle can run code. This command reads them as
data, refuses anything but numbers, text and plain containers without running it, and writes a CSV beside each file
(label.npz -> label.csv), which `mer-r1 evaluate` reads. With --root every label file of the nine sets below that folder
is converted.
"""

import pathlib

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.evaluation.benchmarks.pickled_labels import convert
from mer_r1_jax.evaluation.benchmarks.sets import LAYOUTS, BenchmarkError

_LABELS = flags.DEFINE_list("labels", [], "Label files to convert.")
_ROOT = flags.DEFINE_string("root", "", "Folder that holds the official folders of the sets.")
_OUT = flags.DEFINE_string("out", "", "Where to write, for a single file; empty = beside it.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; files are given as --labels=FILE,FILE")
    with explained():
        files = [pathlib.Path(path) for path in _LABELS.value]
        if _ROOT.value:
            files += [
                path
                for layout in LAYOUTS.values()
                if (path := pathlib.Path(_ROOT.value, layout.folder, layout.labels)).suffix == ".npz" and path.is_file()
            ]
        if not files:
            raise BenchmarkError("no label file: give --labels=FILE.npz, or --root=DIR with the sets' official folders")
        if _OUT.value and len(files) > 1:
            raise BenchmarkError(f"--out names one file, but {len(files)} are to be converted; leave it out")
        for path in files:
            out, counts = convert(path, _OUT.value or None)
            screen.say(f"{out}: " + ", ".join(f"{split} {count}" for split, count in counts.items()))
    return 0
