"""Plans a run on hardware nobody has yet: mer-r1 plan --config=omni_7b --topology=v5p:2x2x4[,v5e:16x16]

    mer-r1 plan --config=omni_3b:h100:1 --topology=h100:1[,a100:1]
    mer-r1 plan --config=omni_3b --topology=v5e:1x1 --answering

Compiles every program of the run with the real compiler for that TPU slice, or for so many cards of a GPU, on this
machine, and prints and saves what each takes: memory by part, operations, traffic, collectives, a lower bound of its
time, and the hours of an epoch. GPUs need jax's CUDA plugin (pip install 'mer-r1-jax[plan-gpu]') and no GPU. Ends with
status 0 when the run fits everywhere, 1 when it does not (the sheet says what would mend it), 2 when nothing could be
planned.
"""

import dataclasses
import json
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.atomic_files import writing

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().", lock_config=True)
_TOPOLOGY = flags.DEFINE_list(
    "topology", None, "TPU slices as Cloud TPU spells them, such as v5p:2x2x4; GPUs with their number.", required=True
)
_OUT = flags.DEFINE_string("out", "docs/plans", "Folder the sheets are written to, as Markdown and JSON.")
_CACHE = flags.DEFINE_string("cache_dir", "plan_cache", "Folder compiled answers are kept in.")
_PROGRAMS = flags.DEFINE_list("programs", [], "Programs to compile, such as encode,update; empty = all of them.")
_ANSWERING = flags.DEFINE_bool(
    "answering", False, "Plan what the run's export takes to answer clips, eval.prompts_per_batch at a time."
)
_OTHERS = flags.DEFINE_bool("try_others", False, "Compile the RL update under other remat settings and batches too.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --config.rl.prompts_per_step=32")
    from mer_r1_jax.planning import without_devices

    without_devices()
    from mer_r1_jax.planning.markdown import markdown
    from mer_r1_jax.planning.planner import plan
    from mer_r1_jax.run.inputs import FOLDERS, require_files

    with explained():
        config = from_mapping(_CONFIG.value)
        require_files(config, FOLDERS)
        fits = True
        for topology in _TOPOLOGY.value:
            sheet = plan(
                config,
                topology,
                cache_dir=pathlib.Path(_CACHE.value),
                only=_PROGRAMS.value,
                try_others=_OTHERS.value,
                answering=_ANSWERING.value,
                progress=screen.say,
            )
            sheet = dataclasses.replace(sheet, command=_command(topology))
            name = f"{sheet.config.name}_{topology.replace(':', '_')}"
            folder = pathlib.Path(_OUT.value)
            with writing("the plan", folder):
                folder.mkdir(parents=True, exist_ok=True)
            page = markdown(sheet)
            atomic_files.write_text(folder / f"{name}.md", page)
            atomic_files.write_text(folder / f"{name}.json", json.dumps(sheet.to_json(), indent=1) + "\n")
            screen.say(f"\n{page}\nsaved as {folder / name}.md and .json")
            fits &= sheet.fits
        return 0 if fits else 1


def _command(topology: str) -> str:
    """The command that makes one sheet, with what was set on this one's command line."""
    kept = [word for word in sys.argv[1:] if not word.lstrip("-").startswith(("topology", "out", "cache_dir"))]
    return " ".join(["mer-r1 plan", *kept, f"--topology={topology}"])
