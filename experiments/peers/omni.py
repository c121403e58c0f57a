"""The real job, our side: one MER-R1 step on clips, made and learnt from exactly as training does it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.config.build import from_mapping
from mer_r1_jax.data.pipeline import Item
from mer_r1_jax.data.prefetch import LoadedItem
from mer_r1_jax.data.records import Record
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.hf.export import export_model
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.peers.timing import WHOLE, Laps, Stopwatch
from mer_r1_jax.rl.rollout import STOP_EOS, Completions
from mer_r1_jax.run.setup import Setup, make_setup
from mer_r1_jax.training.prompts import LoadedPrompt, plan_buckets, prompt_rows
from mer_r1_jax.training.reference import dtypes_in_memory
from mer_r1_jax.training.rl_step import RlPrograms, Watch, beta_at
from mer_r1_jax.training.state import make_optimizer, nest, trainable_names

SAMPLE, SCORE, REFERENCE, UPDATE = "sample", "score", "reference", "update"
PARTS = (SAMPLE, SCORE, REFERENCE, UPDATE)
_PARTS_OF = {  # training's own clock -> part of a step
    "timing_s/gen": SAMPLE,
    "timing_s/reward": SCORE,
    "timing_s/score": SCORE,
    "timing_s/reference": REFERENCE,
}


class ScriptedPrograms(RlPrograms):
    """Samples as training does, and then hands out given completions in the place of the sampled ones.

    A policy with random weights writes no answers. With given ones every part of the step has its real work, and two
    implementations learn from the same tokens.
    """

    def __init__(self, programs: RlPrograms, script: Completions):
        super().__init__(programs.backbone, programs.config, programs.sampling)
        self._script = script

    def sample(self, *arguments, **keywords) -> Completions:
        jax.block_until_ready(super().sample(*arguments, **keywords))
        return self._script


@dataclasses.dataclass(frozen=True)
class OmniJob:
    """What both sides work on.

    Attributes:
        setup: parts of a run, its sampling without an end: every sampled completion has the full length.
        records: the prompts of a step.
        loaded: the same with their decoded clips.
        script: completions [B, G, C] of the prompts with numpy leaves: demonstrations of this and of other clips, so
            that right and wrong words occur.
    """

    setup: Setup
    records: tuple[Record, ...]
    loaded: tuple[LoadedItem, ...]
    script: Completions

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts with their clips."""
        return [visit.clips.prompt for visit in self.loaded]

    @property
    def tokens(self) -> int:
        """Tokens in the loss."""
        return int(self.script.mask_BGC.sum())

    @property
    def beta(self) -> float:
        """Weight of the KL term in every step."""
        return beta_at(self.setup.config.rl, 0, 1)


def make_job(setup: Setup, records: Sequence[Record], prompts: Sequence[LoadedPrompt] | None = None) -> OmniJob:
    """A job of the records, which need demonstrations; decodes their clips, where their prompts are not given."""
    if prompts is None:
        prompts = [setup.source.load(record) for record in records]
    visits = [Item(record, epoch=0, global_index=number) for number, record in enumerate(records)]
    loaded = tuple(LoadedItem(visit, prompt, None, 0.0) for visit, prompt in zip(visits, prompts, strict=True))
    vocabulary = setup.backbone.config.text.vocab_size
    settings = setup.programs.sampling
    endless = dataclasses.replace(
        settings,
        max_completion_length=setup.config.rl.max_completion_length,
        eos_ids=(vocabulary,),
        banned_ids=tuple(sorted({*settings.banned_ids, *settings.eos_ids})),
    )
    programs = RlPrograms(setup.backbone, setup.programs.config, endless)
    setup = dataclasses.replace(setup, programs=programs)
    return OmniJob(setup, tuple(records), loaded, _script(setup, records))


def synthetic_job(config, folder: pathlib.Path) -> OmniJob:
    """The job of a shipped configuration of the synthetic world: its model, its prompts a step, its generations.

    Args:
        config: of experiments/configs/synthetic.py.
        folder: where the clips are made.
    """
    prompts = config.rl.prompts_per_step
    config.data.synthetic_dir = str(folder / "world")
    config.data.cache_dir = ""
    config.data.synthetic_sft_clips = config.data.synthetic_rl_clips = prompts
    config.data.synthetic_eval_clips = 2
    setup = make_setup(from_mapping(config))
    try:
        by_clip = {record.videos: record for record in setup.data.sft}  # a clip has a record of every annotator
        return make_job(setup, list(by_clip.values())[:prompts])
    finally:
        setup.close()


def _script(setup: Setup, records: Sequence[Record]) -> Completions:
    """Completion g of prompt b is the demonstration of record b + g."""
    rl, count = setup.config.rl, len(records)
    shape = (count, rl.num_generations, rl.max_completion_length)
    id_BGC, length_BG = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
    for b in range(count):
        for g in range(rl.num_generations):
            record = records[(b + g) % count]
            ids, _ = setup.tags.slow_target(record.target_reasoning, record.target_answer)
            if len(ids) > shape[2]:
                raise ValueError(
                    f"{record.id}: a demonstration of {len(ids)} tokens, but rl.max_completion_length={shape[2]}"
                )
            id_BGC[b, g, : len(ids)], length_BG[b, g] = ids, len(ids)
    zero_BGC = np.zeros(shape, np.float32)
    return Completions(
        id_BGC=id_BGC,
        length_BG=length_BG,
        mask_BGC=np.arange(shape[2]) < length_BG[..., None],
        stop_BG=np.full(shape[:2], STOP_EOS, np.int32),
        logprob_BGC=zero_BGC,
        sampling_logprob_BGC=zero_BGC,
    )


class OmniSide:
    """Our steps: `RlStep.rollout` and the update, as a run calls them."""

    def __init__(self, job: OmniJob):
        setup, rl = job.setup, job.setup.config.rl
        self.job = job
        script = put(job.script, setup.backbone.mesh)
        programs = self._programs = ScriptedPrograms(setup.programs, script)
        buckets = self._buckets = plan_buckets(setup.config, setup.backbone.config, job.records, len(job.records))
        self._rl_step = dataclasses.replace(setup, programs=programs).rl_step(buckets)
        optimizer = make_optimizer(rl.optimizer, total_steps=1)
        self._update = programs.make_update(optimizer)
        params = setup.backbone.init(setup.config.train.seed)
        is_trainable = trainable_names(train_audio=False, train_vision=False)
        self._state = setup.backbone.new_state(params, is_trainable, optimizer, rl.optimizer.dtype)
        trained, _ = self._state.split()
        dtypes = dtypes_in_memory(trained, setup.backbone, rl)
        self._reference = {name: jnp.array(leaf, dtypes[name], copy=True) for name, leaf in trained.items()}
        self._steps = 0
        self.metrics: dict[str, float] = {}

    def export(self, directory: str | pathlib.Path) -> None:
        """Writes the weights as they are now for the other side."""
        export_model(directory, self.job.setup.backbone.config, nest(self._state.params))

    def sampled(self, watch: Watch | None = None) -> Completions:
        """What the policy samples before the script takes its place; `watch` as `RlPrograms.sample` has it."""
        setup, job = self.job.setup, self.job
        rows = prompt_rows(job.prompts, self._buckets, setup.backbone.config, [v.item.uid for v in job.loaded])
        params = self._state.params
        prompts = self._programs.encode(params, put(rows, setup.backbone.mesh))
        sample = super(ScriptedPrograms, self._programs).sample
        with self._programs.rollout_params(params) as decoding:
            return sample(decoding, prompts, jax.random.fold_in(jax.random.key(0), 0), watch=watch)

    def sampled_ids(self) -> np.ndarray:
        """int32 [B, G, C], the ids of that; -1 behind an end."""
        completions = self.sampled()
        return np.where(completions.mask_BGC, completions.id_BGC, -1)

    def step(self) -> Laps:
        """One whole step; leaves its metrics in `metrics`."""
        state = self._state
        watch = Stopwatch()
        reference = state.params | self._reference
        rollout = self._rl_step.rollout(state.params, reference, self.job.loaded, self._steps)
        watch.lap("rollout")
        update = jax.block_until_ready(self._update(state, rollout.experience, np.float32(self.job.beta)))
        watch.lap(UPDATE)
        laps = watch.stop()
        self._state, metrics = update
        self._steps += 1
        self.metrics = {name: float(metrics[name]) for name in ("loss", "kl", "grad_norm")}
        parts = {UPDATE: laps[UPDATE], WHOLE: laps[WHOLE]}
        for name, part in _PARTS_OF.items():
            parts[part] = parts.get(part, 0.0) + rollout.metrics[name]
        return parts
