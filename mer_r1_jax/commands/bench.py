"""Measures our speed beside the PyTorch peers': mer-r1 bench [--tasks=text,omni] [--out=PAGE.md]

The same work on the same weights, on the same cores, in turns within one process: generation, policy update and whole
GRPO step of a text model beside transformers and TRL; one MER-R1 step on clips beside a plain torch loop around
transformers' Thinker. Prints a table; --out also writes it into a page of Markdown, between two marker lines. Takes
about five minutes and needs torch and trl (pip install -e '.[test]').

Exit code 0 when every gate is met, 1 when one is not, 2 when nothing could be measured.
"""

import importlib.util
import os
import pathlib

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.storage import atomic_files

_TASKS = flags.DEFINE_list("tasks", ["text", "omni"], "What to measure: text, omni.")
_REPEATS = flags.DEFINE_integer("repeats", 9, "Repetitions of each side.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "Threads (and cores) of each side.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
    "devices",
    2,
    "Devices our side cuts its threads into; training on a CPU has one unless XLA_FLAGS says otherwise.",
    lower_bound=1,
)
_OUT = flags.DEFINE_string("out", "", "Page to write the tables into, such as docs/performance.md.")
_NEEDED = ("torch", "trl", "datasets")

START, END = "<!-- measured: start -->", "<!-- measured: end -->"


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    from mer_r1_jax.peers import tasks

    if problem := _problem(tasks.TASKS):
        screen.say(f"error: {problem}", error=True)
        return 2
    _limit(_THREADS.value, _DEVICES.value)
    from mer_r1_jax.peers import page

    settings = tasks.Settings(repeats=_REPEATS.value, threads=_THREADS.value)
    sections = []
    for name in _TASKS.value:
        sections.append(tasks.run(name, settings))
        for row in sections[-1].rows:
            screen.say(" | ".join(page.cells(row)))
        screen.say("\n".join(sections[-1].notes))
    chosen = {"repeats": _REPEATS.value, "threads": _THREADS.value, "devices": _DEVICES.value}
    measured = page.markdown(
        sections,
        command=f"mer-r1 bench --tasks={','.join(_TASKS.value)} "
        + " ".join(f"--{name}={value}" for name, value in chosen.items()),
        setting=page.machine(_THREADS.value, _DEVICES.value),
        busy=page.load(),
        repeats=_REPEATS.value,
    )
    screen.say(f"\n{measured}")
    if _OUT.value:
        out = pathlib.Path(_OUT.value)
        text = out.read_text(encoding="utf-8") if out.exists() else ""
        with explained():
            atomic_files.write_text(out, page.replaced(text, measured, START, END))
    rows = [row for section in sections for row in section.rows if row.target]
    return 0 if all(row.comparison.ratio >= row.target.gate for row in rows) else 1


def _problem(known: tuple[str, ...]) -> str:
    """What keeps the bench from running, and how to mend it; "" when nothing does."""
    if unknown := [task for task in _TASKS.value if task not in known]:
        return f"--tasks: got {', '.join(unknown)}, expected some of {', '.join(known)}"
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        return f"{', '.join(missing)} not installed: the peers need them; pip install -e '.[test]'"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _THREADS.value > cores or (_THREADS.value < cores and not hasattr(os, "sched_setaffinity")):
        return f"--threads={_THREADS.value} on {cores} usable cores: both sides are to have a core a thread"
    if _DEVICES.value < 1:
        return f"--devices={_DEVICES.value}: expected at least 1"
    return ""


def _limit(threads: int, devices: int) -> None:
    """Gives both sides the same cores; has to come before jax and torch start their threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # first calls are timed, compiling included
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
