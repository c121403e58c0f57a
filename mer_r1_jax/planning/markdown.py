"""A sheet as Markdown, for people and for the repository."""

from __future__ import annotations

from mer_r1_jax.parallel import GPU_MEMORY_SHARE, GPU_MEMORY_VARIABLE
from mer_r1_jax.planning.chips import GB, GIB
from mer_r1_jax.planning.sheet import PARTS, ProgramSheet, Sheet
from mer_r1_jax.planning.workload import ANSWERING
from mer_r1_jax.training.phase import prompts_at_once

LISTED = 5  # collectives of a program


def markdown(sheet: Sheet) -> str:
    """The whole page."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in sheet.mesh.items())
    versions = ", ".join(f"{name} {version}" for name, version in sheet.versions.items())
    count = "1 chip" if sheet.chips == 1 else f"{sheet.chips} chips"
    chips = count if not sheet.chip.cuda else f"{sheet.chips} x {sheet.chip.cuda.name}"
    device = "GPU" if sheet.chip.cuda else "TPU"
    parts = [
        f"# {sheet.config.name} on {sheet.topology}",
        f"{chips}, mesh {mesh}. Compiled by {versions}, without a {device}: **every figure is static, none is "
        "measured.**",
        f"Made by `{sheet.command}`.",
        _verdict(sheet),
        "## Memory of a chip, GiB\n\n" + _memory(sheet) + _compiled_otherwise(sheet),
        "## Work of a chip and the least time it takes, one call\n\n" + _work(sheet),
        _epochs(sheet),
        *(["## Which remat and batch fit\n\n" + _alternatives(sheet)] if sheet.alternatives else []),
        "## Collectives\n\n" + _collectives(sheet),
        "## Shapes\n\n" + _shapes(sheet),
        _notes(sheet),
    ]
    return "\n\n".join(parts) + "\n"


def _verdict(sheet: Sheet) -> str:
    if sheet.fits:
        fullest = max(sheet.programs, key=lambda program: program.total)
        return (
            f"**It fits**: the fullest program, `{fullest.name}`, takes {fullest.total / GIB:.2f} of "
            f"{fullest.hbm / GIB:.4g} GiB."
        )
    return "**It does not fit.**\n\n" + "\n".join(f"- {line}" for line in sheet.advice)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _memory(sheet: Sheet) -> str:
    columns = [*PARTS, "cache", "temp", "other", "total", "of"]

    def row(program: ProgramSheet) -> list[str]:
        sizes = {**program.held, "cache": program.cache, "temp": program.temp, "other": program.other}
        if program.error:
            sizes = dict(program.held)
            over = f"over by {program.over / GIB:.2f}" if program.over else "no program"
            end = [over, f"{program.hbm / GIB:.4g}"]
        else:
            end = [f"{program.total / GIB:.2f}", f"{program.hbm / GIB:.4g}"]
        middle = [f"{sizes[name] / GIB:.2f}" if name in sizes else "" for name in columns[:-2]]
        return [f"`{program.name}`", *middle, *end]

    return _table(["program", *columns], [row(program) for program in sheet.programs])


def _compiled_otherwise(sheet: Sheet) -> str:
    lines = [f"- `{program.name}`: {program.note}." for program in sheet.programs if program.note]
    return "\n\nCompiled other than a run would:\n\n" + "\n".join(lines) if lines else ""


def _work(sheet: Sheet) -> str:
    rows = []
    for program in sheet.programs:
        if program.work is None:
            rows.append([f"`{program.name}`", f"{program.calls:g}", *[""] * 13])
            continue
        work, seconds = program.work, program.seconds
        rows.append(
            [
                f"`{program.name}`",
                f"{program.calls:g}",
                f"{work.flops / 1e12:.2f}",
                f"{program.asked:.0%}",
                f"{work.hbm_bytes / GB:.1f}",
                f"{work.sent / GB:.2f}",
                *(f"{seconds[name]:.3f}" for name in ("compute", "memory", "interconnect")),
                f"**{program.bound:.3f}**",
                max(seconds, key=lambda name: seconds[name]),
                *(f"{seconds:.3f}" if seconds else "" for seconds in (program.estimate, program.window_estimate)),
                _both_ways(program, windows=False),
                _both_ways(program, windows=True),
            ]
        )
    header = ["program", "calls a step", "TFLOP", "asked for", "HBM GB", "sent GB"]
    header += ["compute s", "HBM s", "links s", "at least s", "bound by"]
    return _table([*header, "compiler s", "windows s", "static MFU", "by windows"], rows)


def _both_ways(program: ProgramSheet, windows: bool) -> str:
    """Static MFU with all collectives hidden, and with the synchronous ones exposed."""
    shares = [program.utilisation(windows=windows, exposed=exposed) for exposed in (False, True)]
    return " / ".join(f"{share:.0%}" for share in shares) if all(shares) else ""


def _epochs(sheet: Sheet) -> str:
    if ANSWERING in sheet.buckets:
        return _batch(sheet)
    lines = []
    for phase, steps in sheet.epoch_steps.items():
        hours = sheet.epoch_hours(phase)
        updates = sheet.config.rl.updates_per_rollout if phase == "rl" else 1
        name = "steps" if updates == 1 else "rollouts"
        count = f"{steps} {name} of {prompts_at_once(getattr(sheet.config, phase))} prompts"
        if hours is None:
            lines.append(f"- {phase}: unknown, as not every program is compiled ({count})")
            continue
        seconds = f"{sheet.step_seconds(phase):.2f} s"
        took = seconds if updates == 1 else f"{updates} updates each, {seconds} an update with its share of the rollout"
        lines.append(f"- {phase}: at least **{hours:.2f} h** ({count}, {took})")
    return "## One epoch of the paper's data\n\n" + "\n".join(lines)


def _batch(sheet: Sheet) -> str:
    """How long a batch of answers takes at least."""
    seconds, rows = sheet.step_seconds(ANSWERING), sheet.buckets[ANSWERING].rows
    took = "unknown, as not every program is compiled" if seconds is None else f"at least **{seconds:.2f} s**"
    return f"## One batch of slow answers\n\n- {rows} at a time: {took}"


def _alternatives(sheet: Sheet) -> str:
    rows = []
    for one in sheet.alternatives:
        update = one.update
        if update.work is None:
            rows.append([one.remat, str(one.prompts), f"no, over by {update.over / GIB:.2f}", *[""] * 3])
            continue
        verdict = "yes" if update.fits else f"no, over by {update.over / GIB:.2f}"
        static = [f"{one.prompt_seconds * 1e3:.0f}", _both_ways(update, windows=False)]
        rows.append([one.remat, str(one.prompts), verdict, f"{update.total / GIB:.2f}", *static])
    milliseconds = "at least ms a prompt" if sheet.chip.cuda else "compiler ms a prompt"
    header = ["model.remat", "prompts a step", "fits", "GiB a chip", milliseconds, "static MFU"]
    return "Of the RL update; larger batches are not tried where one does not fit.\n\n" + _table(header, rows)


def _collectives(sheet: Sheet) -> str:
    rows = []
    for program in sheet.programs:
        for one in program.work.collectives[:LISTED] if program.work else ():
            rows.append(
                [
                    f"`{program.name}`",
                    one.kind,
                    f"{one.bytes / 2**20:.1f}",
                    str(one.chips),
                    str(one.calls),
                    str(one.synchronous),
                    f"{one.sent / GB:.2f}",
                ]
            )
    if not rows:
        return "None."
    heaviest = _table(["program", "kind", "MiB each", "chips", "calls", "synchronous", "sent GB"], rows)
    return f"{_synchronous(sheet)}\n\nThe {LISTED} heaviest of each program.\n\n{heaviest}"


def _synchronous(sheet: Sheet) -> str:
    """How many collectives nothing hides, and what they take; on GPUs the program's text does not say it."""
    if sheet.chip.cuda:
        return "Which of them run beside other work is decided on the card."
    rows = []
    for program in sheet.programs:
        if (work := program.work) and work.collectives:
            calls = [sum(one.calls for one in work.collectives), sum(one.synchronous for one in work.collectives)]
            counts = [work.collective_operations, work.synchronous_operations, *calls]
            sizes = [f"{work.sent / GB:.2f}", f"{work.exposed / GB:.2f}", f"{program.exposed:.3f}"]
            rows.append([f"`{program.name}`", *map(str, counts), *sizes])
    header = ["program", "operations", "synchronous", "calls", "synchronous calls", "sent GB", "synchronously GB"]
    return _table([*header, "exposed s"], rows)


def _shapes(sheet: Sheet) -> str:
    lines = [
        f"- {phase}: {shape.rows} prompts of {shape.tokens} tokens; {shape.vision_clips} x {shape.frame_pairs} frame "
        f"pairs of {shape.patches} patches, {shape.audio_clips} x {2 * shape.audio_units} s of audio"
        for phase, shape in sheet.buckets.items()
    ]
    rl = sheet.config.rl
    said = "one answer" if ANSWERING in sheet.buckets else f"{rl.num_generations} completions"
    lines.append(f"- {said} a prompt, each taken to be {rl.max_completion_length} tokens long")
    return "\n".join(lines)


def _notes(sheet: Sheet) -> str:
    own = _GPU_NOTES if sheet.chip.cuda else _TPU_NOTES
    chip = sheet.chip
    figures = (
        f"- Peaks of a chip: {chip.flops / 1e12:.0f} TFLOP/s in bf16, {chip.hbm_bandwidth / GB:.0f} GB/s of memory, "
        f"{chip.link_bandwidth / GB:.0f} GB/s sent over links ({chip.source})."
    )
    left_out = _ANSWERING_LEFT_OUT if ANSWERING in sheet.buckets else _LEFT_OUT
    return "\n".join(["## How to read it\n", *_NOTES, *own, figures, _PARTS, left_out])


_NOTES = (
    "- A time is a lower bound: the busiest of matrix units at their peak, memory at its bandwidth and links at "
    "theirs, as if the other two cost nothing. Loops count by their trips; sampling is taken to run to the cap. "
    "Host work (decoding clips, reading answers) is left out.",
    "- *asked for* is the share of all chips' operations that the traced program asks for; the rest is work that "
    "several chips do in common (or padding). Kernels that state no operations are left out of both.",
)
_TPU_NOTES = (
    "- *compiler s* is the compiler's own estimate without collectives and kernels. It ranks programs of one "
    "slice; it is no time either.",
    "- *windows s* is the same with products read otherwise. The compiler cuts a product into windows, reads operands "
    "again where they have to be, and takes memory for about a third as fast as the data sheet says; here a product "
    "takes as long as the busier of matrix units at their peak and memory at its stated bandwidth. For products that "
    "is a lower bound.",
    "- *static MFU* is the operations the program is there for (forward, and twice that for what is trained; "
    "nothing computed again, of attention only pairs that see each other) over what the chips could do in the "
    "compiler's time and the kernels' at their peak; *by windows* the same with *windows s*. Of either the first "
    "figure takes all collectives to be hidden, the second none of the synchronous ones. None is a measurement: what "
    "a chip reaches may lie between the two readings, or below both.",
    "- *synchronous* are collectives beside which a chip does nothing else; *exposed s* is their time if all links of "
    "a chip send at once. One that uses the links of one dimension only takes up to three times as long.",
)
_GPU_NOTES = (
    f"- *of* is {GPU_MEMORY_SHARE:.0%} of what the driver gives, which every command has jax reserve "
    f"({GPU_MEMORY_VARIABLE} changes it). What cuDNN and NCCL take at run time is not counted.",
    "- On the card the compiler times several kernels for each product and takes the fastest, which may need some per "
    "cent more of temporary memory; here it cannot. It makes no estimate of time, so *compiler s* and *static MFU* "
    "are empty.",
    "- *HBM* counts what passes from one kernel to the next, though arrays that fit the second-level cache may stay in "
    "it: in a program of many small kernels that bound is a little high.",
)
_PARTS = (
    "- *batch* holds prompts with their clips, *experience* completions and anchors, *cache* the keys and values "
    "within the temporary memory, *other* new outputs, code and loose arguments."
)
_LEFT_OUT = "- Advantages (arrays of one number a completion) and evaluation are not compiled."
_ANSWERING_LEFT_OUT = (
    "- Weights are kept as a released model's files are; those of a run that keeps float32 are cast for decoding, and "
    "take three times as much. `ask` gives the confidences of an answer's words. A fast answer is shorter."
)
