"""What was measured, as a table for the console and as a page of Markdown."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata

from mer_r1_jax.peers.timing import Comparison

PACKAGES = ("jax", "jaxlib", "torch", "transformers", "trl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """How many times faster than the peer a piece of work has to be (gate) and is meant to be (aim)."""

    gate: float
    aim: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: a comparison, whom it is with, and its target if it has one."""

    comparison: Comparison
    target: Target | None = None

    @property
    def verdict(self) -> str:
        """What the ratio means for the target."""
        if self.target is None:
            return ""
        ratio = self.comparison.ratio
        gate = f"gate {self.target.gate:g}x {'met' if ratio >= self.target.gate else 'MISSED'}"
        return f"{gate}, aim {self.target.aim:g}x {'met' if ratio >= self.target.aim else 'missed'}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One task.

    Attributes:
        title: of its part of the page.
        work: sentences that say what both sides did.
        rows: what was measured.
        notes: further figures, one sentence each.
    """

    title: str
    work: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()


def machine(threads: int, devices: int) -> str:
    """The processor and the versions, without anything that names this machine."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    emulated = f" as {devices} devices of XLA" if devices > 1 else ""
    return (
        f"{threads} threads of {_processor()}{emulated}; {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}; {versions}"
    )


def load() -> str:
    """How many processes wanted to run in the last minute, which says whether the machine was busy otherwise."""
    return f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "an unknown processor"


HEADER = ("work", "ours, s", "theirs, s", "theirs / ours", "lowest to highest", "tokens/s, ours and theirs", "target")


def cells(row: Row) -> tuple[str, ...]:
    """The line of a comparison."""
    one = row.comparison
    mine, other = statistics.median(one.ours), statistics.median(one.theirs)
    low, high = one.spread
    speed = f"{one.tokens / mine:,.0f} and {one.tokens / other:,.0f}" if one.tokens else ""
    return one.name, f"{mine:.3f}", f"{other:.3f}", f"{one.ratio:.2f}x", f"{low:.2f} to {high:.2f}", speed, row.verdict


def markdown(sections: Sequence[Section], *, command: str, setting: str, busy: str, repeats: int) -> str:
    """The measured part of docs/performance.md."""
    lines = [
        f"Measured by `{command}`: {setting}. Medians of {repeats} repetitions in turns (ours, theirs, ours, ...), "
        f"after warm-up; the ratio is that of the medians, its spread the lowest and highest of the {repeats} pairs. "
        f"Load while it ran: {busy}.",
    ]
    for section in sections:
        table = [HEADER, ("-",) * len(HEADER), *map(cells, section.rows)]
        lines += ["", f"### {section.title}", "", section.work, ""]
        lines += ["|" + "|".join(line) + "|" for line in table]
        lines += [f"\n{note}" for note in section.notes]
    return "\n".join(lines) + "\n"


def replaced(page: str, measured: str, start: str, end: str) -> str:
    """A page with the part between two marker lines replaced; a page without them is given both at its end."""
    if start not in page or end not in page:
        page = f"{page.rstrip()}\n\n{start}\n{end}\n" if page else f"# Speed beside the peers\n\n{start}\n{end}\n"
    before, rest = page.split(start, 1)
    return f"{before}{start}\n{measured}{end}{rest.split(end, 1)[1]}"
