"""Probes what a policy uses, and compares evaluations clip by clip.

mer-r1 probe swap --model=RUN[,RUN...] [--what=video,audio,subtitle,reasoning] [--data=...] [--out=...]
    Answers held-out clips again with another clip's frames, sound, subtitle or reasoning. Several models are seeds of
    one policy: their scores are averaged for each clip.
mer-r1 probe compare --before=A.samples.jsonl[,B...] --after=C.samples.jsonl[,D...] [--out=...]
    Compares samples files of a run's eval folder (the n-th before with the n-th after; a single one stands for all).

Differences are in points (hundredths), intervals are 95% bootstraps over clips; a difference is clear when its interval
excludes zero.
"""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.storage import atomic_files

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mer_r1_jax.evaluation.probes import Swap
    from mer_r1_jax.evaluation.sample_comparison import Comparison

PARTS = ("video", "audio", "subtitle", "reasoning")

_MODEL = flags.DEFINE_list("model", [], "swap: runs' folders, exports or Hugging Face directories; several are seeds")
_WHAT = flags.DEFINE_list("what", list(PARTS), "swap: " + ", ".join(PARTS))
_DATA = flags.DEFINE_string("data", "", "swap: JSON lines of held-out clips; empty = those of the run")
_MEDIA_ROOT = flags.DEFINE_string("media_root", "", "swap: folder of the media paths; empty = the run's or --data's")
_LIMIT = flags.DEFINE_integer("limit", 0, "swap: first so many clips; 0 = as many as the run evaluated", 0)
_BEFORE = flags.DEFINE_list("before", [], "compare: samples files, one a seed")
_AFTER = flags.DEFINE_list("after", [], "compare: samples files, one a seed")
_SEED = flags.DEFINE_integer("seed", 0, "of the partners and of the intervals", 0, (1 << 31) - 1)
_OUT = flags.DEFINE_string("out", "", "JSON file to write the results to")


def main(argv: list[str]) -> None:
    commands = {"swap": _swap, "compare": _compare}
    if len(argv) != 2 or argv[1] not in commands:
        raise app.UsageError(f"expected one of {', '.join(commands)}, got {argv[1:]}")
    with explained():
        if _OUT.value:
            from mer_r1_jax.run.policy import refuse_in_run

            refuse_in_run(_OUT.value)
        results = commands[argv[1]](screen.console())
        if _OUT.value:
            atomic_files.write_json(pathlib.Path(_OUT.value), results)


def _compare(console: Console) -> dict:
    if not _BEFORE.value or not _AFTER.value:
        raise app.UsageError("compare: expected samples files in --before and --after")
    from mer_r1_jax.evaluation.sample_comparison import compare_samples

    result = compare_samples(_BEFORE.value, _AFTER.value, _SEED.value)
    console.print(_table(result.comparisons, "before", "after"))
    for side, gap in result.gaps.items():
        console.print(f"slow minus fast F1 {side}: {gap}", highlight=False)
    for side, lengths in result.lengths.items():
        distinct = ", ".join(map(str, lengths["distinct_slow_answers"]))
        console.print(
            f"{side}: {lengths['slow_tokens']:.1f} tokens a slow answer, {lengths['reasoning_words']:.1f} words of "
            f"reasoning, {distinct} distinct slow answers",
            highlight=False,
            soft_wrap=True,
        )
    if result.unscorable:
        console.print(f"{result.unscorable} clips have a truth on no wheel and are in no score", highlight=False)
    if result.reasoning_kept is not None:
        console.print(f"reasoning is {result.reasoning_kept:.0%} as long as before", highlight=False)
    return {"before": _BEFORE.value, "after": _AFTER.value, **result.as_json()}


def _swap(console: Console) -> dict:
    if not _MODEL.value:
        raise app.UsageError("swap: expected folders in --model")
    if unknown := [part for part in _WHAT.value if part not in PARTS]:
        raise app.UsageError(f"--what: got {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    from mer_r1_jax.evaluation.sample_comparison import pooled

    found: dict[str, list[Swap]] = {part: [] for part in _WHAT.value}
    for model in _MODEL.value:
        for swap in _swaps_of(model, console):
            found[swap.part].append(swap)
    together = {part: [pooled(same) for same in _by_score(swaps)] for part, swaps in found.items()}
    for part, comparisons in together.items():
        console.print(_table(comparisons, f"own {part}", f"another clip's {part}"))
        for model, swap in zip(_MODEL.value, found[part], strict=True):
            _note(console, model, swap)
    return {
        "models": _MODEL.value,
        "seed": _SEED.value,
        "together": {part: [comparison.as_json() for comparison in same] for part, same in together.items()},
        "by_model": {part: [swap.as_json() for swap in swaps] for part, swaps in found.items()},
    }


def _swaps_of(model: str, console: Console) -> list[Swap]:
    from mer_r1_jax.evaluation.probes import swap_modality, swap_reasoning
    from mer_r1_jax.run.held_out import open_held_out

    held_out = open_held_out(model, _DATA.value, _MEDIA_ROOT.value, _LIMIT.value)
    try:
        prober = held_out.prober(_SEED.value)
        before = prober.answers(held_out.records)
        console.print(
            f"{model}: {len(before.records)} clips, {len(before.skipped)} unusable, "
            f"{len(before.records) - len(before.scored)} with a truth on no wheel",
            highlight=False,
        )
        swaps = []
        for part in _WHAT.value:
            swaps.append(swap_reasoning(prober, before) if part == "reasoning" else swap_modality(prober, before, part))
            console.print(f"  {part}: {swaps[-1].comparisons[0].difference}", highlight=False)
        return swaps
    finally:
        held_out.setup.source.close()


def _by_score(swaps: list[Swap]) -> list[tuple[Comparison, ...]]:
    return list(zip(*(swap.comparisons for swap in swaps), strict=True))


def _table(comparisons: list[Comparison] | tuple[Comparison, ...], before: str, after: str) -> Table:
    from rich.table import Table

    from mer_r1_jax.evaluation.bootstrap import POINTS, signed

    seeds = max(len(comparison.by_seed) for comparison in comparisons) > 1
    table = Table("score", before, after, "points", "95% interval", "clear", *["seeds one by one"] * seeds, "clips")
    for comparison in comparisons:
        difference = comparison.difference
        table.add_row(
            comparison.name,
            *(f"{POINTS * scores.mean():.1f}" for scores in (comparison.before, comparison.after)),
            signed(difference.points),
            difference.interval,
            "yes" if difference.is_clear else "no",
            *[", ".join(signed(one.points) for one in comparison.by_seed)] * seeds,
            str(difference.clips),
        )
    return table


def _note(console: Console, model: str, swap: Swap) -> None:
    left_out = ", ".join(f"{count} {reason}" for reason, count in swap.left_out.items() if count) or "none"
    console.print(
        f"{model}: left out: {left_out}; {swap.sharing} partners share a category, {swap.unchanged} changed nothing",
        soft_wrap=True,
        highlight=False,
    )
    if swap.facts:
        console.print(f"  {json.dumps(swap.facts)}", highlight=False, soft_wrap=True)
