"""A validation report on the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mer_r1_jax.data.problems import Problem
from mer_r1_jax.data.validation import Report
from mer_r1_jax.foreign_text import printable

MAX_NAMED = 20  # further columns, or words on no wheel, that are named; the JSON report has all
MAX_LISTED = 50  # problems of a kind that are listed; the JSON report has all


def print_report(report: Report, console: Console) -> None:
    """Prints the counts as a table, then the problems with file and line, then the verdict."""
    console.print(_counts_table(report))
    if report.unchecked:
        console.print(f"not checked: {', '.join(report.unchecked)}", highlight=False)
    for file in report.files:
        _print_left_over("columns not read", file.file, file.unread_columns, console)
        _print_left_over("words on no wheel", file.file, file.unknown_words, console)
    _print_problems("warning", report.warnings, console)
    _print_problems("error", report.errors, console)
    verdict = f"{len(report.errors)} error(s), {len(report.warnings)} warning(s)"
    style = "bold red" if report.errors else "bold green"
    console.print(f"{'not usable' if report.errors else 'ok'}: {verdict}", style=style, highlight=False)


def _counts_table(report: Report) -> Table:
    table = Table(title="what the data holds")
    table.add_column("")
    for file in report.files:
        table.add_column(printable(file.file), justify="right", overflow="fold")
    names = dict.fromkeys(name for file in report.files for name in file.counts)
    for name in names:
        table.add_row(name, *(str(file.counts.get(name, 0)) for file in report.files))
    table.add_section()
    table.add_row("min / mean / max of", style="bold")
    for name in dict.fromkeys(name for file in report.files for name in file.lengths):
        table.add_row(name, *(_spread(file.lengths.get(name)) for file in report.files))
    return table


def _spread(values: dict[str, float] | None) -> str:
    return "" if values is None else " / ".join(f"{values[name]:.4g}" for name in ("min", "mean", "max"))


def _print_left_over(what: str, file: str, counts: dict[str, int], console: Console) -> None:
    if not counts:
        return
    named = [f"{printable(name, 60)} ({count})" for name, count in list(counts.items())[:MAX_NAMED]]
    more = [f"and {len(counts) - MAX_NAMED} more"] * (len(counts) > MAX_NAMED)
    text = f"{what} in {printable(file)}: {', '.join(named + more)}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_problems(kind: str, problems: Sequence[Problem], console: Console) -> None:
    for problem in problems[:MAX_LISTED]:
        console.print(f"{kind}: {printable(problem)}", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > MAX_LISTED:
        console.print(f"... and {len(problems) - MAX_LISTED} more {kind}s (--json=FILE lists all)", highlight=False)
