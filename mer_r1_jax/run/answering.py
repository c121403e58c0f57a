"""How a policy, in a run or opened from a folder, is asked about records: prompts, shapes and an evaluator."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from mer_r1_jax.config.schema import RunConfig
from mer_r1_jax.data.records import Record
from mer_r1_jax.evaluation.evaluate import Evaluator
from mer_r1_jax.media.opening import MediaError
from mer_r1_jax.media.prompt import Prompt, PromptError
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.parallel.mesh import row_cut
from mer_r1_jax.run.setup import Setup
from mer_r1_jax.training.prompts import plan_buckets

log = logging.getLogger(__name__)


def eval_length(config: RunConfig) -> int:
    """Tokens an answer may have in evaluation."""
    return config.eval.max_completion_length or config.rl.max_completion_length


def eval_buckets(setup: Setup, records: tuple[Record, ...] | None = None) -> list[BatchShape]:
    """Shapes of evaluation batches: the rows asked for, rounded up to what the devices can share."""
    cut = row_cut(setup.backbone.mesh)
    rows = -(-setup.config.eval.prompts_per_batch // cut) * cut
    return plan_buckets(setup.config, setup.backbone.config, records or setup.data.eval, setup.share.of(rows))


def make_evaluator(setup: Setup, records: tuple[Record, ...] | None = None) -> Evaluator:
    """An evaluator with the settings of the run, for its held-out records or for others."""
    buckets, length = eval_buckets(setup, records), eval_length(setup.config)
    return Evaluator(setup.programs, setup.eval_scorer, setup.candidates.ids_ZY, buckets, length)


def load_prompts(setup: Setup, records: tuple[Record, ...]) -> Iterator[tuple[Record, Prompt | str]]:
    """Prompts of records; a clip that cannot be used comes as the reason, and is counted by whoever asked.

    Raises:
        PromptError: for a record that cannot become a prompt, with its file and line.
    """
    for record in records:
        try:
            yield record, setup.source.load(record).prompt
        except MediaError as error:
            log.warning("%s: %s: left out: %s", record.where, record.id, error)
            yield record, error.reason
        except PromptError as error:
            raise PromptError(f"{record.where}: {error}") from error
