"""Everything a run stands on, made once: tokenizer, backbone, wheels, data, programs."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from mer_r1_jax.config.schema import ConfigError, RlConfig, RunConfig
from mer_r1_jax.data.pipeline import PromptStream
from mer_r1_jax.data.prefetch import ClipPrefetcher, LoadThreads
from mer_r1_jax.data.quarantine import Quarantine
from mer_r1_jax.data.records import Record, dataset_hash, read_records
from mer_r1_jax.emotion.candidates import CandidateTable, WordTable
from mer_r1_jax.emotion.rewards import is_scorable
from mer_r1_jax.emotion.wheels import Wheels, load_wheels
from mer_r1_jax.media.opening import FileKey, file_key
from mer_r1_jax.media.tokenizer import load_tokenizer
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.omni.hf.peft_folder import check_adapters
from mer_r1_jax.parallel.mesh import make_mesh
from mer_r1_jax.parallel.rows import RowShare, row_share
from mer_r1_jax.rl.advantage import arm_of
from mer_r1_jax.rl.losses import check_loss_type
from mer_r1_jax.rl.reward_funcs import RewardFunctions, extra_columns
from mer_r1_jax.rl.scoring import AnswerScorer
from mer_r1_jax.rl.tags import AnswerTags
from mer_r1_jax.run.inputs import Say, fetch_clips, resolve
from mer_r1_jax.storage import compilation_cache
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.omni_backbone import OmniBackbone, thinker_config
from mer_r1_jax.training.phase import Phase, banned_ids_of, check_rows, phase_parts, prompts_at_once, sampling_config
from mer_r1_jax.training.prompts import PromptSource
from mer_r1_jax.training.reporters import check_report_to
from mer_r1_jax.training.rl_step import RlPrograms, RlStep
from mer_r1_jax.training.sft_step import SftPhase
from mer_r1_jax.training.state import Params, TrainState, make_optimizer, param_dtypes, tower_flags, trained_in

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataSets:
    """Records of the three phases; a phase that is skipped has none.

    Attributes:
        sft, rl, eval: records.
        unscorable: RL records left out because their truth lies on no wheel.
        unscorable_eval: held-out records that are answered but in no score, for the same reason.
    """

    sft: tuple[Record, ...]
    rl: tuple[Record, ...]
    eval: tuple[Record, ...]
    unscorable: int
    unscorable_eval: int = 0

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the content, to refuse resuming on other data."""
        return {name: dataset_hash(getattr(self, name)) for name in ("sft", "rl", "eval")}


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The parts of a run that do not change while it goes on.

    Attributes:
        config: the configuration, resolved (`inputs.resolve`).
        tokenizer, tags: the tokenizer and the answer tags under it.
        tokenizer_path: folder of the tokenizer and processor files, copied into exports.
        backbone: structure and shardings.
        wheels, candidates: emotion wheels, and first tokens of their categories.
        data: records.
        source: decodes clips and builds prompts.
        programs: the jitted programs of RL and evaluation.
        reward_funcs: the user's reward functions; None without any.
    """

    config: RunConfig
    tokenizer: Any
    tags: AnswerTags
    tokenizer_path: pathlib.Path
    backbone: Backbone
    wheels: Wheels
    candidates: CandidateTable | WordTable
    data: DataSets
    source: PromptSource
    programs: RlPrograms
    reward_funcs: RewardFunctions | None = None

    def close(self) -> None:
        """Ends the processes that decode clips and run reward functions."""
        self.source.close()
        if self.reward_funcs is not None:
            self.reward_funcs.close()

    @property
    def share(self) -> RowShare:
        """The part of every batch's rows that this process loads."""
        return row_share(self.backbone.mesh)

    @property
    def scorer(self) -> AnswerScorer:
        """Scores sampled answers for training: with the word penalty, if any."""
        return self._scorer(self.config.rl)

    @property
    def eval_scorer(self) -> AnswerScorer:
        """Scores answers for evaluation."""
        # A score is that of the benchmark, whatever training takes off its rewards.
        usual = RlConfig()
        official = {
            name: getattr(usual, name)
            for name in ("word_penalty", "wheels_without_truth", "untagged_answer", "format_reward")
        }
        return self._scorer(dataclasses.replace(self.config.rl, **official))

    def _scorer(self, config: RlConfig) -> AnswerScorer:
        return AnswerScorer(self.tags, self.wheels, self.candidates, config)

    def initial_params(self) -> Params:
        """Parameters the run starts from: a checkpoint's, or random ones; with adapters, new or of a PEFT folder."""
        model, seed = self.config.model, self.config.train.seed
        params = self.backbone.load(model.path) if model.path else self.backbone.init(seed)
        return params | self.backbone.adapters(seed, model.adapter_path) if model.lora.rank else params

    def sft_phase(self) -> SftPhase:
        """The SFT phase, its targets checked."""
        return SftPhase.of(self.config, self.data.sft, self.backbone, self.tags)

    def rl_phase(self) -> Phase:
        """The RL phase."""
        return Phase(**phase_parts(self.config, "rl", self.data.rl, self.backbone))

    def rl_step(self, buckets: Sequence[BatchShape]) -> RlStep:
        """The RL step of this run, for prompts of these shapes."""
        return RlStep(
            config=self.config.rl,
            programs=self.programs,
            scorer=self.scorer,
            candidate_ids_ZY=self.candidates.ids_ZY,
            reward_funcs=self.reward_funcs,
            buckets=buckets,
            seed=self.config.train.seed,
            towers_trained=any(tower_flags(self.config, "rl").values()),
        )

    def prompts_of(self, phase: Phase) -> ClipPrefetcher:
        """The stream of a phase's prompts, loaded ahead of use: this process's share of every batch."""
        config, share = self.config, self.share
        stream = PromptStream(
            phase.records,
            prompts_at_once(phase.config),
            seed=config.train.seed * 2 + (phase.name == "rl"),  # the two phases walk their records in other orders
            process_index=share.index,
            process_count=share.count,
        )
        return ClipPrefetcher(
            stream,
            # Without decoding processes (0 workers) a single thread decodes by itself.
            LoadThreads(
                self.source.load, max(1, config.media.decode_workers), self.source.loader.longest_load(phase.records)
            ),
            Quarantine(len(phase.records), config.data.max_quarantined_fraction),
            prompts_ahead=stream.local_prompts,
            counted=share.leader,
        )

    def abstract_state_of(self, phase: str) -> TrainState:
        """Shapes and shardings of the state that phase `sft` or `rl` keeps, whatever its data."""
        optimizer = getattr(self.config, phase).optimizer
        is_trainable = trained_in(self.config, phase)
        # No shape hangs on the number of steps, and who reads a checkpoint has no data to count them from.
        return self.backbone.abstract_state(is_trainable, make_optimizer(optimizer, total_steps=1), optimizer.dtype)


def make_setup(
    config: RunConfig,
    say: Say = lambda line: None,
    devices: Sequence[Any] | None = None,
    kept_dtype: Literal["float32", "bfloat16"] | None = None,
) -> Setup:
    """Resolves the configuration, reads and checks everything it names, lays out the backbone.

    Args:
        config: the configuration.
        say: prints a line about clips that are made.
        devices: of the mesh; all there are when None.
        kept_dtype: of the parameters of a model that nobody trains; None = `model.param_dtype`.

    Raises:
        ConfigError and the errors of the parts: for anything that cannot be used, before a program is compiled.

    jax is told here where compiled programs are kept: every command that runs a model comes by.
    """
    # The user's own functions first: trying them takes a moment, making or fetching data may take an hour.
    arm_of(config.rl.arm)
    check_loss_type(config.rl.loss_type)
    check_report_to(config.train.report_to)
    config = resolve(config, say)
    # Data before the model: a file that cannot be used is found in seconds, weights load in minutes.
    wheels = load_wheels(config.emotion.wheel_dir, config.emotion.variant)
    data = _read(config, wheels)
    fetch_clips(config, (*data.sft, *data.rl, *data.eval))
    tokenizer_path = pathlib.Path(config.model.tokenizer_path or config.model.path)
    tokenizer = load_tokenizer(tokenizer_path)
    # Nothing is allocated here: shapes and shardings alone say whether the mesh can hold model and batches.
    mesh = make_mesh(config.mesh, devices)
    check_rows(config, mesh)
    compilation_cache.use(config.train.compilation_cache_dir, list(mesh.devices.flat))
    # The settings keep the dtype they name: weights kept in another one give the same numbers, bit for bit.
    model = dataclasses.replace(config.model, param_dtype=kept_dtype or config.model.param_dtype)
    thinker, dtypes = thinker_config(model, tokenizer), param_dtypes(dataclasses.replace(config, model=model))
    if config.model.adapter_path:
        check_adapters(config.model.adapter_path, thinker)
    offload = config.mesh.sparse_core_collectives
    backbone = OmniBackbone.create(thinker, mesh, config.model.packed_rows, dtypes, offload)
    tags = AnswerTags(tokenizer)
    # What a word's confidence sums over: the first tokens of its category, or (arm sfcc_word) its own.
    table = WordTable if arm_of(config.rl.arm).candidates == "word" else CandidateTable
    return Setup(
        config=config,
        tokenizer=tokenizer,
        tags=tags,
        tokenizer_path=tokenizer_path,
        backbone=backbone,
        wheels=wheels,
        candidates=table(tokenizer, wheels),
        data=data,
        source=PromptSource(config, tokenizer, backbone.config),
        programs=RlPrograms(
            backbone, config.rl, sampling_config(config.rl, backbone.config, banned_ids_of(tags, backbone.config))
        ),
        reward_funcs=_reward_functions(config, data.rl),
    )


def _reward_functions(config: RunConfig, records: Sequence[Record]) -> RewardFunctions | None:
    """The user's reward functions, imported; None where there are none or nothing is trained with them."""
    if not config.rl.reward_funcs or not records:
        return None
    return RewardFunctions(
        config.rl.reward_funcs,
        timeout=config.rl.reward_timeout,
        max_faulty_rollouts=config.rl.max_faulty_rollouts,
        columns=extra_columns(records),
    )


def _read(config: RunConfig, wheels: Wheels) -> DataSets:
    # A phase of 0 steps needs no file, and one that is named all the same is not read.
    def read(path: str, field: str, wanted: bool, require: tuple[str, ...]) -> tuple[Record, ...]:
        if not wanted:
            return ()
        if not path:
            raise ConfigError(f"data.{field} is empty, but this run needs it: name a data file, or skip the phase")
        return tuple(
            read_records(
                path,
                config.data.media_root,
                question=config.data.question,
                require=require,
                extra_columns=config.data.extra_columns,
            )
        )

    # SFT needs both: its fast targets are made of the solutions.
    sft = read(config.data.sft_path, "sft_path", config.sft.max_steps != 0, ("target", "solution"))
    rl = read(config.data.rl_path, "rl_path", config.rl.max_steps != 0, ("solution",))
    held_out = read(config.data.eval_path, "eval_path", bool(config.data.eval_path), ("solution",))
    rl, unscorable = _scorable(rl, wheels, config)
    # On all held-out records, before the limit: a later run may raise it.
    _check_held_out(sft + rl, held_out, config)
    held_out = held_out[: config.eval.limit or None]
    in_no_score = sum(not is_scorable(record.solution, wheels) for record in held_out)
    if held_out and in_no_score == len(held_out):
        raise ConfigError(
            f"{config.data.eval_path}: no solution of its {len(held_out)} records has a word on a wheel, so no answer "
            "to them can be scored; check the solutions, eval.limit or emotion.wheel_dir, or leave data.eval_path empty"
        )
    return DataSets(sft=sft, rl=rl, eval=held_out, unscorable=unscorable, unscorable_eval=in_no_score)


def _scorable(rl: tuple[Record, ...], wheels: Wheels, config: RunConfig) -> tuple[tuple[Record, ...], int]:
    """The RL records that are trained on, and how many of all of them have a truth on no wheel."""
    scorable = tuple(record for record in rl if is_scorable(record.solution, wheels))
    unscorable = len(rl) - len(scorable)
    # Asked of the records as they were read: those that are left are none either way.
    if rl and not scorable:
        raise ConfigError(
            f"{config.data.rl_path}: no record's solution has a word on a wheel, so nothing can be learnt from it; "
            "check the solutions, or emotion.wheel_dir"
        )
    if unscorable and config.rl.unscorable == "drop":
        log.warning("%d of %d RL records are left out: no word of their solution is on a wheel", unscorable, len(rl))
        rl = scorable
    return rl, unscorable


def _check_held_out(training: tuple[Record, ...], held_out: tuple[Record, ...], config: RunConfig) -> None:
    """Names held-out clips that are trained on, unless one file serves both on purpose."""
    # As files: a clip may have two names, or be linked to.
    trained = {key for record in training for key in _files_of(record, config.data.media_root)}
    shared = [record.id for record in held_out if trained & _files_of(record, config.data.media_root)]
    if shared and config.data.eval_path not in (config.data.sft_path, config.data.rl_path):
        log.warning("%d held-out clips are also trained on, among them %s", len(shared), ", ".join(shared[:3]))


def _files_of(record: Record, media_root: str) -> set[FileKey]:
    """What a record shows and lets hear, whatever its files are called."""
    root = pathlib.Path(media_root or pathlib.Path(record.file).parent)
    return {file_key(root / name) for name in (*record.videos, *record.audios, *record.images)}
