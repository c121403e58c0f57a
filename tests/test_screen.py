"""Text that is not ours on its way to people: shown whole, obeyed by nobody, through one place."""

import ast
import base64
import io
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import xml.etree.ElementTree

import pytest
from rich.table import Table
from support.terminal import in_a_terminal

from mer_r1_jax import screen
from mer_r1_jax.evaluation.figures import Line, Panel, draw
from mer_r1_jax.evaluation.report_kit import markdown, render_page, text_table
from mer_r1_jax.foreign_text import for_markdown, json_text, printable, would_run_in_a_spreadsheet
from mer_r1_jax.training.progress import Progress

ROOT = pathlib.Path(__file__).parents[1]
SHOWN = "a [v2] [/1] [bold]b[/bold] :smile: $x^$"
EVIL = f"{SHOWN} \x1b[2J\x1b]0;owned\x07 \x9b31m \u202eback \u2028 \ud83d \x00\r\x7f\ufffe"
OBEYED = "\x1b\x07\x00\r\x7f\x9b\u202e\u2028\ud83d\ufffe"


def is_clean(text):
    return not set(OBEYED) & set(text)


def test_printable_keeps_letters_of_every_script_and_writes_out_the_rest():
    kept = "clip [v2].mp4 愤怒 سعيد می\u200cخواهم é 👩\u200d🚀 \u00a0 $ % \\"
    assert printable(kept) == kept
    assert printable("a\x1b[2J\u202e\ud83d\n\t") == r"a\x1b[2J\u202e\ud83d\n\t"
    assert printable("a\n\tb\r", one_line=False) == "a\n\tb\\r"
    assert printable("x" * 30, 10) == "x" * 10 + "… (20 characters more)"
    assert is_clean(printable(EVIL)) and printable(EVIL).isprintable() and printable(None) == "None"


# A shell has what it starts in the background ignore Ctrl-C, and tests started like that hand it on to their children.
HEEDED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def test_ctrl_c_is_no_bug_to_show_and_ends_a_command_as_the_signal_does():
    program = "from mer_r1_jax import screen; screen.guard_terminal(); import os; os.kill(os.getpid(), 2); input()"
    command = [sys.executable, "-c", HEEDED + program]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (-2, "interrupted\n")


def test_ctrl_c_in_a_callback_of_the_garbage_collection_is_not_lost():
    program = """
import gc, os, signal, time
from mer_r1_jax import cli, screen

screen.guard_terminal()
for _ in range(2):  # as where one command calls another
    cli.keep_interrupts()
came = []


def callback(phase, info):
    if not came:
        came.append(os.kill(os.getpid(), signal.SIGINT))


gc.callbacks.append(callback)
gc.collect()
time.sleep(20)
"""
    done = subprocess.run([sys.executable, "-c", HEEDED + program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-2, "interrupted\n")


def test_consoles_tables_lines_and_bars_show_text_as_it_is(capsys):
    console = screen.console()
    table = Table(EVIL, "n", title=EVIL)
    table.add_row(EVIL, "1")
    console.print(EVIL, style="bold")
    console.print("long " * 60)
    console.print(table)
    screen.say(EVIL, 3)
    screen.say(EVIL, error=True)
    with screen.bar(desc=EVIL, total=1) as bar:
        bar.set_description(EVIL)
        bar.set_postfix_str(EVIL)
    out, err = capsys.readouterr()
    assert is_clean(out) and is_clean(err.replace("\r", ""))
    lines = out.splitlines()
    assert lines[0].startswith(SHOWN) and lines[1] == "long " * 60 and lines[-1].startswith(SHOWN)
    assert SHOWN in err and r"\x1b]0;owned\x07" in err


def test_on_a_terminal_only_styles_of_ours_are_sent():
    """In a real terminal, where Rich does send escapes."""
    program = (
        "import logging as early\nfrom absl import logging\nfrom mer_r1_jax import screen\n"
        f"evil = {EVIL!r}\nscreen.guard_terminal()\nscreen.console().print(evil, style='bold')\nscreen.say(evil)\n"
        "early.getLogger('x').warning('%s', evil)\nlogging.use_absl_handler()\nlogging.warning('%s', evil)\n"
        "raise RuntimeError(evil)\n"
    )
    environment = os.environ | {"COLUMNS": "200", "PYTHONIOENCODING": "ascii"}
    code, got = in_a_terminal([sys.executable, "-c", program], environment, ROOT)
    text = got.decode()
    assert code == 1 and "RuntimeError: a [v2]" in text and "Traceback" in text
    assert "\x1b[1m" in text and "\x1b" not in re.sub(r"\x1b\[[0-9;]*m", "", text)  # bold on, bold off
    assert "\x1b]" not in text and "\x1b[2J" not in text and text.count(r"\x1b[2J\x1b]0;owned\x07") >= 5


def test_logs_hold_text_and_no_forged_lines(tmp_path):
    handler = screen.log_file(tmp_path / "log.txt")
    logger = logging.getLogger("test_screen")
    logger.addHandler(handler)
    try:
        logger.warning("clip %s: %s", EVIL, "x\n2030-01-01 00:00:00,000 ERROR root: forged")
        try:
            raise ValueError(EVIL + "\n2030-01-01 forged")
        except ValueError:
            logger.exception("it failed")
    finally:
        logger.removeHandler(handler)
        handler.close()
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert is_clean(text) and text.count(SHOWN) == 2 and "Traceback" in text
    assert len([line for line in text.splitlines() if not line.startswith("  ")]) == 2


def test_notes_beside_the_progress_are_text():
    stream = io.StringIO()
    with Progress("rl", 2, stream=stream) as progress:
        progress.note(EVIL)
    assert is_clean(stream.getvalue()) and stream.getvalue().startswith(SHOWN)


def test_json_for_a_terminal_is_json():
    value = {"text": EVIL + "愤怒\U000e0001", "rows": [1, None]}
    for indent in (None, 1):
        written = json_text(value, indent)
        assert is_clean(written) and "愤怒" in written and json.loads(written) == value


def test_a_log_that_finds_no_room_says_so_once_and_hides_no_other_error(capsys):
    handler = screen.log_file(pathlib.Path("/dev/full"))
    with pytest.raises(ValueError, match="what ended the run"):
        try:
            for text in ("one", "two"):
                handler.handle(logging.makeLogRecord({"msg": text}))
            raise ValueError("what ended the run")
        finally:
            handler.close()
    assert capsys.readouterr().err.count("the log could not be written: /dev/full: No space left on device") == 1


@pytest.mark.slow
def test_orbaxs_tracebacks_go_to_the_log_file_where_there_is_one(tmp_path):
    """A save that finds no room, in a process of its own: what the terminal shows is one message."""
    program = textwrap.dedent("""
        import logging, pathlib, resource, signal, sys
        import numpy as np
        from absl import logging as absl_logging
        from mer_r1_jax import screen
        from mer_r1_jax.cli import explained
        from mer_r1_jax.storage.checkpoints import Checkpoints
        absl_logging.use_absl_handler()  # as app.run does
        screen.guard_terminal()
        folder, kept = pathlib.Path(sys.argv[1]), len(sys.argv) > 2
        if kept:
            logging.getLogger().addHandler(screen.log_file(folder / "log.txt"))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = 1 << 16  # room for the log, none for the arrays
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        noise = np.random.default_rng(0).random(limit)
        with explained():
            logging.getLogger("mer_r1_jax.x").error("one of ours", exc_info=ValueError("it"))
            Checkpoints(folder / "checkpoints").save(1, {"noise": noise}, {})
    """)

    def ended(*arguments):
        words = [sys.executable, "-c", program, *map(str, arguments)]
        environment = dict(os.environ, JAX_PLATFORMS="cpu")
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)

    told = ended(tmp_path / "a")  # no log: what is not kept is shown
    assert told.returncode == 2 and "/orbax/" in told.stderr and "could not be saved" in told.stderr, told.stderr
    (tmp_path / "b").mkdir()
    told = ended(tmp_path / "b", "kept")
    assert told.returncode == 2 and "error: the checkpoint of step 1 could not be saved" in told.stderr, told.stderr
    assert "/orbax/" not in told.stderr and "_SignalingThread" not in told.stderr
    assert "ValueError: it" in told.stderr  # others' tracebacks are shown as ever
    assert "/orbax/" in (tmp_path / "b/log.txt").read_text()


def test_pages_and_figures_show_text(tmp_path):
    curves = Line([0, 1], [0, 1], EVIL[:60], "red"), Line([0, 1], [1, 0], "$\\frac$ \x1b", "blue")
    panels = [Panel(EVIL[:60], curves, ((0.5, EVIL[:60]),))]
    table = text_table(["row", EVIL], [[f"{EVIL}<script>|", "1"]], title="A table", note="", strong=[0])
    page = render_page(
        "ablation/ablation_report.html.jinja",
        setting=EVIL,
        paragraphs=[EVIL + "<script>alert(1)</script>"],
        figure=draw(panels, 1),
        tables=[table],
        command=EVIL,
        plan=json.dumps({"x": EVIL}),
    )
    assert is_clean(page) and "<script>" not in page and SHOWN in page
    page.encode()
    written = markdown(table)
    assert is_clean(written) and len(written.splitlines()) == 7
    assert written.endswith("\\<script>\\|** | **1** |\n")
    picture = base64.b64decode(re.search('base64,([^"]+)', page).group(1))
    assert is_clean(picture.decode()) and xml.etree.ElementTree.fromstring(picture).tag.endswith("svg")


def test_markdown_and_spreadsheets():
    shown = for_markdown("a|b `c` **d** [e](http://f) <img src=x> \n# g")
    assert "\n" not in shown and shown.startswith(r"a\|b \`c\` \*\*d\*\* \[e\](http://f) \<img src=x\>")
    assert all(map(would_run_in_a_spreadsheet, ("=1+1", " @SUM(1)", "+cmd|'/C calc'!A0", "-2+cmd|x", "\t=A1")))
    assert not any(map(would_run_in_a_spreadsheet, ("-3g5yACwYnA_10", "-0.5", "+1", "sad", "", "a=b")))


# Where text reaches people by another way, and why that is right.
OTHER_WAYS = {
    "mer_r1_jax/screen.py": "the one place",
    "mer_r1_jax/commands/check_in_transformers.py": "runs where this project is not installed",
}
MAKERS = {"print", "print_exc", "Console", "tqdm", "trange", "StreamHandler", "FileHandler", "basicConfig"}
OURS_ONLY = {"rich", "rich.markup", "rich.text", "tqdm", "tqdm.auto"}  # modules


def other_ways(tree):
    """Lines of a module that make or print something for people to see."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in OURS_ONLY:
            yield node.lineno, node.module
        elif isinstance(node, ast.Import) and OURS_ONLY & {alias.name for alias in node.names}:
            yield node.lineno, "import"
        elif isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if called in MAKERS and not (isinstance(node.func, ast.Attribute) and called == "print"):
                yield node.lineno, called
            if any(word.arg == "markup" and getattr(word.value, "value", None) for word in node.keywords):
                yield node.lineno, "markup"


def test_nothing_is_shown_by_another_way():
    """Consoles, prints, bars and log handlers are made in one module; markup is turned on nowhere."""
    modules = [path for folder in ("mer_r1_jax", "experiments") for path in (ROOT / folder).rglob("*.py")]
    names = {str(path.relative_to(ROOT)): path for path in modules if not {"peers", "kernels"} & set(path.parts)}
    assert len(names) > 150 and set(OTHER_WAYS) < set(names)
    found = {name: list(other_ways(ast.parse(path.read_text(encoding="utf-8")))) for name, path in names.items()}
    assert {name for name, ways in found.items() if ways} == set(OTHER_WAYS)
