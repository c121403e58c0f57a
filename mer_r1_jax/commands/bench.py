"""Measures our speed beside the PyTorch peers': mer-r1 bench [--tasks=text,omni] [--out=PAGE.md]

The same work on the same weights, on the same cores, in turns within one process: generation, policy update and whole
GRPO step of a text model beside transformers and TRL; one MER-R1 step on clips beside a plain torch loop around
transformers' Thinker. Prints a table; --out also writes it into a page of Markdown, between two marker lines. Takes
about five minutes and needs torch and trl (pip install -e '.[test]').

With --platform=gpu: one MER-R1 step of 3B at its real size, on one card of 80 GB, and the same torch loop on that card
after it, since each fills it; ten minutes should do (the torch side has not been run to its end yet). --out and the
figures are written even where one side fails.

Exit code 0 when every gate is met, 1 when one is not (or a side on the card failed), 2 when nothing could be measured.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.storage import atomic_files

_TASKS = flags.DEFINE_list("tasks", ["text", "omni"], "What to measure: text, omni.")
_REPEATS = flags.DEFINE_integer(
    "repeats", None, "Repetitions of each side, 9 unless given; on a card 3, and one step of torch's.", lower_bound=1
)
_THREADS = flags.DEFINE_integer("threads", 2, "Threads (and cores) of each side.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
    "devices",
    2,
    "Devices our side cuts its threads into; training on a CPU has one unless XLA_FLAGS says otherwise.",
    lower_bound=1,
)
_PLATFORM = flags.DEFINE_enum(
    "platform", "cpu", ["cpu", "gpu"], "cpu: --tasks, on cores; gpu: one step of --size on a card."
)
_SIZE = flags.DEFINE_string("size", "3b", "With --platform=gpu, the job: 3b, or tiny to try the command out.")
_SECONDS = flags.DEFINE_integer("seconds", 400, "With --platform=gpu, the most either side may take.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "", "Page to write the tables into, such as docs/performance.md.")
_CPU_REPEATS, _CARD_REPEATS = 9, 3
_NEEDED = ("torch", "trl", "datasets")

START, END = "<!-- measured: start -->", "<!-- measured: end -->"
CARD_START, CARD_END = "<!-- measured on a card: start -->", "<!-- measured on a card: end -->"


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    unused = ("tasks", "threads", "devices") if _PLATFORM.value == "gpu" else ("size", "seconds")
    if given := [f"--{name}" for name in unused if flags.FLAGS[name].present]:
        raise app.UsageError(f"{', '.join(given)} with --platform={_PLATFORM.value}, which does not look at it")
    if _PLATFORM.value == "gpu":
        return _on_a_card(_REPEATS.value or _CARD_REPEATS)
    repeats = _REPEATS.value or _CPU_REPEATS
    from mer_r1_jax.peers import tasks

    if problem := _problem(tasks.TASKS):
        screen.say(f"error: {problem}", error=True)
        return 2
    _limit(_THREADS.value, _DEVICES.value)
    from mer_r1_jax.peers import page

    settings = tasks.Settings(repeats=repeats, threads=_THREADS.value)
    sections = []
    for name in _TASKS.value:
        sections.append(tasks.run(name, settings))
        for row in sections[-1].rows:
            screen.say(" | ".join(page.cells(row)))
        screen.say("\n".join(sections[-1].notes))
    chosen = {"repeats": repeats, "threads": _THREADS.value, "devices": _DEVICES.value}
    measured = page.markdown(
        sections,
        command=f"mer-r1 bench --tasks={','.join(_TASKS.value)} "
        + " ".join(f"--{name}={value}" for name, value in chosen.items()),
        setting=page.machine(_THREADS.value, _DEVICES.value),
        busy=page.load(),
        repeats=repeats,
    )
    screen.say(f"\n{measured}")
    _write(measured, START, END)
    rows = [row for section in sections for row in section.rows if row.target]
    return 0 if all(row.comparison.ratio >= row.target.gate for row in rows) else 1


def _on_a_card(repeats: int) -> int:
    """Both sides in processes of their own, and the page of what they measured; the exit code."""
    from mer_r1_jax.peers import one_side, real_page
    from mer_r1_jax.peers.real_size import SIZES

    problem = f"--size={_SIZE.value}: expected one of {', '.join(SIZES)}" if _SIZE.value not in SIZES else ""
    if not problem and importlib.util.find_spec("torch") is None:
        problem = "torch not installed: the other side needs it; pip install torch"
    if problem:
        screen.say(f"error: {problem}", error=True)
        return 2
    failed, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for side in one_side.SIDES:
            arguments = [side, _SIZE.value, str(repeats if side == "ours" else 1), folder]
            try:
                # The module sets what jax and torch read at their start, so a process of its own begins with it.
                command = [sys.executable, "-m", "mer_r1_jax.peers.one_side", *arguments]
                code = subprocess.run(command, timeout=_SECONDS.value, check=False).returncode
                told = f"ended with exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                told = f"was stopped after --seconds={_SECONDS.value}"
            # A step of 3B costs minutes of a lent card: what one side has is worth a page without the other's.
            if told:
                failed.append(side)
                screen.say(f"error: the side {side!r} {told}; what it had measured is kept", error=True)
            path = pathlib.Path(folder) / f"{side}.json"
            figures[side] = json.loads(path.read_text()) if path.exists() else {}
    if not any("steps" in one for one in figures.values()):
        return 2  # the sides have said why
    command = f"mer-r1 bench --platform=gpu --size={_SIZE.value} --repeats={repeats}"
    measured = real_page.markdown(SIZES[_SIZE.value], figures["ours"], figures["theirs"], command=command)
    screen.say(f"\n{measured}")
    _write(measured, CARD_START, CARD_END)
    if _OUT.value:
        with explained():
            atomic_files.write_json(pathlib.Path(_OUT.value).with_suffix(".json"), figures)
    return 1 if failed else 0


def _write(measured: str, start: str, end: str) -> None:
    """Puts the tables into the page of --out, between two marker lines."""
    if not _OUT.value:
        return
    from mer_r1_jax.peers import page

    out = pathlib.Path(_OUT.value)
    text = out.read_text(encoding="utf-8") if out.exists() else ""
    with explained():
        atomic_files.write_text(out, page.replaced(text, measured, start, end))


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
