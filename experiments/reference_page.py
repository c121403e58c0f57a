"""Writes docs/reference.md: every setting, from the schema, and every metric; a test holds that the page is up to date.

python experiments/reference_page.py [--out=docs/reference.md]
"""

import pathlib
import sys

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.config.settings import Setting, sections, settings
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.training.metric_names import METRICS

_OUT = flags.DEFINE_string("out", "docs/reference.md", "Where the page goes.")

INTRODUCTION = """\
# Reference

Made from `mer_r1_jax/config/schema.py` and `mer_r1_jax/training/metric_names.py`. To change it, change them and run
`python experiments/reference_page.py`.

## Settings

Each is set in a configuration file (`config.rl.num_generations = 8`) or on the command line
(`--config.rl.num_generations=8`), with the heading before the field's name. `mer-r1 train --help` prints the same list,
`--print_config` the values that a run would use. Names and values outside the stated bounds are refused, with the
nearest known name or with what is allowed.
"""


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --out=docs/reference.md")
    with explained():
        atomic_files.write_text(pathlib.Path(_OUT.value), page())
    screen.say(_OUT.value)
    return 0


def page() -> str:
    """The whole page, as Markdown."""
    parts = [INTRODUCTION]
    about = sections()
    groups: dict[str, list[Setting]] = {}
    for setting in settings():
        groups.setdefault(setting.name.rpartition(".")[0], []).append(setting)
    for section, group in groups.items():
        what = about[section]
        parts.append(f"### {section or 'The run'}\n\n{' '.join(what.split())}\n\n{_table(group)}")
    rows = [f"| {'<br>'.join(f'`{name}`' for name in names)} | {_cell(what)} |" for names, what in METRICS.items()]
    parts.append(
        "## Metrics\n\nIn `metrics.jsonl` and TensorBoard, under TRL's names where TRL has one. `{a,b}` stands for one "
        "of several names, `<...>` for any.\n\n" + "\n".join(["| name | meaning |", "|-|-|", *rows]) + "\n"
    )
    return "\n".join(parts)


def _table(group: list[Setting]) -> str:
    rows = []
    for setting in group:
        default = f"`{_cell(setting.default)}`" if setting.default else "empty"
        cells = (f"`{setting.name.rpartition('.')[2]}`", _cell(setting.kind), default, _cell(setting.comment))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(["| setting | takes | default | meaning |", "|-|-|-|-|", *rows]) + "\n"


def _cell(text: str) -> str:
    """Text within a table, where a pipe would end the cell; outside code spans `*` and `<` would be markup."""
    text = text.replace("|", r"\|")
    return text if "`" in text else text.replace("*", r"\*").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(app.run(main))
