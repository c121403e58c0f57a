"""The two tasks: both sides are made, run in turns, and compared. Nothing heavy is imported before a task starts."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import tempfile
import warnings
from collections.abc import Iterator

from mer_r1_jax.peers.page import Row, Section, Target
from mer_r1_jax.peers.timing import WHOLE, Laps, alternate, compare

TASKS = ("text", "omni")
WARMUP = 2  # runs of each side that are not counted: compiling, first touches of memory
GENERATE = Target(gate=1.7, aim=3.0)
STEP = Target(gate=1.5, aim=3.0)
REAL_JOB = Target(gate=3.0, aim=5.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a task is run."""

    repeats: int
    threads: int


def run(task: str, settings: Settings) -> Section:
    """Runs one of TASKS."""
    import torch

    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        return {"text": _text, "omni": _omni}[task](settings, pathlib.Path(folder))


def _text(settings: Settings, folder: pathlib.Path) -> Section:
    from mer_r1_jax.peers.text import TextJob, TextSide
    from mer_r1_jax.peers.text_torch import TextPeer

    job = TextJob()
    side = TextSide(job)
    side.export(folder / "export")
    peer = TextPeer(job, folder / "export")
    prompts = _endless(job)
    ours, theirs, first = alternate(
        *((lambda one=one: one.generate(next(prompts)[: job.completions])) for one in (side, peer)),
        repeats=settings.repeats,
        warmup=WARMUP,
    )
    sampled = job.completions * job.max_completion_length
    rows = [Row(comparison=compare("generate, 32 different prompts", ours, theirs, tokens=sampled), target=GENERATE)]
    notes = [f"First calls of generation, compiling included: ours {first[0]:.0f} s, theirs {first[1]:.1f} s."]
    own: list[Laps] = []
    groups = job.completions // job.num_generations
    steps = settings.repeats + WARMUP
    other = peer.grpo_steps(
        [prompt for _ in range(steps) for prompt in next(prompts)[:groups]],
        steps,
        before_each=lambda: own.append(side.grpo_step(next(prompts)[:groups])),
    )
    notes.append(f"First GRPO steps: ours {own[0][WHOLE]:.0f} s, theirs {other[0][WHOLE]:.1f} s.")
    own, other = own[WARMUP:], other[WARMUP:]
    rows += [
        Row(comparison=compare("whole GRPO step", own, other, tokens=sampled), target=STEP),
        Row(comparison=compare("of it: rollout and rewards, 4 prompts x 8", own, other, ("rollout",), sampled)),
        Row(comparison=compare("of it: policy update", own, other, ("update",))),
    ]
    work = (
        f"A decoder of width {job.hidden_size}, {job.layers} layers, {job.heads} heads ({job.kv_heads} for keys), "
        f"vocabulary {job.vocab_size}, float32, random weights, the same on both sides; {job.completions} completions "
        f"of {job.max_completion_length} tokens (the end is never sampled) to prompts of {job.prompt_length}, "
        "temperature 1, no filter. Theirs: transformers' `generate` of Qwen2 (quicker than its Thinker), and "
        "`GRPOTrainer` with gradient checkpointing, bf16 and logging off."
    )
    return Section(title="Text, beside transformers and TRL", work=work, rows=rows, notes=notes)


def _endless(job) -> Iterator[list[str]]:
    """Fresh prompts, a batch of completions each time."""
    seed = 0
    while True:
        yield job.prompts(job.completions, seed)
        seed += 1


def _omni(settings: Settings, folder: pathlib.Path) -> Section:
    from mer_r1_jax.peers.omni import REFERENCE, SAMPLE, SCORE, UPDATE, OmniSide, synthetic_job
    from mer_r1_jax.peers.omni_torch import OmniPeer, load

    config = importlib.import_module("mer_r1_jax.configs.synthetic").get_config()
    # A schedule would only make the two sides' learning rates harder to compare.
    config.rl.optimizer.lr_scheduler_type, config.rl.optimizer.warmup_ratio = "constant", 0.0
    config.model.remat = "everything"  # neither side recomputes activations
    job = synthetic_job(config, folder)
    side = OmniSide(job)
    side.export(folder / "export")
    peer = OmniPeer(job, *load(folder / "export"))
    losses = []

    def ours() -> Laps:
        laps = side.step()
        losses.append(side.metrics["loss"])
        return laps

    def theirs() -> Laps:
        laps = peer.step()
        losses.append(peer.metrics["loss"])
        return laps

    own, other, first = alternate(ours, theirs, repeats=settings.repeats, warmup=WARMUP)
    rl = job.setup.config.rl
    completions = len(job.records) * rl.num_generations
    sampled = completions * rl.max_completion_length
    rows = [Row(comparison=compare("whole MER-R1 step", own, other, tokens=sampled), target=REAL_JOB)]
    # Our device computes the reference while the host reads the answers, so these are one part.
    named = {"encode and sample": (SAMPLE,), "rewards, confidences, reference": (SCORE, REFERENCE), "update": (UPDATE,)}
    rows += [Row(comparison=compare(f"of it: {name}", own, other, parts)) for name, parts in named.items()]
    lengths = [len(prompt.ids) for prompt in job.prompts]
    work = (
        f"The configuration `experiments/configs/synthetic.py` with random weights and `model.remat=everything`: "
        f"{len(job.records)} real clips, {rl.num_generations} completions each, prompts of {min(lengths)} to "
        f"{max(lengths)} tokens with pictures and voice, {rl.max_completion_length} tokens sampled per "
        f"completion on both sides. Both then learn from the same given completions ({job.tokens} tokens), because "
        "random weights write no answers to score. Ours is what "
        "`mer-r1 train` calls. Theirs is a plain torch loop around transformers' Thinker: every sample is a "
        "row with clips of its own, encoded again in generation, both confidence passes, reference and update. Clips "
        "are decoded beforehand on both sides."
    )
    last = 2 * (WARMUP + settings.repeats - 1)
    notes = [
        f"First steps, compiling included: ours {first[0]:.0f} s, theirs {first[1]:.1f} s.",
        f"Loss of both sides at the first step: {losses[0]:.6f} and {losses[1]:.6f}; at the last: {losses[last]:.6f} "
        f"and {losses[last + 1]:.6f}.",
    ]
    return Section(title="The real job: one MER-R1 step on clips", work=work, rows=rows, notes=notes)
