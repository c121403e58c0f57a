"""`mer-r1 COMMAND [FLAGS]`: finds the command, answers `--help`, and hands over."""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import sys
from collections.abc import Sequence
from types import ModuleType

from absl import app, flags

from mer_r1_jax import __version__, screen
from mer_r1_jax.cli import EXIT_ERROR, PRINT_CONFIG, parse_flags, show
from mer_r1_jax.config.settings import settings

# Name -> what it is for, in the order in which somebody new needs them.
COMMANDS = {
    "make-synthetic": "makes the synthetic world: clips, records, tokenizer",
    "convert": "makes data files of MER2025, or of any table of clips with labels",
    "validate": "checks records and clips before a run",
    "train": "trains: SFT, then RL, evaluation, export and report",
    "infer": "answers about a clip: reasoning, emotion words, probabilities",
    "serve": "opens a page on this machine that shows what a model answers",
    "evaluate": "answers and scores benchmarks, slow and fast",
    "evaluate-mme": "MME-Emotion, with every setting of its judge",
    "score": "scores a file of predictions as MER-UniBench does",
    "probe": "shows which part of a clip a model uses; compares two evaluations clip by clip",
    "lab": "tries arms on a tiny policy, in two minutes",
    "study": "runs and judges the registered study",
    "ablate": "compares arms over seeds, in one table",
    "tables": "prints the paper's tables with your numbers beside its own",
    "export": "writes a checkpoint as a Hugging Face model",
    "certify": "looks at a model before it is trusted: files, tokenizer, numbers, answers",
    "export-check": "checks that transformers computes what an export computes here",
    "check-in-transformers": "the half of export-check that needs nothing of this project",
    "parity": "runs this port on the tensors of a transformers processor",
    "plan": "compiles a run's programs for a TPU slice or GPUs and says what they take",
    "bench": "measures our speed beside PyTorch's",
    "convert-labels": "turns pickled label files into CSV without running them",
}
ALONE = "check-in-transformers"  # runs without this package as well, so it reads its arguments itself
EXIT_USAGE = 1  # arguments that do not go together
_HELP_CHOICES = re.compile(r"^<[^>]*>: ")  # absl repeats the choices in the help
_KINDS = {"comma": "LIST", "multi": "TEXT", "string": "TEXT"}  # first word of absl's name for a type
HELP = ("--help", "-help", "-h")


def main(words: Sequence[str] | None = None) -> int:
    """The console command.

    Args:
        words: what stands after `mer-r1`; those of this process when None.

    Returns:
        The exit status; a command that runs leaves through SystemExit with its own.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in (*HELP, "help"):
        show(overview())
        return 0 if words else EXIT_ERROR
    if words[0] == "--version":
        show(f"mer-r1-jax {__version__}")
        return 0
    command = words[0].replace("_", "-")
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}."
        screen.say(f"error: mer-r1 {words[0]}: no such command; {meant} `mer-r1 --help` lists them all", error=True)
        return EXIT_ERROR
    sys.argv = [f"mer-r1 {command}", *words[1:]]
    return run(command)


def run(command: str) -> int:
    """Runs one command on the arguments in sys.argv; what `experiments/<command>.py` calls.

    Returns:
        0 after `--help`. Otherwise the process leaves through SystemExit with the command's exit status.
    """
    module = importlib.import_module(f"mer_r1_jax.commands.{command.replace('-', '_')}")
    if command == ALONE:
        return module.main(sys.argv)
    own = sys.argv[1 : sys.argv.index("--") if "--" in sys.argv else None]
    if any(word in HELP for word in own):
        show(described(module))
        return 0
    return app.run(functools.partial(_run, command, module), flags_parser=parse_flags)


def _run(command: str, module: ModuleType, argv: list[str]) -> int:
    try:
        return module.main(argv) or 0
    except app.UsageError as error:
        screen.say(f"error: {error}; `mer-r1 {command} --help` lists the flags", error=True)
        return EXIT_USAGE


def overview() -> str:
    """What `mer-r1 --help` prints."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: mer-r1 COMMAND [FLAGS]",
            "",
            "MER-R1 in JAX: teaches a multimodal language model to name the emotions in a clip, and to say why.",
            "",
            *(f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()),
            "",
            "`mer-r1 COMMAND --help` lists a command's flags. To begin: mer-r1 train --config=synthetic:smoke",
        ]
    )


def described(module: ModuleType) -> str:
    """What `mer-r1 COMMAND --help` prints: its docstring, its flags and, where it takes --config, every setting."""
    lines = [(module.__doc__ or "").strip(), "", "Flags:"]
    own = [flag for flag in flags.FLAGS.flags_by_module_dict()[module.__name__] if "." not in flag.name]
    for flag in sorted(own, key=lambda flag: flag.name):
        lines += [f"  --{flag.name}{_taken(flag)}", f"      {_HELP_CHOICES.sub('', flag.help)}"]
    if any(flag.name == "config" for flag in own):
        lines += [f"  {PRINT_CONFIG}", "      Print the whole configuration as it would be used, as JSON, and end."]
        lines += ["", "Settings of the configuration, with their defaults:"]
        for setting in settings():
            lines += [f"  --config.{setting.name}={setting.default}", f"      {setting.kind}: {setting.comment}"]
    return "\n".join(lines)


def _taken(flag: flags.Flag) -> str:
    """What a flag takes and what it is when left out."""
    if flag.boolean:
        return " (default: on)" if flag.default else ""
    choices = "|".join(filter(None, getattr(flag.parser, "enum_values", None) or ()))
    if flag.default is not None:
        default = (flag.default_as_str or "").strip("'") or "empty"
        kind = flag.flag_type().split(" ")[0]
        return f"={choices or _KINDS.get(kind, kind.upper())} (default: {default})"
    # absl keeps no other record of what is required than the validator it registers.
    required = any("other than None" in validator.message for validator in flag.validators)
    return f"={choices or 'FILE.py|NAME' if flag.name == 'config' else choices or 'TEXT'}" + " (required)" * required
