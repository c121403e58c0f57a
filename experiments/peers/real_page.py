"""What was measured on a card, as a page of Markdown: seconds of both sides, ratios, what ours reaches of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mer_r1_jax.peers.omni import REFERENCE, SAMPLE, SCORE, UPDATE
from mer_r1_jax.peers.real_size import RealSize
from mer_r1_jax.peers.timing import WHOLE

Figures = Mapping[str, Any]
UNKNOWN = "not measured"

# (name of a line, parts of a step that it adds up)
_LINES = (
    ("whole MER-R1 step", (WHOLE,)),
    ("of it: encode and sample", (SAMPLE,)),
    ("of it: rewards, confidences, reference", (SCORE, REFERENCE)),
    ("of it: update", (UPDATE,)),
)
_EXPECTED = 4  # forward passes' worth of a checkpointed update: forward, forward again, and twice as much backward


def markdown(size: RealSize, ours: Figures, theirs: Figures, *, command: str) -> str:
    """The page's measured part; what is missing on a side is called not measured."""
    lines = [
        f"Measured by `{command}`. Ours: {ours.get('device', UNKNOWN)}; theirs: {theirs.get('device', UNKNOWN)}. "
        f"{len(_steps(ours))} steps of ours after the first, {len(_steps(theirs))} of theirs; medians.",
        "",
        _work(size, ours),
        "",
        "|work|ours, s|theirs, s|theirs / ours|",
        "|-|-:|-:|-:|",
    ]
    for name, parts in _LINES:
        lines.append(_line(name, _seconds(ours, parts), _seconds(theirs, parts)))
    lines.append(
        _line("one more token of all completions, ms", _median(ours, "decode_ms"), _median(theirs, "decode_ms"))
    )
    lines += ["", *(f"- {note}" for note in _notes(ours, theirs))]
    return "\n".join(lines) + "\n"


def update_as_expected(theirs: Figures) -> float | None:
    """Seconds of the torch loop's update by its own forward pass: its encoding once, and four passes of the rest.

    Its update has been seen to take seven times its forward pass, so a ratio by it alone would flatter ours.
    """
    reference, encode = _seconds(theirs, (REFERENCE,)), theirs.get("encode_s")
    if reference is None or encode is None:
        return None
    return encode + _EXPECTED * max(0.0, reference - encode)


def _work(size: RealSize, ours: Figures) -> str:
    prompts = ours.get("prompt_tokens") or [0]
    return (
        f"One step of the {size.preset} model with random weights: {size.prompts} prompts of {min(prompts)} to "
        f"{max(prompts)} tokens (video, voice, text), {size.generations} completions each, {size.completion} tokens "
        f"sampled; both sides learn from the same {ours.get('tokens_in_loss', '?')} given tokens. Ours: trained "
        f"parameters in float32, moments and reference in {size.dtype}. Theirs: a plain torch loop around "
        f"transformers' Thinker, all in {size.dtype}, sdpa, one batch for `generate`, micro-batches of "
        f"{size.torch_rows} rows with gradient checkpointing for the rest; no serving engine, no `torch.compile`."
    )


def _steps(figures: Figures) -> Sequence[Mapping[str, float]]:
    return figures.get("steps", ())


def _seconds(figures: Figures, parts: Sequence[str]) -> float | None:
    """The median over steps of the sum of some parts."""
    sums = [sum(step.get(part, 0.0) for part in parts) for step in _steps(figures)]
    return statistics.median(sums) if sums else None


def _median(figures: Figures, name: str) -> float | None:
    values = figures.get(name)
    return statistics.median(values) if values else None


def _line(name: str, ours: float | None, theirs: float | None) -> str:
    ratio = f"{theirs / ours:.1f}" if ours and theirs else ""
    shown = [UNKNOWN if value is None else f"{value:.3g}" for value in (ours, theirs)]
    return f"|{name}|{'|'.join(shown)}|{ratio}|"


def _notes(ours: Figures, theirs: Figures) -> list[str]:
    notes = []
    update, useful, peak = _seconds(ours, (UPDATE,)), ours.get("update_flops"), ours.get("peak_flops")
    if update and useful and peak:
        notes.append(
            f"Model-FLOP utilisation of our update: {useful / (update * peak):.1%}, for {useful / 1e12:.0f} useful "
            f"TFLOP and the {peak / 1e12:.0f} TFLOP/s that the card's maker gives."
        )
    peaks = []
    for figures, whose in ((ours, "ours"), (theirs, "theirs")):
        if peak_gib := figures.get("memory", {}).get("perf/peak_memory_gib"):
            peaks.append(f"{peak_gib:.1f} GiB {whose}")
    if peaks:
        notes.append(f"Peak memory: {', '.join(peaks)}.")
    expected, whole = update_as_expected(theirs), _seconds(theirs, (WHOLE,))
    their_update, our_whole = _seconds(theirs, (UPDATE,)), _seconds(ours, (WHOLE,))
    if expected and whole and their_update and our_whole and update:
        with_expected = whole - their_update + expected
        notes.append(
            f"By its own forward pass their update should take {expected:.1f} s (the clips encoded once, then forward, "
            f"forward again and backward), where it took {their_update:.1f}. With {expected:.1f} in its place the "
            f"ratio of the whole step is {with_expected / our_whole:.1f}, of the update {expected / update:.1f}."
        )
    if first := ours.get("first_step"):
        notes.append(f"Our first step, compiling included: {first[WHOLE]:.0f} s.")
    return notes
