"""Dropout of adapters (`model.lora.dropout`): where a gradient is taken, from bits that follow from the step."""

from __future__ import annotations

import contextlib

import jax

from mer_r1_jax.omni.batch import Prompts
from mer_r1_jax.omni.layers import adapter_dropout
from mer_r1_jax.training.backbone import Backbone


def dropout_of(backbone: Backbone, step: jax.Array, prompts: Prompts) -> contextlib.AbstractContextManager[None]:
    """The context in which a micro-batch's loss is traced; without dropout it changes nothing.

    Args:
        backbone: its architecture says which share is dropped.
        step: int32, of the train state: updates from one rollout draw different bits.
        prompts: of the micro-batch. The bits follow from its first visit, so micro-batches of a step differ, and a
            resumed run draws the same ones; which visit that is follows from the run's seed.
    """
    adapters = backbone.config.adapters
    if adapters is None or not adapters.dropout:
        return contextlib.nullcontext()
    return adapter_dropout(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), prompts.uid_B[0]))
