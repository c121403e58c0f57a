"""Every program of a run with abstract arguments: the jitted functions training calls, laid out on a mesh.

Nothing is allocated. Arguments have the shapes, dtypes and shardings a run would give them; a program's results become
the next one's arguments by `jax.eval_shape`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.emotion.candidates import CandidateTable, WordTable
from mer_r1_jax.emotion.wheels import load_wheels
from mer_r1_jax.kernels.attention.pallas_tpu import visited_share
from mer_r1_jax.kernels.placement import Placement, vmem_mib
from mer_r1_jax.media.tokenizer import load_tokenizer
from mer_r1_jax.omni.batch import PROMPT, BatchShape, Prompts
from mer_r1_jax.parallel.mesh import make_mesh
from mer_r1_jax.parallel.rows import row_shardings
from mer_r1_jax.parallel.rules import DECODE_RULES, TRAIN_RULES, Rules, on, replicated, spec
from mer_r1_jax.planning.flops import ADAPTED, FORWARD, TRAINED, pair_flops, text_flops, tower_flops
from mer_r1_jax.planning.workload import PrefixTokens, Workload
from mer_r1_jax.rl.advantage import arm_of
from mer_r1_jax.rl.confidence import Anchors
from mer_r1_jax.rl.losses import PolicyTargets
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.tags import AnswerTags
from mer_r1_jax.training.chunked import state_shardings
from mer_r1_jax.training.omni_backbone import OmniBackbone, thinker_config
from mer_r1_jax.training.phase import banned_ids_of, check_rows, prompts_at_once, sampling_config, steps_of
from mer_r1_jax.training.prompts import plan_buckets, prompt_rows
from mer_r1_jax.training.reference import abstract_reference, switched_off
from mer_r1_jax.training.rl_step import Experience, RlPrograms
from mer_r1_jax.training.sft_step import SftBatch, Targets, make_sft_step
from mer_r1_jax.training.state import (
    Params,
    TrainState,
    make_optimizer,
    param_dtypes,
    partition,
    tower_flags,
    trained_in,
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PlannedProgram:
    """One jitted program of a run and what it is called with.

    Attributes:
        name: sft_step, encode, cast, sample, decode (chunks after the first), ask, score, reference, minibatch
            (a rollout's part for one of several updates), update.
        phase: sft, rl, or ANSWERING.
        function: the jitted function.
        args: abstract arguments.
        static: the static ones, which come after them.
        held: what lives on the chips while it runs, by part: trees of abstract arrays, arguments or not.
        cache_bytes: of its temporary memory, the keys and values of prompts and completions, a chip.
        longest_loop: trips of a loop whose end depends on data: the cap on sampled tokens.
        calls: how often an optimizer step calls it.
        useful: operations it is there for, of all chips (see `useful`); 0 where that is not stated.
        visited: share of the attention kernel's tiles that full packed rows visit, of those causal order allows.
    """

    name: str
    phase: str
    function: Any
    args: tuple[Any, ...]
    held: dict[str, Any]
    static: tuple[Any, ...] = ()
    cache_bytes: int = 0
    longest_loop: int = 1
    calls: float = 1.0
    useful: float = 0.0
    visited: float = 1.0

    def trace(self) -> Any:
        """The program traced at its arguments (`.jaxpr`, `.lower()`)."""
        return self.function.trace(*self.args, *self.static)

    def results(self) -> Any:
        """What it gives, as abstract arrays."""
        return self.function.eval_shape(*self.args, *self.static)


class RunPrograms:
    """The programs of one configuration on the devices of one slice.

    Args:
        config: the configuration. Neither data nor weights are read; a tokenizer is, where the configuration names one.
        devices: of the mesh; they may belong to a topology nobody has.
        workload: sizes a run would read off its data.

    Raises:
        ConfigError, ShardingError: a configuration the mesh cannot hold, as a run would raise it.
    """

    def __init__(self, config: RunConfig, devices: Sequence[Any], workload: Workload | None = None):
        self.config, self.workload = config, workload or Workload()
        mesh = make_mesh(config.mesh, devices)
        check_rows(config, mesh)
        tokenizer_path = config.model.tokenizer_path or config.model.path
        tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else None
        thinker = thinker_config(config.model, tokenizer)
        self._thinker = thinker
        offload = config.mesh.sparse_core_collectives
        self.backbone = OmniBackbone.create(thinker, mesh, config.model.packed_rows, param_dtypes(config), offload)
        wheels = load_wheels(config.emotion.wheel_dir, config.emotion.variant)
        table = WordTable if arm_of(config.rl.arm).candidates == "word" else CandidateTable
        self.candidates = table(tokenizer or PrefixTokens(thinker.text.vocab_size), wheels)
        self._wheels = len(wheels)
        banned = thinker.media_token_ids if tokenizer is None else banned_ids_of(AnswerTags(tokenizer), thinker)
        self.programs = RlPrograms(self.backbone, config.rl, sampling_config(config.rl, thinker, banned))

    def phases(self) -> list[str]:
        """The phases the configuration runs."""
        return [phase for phase in ("sft", "rl") if getattr(self.config, phase).max_steps]

    def buckets(self, phase: str) -> list[BatchShape]:
        """Shapes of the phase's prompts, the largest last."""
        rows = prompts_at_once(getattr(self.config, phase))
        return plan_buckets(self.config, self.backbone.config, [self.workload.record()], rows)

    def steps(self, phase: str) -> int:
        """Optimizer steps of a phase."""
        return steps_of(getattr(self.config, phase), self._records(phase))

    def epoch_steps(self, phase: str) -> int:
        """Rollouts (of RL) or optimizer steps (of SFT) that one pass over the workload's records takes."""
        return math.ceil(self._records(phase) / prompts_at_once(getattr(self.config, phase)))

    def _records(self, phase: str) -> int:
        return self.workload.sft_records if phase == "sft" else self.workload.rl_records

    def of_phase(self, phase: str, bucket: BatchShape) -> list[PlannedProgram]:
        """The programs of a phase at one prompt shape."""
        return [self.sft_step(bucket)] if phase == "sft" else self.rl(bucket)

    def sft_step(self, bucket: BatchShape) -> PlannedProgram:
        """The SFT step."""
        towers = tower_flags(self.config, "sft")
        state, optimizer = self._state("sft")
        rows = self._prompts(bucket)
        slow, fast = self.workload.target_lengths(self.config)
        batch = SftBatch(
            prompts=rows,
            slow=self._targets(bucket.rows, slow),
            fast=self._targets(bucket.rows, fast) if fast else None,
        )
        function = make_sft_step(self.backbone, optimizer, self.config.sft, any(towers.values()))
        held = _held(state) | {"batch": batch}
        sets = ((1, slow), (1, fast)) if fast else ((1, slow),)
        useful = self._text_update_flops(bucket, sets, scored=slow + fast)
        useful += (TRAINED if any(towers.values()) else FORWARD) * bucket.rows * tower_flops(self._thinker, bucket)
        return PlannedProgram(
            name="sft_step",
            phase="sft",
            function=function,
            args=(state, batch),
            held=held,
            useful=useful,
            visited=self._visited(bucket, sets),
        )

    def rl(self, bucket: BatchShape) -> list[PlannedProgram]:
        """Encoding, rollout (its weights first), scoring, reference, minibatch and update of one RL step.

        Args:
            bucket: of a rollout; an update has its rows over `rl.steps_per_generation`.
        """
        config, programs = self.config.rl, self.programs
        towers = tower_flags(self.config, "rl")
        towers_trained = any(towers.values())
        state, optimizer = self._state("rl")
        with_clips = self._prompts(bucket)
        is_off = switched_off(self.config)
        reference = abstract_reference(self.config, state, self.backbone)
        compared = {name: leaf for name, leaf in state.params.items() if not (config.beta and is_off(name))} | reference
        held = _held(state) | {"reference": reference, "batch": with_clips}
        per_rollout = 1 / config.updates_per_rollout

        def planned(name: str, function: Any, args: tuple[Any, ...], **more: Any) -> PlannedProgram:
            calls = more.pop("calls", per_rollout)
            return PlannedProgram(
                name=name, phase="rl", function=function, args=args, held=dict(held), calls=calls, **more
            )

        slow = (config.num_generations, config.max_completion_length)
        fast = (config.num_generations, config.max_fast_context)
        anchored = 2 * config.num_generations * config.max_answer_words
        media = bucket.rows * tower_flops(self._thinker, bucket)
        encode = planned(
            "encode", programs.encode_media, (state.params, with_clips.vision, with_clips.audio), useful=media
        )
        held["features"] = features = self._placed(encode.results(), "features_BRD")
        prompts = with_clips.encoded(features)
        recast = {name: state.params[name] for name in self.backbone.recast}
        cast = planned("cast", programs.cast, (recast,), calls=per_rollout if recast else 0.0)
        weights = self._rollout_weights(recast)
        sample_args = (state.params | weights, prompts, self._scalar(jax.random.key(0)))
        rollout = self._rollout(sample_args, planned, bucket)
        for program in rollout:
            program.held["rollout"] = weights  # freed before the next program
        whole = planned("sample", programs.rollout, sample_args, static=(programs.sampling,))
        completions = self._placed(whole.results())
        exists_BGC = self._placed(jax.eval_shape(lambda c: c.exists_BGC, completions), "exists_BGC")
        completion = Continuations(id_BGC=completions.id_BGC, exists_BGC=exists_BGC)
        anchors = self._anchors(bucket.rows)
        ids_ZY = self._scalar(self.candidates.ids_ZY)
        score = planned(
            "score", programs.score, (state.params, prompts, completion, anchors, ids_ZY),
            cache_bytes=self._cache_bytes(bucket, 0),
            useful=self._text_flops(bucket, (slow, fast), scored=anchored),
            visited=self._visited(bucket, (slow, fast)),
        )  # fmt: skip
        held["experience"] = (completions, anchors)
        reference = planned(
            "reference",
            programs.logprobs,
            (compared, prompts, completion),
            cache_bytes=self._cache_bytes(bucket, 0),
            calls=per_rollout * (bool(config.beta) + (config.updates_per_rollout > 1)),
            useful=self._text_flops(bucket, (slow,), scored=math.prod(slow)),
            visited=self._visited(bucket, (slow,)),
        )
        logprob_BGC = completions.sampling_logprob_BGC
        calibrated = arm_of(config.arm).calibration_loss
        experience = Experience(
            prompts=with_clips if towers_trained else prompts,
            completion=completion,
            targets=PolicyTargets(
                advantage_BG=self._array((bucket.rows, config.num_generations), np.float32),
                mask_BGC=completions.mask_BGC,
                present_BG=self._array((bucket.rows, config.num_generations), bool),
                old_logprob_BGC=logprob_BGC if config.updates_per_rollout > 1 else None,
                reference_logprob_BGC=logprob_BGC if config.beta else None,
            ),
            sampling_logprob_BGC=logprob_BGC,
            anchors=anchors if calibrated else None,
            candidate_ids_ZY=ids_ZY if calibrated else None,
        )
        # The rollout stays while its minibatches, one after the other, are learnt from.
        cuts = []
        if (parts := config.steps_per_generation) > 1:
            number = self._scalar(np.int32(0))
            cuts = [planned("minibatch", programs.cut_minibatch, (experience, number), static=(parts,), calls=1.0)]
            experience = self._placed(cuts[0].results())
            bucket, media = dataclasses.replace(bucket, rows=bucket.rows // parts), media / parts
        learnt, scored = ((slow, fast), math.prod(slow) + anchored) if calibrated else ((slow,), math.prod(slow))
        update = planned(
            "update",
            programs.make_update(optimizer),
            (state, experience, self._scalar(np.float32(0))),
            calls=1.0,
            useful=self._text_update_flops(bucket, learnt, scored=scored) + (TRAINED * media if towers_trained else 0),
            visited=self._visited(bucket, learnt),
        )
        return [program for program in (encode, cast, *rollout, score, reference, *cuts, update) if program.calls]

    def _rollout(self, args: tuple[Any, ...], planned: Any, bucket: BatchShape) -> list[PlannedProgram]:
        """Sampling in one program, or its first chunk and the others, at the size a batch begins with."""
        config, programs = self.config.rl, self.programs
        args = (args[0], self._moved(args[1]), *args[2:])
        length, chunk = config.max_completion_length, config.decode_chunk
        cache_bytes = self._cache_bytes(bucket, length, DECODE_RULES)
        static = (programs.sampling,)
        if not 0 < chunk < length:
            whole = {"cache_bytes": cache_bytes, "longest_loop": length, "static": static}
            return [planned("sample", programs.rollout, args, **whole)]
        static = (*static, programs.chunks)
        first = planned("sample", programs.begin, args, longest_loop=chunk, static=static)
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            first.results()[0],
            state_shardings(self.backbone.mesh),
        )
        static = (*static, programs.chunks.sizes(bucket.rows, programs.sampling))
        others = -(-length // chunk) - 1  # at most: chunks end when every completion has
        more = {"calls": first.calls * others, "longest_loop": chunk, "static": static}
        return [first, planned("decode", programs.go_on, (args[0], state), **more)]

    def _text_flops(self, bucket: BatchShape, sets: tuple[tuple[int, int], ...], scored: int) -> float:
        """Forward pass of all rows, each a prompt with these sets of (continuations, tokens)."""
        return bucket.rows * text_flops(self._thinker.text, prompt=bucket.tokens, sets=sets, scored=scored)

    def _text_update_flops(self, bucket: BatchShape, sets: tuple[tuple[int, int], ...], scored: int) -> float:
        """The same with the backward pass, through adapters alone where there are some."""
        forward = self._text_flops(bucket, sets, scored)
        if not self.config.model.lora.rank:
            return TRAINED * forward
        pairs = bucket.rows * pair_flops(self._thinker.text, prompt=bucket.tokens, sets=sets)
        return ADAPTED * (forward - pairs) + TRAINED * pairs

    def _visited(self, bucket: BatchShape, sets: tuple[tuple[int, int], ...]) -> float:
        if not self.backbone.packed_rows:
            return 1.0
        lengths = [bucket.tokens, *(length for count, length in sets for _ in range(count))]
        segment_T = np.repeat(np.arange(PROMPT, PROMPT + len(lengths)), lengths)
        place = Placement(self.backbone.mesh)
        return visited_share(segment_T, shared_segment=PROMPT, vmem_mib=vmem_mib(place))

    def _state(self, phase: str) -> tuple[TrainState, Any]:
        settings = getattr(self.config, phase).optimizer
        optimizer = make_optimizer(settings, self.steps(phase))
        return self.backbone.abstract_state(trained_in(self.config, phase), optimizer, settings.dtype), optimizer

    def _rollout_weights(self, recast: Params) -> Params:
        shardings, dtype = self.backbone.decode_shardings, jnp.dtype(self.backbone.config.compute_dtype)
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=shardings[name]) for name, leaf in recast.items()
        }

    def _prompts(self, bucket: BatchShape) -> Prompts:
        return self._placed(prompt_rows([], [bucket], self.backbone.config, []))

    def _targets(self, rows: int, length: int) -> Targets:
        flags = self._array((rows, 1, length), bool)
        ids = self._array((rows, 1, length), np.int32)
        return Targets(continuation=Continuations(id_BGC=ids, exists_BGC=flags), loss_mask_BGC=flags)

    def _anchors(self, rows: int) -> Anchors:
        config = self.config.rl
        shape_BGW = (rows, config.num_generations, config.max_answer_words)
        shape_BGWQ = (*shape_BGW, self._wheels)
        shape_BGC = (rows, config.num_generations, config.max_fast_context)
        return Anchors(
            slow_BGW=self._array(shape_BGW, np.int32),
            fast_BGW=self._array(shape_BGW, np.int32),
            set_BGWQ=self._array(shape_BGWQ, np.int32),
            correct_BGWQ=self._array(shape_BGWQ, bool),
            repeat_BGWQ=self._array(shape_BGWQ, bool) if config.calibration_counts == "category" else None,
            fast=Continuations(id_BGC=self._array(shape_BGC, np.int32), exists_BGC=self._array(shape_BGC, bool)),
        )

    def _cache_bytes(self, bucket: BatchShape, completion_length: int, rules: Rules = TRAIN_RULES) -> int:
        """Bytes a chip of keys and values of all layers: prompts once a row, completions once each."""
        text = self.backbone.config.text
        tokens = bucket.tokens + self.config.rl.num_generations * completion_length
        shape = (2 * text.num_hidden_layers, bucket.rows, tokens, text.num_key_value_heads, text.head_dim)
        axes = ("layers", "batch", "length", "kv_heads", "head_dim")
        mesh = self.backbone.mesh
        sharding = jax.sharding.NamedSharding(mesh, spec(axes, on(mesh, rules), activation=True))
        return math.prod(sharding.shard_shape(shape)) * jnp.dtype(self.backbone.config.compute_dtype).itemsize

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array whose rows come first."""
        return self._placed(jax.ShapeDtypeStruct(shape, dtype), "x_B")

    def _scalar(self, value: Any) -> jax.ShapeDtypeStruct:
        """Something every chip holds whole."""
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=replicated(self.backbone.mesh))

    def _moved(self, prompts: Prompts) -> Prompts:
        """Prompts where a rollout has them: arrays of their own, or those that lie there, which count once."""

        def one(here: jax.ShapeDtypeStruct, there: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return here if here.sharding.is_equivalent_to(there.sharding, here.ndim) else there

        return jax.tree.map(one, prompts, self._placed(prompts, rules=DECODE_RULES))

    def _placed(self, tree: Any, name: str = "", rules: Rules = TRAIN_RULES) -> Any:
        """A batch as abstract arrays on the mesh, sharded as `put` shards it; `name` is that of a lone array."""
        shardings = row_shardings({name: tree} if name else tree, self.backbone.mesh, rules)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            shardings[name] if name else shardings,
        )


def _held(state: TrainState) -> dict[str, Any]:
    trained, frozen = state.split()
    towers, base = partition(frozen, lambda name: not name.startswith("text/"))
    parts = {"parameters": trained, "towers": towers, "optimizer": state.opt_state}
    # Only under adapters is the language model frozen.
    return parts | {"base": base} if base else parts


def bytes_per_chip(tree: Any) -> int:
    """Bytes of a tree of abstract arrays that one chip holds."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += math.prod(shape) * size
    return total
