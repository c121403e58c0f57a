"""The programs of answering, as `mer-r1 infer`, `serve` and `evaluate` call them: encode, decode greedily, ask.

What is planned is a model as `run/policy.open_step` opens its folder: in the dtype of its files, nothing trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mer_r1_jax.config.schema import LoraConfig, ModelConfig, RunConfig
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.parallel.mesh import for_devices, row_cut
from mer_r1_jax.planning.flops import tower_flops
from mer_r1_jax.planning.programs import PlannedProgram, RunPrograms
from mer_r1_jax.planning.workload import ANSWERING, Workload
from mer_r1_jax.rl.confidence import AskedWords
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.sampling import greedy
from mer_r1_jax.training.prompts import plan_buckets
from mer_r1_jax.training.state import partition


def as_opened(config: RunConfig, devices: int) -> RunConfig:
    """The settings under which the export of such a run answers on so many devices.

    Files of a released model are bfloat16, and so is what is kept of them where products are in it too
    (`model_memory.kept_dtype`); adapters are merged; settings of a layer's training are not asked for.
    """
    kept = "bfloat16" if config.model.compute_dtype == "bfloat16" else config.model.param_dtype
    default = ModelConfig()
    model = dataclasses.replace(
        config.model,
        param_dtype=kept,
        frozen_dtype=default.frozen_dtype,
        remat=default.remat,
        packed_rows=default.packed_rows,
        lora=LoraConfig(),
        adapter_path="",
    )
    length = config.eval.max_completion_length or config.rl.max_completion_length
    return dataclasses.replace(
        config,
        name=f"{config.name}_answering",
        model=model,
        mesh=dataclasses.replace(for_devices(config.mesh, devices), sparse_core_collectives=False),
        sft=dataclasses.replace(config.sft, max_steps=0),
        # One answer a clip, as long as evaluation lets it be.
        rl=dataclasses.replace(config.rl, max_steps=0, num_generations=1, max_completion_length=length),
    )


class AnsweringPrograms(RunPrograms):
    """The programs with which the model of one configuration answers a batch of clips; see `RunPrograms`.

    Args:
        config: as `as_opened` gives it.
        devices, workload: as of `RunPrograms`.
    """

    def __init__(self, config: RunConfig, devices: Sequence[Any], workload: Workload | None = None):
        super().__init__(config, devices, workload)
        self.programs.sampling = greedy(self.programs.sampling)

    def phases(self) -> list[str]:
        """The one there is."""
        return [ANSWERING]

    def buckets(self, phase: str) -> list[BatchShape]:
        """Shapes of the prompts, the largest last; rows are rounded up to what the devices can share."""
        cut = row_cut(self.backbone.mesh)
        rows = -(-self.config.eval.prompts_per_batch // cut) * cut
        return plan_buckets(self.config, self.backbone.config, [self.workload.record()], rows)

    def of_phase(self, phase: str, bucket: BatchShape) -> list[PlannedProgram]:
        """Encoding, decoding (its weights first, where they differ) and the confidences of one batch's answers."""
        programs, backbone = self.programs, self.backbone
        params = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=backbone.shardings[name])
            for name, leaf in backbone.shapes.items()
        }
        towers, text = partition(params, lambda name: not name.startswith("text/"))
        with_clips = self._prompts(bucket)
        held: dict[str, Any] = {"parameters": text, "towers": towers, "batch": with_clips}

        def planned(name: str, function: Any, args: tuple[Any, ...], **more: Any) -> PlannedProgram:
            return PlannedProgram(name=name, phase=ANSWERING, function=function, args=args, held=dict(held), **more)

        encode = planned(
            "encode",
            programs.encode_media,
            (params, with_clips.vision, with_clips.audio),
            useful=bucket.rows * tower_flops(backbone.config, bucket),
        )
        # The clips are freed once their features are there.
        held["features"] = features = self._placed(encode.results(), "features_BRD")
        held["batch"] = with_clips.encoded(None)
        prompts = with_clips.encoded(features)
        recast = {name: params[name] for name in backbone.recast}
        cast = planned("cast", programs.cast, (recast,))
        weights = self._rollout_weights(recast)
        if recast:
            held["rollout"] = weights  # as long as batches are answered
        sample_args = (params | weights, prompts, self._scalar(jax.random.key(0)))
        rollout = self._rollout(sample_args, planned, bucket)
        length = self.config.rl.max_completion_length
        answer = AskedWords(
            continuation=Continuations(
                id_BGC=self._array((bucket.rows, 1, length), np.int32),
                exists_BGC=self._array((bucket.rows, 1, length), bool),
            ),
            index_BGW=self._array((bucket.rows, 1, self.config.rl.max_answer_words), np.int32),
            set_BGWQ=self._array((bucket.rows, 1, self.config.rl.max_answer_words, self._wheels), np.int32),
        )
        held["experience"] = answer
        ask = planned(
            "ask",
            programs.ask,
            (params, prompts, (answer,), self._scalar(self.candidates.ids_ZY)),
            cache_bytes=self._cache_bytes(bucket, 0),
        )
        return [encode, *([cast] if recast else []), *rollout, ask]
