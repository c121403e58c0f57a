"""Rollouts decoded in chunks of a fixed number of tokens, between which completions that have ended make room.

The host learns after every chunk how many rows the running completions need at each size a batch can have, a handful of
integers that every process sees alike, and goes on with the smallest that will do. Shape letters are those of
`mer_r1_jax.omni.batch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from mer_r1_jax import faults
from mer_r1_jax.kernels.placement import Placement, device
from mer_r1_jax.omni.batch import Array
from mer_r1_jax.omni.text import Cache, PromptCache
from mer_r1_jax.parallel.mesh import row_cut
from mer_r1_jax.parallel.rules import DECODE_RULES, replicated
from mer_r1_jax.rl import compaction
from mer_r1_jax.rl.compaction import Kept, Size
from mer_r1_jax.rl.rollout import Completions, RolloutState, Sampled, advance, finish, start
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.state import Leaves
from mer_r1_jax.training.stopping import NEVER, Stop


class ChunkedRollout:
    """The jitted programs of a rollout cut into chunks; calling it samples.

    Args:
        backbone: of the policy.
        sampling, generations, forced_ids: static; as of `rl.rollout.rollout`.
        chunk: tokens decoded at once.
    """

    def __init__(
        self, backbone: Backbone, sampling: SamplingConfig, generations: int, forced_ids: tuple[int, ...], chunk: int
    ):
        self.backbone, self.sampling, self.generations = backbone, sampling, generations
        self.forced_ids, self.chunk = forced_ids, chunk
        self._cut = row_cut(backbone.mesh)
        self._placement = Placement(backbone.mesh, DECODE_RULES["batch"], DECODE_RULES["kv_heads"])

    def __call__(
        self,
        weights: tuple[Leaves, Leaves],
        prompts: Any,
        features_BRD: Array | None,
        key: Array,
        rollout_step: Array,
        stop: Stop = NEVER,
    ) -> Completions:
        """As `RlPrograms.sample`."""
        sizes = self.sizes(len(prompts.uid_B))
        size, kept = sizes[0], None
        state, needed = self.start_program(weights, prompts, features_BRD, key, rollout_step)
        while True:
            faults.here("rollout_chunk", self.generations)
            stop.wait(needed)
            if not np.any(needed := jax.device_get(needed)):
                break
            if (smaller := compaction.smallest(sizes, needed)) != size:
                state, kept = self.compact_program(smaller)(state, kept)
                size = smaller
            state, needed = self.advance_program(sizes)(weights, state)
        return self.finish_program(state.sampled, kept)

    def sizes(self, rows: int) -> tuple[Size, ...]:
        """The sizes a batch of so many rows can shrink through, rows counted on each device."""
        return compaction.sizes(rows // self._cut, self.generations)

    @functools.cached_property
    def start_program(self) -> Callable[..., tuple[RolloutState, Array]]:
        """Prefill and the first chunk: gives the state and the rows needed (`compaction.rows_needed`).

        Arguments: weights, prompts, features_BRD, key, rollout_step.
        """

        def begin(weights: tuple[Leaves, Leaves], prompts: Any, features_BRD, key, rollout_step):
            with self.backbone.rules(decode=True):
                model = self.backbone.bind(*weights)
                state = start(
                    model,
                    features=features_BRD,
                    **prompts.of_rollout,
                    key=key,
                    rollout_step=rollout_step,
                    generations=self.generations,
                    config=self.sampling,
                    forced_ids=self.forced_ids,
                )
                return self._chunk(model, state, self.sizes(len(prompts.uid_B)))

        return jax.jit(begin, out_shardings=(self._formats, replicated(self.backbone.mesh)))

    @functools.cache  # noqa: B019 - one object a run
    def advance_program(self, sizes: tuple[Size, ...]) -> Callable[..., tuple[RolloutState, Array]]:
        """One chunk of a batch that began with the first of the sizes; the state is donated.

        Arguments: weights, state.
        """

        def go_on(weights: tuple[Leaves, Leaves], state: RolloutState):
            with self.backbone.rules(decode=True):
                return self._chunk(self.backbone.bind(*weights), state, sizes)

        return jax.jit(
            go_on,
            in_shardings=(None, self._formats),
            out_shardings=(self._formats, replicated(self.backbone.mesh)),
            donate_argnums=1,
        )

    def _chunk(self, model: Any, state: RolloutState, sizes: tuple[Size, ...]) -> tuple[RolloutState, Array]:
        state = advance(model, state, self.sampling, self.chunk)
        return state, compaction.rows_needed(state, sizes, self._cut, self.sampling.max_completion_length)

    @functools.cache  # noqa: B019 - one object a run
    def compact_program(self, size: Size) -> Callable[..., tuple[RolloutState, Kept]]:
        """`compaction.compact` to a size, on every device. Arguments: state, kept."""

        def compact(state: RolloutState, kept: Kept | None):
            result = (_STATE, Kept(sampled=_STATE.sampled, place_BG=0))
            return self._on_each_device(functools.partial(compaction.compact, size=size), (state, kept), result)

        return jax.jit(compact, in_shardings=(self._formats, None), out_shardings=(self._formats, None))

    @functools.cached_property
    def finish_program(self) -> Callable[..., Completions]:
        """The completions. Arguments: what the last batch sampled, and what was kept before it."""

        def end(sampled: Sampled, kept: Kept | None) -> Completions:
            whole = self._on_each_device(compaction.brought_back, (sampled, kept), _STATE.sampled)
            return finish(whole, self.forced_ids)

        return jax.jit(end)

    def _on_each_device(self, call: Callable[..., Any], arguments: tuple[Any, ...], result: Any) -> Any:
        """`call` on every device's own rows; `result` has the result's structure."""
        mesh = self.backbone.mesh
        if mesh.size == 1:
            return call(*arguments)
        specs = dict(in_specs=self._specs(arguments), out_specs=self._specs(result))
        return jax.shard_map(call, mesh=mesh, check_vma=False, **specs)(*arguments)

    def _specs(self, tree: Any) -> Any:
        """Where the arrays of a rollout live, by the shape letters of their names."""
        return jax.tree_util.tree_map_with_path(lambda path, _: self._placement.spec(_letters(path)), tree)

    @functools.cached_property
    def state_shardings(self) -> RolloutState:
        """Where a state lives between two chunks."""
        mesh = self.backbone.mesh
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self._specs(_STATE), is_leaf=_is_spec)

    @functools.cached_property
    def _formats(self) -> RolloutState:
        """The same, and on TPUs how it lies there: caches head by head, as the kernel reads them.

        Left to itself a program would take them token by token, and copy all of them at its beginning and its end.
        """
        if device(self._placement).platform != "tpu":
            return self.state_shardings

        def one(path: Any, sharding: NamedSharding) -> Any:
            letters = _letters(path)
            if not letters.endswith("Kh"):
                return sharding
            order = [*range(len(letters) - 3), len(letters) - 2, len(letters) - 3, len(letters) - 1]
            return Format(Layout(major_to_minor=tuple(order)), sharding)

        return jax.tree_util.tree_map_with_path(one, self.state_shardings)


# A state's structure, for what depends on the names of its arrays alone.
_STATE = RolloutState(
    step=0,
    sampled=Sampled(id_BGC=0, logprob_BGC=0, sampling_logprob_BGC=0, length_BG=0, stop_BG=0),
    cache=Cache(k_LBGCKh=0, v_LBGCKh=0),
    prompt_cache=PromptCache(k_LBTKh=0, v_LBTKh=0, valid_BT=0),
    uniform_BGC=0,
    position_B=0,
)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _letters(path: tuple[Any, ...]) -> str:
    """Shape letters of a field; none for a scalar."""
    _, found, letters = path[-1].name.rpartition("_")
    return letters if found else ""
