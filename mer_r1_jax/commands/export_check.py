"""Checks that transformers computes what we do: mer-r1 export-check --export=RUN/export/hf [--clips=20]

Answers held-out clips greedily with our own code in float32, writes prompts, answers and logits to --cases, and feeds
them to transformers' Thinker loaded from the same directory (`mer-r1 check-in-transformers`): teacher-forced
logits within 2e-3 and the same greedy answers. Needs torch; without it the cases are written all the same, to be
checked elsewhere. --also=.compat/transformers4 repeats the check with the packages of that folder put first.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import EXIT_ERROR, explained
from mer_r1_jax.storage import atomic_files

SCRIPT = pathlib.Path(__file__).parent / "check_in_transformers.py"

_EXPORT = flags.DEFINE_string("export", None, "a run's export, or another Hugging Face directory", required=True)
_DATA = flags.DEFINE_string("data", "", "JSON lines of held-out clips; empty = those of the export's run")
_MEDIA_ROOT = flags.DEFINE_string("media_root", "", "folder of the media paths; empty = the run's or --data's own")
_CLIPS = flags.DEFINE_integer("clips", 20, "first so many clips", lower_bound=1)
_LEAST_DISTINCT = flags.DEFINE_integer(
    "least_distinct", 0, "fewest distinct answers; fewer show too little", lower_bound=0
)
_CASES = flags.DEFINE_string("cases", "export_check.npz", "file of the cases to write")
_ALSO = flags.DEFINE_list("also", [], "folders with another transformers to check with as well")
_OUT = flags.DEFINE_string("out", "", "JSON file to write the results to")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    with explained():
        _write(pathlib.Path(_CASES.value))
    if importlib.util.find_spec("torch") is None:
        screen.say(
            f"error: torch is not installed here, so transformers cannot run. The cases are in {_CASES.value}; check "
            f"them where torch and transformers are: python {SCRIPT} {_CASES.value} {_EXPORT.value}",
            error=True,
        )
        return EXIT_ERROR
    results = [_check(folder) for folder in ("", *_ALSO.value)]
    if _OUT.value:
        with explained():
            atomic_files.write_text(pathlib.Path(_OUT.value), json.dumps(results, indent=1))
    checked = [result for result in results if result is not None]
    if len(checked) < len(results):
        return EXIT_ERROR
    agrees = all(result["agrees"] for result in checked)
    distinct = min(result["distinct_answers"] for result in checked)
    if distinct < _LEAST_DISTINCT.value:
        screen.say(f"only {distinct} distinct answers, expected {_LEAST_DISTINCT.value}: this shows too little")
    screen.say("everything agrees" if agrees else "transformers and this project do not agree on this export")
    return 0 if agrees and distinct >= _LEAST_DISTINCT.value else 1


def _write(path: pathlib.Path) -> None:
    import jax

    from mer_r1_jax.parity.export_cases import make_cases, write_cases
    from mer_r1_jax.run.held_out import open_held_out

    overrides = {
        # One row a device: logits over the whole vocabulary are held for a batch at a time.
        "eval.prompts_per_batch": jax.device_count(),
        "model.param_dtype": "float32",
        "model.compute_dtype": "float32",
    }
    held_out = open_held_out(_EXPORT.value, _DATA.value, _MEDIA_ROOT.value, _CLIPS.value, overrides)
    try:
        prober, records = held_out.prober(), held_out.records
        interleaved = held_out.interleaved_alike()
        cases = make_cases(prober.evaluator, prober.params, prober.load, records, use_audio_in_video=interleaved)
    finally:
        held_out.setup.source.close()
    write_cases(path, cases)
    screen.say(f"{path}: {cases['cases']} clips, {path.stat().st_size / 1e6:.0f} MB")


def _check(folder: str) -> dict | None:
    """Runs the standalone check, with `folder` in front of all packages; None when it could not run."""
    out = pathlib.Path(f"{_CASES.value}.result.json")
    out.unlink(missing_ok=True)
    environment = dict(os.environ)
    if folder:
        environment["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([sys.executable, SCRIPT, _CASES.value, _EXPORT.value, f"--out={out}"], env=environment, check=False)
    if not out.exists():
        return None
    result = json.loads(out.read_text())
    out.unlink()
    return result
